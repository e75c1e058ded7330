// kernel/tiled/tiled.hpp — many queries against many keys: lanes are queries, and both products have one inner loop.
//
//                 blocks of keys, on a fixed grid of positions
//               ┌──────┬──────┬──────┬──────┐        for a block of queries, in panels of one register row each:
//     panels of │ all  │ all  │ some │ none │          Sᵀ = K Qᵀ      [keys, lanes]   broadcast K, vector Q
//     queries   │ all  │ some │ none │ none │          m, Sᵀ ← e^(s - m), l             lane by lane: no sums across lanes
//               └──────┴──────┴──────┴──────┘          Oᵀ += Vᵀ Sᵀ     [v_dim, lanes]  broadcast V, vector Sᵀ
//
//     Q is packed [panel][head_dim][lanes] with its scale's sign; K and V as in kernel/tiled/packed_kv.hpp, once per kv head for all
//     query blocks and the whole group. Oᵀ is transposed when a section ends. Nothing of size n_queries·n_keys exists.
//
// Blocks and columns that a mask hides in whole are never computed: kernel/tiled/block_mask.hpp. Every element of S is
// one multiply-add chain in ascending order of features, every element of O one in ascending order of keys for each
// section of the positions, merged section by section, in whatever panel its query is: a prompt in pieces gives the
// same bits as at once, and errors do not grow with the number of keys. Dao et al. 2022, arXiv:2205.14135; lanes as
// queries is our own choice.
//
// Before: kernel/decode/int8_row_pairs.hpp   Next: kernel/tiled/step.hpp
#pragma once

#include <algorithm>
#include <cstddef>
#include <limits>

#include "../../parallel.hpp"
#include "../../product/register_tile.hpp"
#include "../../workspace.hpp"
#include "../task.hpp"
#include "pack_queries.hpp"
#include "packed_kv.hpp"
#include "query_state.hpp"
#include "step.hpp"

#include "../../base/warnings_off.hpp"

namespace qkv { inline namespace QKV_ABI { namespace kernel {

/// Queries of one work item: a few panels, so that a block of keys is used while it is in the cache.
inline constexpr Index tile_queries = 192;

/// Positions whose keys are summed in one chain. The error of a chain grows with its length (in proportion, where rows
/// repeat); a merge costs 0.3 % of the section's time.
inline constexpr Index section_keys = 24 * tile_keys;

/// Scratch of one work item.
template <class T>
struct TiledScratch {
  static constexpr Index lanes = TileShape<T>::columns;
  static constexpr Index panels = (tile_queries + lanes - 1) / lanes;

  T *q, *s, *o, *m, *l, *score_scale;
  bool* hidden;  // [tile_keys, lanes]: whether the lane does not see the key, for value rows that are not finite

  TiledScratch(detail::Carver& carver, Index head_dim, Index v_head_dim)
      : q(carver.take<T>(panels * head_dim * lanes)),
        s(carver.take<T>(tile_keys * lanes)),
        o(carver.take<T>(panels * TileShape<T>::tail_height(v_head_dim) * lanes)),
        m(carver.take<T>(panels * lanes)),
        l(carver.take<T>(panels * lanes)),
        score_scale(carver.take<T>(panels * lanes)),
        hidden(carver.take<bool>(tile_keys * lanes)) {}

  static std::size_t bytes(Index head_dim, Index v_head_dim) {
    detail::Carver carver(nullptr);
    TiledScratch(carver, head_dim, v_head_dim);
    return carver.used();
  }
};

/// One head and one block of queries against all packed keys of its kv head.
template <class T>
class Tiled {
  using V = Simd<T>;
  static constexpr Index lanes = TileShape<T>::columns, vectors = TileShape<T>::vectors;

 public:
  Tiled(const QueryTask<T>& task, const ByteRows& rows, std::span<const KeyBlock> blocks, const StateView<T>& state,
        Index head, Index query, const TiledScratch<T>& scratch, BlockStep<T>& step)
      : task_(task),
        rows_(rows),
        blocks_(blocks.data()),
        n_blocks_(static_cast<Index>(blocks.size())),
        state_(state),
        head_(head),
        query_(query),
        n_queries_(std::min(tile_queries, task.n_queries() - query)),
        scratch_(scratch),
        step_(step) {}

  /// Merges all keys of the task into the state of these queries; done(query, n_queries, head, 1) for some at a time.
  void run(detail::FunctionRef<void(Index, Index, Index, Index)> done) {
    const Index n_panels = (n_queries_ + lanes - 1) / lanes;
    // The blocks in which these queries see any key are in [first, last].
    Index first = 0, last = n_blocks_ - 1;
    while (first <= last && !seen(first)) ++first;
    while (first < last && !seen(last)) --last;
    if (first > last)
      for (Index p = 0; p < n_panels; ++p) load_panel(p);
    Index section = first <= last ? section_of(first) : 0;
    for (Index b = first; b <= last; ++b) {
      if (b != first && b != last && !seen(b)) continue;
      const bool next_section = section_of(b) != section;
      section = section_of(b);
      if (!blocks_[b].packed) step_.pack(b);
      for (Index p = 0; p < n_panels; ++p) {
        if (b == first) load_panel(p);
        if (next_section) merge(p), sums(p).clear(task_.v_head_dim);
        fetch_.clear();
        if (b == last || section_of(b + 1) != section)
          fetch_.add(FetchRows::of(state_.o(query_ + p * lanes, head_, task_.v_head_dim), state_.weighted.outerStride(),
                                   task_.v_head_dim, panel_queries(p), true));
        if (b == last && p + 1 == n_panels)  // of the item that likely runs next
          fetch_queries(query_ + n_queries_);
        fetch_block(b + 1, p, n_panels);
        if (b == first && p + 1 < n_panels) fetch_queries(query_ + (p + 1) * lanes);
        step_.run(b, panel(p), fetch_);
      }
    }
    for (Index p = 0; p < n_panels; ++p) {
      merge(p);
      done(query_ + p * lanes, panel_queries(p), head_, 1);
    }
  }

 private:
  Index panel_queries(Index p) const { return std::min(lanes, n_queries_ - p * lanes); }
  PanelState<T> sums(Index p) const {
    return {scratch_.m + p * lanes, scratch_.l + p * lanes, scratch_.score_scale + p * lanes,
            scratch_.o + p * TileShape<T>::tail_height(task_.v_head_dim) * lanes};
  }
  QueryPanel<T> panel(Index p) const {
    return {query_ + p * lanes, panel_queries(p), scratch_.q + p * task_.head_dim * lanes, sums(p)};
  }

  Index section_of(Index b) const { return blocks_[b].cell.first / section_keys; }
  EIGEN_DONT_INLINE void merge(Index p) const {
    merge_panel(sums(p), task_.rule.plain, state_, query_ + p * lanes, panel_queries(p), head_, task_.v_head_dim);
  }

  /// ±Qᵀ [head_dim, lanes], with the sign of the scale; the state of no keys. Lanes without a query are zeros.
  EIGEN_DONT_INLINE void load_panel(Index p) {
    const Index n = panel_queries(p);
    const T scale = std::max(task_.scale < 0 ? -task_.scale : task_.scale, std::numeric_limits<T>::min());
    std::fill_n(scratch_.score_scale + p * lanes, lanes, scale);
    for (Index v = 0; v < vectors; ++v) {
      const Index first = p * lanes + v * V::width, some = std::clamp<Index>(n - v * V::width, 0, V::width);
      const QueryRows<T> from{task_.query(query_ + first, head_), task_.q.outerStride(), some, task_.head_dim,
                              task_.scale < 0 ? T(-1) : T(1)};
      step_.load(from, panel(p), v * V::width);
    }
    sums(p).clear(task_.v_head_dim);
  }
  /// Whether a query of this item may see a key of block b.
  EIGEN_DONT_INLINE bool seen(Index b) const {
    for (const GridPiece& piece : GridPieces(rows_.runs, tile_keys, blocks_[b].cell))
      if (task_.rule.cover(task_.tile(head_, 1, query_, n_queries_, piece, 0, piece.count)) != Cover::none) return true;
    return false;
  }
  void fetch_queries(Index query) {
    const Index n = std::min(lanes, task_.n_queries() - query);
    if (n > 0) fetch_.add(FetchRows::of(task_.query(query, head_), task_.q.outerStride(), task_.head_dim, n));
  }
  /// Lists the p-th part of the rows of block b for prefetching, if it is to be packed; of its first run only.
  EIGEN_DONT_INLINE void fetch_block(Index b, Index p, Index n_panels) {
    if (b >= n_blocks_ || blocks_[b].packed) return;
    const KeyBlock& block = blocks_[b];
    const Index held = std::min(rows_.runs[block.cell.run].rows - block.cell.row, block.count);
    const Index begin = held * p / n_panels, n = held * (p + 1) / n_panels - begin;
    if (n <= 0) return;
    const Index kv_head = task_.heads.kv_head(head_), row = block.cell.row + begin;
    for (const RowBytes& next :
         {rows_.keys(block.cell.run, kv_head, row, n), rows_.values(block.cell.run, kv_head, row, n)})
      fetch_.add(FetchRows::of(next.first, next.stride, next.width, next.count));
  }

  const QueryTask<T>& task_;
  const ByteRows& rows_;
  const KeyBlock* blocks_;
  Index n_blocks_;
  const StateView<T>& state_;
  Index head_, query_, n_queries_;
  TiledScratch<T> scratch_;
  FetchList fetch_;
  BlockStep<T>& step_;
};

}}}  // namespace qkv::QKV_ABI::kernel

#include "../../base/warnings_on.hpp"

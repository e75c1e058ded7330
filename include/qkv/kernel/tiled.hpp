// kernel/tiled.hpp — many queries against many keys: lanes are queries, and one inner loop serves both products.
//
//                 blocks of keys, on a fixed grid of positions
//               ┌──────┬──────┬──────┬──────┐        for a block of queries, in panels of one register row each:
//     panels of │ all  │ all  │ some │ none │          Sᵀ = K Qᵀ      [keys, lanes]   broadcast K, vector Q
//     queries   │ all  │ some │ none │ none │          m, Sᵀ ← e^(s - m), l             lane by lane: no sums across lanes
//               └──────┴──────┴──────┴──────┘          Oᵀ += Vᵀ Sᵀ     [v_dim, lanes]  broadcast V, vector Sᵀ
//
//     Q is packed [panel][head_dim][lanes] with its scale's sign; K and V as in kernel/panels.hpp, once per kv head for all
//     query blocks and the whole group. Oᵀ is turned back when a section ends. Nothing of size n_queries·n_keys exists.
//
// What a mask hides in whole is never computed: kernel/panel_mask.hpp. Every element of S is one multiply-add chain in
// ascending order of features, every element of O one in ascending order of keys for each section of the positions, merged
// section by section, whatever panel its query sits in: a prompt fed in pieces gives the same bits as at once, and errors
// do not grow with the number of keys. Dao et al. 2022, arXiv:2205.14135; lanes as queries is our own choice.
//
// Before: kernel/panel_sums.hpp   Next: kernel/dots.hpp
#pragma once

#include <algorithm>
#include <cstring>
#include <limits>
#include <numbers>

#include "../softmax.hpp"
#include "../workspace.hpp"
#include "panel_mask.hpp"
#include "panel_packer.hpp"
#include "panel_softmax.hpp"
#include "panel_sums.hpp"
#include "query_panels.hpp"
#include "register_tile.hpp"
#include "task.hpp"
#include "value_tile.hpp"
#include "word_tile.hpp"

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // of AVX-512 intrinsics, as in kernel/simd.hpp
#endif

namespace qkv::inline QKV_ABI::kernel {

/// Queries of one work item: a few panels, so that a block of keys is used while it is in the cache.
inline constexpr Index tile_queries = 192;

/// Positions whose keys are summed in one chain. The error of a chain grows with its length, where rows repeat in
/// proportion to it; a merge takes 0.3 % of the section's time.
inline constexpr Index section_keys = 24 * tile_keys;

template <class T>
inline constexpr T log2_e = static_cast<T>(std::numbers::log2e_v<long double>);

/// Scratch of one work item.
template <class T>
struct TiledScratch {
  static constexpr Index lanes = TileShape<T>::columns;
  static constexpr Index panels = (tile_queries + lanes - 1) / lanes;

  T *q, *s, *o, *m, *l, *unit;
  bool* hidden;  // [tile_keys, lanes]: pairs of the rows that are not finite

  TiledScratch(detail::Carver& carver, Index head_dim, Index v_head_dim)
      : q(carver.take<T>(panels * head_dim * lanes)),
        s(carver.take<T>(tile_keys * lanes)),
        o(carver.take<T>(panels * v_head_dim * lanes)),
        m(carver.take<T>(panels * lanes)),
        l(carver.take<T>(panels * lanes)),
        unit(carver.take<T>(panels * lanes)),
        hidden(carver.take<bool>(tile_keys * lanes)) {}

  static std::size_t bytes(Index head_dim, Index v_head_dim) {
    detail::Carver carver(nullptr);
    TiledScratch(carver, head_dim, v_head_dim);
    return carver.used();
  }
};

/// One head and one block of queries against all packed keys of its kv head.
template <class A, class T, StorageType S, class M, class F>
class Tiled {
  using Number = typename A::Number;
  using V = Simd<T>;
  using Vec = typename V::Vec;
  static constexpr Index lanes = TileShape<T>::columns;
  static constexpr Index vectors = TileShape<T>::vectors;
  static constexpr Index rows = TileShape<T>::rows;
  static constexpr bool plain = std::is_same_v<F, Plain>;
  using Softmax = PanelSoftmax<A>;

 public:
  Tiled(const Task<T, S, M, F>& task, const StateView<T>& state, const Panels<A>& panels, Index n_blocks, Index head,
        Index query, std::byte* scratch)
      : task_(task),
        state_(state),
        panels_(panels),
        n_blocks_(n_blocks),
        head_(head),
        query_(query),
        n_queries_(std::min(tile_queries, task.n_queries() - query)),
        carver_(scratch),
        scratch_(carver_, task.head_dim(), task.v_head_dim()) {}

  /// Merges all keys of the task into the state of these queries; done(query, n_queries, head, 1) for some at a time.
  template <class Done>
  void run(const Done& done) {
    const Index n_panels = (n_queries_ + lanes - 1) / lanes;
    // The blocks that these queries see anything of lie in [first, last].
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
      if (!panels_.blocks[b].packed) BlockPacker<A, S>(panels_, task_.keys, task_.heads.kv_head(head_), b).run();
      for (Index p = 0; p < n_panels; ++p) {
        if (b == first) load_panel(p);
        if (next_section) merge(p), sums(p).clear(task_.v_head_dim());
        fetch_.clear();
        if (b == last || section_of(b + 1) != section)
          fetch_.add(FetchRows::of(state_.o(query_ + p * lanes, head_, task_.v_head_dim()),
                                   state_.weighted.outerStride(), task_.v_head_dim(), panel_queries(p), true));
        if (b == last && p + 1 == n_panels)  // of the item that is likely to come next
          fetch_queries(query_ + n_queries_);
        fetch_block(b + 1, p, n_panels);
        if (b == first && p + 1 < n_panels) fetch_queries(query_ + (p + 1) * lanes);
        attend(b, p);
      }
    }
    for (Index p = 0; p < n_panels; ++p) {
      merge(p);
      done(query_ + p * lanes, panel_queries(p), head_, Index(1));
    }
  }

 private:
  Index panel_queries(Index p) const { return std::min(lanes, n_queries_ - p * lanes); }
  Number* q(Index p) const { return reinterpret_cast<Number*>(scratch_.q) + p * panels_.key_depth() * lanes; }
  T* o(Index p) const { return scratch_.o + p * task_.v_head_dim() * lanes; }
  PanelSums<T> sums(Index p) const {
    return {scratch_.m + p * lanes, scratch_.l + p * lanes, scratch_.unit + p * lanes, o(p)};
  }

  Index section_of(Index b) const { return panels_.blocks[b].first / section_keys; }
  void merge(Index p) const {
    merge_panel<plain>(sums(p), state_, query_ + p * lanes, panel_queries(p), head_, task_.v_head_dim());
  }

  /// ±Qᵀ [head_dim, lanes], with the sign of the scale; the state of no keys. Lanes without a query are zeros.
  void load_panel(Index p) {
    const Index n = panel_queries(p);
    const T scale = std::max(task_.scale < 0 ? -task_.scale : task_.scale, std::numeric_limits<T>::min());
    std::fill_n(scratch_.unit + p * lanes, lanes, scale);
    for (Index v = 0; v < vectors; ++v) {
      const Index first = p * lanes + v * V::width, some = std::clamp<Index>(n - v * V::width, 0, V::width);
      const QueryRows<T> from{task_.query(query_ + first, head_), task_.q.outerStride(), some, task_.head_dim(),
                              task_.scale < 0 ? T(-1) : T(1)};
      pack_queries(A{}, from, q(p) + v * V::width, lanes, scratch_.unit + first);
    }
    sums(p).clear(task_.v_head_dim());
  }
  /// Whether a query of this item may see a key of block b.
  bool seen(Index b) const {
    const KeyBlock& block = panels_.blocks[b];
    bool any = false;
    for_each_piece(task_.keys, tile_keys, block.first, block.run, block.base, block.row,
                   [&](const KeyRun<S>& run, Index base, Index row, Index count, Index) {
                     any = any || detail::cover(*task_.mask, task_.block(head_, query_, n_queries_, run, base, row,
                                                                         count)) != Cover::none;
                   });
    return any;
  }
  void fetch_queries(Index query) {
    const Index n = std::min(lanes, task_.n_queries() - query);
    if (n > 0) fetch_.add(FetchRows::of(task_.query(query, head_), task_.q.outerStride(), task_.head_dim(), n));
  }
  /// Asks for the p-th part of the rows of block b, if it is to be packed: of its first run only.
  void fetch_block(Index b, Index p, Index n_panels) {
    if (b >= n_blocks_ || panels_.blocks[b].packed) return;
    const KeyBlock& block = panels_.blocks[b];
    const KeyRun<S>& run = task_.keys.runs[block.run];
    const Index count = std::min(run.rows - block.row, block.count), kv_head = task_.heads.kv_head(head_);
    const Index begin = count * p / n_panels, n = count * (p + 1) / n_panels - begin;
    if (n <= 0) return;
    fetch_.add(
        FetchRows::of(task_.keys.key(run, kv_head, block.row + begin), task_.keys.key_row_stride, task_.head_dim(), n));
    fetch_.add(FetchRows::of(task_.keys.value(run, kv_head, block.row + begin), task_.keys.value_row_stride,
                             task_.v_head_dim(), n));
  }

  /// Merges block b into the state of panel p.
  void attend(Index b, Index p) {
    const KeyBlock& block = panels_.blocks[b];
    const PanelMask<T, S, M, F> mask(task_, block, head_, query_ + p * lanes, panel_queries(p));
    if (mask.all_empty()) return;
    static_assert(vectors == 2);
    const Columns &left = mask.columns(0), &right = mask.columns(1);
    Span before{left.begin, left.end}, both, after{right.begin, right.end};
    if (!left.empty() && !right.empty() && right.begin < left.end)
      both = {right.begin, left.end}, before.end = right.begin, after.begin = left.end;
    multiply_keys<1>(b, p, 0, before);
    multiply_keys<2>(b, p, 0, both);
    multiply_keys<1>(b, p, 1, after);
    for (Index v = 0; v < vectors; ++v) mask.rescore(v, scratch_.s, V::load(scratch_.unit + p * lanes + v * V::width));
    mark_hidden(block, b, mask);
    soften(mask, b, p);
    multiply_values(b, p, before, both, after);
    add_not_finite(block, b, p);
  }

  /// Sᵀ of some columns, of Vectors registers from v on. The last tile of a block may be lower than the others: it is
  /// always computed for both registers.
  template <Index Vectors>
  void multiply_keys(Index b, Index p, Index v, const Span& columns) {
    const Index count = columns.end - columns.begin, depth = panels_.key_depth(), c = columns.begin;
    if (count <= 0) return;
    const Index full = count / rows, rest = count % rows, last = c + full * rows;
    const Number* const a = panels_.block_keys(b);
    if constexpr (!A::words) {
      TileOperands<T> op{.depth = depth, .b_step = lanes, .c_row = lanes};
      op.a = a + c * depth, op.b = q(p) + v * V::width, op.c = scratch_.s + c * lanes + v * V::width;
      packed_tiles<rows, Vectors>(op, full, depth * rows, lanes * rows, fetch_);
      op.a = a + last * depth, op.b = q(p), op.c = scratch_.s + last * lanes;
      if (rest > 0) packed_tile_of<T>(rest, op);
    }
#if defined(QKV_DETAIL_WORDS) || defined(QKV_DETAIL_SHORTS)
    if constexpr (A::words) {
      using Dot = ScoreDot<A>;
      const auto at = [&](Index column, Index vector) {
        WordOperands op{.depth = depth, .a = a + column * depth, .b = q(p) + vector * V::width, .b_step = lanes};
        op.row = b * tile_keys + column, op.offset = panels_.key_offsets, op.scale = panels_.key_scales;
        op.c = scratch_.s + column * lanes + vector * V::width, op.c_row = lanes;
        return op;
      };
      word_tiles<Dot, rows, Vectors>(at(c, v), full, depth * rows, lanes * rows, fetch_);
      if (rest > 0) word_tile_of<Dot>(rest, at(last, 0), fetch_);
    }
#endif
  }

  /// m and l of the panel ← merged with the scores, which become weights; Oᵀ ← rescaled.
  void soften(const PanelMask<T, S, M, F>& mask, [[maybe_unused]] Index b, Index p) {
    bool moved = false;
    alignas(detail::cache_line) T keep[std::size_t(lanes)];
    for (Index v = 0; v < vectors; ++v) {
      const Columns& columns = mask.columns(v);
      if (columns.empty()) {
        V::store(keep + v * V::width, V::broadcast(T(1)));
        if constexpr (A::steps) V::store(take_ + v * V::width, V::zero());
        continue;
      }
      T* const s = scratch_.s + v * V::width;
      T* const m = scratch_.m + p * lanes + v * V::width;
      T* const l = scratch_.l + p * lanes + v * V::width;
      const Vec low = V::broadcast(detail::minus_infinity<T>), one = V::broadcast(T(1));
      const Vec unit = plain ? V::load(scratch_.unit + p * lanes + v * V::width) : one;
      const Vec old = V::load(m);
      Vec largest, to_log2 = V::mul(V::broadcast(log2_e<T>), unit);
#ifdef QKV_DETAIL_WORDS
      Vec top;
      const float* const logs = A::bytes ? panels_.value_logs + b * tile_keys : nullptr;
      if constexpr (A::bytes) {
        const auto both = Softmax::largest_of_both(s, columns.begin, columns.end, to_log2, logs);
        largest = both.score, top = both.product;
      } else
#endif
        largest = Softmax::largest(s, columns.begin, columns.end);
      const Vec now = V::max(old, largest);
      const auto nothing = V::less_equal(now, low);  // -inf: the lane has seen no key yet
      const Vec base = V::select(nothing, V::zero(), now);
      to_log2 = V::select(nothing, V::broadcast(log2_e<T>), to_log2);  // a query of NaN has no unit
      const Vec factor = V::weight(V::sub(old, base), to_log2);
      Vec sum;
#ifdef QKV_DETAIL_WORDS
      if constexpr (A::bytes) {
        const auto w = Softmax::weigh_bytes(s, columns.begin, columns.end, top, base, to_log2, logs,
                                            panels_.value_inverses + b * tile_keys);
        sum = w.sum;
        V::store(take_ + v * V::width, w.step);
      } else
#endif
#ifdef QKV_DETAIL_SHORTS
          if constexpr (A::shorts) {
        const auto w =
            Softmax::weigh_shorts(s, columns.begin, columns.end, base, to_log2, panels_.value_scales + b * tile_keys);
        sum = w.sum;
        V::store(take_ + v * V::width, w.step);
      } else
#endif
        sum = Softmax::weigh(s, columns.begin, columns.end, base, to_log2);
      V::store(m, V::fma(V::zero(), sum, now));  // a score of NaN is in the sum, whatever the maximum made of it
      V::store(l, V::fma(V::load(l), factor, sum));
      V::store(keep + v * V::width, factor);
      moved = moved || V::any(V::less(old, now));
    }
    if (!moved) return;
    T* at = o(p);
    for (Index x = 0; x < task_.v_head_dim(); ++x, at += lanes)
      for (Index v = 0; v < vectors; ++v)
        V::store(at + v * V::width, V::mul(V::load(at + v * V::width), V::load(keep + v * V::width)));
  }

  /// Oᵀ += Vᵀ Sᵀ, `rows` features at a time.
  void multiply_values(Index b, Index p, Span before, Span both, Span after) {
    const Index dv = task_.v_head_dim(), full = dv / rows, rest = dv % rows;
    const Index count = (panels_.blocks[b].count + A::keys - 1) / A::keys;
    for (Span* span : {&before, &both, &after})
      *span = span->begin >= span->end ? Span{} : Span{span->begin / A::keys, (span->end + A::keys - 1) / A::keys};
    ValueOperands<Number> op{.before = before, .both = both, .after = after};
    op.a = panels_.block_values(b);
    op.b = reinterpret_cast<const Number*>(scratch_.s), op.b_step = lanes;
    op.o = o(p), op.o_row = lanes;
    if constexpr (A::steps) op.take = take_;
    value_tiles<ValueDot<A>, rows>(op, full, count * rows, fetch_);
    op.a += full * rows * count, op.o += full * rows * lanes;
    if (rest > 0) value_tile_of<ValueDot<A>, rows>(rest, op, fetch_);
  }
  /// The weight of one pair, as it was multiplied; what it multiplies here is not finite.
  T weight(Index c, Index lane) const {
    if constexpr (A::steps) {
      constexpr Index bits = 32 / A::keys;
      Word several;
      std::memcpy(&several, scratch_.s + c / A::keys * lanes + lane, sizeof several);
      return static_cast<T>(several >> (bits * (c % A::keys)) & ((Word{1} << bits) - 1));
    } else if constexpr (A::words) {
      const Word pair = reinterpret_cast<const Word*>(scratch_.s)[c / 2 * lanes + lane];
      const Word bits = c % 2 == 0 ? pair << 16 : pair & 0xFFFF0000U;
      T value;
      std::memcpy(&value, &bits, sizeof bits);
      return value;
    } else {
      return scratch_.s[c * lanes + lane];
    }
  }

  /// Value rows that are not finite are packed as zeros; they reach the lanes that see them here, one by one.
  void mark_hidden(const KeyBlock& block, Index b, const PanelMask<T, S, M, F>& mask) {
    for (Index i = 0; i < block.not_finite; ++i) {
      const Index c = panels_.not_finite[b * tile_keys + i];
      for (Index lane = 0; lane < lanes; ++lane)
        scratch_.hidden[c * lanes + lane] =
            !mask.columns(lane / V::width).holds(c) || scratch_.s[c * lanes + lane] == detail::minus_infinity<T>;
    }
  }
  void add_not_finite(const KeyBlock& block, Index b, Index p) {
    const Index dv = task_.v_head_dim();
    for (Index i = 0; i < block.not_finite; ++i) {
      const Index c = panels_.not_finite[b * tile_keys + i];
      for_each_piece(task_.keys, tile_keys, block.first, block.run, block.base, block.row,
                     [&](const KeyRun<S>& run, Index, Index row, Index count, Index column) {
                       if (c < column || c >= column + count) return;
                       const Index kv_head = task_.heads.kv_head(head_), at = row + c - column;
                       const S* const value = task_.keys.value(run, kv_head, at);
                       const T scale = static_cast<T>(task_.keys.value_scale(run, kv_head, at));
                       for (Index lane = 0; lane < panel_queries(p); ++lane)
                         if (!scratch_.hidden[c * lanes + lane])
                           for (Index x = 0; x < dv; ++x)
                             o(p)[x * lanes + lane] += weight(c, lane) * (static_cast<T>(value[x]) * scale);
                     });
    }
  }

  const Task<T, S, M, F>& task_;
  const StateView<T>& state_;
  const Panels<A>& panels_;
  Index n_blocks_, head_, query_, n_queries_;
  detail::Carver carver_;
  TiledScratch<T> scratch_;
  FetchList fetch_;
  alignas(detail::cache_line) T take_[std::size_t(A::steps ? lanes : 1)];  // in steps: what one is worth
};

}  // namespace qkv::inline QKV_ABI::kernel

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif

// kernel/tiled/block_mask.hpp — the rule applied to a panel of queries and a block of keys: columns to compute, then scores.
//
//              columns of the block, `step` at a time
//              ┌─────┬─────┬─────┬─────┬─────┐
//     v = 0    │ all │ all │some │none │none │    columns [begin, end) of register 0: three steps
//     v = 1    │ all │ all │ all │ all │some │    of register 1: five
//              └─────┴─────┴─────┴─────┴─────┘
//
// The cover of the rule (kernel/pair_rule.hpp) is taken for the block; if that is mixed, for its steps; if a step is mixed, for
// its registers. Columns hidden in whole at either end are never computed; hidden pairs in between get a score of -inf.
//
// Before: kernel/tiled/step.hpp   Next: kernel/tiled/packed_kv.hpp
#pragma once

#include <algorithm>
#include <span>

#include "../task.hpp"
#include "packed_kv.hpp"

namespace qkv { inline namespace QKV_ABI { namespace kernel {

/// Columns [begin, end) that one register of queries sees, maybe none. begin is a multiple of `step`.
struct Columns {
  Index begin = 0, end = 0;
  bool mixed = false;  // some pairs are hidden

  bool empty() const { return begin >= end; }
  bool holds(Index column) const { return begin <= column && column < end; }
};

template <class T>
class PanelMask {
  using V = Simd<T>;
  static constexpr Index lanes = TileShape<T>::columns, vectors = TileShape<T>::vectors;

 public:
  /// A multiple of every tile height, and of the partial sums of kernel/register_softmax.hpp: bits must not depend on where
  /// the columns of a register begin.
  static constexpr Index step = 12, steps = tile_keys / step;
  static_assert(step % TileShape<T>::rows == 0 && tile_keys % step == 0);

  /// `n_queries` <= lanes queries from row `query` on, of one head, and a block of keys.
  PanelMask(const QueryTask<T>& task, std::span<const ByteRun> runs, const KeyBlock& block, Index head, Index query,
            Index n_queries)
      : task_(task), runs_(runs), block_(block), head_(head), query_(query), n_queries_(n_queries) {
    look();
  }

  const Columns& columns(Index v) const { return columns_[v]; }
  bool all_empty() const {
    for (const Columns& c : columns_)
      if (!c.empty()) return false;
    return true;
  }

  /// Applies the rule to the scores [column][lanes] of register v, in place. score_scale [width], one per lane.
  EIGEN_DONT_INLINE void finish(Index v, T* scores, const T* score_scale) const {
    const Index begin = columns_[v].begin, end = columns_[v].end;
    if (!columns_[v].mixed && task_.rule.plain) return;
    T* const at = scores + v * V::width;
    const auto hide = [&](Index from, Index to) {
      for (; from < to; ++from) V::store(at + from * lanes, V::broadcast(detail::minus_infinity<T>));
    };
    Index next = begin;  // columns before it are done
    for (const GridPiece& piece : pieces()) {
      const Index column = piece.column;
      if (column + piece.count <= begin || column >= end) continue;
      hide(next, column);
      next = std::min(column + piece.count, end);
      for (Index c = std::max(column, begin); c < next;) {
        const Cover cover = cover_[v][c / step];
        Index to = std::min(next, (c / step + 1) * step);
        while (to < next && cover_[v][to / step] == cover) to = std::min(next, to + step);
        if (cover == Cover::none)
          hide(c, to);
        else
          task_.rule.template finish<Inner::lanes>(tile(v, piece, c - column, to - c), cover, at + c * lanes, lanes,
                                                   score_scale);
        c = to;
      }
    }
    hide(next, end);
  }

 private:
  GridPieces<ByteRun> pieces() const { return {runs_, tile_keys, block_.cell}; }
  Index queries(Index v) const { return std::clamp<Index>(n_queries_ - v * V::width, 0, V::width); }
  /// Register v × some keys of a piece.
  PairTile tile(Index v, const GridPiece& piece, Index i, Index count) const {
    return task_.tile(head_, 1, query_ + v * V::width, queries(v), piece, i, count);
  }

  void look() {
    bool mixed = block_.gaps;
    // Columns of one step, or some of them: a step may hold pieces of several runs.
    const auto note = [&](Index v, Cover c, Index column) {
      Columns& columns = columns_[v];
      Cover& here = cover_[v][column / step];
      const bool first = column / step >= noted_[v];
      noted_[v] = column / step + 1;
      here = first || here == c ? c : Cover::some;
      if (here != Cover::all) columns.mixed = true;
      if (c == Cover::none) return;
      if (columns.empty()) columns.begin = column / step * step;
      columns.end = std::min((column / step + 1) * step, block_.count);
    };
    const auto all_of = [&](Cover c, Index column, Index count) {
      for (Index i = 0; i < count;) {
        const Index some = std::min(count - i, step - (column + i) % step);
        for (Index v = 0; v < vectors; ++v) note(v, queries(v) > 0 ? c : Cover::none, column + i);
        i += some;
      }
    };
    for (const GridPiece& piece : pieces()) {
      const auto whole = [&](Index from, Index n) {
        return task_.rule.cover(task_.tile(head_, 1, query_, n_queries_, piece, from, n));
      };
      if (const Cover c = whole(0, piece.count); c != Cover::some) {
        all_of(c, piece.column, piece.count);
        continue;
      }
      for (Index i = 0; i < piece.count;) {
        const Index some = std::min(piece.count - i, step - (piece.column + i) % step);
        const Cover c = whole(i, some);
        for (Index v = 0; v < vectors; ++v)
          note(v,
               queries(v) == 0    ? Cover::none
               : c != Cover::some ? c
                                  : task_.rule.cover(tile(v, piece, i, some)),
               piece.column + i);
        i += some;
      }
    }
    for (Columns& c : columns_) c.mixed = c.mixed || mixed;
    // value_tile needs register 0 to begin and end first. Where a mask orders them otherwise, both get all columns.
    Columns &left = columns_[0], &right = columns_[1];
    if (!left.empty() && !right.empty() && (left.begin > right.begin || left.end > right.end))
      left = right = {std::min(left.begin, right.begin), std::max(left.end, right.end), true};
  }

  const QueryTask<T>& task_;
  std::span<const ByteRun> runs_;
  const KeyBlock& block_;
  Index head_, query_, n_queries_;
  Columns columns_[std::size_t(vectors)];
  Index noted_[std::size_t(vectors)] = {};
  Cover cover_[std::size_t(vectors)][std::size_t(steps)];
};

}}}  // namespace qkv::QKV_ABI::kernel

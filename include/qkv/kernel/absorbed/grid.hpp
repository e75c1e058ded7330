// kernel/absorbed/grid.hpp — the grid of positions on which absorbed attention iterates over latent rows.
//
//     block b: the rows at positions [b·block_rows, (b + 1)·block_rows), column = position - b·block_rows
//     split s: the blocks at positions [s·split_rows, (s + 1)·split_rows), merged in ascending order
//
// The grid is absolute (kernel/position_grid.hpp): how rows were appended and where they lie does not change a bit.
//
// Before: kernel/absorbed/splits.hpp   Next: kernel/absorbed/blocks.hpp
#pragma once

#include <algorithm>
#include <cstddef>
#include <span>

#include "../byte_rows.hpp"
#include "../position_grid.hpp"
#include "tiles.hpp"

namespace qkv { inline namespace QKV_ABI { namespace kernel::absorbed {

/// Positions of a block and of a split. One slice of a block's values and the weights of a panel should fit the
/// first-level cache (measured: 96 rows of float are 1 to 4 % faster than 192; half as many narrow rows are 2 %
/// slower). With 16 registers (AVX2) this block, the next, queries and accumulators should fit a second-level cache of
/// 512 KB.
template <bool Words>
inline constexpr Index block_rows = (Words ? 2 : 1) * (Shape<float>::wide ? 96 : 48);
inline constexpr Index split_rows = 768;

constexpr Index round_up(Index n, Index to) { return (n + to - 1) / to * to; }

/// A block and where its rows are.
struct Place {
  GridCell cell;
  Index begin = 0;     // first column held
  Index count = 0;     // one past the last column held
  bool whole = false;  // all in one run
};

/// The block in a cell of the grid of `rows` positions.
inline Place place_of(std::span<const ByteRun> runs, Index rows, const GridCell& cell) {
  Place place{.cell = cell, .begin = rows};
  Index pieces = 0;
  for (const GridPiece& piece : GridPieces(runs, rows, cell)) {
    place.begin = std::min(place.begin, piece.column);
    place.count = piece.column + piece.count;
    ++pieces;
  }
  place.whole = pieces == 1;
  return place;
}

/// The softmax state of some lanes, m the maximum of scores; o [lanes, o_step].
template <class T>
struct LaneState {
  T *m, *l, *o;
  Index o_step;
};

/// Some lanes of a task, whatever the arithmetic.
template <class T>
class LaneGroup {
 public:
  virtual void load_queries() = 0;
  /// state ← that of the rows of `places`, `next` coming after them (or null).
  virtual void attend(const Place* places, Index n_places, const Place* next, const LaneState<T>& state) = 0;

 protected:
  LaneGroup() = default;
  LaneGroup(const LaneGroup&) = default;
  LaneGroup& operator=(const LaneGroup&) = default;
  ~LaneGroup() = default;  // groups lie in scratch memory
};

}}}  // namespace qkv::QKV_ABI::kernel::absorbed

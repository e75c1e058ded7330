// kernel/latent_grid.hpp — the grid of positions on which absorbed attention goes through latent rows.
//
//     block b: the rows at positions [b·block_rows, (b + 1)·block_rows), column = position - b·block_rows
//     split s: the blocks at positions [s·split_rows, (s + 1)·split_rows), merged in ascending order
//
//     runs (pages)   ├──── 0 ────┤├──── 1 ────┤     ├─── 2 ───┤
//     blocks         ├── 0 ──┼── 1 ──┼── 2 ──┼── 3 ──┼── 4 ──┤     block 1 has two pieces, block 3 two and a gap
//
// The grid is absolute: how rows were appended and where they lie does not change a bit.
//
// Before: kernel/latent_tiles.hpp   Next: kernel/latent_packing.hpp
#pragma once

#include <algorithm>
#include <cstddef>

#include "../detail/latent_rows.hpp"
#include "latent_tiles.hpp"

namespace qkv::inline QKV_ABI::kernel::absorbed {

/// The grid of positions: blocks, and splits of whole blocks whose states are merged in ascending order. What of a block
/// one slice of values reads, and the weights of a panel, should fit the first-level cache (measured: 96 rows of float
/// are 1 to 4 % faster than 192; words, half as many, are 2 % slower). With 16 registers, of
/// AVX2, this block, the next, queries and sums are to fit a second-level cache of 512 KB.
template <bool Words>
inline constexpr Index block_rows = (Words ? 2 : 1) * (Shape<float>::wide ? 96 : 48);
inline constexpr Index split_rows = 768;

constexpr Index round_up(Index n, Index to) { return (n + to - 1) / to * to; }

/// Where a block's rows are.
struct Place {
  Index first = 0;      // position of column 0
  Index begin = 0;      // first column held
  Index count = 0;      // one past the last column held
  std::size_t run = 0;  // where its rows begin: run, logical row of that run's first row, row in the run
  Index base = 0, row = 0;
  bool whole = false;  // all in one run
};

/// The pieces of a block: f(run, base, row, count, column).
template <Index Rows, StorageType S, class F>
void for_each_piece(const LatentRows<S>& rows, const Place& place, F&& f) {
  Index base = place.base, row = place.row;
  for (std::size_t r = place.run; r < rows.runs.size(); base += rows.runs[r].rows, row = 0, ++r) {
    const auto& run = rows.runs[r];
    if (run.rows == 0) continue;
    const Index end = std::min(run.rows, place.first + Rows - run.position);
    if (end <= row) return;
    f(run, base, row, end - row, run.position + row - place.first);
  }
}

/// f(place) for all blocks that hold a row, in ascending position.
template <Index Rows, StorageType S, class F>
void for_each_block(const LatentRows<S>& rows, F&& f) {
  const auto& runs = rows.runs;
  std::size_t r = 0;
  Index base = 0, row = 0;  // logical row of the run's first row; next row inside the run
  while (r < runs.size()) {
    if (row == runs[r].rows) {
      base += runs[r].rows, row = 0, ++r;
      continue;
    }
    const Index first = (runs[r].position + row) / Rows * Rows;
    Place place{.first = first, .begin = Rows, .run = r, .base = base, .row = row};
    Index pieces = 0;
    for_each_piece<Rows>(rows, place, [&](const LatentRun<S>&, Index, Index, Index count, Index column) {
      place.begin = std::min(place.begin, column);
      place.count = column + count;
      ++pieces;
    });
    place.whole = pieces == 1;
    f(place);
    while (r < runs.size()) {
      row = std::min(runs[r].rows, first + Rows - runs[r].position);
      if (row < runs[r].rows) break;
      base += runs[r].rows, row = 0, ++r;
      if (r < runs.size() && runs[r].position >= first + Rows) break;
    }
  }
}

}  // namespace qkv::inline QKV_ABI::kernel::absorbed

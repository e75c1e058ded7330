// kernel/position_grid.hpp — the grid of absolute positions on which every kernel iterates over keys.
//
//     cell c: the rows at positions [c·step, (c + 1)·step)          column = position - c·step
//
//     runs (pages)   ├──── 0 ────┤├──── 1 ────┤     ├─── 2 ───┤
//     cells          ├── 0 ──┼── 1 ──┼── 2 ──┼── 3 ──┼── 4 ──┤      cell 1 has two pieces, cell 3 two and a gap
//
//     for (const GridCell& cell : GridCells(runs, step))            cells that hold rows, in ascending order
//       for (const GridPiece& piece : GridPieces(runs, step, cell))     their parts that lie in one run
//
// Whatever runs hold the rows, and however the queries arrive, a cell holds the same keys: so paged, ring and contiguous
// caches, and a prompt in pieces, give the same bits. A Run has `rows` and `position` (of its first row).
//
// Before: kernel/pair_rule.hpp   Next: kernel/byte_rows.hpp
#pragma once

#include <algorithm>
#include <cstddef>
#include <iterator>
#include <span>

#include "../mask.hpp"

namespace qkv { inline namespace QKV_ABI { namespace kernel {

/// A cell and where its rows begin.
struct GridCell {
  Index first = 0;      // position of column 0
  std::size_t run = 0;  // of the first row, and its row there
  Index row = 0;
  Index base = 0;  // logical row of the run's first row
};

/// Rows of a cell that lie in one run: row … row + count - 1 of it, at columns column … of the cell.
struct GridPiece {
  std::size_t run = 0;
  Index row = 0, count = 0, column = 0;
  Index key = 0, position = 0;  // logical row and position of the first

  /// Rows i … i + n - 1 of it.
  GridPiece part(Index i, Index n) const { return {run, row + i, n, column + i, key + i, position + i}; }
};

template <class Run>
class GridPieces {
 public:
  GridPieces(std::span<const Run> runs, Index step, const GridCell& cell)
      : runs_(runs), end_(cell.first + step), first_(cell.first), base_(cell.base), next_{cell.run, cell.row} {}

  class Iterator {
   public:
    explicit Iterator(GridPieces& pieces) : pieces_(pieces) { ++*this; }
    const GridPiece& operator*() const { return pieces_.next_; }
    Iterator& operator++() {
      more_ = pieces_.find();
      return *this;
    }
    bool operator==(std::default_sentinel_t) const { return !more_; }

   private:
    GridPieces& pieces_;
    bool more_ = false;
  };
  Iterator begin() { return Iterator(*this); }
  static std::default_sentinel_t end() { return {}; }

 private:
  /// The piece after next_.
  EIGEN_DONT_INLINE bool find() {
    Index row = next_.row + next_.count;
    for (; next_.run < runs_.size(); base_ += runs_[next_.run++].rows, row = 0) {
      const Run& run = runs_[next_.run];
      if (row == run.rows) continue;
      const Index to = std::min(run.rows, end_ - run.position);
      if (to <= row) return false;
      next_ = {next_.run, row, to - row, run.position + row - first_, base_ + row, run.position + row};
      return true;
    }
    return false;
  }

  std::span<const Run> runs_;
  Index end_, first_, base_;
  GridPiece next_;
};

template <class Run>
class GridCells {
 public:
  /// All cells of rows of which the first is logical row `first_row`.
  GridCells(std::span<const Run> runs, Index step, Index first_row = 0)
      : GridCells(runs, step, GridCell{.base = first_row}, infinite) {}
  /// Cells of a finer grid: from where `from` begins to the position `end`.
  GridCells(std::span<const Run> runs, Index step, const GridCell& from, Index end)
      : runs_(runs), step_(step), end_(end), at_(from) {}

  class Iterator {
   public:
    explicit Iterator(GridCells& cells) : cells_(cells), more_(cells.find()) {}
    const GridCell& operator*() const { return cells_.at_; }
    Iterator& operator++() {
      cells_.leave();
      more_ = cells_.find();
      return *this;
    }
    bool operator==(std::default_sentinel_t) const { return !more_; }

   private:
    GridCells& cells_;
    bool more_;
  };
  Iterator begin() { return Iterator(*this); }
  static std::default_sentinel_t end() { return {}; }

 private:
  /// On to a row that is there; the cell is the one it lies in.
  EIGEN_DONT_INLINE bool find() {
    while (at_.run < runs_.size() && at_.row == runs_[at_.run].rows) next_run();
    if (at_.run == runs_.size()) return false;
    at_.first = (runs_[at_.run].position + at_.row) / step_ * step_;
    return at_.first < end_;
  }
  /// To the first row past the cell.
  EIGEN_DONT_INLINE void leave() {
    for (; at_.run < runs_.size(); next_run()) {
      const Run& run = runs_[at_.run];
      if (run.position >= at_.first + step_) return;
      at_.row = std::min(run.rows, at_.first + step_ - run.position);
      if (at_.row < run.rows) return;
    }
  }
  void next_run() { at_.base += runs_[at_.run].rows, at_.row = 0, ++at_.run; }

  std::span<const Run> runs_;
  Index step_, end_;
  GridCell at_;
};

/// How many cells hold rows.
template <class Run>
Index count_cells(std::span<const Run> runs, Index step) {
  Index n = 0;
  for ([[maybe_unused]] const GridCell& cell : GridCells<Run>(runs, step)) ++n;
  return n;
}

}}}  // namespace qkv::QKV_ABI::kernel

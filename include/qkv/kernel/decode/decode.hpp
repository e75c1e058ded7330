// kernel/decode/decode.hpp — a few queries against a long cache: every key and value row is read once, in order.
//
//     for each chunk of keys on the position grid:   s = score(scale · K q) for all queries of the kv group
//                                                    m, l, o ← merge with (max s, Σ e^(s-m), Σ e^(s-m) v)
//
//     position   0          256         512                     2048
//     chunks     |-----------|-----------|-- …                   |-----------|-- …
//     splits     |--------------- one state (m, l, o) -----------|---------- another, merged in ascending order
//
// The work is bound by memory bandwidth: 2 · n_keys · kv_heads · head_dim numbers. Queries of a group (and several new
// tokens) share each row while it is in registers (kernel/decode/scores.hpp); narrow storage is widened there, int8
// is mostly multiplied as stored. Splits lie on a grid of absolute positions and merge in order, so paged, ring and
// contiguous caches, any number of threads and a prompt in pieces give the same bits. Dao et al. 2023, "Flash-Decoding
// for long-context inference".
//
// Bandwidth is reached only by long contiguous reads. The rows of a head in a contiguous cache are one such read; in
// pages they are many short ones, each followed by those of the next head. So heads of short runs alternate in every
// chunk:
//
//     long runs     head 0: K V K V K V …   head 1: K V K V …
//     short runs    K of heads 0 1 2 …   V of heads 0 1 2 …   then the next chunk
//
// Before: kernel/arithmetic.hpp   Next: kernel/decode/head.hpp
#pragma once

#include <algorithm>
#include <cstddef>
#include <memory>
#include <span>
#include <type_traits>

#include "../../softmax.hpp"
#include "../../workspace.hpp"
#include "../task.hpp"
#include "head.hpp"
#include "scores.hpp"
#include "state.hpp"

namespace qkv { inline namespace QKV_ABI { namespace kernel {

inline constexpr Index decode_split = 8 * decode_chunk;

/// Whether several threads are faster for the rows of one split: above 1024 rows of 8 kv heads of 128. Measured, time
/// of two threads over one: 1024 such rows in float 1.0, in int8 0.9 to 1.3; 2048 rows 0.9 and 0.8.
template <class T>
bool decode_in_parallel(const QueryTask<T>& task, Index rows) {
  return rows * task.heads.kv_heads * (task.head_dim + task.v_head_dim) >= Index{3} << 20;
}

/// How many kv heads alternate: 1 where the rows of a head in a run are long in memory. `apart`: bytes from the rows of
/// one head to those of the next; `scratch`: of one head.
constexpr Index decode_heads_at_once(Index apart, Index kv_heads, std::size_t scratch) {
  constexpr Index long_stretch = Index{512} << 10;
  constexpr std::size_t all_scratch = std::size_t{512} << 10;  // half of a second-level cache
  return apart >= long_stretch ? 1 : std::clamp<Index>(static_cast<Index>(all_scratch / scratch), 1, kv_heads);
}

/// into ← merged with `state`, that of one split. Splits are merged in ascending order.
template <class T>
void merge_split(const QueryTask<T>& task, Index kv_head, const DecodeState<T>& state, const StateView<T>& into) {
  const Index dv = task.v_head_dim, width = whole_registers<T>(dv), group = task.heads.group_size();
  for (Index i = 0; i < task.n_queries() * group; ++i) {
    if (state.m[i] == detail::minus_infinity<T>) continue;
    const Index query = i / group, head = kv_head * group + i % group;
    detail::merge_row(into.m(query, head), into.l(query, head), into.o(query, head, dv), state.m[i], state.l[i],
                      state.o + i * width, dv);
  }
}

/// kv heads [first, first + count) of a task.
template <class T>
class Decode {
  using Head = DecodeHead<T>;

 public:
  Decode(const QueryTask<T>& task, const DecodeSource<T>& source, Index first, Index count, std::byte* scratch)
      : task_(task), rows_(source.rows) {
    detail::Carver carver(scratch);
    Head** const heads = carver.take<Head*>(count);
    for (Index h = 0; h < count; ++h)
      heads[h] = source.make(source.task, first + h, carver.take<std::byte>(static_cast<Index>(source.head_bytes)));
    heads_ = {heads, static_cast<std::size_t>(count)};
  }
  /// Bytes of scratch.
  static std::size_t bytes(Index count, std::size_t head_bytes) {
    detail::Carver carver(nullptr);
    carver.take<Head*>(count);
    return carver.used() + static_cast<std::size_t>(count) * head_bytes;
  }

  /// All keys, split by split, merged into `into`.
  void run(const StateView<T>& into) {
    for (const GridCell& split : GridCells(rows_.runs, decode_split, rows_.first_row)) {
      for (Head* head : heads_) head->begin(head->own_state());
      add_split(split);
      for (const Head* head : heads_) merge_split(task_, head->kv_head(), head->own_state(), into);
    }
  }

  /// The keys of one split; their states are in state_of(kv_head).
  template <class StateOf>
  void run_split(const GridCell& split, const StateOf& state_of) {
    for (Head* head : heads_) head->begin(state_of(head->kv_head()));
    add_split(split);
  }

 private:
  void add_split(const GridCell& split) {
    for (const GridCell& chunk : GridCells(rows_.runs, decode_chunk, split, split.first + decode_split)) {
      for (Head* head : heads_) head->begin_chunk();
      for (const GridPiece& piece : GridPieces(rows_.runs, decode_chunk, chunk))
        for (std::size_t h = 0; h < heads_.size(); ++h) heads_[h]->score(piece, next_rows<false>(chunk, piece, h));
      for (Head* head : heads_) head->weigh();
      for (const GridPiece& piece : GridPieces(rows_.runs, decode_chunk, chunk))
        for (std::size_t h = 0; h < heads_.size(); ++h) heads_[h]->add_values(piece, next_rows<true>(chunk, piece, h));
      for (Head* head : heads_) head->end_chunk();
    }
  }

  /// The rows read after a piece of head h: those of the next head; after the last head those of the first one's next
  /// piece; at the end of the chunk its values, or the keys of the next chunk.
  template <bool Values>
  EIGEN_DONT_INLINE RowBytes next_rows(const GridCell& chunk, const GridPiece& piece, std::size_t h) const {
    const auto rows_of = [&](bool values, std::size_t of, std::size_t r, Index row, Index count) {
      const Index kv_head = heads_[of]->kv_head();
      return values ? rows_.values(r, kv_head, row, count) : rows_.keys(r, kv_head, row, count);
    };
    if (h + 1 < heads_.size()) return rows_of(Values, h + 1, piece.run, piece.row, piece.count);
    const auto runs = rows_.runs;
    std::size_t r = piece.run;
    Index row = piece.row + piece.count;
    while (r < runs.size() && row == runs[r].rows) row = 0, ++r;
    const bool ends = r == runs.size() || runs[r].position + row >= chunk.first + decode_chunk;
    const bool values = ends != Values;
    if (ends && values) r = chunk.run, row = chunk.row;
    if (r == runs.size()) return {};
    return rows_of(values, 0, r, row, runs[r].rows - row);
  }

  const QueryTask<T>& task_;
  const ByteRows& rows_;
  std::span<Head*> heads_;
};

}}}  // namespace qkv::QKV_ABI::kernel

// kernel/decode_scratch.hpp — what decode works on: chunks of keys, pieces of them in one run, and the scratch of one kv head.
//
//     scores   [n, decode_chunk]     of all queries of a kv head: n = n_queries · group_size; then their weights
//     state    m, l [n]   o [n, v_head_dim up to whole registers]
//
// Before: kernel/pair_sums.hpp   Next: kernel/decode_head.hpp
#pragma once

#include <cstddef>
#include <cstdint>

#include "../key_rows.hpp"
#include "../workspace.hpp"
#include "pair_sums.hpp"
#include "row_dots.hpp"

namespace qkv::inline QKV_ABI::kernel {

inline constexpr Index decode_chunk = 256;

/// Keys at the positions of a grid from `first` on: where they begin, as for_each_chunk tells it.
struct Chunk {
  Index first;
  std::size_t run;
  Index base, row;
};

/// Rows row … row + count - 1 of a run, at columns column … of the chunk; the run's first row is logical row base.
template <StorageType S>
struct Piece {
  const KeyRun<S>* run;
  Index base, row, count, column;
};

/// The states of n queries over the keys of one split.
template <class T>
struct DecodeState {
  T* m;  // [n]
  T* l;  // [n]
  T* o;  // [n, v_head_dim up to whole registers]

  DecodeState(detail::Carver& carver, Index n, Index v_head_dim)
      : m(carver.take<T>(n)), l(carver.take<T>(n)), o(carver.take<T>(n * whole_registers<T>(v_head_dim))) {}

  static std::size_t bytes(Index n, Index v_head_dim) {
    detail::Carver carver(nullptr);
    DecodeState(carver, n, v_head_dim);
    return carver.used();
  }
};

/// Scratch of one kv head; D says how q·k is multiplied.
template <class D>
struct DecodeScratch {
  using T = typename D::Scalar;
  static constexpr bool integers = ValueSums<D>::integers;
  PackedQueries<D> q;
  T* scores;   // [n, decode_chunk], then weights; -inf: the value is not read
  T* seen;     // [decode_chunk] 1: every query of the group sees this column; integers: some query does
  T* scale_k;  // [decode_chunk]: int8, of the rows
  T* scale_v;  // [decode_chunk]
  T* top;      // [n] largest score so far; where values are multiplied in integers then the chunk's largest weight
  // Where values are multiplied in integers (kernel/pair_sums.hpp):
  std::int16_t* weights;  // [n, decode_chunk]
  std::int32_t* sums;     // [n, row(v_head_dim)] of the chunk
  DecodeState<T> state;

  DecodeScratch(detail::Carver& carver, Index n, Index head_dim, Index v_head_dim)
      : q(carver, n, head_dim),
        scores(carver.take<T>(n * decode_chunk)),
        seen(carver.take<T>(decode_chunk)),
        scale_k(carver.take<T>(decode_chunk)),
        scale_v(carver.take<T>(decode_chunk)),
        top(carver.take<T>(n)),
        weights(carver.take<std::int16_t>(integers ? n * decode_chunk : 0)),
        sums(carver.take<std::int32_t>(n * ValueSums<D>::row(v_head_dim))),
        state(carver, n, v_head_dim) {}
};

template <class D>
std::size_t decode_scratch_bytes(Index n, Index head_dim, Index v_head_dim) {
  detail::Carver carver(nullptr);
  DecodeScratch<D>(carver, n, head_dim, v_head_dim);
  return carver.used();
}

}  // namespace qkv::inline QKV_ABI::kernel

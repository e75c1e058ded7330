// kernel/decode/state.hpp — the running softmax state of decode's queries over the keys of one split.
//
//     n = n_queries · group_size queries of a kv head     m, l [n]   o [n, v_head_dim up to whole registers]
//
// Before: kernel/decode/chunk_softmax.hpp   Next: kernel/decode/scores.hpp
#pragma once

#include <cstddef>
#include <cstdint>

#include "../../key_rows.hpp"
#include "../../workspace.hpp"
#include "int8_values.hpp"
#include "scores.hpp"

namespace qkv { inline namespace QKV_ABI { namespace kernel {

inline constexpr Index decode_chunk = 256;

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

}}}  // namespace qkv::QKV_ABI::kernel

// kernel/tiled/pack_queries.hpp — a register of queries, transposed: lanes are queries, numbers are those of the arithmetic.
//
//     Exact    [head_dim][lanes] of T
//     Bf16     [head_dim / 2][lanes] of words, two bfloat16 each
//     Int8, Int8Bf16, Int8Int16
//              [head_dim / 4][lanes] of words, four bytes each: q ≈ (byte - 128) · max|q| / 127 per query; that scale
//              multiplies score_scale: a product of packed numbers, times score_scale, is the score
//     Int16    [head_dim / 2][lanes] of words, two int16 each: q ≈ int16 · max|q| / largest_int16(head_dim), likewise
//
// Of the softmax scale only the sign is applied to them: queries that are exact in a narrow type stay exact.
//
// Before: kernel/tiled/pack_kv.hpp   Next: kernel/tiled/query_state.hpp
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <utility>

#include "../../product/register_tile.hpp"
#include "../../simd/narrow.hpp"
#include "../../simd/simd.hpp"
#include "../../workspace.hpp"
#include "../arithmetic.hpp"

#include "../../base/warnings_off.hpp"

namespace qkv { inline namespace QKV_ABI { namespace kernel {

/// Up to one register's width of rows of q; lanes past `rows` and features past head_dim are zeros.
template <class T>
struct QueryRows {
  const T* first;
  Index stride, rows, head_dim;
  T sign;  // of the scale: maxima must be maxima of the score

  /// Features [k, k + width) of one row.
  typename Simd<T>::Vec part(Index row, Index k) const {
    using V = Simd<T>;
    const T* const at = first + row * stride + k;
    const Index left = head_dim - k;
    if (row >= rows || left <= 0) return V::zero();
    return V::mul(V::broadcast(sign), left >= V::width ? V::load(at) : V::load_n(at, left));
  }
};

template <class T>
void pack_queries(Exact<T>, const QueryRows<T>& from, T* to, Index lanes, T*) {
  using V = Simd<T>;
  Index k = 0;
  for (; k + V::width <= from.head_dim; k += V::width)
    transpose_block(from.first + k, from.stride, from.rows, to + k * lanes, lanes);
  for (; k < from.head_dim; ++k)
    for (Index i = 0; i < V::width; ++i) to[k * lanes + i] = i < from.rows ? from.first[i * from.stride + k] : T(0);
  if (from.sign < 0)
    for (k = 0; k < from.head_dim; ++k)
      V::store(to + k * lanes, V::mul(V::broadcast(from.sign), V::load(to + k * lanes)));
}

/// Multiplies score_scale by A::headroom · max|q| / most, of query i; returns most / max|q|.
template <class A>
float find_scale(const QueryRows<float>& from, Index i, float most, float& score_scale) {
  using V = Simd<float>;
  V::Vec largest = V::zero(), nothing = V::zero();  // the latter is NaN where the query is not finite
  for (Index k = 0; k < from.head_dim; k += V::width) {
    const V::Vec x = from.part(i, k);
    largest = V::max(largest, V::max(x, V::sub(V::zero(), x)));
    nothing = V::fma(V::zero(), x, nothing);
  }
  const float amax = V::max_lanes(largest), nan = V::sum_lanes(nothing);
  const bool zeros = amax < 1e-30F;  // as good as zeros; smaller ones would leave the range of float
  if (!zeros || nan != 0) score_scale *= amax / (most / A::headroom) + nan;
  score_scale = std::max(score_scale, std::numeric_limits<float>::min());  // keeps NaN
  return zeros ? 0 : most / amax;
}

inline void pack_queries(Bf16, const QueryRows<float>& from, Word* to, Index lanes, float*) {
  pack_columns(Isa::lanes, lanes, (from.head_dim + 1) / 2, to, [&](Index i, Index w) {
    return Isa::round_to_finite_bf16(from.part(i, 2 * w), from.part(i, 2 * w + Isa::lanes));
  });
}

/// Quantised, each query with its own scale.
template <class A>
void pack_queries(A, const QueryRows<float>& from, Word* to, Index lanes,
                  float* score_scale) requires(A::integer_keys) {
  using V = Simd<float>;
  const float most = A::int8_keys ? 127.0F : static_cast<float>(largest_int16(from.head_dim));
  float inverse[V::lanes];
  for (Index i = 0; i < V::width; ++i) inverse[i] = find_scale<A>(from, i, most, score_scale[i]);
  pack_columns(Isa::lanes, lanes, (from.head_dim + A::features - 1) / A::features, to, [&](Index i, Index w) {
    const auto part = [&](Index k) {
      return V::mul(from.part(i, A::features * w + k * V::width), V::broadcast(inverse[i]));
    };
    if constexpr (A::int8_keys)
      return Isa::round_plus_128(part(0), part(1), part(2), part(3));
    else
      return Isa::pack_int16(Isa::round_to_int32(part(0)), Isa::round_to_int32(part(1)));
  });
}

}}}  // namespace qkv::QKV_ABI::kernel

#include "../../base/warnings_on.hpp"

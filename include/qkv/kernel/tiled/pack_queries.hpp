// kernel/tiled/pack_queries.hpp — a register of queries, turned so that lanes are queries, in the numbers that they multiply in.
//
//     Exact    [head_dim][lanes] of T
//     Bf16     [head_dim / 2][lanes] of words, two bfloat16 each
//     Int8, Int8Bf16, Int8Int16
//              [head_dim / 4][lanes] of words, four bytes each: q ≈ (byte - 128) · max|q| / 127 per query; the factor goes
//              to `unit`, so that a score in these numbers times unit is the score
//     Int16    [head_dim / 2][lanes] of words, two int16 each: q ≈ int16 · max|q| / largest_int16(head_dim), likewise
//
// The softmax scale stays out of them: before rounding it would cost the exactness of queries that are narrow already.
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

/// What a whole number of query i is worth where `most` is the largest of them goes to `unit`; returns the inverse of that.
template <class A>
float find_unit(const QueryRows<float>& from, Index i, float most, float& unit) {
  using V = Simd<float>;
  V::Vec largest = V::zero(), nothing = V::zero();  // the latter is NaN where the query is not finite
  for (Index k = 0; k < from.head_dim; k += V::width) {
    const V::Vec x = from.part(i, k);
    largest = V::max(largest, V::max(x, V::sub(V::zero(), x)));
    nothing = V::fma(V::zero(), x, nothing);
  }
  const float amax = V::max_lanes(largest), nan = V::sum_lanes(nothing);
  const bool zeros = amax < 1e-30F;  // as good as zeros; smaller ones would leave the range of float
  if (!zeros || nan != 0) unit *= amax / (most / A::headroom) + nan;
  unit = std::max(unit, std::numeric_limits<float>::min());  // keeps NaN
  return zeros ? 0 : most / amax;
}

inline void pack_queries(Bf16, const QueryRows<float>& from, Word* to, Index lanes, float*) {
  pack_columns(Isa::lanes, lanes, (from.head_dim + 1) / 2, to, [&](Index i, Index w) {
    return Isa::round_to_finite_bf16(from.part(i, 2 * w), from.part(i, 2 * w + Isa::lanes));
  });
}

/// In whole numbers; `find_unit` for every query first.
template <class A>
void pack_queries(A, const QueryRows<float>& from, Word* to, Index lanes, float* unit) requires(A::scaled) {
  using V = Simd<float>;
  const float most = A::int8_keys ? 127.0F : static_cast<float>(largest_int16(from.head_dim));
  float inverse[V::lanes];
  for (Index i = 0; i < V::width; ++i) inverse[i] = find_unit<A>(from, i, most, unit[i]);
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

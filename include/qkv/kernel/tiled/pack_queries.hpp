// kernel/tiled/pack_queries.hpp — a register of queries, turned so that lanes are queries, in the numbers that they multiply in.
//
//     Exact    [head_dim][lanes] of T
//     Pairs    [head_dim / 2][lanes] of words, two bfloat16 each
//     Quads, Bytes
//              [head_dim / 4][lanes] of words, four bytes each: q ≈ (byte - 128) · max|q| / 127 per query; the factor goes
//              to `unit`, so that a score in these numbers times unit is the score
//     Shorts   [head_dim / 2][lanes] of words, two int16 each: q ≈ short · max|q| / largest_short(head_dim), likewise
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

#include "../../simd/simd.hpp"
#include "../../simd/words.hpp"
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

/// width features of width rows, turned.
template <class T, std::size_t... I>
EIGEN_ALWAYS_INLINE void pack_whole_block(const T* from, Index stride, typename Simd<T>::Vec sign, T* to, Index lanes,
                                          std::index_sequence<I...>) {
  using V = Simd<T>;
  typename V::Vec block[] = {V::load(from + Index(I) * stride)...};
  V::transpose(block);
  (V::store(to + Index(I) * lanes, V::mul(sign, block[I])), ...);
}

template <class T>
void pack_queries(Exact<T>, const QueryRows<T>& from, T* to, Index lanes, T*) {
  using V = Simd<T>;
  Index k = 0;
  if (from.rows >= V::width)
    for (; k + V::width <= from.head_dim; k += V::width)
      pack_whole_block<T>(from.first + k, from.stride, V::broadcast(from.sign), to + k * lanes, lanes,
                          std::make_index_sequence<V::lanes>{});
  for (; k < from.head_dim; k += V::width) {
    typename V::Vec block[V::lanes];
    for (Index i = 0; i < V::width; ++i) block[i] = from.part(i, k);
    V::transpose(block);
    for (Index i = 0; i < std::min(V::width, from.head_dim - k); ++i) V::store(to + (k + i) * lanes, block[i]);
  }
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

#ifdef QKV_DETAIL_WORDS
/// Words [w, w + 16) of 16 queries, turned.
EIGEN_ALWAYS_INLINE void store_turned(__m512 (&block)[16], Index w, Index depth, Word* to, Index lanes) {
  Simd<float>::transpose(block);
  for (Index i = 0; i < std::min(word_lanes, depth - w); ++i)
    store_words(to + (w + i) * lanes, _mm512_castps_si512(block[i]));
}

inline void pack_queries(Pairs, const QueryRows<float>& from, Word* to, Index lanes, float*) {
  const Index depth = (from.head_dim + 1) / 2;
  for (Index w = 0; w < depth; w += word_lanes) {
    __m512 block[16];
    for (Index i = 0; i < word_lanes; ++i) {
      const __m512 low = from.part(i, 2 * w), high = from.part(i, 2 * w + word_lanes);
      block[i] = _mm512_castsi512_ps(to_halves(low, high));
    }
    store_turned(block, w, depth, to, lanes);
  }
}

inline void pack_queries(Quads, const QueryRows<float>& from, Word* to, Index lanes, float* unit) {
  using V = Simd<float>;
  const Index depth = (from.head_dim + 3) / 4;
  float inverse[16];
  for (Index i = 0; i < word_lanes; ++i) inverse[i] = find_unit<Quads>(from, i, 127, unit[i]);
  for (Index w = 0; w < depth; w += word_lanes) {
    __m512 block[16];
    for (Index i = 0; i < word_lanes; ++i) {
      alignas(detail::cache_line) std::uint8_t bytes[64];
      for (Index part = 0; part < 4; ++part) {
        const __m512 x = V::mul(from.part(i, 4 * w + part * V::width), V::broadcast(inverse[i]));
        const __m512i whole = _mm512_add_epi32(_mm512_cvtps_epi32(x), _mm512_set1_epi32(128));
        _mm_store_si128(reinterpret_cast<__m128i*>(bytes) + part, _mm512_cvtusepi32_epi8(whole));
      }
      block[i] = _mm512_castsi512_ps(_mm512_load_si512(bytes));
    }
    store_turned(block, w, depth, to, lanes);
  }
}
inline void pack_queries(Bytes, const QueryRows<float>& from, Word* to, Index lanes, float* unit) {
  pack_queries(Quads{}, from, to, lanes, unit);
}
#endif

#ifdef QKV_DETAIL_SHORTS
inline void pack_queries(Shorts, const QueryRows<float>& from, Word* to, Index lanes, float* unit) {
  using V = Simd<float>;
  const Index depth = (from.head_dim + 1) / 2;
  const auto most = static_cast<float>(largest_short(from.head_dim));
  float inverse[V::lanes];
  for (Index i = 0; i < V::width; ++i) inverse[i] = find_unit<Shorts>(from, i, most, unit[i]);
  for (Index w = 0; w < depth; w += word_lanes) {
    V::Vec block[V::lanes];
    for (Index i = 0; i < V::width; ++i) {
      const auto whole = [&](Index k) { return round_to_words(V::mul(from.part(i, k), V::broadcast(inverse[i]))); };
      block[i] = words_as_float(to_shorts(whole(2 * w), whole(2 * w + V::width)));
    }
    V::transpose(block);
    for (Index i = 0; i < std::min(word_lanes, depth - w); ++i)
      V::store(reinterpret_cast<float*>(to + (w + i) * lanes), block[i]);
  }
}
#endif

}}}  // namespace qkv::QKV_ABI::kernel

#include "../../base/warnings_on.hpp"

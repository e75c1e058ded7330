// kernel/dots.hpp — in which numbers decode multiplies q·k: what a register of a row is, and what a sum is.
//
//     WidenedDot   any storage widened to T     sum += q·k
//     QuadsDot     int8, AVX-512 with VNNI      sum += Σ₄ q·k      queries as int8
//     PairsDot     int8, AVX2 and SSE2          sum += Σ₂ q·k      queries as int16
//
// Sums of integers are exact; what differs is how a query is rounded, with one scale each, before it is multiplied.
// With QuadsDot and PairsDot go values in pairs of int16 (kernel/pair_sums.hpp), with WidenedDot widened ones.
//
// Before: kernel/tiled.hpp   Next: kernel/row_dots.hpp
#pragma once

#include <algorithm>
#include <cstdint>

#include "../options.hpp"
#include "../storage.hpp"
#include "register_tile.hpp"
#include "words.hpp"

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wignored-attributes"
#endif

namespace qkv::inline QKV_ABI::kernel {

/// q·k in T: what a register of a row is, how it is multiplied, and how a query is packed.
template <class T, class S>
struct WidenedDot {
  using V = Simd<T>;
  using Vec = typename V::Vec;
  using Scalar = T;
  using Key = S;
  using Query = T;
  static constexpr const char* name = "";
  static constexpr Index width = V::width;  // elements in a register of a row
  static constexpr Index lanes = V::width;  // sums that one tree adds up
  static constexpr Index parts = 1;         // registers that those of a row become
  static constexpr Index least_group = 1;   // query heads of a group from which on it pays

  static EIGEN_ALWAYS_INLINE Vec zero() { return V::zero(); }
  template <Index>
  static EIGEN_ALWAYS_INLINE Vec query(const T* q) {
    return V::load_once(q);
  }
  template <Index>
  static EIGEN_ALWAYS_INLINE Vec key(const S* k) {
    return V::load_once(k);
  }
  template <Index>
  static EIGEN_ALWAYS_INLINE Vec key_n(const S* k, Index n) {
    return V::load_n(k, n);
  }
  static EIGEN_ALWAYS_INLINE Vec add_product(Vec q, Vec k, Vec sum) { return V::fma(q, k, sum); }
  static EIGEN_ALWAYS_INLINE void finish(Vec (&sum)[std::size_t(lanes)], const T* factor, const std::int32_t*, T* to) {
    V::store(to, V::mul(V::sum_each(sum), V::load(factor)));
  }
  static T round(const T* query, Index n, T* to, std::int32_t&) {
    std::copy_n(query, n, to);
    return T(1);
  }
};

#if defined(EIGEN_VECTORIZE_AVX2) && !defined(EIGEN_VECTORIZE_AVX512)
/// bfloat16 in pairs as they lie: a register of 16 is its eight even features, shifted up, and its eight odd ones, masked.
/// Half the shuffles of widening them in order; queries are packed in the same order.
template <>
struct WidenedDot<float, bfloat16> {
  using V = Simd<float>;
  using Vec = V::Vec;
  using Scalar = float;
  using Key = bfloat16;
  using Query = float;
  static constexpr const char* name = "";
  static constexpr Index width = 2 * V::width, lanes = V::width, parts = 2;
  static constexpr Index least_group = 1;

  static EIGEN_ALWAYS_INLINE Vec zero() { return V::zero(); }
  template <Index Part>
  static EIGEN_ALWAYS_INLINE Vec query(const float* q) {
    return V::load_once(q + Part * V::width);
  }
  template <Index Part>
  static EIGEN_ALWAYS_INLINE Vec key(const bfloat16* k) {
    const __m256i pairs = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(k));
    if constexpr (Part == 0) return _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16));
    return _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(static_cast<int>(0xFFFF0000))));
  }
  template <Index Part>
  static EIGEN_ALWAYS_INLINE Vec key_n(const Key* k, Index n) {
    Key copy[std::size_t(width)] = {};
    std::copy_n(k, n, copy);
    return key<Part>(copy);
  }
  static EIGEN_ALWAYS_INLINE Vec add_product(Vec q, Vec k, Vec sum) { return V::fma(q, k, sum); }
  static EIGEN_ALWAYS_INLINE void finish(Vec (&sum)[std::size_t(lanes)], const float* factor, const std::int32_t*,
                                         float* to) {
    V::store(to, V::mul(V::sum_each(sum), V::load(factor)));
  }
  static float round(const float* query, Index n, float* to, std::int32_t&) {
    for (Index i = 0; i < n; ++i) to[i / width * width + i % 2 * V::width + i % width / 2] = query[i];
    return 1.0F;
  }
};
#endif

#ifdef QKV_DETAIL_WORDS
/// q·k of int8 rows in integers (kernel/words.hpp): queries as int8 with one scale each, keys as k + 128. What that adds to
/// a sum, 128·Σq, is taken off at the end.
struct QuadsDot {
  using V = Simd<float>;
  using Vec = QuadDot::Sum;
  using Scalar = float;
  using Key = std::int8_t;
  using Query = std::int8_t;
  static constexpr const char* name = " multiplied in int8, values in int16";
  static constexpr Index width = 64, lanes = 16, parts = 1;
  static constexpr Index least_group = 2;  // one query waits for memory anyway

  static EIGEN_ALWAYS_INLINE Vec zero() { return (Vec)_mm512_setzero_si512(); }
  template <Index>
  static EIGEN_ALWAYS_INLINE Vec query(const std::int8_t* q) {
    __m512i v = _mm512_loadu_si512(q);
    detail::hold(v);
    return (Vec)v;
  }
  static EIGEN_ALWAYS_INLINE Vec plus_128(__m512i k) { return (Vec)_mm512_xor_si512(k, _mm512_set1_epi8(-128)); }
  template <Index>
  static EIGEN_ALWAYS_INLINE Vec key(const std::int8_t* k) {
    return plus_128(_mm512_loadu_si512(k));
  }
  template <Index>
  static EIGEN_ALWAYS_INLINE Vec key_n(const std::int8_t* k, Index n) {
    return plus_128(row_words(k, n, 0));
  }
  static EIGEN_ALWAYS_INLINE Vec add_product(Vec q, Vec k, Vec sum) {
    return QuadDot::dot(sum, (__m512i)q, (__m512i)k);
  }
  static EIGEN_ALWAYS_INLINE void finish(Vec (&sum)[16], const float* factor, const std::int32_t* shift, float* to) {
    const __m512i products = _mm512_sub_epi32((__m512i)detail::sum_each_16(sum), _mm512_loadu_si512(shift));
    _mm512_storeu_ps(to, _mm512_mul_ps(_mm512_cvtepi32_ps(products), _mm512_loadu_ps(factor)));
  }
  static float round(const float* query, Index n, std::int8_t* to, std::int32_t& shift) {
    const float scale = quantize_row(query, n, to);
    shift = 0;
    for (Index i = 0; i < n; ++i) shift += 128 * to[i];
    return scale;
  }
};
#elif defined(EIGEN_VECTORIZE_SSE2) && !defined(EIGEN_VECTORIZE_AVX512) && \
    (defined(EIGEN_VECTORIZE_AVX2) || !defined(EIGEN_VECTORIZE_AVX))
#define QKV_DETAIL_PAIRS 1
/// q·k of int8 rows in integers where there are no words: queries as int16 with one scale each, keys widened to int16 once
/// for all of them: 1.7 times as fast as widened to float (Zen 3, four queries of 128).
///
///     sum += q₀k₀ + q₁k₁ in 32 bits, exact: |q| <= largest(head_dim) = min(2¹⁵ - 1, (2³¹ - 1) / (128 · head_dim))
///
/// A query is rounded to within max|q| / (2 · largest): 2⁻¹⁶ of max|q| for head_dim <= 512, 2⁻¹² for 8192.
struct PairsDot {
  using V = Simd<float>;
#if defined(EIGEN_VECTORIZE_AVX2)
  using Vec = __m256i;
#else
  using Vec = __m128i;
#endif
  using Scalar = float;
  using Key = std::int8_t;
  using Query = std::int16_t;
  static constexpr const char* name = " multiplied in int16";
  static constexpr Index width = 2 * V::width, lanes = V::width, parts = 1;
  static constexpr Index least_group = 1;  // widening to float takes longer than memory even for one query

  static constexpr Index largest(Index head_dim) {
    return std::clamp<Index>((Index{1} << 24) / std::max<Index>(head_dim, 1) - 1, 1, 32767);
  }

#if defined(EIGEN_VECTORIZE_AVX2)
  static EIGEN_ALWAYS_INLINE Vec zero() { return _mm256_setzero_si256(); }
  template <Index>
  static EIGEN_ALWAYS_INLINE Vec query(const std::int16_t* q) {
    Vec v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(q));
    detail::hold(v);
    return v;
  }
  template <Index>
  static EIGEN_ALWAYS_INLINE Vec key(const std::int8_t* k) {
    return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(k)));
  }
  // Held: g++ otherwise adds up products of several steps first, for which there are no registers.
  static EIGEN_ALWAYS_INLINE Vec add_product(Vec q, Vec k, Vec sum) {
    sum = _mm256_add_epi32(sum, _mm256_madd_epi16(q, k));
    detail::hold(sum);
    return sum;
  }
  static EIGEN_ALWAYS_INLINE void finish(Vec (&sum)[8], const float* factor, const std::int32_t*, float* to) {
    _mm256_storeu_ps(to, _mm256_mul_ps(_mm256_cvtepi32_ps(detail::sum_each_8(sum)), _mm256_loadu_ps(factor)));
  }
#else
  static EIGEN_ALWAYS_INLINE Vec zero() { return _mm_setzero_si128(); }
  template <Index>
  static EIGEN_ALWAYS_INLINE Vec query(const std::int16_t* q) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(q));
  }
  template <Index>
  static EIGEN_ALWAYS_INLINE Vec key(const std::int8_t* k) {
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(k));
    return _mm_srai_epi16(_mm_unpacklo_epi8(bytes, bytes), 8);
  }
  static EIGEN_ALWAYS_INLINE Vec add_product(Vec q, Vec k, Vec sum) {
    sum = _mm_add_epi32(sum, _mm_madd_epi16(q, k));
    detail::hold(sum);
    return sum;
  }
  static EIGEN_ALWAYS_INLINE void finish(Vec (&sum)[4], const float* factor, const std::int32_t*, float* to) {
    const __m128i a = _mm_add_epi32(_mm_unpacklo_epi32(sum[0], sum[1]), _mm_unpackhi_epi32(sum[0], sum[1]));
    const __m128i b = _mm_add_epi32(_mm_unpacklo_epi32(sum[2], sum[3]), _mm_unpackhi_epi32(sum[2], sum[3]));
    const __m128i all = _mm_add_epi32(_mm_unpacklo_epi64(a, b), _mm_unpackhi_epi64(a, b));
    _mm_storeu_ps(to, _mm_mul_ps(_mm_cvtepi32_ps(all), _mm_loadu_ps(factor)));
  }
#endif

  template <Index Part>
  static EIGEN_ALWAYS_INLINE Vec key_n(const Key* k, Index n) {
    Key copy[std::size_t(width)] = {};
    std::copy_n(k, n, copy);
    return key<Part>(copy);
  }

  static float round(const float* query, Index n, std::int16_t* to, std::int32_t&) {
    return quantize_row(query, n, to, static_cast<float>(largest(n)));
  }
};
#endif

/// What Arithmetic::automatic multiplies in. Groups of less than NarrowDot::least_group query heads are exact all the same.
template <class T, class S>
struct NarrowDotOf {
  using Type = WidenedDot<T, S>;
};
#ifdef QKV_DETAIL_WORDS
template <>
struct NarrowDotOf<float, std::int8_t> {
  using Type = QuadsDot;
};
#elif defined(QKV_DETAIL_PAIRS)
template <>
struct NarrowDotOf<float, std::int8_t> {
  using Type = PairsDot;
};
#endif
template <class T, class S>
using NarrowDot = typename NarrowDotOf<T, S>::Type;

/// Whether decode multiplies q·k in narrower numbers than the scalar's for groups of so many query heads.
template <class T, class S>
constexpr bool decode_is_narrow(Arithmetic arithmetic, Index group_size) {
  using D = NarrowDot<T, S>;
  return !std::is_same_v<D, WidenedDot<T, S>> && arithmetic != Arithmetic::exact && group_size >= D::least_group;
}

}  // namespace qkv::inline QKV_ABI::kernel

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif

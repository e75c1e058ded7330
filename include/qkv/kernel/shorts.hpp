// kernel/shorts.hpp — products in int16, two to a 32-bit word, where there are no products of bytes.
//
//     c += a₀b₀ + a₁b₁        vpmaddwd and vpaddd: exact in 32 bits, twice as many products as multiply-adds of float
//
// What is stored as int8 is widened to int16. What meets it is rounded to whole steps, |a| <= largest_short(n) so that a
// sum of n products fits: 2⁻¹⁶ of its largest number for n <= 512.
//
// AVX2 and SSE2. Words, their registers and how they are loaded have the names that kernel/words.hpp gives those of AVX-512.
//
// Before: kernel/words.hpp   Next: kernel/arithmetic.hpp
#pragma once

#include <algorithm>
#include <cstdint>

#include "words.hpp"

#if !defined(QKV_DETAIL_WORDS) && defined(EIGEN_VECTORIZE_SSE2) && !defined(EIGEN_VECTORIZE_AVX512) && \
    (defined(EIGEN_VECTORIZE_AVX2) || !defined(EIGEN_VECTORIZE_AVX))
#define QKV_DETAIL_SHORTS 1
#include <immintrin.h>
#endif

namespace qkv::inline QKV_ABI::kernel {

/// The largest |a| of a sum of n products with int8: min(2¹⁵ - 1, (2³¹ - 1) / (128·n)).
constexpr Index largest_short(Index n) {
  return std::clamp<Index>((Index{1} << 24) / std::max<Index>(n, 1) - 1, 1, 32767);
}

#ifdef QKV_DETAIL_SHORTS
inline constexpr bool shorts_available = true;

#if defined(EIGEN_VECTORIZE_AVX2)
using Words = __m256i;
inline constexpr Index word_lanes = 8;

EIGEN_ALWAYS_INLINE Words load_words(const void* p) { return _mm256_loadu_si256(static_cast<const Words*>(p)); }
EIGEN_ALWAYS_INLINE void store_words(void* p, Words v) { _mm256_storeu_si256(static_cast<Words*>(p), v); }
EIGEN_ALWAYS_INLINE Words broadcast_word(Word x) { return _mm256_set1_epi32(static_cast<int>(x)); }
EIGEN_ALWAYS_INLINE Words add_words(Words a, Words b) { return _mm256_add_epi32(a, b); }
EIGEN_ALWAYS_INLINE Words multiply_shorts(Words a, Words b) { return _mm256_madd_epi16(a, b); }
EIGEN_ALWAYS_INLINE __m256 words_to_float(Words v) { return _mm256_cvtepi32_ps(v); }
EIGEN_ALWAYS_INLINE Words round_to_words(__m256 v) { return _mm256_cvtps_epi32(v); }
EIGEN_ALWAYS_INLINE Words shift_to_high(Words v) { return _mm256_slli_epi32(v, 16); }
EIGEN_ALWAYS_INLINE Words or_words(Words a, Words b) { return _mm256_or_si256(a, b); }
EIGEN_ALWAYS_INLINE __m256 as_floats(Words v) { return _mm256_castsi256_ps(v); }
/// Words to int16, in order.
EIGEN_ALWAYS_INLINE Words to_shorts(Words first, Words second) {
  return _mm256_permute4x64_epi64(_mm256_packs_epi32(first, second), 0xD8);
}
/// 16 numbers of int8.
using Eighths = __m128i;
EIGEN_ALWAYS_INLINE Eighths load_bytes(const std::int8_t* p) {
  return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
}
EIGEN_ALWAYS_INLINE Words widen_bytes(Eighths v) { return _mm256_cvtepi8_epi16(v); }
/// Words (a[i], b[i]): the first half of i, and the second.
EIGEN_ALWAYS_INLINE Words low_pairs(Eighths a, Eighths b) { return widen_bytes(_mm_unpacklo_epi8(a, b)); }
EIGEN_ALWAYS_INLINE Words high_pairs(Eighths a, Eighths b) { return widen_bytes(_mm_unpackhi_epi8(a, b)); }
#else
using Words = __m128i;
inline constexpr Index word_lanes = 4;

EIGEN_ALWAYS_INLINE Words load_words(const void* p) { return _mm_loadu_si128(static_cast<const Words*>(p)); }
EIGEN_ALWAYS_INLINE void store_words(void* p, Words v) { _mm_storeu_si128(static_cast<Words*>(p), v); }
EIGEN_ALWAYS_INLINE Words broadcast_word(Word x) { return _mm_set1_epi32(static_cast<int>(x)); }
EIGEN_ALWAYS_INLINE Words add_words(Words a, Words b) { return _mm_add_epi32(a, b); }
EIGEN_ALWAYS_INLINE Words multiply_shorts(Words a, Words b) { return _mm_madd_epi16(a, b); }
EIGEN_ALWAYS_INLINE __m128 words_to_float(Words v) { return _mm_cvtepi32_ps(v); }
EIGEN_ALWAYS_INLINE Words round_to_words(__m128 v) { return _mm_cvtps_epi32(v); }
EIGEN_ALWAYS_INLINE Words shift_to_high(Words v) { return _mm_slli_epi32(v, 16); }
EIGEN_ALWAYS_INLINE Words or_words(Words a, Words b) { return _mm_or_si128(a, b); }
EIGEN_ALWAYS_INLINE __m128 as_floats(Words v) { return _mm_castsi128_ps(v); }
EIGEN_ALWAYS_INLINE Words to_shorts(Words first, Words second) { return _mm_packs_epi32(first, second); }
/// 8 numbers of int8, in the lower half.
using Eighths = __m128i;
EIGEN_ALWAYS_INLINE Eighths load_bytes(const std::int8_t* p) {
  return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
}
EIGEN_ALWAYS_INLINE Words widen_bytes(Eighths v) { return _mm_srai_epi16(_mm_unpacklo_epi8(v, v), 8); }
EIGEN_ALWAYS_INLINE Words low_pairs(Eighths a, Eighths b) { return widen_bytes(_mm_unpacklo_epi8(a, b)); }
EIGEN_ALWAYS_INLINE Words high_pairs(Eighths a, Eighths b) {
  return widen_bytes(_mm_unpackhi_epi64(_mm_unpacklo_epi8(a, b), _mm_setzero_si128()));
}
#endif
inline constexpr Index short_lanes = 2 * word_lanes;

/// sum + a₀b₀ + a₁b₁ of every word. g++ adds up products of several steps first, for which there are no registers, or
/// moves every sum; so it is told which instruction to use.
EIGEN_ALWAYS_INLINE Words add_products(Words sum, Words a, Words b) {
  const Words products = multiply_shorts(a, b);
#if defined(__GNUC__) && !defined(__clang__) && defined(EIGEN_VECTORIZE_AVX2)
  asm("vpaddd %1, %0, %0" : "+x"(sum) : "x"(products));
#else
  sum = add_words(sum, products);
#endif
  return sum;
}
#else
inline constexpr bool shorts_available = false;
#endif

}  // namespace qkv::inline QKV_ABI::kernel

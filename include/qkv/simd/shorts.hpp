// simd/shorts.hpp — products in int16, two to a 32-bit word, where there are no products of bytes.
//
//     c += a₀b₀ + a₁b₁        vpmaddwd and vpaddd: exact in 32 bits, 16 multiply-adds in two instructions of AVX2
//
// What is stored as int8 is widened to int16 as it is loaded. What meets it is rounded to whole steps, |a| <=
// largest_short(n), so that a sum of n products fits: to 2⁻¹⁶ of its largest number for n <= 512, 2⁻¹² for n = 8192.
// Zen 3 does 1.64 of the pairs of instructions per cycle: 1.64 times as many multiply-adds as in float.
//
//     rows where they lie    a lane is a register of sums        short_scores: absorbed attention
//     panels                 a word of a row is broadcast        ShortDot: the tiled kernel, in product/narrow_tile.hpp; for
//                                                                values a word is two keys of a feature
//
// AVX2 and SSE2; elsewhere `shorts_available` is false.
//
// Before: simd/words.hpp   Next: simd/intrinsics.hpp
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>

#include "words.hpp"

#if defined(EIGEN_VECTORIZE_SSE2) && !defined(EIGEN_VECTORIZE_AVX512) && \
    (defined(EIGEN_VECTORIZE_AVX2) || !defined(EIGEN_VECTORIZE_AVX))
#define QKV_DETAIL_SHORTS 1
#include <immintrin.h>
#endif

#include "../base/warnings_off.hpp"

namespace qkv { inline namespace QKV_ABI { namespace kernel {

/// The largest |a| where n products with int8 are added up: min(2¹⁵ - 1, (2³¹ - 1) / (128·n)).
constexpr Index largest_short(Index n) {
  return std::clamp<Index>((Index{1} << 24) / std::max<Index>(n, 1) - 1, 1, 32767);
}

/// Two numbers of int8 side by side, of one feature and two keys.
using BytePair = std::uint16_t;

#ifdef QKV_DETAIL_SHORTS
inline constexpr bool shorts_available = true;

#ifdef EIGEN_VECTORIZE_AVX2
using Words = __m256i;  // or twice as many int16
inline constexpr Index word_lanes = 8;

EIGEN_ALWAYS_INLINE Words load_words(const void* p) { return _mm256_loadu_si256(static_cast<const Words*>(p)); }
EIGEN_ALWAYS_INLINE void store_words(void* p, Words v) { _mm256_storeu_si256(static_cast<Words*>(p), v); }
EIGEN_ALWAYS_INLINE Words broadcast_word(Word x) { return _mm256_set1_epi32(static_cast<int>(x)); }
EIGEN_ALWAYS_INLINE Words add_words(Words a, Words b) { return _mm256_add_epi32(a, b); }
EIGEN_ALWAYS_INLINE Words multiply_shorts(Words a, Words b) { return _mm256_madd_epi16(a, b); }
EIGEN_ALWAYS_INLINE __m256 words_to_float(Words v) { return _mm256_cvtepi32_ps(v); }
EIGEN_ALWAYS_INLINE Words round_to_words(__m256 v) { return _mm256_cvtps_epi32(v); }
EIGEN_ALWAYS_INLINE Words cut_to_words(__m256 v) { return _mm256_cvttps_epi32(v); }
EIGEN_ALWAYS_INLINE __m256 words_as_float(Words v) { return _mm256_castsi256_ps(v); }  // the same bits
/// Words (low, high) of numbers from 0 to 32767.
EIGEN_ALWAYS_INLINE Words to_pairs(Words low, Words high) { return _mm256_or_si256(low, _mm256_slli_epi32(high, 16)); }
/// Words to int16, in order.
EIGEN_ALWAYS_INLINE Words to_shorts(Words first, Words second) {
  return _mm256_permute4x64_epi64(_mm256_packs_epi32(first, second), 0xD8);
}
/// Lane i: the sum of the lanes of row i. Rows are lost.
EIGEN_ALWAYS_INLINE Words sum_each(Words (&rows)[8]) { return detail::sum_each_8(rows); }
/// Half a register of bytes.
EIGEN_ALWAYS_INLINE __m128i load_bytes(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
EIGEN_ALWAYS_INLINE Words widen_bytes(__m128i v) { return _mm256_cvtepi8_epi16(v); }
/// A quarter: word_lanes bytes.
EIGEN_ALWAYS_INLINE __m128i load_few_bytes(const void* p) { return _mm_loadl_epi64(static_cast<const __m128i*>(p)); }
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
EIGEN_ALWAYS_INLINE Words cut_to_words(__m128 v) { return _mm_cvttps_epi32(v); }
EIGEN_ALWAYS_INLINE __m128 words_as_float(Words v) { return _mm_castsi128_ps(v); }
EIGEN_ALWAYS_INLINE Words to_pairs(Words low, Words high) { return _mm_or_si128(low, _mm_slli_epi32(high, 16)); }
EIGEN_ALWAYS_INLINE Words to_shorts(Words first, Words second) { return _mm_packs_epi32(first, second); }
EIGEN_ALWAYS_INLINE Words sum_each(Words (&rows)[4]) {
  const Words a = add_words(_mm_unpacklo_epi32(rows[0], rows[1]), _mm_unpackhi_epi32(rows[0], rows[1]));
  const Words b = add_words(_mm_unpacklo_epi32(rows[2], rows[3]), _mm_unpackhi_epi32(rows[2], rows[3]));
  return add_words(_mm_unpacklo_epi64(a, b), _mm_unpackhi_epi64(a, b));
}
EIGEN_ALWAYS_INLINE __m128i load_bytes(const void* p) { return _mm_loadl_epi64(static_cast<const __m128i*>(p)); }
EIGEN_ALWAYS_INLINE Words widen_bytes(__m128i v) { return _mm_srai_epi16(_mm_unpacklo_epi8(v, v), 8); }
EIGEN_ALWAYS_INLINE __m128i load_few_bytes(const void* p) {
  std::int32_t bytes;
  std::memcpy(&bytes, p, sizeof bytes);
  return _mm_cvtsi32_si128(bytes);
}
#endif
inline constexpr Index short_lanes = 2 * word_lanes;

/// Bytes of two rows side by side: n pairs, a multiple of 16.
inline void pair_bytes(const std::int8_t* a, const std::int8_t* b, Index n, BytePair* to) {
  const auto load = [](const std::int8_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); };
  const auto store = [](BytePair* p, __m128i v) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), v); };
  for (Index x = 0; x < n; x += 16) {
    const __m128i first = load(a + x), second = load(b + x);
    store(to + x, _mm_unpacklo_epi8(first, second));
    store(to + x + 8, _mm_unpackhi_epi8(first, second));
  }
}

/// sum + a₀b₀ + a₁b₁ of every word. g++ otherwise adds up products of several steps first, for which there are no
/// registers; held after that, it moves every sum.
EIGEN_ALWAYS_INLINE Words add_products(Words sum, Words a, Words b) {
  const Words products = multiply_shorts(a, b);
#if defined(__GNUC__) && !defined(__clang__) && defined(EIGEN_VECTORIZE_AVX2)
  asm("{vpaddd %1, %0, %0|vpaddd %0, %0, %1}" : "+x"(sum) : "x"(products));  // both syntaxes
  return sum;
#else
  return add_words(sum, products);
#endif
}

/// Words of two int16, summed exactly. begin and end: of a score, in product/narrow_tile.hpp; the rest as in
/// kernel/value_tile.hpp. Values as they are stored, pairs of bytes, are widened as they are loaded.
struct ShortDot {
  using Number = Word;
  using Row = BytePair;
  using Sum = Words;
  static constexpr Index width = word_lanes;
  static EIGEN_ALWAYS_INLINE Words load(const Word* p) { return load_words(p); }
  static EIGEN_ALWAYS_INLINE Words load(const BytePair* p) { return widen_bytes(load_bytes(p)); }
  static EIGEN_ALWAYS_INLINE Words broadcast(Word x) { return broadcast_word(x); }
  static EIGEN_ALWAYS_INLINE Sum dot(Sum c, Words a, Words b) { return add_products(c, a, b); }
  static EIGEN_ALWAYS_INLINE auto to_float(Sum s) { return words_to_float(s); }

  static EIGEN_ALWAYS_INLINE Sum begin(const std::int32_t*, Index) { return broadcast_word(0); }
  static EIGEN_ALWAYS_INLINE auto end(Sum s, const float* scale, Index row) {
    return Simd<float>::mul(to_float(s), Simd<float>::broadcast(scale[row]));
  }
  static EIGEN_ALWAYS_INLINE Sum start(const float*) { return broadcast_word(0); }
  static EIGEN_ALWAYS_INLINE void finish(float* o, Sum s, const float* take) {
    using V = Simd<float>;
    V::store(o, V::fma(to_float(s), V::load(take), V::load(o)));
  }
};

/// Rows of int8 with a scale each, `stride` bytes apart, readable up to a multiple of short_lanes.
struct ShortRows {
  Index steps;  // registers of a row
  const std::int8_t* row;
  Index stride;
  const float* scale;
};
template <std::size_t... Lane>
EIGEN_ALWAYS_INLINE Words multiply_short_row(const ShortRows& rows, const Word* q, std::index_sequence<Lane...>) {
  Words sum[] = {broadcast_word(Word(Lane) * 0)...};
  const std::int8_t* k = rows.row;
  for (Index step = rows.steps; step > 0; --step, k += short_lanes, q += word_lanes * word_lanes) {
    Words key = widen_bytes(load_bytes(k));
    detail::hold(key);
    ((sum[Lane] = add_products(sum[Lane], key, load_words(q + Index(Lane) * word_lanes))), ...);
  }
  return sum_each(sum);
}
/// s(j, lane) = scale(j)·unit(lane)·Σ row(j)·q(lane) for n rows and Vectors registers of lanes. A lane is a register of sums,
/// which one tree adds up: rows are widened as they are read, once for a register of lanes. q [Vectors][steps][lanes] of
/// short_lanes each, s [n][Vectors·width].
template <Index Vectors>
void short_scores(ShortRows rows, Index n, const Word* q, const float* unit, float* s) {
  using V = Simd<float>;
  for (; n > 0; --n, rows.row += rows.stride, ++rows.scale)
    for (Index v = 0; v < Vectors; ++v, s += word_lanes) {
      const Words sum = multiply_short_row(rows, q + v * rows.steps * word_lanes * word_lanes,
                                           std::make_index_sequence<std::size_t(word_lanes)>{});
      V::store(s, V::mul(words_to_float(sum), V::mul(V::broadcast(*rows.scale), V::load(unit + v * word_lanes))));
    }
}

/// Two numbers side by side.
constexpr Word word_of_shorts(std::int16_t low, std::int16_t high) {
  return Word{static_cast<std::uint16_t>(low)} | Word{static_cast<std::uint16_t>(high)} << 16;
}
/// The first `some` bytes of a row, at most half a register; zeros past them, and no access.
EIGEN_ALWAYS_INLINE __m128i load_bytes_n(const std::int8_t* row, Index some) {
  if (some >= short_lanes) return load_bytes(row);
  std::int8_t copy[16] = {};
  if (some > 0) std::memcpy(copy, row, static_cast<std::size_t>(some));
  return _mm_loadu_si128(reinterpret_cast<const __m128i*>(copy));
}
/// Rows of d int8, `stride` apart -> words of two features [words][rows], rows <= word_lanes. `to` needs room for pack_slack
/// words more.
inline void pack_shorts(const std::int8_t* from, Index stride, Index rows, Index height, Index d, Word* to) {
  using V = Simd<float>;
  const Index words = (d + 1) / 2;
  for (Index w = 0; w < words; w += word_lanes) {
    V::Vec block[V::lanes];
    for (Index r = 0; r < word_lanes; ++r)
      block[r] = r < rows ? words_as_float(widen_bytes(load_bytes_n(from + r * stride + 2 * w, d - 2 * w))) : V::zero();
    V::transpose(block);
    for (Index i = 0; i < std::min(word_lanes, words - w); ++i)
      V::store(reinterpret_cast<float*>(to + (w + i) * height), block[i]);
  }
}
#else
inline constexpr bool shorts_available = false;
#endif

}}}  // namespace qkv::QKV_ABI::kernel

#include "../base/warnings_on.hpp"

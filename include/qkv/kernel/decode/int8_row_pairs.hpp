// kernel/decode/int8_row_pairs.hpp — int8 rows two at a time, as pairs of 16 bits for one instruction that multiplies and adds both.
//
//     sum += w_a·a + w_b·b          a lane is a feature; w: weights of the two rows, in every lane the same pair
//
//     row a   a₀ a₁ a₂ a₃ …         16 bits of each in turns     a₀a₁ b₀b₁  a₂a₃ b₂b₃ …
//     row b   b₀ b₁ b₂ b₃ …         even: up and down 8 bits      a₀   b₀    a₂   b₂  …
//                                   odd:  down 8 bits             a₁   b₁    a₃   b₃  …
//
// `block` bytes of both rows make four vectors: even and odd features of the low halves of each 16 bytes, then of the high
// ones. Three instructions for two vectors; widening in order takes two of one vector each, which are slow across 128 bits
// (Zen 3: 1.3 cycles for ½).
//
// Before: kernel/decode/int8_values.hpp   Next: kernel/tiled/tiled.hpp
#pragma once

#include <algorithm>
#include <cstdint>

#include "dots.hpp"

#if defined(QKV_DETAIL_WORDS) || defined(QKV_DETAIL_SHORTS)

#include "../../base/warnings_off.hpp"

namespace qkv { inline namespace QKV_ABI { namespace kernel {

struct RowPairs {
  using Floats = Simd<float>::Vec;
  static constexpr Index lanes = Simd<float>::width, block = 4 * lanes;  // features
#if defined(QKV_DETAIL_WORDS)
  using Vec = __m512i;
  using Sum = QuadDot::Sum;
  static EIGEN_ALWAYS_INLINE Vec load(const void* p) { return _mm512_loadu_si512(p); }
  static EIGEN_ALWAYS_INLINE Vec load_n(const std::int8_t* p, Index n) { return row_words(p, n, 0); }
  static EIGEN_ALWAYS_INLINE void store(std::int32_t* p, Sum v) { _mm512_storeu_si512(p, (__m512i)v); }
  static EIGEN_ALWAYS_INLINE Vec broadcast(std::int32_t pair) { return _mm512_set1_epi32(pair); }
  static EIGEN_ALWAYS_INLINE Vec low_turns(Vec a, Vec b) { return _mm512_unpacklo_epi16(a, b); }
  static EIGEN_ALWAYS_INLINE Vec high_turns(Vec a, Vec b) { return _mm512_unpackhi_epi16(a, b); }
  static EIGEN_ALWAYS_INLINE Vec even(Vec turns) { return odd(_mm512_slli_epi16(turns, 8)); }
  static EIGEN_ALWAYS_INLINE Vec odd(Vec turns) { return _mm512_srai_epi16(turns, 8); }
  static EIGEN_ALWAYS_INLINE Sum add_products(Vec w, Vec v, Sum sum) {
    return (Sum)_mm512_dpwssd_epi32((__m512i)sum, w, v);
  }
  static EIGEN_ALWAYS_INLINE void store_rounded(std::int16_t* to, Floats a, Floats b) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32(a)));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 16), _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32(b)));
  }
  static EIGEN_ALWAYS_INLINE Floats positive(Floats x) { return _mm512_max_ps(_mm512_setzero_ps(), x); }
  // x = (x₀ x₁ x₂ x₃) of 128 bits each; wanted: (a₀ b₀ c₀ d₀), (a₁ b₁ c₁ d₁), …
  static EIGEN_ALWAYS_INLINE void in_order(Vec (&v)[4]) {
    const Vec a = _mm512_unpacklo_epi32(v[0], v[1]), b = _mm512_unpackhi_epi32(v[0], v[1]);
    const Vec c = _mm512_unpacklo_epi32(v[2], v[3]), d = _mm512_unpackhi_epi32(v[2], v[3]);
    const Vec ab = _mm512_shuffle_i32x4(a, b, 0x44), ab2 = _mm512_shuffle_i32x4(a, b, 0xEE);
    const Vec cd = _mm512_shuffle_i32x4(c, d, 0x44), cd2 = _mm512_shuffle_i32x4(c, d, 0xEE);
    v[0] = _mm512_shuffle_i32x4(ab, cd, 0x88), v[1] = _mm512_shuffle_i32x4(ab, cd, 0xDD);
    v[2] = _mm512_shuffle_i32x4(ab2, cd2, 0x88), v[3] = _mm512_shuffle_i32x4(ab2, cd2, 0xDD);
  }
  static EIGEN_ALWAYS_INLINE Floats to_float(Vec v) { return _mm512_cvtepi32_ps(v); }
#else
  using Vec = Words;  // simd/shorts.hpp
  using Sum = Words;
  static EIGEN_ALWAYS_INLINE Vec load(const void* p) { return load_words(p); }
  /// The first n bytes and zeros, and no access past them.
  static EIGEN_ALWAYS_INLINE Vec load_n(const std::int8_t* p, Index n) {
    std::int8_t copy[std::size_t(block)] = {};
    std::copy_n(p, n, copy);
    return load(copy);
  }
  static EIGEN_ALWAYS_INLINE void store(std::int32_t* p, Sum v) { store_words(p, v); }
  static EIGEN_ALWAYS_INLINE Vec broadcast(std::int32_t pair) { return broadcast_word(static_cast<Word>(pair)); }
  static EIGEN_ALWAYS_INLINE Sum add_products(Vec w, Vec v, Sum sum) { return kernel::add_products(sum, w, v); }
  static EIGEN_ALWAYS_INLINE void store_rounded(std::int16_t* to, Floats a, Floats b) {
    store_words(to, to_shorts(round_to_words(a), round_to_words(b)));
  }
  static EIGEN_ALWAYS_INLINE Floats to_float(Vec v) { return words_to_float(v); }
#if defined(EIGEN_VECTORIZE_AVX2)
  static EIGEN_ALWAYS_INLINE Vec low_turns(Vec a, Vec b) { return _mm256_unpacklo_epi16(a, b); }
  static EIGEN_ALWAYS_INLINE Vec high_turns(Vec a, Vec b) { return _mm256_unpackhi_epi16(a, b); }
  static EIGEN_ALWAYS_INLINE Vec even(Vec turns) { return odd(_mm256_slli_epi16(turns, 8)); }
  static EIGEN_ALWAYS_INLINE Vec odd(Vec turns) { return _mm256_srai_epi16(turns, 8); }
  static EIGEN_ALWAYS_INLINE Floats positive(Floats x) { return _mm256_max_ps(_mm256_setzero_ps(), x); }
  static EIGEN_ALWAYS_INLINE void in_order(Vec (&v)[4]) {
    const Vec a = _mm256_unpacklo_epi32(v[0], v[1]), b = _mm256_unpackhi_epi32(v[0], v[1]);
    const Vec c = _mm256_unpacklo_epi32(v[2], v[3]), d = _mm256_unpackhi_epi32(v[2], v[3]);
    v[0] = _mm256_permute2x128_si256(a, b, 0x20), v[1] = _mm256_permute2x128_si256(c, d, 0x20);
    v[2] = _mm256_permute2x128_si256(a, b, 0x31), v[3] = _mm256_permute2x128_si256(c, d, 0x31);
  }
#else
  static EIGEN_ALWAYS_INLINE Vec low_turns(Vec a, Vec b) { return _mm_unpacklo_epi16(a, b); }
  static EIGEN_ALWAYS_INLINE Vec high_turns(Vec a, Vec b) { return _mm_unpackhi_epi16(a, b); }
  static EIGEN_ALWAYS_INLINE Vec even(Vec turns) { return odd(_mm_slli_epi16(turns, 8)); }
  static EIGEN_ALWAYS_INLINE Vec odd(Vec turns) { return _mm_srai_epi16(turns, 8); }
  static EIGEN_ALWAYS_INLINE Floats positive(Floats x) { return _mm_max_ps(_mm_setzero_ps(), x); }
  static EIGEN_ALWAYS_INLINE void in_order(Vec (&v)[4]) {
    const Vec low = v[0], high = v[2];
    v[0] = _mm_unpacklo_epi32(low, v[1]), v[1] = _mm_unpackhi_epi32(low, v[1]);
    v[2] = _mm_unpacklo_epi32(high, v[3]), v[3] = _mm_unpackhi_epi32(high, v[3]);
  }
#endif
#endif

  /// Vector 0 … 3 of a block.
  template <std::size_t Part>
  static EIGEN_ALWAYS_INLINE Vec part(Vec a, Vec b) {
    const Vec turns = Part < 2 ? low_turns(a, b) : high_turns(a, b);
    return Part % 2 == 0 ? even(turns) : odd(turns);
  }
};

}}}  // namespace qkv::QKV_ABI::kernel

#include "../../base/warnings_on.hpp"

#endif

// simd/words.hpp — products in narrow numbers, 32-bit words at a time: two bfloat16 or four int8 of one row.
//
//     bfloat16   c += a₀b₀ + a₁b₁                          vdpbf16ps: products and sums in float
//     int8       c += Σ₄ aᵢ·bᵢ,   a signed, b unsigned       vpdpbusd: exact in 32 bits
//
// Signs: a query's int8 is stored as q + 128, so a sum begins at -128·Σ(key row).
//
// Only where the compiler may use AVX512_BF16 and AVX512_VNNI; elsewhere `words_available` is false, and
// kernels widen: to int16 (simd/shorts.hpp) or to float.
//
// Before: simd/eigen_packets.hpp   Next: simd/shorts.hpp
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "simd.hpp"

#if defined(__AVX512BF16__) && defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(EIGEN_VECTORIZE_AVX512)
#define QKV_DETAIL_WORDS 1
#include <immintrin.h>
#endif

#include "../base/warnings_off.hpp"

namespace qkv { inline namespace QKV_ABI { namespace kernel {

using Word = std::uint32_t;

#ifdef QKV_DETAIL_WORDS
inline constexpr bool words_available = true;
inline constexpr Index word_lanes = 16;

EIGEN_ALWAYS_INLINE __m512i load_words(const Word* p) { return _mm512_loadu_si512(p); }
EIGEN_ALWAYS_INLINE void store_words(Word* p, __m512i v) { _mm512_storeu_si512(p, v); }
EIGEN_ALWAYS_INLINE __m512i broadcast_word(Word x) { return _mm512_set1_epi32(static_cast<int>(x)); }

// begin and end: of a score, in product/narrow_tile.hpp.
/// Sums in float of products of bfloat16 pairs.
struct PairDot {
  using Sum = __m512;
  static EIGEN_ALWAYS_INLINE Sum dot(Sum c, __m512i a, __m512i b) {
    return _mm512_dpbf16_ps(c, reinterpret_cast<__m512bh>(b), reinterpret_cast<__m512bh>(a));
  }
  static EIGEN_ALWAYS_INLINE Sum begin(const std::int32_t*, Index) { return _mm512_setzero_ps(); }
  static EIGEN_ALWAYS_INLINE __m512 end(Sum s, const float*, Index) { return s; }
};
/// Sums in int32 of products of four: a signed, b unsigned.
struct QuadDot {
#if defined(__GNUC__)
  // Not __m512i: g++ takes that for eight numbers of 64 bits, and moves every sum to memory and back to see it as sixteen.
  typedef int Sum __attribute__((vector_size(64)));
#else
  using Sum = __m512i;
#endif
  static EIGEN_ALWAYS_INLINE Sum dot(Sum c, __m512i a, __m512i b) { return (Sum)_mm512_dpbusd_epi32((__m512i)c, b, a); }
  static EIGEN_ALWAYS_INLINE Sum begin(const std::int32_t* offset, Index row) {
    return (Sum)_mm512_set1_epi32(offset[row]);
  }
  static EIGEN_ALWAYS_INLINE __m512 end(Sum s, const float* scale, Index row) {
    return _mm512_mul_ps(to_float(s), _mm512_set1_ps(scale[row]));
  }
  static EIGEN_ALWAYS_INLINE __m512 to_float(Sum s) { return _mm512_cvtepi32_ps((__m512i)s); }
};

/// Words [first, first + 16) of a row of `bytes` bytes; zeros after its end, and no access past it.
EIGEN_ALWAYS_INLINE __m512i row_words(const void* row, Index bytes, Index first) {
  const Index left = bytes - first * 4;
  const auto* at = static_cast<const char*>(row) + first * 4;
  if (left >= 64) return _mm512_loadu_si512(at);
  return _mm512_maskz_loadu_epi8(left <= 0 ? 0 : (~__mmask64{0} >> (64 - left)), at);
}

/// Rows of `bytes` bytes, `stride` bytes apart -> [words][height], rows <= height <= 16; zeros past `rows`. `to` needs room
/// for pack_slack words more.
inline void pack_words(const void* from, Index stride, Index rows, Index height, Index bytes, Word* to) {
  using V = Simd<float>;
  const Index words = (bytes + 3) / 4;
  for (Index w = 0; w < words; w += word_lanes) {
    V::Vec block[V::lanes];
    for (Index r = 0; r < word_lanes; ++r)
      block[r] = r < rows ? _mm512_castsi512_ps(row_words(static_cast<const char*>(from) + r * stride, bytes, w))
                          : _mm512_setzero_ps();
    V::transpose(block);
    for (Index i = 0; i < std::min(word_lanes, words - w); ++i)
      store_words(to + (w + i) * height, _mm512_castps_si512(block[i]));
  }
}

/// Lane l of the result holds (low[l], high[l]) as bfloat16, each rounded to nearest even.
EIGEN_ALWAYS_INLINE __m512i to_pairs(__m512 low, __m512 high) {
  const __m512i interleave = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22,
                                              6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return _mm512_permutexvar_epi16(interleave, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low)));
}
/// 32 numbers as bfloat16, those of a first. What is finite stays finite: past the largest bfloat16 it becomes that.
EIGEN_ALWAYS_INLINE __m512i to_halves(__m512 a, __m512 b) {
  const auto within = [](__m512 v) {
    const __m512i bits = _mm512_castps_si512(v), half_step = _mm512_set1_epi32(0x8000);
    const __m512i past = _mm512_sub_epi32(_mm512_and_si512(bits, _mm512_set1_epi32(0x7FFFFFFF)),
                                          _mm512_set1_epi32(0x7F7F8000));  // [0, half_step) where it would be infinite
    return _mm512_castsi512_ps(_mm512_mask_sub_epi32(bits, _mm512_cmplt_epu32_mask(past, half_step), bits, half_step));
  };
  return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(within(b), within(a)));
}
/// Lane l of the result holds (a[l], b[l], c[l], d[l]) as bytes; what is more than 255 becomes 255.
EIGEN_ALWAYS_INLINE __m512i to_bytes(__m512i a, __m512i b, __m512i c, __m512i d) {
  const __m512i turned = _mm512_set4_epi32(0x0F0B0703, 0x0E0A0602, 0x0D090501, 0x0C080400);
  return _mm512_shuffle_epi8(_mm512_packus_epi16(_mm512_packs_epi32(a, b), _mm512_packs_epi32(c, d)), turned);
}
/// Bytes of four rows side by side: word i of the result holds byte i of each.
EIGEN_ALWAYS_INLINE __m512i to_quads(__m128i a, __m128i b, __m128i c, __m128i d) {
  const __m128i ab = _mm_unpacklo_epi8(a, b), ab_high = _mm_unpackhi_epi8(a, b);
  const __m128i cd = _mm_unpacklo_epi8(c, d), cd_high = _mm_unpackhi_epi8(c, d);
  const __m512i one = _mm512_castsi128_si512(_mm_unpacklo_epi16(ab, cd));
  const __m512i two = _mm512_inserti32x4(one, _mm_unpackhi_epi16(ab, cd), 1);
  const __m512i three = _mm512_inserti32x4(two, _mm_unpacklo_epi16(ab_high, cd_high), 2);
  return _mm512_inserti32x4(three, _mm_unpackhi_epi16(ab_high, cd_high), 3);
}
#else
inline constexpr bool words_available = false;
#endif

}}}  // namespace qkv::QKV_ABI::kernel

#include "../base/warnings_on.hpp"

// simd/intrinsics.hpp — what Eigen's packets lack, for the instruction sets that have it: mask registers, shifts of
// doubles, prefetches, and half, bfloat16 and int8 to float in the register. simd/eigen_packets.hpp has the general forms.
//
// Before: simd/shorts.hpp   Next: base/require.hpp
#pragma once

#include <cstdint>
#include <cstring>

#include "../matrix.hpp"

#if defined(EIGEN_VECTORIZE_SSE2)
#include <immintrin.h>
#elif defined(EIGEN_VECTORIZE_NEON)
#include <arm_neon.h>
#endif

namespace qkv { inline namespace QKV_ABI { namespace detail {

// ---- masks ----
#if defined(EIGEN_VECTORIZE_AVX512)

EIGEN_ALWAYS_INLINE __mmask16 less(__m512 a, __m512 b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
EIGEN_ALWAYS_INLINE __mmask8 less(__m512d a, __m512d b) { return _mm512_cmp_pd_mask(a, b, _CMP_LT_OQ); }
EIGEN_ALWAYS_INLINE __mmask16 less_equal(__m512 a, __m512 b) { return _mm512_cmp_ps_mask(a, b, _CMP_LE_OQ); }
EIGEN_ALWAYS_INLINE __mmask8 less_equal(__m512d a, __m512d b) { return _mm512_cmp_pd_mask(a, b, _CMP_LE_OQ); }
EIGEN_ALWAYS_INLINE __mmask16 both(__mmask16 a, __mmask16 b) { return static_cast<__mmask16>(a & b); }
EIGEN_ALWAYS_INLINE __mmask8 both(__mmask8 a, __mmask8 b) { return static_cast<__mmask8>(a & b); }
EIGEN_ALWAYS_INLINE bool any(__mmask16 mask) { return mask != 0; }
EIGEN_ALWAYS_INLINE bool any(__mmask8 mask) { return mask != 0; }
EIGEN_ALWAYS_INLINE __m512 select(__mmask16 mask, __m512 yes, __m512 no) { return _mm512_mask_blend_ps(mask, no, yes); }
EIGEN_ALWAYS_INLINE __m512d select(__mmask8 mask, __m512d yes, __m512d no) {
  return _mm512_mask_blend_pd(mask, no, yes);
}
EIGEN_ALWAYS_INLINE __mmask16 first_lanes(Index n) { return static_cast<__mmask16>((1U << n) - 1U); }  // n ≤ 16
EIGEN_ALWAYS_INLINE void load_first(const float* p, Index n, __m512& v) {
  v = _mm512_maskz_loadu_ps(first_lanes(n), p);
}
EIGEN_ALWAYS_INLINE void load_first(const double* p, Index n, __m512d& v) {
  v = _mm512_maskz_loadu_pd(static_cast<__mmask8>(first_lanes(n)), p);
}
EIGEN_ALWAYS_INLINE void store_first(float* p, __m512 v, Index n) { _mm512_mask_storeu_ps(p, first_lanes(n), v); }
EIGEN_ALWAYS_INLINE void store_first(double* p, __m512d v, Index n) {
  _mm512_mask_storeu_pd(p, static_cast<__mmask8>(first_lanes(n)), v);
}

#endif

// ---- sums of lanes ----
#if defined(EIGEN_VECTORIZE_AVX512)

#if defined(__GNUC__)
EIGEN_ALWAYS_INLINE void hold(__m512& v) { asm("" : "+v"(v)); }
EIGEN_ALWAYS_INLINE void hold(__m512i& v) { asm("" : "+v"(v)); }
#endif

// Sums of float, or of 32-bit integers in any type of 64 bytes that stands for them.
EIGEN_ALWAYS_INLINE __m512 add_lanes(__m512 a, __m512 b) { return _mm512_add_ps(a, b); }
template <class P>
EIGEN_ALWAYS_INLINE P add_lanes(P a, P b) {
  return (P)_mm512_add_epi32((__m512i)a, (__m512i)b);
}

// Picks what Low and High name from a and b (b's half goes to the upper half of each pair) and adds the two.
template <int Low, int High, class P>
EIGEN_ALWAYS_INLINE P add_blocks(P a, P b) {  // blocks of four lanes
  return add_lanes((P)_mm512_shuffle_f32x4((__m512)a, (__m512)b, Low),
                   (P)_mm512_shuffle_f32x4((__m512)a, (__m512)b, High));
}
template <int Low, int High, class P>
EIGEN_ALWAYS_INLINE P add_pairs(P a, P b) {  // lanes inside each block
  return add_lanes((P)_mm512_shuffle_ps((__m512)a, (__m512)b, Low), (P)_mm512_shuffle_ps((__m512)a, (__m512)b, High));
}

// Lane i: the sum of the lanes of row i, for floats or 32-bit integers. Half the work of a transposition.
template <class P>
EIGEN_ALWAYS_INLINE P sum_each_16(P (&v)[16]) {
  for (int i : {0, 1, 2, 3, 8, 9, 10, 11}) v[i] = add_blocks<0x44, 0xEE>(v[i], v[i + 4]);  // blocks i, i, i+4, i+4
  for (int i = 0; i < 4; ++i) v[i] = add_blocks<0x88, 0xDD>(v[i], v[i + 8]);               // i, i+4, i+8, i+12
  v[0] = add_pairs<0x44, 0xEE>(v[0], v[1]);
  v[2] = add_pairs<0x44, 0xEE>(v[2], v[3]);
  return add_pairs<0x88, 0xDD>(v[0], v[2]);
}
EIGEN_ALWAYS_INLINE __m512 sum_each(__m512 (&rows)[16]) { return sum_each_16(rows); }

#elif defined(EIGEN_VECTORIZE_AVX2)

#if defined(__GNUC__)
EIGEN_ALWAYS_INLINE void hold(__m256& v) { asm("" : "+x"(v)); }
EIGEN_ALWAYS_INLINE void hold(__m256d& v) { asm("" : "+x"(v)); }
EIGEN_ALWAYS_INLINE void hold(__m256i& v) { asm("" : "+x"(v)); }
#endif

EIGEN_ALWAYS_INLINE __m256 add_lanes(__m256 a, __m256 b) { return _mm256_add_ps(a, b); }
EIGEN_ALWAYS_INLINE __m256i add_lanes(__m256i a, __m256i b) { return _mm256_add_epi32(a, b); }
template <int Low, int High, class P>
EIGEN_ALWAYS_INLINE P add_pairs(P a, P b) {  // lanes inside each block of four, as above
  return add_lanes((P)_mm256_shuffle_ps((__m256)a, (__m256)b, Low), (P)_mm256_shuffle_ps((__m256)a, (__m256)b, High));
}

// Lane i: the sum of the lanes of row i, for floats or 32-bit integers; in the order of the general form.
template <class P>
EIGEN_ALWAYS_INLINE P sum_each_8(P (&v)[8]) {
  for (int i = 0; i < 4; ++i)  // blocks i, i+4 of (first a, second b) and (second a, first b)
    v[i] = add_lanes((P)_mm256_blend_ps((__m256)v[i], (__m256)v[i + 4], 0xF0),
                     (P)_mm256_permute2f128_ps((__m256)v[i], (__m256)v[i + 4], 0x21));
  v[0] = add_pairs<0x44, 0xEE>(v[0], v[1]);
  v[2] = add_pairs<0x44, 0xEE>(v[2], v[3]);
  return add_pairs<0x88, 0xDD>(v[0], v[2]);
}
EIGEN_ALWAYS_INLINE __m256 sum_each(__m256 (&rows)[8]) { return sum_each_8(rows); }

#elif defined(EIGEN_VECTORIZE_SSE2) && !defined(EIGEN_VECTORIZE_AVX)

#if defined(__GNUC__)
EIGEN_ALWAYS_INLINE void hold(__m128& v) { asm("" : "+x"(v)); }
EIGEN_ALWAYS_INLINE void hold(__m128d& v) { asm("" : "+x"(v)); }
EIGEN_ALWAYS_INLINE void hold(__m128i& v) { asm("" : "+x"(v)); }
#endif

#endif

// ---- the low bits of a double, moved up into its exponent ----
#if defined(EIGEN_VECTORIZE_AVX512)
EIGEN_ALWAYS_INLINE __m512d low_bits_to_exponent(__m512d biased) {
  return _mm512_castsi512_pd(_mm512_slli_epi64(_mm512_castpd_si512(biased), 52));
}
#elif defined(EIGEN_VECTORIZE_AVX2)
EIGEN_ALWAYS_INLINE __m256d low_bits_to_exponent(__m256d biased) {
  return _mm256_castsi256_pd(_mm256_slli_epi64(_mm256_castpd_si256(biased), 52));
}
#elif defined(EIGEN_VECTORIZE_SSE2) && !defined(EIGEN_VECTORIZE_AVX)
EIGEN_ALWAYS_INLINE __m128d low_bits_to_exponent(__m128d biased) {
  return _mm_castsi128_pd(_mm_slli_epi64(_mm_castpd_si128(biased), 52));
}
#elif defined(EIGEN_VECTORIZE_NEON) && EIGEN_ARCH_ARM64
EIGEN_ALWAYS_INLINE float64x2_t low_bits_to_exponent(float64x2_t biased) {
  return vreinterpretq_f64_s64(vshlq_n_s64(vreinterpretq_s64_f64(biased), 52));
}
#endif

// ---- storage types ----
// widen(p, v) reads exactly as many numbers as v has lanes. Every conversion is exact, hence the same everywhere.

#if defined(EIGEN_VECTORIZE_AVX512)

EIGEN_ALWAYS_INLINE void widen(const Eigen::half* p, __m512& v) {
  v = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
EIGEN_ALWAYS_INLINE void widen(const Eigen::bfloat16* p, __m512& v) {
  const __m512i bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  v = _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
}
EIGEN_ALWAYS_INLINE void widen(const std::int8_t* p, __m512& v) {
  v = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}

#elif defined(EIGEN_VECTORIZE_AVX2)

#if defined(__F16C__)
EIGEN_ALWAYS_INLINE void widen(const Eigen::half* p, __m256& v) {
  v = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
#endif
EIGEN_ALWAYS_INLINE void widen(const Eigen::bfloat16* p, __m256& v) {
  const __m256i bits = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  v = _mm256_castsi256_ps(_mm256_slli_epi32(bits, 16));
}
EIGEN_ALWAYS_INLINE void widen(const std::int8_t* p, __m256& v) {
  v = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}

#elif defined(EIGEN_VECTORIZE_SSE2) && !defined(EIGEN_VECTORIZE_AVX)

// Exponent and mantissa move to their places in a float; 2¹¹² corrects the exponent's bias, subnormal halves included.
// What comes out at 2¹⁶ or more was inf or NaN.
EIGEN_ALWAYS_INLINE void widen(const Eigen::half* p, __m128& v) {
  const __m128i wide = _mm_unpacklo_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)), _mm_setzero_si128());
  const __m128i sign = _mm_slli_epi32(_mm_and_si128(wide, _mm_set1_epi32(0x8000)), 16);
  const __m128i magnitude = _mm_slli_epi32(_mm_and_si128(wide, _mm_set1_epi32(0x7FFF)), 13);
  const __m128 number = _mm_mul_ps(_mm_castsi128_ps(magnitude), _mm_set1_ps(0x1p112F));
  const __m128 special =
      _mm_and_ps(_mm_cmpnlt_ps(number, _mm_set1_ps(65536.0F)), _mm_castsi128_ps(_mm_set1_epi32(0x7F800000)));
  v = _mm_or_ps(_mm_or_ps(number, special), _mm_castsi128_ps(sign));
}
EIGEN_ALWAYS_INLINE void widen(const Eigen::bfloat16* p, __m128& v) {
  v = _mm_castsi128_ps(_mm_unpacklo_epi16(_mm_setzero_si128(), _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
EIGEN_ALWAYS_INLINE void widen(const std::int8_t* p, __m128& v) {
  std::int32_t four = 0;
  std::memcpy(&four, p, sizeof four);
  const __m128i bytes = _mm_cvtsi32_si128(four);
  const __m128i top = _mm_unpacklo_epi16(_mm_setzero_si128(), _mm_unpacklo_epi8(_mm_setzero_si128(), bytes));
  v = _mm_cvtepi32_ps(_mm_srai_epi32(top, 24));
}

#elif defined(EIGEN_VECTORIZE_NEON)

#if EIGEN_ARCH_ARM64
EIGEN_ALWAYS_INLINE void widen(const Eigen::half* p, float32x4_t& v) {
  v = vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(reinterpret_cast<const std::uint16_t*>(p))));
}
#endif
EIGEN_ALWAYS_INLINE void widen(const Eigen::bfloat16* p, float32x4_t& v) {
  v = vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(reinterpret_cast<const std::uint16_t*>(p)), 16));
}
EIGEN_ALWAYS_INLINE void widen(const std::int8_t* p, float32x4_t& v) {
  std::uint32_t four = 0;
  std::memcpy(&four, p, sizeof four);
  const int16x8_t wide = vmovl_s8(vreinterpret_s8_u32(vdup_n_u32(four)));
  v = vcvtq_f32_s32(vmovl_s16(vget_low_s16(wide)));
}

#endif

}}}  // namespace qkv::QKV_ABI::detail

namespace qkv { inline namespace QKV_ABI { namespace kernel {

/// Asks for the cache line at p, for reading, into the second-level cache. Never faults. (Always inline: g++ takes a
/// function that only prefetches for one without effect and drops its calls.)
EIGEN_ALWAYS_INLINE void prefetch([[maybe_unused]] const void* p) {
#if defined(__GNUC__)
  __builtin_prefetch(p, 0, 2);
#endif
}
/// The same, for writing.
EIGEN_ALWAYS_INLINE void prefetch_to_write([[maybe_unused]] const void* p) {
#if defined(__GNUC__)
  __builtin_prefetch(p, 1, 2);
#endif
}
/// For reading, once: into the first-level cache, and from there not into the others.
EIGEN_ALWAYS_INLINE void prefetch_once([[maybe_unused]] const void* p) {
#if defined(__GNUC__)
  __builtin_prefetch(p, 0, 0);
#endif
}
/// For reading, into the first-level cache.
EIGEN_ALWAYS_INLINE void prefetch_near([[maybe_unused]] const void* p) {
#if defined(__GNUC__)
  __builtin_prefetch(p, 0, 3);
#endif
}

}}}  // namespace qkv::QKV_ABI::kernel

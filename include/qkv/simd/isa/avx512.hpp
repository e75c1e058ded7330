// simd/isa/avx512.hpp — AVX-512: mask registers, storage types to float in the register, sums of many rows at once, and
// softmax weights by a table.
//
// Before: simd/isa/avx_vnni.hpp   Next: simd/isa/avx512_narrow.hpp
#pragma once

#include <cstring>

#include "general.hpp"

#if defined(EIGEN_VECTORIZE_AVX512)

#include <immintrin.h>

#include "../../base/warnings_off.hpp"

namespace qkv { inline namespace QKV_ABI { namespace isa {

#if defined(__GNUC__)
// Not __m512i, which is eight numbers of 64 bits to g++: it would move every sum to memory and back to use it as sixteen.
typedef int Sums512 __attribute__((vector_size(64)));
#else
using Sums512 = __m512i;
#endif

struct Avx512 : General<__m512, __m512i, Sums512, __m128i> {
  // ---- masks ----
  static EIGEN_ALWAYS_INLINE __mmask16 less(__m512 a, __m512 b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
  static EIGEN_ALWAYS_INLINE __mmask8 less(__m512d a, __m512d b) { return _mm512_cmp_pd_mask(a, b, _CMP_LT_OQ); }
  static EIGEN_ALWAYS_INLINE __mmask16 less_equal(__m512 a, __m512 b) { return _mm512_cmp_ps_mask(a, b, _CMP_LE_OQ); }
  static EIGEN_ALWAYS_INLINE __mmask8 less_equal(__m512d a, __m512d b) { return _mm512_cmp_pd_mask(a, b, _CMP_LE_OQ); }
  static EIGEN_ALWAYS_INLINE __mmask16 both(__mmask16 a, __mmask16 b) { return static_cast<__mmask16>(a & b); }
  static EIGEN_ALWAYS_INLINE __mmask8 both(__mmask8 a, __mmask8 b) { return static_cast<__mmask8>(a & b); }
  static EIGEN_ALWAYS_INLINE bool any(__mmask16 mask) { return mask != 0; }
  static EIGEN_ALWAYS_INLINE bool any(__mmask8 mask) { return mask != 0; }
  static EIGEN_ALWAYS_INLINE __m512 select(__mmask16 mask, __m512 yes, __m512 no) {
    return _mm512_mask_blend_ps(mask, no, yes);
  }
  static EIGEN_ALWAYS_INLINE __m512d select(__mmask8 mask, __m512d yes, __m512d no) {
    return _mm512_mask_blend_pd(mask, no, yes);
  }

  // ---- memory ----
  static EIGEN_ALWAYS_INLINE __mmask16 first_lanes(Index n) {
    return static_cast<__mmask16>((1U << n) - 1U);
  }  // n ≤ 16
  static EIGEN_ALWAYS_INLINE void load_first(const float* p, Index n, __m512& v) {
    v = _mm512_maskz_loadu_ps(first_lanes(n), p);
  }
  static EIGEN_ALWAYS_INLINE void load_first(const double* p, Index n, __m512d& v) {
    v = _mm512_maskz_loadu_pd(static_cast<__mmask8>(first_lanes(n)), p);
  }
  static EIGEN_ALWAYS_INLINE void store_first(float* p, __m512 v, Index n) {
    _mm512_mask_storeu_ps(p, first_lanes(n), v);
  }
  static EIGEN_ALWAYS_INLINE void store_first(double* p, __m512d v, Index n) {
    _mm512_mask_storeu_pd(p, static_cast<__mmask8>(first_lanes(n)), v);
  }
#if defined(__GNUC__)
  using General::hold;
  static EIGEN_ALWAYS_INLINE void hold(__m512& v) { asm("" : "+v"(v)); }
  static EIGEN_ALWAYS_INLINE void hold(__m512i& v) { asm("" : "+v"(v)); }
#endif
  using General::widen;
  static EIGEN_ALWAYS_INLINE void widen(const Eigen::half* p, __m512& v) {
    v = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static EIGEN_ALWAYS_INLINE void widen(const Eigen::bfloat16* p, __m512& v) {
    const __m512i bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    v = _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
  }
  static EIGEN_ALWAYS_INLINE void widen(const std::int8_t* p, __m512& v) {
    v = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
  }

  // ---- across lanes ----
  using General::sum_each;
  static EIGEN_ALWAYS_INLINE __m512 sum_each(__m512 (&rows)[16]) { return sum_each_16(rows); }
  static EIGEN_ALWAYS_INLINE Sums sum_each(Sums (&rows)[16]) { return sum_each_16(rows); }

  static constexpr bool repeats = true;
  template <Index Parts>
  static EIGEN_ALWAYS_INLINE __m512 repeat(const void* p) {
    if constexpr (Parts == 2) {
      double two;
      std::memcpy(&two, p, sizeof two);
      return _mm512_castpd_ps(_mm512_set1_pd(two));
    } else {
      return _mm512_broadcast_f32x4(_mm_loadu_ps(static_cast<const float*>(p)));
    }
  }
  template <Index Parts>
  static EIGEN_ALWAYS_INLINE void store_part_sums(float* to, __m512 v) {
    const __m512 two = _mm512_add_ps(v, _mm512_permute_ps(v, 0xB1));
    if constexpr (Parts == 2) {
      const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 0, 2, 4, 6, 8, 10, 12, 14);
      _mm256_storeu_ps(to, _mm512_castps512_ps256(_mm512_permutexvar_ps(even, two)));
    } else {
      const __m512 four = _mm512_add_ps(two, _mm512_permute_ps(two, 0x4E));
      const __m512i fourth = _mm512_setr_epi32(0, 4, 8, 12, 0, 4, 8, 12, 0, 4, 8, 12, 0, 4, 8, 12);
      _mm_storeu_ps(to, _mm512_castps512_ps128(_mm512_permutexvar_ps(fourth, four)));
    }
  }

  // ---- powers of two: simd/exp2.hpp ----
  using General::low_bits_to_exponent;
  static EIGEN_ALWAYS_INLINE __m512d low_bits_to_exponent(__m512d biased) {
    return _mm512_castsi512_pd(_mm512_slli_epi64(_mm512_castpd_si512(biased), 52));
  }
#if defined(__AVX512DQ__)
  static constexpr bool scales_by_powers = true;
  static EIGEN_ALWAYS_INLINE __m512 fraction(__m512 x) { return _mm512_reduce_ps(x, 0); }
  static EIGEN_ALWAYS_INLINE __m512d fraction(__m512d x) { return _mm512_reduce_pd(x, 0); }
  static EIGEN_ALWAYS_INLINE __m512 scale_by_power(__m512 y, __m512 n) { return _mm512_scalef_ps(y, n); }
  static EIGEN_ALWAYS_INLINE __m512d scale_by_power(__m512d y, __m512d n) { return _mm512_scalef_pd(y, n); }
#endif

  static constexpr bool has_weights = true;
  static EIGEN_ALWAYS_INLINE __m512 weight(__m512 d, __m512 c) {
    const TablePower power(d, c);
    const __m512 slope = _mm512_set1_ps(weight_coefficients[0]), start = _mm512_set1_ps(weight_coefficients[1]);
    const __m512 y = _mm512_mul_ps(power.rest, _mm512_fmadd_ps(power.rest, slope, start));
    return _mm512_maskz_fmadd_ps(power.normal, power.step, y, power.step);
  }
  static EIGEN_ALWAYS_INLINE __m512 weight_short(__m512 d, __m512 c) {
    const TablePower power(d, c);
    const __m512 slope = _mm512_mul_ps(power.step, _mm512_set1_ps(0.693147181F));
    return _mm512_maskz_fmadd_ps(power.normal, slope, power.rest, power.step);
  }

 private:
  // 2^(j/32) less j·2¹⁸, as bits: what the index adds to the mantissa when it is shifted up together with the exponent.
  alignas(64) static constexpr std::uint32_t table_powers[32] = {
      0x3F800000, 0x3F7ECD87, 0x3F7DAAC3, 0x3F7C980F, 0x3F7B95C2, 0x3F7AA43A, 0x3F79C3D3, 0x3F78F4F0,
      0x3F7837F0, 0x3F778D3A, 0x3F76F532, 0x3F767043, 0x3F75FED7, 0x3F75A15B, 0x3F75583F, 0x3F7523F6,
      0x3F7504F3, 0x3F74FBAF, 0x3F7508A4, 0x3F752C4D, 0x3F75672A, 0x3F75B9BE, 0x3F76248C, 0x3F76A81E,
      0x3F7744FD, 0x3F77FBB8, 0x3F78CCDF, 0x3F79B907, 0x3F7AC0C7, 0x3F7BE4BA, 0x3F7D257D, 0x3F7E83B3};
  // 2ʳ - 1 for |r| <= 1/64: r·(p₁ + p₀·r), error 5.3e-8.
  static constexpr float weight_coefficients[] = {0.240226507F, 0.693157345F};

  /// 2^(d·c) = step · 2^rest, d <= 0, |rest| <= 1/64; `normal` is false where the power is below 2⁻¹²⁶. Adds, integer
  /// operations and permutations leave the ports free that multiply.
  struct TablePower {
    __m512 step, rest;
    __mmask16 normal;

    EIGEN_ALWAYS_INLINE TablePower(__m512 d, __m512 c) {
      const __m512 magic = _mm512_set1_ps(0x1.8p18F);  // adding it rounds to a multiple of 1/32, in the low bits
      const __m512 shifted = _mm512_fmadd_ps(d, c, magic);
      rest = _mm512_fmsub_ps(d, c, _mm512_sub_ps(shifted, magic));
      const __m512i bits = _mm512_castps_si512(shifted);
      const __m512i low = _mm512_load_si512(table_powers), high = _mm512_load_si512(table_powers + 16);
      step = _mm512_castsi512_ps(
          _mm512_add_epi32(_mm512_permutex2var_epi32(low, bits, high), _mm512_slli_epi32(bits, 18)));
      normal = _mm512_cmp_ps_mask(shifted, _mm512_set1_ps(0x1.8p18F - 126), _CMP_NLT_UQ);
    }
  };

  // Sums of float, or of 32-bit integers in any type of 64 bytes that stands for them.
  static EIGEN_ALWAYS_INLINE __m512 add(__m512 a, __m512 b) { return _mm512_add_ps(a, b); }
  template <class P>
  static EIGEN_ALWAYS_INLINE P add(P a, P b) {
    return (P)_mm512_add_epi32((__m512i)a, (__m512i)b);
  }
  // Picks what Low and High name from a and b (b's half goes to the upper half of each pair) and adds the two.
  template <int Low, int High, class P>
  static EIGEN_ALWAYS_INLINE P add_blocks(P a, P b) {  // blocks of four lanes
    return add((P)_mm512_shuffle_f32x4((__m512)a, (__m512)b, Low), (P)_mm512_shuffle_f32x4((__m512)a, (__m512)b, High));
  }
  template <int Low, int High, class P>
  static EIGEN_ALWAYS_INLINE P add_pairs(P a, P b) {  // lanes inside each block
    return add((P)_mm512_shuffle_ps((__m512)a, (__m512)b, Low), (P)_mm512_shuffle_ps((__m512)a, (__m512)b, High));
  }
  // For floats or 32-bit integers. Half the work of a transposition.
  template <class P>
  static EIGEN_ALWAYS_INLINE P sum_each_16(P (&v)[16]) {
    for (int i : {0, 1, 2, 3, 8, 9, 10, 11}) v[i] = add_blocks<0x44, 0xEE>(v[i], v[i + 4]);  // blocks i, i, i+4, i+4
    for (int i = 0; i < 4; ++i) v[i] = add_blocks<0x88, 0xDD>(v[i], v[i + 8]);               // i, i+4, i+8, i+12
    v[0] = add_pairs<0x44, 0xEE>(v[0], v[1]);
    v[2] = add_pairs<0x44, 0xEE>(v[2], v[3]);
    return add_pairs<0x88, 0xDD>(v[0], v[2]);
  }
};

}}}  // namespace qkv::QKV_ABI::isa

#include "../../base/warnings_on.hpp"

#endif

// simd/isa/avx512_narrow.hpp — AVX-512 with BW, VNNI and BF16: products of bfloat16, int8 and int16.
//
//     bfloat16   c += a₀b₀ + a₁b₁                            vdpbf16ps: products and sums in float
//     int8       c += Σ₄ aᵢ·bᵢ,   a signed, b unsigned        vpdpbusd: exact in 32 bits
//     int16      c += a₀b₀ + a₁b₁                            vpdpwssd
//
// Before: simd/isa/avx512.hpp   Next: simd/isa/neon.hpp
#pragma once

#include "avx512.hpp"

#if defined(EIGEN_VECTORIZE_AVX512) && defined(__AVX512BF16__) && defined(__AVX512VNNI__) && defined(__AVX512BW__)

#include <immintrin.h>

#include "../../base/warnings_off.hpp"

namespace qkv { inline namespace QKV_ABI { namespace isa {

struct Avx512Narrow : Avx512 {
  static constexpr bool bf16_products = true, int8_products = true, int16_products = true;

  static EIGEN_ALWAYS_INLINE Float add_bf16_products(Float sum, Words a, Words b) {
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(b), reinterpret_cast<__m512bh>(a));
  }
  static EIGEN_ALWAYS_INLINE Sums add_int8_products(Sums sum, Words a, Words b) {
    return (Sums)_mm512_dpbusd_epi32((__m512i)sum, b, a);
  }
  static EIGEN_ALWAYS_INLINE Sums add_int16_products(Sums sum, Words a, Words b) {
    return (Sums)_mm512_dpwssd_epi32((__m512i)sum, a, b);
  }

  // ---- of all of these ----
  static EIGEN_ALWAYS_INLINE Words load_words(const void* p) { return _mm512_loadu_si512(p); }
  static EIGEN_ALWAYS_INLINE Words load_words_n(const void* p, Index n) {
    if (n >= 64) return _mm512_loadu_si512(p);
    return _mm512_maskz_loadu_epi8(n <= 0 ? 0 : (~__mmask64{0} >> (64 - n)), p);
  }
  static EIGEN_ALWAYS_INLINE void store_words(void* p, Words v) { _mm512_storeu_si512(p, v); }
  static EIGEN_ALWAYS_INLINE Words broadcast_word(Word x) { return _mm512_set1_epi32(static_cast<int>(x)); }
  static EIGEN_ALWAYS_INLINE Float as_float(Words v) { return _mm512_castsi512_ps(v); }
  static EIGEN_ALWAYS_INLINE Words as_words(Float v) { return _mm512_castps_si512(v); }
  static EIGEN_ALWAYS_INLINE Sums as_sums(Words v) { return (Sums)v; }
  static EIGEN_ALWAYS_INLINE Words words_of(Sums v) { return (Words)v; }
  static EIGEN_ALWAYS_INLINE Words round_to_int32(Float v) { return _mm512_cvtps_epi32(v); }
  static EIGEN_ALWAYS_INLINE Float int32_to_float(Words v) { return _mm512_cvtepi32_ps(v); }
  static EIGEN_ALWAYS_INLINE Float sums_to_float(Sums v) { return _mm512_cvtepi32_ps((__m512i)v); }

  // ---- of int16 and int8 ----
  static EIGEN_ALWAYS_INLINE Sums load_sums(const std::int32_t* p) { return (Sums)_mm512_loadu_si512(p); }
  static EIGEN_ALWAYS_INLINE void store_sums(std::int32_t* p, Sums v) { _mm512_storeu_si512(p, (__m512i)v); }
  static EIGEN_ALWAYS_INLINE Sums broadcast_sum(std::int32_t x) { return (Sums)_mm512_set1_epi32(x); }
  static EIGEN_ALWAYS_INLINE Sums subtract(Sums a, Sums b) { return (Sums)_mm512_sub_epi32((__m512i)a, (__m512i)b); }
  static EIGEN_ALWAYS_INLINE Bytes load_int8(const std::int8_t* p) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  }
  static EIGEN_ALWAYS_INLINE Bytes load_int8_n(const std::int8_t* p, Index n) {
    if (n <= 0) return _mm_setzero_si128();
    if (n >= 16) return load_int8(p);
    return _mm_maskz_loadu_epi8(first_lanes(n), p);
  }

  // ---- decode's sums of rows ----
  static EIGEN_ALWAYS_INLINE Words unpack_low_int16(Words a, Words b) { return _mm512_unpacklo_epi16(a, b); }
  static EIGEN_ALWAYS_INLINE Words unpack_high_int16(Words a, Words b) { return _mm512_unpackhi_epi16(a, b); }
  static EIGEN_ALWAYS_INLINE Words low_int8(Words v) { return high_int8(_mm512_slli_epi16(v, 8)); }
  static EIGEN_ALWAYS_INLINE Words high_int8(Words v) { return _mm512_srai_epi16(v, 8); }
  // x = (x₀ x₁ x₂ x₃) of 128 bits each; wanted: (a₀ b₀ c₀ d₀), (a₁ b₁ c₁ d₁), …
  static EIGEN_ALWAYS_INLINE void order_unpacked(Words (&v)[4]) {
    const Words a = _mm512_unpacklo_epi32(v[0], v[1]), b = _mm512_unpackhi_epi32(v[0], v[1]);
    const Words c = _mm512_unpacklo_epi32(v[2], v[3]), d = _mm512_unpackhi_epi32(v[2], v[3]);
    const Words ab = _mm512_shuffle_i32x4(a, b, 0x44), ab2 = _mm512_shuffle_i32x4(a, b, 0xEE);
    const Words cd = _mm512_shuffle_i32x4(c, d, 0x44), cd2 = _mm512_shuffle_i32x4(c, d, 0xEE);
    v[0] = _mm512_shuffle_i32x4(ab, cd, 0x88), v[1] = _mm512_shuffle_i32x4(ab, cd, 0xDD);
    v[2] = _mm512_shuffle_i32x4(ab2, cd2, 0x88), v[3] = _mm512_shuffle_i32x4(ab2, cd2, 0xDD);
  }
  static EIGEN_ALWAYS_INLINE void store_int16(std::int16_t* to, Float a, Float b) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32(a)));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 16), _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32(b)));
  }
  static EIGEN_ALWAYS_INLINE Float positive(Float x) { return _mm512_max_ps(_mm512_setzero_ps(), x); }

  // ---- int8 ----
  template <Index Parts>
  static EIGEN_ALWAYS_INLINE Sums broadcast_first(std::int32_t x) {
    return (Sums)_mm512_maskz_set1_epi32(Parts == 1 ? 0xFFFF : Parts == 2 ? 0x5555 : 0x1111, x);
  }
  static EIGEN_ALWAYS_INLINE Words plus_128(Words v) { return _mm512_xor_si512(v, _mm512_set1_epi8(-128)); }
  static EIGEN_ALWAYS_INLINE Words round_plus_128(Float a, Float b, Float c, Float d) {
    alignas(64) std::uint8_t bytes[64];
    const auto put = [&](Index part, Float x) {
      const __m512i whole = _mm512_add_epi32(_mm512_cvtps_epi32(x), _mm512_set1_epi32(128));
      _mm_store_si128(reinterpret_cast<__m128i*>(bytes) + part, _mm512_cvtusepi32_epi8(whole));
    };
    put(0, a), put(1, b), put(2, c), put(3, d);
    return _mm512_load_si512(bytes);
  }
  static EIGEN_ALWAYS_INLINE Words to_uint8(Words a, Words b, Words c, Words d) {
    const __m512i order = _mm512_set4_epi32(0x0F0B0703, 0x0E0A0602, 0x0D090501, 0x0C080400);
    return _mm512_shuffle_epi8(_mm512_packus_epi16(_mm512_packs_epi32(a, b), _mm512_packs_epi32(c, d)), order);
  }
  static EIGEN_ALWAYS_INLINE Words quad_int8(Bytes a, Bytes b, Bytes c, Bytes d) {
    const __m128i ab = _mm_unpacklo_epi8(a, b), ab_high = _mm_unpackhi_epi8(a, b);
    const __m128i cd = _mm_unpacklo_epi8(c, d), cd_high = _mm_unpackhi_epi8(c, d);
    const __m512i one = _mm512_castsi128_si512(_mm_unpacklo_epi16(ab, cd));
    const __m512i two = _mm512_inserti32x4(one, _mm_unpackhi_epi16(ab, cd), 1);
    const __m512i three = _mm512_inserti32x4(two, _mm_unpacklo_epi16(ab_high, cd_high), 2);
    return _mm512_inserti32x4(three, _mm_unpackhi_epi16(ab_high, cd_high), 3);
  }

  // ---- bfloat16 ----
  static EIGEN_ALWAYS_INLINE Words pair_bf16(Float low, Float high) {
    const __m512i interleave = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22,
                                                6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return _mm512_permutexvar_epi16(interleave, round_to_bf16(low, high));
  }
  static EIGEN_ALWAYS_INLINE Words round_to_bf16(Float a, Float b) {
    return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(b, a));
  }
  static EIGEN_ALWAYS_INLINE Words round_to_finite_bf16(Float a, Float b) {
    const auto within = [](__m512 v) {
      const __m512i bits = _mm512_castps_si512(v), half_step = _mm512_set1_epi32(0x8000);
      const __m512i past =
          _mm512_sub_epi32(_mm512_and_si512(bits, _mm512_set1_epi32(0x7FFFFFFF)),
                           _mm512_set1_epi32(0x7F7F8000));  // [0, half_step) where it would be infinite
      return _mm512_castsi512_ps(
          _mm512_mask_sub_epi32(bits, _mm512_cmplt_epu32_mask(past, half_step), bits, half_step));
    };
    return round_to_bf16(within(a), within(b));
  }
  static EIGEN_ALWAYS_INLINE void interleave_bf16(Words a, Words b, Words& low, Words& high) {
    const __m512i of_low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6,
                                            37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    const __m512i of_high = _mm512_set_epi16(63, 31, 62, 30, 61, 29, 60, 28, 59, 27, 58, 26, 57, 25, 56, 24, 55, 23, 54,
                                             22, 53, 21, 52, 20, 51, 19, 50, 18, 49, 17, 48, 16);
    low = _mm512_permutex2var_epi16(a, of_low, b), high = _mm512_permutex2var_epi16(a, of_high, b);
  }
};

}}}  // namespace qkv::QKV_ABI::isa

#include "../../base/warnings_on.hpp"

#endif

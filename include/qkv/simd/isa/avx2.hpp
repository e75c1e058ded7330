// simd/isa/avx2.hpp — AVX2: storage types to float in the register, sums of many rows at once, and products of int16.
//
// Before: simd/isa/sse2.hpp   Next: simd/isa/avx_vnni.hpp
#pragma once

#include <cstring>

#include "sse2.hpp"

#if defined(EIGEN_VECTORIZE_AVX2)

#include <immintrin.h>

#include "../../base/warnings_off.hpp"

namespace qkv { inline namespace QKV_ABI { namespace isa {

struct Avx2 : General<__m256, __m256i, __m256i, __m128i> {
#if defined(__GNUC__)
  using General::hold;
  static EIGEN_ALWAYS_INLINE void hold(__m256& v) { asm("" : "+x"(v)); }
  static EIGEN_ALWAYS_INLINE void hold(__m256d& v) { asm("" : "+x"(v)); }
  static EIGEN_ALWAYS_INLINE void hold(__m256i& v) { asm("" : "+x"(v)); }
#endif
  using General::low_bits_to_exponent;
  static EIGEN_ALWAYS_INLINE __m256d low_bits_to_exponent(__m256d biased) {
    return _mm256_castsi256_pd(_mm256_slli_epi64(_mm256_castpd_si256(biased), 52));
  }

  // ---- sums of lanes ----
  using General::sum_each;
  static EIGEN_ALWAYS_INLINE __m256 sum_each(__m256 (&rows)[8]) { return sum_each_8(rows); }
  static EIGEN_ALWAYS_INLINE __m256i sum_each(__m256i (&rows)[8]) { return sum_each_8(rows); }

  static constexpr bool repeats = true;
  template <Index Parts>
  static EIGEN_ALWAYS_INLINE __m256 repeat(const void* p) {
    if constexpr (Parts == 2) {
      double two;
      std::memcpy(&two, p, sizeof two);
      return _mm256_castpd_ps(_mm256_set1_pd(two));
    } else {
      const __m128 v = _mm_loadu_ps(static_cast<const float*>(p));
      return _mm256_set_m128(v, v);
    }
  }
  template <Index Parts>
  static EIGEN_ALWAYS_INLINE void store_part_sums(float* to, __m256 v) {
    const __m256 two = _mm256_add_ps(v, _mm256_permute_ps(v, 0xB1));
    if constexpr (Parts == 2) {
      _mm_storeu_ps(to, _mm_shuffle_ps(_mm256_castps256_ps128(two), _mm256_extractf128_ps(two, 1), 0x88));
    } else {
      const __m256 four = _mm256_add_ps(two, _mm256_permute_ps(two, 0x4E));
      const __m128 both = _mm_unpacklo_ps(_mm256_castps256_ps128(four), _mm256_extractf128_ps(four, 1));
      std::memcpy(to, &both, 2 * sizeof(float));
    }
  }

  // ---- storage types ----
  using General::widen;
#if defined(__F16C__)
  static EIGEN_ALWAYS_INLINE void widen(const Eigen::half* p, __m256& v) {
    v = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
#endif
  static EIGEN_ALWAYS_INLINE void widen(const Eigen::bfloat16* p, __m256& v) {
    const __m256i bits = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    v = _mm256_castsi256_ps(_mm256_slli_epi32(bits, 16));
  }
  static EIGEN_ALWAYS_INLINE void widen(const std::int8_t* p, __m256& v) {
    v = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
  }
  static constexpr bool splits_bf16 = true;
  static EIGEN_ALWAYS_INLINE Float even_bf16(const bfloat16* p) {
    return as_float(_mm256_slli_epi32(load_words(p), 16));
  }
  static EIGEN_ALWAYS_INLINE Float odd_bf16(const bfloat16* p) {
    return as_float(_mm256_and_si256(load_words(p), _mm256_set1_epi32(static_cast<int>(0xFFFF0000))));
  }

  // ---- products of int16 ----
  static constexpr bool int16_products = true;
  /// g++ otherwise adds up products of several steps first, for which there are no registers; held after that, it moves
  /// every sum.
  static EIGEN_ALWAYS_INLINE Sums add_int16_products(Sums sum, Words a, Words b) {
    const Words products = _mm256_madd_epi16(a, b);
#if defined(__GNUC__) && !defined(__clang__)
    asm("{vpaddd %1, %0, %0|vpaddd %0, %0, %1}" : "+x"(sum) : "x"(products));  // both syntaxes
    return sum;
#else
    return _mm256_add_epi32(sum, products);
#endif
  }
  static EIGEN_ALWAYS_INLINE Words load_words(const void* p) {
    return _mm256_loadu_si256(static_cast<const Words*>(p));
  }
  static EIGEN_ALWAYS_INLINE Words load_words_n(const void* p, Index n) {
    if (n >= 32) return load_words(p);
    char copy[32] = {};
    if (n > 0) std::memcpy(copy, p, static_cast<std::size_t>(n));
    return load_words(copy);
  }
  static EIGEN_ALWAYS_INLINE void store_words(void* p, Words v) { _mm256_storeu_si256(static_cast<Words*>(p), v); }
  static EIGEN_ALWAYS_INLINE Words broadcast_word(Word x) { return _mm256_set1_epi32(static_cast<int>(x)); }
  static EIGEN_ALWAYS_INLINE Float as_float(Words v) { return _mm256_castsi256_ps(v); }
  static EIGEN_ALWAYS_INLINE Words as_words(Float v) { return _mm256_castps_si256(v); }
  static EIGEN_ALWAYS_INLINE Sums as_sums(Words v) { return v; }
  static EIGEN_ALWAYS_INLINE Words words_of(Sums v) { return v; }
  static EIGEN_ALWAYS_INLINE Words round_to_int32(Float v) { return _mm256_cvtps_epi32(v); }
  static EIGEN_ALWAYS_INLINE Words truncate_to_int32(Float v) { return _mm256_cvttps_epi32(v); }
  static EIGEN_ALWAYS_INLINE Float int32_to_float(Words v) { return _mm256_cvtepi32_ps(v); }
  static EIGEN_ALWAYS_INLINE Float sums_to_float(Sums v) { return _mm256_cvtepi32_ps(v); }
  static EIGEN_ALWAYS_INLINE Sums load_sums(const std::int32_t* p) { return load_words(p); }
  static EIGEN_ALWAYS_INLINE void store_sums(std::int32_t* p, Sums v) { store_words(p, v); }
  static EIGEN_ALWAYS_INLINE Sums broadcast_sum(std::int32_t x) { return _mm256_set1_epi32(x); }
  static EIGEN_ALWAYS_INLINE Sums subtract(Sums a, Sums b) { return _mm256_sub_epi32(a, b); }
  static EIGEN_ALWAYS_INLINE Words widen_int8(const std::int8_t* p) {
    return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static EIGEN_ALWAYS_INLINE Words widen_int8_n(const std::int8_t* p, Index n) {
    return _mm256_cvtepi8_epi16(Sse2::load_words_n(p, n));
  }
  static EIGEN_ALWAYS_INLINE Words pack_int16(Words a, Words b) {
    return _mm256_permute4x64_epi64(_mm256_packs_epi32(a, b), 0xD8);
  }
  static EIGEN_ALWAYS_INLINE Words pair_int16(Words low, Words high) {
    return _mm256_or_si256(low, _mm256_slli_epi32(high, 16));
  }
  static EIGEN_ALWAYS_INLINE Bytes load_int8(const std::int8_t* p) {
    return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  }
  static EIGEN_ALWAYS_INLINE Bytes load_int8_n(const std::int8_t* p, Index n) {
    return n >= 8 ? load_int8(p) : Sse2::load_words_n(p, n);
  }
  static EIGEN_ALWAYS_INLINE Words pair_int8(Bytes a, Bytes b) { return _mm256_cvtepi8_epi16(_mm_unpacklo_epi8(a, b)); }
  static void interleave_rows(const std::int8_t* a, const std::int8_t* b, Index n, std::uint16_t* to) {
    Sse2::interleave_rows(a, b, n, to);
  }

  // ---- decode's sums of rows ----
  static EIGEN_ALWAYS_INLINE Words unpack_low_int16(Words a, Words b) { return _mm256_unpacklo_epi16(a, b); }
  static EIGEN_ALWAYS_INLINE Words unpack_high_int16(Words a, Words b) { return _mm256_unpackhi_epi16(a, b); }
  static EIGEN_ALWAYS_INLINE Words low_int8(Words v) { return high_int8(_mm256_slli_epi16(v, 8)); }
  static EIGEN_ALWAYS_INLINE Words high_int8(Words v) { return _mm256_srai_epi16(v, 8); }
  static EIGEN_ALWAYS_INLINE void order_unpacked(Words (&v)[4]) {
    const Words a = _mm256_unpacklo_epi32(v[0], v[1]), b = _mm256_unpackhi_epi32(v[0], v[1]);
    const Words c = _mm256_unpacklo_epi32(v[2], v[3]), d = _mm256_unpackhi_epi32(v[2], v[3]);
    v[0] = _mm256_permute2x128_si256(a, b, 0x20), v[1] = _mm256_permute2x128_si256(c, d, 0x20);
    v[2] = _mm256_permute2x128_si256(a, b, 0x31), v[3] = _mm256_permute2x128_si256(c, d, 0x31);
  }
  static EIGEN_ALWAYS_INLINE void store_int16(std::int16_t* to, Float a, Float b) {
    store_words(to, pack_int16(round_to_int32(a), round_to_int32(b)));
  }
  static EIGEN_ALWAYS_INLINE Float positive(Float x) { return _mm256_max_ps(_mm256_setzero_ps(), x); }

 private:
  static EIGEN_ALWAYS_INLINE __m256 add(__m256 a, __m256 b) { return _mm256_add_ps(a, b); }
  static EIGEN_ALWAYS_INLINE __m256i add(__m256i a, __m256i b) { return _mm256_add_epi32(a, b); }
  /// Picks the lanes that Low and High name from each block of four of a and b, and adds the two.
  template <int Low, int High, class P>
  static EIGEN_ALWAYS_INLINE P add_pairs(P a, P b) {
    return add((P)_mm256_shuffle_ps((__m256)a, (__m256)b, Low), (P)_mm256_shuffle_ps((__m256)a, (__m256)b, High));
  }
  /// For floats or 32-bit integers; in the order of the general form.
  template <class P>
  static EIGEN_ALWAYS_INLINE P sum_each_8(P (&v)[8]) {
    for (int i = 0; i < 4; ++i)  // blocks i, i+4 of (first a, second b) and (second a, first b)
      v[i] = add((P)_mm256_blend_ps((__m256)v[i], (__m256)v[i + 4], 0xF0),
                 (P)_mm256_permute2f128_ps((__m256)v[i], (__m256)v[i + 4], 0x21));
    v[0] = add_pairs<0x44, 0xEE>(v[0], v[1]);
    v[2] = add_pairs<0x44, 0xEE>(v[2], v[3]);
    return add_pairs<0x88, 0xDD>(v[0], v[2]);
  }
};

}}}  // namespace qkv::QKV_ABI::isa

#include "../../base/warnings_on.hpp"

#endif

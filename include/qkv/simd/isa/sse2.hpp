// simd/isa/sse2.hpp — SSE2: storage types to float in the register, and products of int16.
//
// Before: simd/isa/general.hpp   Next: simd/isa/avx2.hpp
#pragma once

#include <cstring>

#include "general.hpp"

#if defined(EIGEN_VECTORIZE_SSE2)

#include <immintrin.h>

#include "../../base/warnings_off.hpp"

namespace qkv { inline namespace QKV_ABI { namespace isa {

struct Sse2 : General<__m128, __m128i, __m128i, __m128i> {
  static constexpr const char* warning =
      "; WARNING: built for plain SSE2, compile with -march=native (or -march=x86-64-v3)";

#if defined(__GNUC__)
  using General::hold;
  static EIGEN_ALWAYS_INLINE void hold(__m128& v) { asm("" : "+x"(v)); }
  static EIGEN_ALWAYS_INLINE void hold(__m128d& v) { asm("" : "+x"(v)); }
  static EIGEN_ALWAYS_INLINE void hold(__m128i& v) { asm("" : "+x"(v)); }
#endif
  using General::low_bits_to_exponent;
  static EIGEN_ALWAYS_INLINE __m128d low_bits_to_exponent(__m128d biased) {
    return _mm_castsi128_pd(_mm_slli_epi64(_mm_castpd_si128(biased), 52));
  }

  // ---- storage types ----
  using General::widen;
  // Exponent and mantissa move to their places in a float; 2¹¹² corrects the exponent's bias, subnormal halves included.
  // What comes out at 2¹⁶ or more was inf or NaN.
  static EIGEN_ALWAYS_INLINE void widen(const Eigen::half* p, __m128& v) {
    const __m128i wide = _mm_unpacklo_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)), _mm_setzero_si128());
    const __m128i sign = _mm_slli_epi32(_mm_and_si128(wide, _mm_set1_epi32(0x8000)), 16);
    const __m128i magnitude = _mm_slli_epi32(_mm_and_si128(wide, _mm_set1_epi32(0x7FFF)), 13);
    const __m128 number = _mm_mul_ps(_mm_castsi128_ps(magnitude), _mm_set1_ps(0x1p112F));
    const __m128 special =
        _mm_and_ps(_mm_cmpnlt_ps(number, _mm_set1_ps(65536.0F)), _mm_castsi128_ps(_mm_set1_epi32(0x7F800000)));
    v = _mm_or_ps(_mm_or_ps(number, special), _mm_castsi128_ps(sign));
  }
  static EIGEN_ALWAYS_INLINE void widen(const Eigen::bfloat16* p, __m128& v) {
    v = _mm_castsi128_ps(_mm_unpacklo_epi16(_mm_setzero_si128(), _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
  }
  static EIGEN_ALWAYS_INLINE void widen(const std::int8_t* p, __m128& v) {
    const __m128i bytes = load_int8(p);
    const __m128i top = _mm_unpacklo_epi16(_mm_setzero_si128(), _mm_unpacklo_epi8(_mm_setzero_si128(), bytes));
    v = _mm_cvtepi32_ps(_mm_srai_epi32(top, 24));
  }

  // ---- products of int16 ----
  static constexpr bool int16_products = true;
  static EIGEN_ALWAYS_INLINE Sums add_int16_products(Sums sum, Words a, Words b) {
    return _mm_add_epi32(sum, _mm_madd_epi16(a, b));
  }
  static EIGEN_ALWAYS_INLINE Words load_words(const void* p) { return _mm_loadu_si128(static_cast<const Words*>(p)); }
  static EIGEN_ALWAYS_INLINE Words load_words_n(const void* p, Index n) {
    if (n >= 16) return load_words(p);
    char copy[16] = {};
    if (n > 0) std::memcpy(copy, p, static_cast<std::size_t>(n));
    return load_words(copy);
  }
  static EIGEN_ALWAYS_INLINE void store_words(void* p, Words v) { _mm_storeu_si128(static_cast<Words*>(p), v); }
  static EIGEN_ALWAYS_INLINE Words broadcast_word(Word x) { return _mm_set1_epi32(static_cast<int>(x)); }
  static EIGEN_ALWAYS_INLINE Float as_float(Words v) { return _mm_castsi128_ps(v); }
  static EIGEN_ALWAYS_INLINE Words as_words(Float v) { return _mm_castps_si128(v); }
  static EIGEN_ALWAYS_INLINE Sums as_sums(Words v) { return v; }
  static EIGEN_ALWAYS_INLINE Words words_of(Sums v) { return v; }
  static EIGEN_ALWAYS_INLINE Words round_to_int32(Float v) { return _mm_cvtps_epi32(v); }
  static EIGEN_ALWAYS_INLINE Words truncate_to_int32(Float v) { return _mm_cvttps_epi32(v); }
  static EIGEN_ALWAYS_INLINE Float int32_to_float(Words v) { return _mm_cvtepi32_ps(v); }
  static EIGEN_ALWAYS_INLINE Float sums_to_float(Sums v) { return _mm_cvtepi32_ps(v); }
  static EIGEN_ALWAYS_INLINE Sums load_sums(const std::int32_t* p) { return load_words(p); }
  static EIGEN_ALWAYS_INLINE void store_sums(std::int32_t* p, Sums v) { store_words(p, v); }
  static EIGEN_ALWAYS_INLINE Sums broadcast_sum(std::int32_t x) { return _mm_set1_epi32(x); }
  static EIGEN_ALWAYS_INLINE Sums subtract(Sums a, Sums b) { return _mm_sub_epi32(a, b); }
  using General::sum_each;
  static EIGEN_ALWAYS_INLINE Sums sum_each(Sums (&rows)[4]) {
    const Sums a = _mm_add_epi32(_mm_unpacklo_epi32(rows[0], rows[1]), _mm_unpackhi_epi32(rows[0], rows[1]));
    const Sums b = _mm_add_epi32(_mm_unpacklo_epi32(rows[2], rows[3]), _mm_unpackhi_epi32(rows[2], rows[3]));
    return _mm_add_epi32(_mm_unpacklo_epi64(a, b), _mm_unpackhi_epi64(a, b));
  }
  static EIGEN_ALWAYS_INLINE Words widen_low_int8(__m128i v) { return _mm_srai_epi16(_mm_unpacklo_epi8(v, v), 8); }
  static EIGEN_ALWAYS_INLINE Words widen_int8(const std::int8_t* p) {
    return widen_low_int8(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  }
  static EIGEN_ALWAYS_INLINE Words widen_int8_n(const std::int8_t* p, Index n) {
    return n >= 8 ? widen_int8(p) : widen_low_int8(load_words_n(p, n));
  }
  static EIGEN_ALWAYS_INLINE Words pack_int16(Words a, Words b) { return _mm_packs_epi32(a, b); }
  static EIGEN_ALWAYS_INLINE Words pair_int16(Words low, Words high) {
    return _mm_or_si128(low, _mm_slli_epi32(high, 16));
  }
  static EIGEN_ALWAYS_INLINE Bytes load_int8(const std::int8_t* p) {
    std::int32_t four = 0;
    std::memcpy(&four, p, sizeof four);
    return _mm_cvtsi32_si128(four);
  }
  static EIGEN_ALWAYS_INLINE Bytes load_int8_n(const std::int8_t* p, Index n) {
    return n >= 4 ? load_int8(p) : load_words_n(p, n);
  }
  static EIGEN_ALWAYS_INLINE Words pair_int8(Bytes a, Bytes b) { return widen_low_int8(_mm_unpacklo_epi8(a, b)); }
  static void interleave_rows(const std::int8_t* a, const std::int8_t* b, Index n, std::uint16_t* to) {
    for (Index x = 0; x < n; x += 16) {
      const __m128i first = load_words(a + x), second = load_words(b + x);
      store_words(to + x, _mm_unpacklo_epi8(first, second));
      store_words(to + x + 8, _mm_unpackhi_epi8(first, second));
    }
  }

  // ---- decode's sums of rows ----
  static EIGEN_ALWAYS_INLINE Words unpack_low_int16(Words a, Words b) { return _mm_unpacklo_epi16(a, b); }
  static EIGEN_ALWAYS_INLINE Words unpack_high_int16(Words a, Words b) { return _mm_unpackhi_epi16(a, b); }
  static EIGEN_ALWAYS_INLINE Words low_int8(Words v) { return high_int8(_mm_slli_epi16(v, 8)); }
  static EIGEN_ALWAYS_INLINE Words high_int8(Words v) { return _mm_srai_epi16(v, 8); }
  static EIGEN_ALWAYS_INLINE void order_unpacked(Words (&v)[4]) {
    const Words low = v[0], high = v[2];
    v[0] = _mm_unpacklo_epi32(low, v[1]), v[1] = _mm_unpackhi_epi32(low, v[1]);
    v[2] = _mm_unpacklo_epi32(high, v[3]), v[3] = _mm_unpackhi_epi32(high, v[3]);
  }
  static EIGEN_ALWAYS_INLINE void store_int16(std::int16_t* to, Float a, Float b) {
    store_words(to, pack_int16(round_to_int32(a), round_to_int32(b)));
  }
  static EIGEN_ALWAYS_INLINE Float positive(Float x) { return _mm_max_ps(_mm_setzero_ps(), x); }
};

}}}  // namespace qkv::QKV_ABI::isa

#include "../../base/warnings_on.hpp"

#endif

// simd/isa/avx_vnni.hpp — AVX2 with AVX-VNNI: products of int8 on processors without AVX-512.
//
//     c += Σ₄ aᵢ·bᵢ        vpdpbusd: 32 multiply-adds in one instruction; vpmaddwd and vpaddd of int16 do 16 in two
//
// QKV_TEST_EMULATED_VNNI puts AVX2 instructions of equal result in the place of that one, for tests on other machines.
//
// Before: simd/isa/avx2.hpp   Next: simd/isa/avx512.hpp
#pragma once

#include "avx2.hpp"

#if defined(EIGEN_VECTORIZE_AVX2) && (defined(__AVXVNNI__) || defined(QKV_TEST_EMULATED_VNNI))

#include <immintrin.h>

#include "../../base/warnings_off.hpp"

namespace qkv { inline namespace QKV_ABI { namespace isa {

struct AvxVnni : Avx2 {
  static constexpr bool int8_products = true;

  static EIGEN_ALWAYS_INLINE Sums add_int8_products(Sums sum, Words a, Words b) {
#ifdef QKV_TEST_EMULATED_VNNI
    const Words even = _mm256_and_si256(b, _mm256_set1_epi16(255)), odd = _mm256_srli_epi16(b, 8);
    return _mm256_add_epi32(
        sum, _mm256_add_epi32(_mm256_madd_epi16(low_int8(a), even), _mm256_madd_epi16(high_int8(a), odd)));
#elif defined(__GNUC__) && !defined(__clang__)
    // g++ takes a __m256i for four numbers of 64 bits, and moves every sum to memory and back to see it as eight.
    asm("{%{vex%} vpdpbusd %2, %1, %0|%{vex%} vpdpbusd %0, %1, %2}" : "+x"(sum) : "x"(b), "xm"(a));  // both syntaxes
    return sum;
#else
    return _mm256_dpbusd_avx_epi32(sum, b, a);
#endif
  }
  template <Index Parts>
  static EIGEN_ALWAYS_INLINE Sums broadcast_first(std::int32_t x) {
    if constexpr (Parts == 1) return _mm256_set1_epi32(x);
    if constexpr (Parts == 2) return _mm256_set_epi32(0, x, 0, x, 0, x, 0, x);
    return _mm256_set_epi32(0, 0, 0, x, 0, 0, 0, x);
  }
  static EIGEN_ALWAYS_INLINE Words plus_128(Words v) { return _mm256_xor_si256(v, _mm256_set1_epi8(-128)); }
  static EIGEN_ALWAYS_INLINE Words round_plus_128(Float a, Float b, Float c, Float d) {
    const auto whole = [](Float x) { return _mm256_add_epi32(_mm256_cvtps_epi32(x), _mm256_set1_epi32(128)); };
    const Words bytes =
        _mm256_packus_epi16(_mm256_packs_epi32(whole(a), whole(b)), _mm256_packs_epi32(whole(c), whole(d)));
    return _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
  }
  static EIGEN_ALWAYS_INLINE Words to_uint8(Words a, Words b, Words c, Words d) {
    const Words order = _mm256_setr_epi32(0x0C080400, 0x0D090501, 0x0E0A0602, 0x0F0B0703, 0x0C080400, 0x0D090501,
                                          0x0E0A0602, 0x0F0B0703);
    return _mm256_shuffle_epi8(_mm256_packus_epi16(_mm256_packs_epi32(a, b), _mm256_packs_epi32(c, d)), order);
  }
  static EIGEN_ALWAYS_INLINE Words quad_int8(Bytes a, Bytes b, Bytes c, Bytes d) {
    const __m128i ab = _mm_unpacklo_epi8(a, b), cd = _mm_unpacklo_epi8(c, d);
    return _mm256_set_m128i(_mm_unpackhi_epi16(ab, cd), _mm_unpacklo_epi16(ab, cd));
  }
};

}}}  // namespace qkv::QKV_ABI::isa

#include "../../base/warnings_on.hpp"

#endif

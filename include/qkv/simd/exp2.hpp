// simd/exp2.hpp — 2ˣ of a register of numbers, and of what a softmax asks for.
//
//     2ˣ = 2ⁿ · 2ʳ      n = round(x), |r| <= ½;   2ʳ by a polynomial
//
// x + 1.5·2²³ (double: 1.5·2⁵²) is n in the low bits of a mantissa: with the bias of the exponent they are moved up, and are 2ⁿ.
//
//     exp2(x)              any x.  degree 6 (float), 11 (double); 0.9 ulp with FMA, 1.1 without. exp2(-inf) = +0,
//                          exp2(0) = 1 and exp2(NaN) = NaN exactly. Below the smallest normal number the result may be +0;
//                          from x = 127.5 (double: 1023.5) on it may be +inf.
//     weight(d, c)         2^(d·c) for d <= 0, in fewer steps. AVX-512, float: n in steps of 1/32 with a table, degree 2, d·c
//                          not rounded; 1.5 ulp. Elsewhere with FMA, float: degree 6 in pairs of terms, d·c not rounded;
//                          1.2 ulp. Else exp2 of the rounded product.
//     weight_short(d, c)   float only, for weights that are rounded to 15 bits or less anyway: the same two ways, to degree 1
//                          after the table (6e-5), or to 5 (1.8e-7; where d·c is rounded, that shows as well).
//
// A weight of d = 0 is 1, of d = -inf +0, and NaN stays NaN, exactly. Degree 6 instead of 5 costs int8 with AVX2 1 to 2 % of a
// prompt.
//
// Before: simd/simd.hpp   Next: simd/eigen_packets.hpp
#pragma once

#include <concepts>
#include <cstddef>
#include <cstdint>
#include <iterator>
#include <utility>

#include "eigen_packets.hpp"

#include "../base/warnings_off.hpp"

namespace qkv { inline namespace QKV_ABI { namespace detail {

template <class P>
using NumberOf = typename packets::unpacket_traits<P>::type;

// 2ˣ for r = x - round(x): coefficients of r^degree … r¹, minimax relative to 2ʳ on [-½, ½] (errors 3.6e-9, 5.7e-18).
template <class T>
inline constexpr double exp2_coefficients[] = {0x1.3fa206p-13, 0x1.5f0b82p-10, 0x1.3b30ap-7,
                                               0x1.c6af76p-5,  0x1.ebfbd8p-3,  0x1.62e43p-1};
template <>
inline constexpr double exp2_coefficients<double>[] = {
    0x1.e9731780488cp-32,  0x1.e61d4332035bap-28, 0x1.b52522bc20bcdp-24, 0x1.62bfc6596be6ap-20,
    0x1.ffcbfc6685ee5p-17, 0x1.4309130f6cbdbp-13, 0x1.5d87fe789e96fp-10, 0x1.3b2ab6fb9fda6p-7,
    0x1.c6b08d704a12cp-5,  0x1.ebfbdff82c5a6p-3,  0x1.62e42fefa39efp-1};

// The same to r⁵: error 9.1e-8.
inline constexpr double short_exp2_coefficients[] = {0x1.5bba18p-10, 0x1.3cea8ap-7, 0x1.c6b752p-5, 0x1.ebf9bcp-3,
                                                     0x1.62e42ap-1};

// 1 + … + c₀·rⁿ, one operation after another.
template <class P, std::size_t N, std::size_t... I>
EIGEN_ALWAYS_INLINE P horner(P r, const double (&c)[N], std::index_sequence<I...>) {
  P y = packets::pset1<P>(static_cast<NumberOf<P>>(c[0]));
  ((y = packets::pmadd(y, r, packets::pset1<P>(static_cast<NumberOf<P>>(c[I + 1])))), ...);
  return packets::pmadd(y, r, packets::pset1<P>(NumberOf<P>(1)));
}
template <class P, std::size_t N>
EIGEN_ALWAYS_INLINE P horner(P r, const double (&c)[N]) {
  return horner(r, c, std::make_index_sequence<N - 1>{});
}
template <class P>
EIGEN_ALWAYS_INLINE P two_to_the(P r) {
  return horner(r, exp2_coefficients<NumberOf<P>>);
}
// The same of float in pairs of terms: four operations one after another, not six, for one more in all.
template <class P>
EIGEN_ALWAYS_INLINE P two_to_the_in_pairs(P r) {
  constexpr auto& c = exp2_coefficients<float>;
  const auto number = [](double x) { return packets::pset1<P>(static_cast<float>(x)); };
  const P r2 = packets::pmul(r, r);
  const P a = packets::pmadd(number(c[5]), r, number(1));
  const P b = packets::pmadd(number(c[3]), r, number(c[4]));
  const P d = packets::pmadd(packets::pmadd(number(c[0]), r, number(c[1])), r, number(c[2]));
  return packets::pmadd(packets::pmadd(d, r2, b), r2, a);
}

// The low bits of a lane moved up into the exponent: from 1.5·2²³ + 127 + n (double: 1.5·2⁵² + 1023 + n) to 2ⁿ.
template <class P>
EIGEN_ALWAYS_INLINE P low_bits_to_exponent(P biased) {
  if constexpr (std::same_as<typename packets::unpacket_traits<P>::type, float>) {
    using Integers = typename packets::unpacket_traits<P>::integer_packet;
    return packets::preinterpret<P>(packets::plogical_shift_left<23>(packets::preinterpret<Integers>(biased)));
  } else {  // an instruction set without an overload
    const P n = packets::psub(biased, packets::pset1<P>(0x1.8p52 + 1023));
    return packets::pldexp(packets::pset1<P>(1.0), n);
  }
}

/// 2ˣ; see the head of this file.
template <class P>
EIGEN_ALWAYS_INLINE P exp2(P x) {
  using T = NumberOf<P>;
#if defined(EIGEN_VECTORIZE_AVX512) && defined(__AVX512DQ__)
  // reduce: x - round(x), 0 at ±inf. scalef: multiplies by 2ⁿ and knows every n.
  if constexpr (std::same_as<T, float>) {
    const P r = _mm512_reduce_ps(x, 0);
    return _mm512_scalef_ps(two_to_the(r), _mm512_sub_ps(x, r));
  } else {
    const P r = _mm512_reduce_pd(x, 0);
    return _mm512_scalef_pd(two_to_the(r), _mm512_sub_pd(x, r));
  }
#else
  const auto number = [](T t) { return packets::pset1<P>(t); };
  constexpr T magic = std::same_as<T, float> ? T(0x1.8p23) : T(0x1.8p52);  // adding it rounds to an integer
  constexpr T bias = std::same_as<T, float> ? T(127) : T(1023);
  const P clamped = packets::pmin(packets::pmax(x, number(-bias)), number(bias + 1));
  const P shifted = packets::padd(clamped, number(magic + bias)), n = packets::psub(shifted, number(magic + bias));
  const P y = packets::pmul(two_to_the(packets::psub(x, n)), low_bits_to_exponent(shifted));  // x: NaN stays NaN
  return select(less(x, number(1 - bias)), number(T(0)), y);
#endif
}

#if defined(EIGEN_VECTORIZE_AVX512)
// 2^(j/32) less j·2¹⁸, as bits: what the index adds to the mantissa when it is shifted up together with the exponent.
alignas(64) inline constexpr std::uint32_t table_powers[32] = {
    0x3F800000, 0x3F7ECD87, 0x3F7DAAC3, 0x3F7C980F, 0x3F7B95C2, 0x3F7AA43A, 0x3F79C3D3, 0x3F78F4F0,
    0x3F7837F0, 0x3F778D3A, 0x3F76F532, 0x3F767043, 0x3F75FED7, 0x3F75A15B, 0x3F75583F, 0x3F7523F6,
    0x3F7504F3, 0x3F74FBAF, 0x3F7508A4, 0x3F752C4D, 0x3F75672A, 0x3F75B9BE, 0x3F76248C, 0x3F76A81E,
    0x3F7744FD, 0x3F77FBB8, 0x3F78CCDF, 0x3F79B907, 0x3F7AC0C7, 0x3F7BE4BA, 0x3F7D257D, 0x3F7E83B3};
// 2ʳ - 1 for |r| <= 1/64: r·(p₁ + p₀·r), error 5.3e-8.
inline constexpr float weight_coefficients[] = {0.240226507F, 0.693157345F};

/// 2^(d·c) = step · 2^rest, d <= 0, |rest| <= 1/64; `normal` is false where the power is below 2⁻¹²⁶. Adds, integer
/// operations and permutations are not done by the units that multiply: fewer of those are busy.
struct TablePower {
  __m512 step, rest;
  __mmask16 normal;

  EIGEN_ALWAYS_INLINE TablePower(__m512 d, __m512 c) {
    const __m512 magic = _mm512_set1_ps(0x1.8p18F);  // adding it rounds to a multiple of 1/32, in the low bits
    const __m512 shifted = _mm512_fmadd_ps(d, c, magic);
    rest = _mm512_fmsub_ps(d, c, _mm512_sub_ps(shifted, magic));
    const __m512i bits = _mm512_castps_si512(shifted);
    const __m512i low = _mm512_load_si512(table_powers), high = _mm512_load_si512(table_powers + 16);
    step =
        _mm512_castsi512_ps(_mm512_add_epi32(_mm512_permutex2var_epi32(low, bits, high), _mm512_slli_epi32(bits, 18)));
    normal = _mm512_cmp_ps_mask(shifted, _mm512_set1_ps(0x1.8p18F - 126), _CMP_NLT_UQ);
  }
};
EIGEN_ALWAYS_INLINE __m512 weight(__m512 d, __m512 c) {
  const TablePower power(d, c);
  const __m512 slope = _mm512_set1_ps(weight_coefficients[0]), start = _mm512_set1_ps(weight_coefficients[1]);
  const __m512 y = _mm512_mul_ps(power.rest, _mm512_fmadd_ps(power.rest, slope, start));
  return _mm512_maskz_fmadd_ps(power.normal, power.step, y, power.step);
}
EIGEN_ALWAYS_INLINE __m512 weight_short(__m512 d, __m512 c) {
  const TablePower power(d, c);
  const __m512 slope = _mm512_mul_ps(power.step, _mm512_set1_ps(0.693147181F));
  return _mm512_maskz_fmadd_ps(power.normal, slope, power.rest, power.step);
}
#endif

/// 2^(d·c) = step · 2^rest, d <= 0, |rest| <= ½, of float; `tiny` where the power is below 2⁻¹²⁶·⁵.
template <class P>
struct RoundedPower {
  P step, rest, tiny;

  EIGEN_ALWAYS_INLINE RoundedPower(P d, P c) {
    const P middle = packets::pset1<P>(0x1.8p23F + 127), shifted = packets::pmadd(d, c, middle);
    rest = packets::pmadd(d, c, packets::psub(middle, shifted));
    step = low_bits_to_exponent(shifted);
    tiny = less(shifted, packets::pset1<P>(0x1.8p23F + 1));
  }
  /// y = 2^rest -> the power.
  EIGEN_ALWAYS_INLINE P times(P y) const { return select(tiny, packets::pset1<P>(0), packets::pmul(y, step)); }
};
template <class P>
EIGEN_ALWAYS_INLINE P weight(P d, P c) {
  if constexpr (std::same_as<NumberOf<P>, float> && fused) {
    const RoundedPower<P> power(d, c);
    return power.times(two_to_the_in_pairs(power.rest));
  } else {
    return exp2<P>(packets::pmul(d, c));
  }
}
template <class P>
EIGEN_ALWAYS_INLINE P weight_short(P d, P c) {
  const RoundedPower<P> power(d, c);
  return power.times(horner(power.rest, short_exp2_coefficients));
}

}}}  // namespace qkv::QKV_ABI::detail

#include "../base/warnings_on.hpp"

// simd/exp2.hpp — 2ˣ of a register of numbers, and the weights of a softmax.
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
// Before: simd/simd.hpp   Next: simd/narrow.hpp
#pragma once

#include <concepts>
#include <cstddef>
#include <cstdint>
#include <iterator>
#include <utility>

#include "isa.hpp"

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

using kernel::Isa;

/// 2ˣ; see the head of this file.
template <class P>
EIGEN_ALWAYS_INLINE P exp2(P x) {
  using T = NumberOf<P>;
  if constexpr (Isa::scales_by_powers) {
    const P r = Isa::fraction(x);
    return Isa::scale_by_power(two_to_the(r), packets::psub(x, r));
  } else {
    const auto number = [](T t) { return packets::pset1<P>(t); };
    constexpr T magic = std::same_as<T, float> ? T(0x1.8p23) : T(0x1.8p52);  // adding it rounds to an integer
    constexpr T bias = std::same_as<T, float> ? T(127) : T(1023);
    const P clamped = packets::pmin(packets::pmax(x, number(-bias)), number(bias + 1));
    const P shifted = packets::padd(clamped, number(magic + bias)), n = packets::psub(shifted, number(magic + bias));
    const P y = packets::pmul(two_to_the(packets::psub(x, n)), Isa::low_bits_to_exponent(shifted));  // x: NaN stays NaN
    return Isa::select(Isa::less(x, number(1 - bias)), number(T(0)), y);
  }
}

/// 2^(d·c) = step · 2^rest, d <= 0, |rest| <= ½, of float; `tiny` where the power is below 2⁻¹²⁶·⁵.
template <class P>
struct RoundedPower {
  P step, rest, tiny;

  EIGEN_ALWAYS_INLINE RoundedPower(P d, P c) {
    const P middle = packets::pset1<P>(0x1.8p23F + 127), shifted = packets::pmadd(d, c, middle);
    rest = packets::pmadd(d, c, packets::psub(middle, shifted));
    step = Isa::low_bits_to_exponent(shifted);
    tiny = Isa::less(shifted, packets::pset1<P>(0x1.8p23F + 1));
  }
  /// y = 2^rest -> the power.
  EIGEN_ALWAYS_INLINE P times(P y) const { return Isa::select(tiny, packets::pset1<P>(0), packets::pmul(y, step)); }
};
template <class P>
EIGEN_ALWAYS_INLINE P weight(P d, P c) {
  if constexpr (std::same_as<NumberOf<P>, float> && Isa::has_weights) {
    return Isa::weight(d, c);
  } else if constexpr (std::same_as<NumberOf<P>, float> && fused) {
    const RoundedPower<P> power(d, c);
    return power.times(two_to_the_in_pairs(power.rest));
  } else {
    return exp2<P>(packets::pmul(d, c));
  }
}
template <class P>
EIGEN_ALWAYS_INLINE P weight_short(P d, P c) {
  if constexpr (Isa::has_weights) {
    return Isa::weight_short(d, c);
  } else {
    const RoundedPower<P> power(d, c);
    return power.times(horner(power.rest, short_exp2_coefficients));
  }
}

}}}  // namespace qkv::QKV_ABI::detail

#include "../base/warnings_on.hpp"

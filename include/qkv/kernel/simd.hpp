// kernel/simd.hpp — a register of T and what kernels do with it; the one file that knows Eigen's packets.
//
//     Simd<T>::width lanes;  float: 4 (SSE2, NEON), 8 (AVX), 16 (AVX-512);  double: half of that;  otherwise 1
//
// The instruction set is the one Eigen was compiled for. long double, user types and EIGEN_DONT_VECTORIZE have one lane.
// Loads and stores need no alignment. Storage types are converted in the register, exactly, the same on every machine.
//
//     fma(a, b, c) = a·b + c      rounded once where `fused`, else (SSE2 without FMA) twice
//     max, min                    which operand comes out where one is NaN is left open
//     exp2(x) = 2ˣ                2ⁿ·2ʳ with n = round(x), r ∈ [-½, ½], 2ʳ by a polynomial of degree 6 (float) or 11
//                                 (double); 0.9 ulp with FMA, 1.1 without. exp2(-inf) = +0, exp2(0) = 1 and
//                                 exp2(NaN) = NaN exactly. Below the smallest normal number the result may be +0;
//                                 from x = 127.5 (double: 1023.5) on it may be +inf.
//     weight(d, c) = 2^(d·c)      for d <= 0: what a softmax needs, in fewer steps. AVX-512, float: n in steps of 1/32 with
//                                 a table, degree 2, d·c not rounded; 1.5 ulp. Elsewhere with FMA, float: degree 6 in pairs
//                                 of terms, d·c not rounded; 1.2 ulp. Else exp2 of the rounded product. weight(0, c) = 1,
//                                 weight(-inf, c) = +0 and NaN stays NaN, exactly.
//
// Before: workspace.hpp   Next: kernel/register_tile.hpp
#pragma once

#include <cmath>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <utility>

#include "../detail/intrinsics.hpp"
#include "../storage.hpp"

// g++ 12 takes the undefined starting values of AVX-512 intrinsics for bugs of their users, and minds registers as
// template arguments.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wignored-attributes"
#endif

namespace qkv::inline QKV_ABI::detail {

namespace packets = Eigen::internal;

template <class T>
inline constexpr bool has_packets = [] {
  using Traits = packets::packet_traits<T>;
  return (std::same_as<T, float> || std::same_as<T, double>)&&bool(Traits::Vectorizable) &&
         packets::unpacket_traits<typename Traits::type>::size > 1;
}();

// Eigen's packets; what they lack is overloaded in detail/intrinsics.hpp. Masks: a mask register on AVX-512, elsewhere
// lanes of all ones or all zeros.
template <class P>
EIGEN_ALWAYS_INLINE P less(const P& a, const P& b) {
  return packets::pcmp_lt(a, b);
}
template <class P>
EIGEN_ALWAYS_INLINE P less_equal(const P& a, const P& b) {
  return packets::pcmp_le(a, b);
}
template <class P>
EIGEN_ALWAYS_INLINE P both(const P& a, const P& b) {
  return packets::pand(a, b);
}
template <class P>
EIGEN_ALWAYS_INLINE bool any(const P& mask) {
  return packets::predux_any(mask);
}
template <class P>
EIGEN_ALWAYS_INLINE P select(const P& mask, const P& yes, const P& no) {
  return packets::pselect(mask, yes, no);
}

// One number after the other, from any storage type.
template <class S, class P>
EIGEN_ALWAYS_INLINE void widen(const S* p, P& v) {
  using T = typename packets::unpacket_traits<P>::type;
  T copy[packets::unpacket_traits<P>::size];
  for (T& x : copy) x = static_cast<T>(*p++);
  v = packets::ploadu<P>(copy);
}

// The first n lanes of memory, and no access past them.
template <class T, class P>
EIGEN_ALWAYS_INLINE void load_first(const T* p, Index n, P& v) {
  constexpr std::size_t lanes = packets::unpacket_traits<P>::size;
  T copy[lanes];
  for (std::size_t i = 0; i < lanes; ++i) copy[i] = static_cast<Index>(i) < n ? p[i] : T(0);
  v = packets::ploadu<P>(copy);
}
template <class T, class P>
EIGEN_ALWAYS_INLINE void store_first(T* p, const P& v, Index n) {
  if (n >= Index(packets::unpacket_traits<P>::size)) return packets::pstoreu(p, v);
  T copy[packets::unpacket_traits<P>::size];
  packets::pstoreu(copy, v);
  for (Index i = 0; i < n; ++i) p[i] = copy[i];
}

// In a register from here on: g++ otherwise reads memory again for every use of what was loaded.
template <class P>
EIGEN_ALWAYS_INLINE void hold(P&) {}

// Lane i: the sum of the lanes of row i.
template <class P, std::size_t Lanes>
EIGEN_ALWAYS_INLINE P sum_each(P (&rows)[Lanes]) {
  packets::PacketBlock<P, int(Lanes)> block;
  for (std::size_t i = 0; i < Lanes; ++i) block.packet[i] = rows[i];
  packets::ptranspose(block);
  for (std::size_t half = Lanes / 2; half > 0; half /= 2)
    for (std::size_t i = 0; i < half; ++i) block.packet[i] = packets::padd(block.packet[i], block.packet[i + half]);
  return block.packet[0];
}

// 2ˣ for r = x - round(x): coefficients of r^degree … r¹, minimax relative to 2ʳ on [-½, ½] (errors 3.6e-9, 5.7e-18).
template <class T>
inline constexpr double exp2_coefficients[] = {0x1.3fa206p-13, 0x1.5f0b82p-10, 0x1.3b30ap-7,
                                               0x1.c6af76p-5,  0x1.ebfbd8p-3,  0x1.62e43p-1};
template <>
inline constexpr double exp2_coefficients<double>[] = {
    0x1.e9731780488cp-32,  0x1.e61d4332035bap-28, 0x1.b52522bc20bcdp-24, 0x1.62bfc6596be6ap-20,
    0x1.ffcbfc6685ee5p-17, 0x1.4309130f6cbdbp-13, 0x1.5d87fe789e96fp-10, 0x1.3b2ab6fb9fda6p-7,
    0x1.c6b08d704a12cp-5,  0x1.ebfbdff82c5a6p-3,  0x1.62e42fefa39efp-1};

#if defined(EIGEN_VECTORIZE_AVX512)
// 2^(j/32) less j·2¹⁸, as bits: what the index adds to the mantissa when it is shifted up together with the exponent.
alignas(64) inline constexpr std::uint32_t table_powers[32] = {
    0x3F800000, 0x3F7ECD87, 0x3F7DAAC3, 0x3F7C980F, 0x3F7B95C2, 0x3F7AA43A, 0x3F79C3D3, 0x3F78F4F0,
    0x3F7837F0, 0x3F778D3A, 0x3F76F532, 0x3F767043, 0x3F75FED7, 0x3F75A15B, 0x3F75583F, 0x3F7523F6,
    0x3F7504F3, 0x3F74FBAF, 0x3F7508A4, 0x3F752C4D, 0x3F75672A, 0x3F75B9BE, 0x3F76248C, 0x3F76A81E,
    0x3F7744FD, 0x3F77FBB8, 0x3F78CCDF, 0x3F79B907, 0x3F7AC0C7, 0x3F7BE4BA, 0x3F7D257D, 0x3F7E83B3};
// 2ʳ - 1 for |r| <= 1/64: r·(p₁ + p₀·r), error 5.3e-8.
inline constexpr float weight_coefficients[] = {0.240226507F, 0.693157345F};

/// 2^(d·c) = step · 2^rest, |rest| <= 1/64; `normal` is false where the power is below 2⁻¹²⁶.
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
#endif

// The low bits of a lane moved up into the exponent: from 1.5·2²³ + 127 + n (double: 1.5·2⁵² + 1023 + n) to 2ⁿ.
template <class P>
EIGEN_ALWAYS_INLINE P low_bits_to_exponent(const P& biased) {
  if constexpr (std::same_as<typename packets::unpacket_traits<P>::type, float>) {
    using Integers = typename packets::unpacket_traits<P>::integer_packet;
    return packets::preinterpret<P>(packets::plogical_shift_left<23>(packets::preinterpret<Integers>(biased)));
  } else {  // an instruction set without an overload
    const P n = packets::psub(biased, packets::pset1<P>(0x1.8p52 + 1023));
    return packets::pldexp(packets::pset1<P>(1.0), n);
  }
}

}  // namespace qkv::inline QKV_ABI::detail

namespace qkv::inline QKV_ABI::kernel {

/// One lane: whatever T can do.
template <class T>
struct Simd {
  using Vec = T;
  using Mask = bool;
  static constexpr std::size_t lanes = 1;  // for array bounds
  static constexpr Index width = 1;
  static constexpr Index registers = 16;
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  static constexpr bool fused = std::same_as<T, float> || std::same_as<T, double>;
#else
  static constexpr bool fused = false;
#endif

  template <class S>
  static Vec load(const S* p) {
    return static_cast<T>(*p);
  }
  template <class S>
  static Vec load_once(const S* p) {
    return load(p);
  }
  template <class S>
  static Vec load_n(const S* p, Index n) {
    return n > 0 ? static_cast<T>(*p) : T(0);
  }
  static void store(T* p, Vec v) { *p = v; }
  static void store_n(T* p, Vec v, Index n) {
    if (n > 0) *p = v;
  }
  static Vec broadcast(T x) { return x; }
  static Vec zero() { return T(0); }
  static Vec iota() { return T(0); }

  static Vec add(Vec a, Vec b) { return a + b; }
  static Vec sub(Vec a, Vec b) { return a - b; }
  static Vec mul(Vec a, Vec b) { return a * b; }
  static Vec div(Vec a, Vec b) { return a / b; }
  static Vec fma(Vec a, Vec b, Vec c) {
    if constexpr (fused)
      return std::fma(a, b, c);
    else
      return a * b + c;
  }
  static Vec max(Vec a, Vec b) { return a < b ? b : a; }
  static Vec min(Vec a, Vec b) { return b < a ? b : a; }
  static Vec exp2(Vec x) {
    using std::exp2;
    return exp2(x);
  }

  static Vec weight(Vec d, Vec c) { return exp2(d * c); }

  static Vec tanh(Vec x) {
    using std::tanh;
    return tanh(x);
  }

  static Mask less(Vec a, Vec b) { return a < b; }
  static Mask less_equal(Vec a, Vec b) { return a <= b; }
  static Mask both(Mask a, Mask b) { return a && b; }
  static bool any(Mask mask) { return mask; }
  static Vec select(Mask mask, Vec yes, Vec no) { return mask ? yes : no; }

  static T first_lane(Vec v) { return v; }
  static T sum_lanes(Vec v) { return v; }
  static T max_lanes(Vec v) { return v; }
  static Vec sum_each(Vec (&rows)[1]) { return rows[0]; }
  static void transpose(Vec (&)[1]) {}
};

/// Several lanes: float and double on Eigen's packets.
template <class T>
requires(detail::has_packets<T>) struct Simd<T> {
  using Vec = typename detail::packets::packet_traits<T>::type;
  static constexpr std::size_t lanes = detail::packets::unpacket_traits<Vec>::size;
  static constexpr Index width = static_cast<Index>(lanes);
  static constexpr Index registers = EIGEN_ARCH_DEFAULT_NUMBER_OF_REGISTERS;
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA) || defined(EIGEN_VECTORIZE_FMA)
  static constexpr bool fused = true;
#else
  static constexpr bool fused = false;
#endif

  // ---- memory ----
  /// p[0 … width) of any storage type; int8 without its scale.
  template <class S>
  static EIGEN_ALWAYS_INLINE Vec load(const S* p) {
    if constexpr (std::same_as<S, T>) {
      return detail::packets::ploadu<Vec>(p);
    } else {
      Vec v;
      detail::widen(p, v);
      return v;
    }
  }
  /// The same, read once however often it is used.
  template <class S>
  static EIGEN_ALWAYS_INLINE Vec load_once(const S* p) {
    Vec v = load(p);
    detail::hold(v);
    return v;
  }
  /// p[0 … n) and zeros after it; touches no memory past p + n. 0 ≤ n ≤ width.
  template <class S>
  static EIGEN_ALWAYS_INLINE Vec load_n(const S* p, Index n) {
    if constexpr (std::same_as<S, T>) {
      Vec v;
      detail::load_first(p, n, v);
      return v;
    } else {
      S copy[lanes];
      for (Index i = 0; i < width; ++i) copy[i] = i < n ? p[i] : static_cast<S>(0);
      return load(copy);
    }
  }
  static EIGEN_ALWAYS_INLINE void store(T* p, Vec v) { detail::packets::pstoreu(p, v); }
  /// The first n lanes; touches no memory past p + n. 0 ≤ n ≤ width.
  static EIGEN_ALWAYS_INLINE void store_n(T* p, Vec v, Index n) { detail::store_first(p, v, n); }
  // Not pload1: Eigen 5 writes it in inline assembly, which keeps it out of the fma's memory operand.
  static EIGEN_ALWAYS_INLINE Vec broadcast(T x) { return detail::packets::pset1<Vec>(x); }
  static EIGEN_ALWAYS_INLINE Vec zero() { return detail::packets::pset1<Vec>(T(0)); }
  /// 0, 1, …, width-1.
  static EIGEN_ALWAYS_INLINE Vec iota() { return detail::packets::plset<Vec>(T(0)); }

  // ---- arithmetic ----
  static EIGEN_ALWAYS_INLINE Vec add(Vec a, Vec b) { return detail::packets::padd(a, b); }
  static EIGEN_ALWAYS_INLINE Vec sub(Vec a, Vec b) { return detail::packets::psub(a, b); }
  static EIGEN_ALWAYS_INLINE Vec mul(Vec a, Vec b) { return detail::packets::pmul(a, b); }
  static EIGEN_ALWAYS_INLINE Vec div(Vec a, Vec b) { return detail::packets::pdiv(a, b); }
  static EIGEN_ALWAYS_INLINE Vec fma(Vec a, Vec b, Vec c) { return detail::packets::pmadd(a, b, c); }
  static EIGEN_ALWAYS_INLINE Vec max(Vec a, Vec b) { return detail::packets::pmax(a, b); }
  static EIGEN_ALWAYS_INLINE Vec min(Vec a, Vec b) { return detail::packets::pmin(a, b); }

  /// 2ˣ; see the head of this file.
  static EIGEN_ALWAYS_INLINE Vec exp2(Vec x) {
#if defined(EIGEN_VECTORIZE_AVX512) && defined(__AVX512DQ__)
    // reduce: x - round(x), 0 at ±inf. scalef: multiplies by 2ⁿ and knows every n.
    if constexpr (std::same_as<T, float>) {
      const Vec r = _mm512_reduce_ps(x, 0);
      return _mm512_scalef_ps(two_to_the(r), _mm512_sub_ps(x, r));
    } else {
      const Vec r = _mm512_reduce_pd(x, 0);
      return _mm512_scalef_pd(two_to_the(r), _mm512_sub_pd(x, r));
    }
#else
    constexpr T magic = std::same_as<T, float> ? T(0x1.8p23) : T(0x1.8p52);  // adding it rounds to an integer
    constexpr T bias = std::same_as<T, float> ? T(127) : T(1023);
    const Vec shifted = add(min(max(x, broadcast(-bias)), broadcast(bias + 1)), broadcast(magic + bias));
    const Vec n = sub(shifted, broadcast(magic + bias));
    const Vec y = mul(two_to_the(sub(x, n)), detail::low_bits_to_exponent(shifted));  // x unclamped: NaN stays NaN
    return select(less(x, broadcast(1 - bias)), zero(), y);
#endif
  }

  /// 2^(d·c), d <= 0; see the head of this file.
  static EIGEN_ALWAYS_INLINE Vec weight(Vec d, Vec c) {
#if defined(EIGEN_VECTORIZE_AVX512)
    // Adds, integer operations and permutations are not done by the units that multiply: fewer of those are busy.
    if constexpr (std::same_as<T, float>) {
      constexpr auto& p = detail::weight_coefficients;
      const detail::TablePower power(d, c);
      const Vec q = mul(power.rest, fma(power.rest, broadcast(p[0]), broadcast(p[1])));
      return _mm512_maskz_fmadd_ps(power.normal, power.step, q, power.step);
    } else
#endif
        if constexpr (std::same_as<T, float> && fused) {
      const Vec middle = broadcast(0x1.8p23F + 127), shifted = fma(d, c, middle);
      const Vec r = fma(d, c, sub(middle, shifted));
      const Vec y = mul(short_chain(r), detail::low_bits_to_exponent(shifted));
      return select(less(shifted, broadcast(0x1.8p23F + 1)), zero(), y);
    } else {
      return exp2(mul(d, c));
    }
  }

  /// Float: Eigen's rational approximation, a few ulp. Double: lane by lane.
  static EIGEN_ALWAYS_INLINE Vec tanh(Vec x) {
    if constexpr (std::same_as<T, float>) {
      return detail::packets::ptanh(x);
    } else {
      T copy[lanes];
      store(copy, x);
      for (T& y : copy) y = std::tanh(y);
      return load(copy);
    }
  }

  // ---- comparison ----
  static EIGEN_ALWAYS_INLINE auto less(Vec a, Vec b) { return detail::less(a, b); }
  static EIGEN_ALWAYS_INLINE auto less_equal(Vec a, Vec b) { return detail::less_equal(a, b); }
  using Mask = decltype(detail::less(Vec(), Vec()));
  static EIGEN_ALWAYS_INLINE Mask both(Mask a, Mask b) { return detail::both(a, b); }
  static EIGEN_ALWAYS_INLINE bool any(Mask mask) { return detail::any(mask); }
  static EIGEN_ALWAYS_INLINE Vec select(Mask mask, Vec yes, Vec no) { return detail::select(mask, yes, no); }

  // ---- across lanes, in an order fixed by the instruction set ----
  static EIGEN_ALWAYS_INLINE T first_lane(Vec v) { return detail::packets::pfirst(v); }
  static EIGEN_ALWAYS_INLINE T sum_lanes(Vec v) { return detail::packets::predux(v); }
  static EIGEN_ALWAYS_INLINE T max_lanes(Vec v) { return detail::packets::predux_max(v); }
  /// Lane i of the result is the sum of the lanes of row i: halves are added, then quarters, and so on. Rows are lost.
  static EIGEN_ALWAYS_INLINE Vec sum_each(Vec (&rows)[lanes]) { return detail::sum_each(rows); }
  /// Lane j of row i becomes lane i of row j.
  static EIGEN_ALWAYS_INLINE void transpose(Vec (&rows)[lanes]) {
    detail::packets::PacketBlock<Vec, int(lanes)> block;
    for (Index i = 0; i < width; ++i) block.packet[i] = rows[i];
    detail::packets::ptranspose(block);
    for (Index i = 0; i < width; ++i) rows[i] = block.packet[i];
  }

 private:
  template <std::size_t... I>
  static EIGEN_ALWAYS_INLINE Vec horner(Vec r, std::index_sequence<I...>) {
    constexpr auto& c = detail::exp2_coefficients<T>;
    Vec y = broadcast(static_cast<T>(c[0]));
    ((y = fma(y, r, broadcast(static_cast<T>(c[I + 1])))), ...);
    return fma(y, r, broadcast(T(1)));
  }
  // The same polynomial in pairs of terms: four operations one after another, not six, for one more in all.
  static EIGEN_ALWAYS_INLINE Vec short_chain(Vec r) {
    constexpr auto& c = detail::exp2_coefficients<T>;
    const auto pair = [&](Vec y, int i) { return fma(y, r, broadcast(static_cast<T>(c[i]))); };
    const Vec r2 = mul(r, r);
    const Vec a = fma(broadcast(static_cast<T>(c[5])), r, broadcast(T(1)));
    const Vec b = pair(broadcast(static_cast<T>(c[3])), 4);
    const Vec d = pair(pair(broadcast(static_cast<T>(c[0])), 1), 2);
    return fma(fma(d, r2, b), r2, a);
  }
  static EIGEN_ALWAYS_INLINE Vec two_to_the(Vec r) {
    return horner(r, std::make_index_sequence<std::size(detail::exp2_coefficients<T>) - 1>{});
  }
};

}  // namespace qkv::inline QKV_ABI::kernel

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif

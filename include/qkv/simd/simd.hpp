// simd/simd.hpp — Simd<T>: a register of T and its operations.
//
//     Simd<T>::width lanes;  float: 4 (SSE2, NEON), 8 (AVX), 16 (AVX-512);  double: half of that;  otherwise 1
//
// The instruction set is the one Eigen was compiled for. long double, user types and EIGEN_DONT_VECTORIZE have one lane.
// Loads and stores need no alignment. Storage types are converted in the register, exactly, the same on every machine.
//
//     fma(a, b, c) = a·b + c      rounded once where `fused`, else (SSE2 without FMA) twice
//     max, min                    which operand comes out where one is NaN is left open
//     exp2, weight, weight_short  2ˣ, and what a softmax needs: simd/exp2.hpp
//
// Before: product/register_tile.hpp   Next: simd/exp2.hpp
#pragma once

#include <cmath>
#include <concepts>
#include <cstddef>

#include "exp2.hpp"
#include "isa.hpp"

// g++ 12 warns of the undefined starting values inside AVX-512 intrinsics, and of registers as template arguments.
#include "../base/warnings_off.hpp"

namespace qkv { inline namespace QKV_ABI { namespace kernel {

/// One lane: whatever T can do.
template <class T>
struct Simd {
  using Vec = T;
  using Mask = bool;
  static constexpr std::size_t lanes = 1;  // for array bounds
  static constexpr Index width = 1;
  static constexpr Index registers = 16;
  static constexpr bool fused = detail::fused && (std::same_as<T, float> || std::same_as<T, double>);

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
  static Vec weight_short(Vec d, Vec c) { return exp2(d * c); }
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
  static constexpr bool fused = detail::fused;

  // ---- memory ----
  /// p[0 … width) of any storage type; quantised rows without their scale.
  template <class S>
  static EIGEN_ALWAYS_INLINE Vec load(const S* p) {
    if constexpr (std::same_as<S, T>) {
      return detail::packets::ploadu<Vec>(p);
    } else {
      Vec v;
      Isa::widen(p, v);
      return v;
    }
  }
  /// The same, read once however often it is used.
  template <class S>
  static EIGEN_ALWAYS_INLINE Vec load_once(const S* p) {
    Vec v = load(p);
    Isa::hold(v);
    return v;
  }
  /// p[0 … n) and zeros after it; touches no memory past p + n. 0 ≤ n ≤ width.
  template <class S>
  static EIGEN_ALWAYS_INLINE Vec load_n(const S* p, Index n) {
    if constexpr (std::same_as<S, T>) {
      Vec v;
      Isa::load_first(p, n, v);
      return v;
    } else {
      S copy[lanes];
      for (Index i = 0; i < width; ++i) copy[i] = i < n ? p[i] : static_cast<S>(0);
      return load(copy);
    }
  }
  static EIGEN_ALWAYS_INLINE void store(T* p, Vec v) { detail::packets::pstoreu(p, v); }
  /// The first n lanes; touches no memory past p + n. 0 ≤ n ≤ width.
  static EIGEN_ALWAYS_INLINE void store_n(T* p, Vec v, Index n) { Isa::store_first(p, v, n); }
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

  /// 2ˣ; weights 2^(d·c) for d <= 0; the same, coarser, for weights that are rounded to 15 bits or less: simd/exp2.hpp.
  static EIGEN_ALWAYS_INLINE Vec exp2(Vec x) { return detail::exp2(x); }
  static EIGEN_ALWAYS_INLINE Vec weight(Vec d, Vec c) { return detail::weight(d, c); }
  static EIGEN_ALWAYS_INLINE Vec weight_short(Vec d, Vec c) { return detail::weight_short(d, c); }

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
  static EIGEN_ALWAYS_INLINE auto less(Vec a, Vec b) { return Isa::less(a, b); }
  static EIGEN_ALWAYS_INLINE auto less_equal(Vec a, Vec b) { return Isa::less_equal(a, b); }
  using Mask = decltype(Isa::less(Vec(), Vec()));
  static EIGEN_ALWAYS_INLINE Mask both(Mask a, Mask b) { return Isa::both(a, b); }
  static EIGEN_ALWAYS_INLINE bool any(Mask mask) { return Isa::any(mask); }
  static EIGEN_ALWAYS_INLINE Vec select(Mask mask, Vec yes, Vec no) { return Isa::select(mask, yes, no); }

  // ---- across lanes, in an order fixed by the instruction set ----
  static EIGEN_ALWAYS_INLINE T first_lane(Vec v) { return detail::packets::pfirst(v); }
  static EIGEN_ALWAYS_INLINE T sum_lanes(Vec v) { return detail::packets::predux(v); }
  static EIGEN_ALWAYS_INLINE T max_lanes(Vec v) { return detail::packets::predux_max(v); }
  /// Lane i of the result is the sum of the lanes of row i: halves are added, then quarters, and so on. Rows are lost.
  static EIGEN_ALWAYS_INLINE Vec sum_each(Vec (&rows)[lanes]) { return Isa::sum_each(rows); }
  /// Lane j of row i becomes lane i of row j.
  static EIGEN_ALWAYS_INLINE void transpose(Vec (&rows)[lanes]) {
    detail::packets::PacketBlock<Vec, int(lanes)> block;
    for (Index i = 0; i < width; ++i) block.packet[i] = rows[i];
    detail::packets::ptranspose(block);
    for (Index i = 0; i < width; ++i) rows[i] = block.packet[i];
  }
};

}}}  // namespace qkv::QKV_ABI::kernel

#include "../base/warnings_on.hpp"

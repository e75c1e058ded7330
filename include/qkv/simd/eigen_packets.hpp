// simd/eigen_packets.hpp — Eigen's packets, and in plain loops what they lack: what a register of numbers is made of.
//
// An instruction set that does better has an overload in simd/intrinsics.hpp: masks of AVX-512, storage types converted in
// the register, the first lanes of memory, sums of many rows at once.
//
// Before: simd/exp2.hpp   Next: simd/words.hpp
#pragma once

#include <concepts>
#include <cstddef>

#include "../storage.hpp"
#include "intrinsics.hpp"

#include "../base/warnings_off.hpp"

namespace qkv { inline namespace QKV_ABI { namespace detail {

namespace packets = Eigen::internal;

/// Whether a·b + c is rounded once.
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA) || defined(EIGEN_VECTORIZE_FMA)
inline constexpr bool fused = true;
#else
inline constexpr bool fused = false;
#endif

template <class T>
inline constexpr bool has_packets = [] {
  using Traits = packets::packet_traits<T>;
  return (std::same_as<T, float> || std::same_as<T, double>)&&bool(Traits::Vectorizable) &&
         packets::unpacket_traits<typename Traits::type>::size > 1;
}();

// Masks: a mask register on AVX-512, elsewhere lanes of all ones or all zeros.
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

}}}  // namespace qkv::QKV_ABI::detail

#include "../base/warnings_on.hpp"

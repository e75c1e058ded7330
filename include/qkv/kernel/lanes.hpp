// kernel/lanes.hpp — masks and scores for a register of queries against one key.
//
//     lane i is the query at row `query + i`; the key is the same for all lanes
//
// What a mask allows is often one interval of queries (causal, windows, prefixes, lengths, and what & and | make of
// them): `seen_by` asks for it and one comparison per register does the rest. Other masks are asked lane by lane. The
// library's own scores work on the register; a function of the user's is called for every lane, inlined.
//
// Before: kernel/query_panels.hpp   Next: kernel/panel_mask.hpp
#pragma once

#include <algorithm>
#include <limits>
#include <type_traits>

#include "../mask.hpp"
#include "../score.hpp"
#include "simd.hpp"

namespace qkv::inline QKV_ABI::kernel {

/// The pairs of one key with the queries query, query + 1, …: At for lane 0, and how many lanes are queries at all.
struct LaneAt {
  At first;
  Index lanes;

  At at(Index lane) const {
    At a = first;
    a.query += lane;
    a.query_position += lane;
    return a;
  }
};

template <class F>
inline constexpr bool is_alibi = false;
template <class U>
inline constexpr bool is_alibi<Alibi<U>> = true;
template <class F>
inline constexpr bool is_then = false;
template <class A, class B>
inline constexpr bool is_then<Then<A, B>> = true;

/// first - lane, each rounded to T for itself. Out of the way: distances so long are rare.
template <class T>
EIGEN_DONT_INLINE typename Simd<T>::Vec long_distances(Index first) {
  T lanes[Simd<T>::lanes];
  for (Index i = 0; i < Simd<T>::width; ++i) lanes[i] = static_cast<T>(first - i);
  return Simd<T>::load(lanes);
}

/// key_position - query_position of every lane: each the number rounded to T, as where it is asked for alone. Past 2²⁴
/// (double: 2⁵³) a lane less is not one less.
template <class T>
EIGEN_ALWAYS_INLINE typename Simd<T>::Vec distances(const LaneAt& at) {
  using V = Simd<T>;
  constexpr Index exact = Index{1} << std::min(std::numeric_limits<T>::digits, 62);
  const Index first = at.first.key_position - at.first.query_position;
  if (first <= -exact + V::width || first > exact) return long_distances<T>(first);
  return V::sub(V::broadcast(static_cast<T>(first)), V::iota());
}

/// f of a register of scores.
template <class T, class F>
EIGEN_ALWAYS_INLINE typename Simd<T>::Vec score_lanes(const F& f, typename Simd<T>::Vec s, const LaneAt& at) {
  using V = Simd<T>;
  if constexpr (std::is_same_v<F, Plain>) {
    return s;
  } else if constexpr (std::is_same_v<F, SoftCap>) {
    const auto cap = V::broadcast(f.template cap_as<T>());
    return V::mul(cap, V::tanh(V::div(s, cap)));
  } else if constexpr (is_alibi<F>) {
    const T slope = static_cast<T>(f.slopes[static_cast<std::size_t>(at.first.head)]);
    return V::fma(V::broadcast(slope), distances<T>(at), s);
  } else if constexpr (is_then<F>) {
    return score_lanes<T>(f.b, score_lanes<T>(f.a, s, at), at);
  } else {  // a user's: lane by lane
    T lanes[V::lanes];
    V::store(lanes, s);
    if (at.lanes >= V::width)
      for (Index i = 0; i < V::width; ++i) lanes[i] = f(lanes[i], at.at(i));
    else
      for (Index i = 0; i < at.lanes; ++i) lanes[i] = f(lanes[i], at.at(i));
    return V::load(lanes);
  }
}

}  // namespace qkv::inline QKV_ABI::kernel

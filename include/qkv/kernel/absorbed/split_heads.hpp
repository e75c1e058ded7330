// kernel/absorbed/split_heads.hpp — absorbed attention of few heads: several lanes for one head.
//
//     parts 2, 8 heads, step k     lane 0: head 0, number 2k     lane 1: head 0, number 2k + 1     lane 2: head 1, …
//
// Few heads leave lanes unused: then each lane multiplies every `parts`-th number of a row, and the parts of a head are added
// at the end. One load broadcasts two or four numbers of a row, as it does a single one.
//
// Before: kernel/absorbed/queries.hpp   Next: kernel/absorbed/tiles.hpp
#pragma once

#include <cstring>
#include <type_traits>

#include "../../simd/simd.hpp"
#include "../arithmetic.hpp"

namespace qkv { inline namespace QKV_ABI { namespace kernel::absorbed {

/// How many: as many as fill two registers of lanes, where four are enough, since a tile of two loads little for what it
/// multiplies. By heads only: the bits of a token depend on no other. In int16 a lane is a register anyway
/// (simd/narrow.hpp).
template <class A>
constexpr Index parts_of([[maybe_unused]] Index heads) {
  constexpr Index width = Simd<typename A::Scalar>::width;
  if constexpr (Isa::repeats && std::is_same_v<typename A::Scalar, float> && !A::int16_keys)
    return 2 * heads <= width ? 4 : heads <= width ? 2 : 1;
  return 1;
}

/// How the queries of some lanes lie, and are multiplied: registers of width / parts lanes, `registers` side by side.
struct LaneLayout {
  Index parts, registers;

  friend constexpr bool operator==(const LaneLayout&, const LaneLayout&) = default;
};

/// The one rule for it: without parts a panel's registers, in parts two, but where one of four parts holds all lanes.
template <class A, Index Vectors>
constexpr LaneLayout lane_layout(Index heads, Index lanes) {
  const Index parts = parts_of<A>(heads);
  if (parts == 1) return {1, Vectors};
  return {parts, parts == 4 && lanes * parts <= Simd<typename A::Scalar>::width ? 1 : 2};
}

/// f(registers, parts) of a layout, as constants: of those that lane_layout gives.
template <class A, Index Vectors, class F>
void with_layout([[maybe_unused]] const LaneLayout& layout, F&& f) {
  using One = std::integral_constant<Index, 1>;
  using Two = std::integral_constant<Index, 2>;
  using Four = std::integral_constant<Index, 4>;
  if constexpr (parts_of<A>(1) > 1) {
    if (layout == LaneLayout{4, 1}) return f(One{}, Four{});
    if (layout == LaneLayout{4, 2}) return f(Two{}, Four{});
    if (layout == LaneLayout{2, 2}) return f(Two{}, Two{});
  }
  if constexpr (Vectors > 1 || parts_of<A>(Simd<typename A::Scalar>::width) == 1)  // one register: few heads
    f(std::integral_constant<Index, Vectors>{}, One{});
}

/// `Parts` numbers from p on, repeated in all lanes.
template <class Dot, Index Parts>
EIGEN_ALWAYS_INLINE auto repeat(const void* p) {
  if constexpr (Parts == 1) {
    typename Dot::Number x;
    std::memcpy(&x, p, sizeof x);
    return Dot::broadcast(x);
  } else if constexpr (std::is_same_v<typename Dot::Number, float>) {
    return Isa::repeat<Parts>(p);
  } else {
    return Isa::as_words(Isa::repeat<Parts>(p));
  }
}

/// A register of scores in parts: their sums, width / Parts of them.
template <Index Parts, class T, class Vec>
EIGEN_ALWAYS_INLINE void store_sums(T* s, Vec v) {
  if constexpr (Parts == 1)
    Simd<T>::store(s, v);
  else
    Isa::store_part_sums<Parts>(s, v);
}

}}}  // namespace qkv::QKV_ABI::kernel::absorbed

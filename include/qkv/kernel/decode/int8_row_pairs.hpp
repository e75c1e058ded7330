// kernel/decode/int8_row_pairs.hpp — int8 rows two at a time, as pairs of 16 bits for one instruction that multiplies and adds both.
//
//     sum += w_a·a + w_b·b          a lane is a feature; w: weights of the two rows, in every lane the same pair
//
//     row a   a₀ a₁ a₂ a₃ …         interleaved by 16 bits       a₀a₁ b₀b₁  a₂a₃ b₂b₃ …
//     row b   b₀ b₁ b₂ b₃ …         even: up and down 8 bits      a₀   b₀    a₂   b₂  …
//                                   odd:  down 8 bits             a₁   b₁    a₃   b₃  …
//
// `block` bytes of both rows make four vectors: even and odd features of the low halves of each 16 bytes, then of the high
// ones. Three instructions give two vectors. Widening in order needs two for one vector, slow ones that cross 128 bits
// (Zen 3: 1.3 cycles instead of ½).
//
// Before: kernel/decode/int8_values.hpp   Next: kernel/tiled/tiled.hpp
#pragma once

#include <algorithm>
#include <cstdint>

#include "dots.hpp"

#include "../../base/warnings_off.hpp"

namespace qkv { inline namespace QKV_ABI { namespace kernel {

struct RowPairs {
  static constexpr Index lanes = Isa::lanes, block = 4 * lanes;  // features

  static EIGEN_ALWAYS_INLINE Isa::Words broadcast(std::int32_t pair) {
    return Isa::broadcast_word(static_cast<Word>(pair));
  }
  /// Vector 0 … 3 of a block.
  template <std::size_t Part>
  static EIGEN_ALWAYS_INLINE Isa::Words part(Isa::Words a, Isa::Words b) {
    const Isa::Words mixed = Part < 2 ? Isa::unpack_low_int16(a, b) : Isa::unpack_high_int16(a, b);
    return Part % 2 == 0 ? Isa::low_int8(mixed) : Isa::high_int8(mixed);
  }
};

}}}  // namespace qkv::QKV_ABI::kernel

#include "../../base/warnings_on.hpp"

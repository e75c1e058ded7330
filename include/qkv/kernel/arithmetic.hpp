// kernel/arithmetic.hpp — in which numbers a kernel multiplies: the storage's own, or everything widened.
//
//                 queries · keys              weights · values                sums
//     Exact<T>    T                           T                               T
//     Pairs       bfloat16                    bfloat16                        float
//     Quads       int8 · int8                 bfloat16 · int8 as bfloat16     int32; float
//     Bytes       int8 · int8                 8 bits · int8                   int32, per block
//
// `Number` is what is broadcast and what a lane holds: a T, or a word of `features` features of a key, of `keys` keys of a
// value (kernel/words.hpp). Both the tiled and the absorbed kernel are written once for all of them.
//
// Before: kernel/words.hpp   Next: embedding.hpp
#pragma once

#include <concepts>
#include <type_traits>

#include "../storage.hpp"
#include "words.hpp"

namespace qkv::inline QKV_ABI::kernel {

template <class T>
struct Exact {  // everything widened to T
  static constexpr const char* name = "";
  using Scalar = T;
  using Number = T;
  static constexpr bool words = false, quads = false, bytes = false;
  static constexpr Index features = 1, keys = 1;  // in one number
};
struct Pairs {  // bfloat16 throughout, sums in float
  static constexpr const char* name = " multiplied in bf16";
  using Scalar = float;
  using Number = Word;
  static constexpr bool words = true, quads = false, bytes = false;
  static constexpr Index features = 2, keys = 2;
};
struct Quads {  // int8 queries and keys, bfloat16 weights and values
  static constexpr const char* name = " multiplied in int8, values in bf16";
  using Scalar = float;
  using Number = Word;
  static constexpr bool words = true, quads = true, bytes = false;
  static constexpr Index features = 4, keys = 2;
};
struct Bytes {  // int8 throughout; weights in 8 bits: kernel/panel_softmax.hpp
  static constexpr const char* name = " multiplied in int8";
  using Scalar = float;
  using Number = Word;
  static constexpr bool words = true, quads = true, bytes = true;
  static constexpr Index features = 4, keys = 4;
};

/// The arithmetic in which keys stored as S are multiplied unless exact is asked for.
template <class T, StorageType S>
using NarrowArithmetic = std::conditional_t<
    !words_available || !std::is_same_v<T, float>, Exact<T>,
    std::conditional_t<std::is_same_v<S, bfloat16>, Pairs, std::conditional_t<has_row_scale<S>, Quads, Exact<T>>>>;

}  // namespace qkv::inline QKV_ABI::kernel

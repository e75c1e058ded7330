// kernel/arithmetic.hpp — in which numbers a kernel multiplies: the storage's own, or everything widened.
//
//                 queries · keys              weights · values                sums
//     Exact<T>    T                           T                               T
//     Pairs       bfloat16                    bfloat16                        float
//     Quads       int8 · int8                 bfloat16 · int8 as bfloat16     int32; float
//     Bytes       int8 · int8                 8 bits · int8                   int32, per block
//     Shorts      int16 · int8                15 bits · int8                  int32, per block
//
// `Number` is what is broadcast and what a lane holds: a T, or a word of `features` features of a key, of `keys` keys of a
// value (kernel/words.hpp, kernel/shorts.hpp). Both the tiled and the absorbed kernel are written once for all of them.
//
// Before: kernel/word_tile.hpp   Next: embedding.hpp
#pragma once

#include <concepts>
#include <type_traits>

#include "../storage.hpp"
#include "shorts.hpp"

namespace qkv::inline QKV_ABI::kernel {

template <class T>
struct Exact {  // everything widened to T
  static constexpr const char* name = "";
  using Scalar = T;
  using Number = T;
  static constexpr bool words = false, quads = false, bytes = false, shorts = false;
  static constexpr bool scaled = false;           // keys are integers; scales, and a rope part, are joined afterwards
  static constexpr bool steps = false;            // weights are whole numbers of steps
  static constexpr Index features = 1, keys = 1;  // in one number
};
struct Pairs {  // bfloat16 throughout, sums in float
  static constexpr const char* name = " multiplied in bf16";
  using Scalar = float;
  using Number = Word;
  static constexpr bool words = true, quads = false, bytes = false, shorts = false, scaled = false, steps = false;
  static constexpr Index features = 2, keys = 2;
};
struct Quads {  // int8 queries and keys, bfloat16 weights and values
  static constexpr const char* name = " multiplied in int8, values in bf16";
  using Scalar = float;
  using Number = Word;
  static constexpr bool words = true, quads = true, bytes = false, shorts = false, scaled = true, steps = false;
  static constexpr Index features = 4, keys = 2;
};
struct Bytes {  // int8 throughout; weights in 8 bits: kernel/panel_softmax.hpp
  static constexpr const char* name = " multiplied in int8";
  using Scalar = float;
  using Number = Word;
  static constexpr bool words = true, quads = true, bytes = true, shorts = false, scaled = true, steps = true;
  static constexpr Index features = 4, keys = 4;
};
struct Shorts {  // int16 throughout; weights in 15 bits: kernel/panel_softmax.hpp
  static constexpr const char* name = " multiplied in int16";
  using Scalar = float;
  using Number = Word;
  static constexpr bool words = true, quads = false, bytes = false, shorts = true, scaled = true, steps = true;
  static constexpr Index features = 2, keys = 2;
};

/// The arithmetic in which keys stored as S are multiplied unless exact is asked for.
template <class T, StorageType S>
using NarrowArithmetic = std::conditional_t<
    !std::is_same_v<T, float>, Exact<T>,
    std::conditional_t<words_available && std::is_same_v<S, bfloat16>, Pairs,
                       std::conditional_t<words_available && has_row_scale<S>, Quads,
                                          std::conditional_t<shorts_available && has_row_scale<S>, Shorts, Exact<T>>>>>;

/// How words of keys are multiplied.
#if defined(QKV_DETAIL_WORDS)
template <class A>
using ScoreDot = std::conditional_t<A::quads, QuadDot, PairDot>;
#elif defined(QKV_DETAIL_SHORTS)
template <class A>
using ScoreDot = ShortDot;
#endif

}  // namespace qkv::inline QKV_ABI::kernel

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
// value (simd/words.hpp, simd/shorts.hpp). Both the tiled and the absorbed kernel are written once for all of them.
//
// Before: kernel/reference.hpp   Next: kernel/decode/decode.hpp
#pragma once

#include <concepts>
#include <cstdint>
#include <type_traits>

#include "../simd/shorts.hpp"
#include "../simd/words.hpp"
#include "../storage.hpp"

namespace qkv { inline namespace QKV_ABI { namespace kernel {

/// What follows from the numbers in which keys and values are multiplied.
template <class T, class N, class Key, class Value>
struct Numbers {
  using Scalar = T;
  using Number = N;
  static constexpr Index features = sizeof(N) / sizeof(Key), keys = sizeof(N) / sizeof(Value);  // in one number
  static constexpr bool words = std::same_as<N, Word>;
  static constexpr bool quads = std::same_as<Key, std::int8_t>;    // of fours, the other side unsigned
  static constexpr bool bytes = std::same_as<Value, std::int8_t>;  // likewise
  static constexpr bool shorts = std::same_as<Key, std::int16_t>;
  // Keys are whole numbers: scales, and a rope part, are joined afterwards. Weights are whole numbers of steps.
  static constexpr bool scaled = quads || shorts, steps = bytes || shorts;
  // What the largest whole number of a query is taken to be worth: left off the scale of a key, so that scores overflow
  // only where q·k / max|q| does, and given to the unit of the query.
  static constexpr float headroom = quads ? 128 : shorts ? 32768 : 1;
  // Values of int8 that are not whole numbers are multiplied by their scale first. So many of it are infinite where the
  // row has a number that is, or would be in bfloat16.
  static constexpr int restored = steps ? 1 : 129;
};

template <class T>
struct Exact : Numbers<T, T, T, T> {  // everything widened to T
  static constexpr const char* name = "";
};
struct Pairs : Numbers<float, Word, bfloat16, bfloat16> {  // sums in float
  static constexpr const char* name = " multiplied in bf16";
};
struct Quads : Numbers<float, Word, std::int8_t, bfloat16> {
  static constexpr const char* name = " multiplied in int8, values in bf16";
};
struct Bytes : Numbers<float, Word, std::int8_t, std::int8_t> {  // weights in 8 bits: kernel/register_softmax.hpp
  static constexpr const char* name = " multiplied in int8";
};
struct Shorts : Numbers<float, Word, std::int16_t, std::int16_t> {  // weights in 15 bits: kernel/register_softmax.hpp
  static constexpr const char* name = " multiplied in int16";
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

}}}  // namespace qkv::QKV_ABI::kernel

// kernel/arithmetic.hpp — the number types in which a kernel multiplies: those of the storage, or all widened to T.
//
//                 queries · keys              weights · values                sums
//     Exact<T>    T                           T                               T
//     Bf16        bfloat16                    bfloat16                        float
//     Int8Bf16    int8 · int8                 bfloat16 · int8 as bfloat16     int32; float
//     Int8Int16   int8 · int8                 15 bits · int8                  int32; int32, per block
//     Int8        int8 · int8                 8 bits · int8                   int32; int32, per block
//     Int16       int16 · int8                15 bits · int8                  int32; int32, per block
//
// A `Number` is broadcast, and is one lane: a T, or a word (simd/narrow.hpp) of `features` features of a key or of `keys` keys
// of one value feature. Both the tiled and the absorbed kernel are written once for all of them.
//
// Before: kernel/reference.hpp   Next: kernel/decode/decode.hpp
#pragma once

#include <concepts>
#include <cstdint>
#include <type_traits>

#include "../simd/narrow.hpp"
#include "../storage.hpp"

namespace qkv { inline namespace QKV_ABI { namespace kernel {

/// What follows from the numbers in which keys and values are multiplied.
template <class T, class N, class Key, class Value>
struct Numbers {
  using Scalar = T;
  using Number = N;
  static constexpr Index features = sizeof(N) / sizeof(Key), keys = sizeof(N) / sizeof(Value);  // in one number
  static constexpr bool narrow = std::same_as<N, Word>;
  static constexpr bool int8_keys = std::same_as<Key, std::int8_t>;      // the other side unsigned
  static constexpr bool int8_values = std::same_as<Value, std::int8_t>;  // likewise
  static constexpr bool int16_keys = std::same_as<Key, std::int16_t>, int16_values = std::same_as<Value, std::int16_t>;
  // Integer keys: scales, and a rope part, follow after the sum. Integer weights: multiples of a quantisation step.
  static constexpr bool integer_keys = int8_keys || int16_keys, integer_weights = int8_values || int16_values;
  // A power of two that the scale of a key is divided by and the scale of a query multiplied by, so that scores overflow
  // only where q·k / max|q| does.
  static constexpr float headroom = int8_keys ? 128 : int16_keys ? 32768 : 1;
  // Bound of |value| / scale as it is multiplied: int8 reaches 128, and rounding to bfloat16 adds less than 1. A row counts
  // as not finite where scale · restored overflows.
  static constexpr int restored = integer_weights ? 1 : 129;
};

template <class T>
struct Exact : Numbers<T, T, T, T> {  // everything widened to T
  static constexpr const char* name = "";
};
struct Bf16 : Numbers<float, Word, bfloat16, bfloat16> {  // sums in float
  static constexpr const char* name = " multiplied in bf16";
};
struct Int8Bf16 : Numbers<float, Word, std::int8_t, bfloat16> {
  static constexpr const char* name = " multiplied in int8, values in bf16";
};
struct Int8Int16 : Numbers<float, Word, std::int8_t, std::int16_t> {  // weights in 15 bits: kernel/register_softmax.hpp
  static constexpr const char* name = " multiplied in int8, values in int16";
};
struct Int8 : Numbers<float, Word, std::int8_t, std::int8_t> {  // weights in 8 bits: kernel/register_softmax.hpp
  static constexpr const char* name = " multiplied in int8";
};
struct Int16 : Numbers<float, Word, std::int16_t, std::int16_t> {  // weights in 15 bits: kernel/register_softmax.hpp
  static constexpr const char* name = " multiplied in int16";
};

/// The arithmetic in which rows of int8 are multiplied: the narrowest products of keys, and the most exact ones of values.
using OfInt8 = std::conditional_t<Isa::int8_products, std::conditional_t<Isa::bf16_products, Int8Bf16, Int8Int16>,
                                  std::conditional_t<Isa::int16_products, Int16, Exact<float>>>;

/// The arithmetic in which keys stored as S are multiplied unless Arithmetic::exact is requested.
template <class T, StorageType S>
using NarrowArithmetic =
    std::conditional_t<!std::is_same_v<T, float>, Exact<T>,
                       std::conditional_t<Isa::bf16_products && std::is_same_v<S, bfloat16>, Bf16,
                                          std::conditional_t<std::is_same_v<S, std::int8_t>, OfInt8, Exact<T>>>>;

/// How numbers are multiplied: T by T, as the words of simd/narrow.hpp.
template <class T>
struct NumberDot {
  using Number = T;
  using Row = T;
  using V = Simd<T>;
  using Sum = typename V::Vec;
  static constexpr Index width = V::width;
  static EIGEN_ALWAYS_INLINE auto load(const T* p) { return V::load(p); }
  static EIGEN_ALWAYS_INLINE auto broadcast(T x) { return V::broadcast(x); }
  static EIGEN_ALWAYS_INLINE Sum dot(Sum c, Sum a, Sum b) { return V::fma(a, b, c); }
  static EIGEN_ALWAYS_INLINE Sum start(const T* o) { return V::load(o); }
  static EIGEN_ALWAYS_INLINE void finish(T* o, Sum s, const float*) { V::store(o, s); }
};

template <class A>
using KeyDot = std::conditional_t<
    A::int8_keys, Int8Dot,
    std::conditional_t<A::int16_keys, Int16Dot, std::conditional_t<A::narrow, Bf16Dot, NumberDot<typename A::Scalar>>>>;
template <class A>
using ValueDot =
    std::conditional_t<A::int8_values, Int8Dot,
                       std::conditional_t<A::int16_values, Int16Dot,
                                          std::conditional_t<A::narrow, Bf16Dot, NumberDot<typename A::Scalar>>>>;

}}}  // namespace qkv::QKV_ABI::kernel

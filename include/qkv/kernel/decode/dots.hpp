// kernel/decode/dots.hpp — how decode multiplies q·k: number types, a register of a row, an accumulator.
//
//     WidenedDot    any storage widened to T               sum += q·k
//     Int8RowDot    int8, where int8 has products          sum += Σ₄ q·k      queries as int8
//     Int16RowDot   int8, where only int16 has products    sum += Σ₂ q·k      queries as int16
//
// Sums of integers are exact; what differs is how a query is rounded, with one scale each, before it is multiplied.
// With both integers go values in pairs of int16 (kernel/decode/int8_values.hpp), with WidenedDot widened ones.
//
// Before: kernel/decode/values.hpp   Next: kernel/decode/int8_values.hpp
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "../../options.hpp"
#include "../../product/register_tile.hpp"
#include "../../simd/narrow.hpp"
#include "../../storage.hpp"

#include "../../base/warnings_off.hpp"

namespace qkv { inline namespace QKV_ABI { namespace kernel {

/// Queries are divided by it, and the scale of a key multiplied, where keys are integers: otherwise sums of products would
/// overflow long before scores do.
template <StorageType S>
inline constexpr float headroom = has_row_scale<S> ? 64 : 1;

/// q·k in T: what a register of a row is, how it is multiplied, and how a query is packed.
template <class T, class S>
struct WidenedDot {
  using V = Simd<T>;
  using Vec = typename V::Vec;
  using Scalar = T;
  using Key = S;
  using Query = T;
  static constexpr const char* name = "";
  static constexpr Index width = V::width;  // elements in a register of a row
  static constexpr Index lanes = V::width;  // sums that one tree adds up
  static constexpr Index parts = 1;         // registers into which one of a row is split

  static EIGEN_ALWAYS_INLINE Vec zero() { return V::zero(); }
  template <Index>
  static EIGEN_ALWAYS_INLINE Vec query(const T* q) {
    return V::load_once(q);
  }
  template <Index>
  static EIGEN_ALWAYS_INLINE Vec key(const S* k) {
    return V::load_once(k);
  }
  template <Index>
  static EIGEN_ALWAYS_INLINE Vec key_n(const S* k, Index n) {
    return V::load_n(k, n);
  }
  static EIGEN_ALWAYS_INLINE Vec add_product(Vec q, Vec k, Vec sum) { return V::fma(q, k, sum); }
  static EIGEN_ALWAYS_INLINE void finish(Vec (&sum)[std::size_t(lanes)], const T* factor, const std::int32_t*, T* to) {
    V::store(to, V::mul(V::sum_each(sum), V::load(factor)));
  }
  static T round(const T* query, Index n, T* to, std::int32_t&) {
    constexpr T factor = T(1) / static_cast<T>(headroom<S>);
    for (Index i = 0; i < n; ++i) to[i] = query[i] * factor;
    return T(1);
  }
};

/// bfloat16 in pairs as they lie: a register of 16 is its eight even features, shifted up, and its eight odd ones, masked.
/// Half the shuffles of widening them in order; queries are packed in the same order.
template <class S>
requires(std::is_same_v<S, bfloat16>&& Isa::splits_bf16) struct WidenedDot<float, S> {
  using V = Simd<float>;
  using Vec = V::Vec;
  using Scalar = float;
  using Key = bfloat16;
  using Query = float;
  static constexpr const char* name = "";
  static constexpr Index width = 2 * V::width, lanes = V::width, parts = 2;

  static EIGEN_ALWAYS_INLINE Vec zero() { return V::zero(); }
  template <Index Part>
  static EIGEN_ALWAYS_INLINE Vec query(const float* q) {
    return V::load_once(q + Part * V::width);
  }
  template <Index Part>
  static EIGEN_ALWAYS_INLINE Vec key(const bfloat16* k) {
    return Part == 0 ? Isa::even_bf16(k) : Isa::odd_bf16(k);
  }
  template <Index Part>
  static EIGEN_ALWAYS_INLINE Vec key_n(const Key* k, Index n) {
    Key copy[std::size_t(width)] = {};
    std::copy_n(k, n, copy);
    return key<Part>(copy);
  }
  static EIGEN_ALWAYS_INLINE Vec add_product(Vec q, Vec k, Vec sum) { return V::fma(q, k, sum); }
  static EIGEN_ALWAYS_INLINE void finish(Vec (&sum)[std::size_t(lanes)], const float* factor, const std::int32_t*,
                                         float* to) {
    V::store(to, V::mul(V::sum_each(sum), V::load(factor)));
  }
  static float round(const float* query, Index n, float* to, std::int32_t&) {
    for (Index i = 0; i < n; ++i) to[i / width * width + i % 2 * V::width + i % width / 2] = query[i];
    return 1.0F;
  }
};

/// q·k of int8 rows in integers (simd/narrow.hpp): queries as int8 with one scale each, keys as k + 128. The
/// excess of a sum, 128·Σq, is subtracted at the end.
struct Int8RowDot {
  using V = Simd<float>;
  using Vec = Isa::Sums;
  using Scalar = float;
  using Key = std::int8_t;
  using Query = std::int8_t;
  static constexpr const char* name = " multiplied in int8, values in int16";
  static constexpr Index width = 4 * Isa::lanes, lanes = Isa::lanes, parts = 1;
  static constexpr Index least_group = 2;  // query heads of a group from which on it pays: one waits for memory anyway

  static EIGEN_ALWAYS_INLINE Vec zero() { return Isa::broadcast_sum(0); }
  template <Index>
  static EIGEN_ALWAYS_INLINE Vec query(const std::int8_t* q) {
    Isa::Words v = Isa::load_words(q);
    Isa::hold(v);
    return Isa::as_sums(v);
  }
  template <Index>
  static EIGEN_ALWAYS_INLINE Vec key(const std::int8_t* k) {
    return Isa::as_sums(Isa::plus_128(Isa::load_words(k)));
  }
  template <Index>
  static EIGEN_ALWAYS_INLINE Vec key_n(const std::int8_t* k, Index n) {
    return Isa::as_sums(Isa::plus_128(Isa::load_words_n(k, n)));
  }
  static EIGEN_ALWAYS_INLINE Vec add_product(Vec q, Vec k, Vec sum) {
    return Isa::add_int8_products(sum, Isa::words_of(q), Isa::words_of(k));
  }
  static EIGEN_ALWAYS_INLINE void finish(Vec (&sum)[std::size_t(lanes)], const float* factor, const std::int32_t* shift,
                                         float* to) {
    const Vec products = Isa::subtract(Isa::sum_each(sum), Isa::load_sums(shift));
    V::store(to, V::mul(Isa::sums_to_float(products), V::load(factor)));
  }
  static float round(const float* query, Index n, std::int8_t* to, std::int32_t& shift) {
    const float scale = quantize_row(query, n, to);
    shift = 0;
    for (Index i = 0; i < n; ++i) shift += 128 * to[i];
    return scale / headroom<Key>;
  }
};
/// q·k of int8 rows in int16 (simd/narrow.hpp): queries with one scale each, keys widened once for all of them: 1.7 times
/// as fast as widened to float (Zen 3, four queries of 128), which takes longer than memory even for one query.
struct Int16RowDot {
  using V = Simd<float>;
  using Vec = Isa::Sums;
  using Scalar = float;
  using Key = std::int8_t;
  using Query = std::int16_t;
  static constexpr const char* name = " multiplied in int16";
  static constexpr Index width = 2 * Isa::lanes, lanes = Isa::lanes, parts = 1;

  static EIGEN_ALWAYS_INLINE Vec zero() { return Isa::broadcast_sum(0); }
  template <Index>
  static EIGEN_ALWAYS_INLINE Vec query(const std::int16_t* q) {
    Isa::Words v = Isa::load_words(q);
    Isa::hold(v);
    return Isa::as_sums(v);
  }
  template <Index>
  static EIGEN_ALWAYS_INLINE Vec key(const std::int8_t* k) {
    return Isa::as_sums(Isa::widen_int8(k));
  }
  template <Index>
  static EIGEN_ALWAYS_INLINE Vec key_n(const std::int8_t* k, Index n) {
    return Isa::as_sums(Isa::widen_int8_n(k, n));
  }
  static EIGEN_ALWAYS_INLINE Vec add_product(Vec q, Vec k, Vec sum) {
    return Isa::add_int16_products(sum, Isa::words_of(q), Isa::words_of(k));
  }
  static EIGEN_ALWAYS_INLINE void finish(Vec (&sum)[std::size_t(lanes)], const float* factor, const std::int32_t*,
                                         float* to) {
    V::store(to, V::mul(Isa::sums_to_float(Isa::sum_each(sum)), V::load(factor)));
  }
  static float round(const float* query, Index n, std::int16_t* to, std::int32_t&) {
    return quantize_row(query, n, to, static_cast<float>(largest_int16(n))) / headroom<Key>;
  }
};

/// What Arithmetic::automatic multiplies in, for groups of NarrowDot::least_group query heads and more, and for fewer: int8
/// is then no faster than int16, and where registers are wide neither is faster than float.
template <class T, class S>
inline constexpr bool multiplies_int8 = std::is_same_v<T, float>&& std::is_same_v<S, std::int8_t>;
template <class T, class S>
using FewDot = std::conditional_t<multiplies_int8<T, S> && Isa::int16_products && !TileShape<float>::wide, Int16RowDot,
                                  WidenedDot<T, S>>;
template <class T, class S>
using NarrowDot = std::conditional_t<multiplies_int8<T, S> && Isa::int8_products, Int8RowDot, FewDot<T, S>>;

/// f(std::type_identity<D>) of the D in which decode multiplies q·k for groups of so many query heads.
template <class T, class S, class F>
constexpr auto with_decode_dot(Arithmetic arithmetic, Index group_size, F&& f) {
  using Narrow = NarrowDot<T, S>;
  using Few = FewDot<T, S>;
  using Widened = WidenedDot<T, S>;
  if constexpr (!std::is_same_v<Narrow, Few>)
    if (arithmetic != Arithmetic::exact && group_size >= Narrow::least_group) return f(std::type_identity<Narrow>{});
  if constexpr (!std::is_same_v<Few, Widened>)
    if (arithmetic != Arithmetic::exact) return f(std::type_identity<Few>{});
  return f(std::type_identity<Widened>{});
}
/// Whether that is narrower than the scalar.
template <class T, class S>
constexpr bool decode_is_narrow(Arithmetic arithmetic, Index group_size) {
  return with_decode_dot<T, S>(arithmetic, group_size,
                               []<class D>(std::type_identity<D>) { return !std::is_same_v<D, WidenedDot<T, S>>; });
}

}}}  // namespace qkv::QKV_ABI::kernel

#include "../../base/warnings_on.hpp"

// storage.hpp — the number types of caches and weights: float, half, bfloat16, int8 with one scale per row (and double, for
// tests). Each is one entry of storage_traits.
//
// Row of integers: scale = max|x| / largest, q_i = round_to_nearest_even(x_i / scale), x_i ≈ q_i · scale; largest = 127 for int8.
// Error at most scale / 2. A row of zeros has scale 0; a row with a number that is not finite has scale NaN, so that it is
// read back as NaN. The scale is never so large that `largest` of it overflow: what was finite is read back finite.
//
// Before: matrix.hpp   Next: embedding.hpp
#pragma once

#include <cmath>
#include <concepts>
#include <cstdint>
#include <limits>
#include <tuple>
#include <type_traits>

#include "matrix.hpp"

namespace qkv { inline namespace QKV_ABI {

using half = Eigen::half;          // IEEE 754 binary16
using bfloat16 = Eigen::bfloat16;  // upper half of a float

/// What the library must know of a storage type beside its conversions to and from float.
struct StorageTraits {
  const char* name = "other";
  std::uint32_t file_code = 0;  // in saved caches; 0: they cannot be saved
  float largest = 0;  // rows are integers of at most so much, times one scale each; 0: numbers without a scale
};

/// Of every storage. Types of your own need an entry only if they are to have a name, saved caches or a row scale.
template <class S>
inline constexpr StorageTraits storage_traits{};
template <>
inline constexpr StorageTraits storage_traits<float>{"f32", 1};
template <>
inline constexpr StorageTraits storage_traits<double>{"f64", 2};
template <>
inline constexpr StorageTraits storage_traits<half>{"f16", 3};
template <>
inline constexpr StorageTraits storage_traits<bfloat16>{"bf16", 4};
template <>
inline constexpr StorageTraits storage_traits<std::int8_t>{"int8", 5, 127};

/// What caches of float attention are kept in: tests, benchmarks and tools go through all of them.
using StorageTypes = std::tuple<float, half, bfloat16, std::int8_t>;

/// Whether rows carry a scale. Every other storage stands for itself.
template <class S>
inline constexpr bool has_row_scale = storage_traits<S>.largest > 0;

/// Rows of integers with a scale, or anything that stands for a real number (your own scalar too, with kernel::reference).
template <class S>
concept StorageType = has_row_scale<S> || !std::integral<S>;

/// The type of numbers that stand beside an S and must not be quantised (MLA's rope key beside an int8 latent).
template <StorageType S>
using WideStorage = std::conditional_t<has_row_scale<S>, float, S>;

template <StorageType S>
inline constexpr const char* storage_name = storage_traits<S>.name;

/// Bytes of a row of n elements, its scale included. std::length_error where they do not fit an Index.
template <StorageType S>
constexpr Index row_bytes(Index n) {
  return detail::checked_sum(detail::checked_product(n, static_cast<Index>(sizeof(S))),
                             has_row_scale<S> ? static_cast<Index>(sizeof(float)) : 0);
}

/// Quantises x[0..n) to out[0..n), integers of at most `most`, and returns the row's scale: 0 for zeros, NaN where a number
/// is not finite.
template <class T, class Q>
float quantize_row(const T* x, Index n, Q* out, float most = 127.0F) {
  constexpr float finite_max = std::numeric_limits<float>::max();
  float amax = 0;
  bool finite = true;
  for (Index i = 0; i < n; ++i) {
    const float a = std::abs(static_cast<float>(x[i]));
    finite = finite && a <= finite_max;  // false for NaN too
    amax = a > amax ? a : amax;
  }
  float scale = finite ? amax / most : std::numeric_limits<float>::quiet_NaN();
  if (scale * most > finite_max) scale = std::nextafter(scale, 0.0F);  // or what is restored would be infinite
  const bool usable = scale > 0;
  for (Index i = 0; i < n; ++i) {
    // nearbyint rounds to nearest even in the default rounding mode; a subnormal scale may overshoot.
    const float q = usable ? std::nearbyint(static_cast<float>(x[i]) / scale) : 0.0F;
    out[i] = static_cast<Q>(q > most ? most : q < -most ? -most : q);
  }
  return scale;
}

/// Writes n numbers as a row of storage S; `scale` is written where S has one (and may be null where it has none).
template <StorageType S, class T>
void store_row(const T* x, Index n, S* out, float* scale) {
  if constexpr (has_row_scale<S>) {
    *scale = quantize_row(x, n, out, storage_traits<S>.largest);
  } else {
    for (Index i = 0; i < n; ++i) out[i] = static_cast<S>(x[i]);
  }
}

/// Reads a row of storage S back: x = q · scale.
template <class T, StorageType S>
void load_row(const S* row, Index n, [[maybe_unused]] float scale, T* out) {
  if constexpr (has_row_scale<S>) {
    for (Index i = 0; i < n; ++i) out[i] = static_cast<T>(row[i]) * static_cast<T>(scale);
  } else {
    for (Index i = 0; i < n; ++i) out[i] = static_cast<T>(row[i]);
  }
}

}}  // namespace qkv::QKV_ABI

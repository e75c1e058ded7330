// storage.hpp — how cached numbers are kept: float, half, bfloat16, int8 with one scale per row (and double, for tests).
//
// int8 row: scale = max|x| / 127, q_i = round_to_nearest_even(x_i / scale), x_i ≈ q_i · scale. Error at most scale / 2.
// A row of zeros has scale 0; a row with a number that is not finite has scale NaN, so that NaN reaches whoever reads it.
// The scale is never so large that 127 of it overflow: what was finite is read back finite.
//
// Before: matrix.hpp   Next: embedding.hpp
#pragma once

#include <cmath>
#include <concepts>
#include <cstdint>
#include <limits>

#include "matrix.hpp"

namespace qkv { inline namespace QKV_ABI {

using half = Eigen::half;          // IEEE 754 binary16
using bfloat16 = Eigen::bfloat16;  // upper half of a float

/// int8 or anything that stands for a real number (your own scalar too, with kernel::reference).
template <class S>
concept StorageType = std::same_as<S, std::int8_t> || !std::integral<S>;

/// int8 rows carry a scale; every other storage stands for itself.
template <StorageType S>
inline constexpr bool has_row_scale = std::same_as<S, std::int8_t>;

/// The wide type in which what belongs to an S but must not be quantised is kept (MLA's rope key beside an int8 latent).
template <StorageType S>
using WideStorage = std::conditional_t<has_row_scale<S>, float, S>;

template <StorageType S>
inline constexpr const char* storage_name = std::same_as<S, float>         ? "f32"
                                            : std::same_as<S, double>      ? "f64"
                                            : std::same_as<S, half>        ? "f16"
                                            : std::same_as<S, bfloat16>    ? "bf16"
                                            : std::same_as<S, std::int8_t> ? "int8"
                                                                           : "other";

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
    *scale = quantize_row(x, n, out);
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

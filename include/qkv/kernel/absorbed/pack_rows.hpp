// kernel/absorbed/pack_rows.hpp — latent rows packed for narrow products: values, and scales and offsets beside them.
//
//     rows of a block          values of two keys                  values of four keys
//     c        a₀ a₁ a₂ …      (a₀ b₀) (a₁ b₁) (a₂ b₂) …           (a₀ b₀ c₀ d₀) (a₁ b₁ c₁ d₁) …
//     c + 1    b₀ b₁ b₂ …      bf16: words of bfloat16             int8: words of int8
//                              int16: pairs of bytes
//
//     Σ q·c = Σ (q + 128)·c + offset      offset = -128·Σ c, where keys are int8: simd/narrow.hpp
//     integer weights include the scale of the value row: kernel/register_softmax.hpp
//
// Lanes of the second product are features: a word of weights, broadcast, meets the same keys in all of them.
//
// Before: kernel/absorbed/blocks.hpp   Next: kernel/absorbed/queries.hpp
#pragma once

#include <algorithm>
#include <cstdint>

#include "../../simd/narrow.hpp"
#include "../../simd/simd.hpp"
#include "../../storage.hpp"
#include "../arithmetic.hpp"

#include "../../base/warnings_off.hpp"

namespace qkv { inline namespace QKV_ABI { namespace kernel::absorbed {

/// A row of any storage as T.
template <class T, StorageType S>
void widen_row(const S* from, Index n, float scale, T* to) {
  using V = Simd<T>;
  const auto factor = V::broadcast(static_cast<T>(scale));
  for (Index x = 0; x < n; x += V::width) {
    auto v = x + V::width <= n ? V::load(from + x) : V::load_n(from + x, n - x);
    if constexpr (has_row_scale<S>) v = V::mul(v, factor);
    V::store_n(to + x, v, std::min(V::width, n - x));
  }
}

/// The rows of columns [begin, end) of a block: `dim` numbers each, `step` apart.
template <class N>
struct ColumnRows {
  const N* first;
  Index step, begin, end, dim;

  const N* row(Index column) const { return first + (column - begin) * step; }
  bool holds(Index column) const { return column >= begin && column < end; }
};

// ---- a rope key as it is multiplied, n numbers ----
inline void pack_rope(const float* from, Index n, float* to) { std::copy_n(from, n, to); }
/// To pairs of bfloat16, zeros up to a multiple of 2·lanes.
inline void pack_rope(const float* from, Index n, Word* to) {
  using V = Simd<float>;
  const auto part = [&](Index x) { return x >= n ? V::zero() : V::load_n(from + x, std::min(V::width, n - x)); };
  for (Index x = 0; x < n; x += 2 * V::width)
    Isa::store_words(to + x / 2, Isa::round_to_finite_bf16(part(x), part(x + V::width)));
}

// ---- values: two or four rows into one of words ----
/// 2·lanes features of the row of a column as bfloat16.
inline Isa::Words load_bf16(const bfloat16* from, const float*, Index) { return Isa::load_words(from); }
inline Isa::Words load_bf16(const std::int8_t* from, const float* scales, Index column) {
  using V = Simd<float>;
  const V::Vec scale = V::broadcast(scales[column]);
  return Isa::round_to_bf16(V::mul(V::load(from), scale), V::mul(V::load(from + V::width), scale));
}
/// (v[c][x], v[c + 1][x]) as bfloat16.
template <class N>
void pack_bf16_values(const ColumnRows<N>& rows, const float* scales, Word* packed, Index step) {
  for (Index c = rows.begin / 2 * 2; c < rows.end; c += 2) {
    Word* const to = packed + c / 2 * step;
    const bool has[] = {rows.holds(c), rows.holds(c + 1)};
    const N* const from[] = {has[0] ? rows.row(c) : nullptr, has[1] ? rows.row(c + 1) : nullptr};
    for (Index x = 0; x < rows.dim; x += 2 * Isa::lanes) {
      const Isa::Words a = has[0] ? load_bf16(from[0] + x, scales, c) : Isa::broadcast_word(0);
      const Isa::Words b = has[1] ? load_bf16(from[1] + x, scales, c + 1) : Isa::broadcast_word(0);
      Isa::Words low, high;
      Isa::interleave_bf16(a, b, low, high);
      Isa::store_words(to + x, low);
      Isa::store_words(to + x + Isa::lanes, high);
    }
  }
}
inline void pack_values(Bf16, const ColumnRows<bfloat16>& rows, const float* scales, Word* to, Index step) {
  pack_bf16_values(rows, scales, to, step);
}
inline void pack_values(Int8Bf16, const ColumnRows<std::int8_t>& rows, const float* scales, Word* to, Index step) {
  pack_bf16_values(rows, scales, to, step);
}
/// Four rows as they are stored.
inline void pack_values(Int8, const ColumnRows<std::int8_t>& rows, const float*, Word* packed, Index step) {
  for (Index c = rows.begin / 4 * 4; c < rows.end; c += 4) {
    Word* const to = packed + c / 4 * step;
    const auto at = [&](Index column, Index x) {
      return rows.holds(column) ? Isa::load_int8(rows.row(column) + x) : Isa::load_int8_n(nullptr, 0);
    };
    for (Index x = 0; x < rows.dim; x += Isa::lanes)
      Isa::store_words(to + x, Isa::quad_int8(at(c, x), at(c + 1, x), at(c + 2, x), at(c + 3, x)));
  }
}
/// Two rows as they are stored. A column that holds none beside one that does has a weight of zero: any row will do.
template <class A>
void pack_values(A, const ColumnRows<std::int8_t>& rows, const float*, BytePair* to, Index step) {
  static_assert(A::int16_values);
  for (Index c = rows.begin / 2 * 2; c < rows.end; c += 2)
    Isa::interleave_rows(rows.row(std::max(c, rows.begin)), rows.row(std::min(c + 1, rows.end - 1)),
                         (rows.dim + 15) / 16 * 16, to + c / 2 * step);
}

/// -128·Σ of every row; rows are read up to a multiple of 4·lanes numbers, zeros after the last.
inline void sum_offsets(const ColumnRows<std::int8_t>& rows, std::int32_t* offsets) {
  const Isa::Words ones = Isa::broadcast_word(0x01010101);
  for (Index c = rows.begin; c < rows.end; c += Isa::lanes) {
    const Index some = std::min(Isa::lanes, rows.end - c);
    Isa::Sums sums[std::size_t(Isa::lanes)];
    for (Index i = 0; i < Isa::lanes; ++i) {
      sums[i] = Isa::broadcast_sum(0);
      for (Index x = 0; i < some && x < rows.dim; x += 4 * Isa::lanes)
        sums[i] = Isa::add_int8_products(sums[i], Isa::load_words(rows.row(c + i) + x), ones);
    }
    std::int32_t total[std::size_t(Isa::lanes)];
    Isa::store_sums(total, Isa::sum_each(sums));
    for (Index i = 0; i < some; ++i) offsets[c + i] = -128 * total[i];
  }
}

}}}  // namespace qkv::QKV_ABI::kernel::absorbed

#include "../../base/warnings_on.hpp"

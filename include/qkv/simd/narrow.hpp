// simd/narrow.hpp — products of narrow numbers, a word of 32 bits at a time: two bfloat16 or int16, or four int8, of one row.
//
//     Bf16Dot     c += a₀b₀ + a₁b₁                           products and sums in float
//     Int8Dot     c += Σ₄ aᵢ·bᵢ,   a signed, b unsigned       exact in 32 bits
//     Int16Dot    c += a₀b₀ + a₁b₁                           exact in 32 bits
//
// Which of them the compiler has: Isa::bf16_products, int8_products, int16_products (simd/isa/general.hpp).
//
// Signs of int8: a query's is stored as q + 128, so a sum begins at -128·Σ(key row).
//
// In int16 a key stored as int8 is widened as it is loaded. The other operand is quantised to integers |a| <=
// largest_int16(n), so that a sum of n products fits: with an error of 2⁻¹⁶ of its largest number for n <= 512, 2⁻¹² for
// n = 8192. Zen 3 issues 1.64 such products per cycle: 1.64 times as many multiply-adds as in float.
//
//     rows where they lie    a lane is a register of sums        int16_scores: absorbed attention
//     panels                 a word of a row is broadcast        product/narrow_tile.hpp; for values a word is two or four
//                                                                keys of a feature
//
// Before: simd/exp2.hpp   Next: simd/isa.hpp
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>

#include "simd.hpp"

#include "../base/warnings_off.hpp"

namespace qkv { inline namespace QKV_ABI { namespace kernel {

/// Words [first, first + lanes) of a row of `bytes` bytes; zeros after its end, and no access past it.
EIGEN_ALWAYS_INLINE Isa::Words row_words(const void* row, Index bytes, Index first) {
  return Isa::load_words_n(static_cast<const char*>(row) + first * 4, bytes - first * 4);
}

/// What dots of words have in common. begin and end: of a score, in product/narrow_tile.hpp; start and finish: of a value, in
/// kernel/value_tile.hpp.
struct WordDot {
  using Number = Word;
  using Row = Word;  // what a row of values is made of
  using V = Simd<float>;
  static constexpr Index width = Isa::lanes;
  static EIGEN_ALWAYS_INLINE Isa::Words load(const Word* p) { return Isa::load_words(p); }
  static EIGEN_ALWAYS_INLINE Isa::Words broadcast(Word x) { return Isa::broadcast_word(x); }
};
struct Bf16Dot : WordDot {
  using Sum = V::Vec;
  static EIGEN_ALWAYS_INLINE Sum dot(Sum c, Isa::Words a, Isa::Words b) { return Isa::add_bf16_products(c, a, b); }
  static EIGEN_ALWAYS_INLINE Sum begin(const std::int32_t*, Index) { return V::zero(); }
  static EIGEN_ALWAYS_INLINE V::Vec end(Sum s, const float*, Index) { return s; }
  static EIGEN_ALWAYS_INLINE Sum start(const float* o) { return V::load(o); }
  static EIGEN_ALWAYS_INLINE void finish(float* o, Sum s, const float*) { V::store(o, s); }
};
/// Of integers: scaled at the end, a score by its key's scale, a value by the quantisation step of the weights.
struct IntegerDot : WordDot {
  using Sum = Isa::Sums;
  static EIGEN_ALWAYS_INLINE V::Vec to_float(Sum s) { return Isa::sums_to_float(s); }
  static EIGEN_ALWAYS_INLINE V::Vec end(Sum s, const float* scale, Index row) {
    return V::mul(to_float(s), V::broadcast(scale[row]));
  }
  static EIGEN_ALWAYS_INLINE Sum start(const float*) { return Isa::broadcast_sum(0); }
  static EIGEN_ALWAYS_INLINE void finish(float* o, Sum s, const float* value_step) {
    V::store(o, V::fma(to_float(s), V::load(value_step), V::load(o)));
  }
};
struct Int8Dot : IntegerDot {
  static EIGEN_ALWAYS_INLINE Sum dot(Sum c, Isa::Words a, Isa::Words b) { return Isa::add_int8_products(c, a, b); }
  static EIGEN_ALWAYS_INLINE Sum begin(const std::int32_t* offset, Index row) {
    return Isa::broadcast_sum(offset[row]);
  }
};

/// Two int8: one feature of two keys.
using BytePair = std::uint16_t;

/// Values as they are stored, pairs of bytes, are widened as they are loaded.
struct Int16Dot : IntegerDot {
  using Row = BytePair;
  using IntegerDot::load;
  static EIGEN_ALWAYS_INLINE Isa::Words load(const BytePair* p) {
    return Isa::widen_int8(reinterpret_cast<const std::int8_t*>(p));
  }
  static EIGEN_ALWAYS_INLINE Sum dot(Sum c, Isa::Words a, Isa::Words b) { return Isa::add_int16_products(c, a, b); }
  static EIGEN_ALWAYS_INLINE Sum begin(const std::int32_t*, Index) { return Isa::broadcast_sum(0); }
};

/// The largest |a| where n products with int8 are added up: min(2¹⁵ - 1, (2³¹ - 1) / (128·n)).
constexpr Index largest_int16(Index n) {
  return std::clamp<Index>((Index{1} << 24) / std::max<Index>(n, 1) - 1, 1, 32767);
}

// ---- rows into panels of words ----
/// `height` columns of words from rows <= lanes rows, [words][height]: row(r, w) is the register of the words from w on.
template <class F>
EIGEN_ALWAYS_INLINE void pack_columns(Index rows, Index height, Index words, Word* to, F&& row) {
  using V = Simd<float>;
  for (Index w = 0; w < words; w += Isa::lanes) {
    V::Vec block[V::lanes];
    for (Index r = 0; r < Isa::lanes; ++r) block[r] = r < rows ? Isa::as_float(row(r, w)) : V::zero();
    V::transpose(block);
    for (Index i = 0; i < std::min(Isa::lanes, words - w); ++i)
      V::store(reinterpret_cast<float*>(to + (w + i) * height), block[i]);
  }
}
/// Rows of `bytes` bytes, `stride` bytes apart -> [words][height], rows <= height <= lanes; zeros past `rows`. `to` needs room
/// for pack_slack words more.
inline void pack_words(const void* from, Index stride, Index rows, Index height, Index bytes, Word* to) {
  pack_columns(rows, height, (bytes + 3) / 4, to,
               [&](Index r, Index w) { return row_words(static_cast<const char*>(from) + r * stride, bytes, w); });
}
/// Rows of d int8, `stride` apart -> words of two features in int16, likewise.
inline void pack_int16(const std::int8_t* from, Index stride, Index rows, Index height, Index d, Word* to) {
  pack_columns(rows, height, (d + 1) / 2, to,
               [&](Index r, Index w) { return Isa::widen_int8_n(from + r * stride + 2 * w, d - 2 * w); });
}
/// Two int16 in one word.
constexpr Word word_of_int16(std::int16_t low, std::int16_t high) {
  return Word{static_cast<std::uint16_t>(low)} | Word{static_cast<std::uint16_t>(high)} << 16;
}

// ---- rows where they lie ----
/// Rows of int8 with a scale each, `stride` bytes apart, readable up to a multiple of 2·lanes.
struct Int16Rows {
  Index steps;  // registers of a row
  const std::int8_t* row;
  Index stride;
  const float* scale;
};
template <std::size_t... Lane>
EIGEN_ALWAYS_INLINE Isa::Sums multiply_int16_row(const Int16Rows& rows, const Word* q, std::index_sequence<Lane...>) {
  Isa::Sums sum[] = {Isa::broadcast_sum(std::int32_t(Lane) * 0)...};
  const std::int8_t* k = rows.row;
  for (Index step = rows.steps; step > 0; --step, k += 2 * Isa::lanes, q += Isa::lanes * Isa::lanes) {
    Isa::Words key = Isa::widen_int8(k);
    Isa::hold(key);
    ((sum[Lane] = Isa::add_int16_products(sum[Lane], key, Isa::load_words(q + Index(Lane) * Isa::lanes))), ...);
  }
  return Isa::sum_each(sum);
}
/// s(j, lane) = scale(j)·query_scale(lane)·Σ row(j)·q(lane) for n rows and Vectors registers of lanes. Each lane
/// accumulates in a register of its own, all reduced by one tree: a row is widened once for a register of lanes. q [Vectors][steps][lanes] of
/// 2·lanes int16 each, s [n][Vectors·width].
template <Index Vectors>
void int16_scores(Int16Rows rows, Index n, const Word* q, const float* query_scale, float* s) {
  using V = Simd<float>;
  for (; n > 0; --n, rows.row += rows.stride, ++rows.scale)
    for (Index v = 0; v < Vectors; ++v, s += Isa::lanes) {
      const Isa::Sums sum = multiply_int16_row(rows, q + v * rows.steps * Isa::lanes * Isa::lanes,
                                               std::make_index_sequence<std::size_t(Isa::lanes)>{});
      V::store(
          s, V::mul(Isa::sums_to_float(sum), V::mul(V::broadcast(*rows.scale), V::load(query_scale + v * Isa::lanes))));
    }
}

}}}  // namespace qkv::QKV_ABI::kernel

#include "../base/warnings_on.hpp"

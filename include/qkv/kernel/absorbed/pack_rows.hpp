// kernel/absorbed/pack_rows.hpp — latent rows in narrow numbers, made ready: values packed, scales and offsets beside them.
//
//     rows of a block          values of two keys                  values of four keys
//     c        a₀ a₁ a₂ …      (a₀ b₀) (a₁ b₁) (a₂ b₂) …           (a₀ b₀ c₀ d₀) (a₁ b₁ c₁ d₁) …
//     c + 1    b₀ b₁ b₂ …      pairs, quads: words of bfloat16     bytes: words of int8
//                              shorts: pairs of bytes
//
//     Σ q·c = Σ (q + 128)·c + offset      offset = -128·Σ c, of rows in int8 (quads, bytes): simd/words.hpp
//     weights in whole steps take in the scale of the value row: kernel/register_softmax.hpp
//
// Lanes of the second product are features: a word of weights, broadcast, meets the same keys in all of them.
//
// Before: kernel/absorbed/blocks.hpp   Next: kernel/absorbed/queries.hpp
#pragma once

#include <algorithm>
#include <cstdint>

#include "../../simd/shorts.hpp"
#include "../../simd/simd.hpp"
#include "../../simd/words.hpp"
#include "../../storage.hpp"
#include "../arithmetic.hpp"

#include "../../base/warnings_off.hpp"

namespace qkv { inline namespace QKV_ABI { namespace kernel::absorbed {

/// The rows of columns [begin, end) of a block: `dim` numbers each, `step` apart.
template <class N>
struct ColumnRows {
  const N* first;
  Index step, begin, end, dim;

  const N* row(Index column) const { return first + (column - begin) * step; }
  bool holds(Index column) const { return column >= begin && column < end; }
};

#ifdef QKV_DETAIL_SHORTS
/// A rope key as it is multiplied.
inline void pack_rope(const float* from, Index n, float* to) { std::copy_n(from, n, to); }

/// Values: two rows into one of pairs. A column that holds none beside one that does has a weight of zero: any row will do.
inline void pack_values(Shorts, const ColumnRows<std::int8_t>& rows, const float*, BytePair* to, Index step) {
  for (Index c = rows.begin / 2 * 2; c < rows.end; c += 2)
    pair_bytes(rows.row(std::max(c, rows.begin)), rows.row(std::min(c + 1, rows.end - 1)), (rows.dim + 15) / 16 * 16,
               to + c / 2 * step);
}
#endif

#ifdef QKV_DETAIL_WORDS
/// A rope key as it is multiplied, also in int8: n numbers to pairs of bfloat16, zeros up to a multiple of 32.
inline void pack_rope(const float* from, Index n, Word* to) {
  const auto part = [&](Index x) {
    return x >= n ? _mm512_setzero_ps() : Simd<float>::load_n(from + x, std::min<Index>(16, n - x));
  };
  for (Index x = 0; x < n; x += 32) store_words(to + x / 2, to_halves(part(x), part(x + 16)));
}

/// 32 features of the row of a column as bfloat16.
inline __m512i halves(const bfloat16* from, const float*, Index) { return _mm512_loadu_si512(from); }
inline __m512i halves(const std::int8_t* from, const float* scales, Index column) {
  const __m512 scale = _mm512_set1_ps(scales[column]);
  return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(_mm512_mul_ps(Simd<float>::load(from + 16), scale),
                                                       _mm512_mul_ps(Simd<float>::load(from), scale)));
}
/// Values: two rows into one of words, (v[c][x], v[c + 1][x]) as bfloat16.
template <class N>
void pack_pairs(const ColumnRows<N>& rows, const float* scales, Word* packed, Index step) {
  const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37,
                                       5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
  const __m512i high = _mm512_set_epi16(63, 31, 62, 30, 61, 29, 60, 28, 59, 27, 58, 26, 57, 25, 56, 24, 55, 23, 54, 22,
                                        53, 21, 52, 20, 51, 19, 50, 18, 49, 17, 48, 16);
  for (Index c = rows.begin / 2 * 2; c < rows.end; c += 2) {
    Word* const to = packed + c / 2 * step;
    const bool has[] = {rows.holds(c), rows.holds(c + 1)};
    const N* const from[] = {has[0] ? rows.row(c) : nullptr, has[1] ? rows.row(c + 1) : nullptr};
    for (Index x = 0; x < rows.dim; x += 32) {
      const __m512i a = has[0] ? halves(from[0] + x, scales, c) : _mm512_setzero_si512();
      const __m512i b = has[1] ? halves(from[1] + x, scales, c + 1) : _mm512_setzero_si512();
      store_words(to + x, _mm512_permutex2var_epi16(a, low, b));
      store_words(to + x + 16, _mm512_permutex2var_epi16(a, high, b));
    }
  }
}
inline void pack_values(Pairs, const ColumnRows<bfloat16>& rows, const float* scales, Word* to, Index step) {
  pack_pairs(rows, scales, to, step);
}
inline void pack_values(Quads, const ColumnRows<std::int8_t>& rows, const float* scales, Word* to, Index step) {
  pack_pairs(rows, scales, to, step);
}
/// Values: four rows into one of words, as they are stored.
inline void pack_values(Bytes, const ColumnRows<std::int8_t>& rows, const float*, Word* packed, Index step) {
  for (Index c = rows.begin / 4 * 4; c < rows.end; c += 4) {
    Word* const to = packed + c / 4 * step;
    const auto at = [&](Index column, Index x) {
      if (!rows.holds(column)) return _mm_setzero_si128();
      return _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows.row(column) + x));
    };
    for (Index x = 0; x < rows.dim; x += 16)
      store_words(to + x, to_quads(at(c, x), at(c + 1, x), at(c + 2, x), at(c + 3, x)));
  }
}

/// Offsets of the rows, 16 at a time; rows are read up to a multiple of 64 numbers, zeros after the last.
inline void take_offsets(const ColumnRows<std::int8_t>& rows, std::int32_t* offsets) {
  const __m512i ones = _mm512_set1_epi8(1);
  for (Index c = rows.begin; c < rows.end; c += 16) {
    const Index some = std::min<Index>(16, rows.end - c);
    __m512 sums[16];
    for (Index i = 0; i < 16; ++i) {
      __v16si sum = reinterpret_cast<__v16si>(_mm512_setzero_si512());
      if (i < some)
        for (Index x = 0; x < rows.dim; x += 64)
          sum = reinterpret_cast<__v16si>(
              _mm512_dpbusd_epi32(reinterpret_cast<__m512i>(sum), ones, _mm512_loadu_si512(rows.row(c + i) + x)));
      sums[i] = _mm512_cvtepi32_ps(reinterpret_cast<__m512i>(sum));
    }
    Simd<float>::transpose(sums);
    __m512 total = sums[0];
    for (Index i = 1; i < 16; ++i) total = _mm512_add_ps(total, sums[i]);
    const __m512i offset = _mm512_cvtps_epi32(_mm512_mul_ps(total, _mm512_set1_ps(-128.0F)));  // whole numbers: exact
    _mm512_mask_storeu_epi32(offsets + c, static_cast<__mmask16>((1U << some) - 1U), offset);
  }
}
#endif

}}}  // namespace qkv::QKV_ABI::kernel::absorbed

#include "../../base/warnings_on.hpp"

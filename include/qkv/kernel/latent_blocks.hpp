// kernel/latent_blocks.hpp — a block of latent rows as absorbed attention multiplies it: in place where it can be.
//
//     exact    rows   float rows of one run: where they lie in the cache; else a copy, widened and without gaps
//              values the same rows
//     pairs    rows   bfloat16 rows, likewise                          values  [pair of keys][latent_dim] words, packed
//     quads    rows   int8 latents, likewise; rope keys as bfloat16    values  the same, restored and rounded to bfloat16
//     bytes    rows   as in quads                                      values  [four keys][latent_dim] words as stored, and
//                                                                              the logarithms of their scales
//     shorts   rows   int8 latents and float rope keys, likewise    values  [pair of keys][latent_dim] pairs of bytes as
//                                                                           stored, and their scales
//
// Columns that hold no row are zeros and hidden by whoever attends. A block is prepared once for all heads of a work item.
//
// Before: kernel/latent_grid.hpp   Next: kernel/latent_queries.hpp
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <utility>

#include "../detail/latent_rows.hpp"
#include "../storage.hpp"
#include "../workspace.hpp"
#include "latent_grid.hpp"
#include "latent_tiles.hpp"
#include "value_tile.hpp"

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // of AVX-512 intrinsics, as in kernel/simd.hpp
#endif

namespace qkv::inline QKV_ABI::kernel::absorbed {

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

/// One block at a time, prepared for arithmetic A in scratch of its own.
template <class A, class T, StorageType S>
class BlockRows {
  using Number = typename A::Number;
  using Element = std::conditional_t<A::words, S, T>;  // of rows
  using Value = typename ValueDot<A>::Row;
  using RopeNumber = RopeDot::Number;
  static constexpr bool words = A::words, quads = A::quads;
  static constexpr Index n_rows = block_rows<words>;
  static constexpr Index unit = quads ? 64 : words ? 32 : Simd<T>::width;  // rows are read up to a multiple of it

 public:
  BlockRows(detail::Carver& carver, const LatentRows<S>& rows, Index parts) : rows_(rows), parts_(parts) {
    copy_ = carver.take<Element>(n_rows * copy_step());
    if constexpr (words) packed_ = carver.take<Value>(n_rows / A::keys * packed_step());
    if constexpr (A::scaled)
      rope_ = carver.take<RopeNumber>(n_rows * rope_step()), scales_ = carver.take<float>(n_rows);
    if constexpr (quads) offsets_ = carver.take<std::int32_t>(n_rows);
    if constexpr (A::bytes) logs_ = carver.take<float>(n_rows), inverses_ = carver.take<float>(n_rows);
    if constexpr (A::shorts) value_scales_ = carver.take<float>(n_rows);
  }

  void prepare(const Place& place) {
    place_ = place;
    inspected_ = false;
    n_dropped_ = 0;
    const LatentRun<S>& run = rows_.runs[place.run];
    if (in_place(place)) {
      if constexpr (!words || std::is_same_v<S, Element>) first_ = reinterpret_cast<const Element*>(latent(run, place));
      step_ = rows_.latent_row_stride;
    } else {
      copy();
    }
    if constexpr (A::scaled) this->weigh_rows(), this->take_rope();
    if constexpr (words) this->pack_values();
  }

  const Place& place() const { return place_; }
  /// The row of a column that is held, and the bytes from one to the next.
  const Element* row(Index column) const { return first_ + (column - place_.begin) * step_; }
  Index stride() const { return step_ * Index(sizeof(Element)); }
  /// Values from column c on (words: the first of one), and the numbers from one (one word) to the next.
  const Value* values(Index column) const {
    if constexpr (words)
      return packed_ + column / A::keys * packed_step();
    else
      return row(column);
  }
  Index value_step() const { return words ? packed_step() : step_; }
  const RopeNumber* rope(Index column) const {
    if constexpr (A::shorts)
      if (place_.whole)
        return rows_.rope(rows_.runs[place_.run], place_.row) + (column - place_.begin) * rows_.rope_row_stride;
    return rope_ + column * rope_step();
  }
  Index rope_stride() const {
    const Index step = A::shorts && place_.whole ? rows_.rope_row_stride : rope_step();
    return step * Index(sizeof(RopeNumber));
  }
  const float* scales(Index column) const { return scales_ + column; }
  const std::int32_t* offsets(Index column) const { return offsets_ + column; }
  /// Bytes: log2 and inverse of the scale of each column.
  const float* logs() const { return logs_; }
  const float* inverses() const { return inverses_; }
  /// Shorts: scales of the columns, zero where a row is not finite.
  const float* value_scales() const { return value_scales_; }

  /// Columns whose latent is not finite, ascending: a weight of zero must not meet them. Words of them become zeros.
  /// Asked for where a score is not finite, as every score of such a row is.
  std::pair<const Index*, Index> dropped() {
    if (!inspected_) inspect();
    return {dropped_.data(), n_dropped_};
  }
  /// The latent of a column as T.
  void load_latent(Index column, T* to) const {
    for_each_piece<n_rows>(rows_, place_, [&](const LatentRun<S>& run, Index, Index row, Index count, Index at) {
      if (column >= at && column < at + count) {
        const Index r = row + column - at;
        widen_row(rows_.latent(run, r), rows_.latent_dim, rows_.scale(run, r), to);
      }
    });
  }

 private:
  Index copied_dim() const { return A::scaled ? rows_.latent_dim : rows_.latent_dim + rows_.rope_dim; }
  Index copy_step() const { return round_up(copied_dim(), unit) + unit; }
  Index rope_step() const { return round_up(rows_.rope_dim, 32) / rope_features; }
  Index packed_step() const {
    return round_up(rows_.latent_dim, 32) + 16;
  }  // not a multiple of 4 KB: all in one L1 set
  const S* latent(const LatentRun<S>& run, const Place& place) const { return rows_.latent(run, place.row); }

  bool in_place(const Place& place) const {
    if (!place.whole || !std::is_same_v<S, Element> || rows_.latent_dim % unit != 0) return false;
    if constexpr (A::scaled || has_row_scale<S>)
      return A::scaled;
    else
      return rows_.rope_dim % (A::features * parts_) == 0 && rows_.rope_row_stride == rows_.latent_row_stride &&
             rows_.rope(rows_.runs[place.run], 0) == rows_.latent(rows_.runs[place.run], 0) + rows_.latent_dim;
  }

  void copy() {
    const Index step = copy_step(), latent = rows_.latent_dim;
    [[maybe_unused]] const Index rope = rows_.rope_dim;
    first_ = copy_ + place_.begin * step;
    step_ = step;
    Index next = place_.begin;  // columns before it are done
    const auto clear = [&](Index to) {
      for (; next < to; ++next) {
        std::fill_n(copy_ + next * step, step, Element(0));
      }
    };
    for_each_piece<n_rows>(rows_, place_, [&](const LatentRun<S>& run, Index, Index row, Index count, Index column) {
      clear(column);
      for (Index i = 0; i < count; ++i, ++next) {
        Element* const to = copy_ + next * step;
        const S* const c = rows_.latent(run, row + i);
        [[maybe_unused]] const WideStorage<S>* const r = rows_.rope(run, row + i);
        if constexpr (!words) {
          widen_row(c, latent, rows_.scale(run, row + i), to);
          widen_row(r, rope, 1.0F, to + latent);
        } else if constexpr (A::scaled) {
          std::copy_n(c, latent, to);
        } else {
          std::copy_n(c, latent, to);
          std::copy_n(r, rope, to + latent);
        }
        std::fill(to + copied_dim(), to + step, Element(0));
      }
    });
  }

  static constexpr Word key_bits = 0xFFFFFFFFU >> (32 - 32 / A::keys);  // of one key in a word of values
  void inspect() {
    inspected_ = true;
    for_each_piece<n_rows>(rows_, place_, [&](const LatentRun<S>& run, Index, Index row, Index count, Index column) {
      for (Index i = 0; i < count; ++i) {
        const S* const c = rows_.latent(run, row + i);
        const T scale = static_cast<T>(rows_.scale(run, row + i));
        bool finite = true;
        for (Index x = 0; x < rows_.latent_dim; ++x) finite = finite && std::isfinite(static_cast<T>(c[x]) * scale);
        if (finite) continue;
        dropped_[static_cast<std::size_t>(n_dropped_++)] = column + i;
        if constexpr (words && !A::shorts)  // whose scale is zero there
          for (Index x = 0; x < packed_step(); ++x)
            packed_[(column + i) / A::keys * packed_step() + x] &=
                ~(key_bits << (32 / A::keys * ((column + i) % A::keys)));
      }
    });
  }

#ifdef QKV_DETAIL_SHORTS
  void weigh_rows() {
    std::fill_n(scales_, n_rows, 0.0F);
    for_each_piece<n_rows>(rows_, place_, [&](const LatentRun<S>& run, Index, Index row, Index count, Index column) {
      for (Index i = 0; i < count; ++i) scales_[column + i] = rows_.scale(run, row + i);
    });
    for (Index c = 0; c < n_rows; ++c) value_scales_[c] = std::isfinite(scales_[c]) ? scales_[c] : 0.0F;
  }
  /// Rope keys are read where they lie, or without gaps from a copy.
  void take_rope() {
    if (place_.whole) return;
    std::fill_n(rope_, n_rows * rope_step(), 0.0F);
    for_each_piece<n_rows>(rows_, place_, [&](const LatentRun<S>& run, Index, Index row, Index count, Index column) {
      for (Index i = 0; i < count; ++i)
        std::copy_n(rows_.rope(run, row + i), rows_.rope_dim, rope_ + (column + i) * rope_step());
    });
  }
  /// Two rows into one of pairs. A column that holds none beside one that does has a weight of zero: any row will do.
  void pack_values() {
    for (Index c = place_.begin / 2 * 2; c < place_.count; c += 2)
      pair_bytes(row(std::max(c, place_.begin)), row(std::min(c + 1, place_.count - 1)), round_up(rows_.latent_dim, 16),
                 packed_ + c / 2 * packed_step());
  }
#endif

#ifdef QKV_DETAIL_WORDS
  /// Scales and offsets of the rows, in quads; 16 rows at a time.
  void weigh_rows() {
    std::fill_n(scales_, n_rows, 0.0F);
    std::fill_n(offsets_, n_rows, 0);
    for_each_piece<n_rows>(rows_, place_, [&](const LatentRun<S>& run, Index, Index row, Index count, Index column) {
      for (Index i = 0; i < count; ++i) scales_[column + i] = rows_.scale(run, row + i);
    });
    if constexpr (A::bytes)
      for (Index c = 0; c < n_rows; c += 16) {
        // Rows of zeros, or not finite, count for the sum of the weights alone: they never fill the 8 bits.
        const __m512 scale = Simd<float>::load(scales_ + c), least = _mm512_set1_ps(0x1p-90F);
        const __m512 used = _mm512_mask_mov_ps(least, _mm512_cmp_ps_mask(scale, least, _CMP_GT_OQ), scale);
        Simd<float>::store(logs_ + c, log2_of(used));
        Simd<float>::store(inverses_ + c, _mm512_div_ps(_mm512_set1_ps(1), used));
      }
    const __m512i ones = _mm512_set1_epi8(1);
    for (Index c = place_.begin; c < place_.count; c += 16) {
      const Index some = std::min<Index>(16, place_.count - c);
      __m512 sums[16];
      for (Index i = 0; i < 16; ++i) {
        __v16si sum = reinterpret_cast<__v16si>(_mm512_setzero_si512());
        if (i < some)
          for (Index x = 0; x < rows_.latent_dim; x += 64)
            sum = reinterpret_cast<__v16si>(
                _mm512_dpbusd_epi32(reinterpret_cast<__m512i>(sum), ones, _mm512_loadu_si512(row(c + i) + x)));
        sums[i] = _mm512_cvtepi32_ps(reinterpret_cast<__m512i>(sum));
      }
      Simd<float>::transpose(sums);
      __m512 total = sums[0];
      for (Index i = 1; i < 16; ++i) total = _mm512_add_ps(total, sums[i]);
      const __m512i offset = _mm512_cvtps_epi32(_mm512_mul_ps(total, _mm512_set1_ps(-128.0F)));  // whole numbers: exact
      _mm512_mask_storeu_epi32(offsets_ + c, static_cast<__mmask16>((1U << some) - 1U), offset);
    }
  }

  /// 2^e·m, m ∈ [√½, √2): e + 2/ln 2·artanh((m - 1)/(m + 1)); error 2e-7 beside e.
  static __m512 log2_of(__m512 x) {
    const __m512 one = _mm512_set1_ps(1), m = _mm512_getmant_ps(x, _MM_MANT_NORM_1_2, _MM_MANT_SIGN_src);
    const __mmask16 upper = _mm512_cmp_ps_mask(m, _mm512_set1_ps(1.41421356F), _CMP_GE_OQ);
    const __m512 half = _mm512_mask_mul_ps(m, upper, m, _mm512_set1_ps(0.5F)), e = _mm512_getexp_ps(x);
    const __m512 t = _mm512_div_ps(_mm512_sub_ps(half, one), _mm512_add_ps(half, one)), tt = _mm512_mul_ps(t, t);
    __m512 series = _mm512_set1_ps(0.412198586F);  // 2/(7·ln 2), 2/(5·ln 2), …
    for (const float c : {0.577078016F, 0.961796694F, 2.88539008F})
      series = _mm512_fmadd_ps(series, tt, _mm512_set1_ps(c));
    return _mm512_fmadd_ps(t, series, _mm512_mask_add_ps(e, upper, e, one));
  }

  /// Rope keys as pairs of bfloat16: in int8 they are multiplied like that.
  void take_rope() {
    std::fill_n(rope_, n_rows * rope_step(), Word(0));
    for_each_piece<n_rows>(rows_, place_, [&](const LatentRun<S>& run, Index, Index row, Index count, Index column) {
      const auto part = [&](const float* from, Index x) {
        return x >= rows_.rope_dim ? _mm512_setzero_ps()
                                   : Simd<float>::load_n(from + x, std::min<Index>(16, rows_.rope_dim - x));
      };
      for (Index i = 0; i < count; ++i)
        for (Index x = 0; x < rows_.rope_dim; x += 32) {
          const float* const from = rows_.rope(run, row + i);
          _mm512_storeu_si512(rope_ + (column + i) * rope_step() + x / 2,
                              reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(part(from, x + 16), part(from, x))));
        }
    });
  }

  /// Two rows into one of words, (v[j][x], v[j + 1][x]); in bytes four.
  void pack_values() {
    if constexpr (A::bytes) return pack_bytes();
    const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37,
                                         5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    const __m512i high = _mm512_set_epi16(63, 31, 62, 30, 61, 29, 60, 28, 59, 27, 58, 26, 57, 25, 56, 24, 55, 23, 54,
                                          22, 53, 21, 52, 20, 51, 19, 50, 18, 49, 17, 48, 16);
    for (Index c = place_.begin / 2 * 2; c < place_.count; c += 2) {
      Word* const to = packed_ + c / 2 * packed_step();
      const bool has[] = {c >= place_.begin, c + 1 < place_.count};
      const Element* const from[] = {has[0] ? row(c) : nullptr, has[1] ? row(c + 1) : nullptr};
      for (Index x = 0; x < rows_.latent_dim; x += 32) {
        const __m512i a = has[0] ? halves(from[0] + x, c) : _mm512_setzero_si512();
        const __m512i b = has[1] ? halves(from[1] + x, c + 1) : _mm512_setzero_si512();
        _mm512_storeu_si512(to + x, _mm512_permutex2var_epi16(a, low, b));
        _mm512_storeu_si512(to + x + 16, _mm512_permutex2var_epi16(a, high, b));
      }
    }
  }
  void pack_bytes() {
    for (Index c = place_.begin / 4 * 4; c < place_.count; c += 4) {
      Word* const to = packed_ + c / 4 * packed_step();
      const auto at = [&](Index i, Index x) {
        if (i < place_.begin || i >= place_.count) return _mm_setzero_si128();
        return _mm_loadu_si128(reinterpret_cast<const __m128i*>(row(i) + x));
      };
      for (Index x = 0; x < rows_.latent_dim; x += 16)
        store_words(to + x, to_quads(at(c, x), at(c + 1, x), at(c + 2, x), at(c + 3, x)));
    }
  }
  /// 32 features of a row as bfloat16.
  __m512i halves(const Element* from, [[maybe_unused]] Index column) const {
    if constexpr (quads) {
      const __m512 scale = _mm512_set1_ps(scales_[column]);
      return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(_mm512_mul_ps(Simd<float>::load(from + 16), scale),
                                                           _mm512_mul_ps(Simd<float>::load(from), scale)));
    } else {
      return _mm512_loadu_si512(from);
    }
  }
#endif

  LatentRows<S> rows_;
  Index parts_;
  Place place_;
  const Element* first_ = nullptr;
  Index step_ = 0;
  Element* copy_ = nullptr;
  Value* packed_ = nullptr;
  RopeNumber* rope_ = nullptr;
  float *scales_ = nullptr, *value_scales_ = nullptr;
  std::int32_t* offsets_ = nullptr;
  float *logs_ = nullptr, *inverses_ = nullptr;
  bool inspected_ = false;
  Index n_dropped_ = 0;
  std::array<Index, std::size_t(n_rows)> dropped_;
};

}  // namespace qkv::inline QKV_ABI::kernel::absorbed

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif

// kernel/absorbed/blocks.hpp — a block of latent rows as absorbed attention multiplies it: in place where possible.
//
//     exact    rows   float rows of one run: where they lie in the cache; else a copy, widened and without gaps
//              values the same rows
//     bf16     rows   bfloat16 rows, likewise                          values  [pair of keys][latent_dim] words, packed
//     int8     rows   int8 latents, likewise; rope keys as bfloat16    values  bf16: the same, restored and rounded
//     keys            where there are such products, else as float             int8: [four keys][latent_dim] words as stored,
//                                                                              and their scales
//     int16    rows   int8 latents and float rope keys, likewise       values  int16: [pair of keys][latent_dim] pairs of bytes
//     keys                                                                     as stored, and their scales
//
// Columns that hold no row are zeros; the caller hides them. A block is prepared once for all heads of a work item.
//
// Before: kernel/absorbed/grid.hpp   Next: kernel/absorbed/pack_rows.hpp
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <type_traits>
#include <utility>

#include "../../cache/latent_memory.hpp"
#include "../../storage.hpp"
#include "../../workspace.hpp"
#include "../value_tile.hpp"
#include "grid.hpp"
#include "pack_rows.hpp"
#include "tiles.hpp"

#include "../../base/warnings_off.hpp"

namespace qkv { inline namespace QKV_ABI { namespace kernel::absorbed {

/// One block at a time, prepared for arithmetic A in scratch of its own, from rows of any storage.
template <class A>
class BlockRows {
 protected:
  using T = typename A::Scalar;
  using Number = typename A::Number;
  using Element =
      std::conditional_t<!A::narrow, T, std::conditional_t<A::integer_keys, std::int8_t, bfloat16>>;  // of rows
  using Value = typename ValueDot<A>::Row;
  using RopeNumber = RopeDot::Number;
  static constexpr bool narrow = A::narrow;
  static constexpr Index n_rows = block_rows<narrow>;
  static constexpr Index row_multiple = A::int8_keys ? 64
                                        : narrow     ? 32
                                                     : Simd<T>::width;  // rows are read up to a multiple of it

 public:
  virtual void prepare(const Place& place) = 0;

  const Place& place() const { return place_; }
  /// The row of a column, and the bytes from one row to the next.
  const Element* row(Index column) const { return first_ + (column - place_.begin) * step_; }
  Index stride() const { return step_ * Index(sizeof(Element)); }
  /// Values from column c on (narrow: the first column of a word), and the numbers from one column (word) to the next.
  const Value* values(Index column) const {
    if constexpr (narrow)
      return packed_ + column / A::keys * packed_step();
    else
      return row(column);
  }
  Index value_stride() const { return narrow ? packed_step() : step_; }
  const RopeNumber* rope(Index column) const { return rope_first_ + (column - place_.begin) * rope_stride_; }
  Index rope_stride() const { return rope_stride_ * Index(sizeof(RopeNumber)); }
  const float* scales(Index column) const { return scales_ + column; }
  const std::int32_t* offsets(Index column) const { return offsets_ + column; }
  /// Integer weights: scales of the values, zero where a row is not finite.
  const float* value_scales() const { return value_scales_; }

  /// False: a value is not finite when converted for the product, though the scores of its row may be.
  bool values_finite() const { return values_finite_; }
  /// Columns whose latent is not finite, ascending: their values must not be multiplied, not even by a weight of zero,
  /// and are zeros in packed words. Searched for only where a score, as all of such a row, or a value is not finite.
  std::pair<const Index*, Index> dropped() {
    if (!inspected_) inspect();
    inspected_ = true;
    return {dropped_.data(), n_dropped_};
  }
  /// The latent of a column as T.
  virtual void load_latent(Index column, T* to) const = 0;

 protected:
  BlockRows(detail::Carver& carver, Index latent_dim, Index rope_dim) : latent_dim_(latent_dim), rope_dim_(rope_dim) {
    copy_ = carver.take<Element>(n_rows * copy_step());
    if constexpr (narrow) packed_ = carver.take<Value>(n_rows / A::keys * packed_step());
    if constexpr (A::integer_keys)
      rope_ = carver.take<RopeNumber>(n_rows * rope_step()), scales_ = carver.take<float>(n_rows);
    if constexpr (A::int8_keys) offsets_ = carver.take<std::int32_t>(n_rows);
    if constexpr (A::integer_weights) value_scales_ = carver.take<float>(n_rows);
  }
  BlockRows(const BlockRows&) = default;
  BlockRows& operator=(const BlockRows&) = default;
  ~BlockRows() = default;  // blocks lie in scratch memory

  /// Finds the dropped columns.
  virtual void inspect() = 0;
  Index copied_dim() const { return A::integer_keys ? latent_dim_ : latent_dim_ + rope_dim_; }
  Index copy_step() const { return round_up(copied_dim(), row_multiple) + row_multiple; }
  Index rope_step() const { return round_up(rope_dim_, 32) / rope_features; }
  Index packed_step() const { return round_up(latent_dim_, 32) + 16; }  // not a multiple of 4 KB: all in one L1 set

  Index latent_dim_, rope_dim_;
  Place place_;
  const Element* first_ = nullptr;  // of column place_.begin
  Index step_ = 0;
  const RopeNumber* rope_first_ = nullptr;
  Index rope_stride_ = 0;
  Element* copy_ = nullptr;
  Value* packed_ = nullptr;
  RopeNumber* rope_ = nullptr;
  float *scales_ = nullptr, *value_scales_ = nullptr;
  std::int32_t* offsets_ = nullptr;
  bool values_finite_ = true, inspected_ = false;
  Index n_dropped_ = 0;
  std::array<Index, std::size_t(n_rows)> dropped_;
};

/// The same of rows of storage S.
template <class A, StorageType S>
class BlockRowsOf final : public BlockRows<A> {
  using Base = BlockRows<A>;
  using Base::copied_dim, Base::copy_step, Base::rope_step, Base::packed_step;
  using Base::narrow, Base::n_rows, Base::row_multiple;
  using Base::place_, Base::first_, Base::step_, Base::copy_, Base::packed_, Base::rope_, Base::scales_;
  using Base::rope_first_, Base::rope_stride_;
  using Base::value_scales_, Base::offsets_, Base::values_finite_, Base::inspected_, Base::n_dropped_, Base::dropped_;
  using typename Base::Element, typename Base::RopeNumber, typename Base::T;

 public:
  BlockRowsOf(detail::Carver& carver, const LatentRows<S>& rows, Index parts)
      : Base(carver, rows.latent_dim, rows.rope_dim), rows_(rows), parts_(parts) {}

  void prepare(const Place& place) override {
    place_ = place;
    inspected_ = false;
    n_dropped_ = 0;
    const LatentRun<S>& run = rows_.runs[place.cell.run];
    if (in_place(place)) {
      if constexpr (!narrow || std::is_same_v<S, Element>)
        first_ = reinterpret_cast<const Element*>(latent(run, place));
      step_ = rows_.latent_row_stride;
    } else {
      copy();
    }
    if constexpr (A::integer_keys) gather_scales(), gather_rope();
    if constexpr (narrow) pack_values(A{}, columns(), scales_, packed_, packed_step());
  }

  void load_latent(Index column, T* to) const override {
    for (const GridPiece& piece : pieces()) {
      if (column < piece.column || column >= piece.column + piece.count) continue;
      const LatentRun<S>& run = rows_.runs[piece.run];
      const Index row = piece.row + column - piece.column;
      widen_row(rows_.latent(run, row), rows_.latent_dim, rows_.scale(run, row), to);
    }
  }

 private:
  GridPieces<LatentRun<S>> pieces() const { return {rows_.runs, n_rows, place_.cell}; }
  ColumnRows<Element> columns() const { return {first_, step_, place_.begin, place_.count, rows_.latent_dim}; }
  const S* latent(const LatentRun<S>& run, const Place& place) const { return rows_.latent(run, place.cell.row); }

  /// Float rope keys are multiplied in place where the parts of a lane divide their features evenly.
  static constexpr bool float_rope = A::integer_keys && std::is_same_v<RopeNumber, float>;
  bool rope_in_place() const { return float_rope && place_.whole && rows_.rope_dim % parts_ == 0; }

  bool in_place(const Place& place) const {
    if (!place.whole || !std::is_same_v<S, Element> || rows_.latent_dim % row_multiple != 0) return false;
    if constexpr (A::integer_keys || has_row_scale<S>)
      return A::integer_keys;
    else
      return rows_.rope_dim % (A::features * parts_) == 0 && rows_.rope_row_stride == rows_.latent_row_stride &&
             rows_.rope(rows_.runs[place.cell.run], 0) ==
                 rows_.latent(rows_.runs[place.cell.run], 0) + rows_.latent_dim;
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
    for (const GridPiece& piece : pieces()) {
      const LatentRun<S>& run = rows_.runs[piece.run];
      clear(piece.column);
      for (Index i = 0; i < piece.count; ++i, ++next) {
        Element* const to = copy_ + next * step;
        const S* const c = rows_.latent(run, piece.row + i);
        [[maybe_unused]] const WideStorage<S>* const r = rows_.rope(run, piece.row + i);
        if constexpr (!narrow) {
          widen_row(c, latent, rows_.scale(run, piece.row + i), to);
          widen_row(r, rope, 1.0F, to + latent);
        } else if constexpr (A::integer_keys) {
          std::copy_n(c, latent, to);
        } else {
          std::copy_n(c, latent, to);
          std::copy_n(r, rope, to + latent);
        }
        std::fill(to + copied_dim(), to + step, Element(0));
      }
    }
  }

  static constexpr Word key_bits = 0xFFFFFFFFU >> (32 - 32 / A::keys);  // of one key in a word of values
  void inspect() override {
    for (const GridPiece& piece : pieces()) {
      const LatentRun<S>& run = rows_.runs[piece.run];
      for (Index i = 0; i < piece.count; ++i) {
        const S* const c = rows_.latent(run, piece.row + i);
        const T scale = static_cast<T>(rows_.scale(run, piece.row + i));
        bool finite = !A::integer_keys || std::isfinite(scale * A::restored);
        for (Index x = 0; !A::integer_keys && x < rows_.latent_dim; ++x)
          finite = finite && std::isfinite(static_cast<T>(c[x]) * scale);
        if (finite) continue;
        dropped_[static_cast<std::size_t>(n_dropped_++)] = piece.column + i;
        if constexpr (narrow && !A::integer_weights)  // whose scale is zero there
          for (Index x = 0; x < packed_step(); ++x)
            packed_[(piece.column + i) / A::keys * packed_step() + x] &=
                ~(key_bits << (32 / A::keys * ((piece.column + i) % A::keys)));
      }
    }
  }

  /// Scales of the rows, and offsets and value scales computed from them.
  void gather_scales() {
    std::fill_n(scales_, n_rows, 0.0F);
    for (const GridPiece& piece : pieces()) {
      const LatentRun<S>& run = rows_.runs[piece.run];
      for (Index i = 0; i < piece.count; ++i) scales_[piece.column + i] = rows_.scale(run, piece.row + i);
    }
    values_finite_ = true;
    if constexpr (!A::integer_weights)
      for (Index c = 0; c < n_rows; ++c) values_finite_ = values_finite_ && std::isfinite(scales_[c] * A::restored);
    if constexpr (A::integer_weights)
      for (Index c = 0; c < n_rows; ++c) value_scales_[c] = std::isfinite(scales_[c]) ? scales_[c] : 0.0F;
    if constexpr (A::int8_keys) {
      std::fill_n(offsets_, n_rows, 0);
      sum_offsets(columns(), offsets_);
    }
  }
  /// Rope keys for the product: in place, or copied without gaps.
  void gather_rope() {
    if constexpr (float_rope)
      if (rope_in_place()) {
        rope_first_ = rows_.rope(rows_.runs[place_.cell.run], place_.cell.row);
        rope_stride_ = rows_.rope_row_stride;
        return;
      }
    rope_first_ = rope_ + place_.begin * rope_step();
    rope_stride_ = rope_step();
    std::fill_n(rope_, n_rows * rope_step(), RopeNumber(0));
    for (const GridPiece& piece : pieces()) {
      const LatentRun<S>& run = rows_.runs[piece.run];
      for (Index i = 0; i < piece.count; ++i)
        pack_rope(rows_.rope(run, piece.row + i), rows_.rope_dim, rope_ + (piece.column + i) * rope_step());
    }
  }

  LatentRows<S> rows_;
  Index parts_;
};

/// Makes the blocks of a task's rows, whatever their storage: BlockRowsOf in memory of the carver, or null without any.
template <class A>
struct BlockMaker {
  const void* rows;  // LatentRows<S>
  BlockRows<A>* (*make)(const void* rows, detail::Carver& carver, Index parts);
};
template <class A, StorageType S>
BlockMaker<A> block_maker(const LatentRows<S>& rows) {
  using Block = BlockRowsOf<A, S>;
  static_assert(std::is_trivially_destructible_v<Block>);
  return {&rows, [](const void* from, detail::Carver& carver, Index parts) -> BlockRows<A>* {
            Block* const at = carver.take<Block>(1);
            const Block block(carver, *static_cast<const LatentRows<S>*>(from), parts);
            return at == nullptr ? nullptr : std::construct_at(at, block);
          }};
}

}}}  // namespace qkv::QKV_ABI::kernel::absorbed

#include "../../base/warnings_on.hpp"

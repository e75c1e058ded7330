// cache/context_shift.hpp — rows are evicted, later rows move down, and their keys are rotated to the new positions.
//
//     as appended     k                        rotated by 0
//     shifted by n    round(R₋ₙ k)             rotated by n          k is kept: UnrotatedKeys
//     … and by m      round(R₋₍ₙ₊ₘ₎ k)         rotated by n + m      one rounding, after any number of shifts
//     no rotation     k                        a model whose keys have no positions: rows move unchanged
//
// Angles are computed in double, and so are products, except for int8: then the rounding of the storage is the only one
// that counts, also for the smaller number of a pair.
//
// Before: cache/blocks.hpp   Next: cache/latent_memory.hpp
#pragma once

#include <algorithm>
#include <optional>
#include <type_traits>

#include "../rope.hpp"
#include "blocks.hpp"

namespace qkv { inline namespace QKV_ABI {

/// How a context shift (drop_rows of a cache) rotates keys.
enum class Shift {
  /// From copies of the keys as appended: one rounding, after any number of shifts. The first shift allocates a second
  /// copy of the keys (MLA: of the rope keys) and 8 bytes per row.
  exact,
  /// From the keys as stored: allocates nothing, and every shift rounds again. Errors grow up to k-fold over k shifts,
  /// for a rotation by less than a rounding step of the storage is lost every time: 2000 shifts by one leave an error
  /// of 1e-6 of a key's size in float, 0.1 in half, 0.8 in bfloat16, and noise in int8. For a few shifts.
  in_place,
};

namespace detail {

/// Rows that a context shift rotates at a time: few enough for the processor's cache, enough to share their cosines.
inline constexpr Index shift_rows = 64;

/// The scalar in which keys of storage S are rotated by a Rope<T>.
template <class S, class T>
using ShiftScalar = std::conditional_t<std::is_same_v<T, float> && !has_row_scale<S>, double, T>;

/// The rotation of a layer, which may have none.
template <class T>
const Rope<T>* rope_of(const Rope<T>& rope) {
  return &rope;
}
template <class T>
const Rope<T>* rope_of(const std::optional<Rope<T>>& rope) {
  return rope ? &*rope : nullptr;
}
inline const Rope<float>* rope_of(std::nullopt_t) { return nullptr; }

/// width: features per head that are rotated; head_dim, or rope_dim of latents.
template <class T>
void check_shift(Index first, Index n, Index rows, const Rope<T>* rope, Index width) {
  require<std::out_of_range>(first >= 0 && n >= 0 && first <= rows && n <= rows - first,
                             "drop_rows(first, n) needs first >= 0, n >= 0 and first + n <= rows held ", rows,
                             "; given ", first, " and ", n);
  require(rope == nullptr || rope->head_dim() == width,
          "the rope of a cache must be of its head_dim (of latents: rope_dim) ", width, "; given ",
          rope == nullptr ? 0 : rope->head_dim());
}

/// The scratch memory of a shift; width: rotated features of all heads.
template <class S, class T>
std::size_t shift_bytes(const Rope<T>* rope, Index width) {
  return rope == nullptr ? 0 : static_cast<std::size_t>(checked_product(shift_rows, width)) * sizeof(ShiftScalar<S, T>);
}

/// Rotates row i of x [n, heads·head_dim] back by rotated_by(i) positions. Consecutive rows with equal angles share their
/// cosines.
template <class X, class T, class RotatedBy>
void rotate_back(const View<X>& x, Index heads, const Rope<T>& rope, const RotatedBy& rotated_by) {
  X cos[rope_block], sin[rope_block];
  Index held_pair = -1, held = 0;
  const auto angles = [&](Index row, Index pair, Index n) -> CosSin<X> {
    const Index by = rotated_by(row);
    if (pair != held_pair || by != held) cos_sin(-by, rope.frequencies().data() + pair, n, 1.0, cos, sin);
    held_pair = pair, held = by;
    return {cos, sin};
  };
  rotate_rows<X>(x, view(x), heads, 0, rope.dim(), rope.config().pairing, angles);
}

/// Rows first + n … rows - 1 move n down, their keys rotated by -n. Cannot fail: memory is allocated, for an exact shift
/// also for the copies that rows first … rows - n - 1 need. `all` gives access to the rows, of storage S:
///     unrotated(row), place(row)           the copies of keys as appended, and the index of the row in them
///     key(row, head), scale(row, head)    as stored now
///     move(row, to, keys)                 the whole row, but with these keys [heads·width]
///     move(row, to)                       the whole row, and its copy
template <class S, class T, class Rows>
void shift_keys(Index first, Index n, Index rows, Index heads, const Rope<T>* rotation, Shift how, std::byte* scratch,
                const Rows& all) {
  using X = ShiftScalar<S, T>;
  if (n == 0) return;
  if (rotation == nullptr) {
    for (Index row = first + n; row < rows; ++row) all.move(row, row - n);
    return;
  }
  const Rope<T>& rope = *rotation;
  const bool exact = how == Shift::exact;
  const Index head_dim = rope.head_dim(), width = heads * head_dim;
  X* const keys = reinterpret_cast<X*>(scratch);
  const auto rotated_by = [&](Index row) { return exact ? all.unrotated(row).rotated_by(all.place(row)) : 0; };
  for (Index from = first + n; from < rows; from += shift_rows) {
    const Index count = std::min(shift_rows, rows - from);
    for (Index i = 0; i < count; ++i) {
      const Index row = from + i, place = all.place(row);
      const bool kept = rotated_by(row) > 0;
      const auto& copies = all.unrotated(row);
      for (Index h = 0; h < heads; ++h)
        load_row(kept ? copies.key(place, h) : all.key(row, h), head_dim,
                 kept ? copies.scale(place, h) : all.scale(row, h), keys + i * width + h * head_dim);
    }
    rotate_back(View<X>(keys, count, width, Eigen::OuterStride<>(width)), heads, rope,
                [&](Index i) { return rotated_by(from + i) + n; });
    for (Index i = 0; i < count; ++i) {  // ascending: the row that is overwritten has moved already
      const Index row = from + i, to = row - n, before = rotated_by(row);
      const auto& copies = all.unrotated(to);
      if (!exact)
        copies.forget(all.place(to), 1);
      else if (before > 0)
        copies.copy_row(all.unrotated(row), all.place(row), all.place(to), before + n);
      else
        for (Index h = 0; h < heads; ++h) copies.keep(all.place(to), h, all.key(row, h), all.scale(row, h), n);
      all.move(row, to, keys + i * width);
    }
  }
}

/// A row of keys and values: the memory, the block and the row in the block.
template <StorageType S>
struct BlockRow {
  CacheBlocks<S>& memory;
  Index block, row;
};

/// The same for keys and values in blocks; at(row) is the BlockRow of a row.
template <StorageType S, class T, class At>
void shift_blocks(Index first, Index n, Index rows, const CacheShape& shape, const Rope<T>* rope, Shift how,
                  std::byte* scratch, const At& at) {
  struct Rows {
    const At& of;
    const UnrotatedKeys<S>& unrotated(Index row) const { return of(row).memory.unrotated(); }
    Index place(Index row) const {
      const BlockRow<S> r = of(row);
      return r.memory.unrotated_row(r.block, r.row);
    }
    const S* key(Index row, Index head) const {
      const BlockRow<S> r = of(row);
      return r.memory.key(r.block, r.row, head);
    }
    float scale(Index row, Index head) const {
      const BlockRow<S> r = of(row);
      return r.memory.key_scale(r.block, r.row, head);
    }
    void move(Index row, Index to, const ShiftScalar<S, T>* keys) const {
      const BlockRow<S> from = of(row), target = of(to);
      target.memory.store_keys(target.block, target.row, keys, from.memory, from.block, from.row);
    }
    void move(Index row, Index to) const {
      const BlockRow<S> from = of(row), target = of(to);
      target.memory.copy_rows(from.memory, from.block, from.row, target.block, target.row, 1);
    }
  };
  shift_keys<S>(first, n, rows, shape.kv_heads, rope, how, scratch, Rows{at});
}

}  // namespace detail

}}  // namespace qkv::QKV_ABI

// cache/latent_memory.hpp — the memory under the latent caches: rows of one latent and one rope key.
//
//     float, half, bfloat16    [latent | rope] [latent | rope] …
//     int8                     [latent] [latent] …     [rope] [rope] … in float     one scale per row
//
// Before: cache/context_shift.hpp   Next: cache/paged_rows.hpp
#pragma once

#include <algorithm>
#include <span>

#include "../key_rows.hpp"
#include "../rope.hpp"
#include "blocks.hpp"
#include "context_shift.hpp"

namespace qkv { inline namespace QKV_ABI {

/// Contiguous positions in equally strided rows.
template <StorageType S>
struct LatentRun {
  Index rows = 0;
  Index position = 0;  // of the first row
  const S* latent = nullptr;
  const WideStorage<S>* rope = nullptr;
  const float* scales = nullptr;  // int8 only: one per row
};

/// All that a kernel knows of a latent cache: runs one after another, in ascending position. Except in int8 the rope
/// key follows its latent, so that one row of latent_dim + rope_dim numbers is the absorbed key.
template <StorageType S>
struct LatentRows {
  std::span<const LatentRun<S>> runs;
  Index rows = 0;  // sum over the runs
  Index latent_dim = 0, rope_dim = 0;
  Index latent_row_stride = 0, rope_row_stride = 0;  // elements of S and of WideStorage<S>

  const S* latent(const LatentRun<S>& run, Index row) const { return run.latent + row * latent_row_stride; }
  const WideStorage<S>* rope(const LatentRun<S>& run, Index row) const { return run.rope + row * rope_row_stride; }
  float scale(const LatentRun<S>& run, Index row) const { return has_row_scale<S> ? run.scales[row] : 1.0F; }
};

namespace detail {

template <StorageType S>
class LatentMemory {
  static constexpr bool one_row = !has_row_scale<S>;

 public:
  LatentMemory() = default;
  LatentMemory(Index latent_dim, Index rope_dim, Index rows)
      : latent_dim_(latent_dim), rope_dim_(rope_dim), rows_(rows) {
    latent_ = Numbers<S>(checked_product(rows, checked_sum(latent_dim, one_row ? rope_dim : 0)));
    if constexpr (!one_row) {
      rope_ = Numbers<float>(checked_product(rows, rope_dim));
      scales_ = Numbers<float>(rows);
    }
  }

  Index latent_dim() const { return latent_dim_; }
  Index rope_dim() const { return rope_dim_; }
  Index bytes() const { return latent_.bytes() + rope_.bytes() + scales_.bytes(); }

  S* latent(Index row) const { return latent_.data() + row * latent_stride(); }
  WideStorage<S>* rope(Index row) const {
    if constexpr (one_row)
      return latent(row) + latent_dim_;
    else
      return rope_.data() + row * rope_dim_;
  }
  float* scale(Index row) const { return one_row ? nullptr : scales_.data() + row; }

  template <class C, class R>
  void store(Index row, const C* c, const R* r) const {
    store_row(c, latent_dim_, latent(row), scale(row));
    store_row(r, rope_dim_, rope(row), nullptr);
    unrotated_.forget(row, 1);
  }
  /// n rows of `other`, which may be *this: same bytes.
  void copy_rows(const LatentMemory& other, Index from, Index to, Index n) {
    unrotated_.copy_rows(other.unrotated_, from, to, n);
    std::copy_n(other.latent(from), n * latent_stride(), latent(to));
    if constexpr (!one_row) {
      std::copy_n(other.rope(from), n * rope_dim_, rope(to));
      std::copy_n(other.scale(from), n, scale(to));
    }
  }
  LatentRun<S> run(Index row, Index rows, Index position) const {
    return {.rows = rows, .position = position, .latent = latent(row), .rope = rope(row), .scales = scale(row)};
  }
  /// The runs of a cache with the strides that follow.
  LatentRows<S> rows(std::span<const LatentRun<S>> runs, Index rows) const {
    return {.runs = runs,
            .rows = rows,
            .latent_dim = latent_dim_,
            .rope_dim = rope_dim_,
            .latent_row_stride = latent_stride(),
            .rope_row_stride = one_row ? latent_stride() : rope_dim_};
  }

  /// Rope keys as appended, once memory for them is allocated.
  const UnrotatedKeys<WideStorage<S>>& unrotated() const { return unrotated_; }
  void keep_unrotated() {
    if (!unrotated_) unrotated_ = UnrotatedKeys<WideStorage<S>>(1, rope_dim_, rows_);
  }

  /// Context shift: rows first + n … rows - 1 move n down, their rope keys rotated by -n; at(i) is the place of row i.
  /// Memory is allocated: scratch of shift_bytes, and for an exact shift the unrotated keys.
  template <class T, class At>
  void shift(Index first, Index n, Index rows, const Rope<T>* rotation, Shift how, std::byte* scratch, const At& at) {
    struct Rows {
      LatentMemory& memory;
      const At& place;
      const UnrotatedKeys<WideStorage<S>>& unrotated(Index) const { return memory.unrotated_; }
      const WideStorage<S>* key(Index row, Index) const { return memory.rope(place(row)); }
      float scale(Index, Index) const { return 1.0F; }
      void move(Index from, Index to, const ShiftScalar<WideStorage<S>, T>* keys) const {
        const Index row = place(from), target = place(to);
        std::copy_n(memory.latent(row), memory.latent_dim_, memory.latent(target));
        if constexpr (!one_row) *memory.scale(target) = *memory.scale(row);
        store_row(keys, memory.rope_dim_, memory.rope(target), nullptr);
      }
      void move(Index from, Index to) const { memory.copy_rows(memory, place(from), place(to), 1); }
    };
    shift_keys<WideStorage<S>>(first, n, rows, 1, rotation, how, scratch, Rows{*this, at});
  }

 private:
  Index latent_stride() const { return latent_dim_ + (one_row ? rope_dim_ : 0); }

  Index latent_dim_ = 0, rope_dim_ = 0, rows_ = 0;
  Numbers<S> latent_;             // with the rope keys in it, except in int8
  Numbers<float> rope_, scales_;  // int8 only
  UnrotatedKeys<WideStorage<S>> unrotated_;
};

/// Shapes of an append.
template <MatrixLike C, MatrixLike R>
void check_latents(Index latent_dim, Index rope_dim, const C& latent, const R& rope_key) {
  require(latent.rows() == rope_key.rows() && latent.cols() == latent_dim && rope_key.cols() == rope_dim,
          "a latent cache takes latent [n, latent_dim] and rope_key [n, rope_dim]; given latent ",
          Shape{latent.rows(), latent.cols()}, ", rope_key ", Shape{rope_key.rows(), rope_key.cols()},
          " for latent_dim ", latent_dim, ", rope_dim ", rope_dim);
}

/// Latents (or rope keys) of all rows.
template <class T, bool Ropes, StorageType S>
Matrix<T> load_latents(const LatentRows<S>& all) {
  Matrix<T> out(all.rows, Ropes ? all.rope_dim : all.latent_dim);
  T* to = out.data();
  for (const LatentRun<S>& run : all.runs)
    for (Index i = 0; i < run.rows; ++i, to += out.cols()) {
      if constexpr (Ropes)
        load_row(all.rope(run, i), all.rope_dim, 1.0F, to);
      else
        load_row(all.latent(run, i), all.latent_dim, all.scale(run, i), to);
    }
  return out;
}

}  // namespace detail

}}  // namespace qkv::QKV_ABI

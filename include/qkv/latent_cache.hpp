// latent_cache.hpp — MLA's cache: one latent and one rope key per token, whatever the number of heads.
//
//     c  = RMSNorm(x·W_DKV)           [latent_dim]   normed before it is cached; keys and values of all heads come from it
//     kr = rotate(x·W_KR, position)   [rope_dim]     rotated before it is cached; shared by all heads
//
// latent_dim + rope_dim numbers per token: 512 + 64 in DeepSeek-V2 and V3. In the absorbed form a row [c | kr] *is* the
// key that all heads share, and its latent part is the value. An int8 cache keeps the latent as bytes with one scale
// per row, and the rope key, which sets the position, in float. DeepSeek-V2, arXiv:2405.04434, section 2.1.2 and 2.1.3.
//
// Before: paged_cache.hpp   Next: paged_latent_cache.hpp
#pragma once

#include <algorithm>
#include <span>
#include <utility>

#include "detail/cache_blocks.hpp"
#include "rope.hpp"

namespace qkv::inline QKV_ABI {

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

struct LatentCacheConfig {
  Index latent_dim = 0, rope_dim = 0;
  Index capacity = 0;  // the most rows it will hold
};

template <StorageType S = float>
class LatentCache {
  static constexpr bool one_row = !has_row_scale<S>;  // [latent | rope]

 public:
  using Storage = S;

  /// Allocates all of the capacity. std::invalid_argument unless latent_dim, rope_dim and capacity are positive.
  explicit LatentCache(const LatentCacheConfig& config) : config_(config) {
    detail::require(config.latent_dim >= 1 && config.rope_dim >= 1 && config.capacity >= 1,
                    "a latent cache needs latent_dim, rope_dim and capacity >= 1; given ", config.latent_dim, ", ",
                    config.rope_dim, ", ", config.capacity);
    latent_ = detail::Numbers<S>(detail::checked_product(config.capacity, latent_stride()));
    if constexpr (!one_row) {
      rope_ = detail::Numbers<float>(detail::checked_product(config.capacity, config.rope_dim));
      scales_ = detail::Numbers<float>(config.capacity);
    }
  }

  /// A copy holds the same bytes in its own memory.
  LatentCache(const LatentCache& other) {
    if (other.config_.capacity == 0) return;
    *this = LatentCache(other.config_);
    std::copy_n(other.latent_.data(), other.rows_ * latent_stride(), latent_.data());
    if constexpr (!one_row) {
      std::copy_n(other.rope_.data(), other.rows_ * config_.rope_dim, rope_.data());
      std::copy_n(other.scales_.data(), other.rows_, scales_.data());
    }
    hold(other.rows_);
  }
  /// What was moved from has capacity 0.
  LatentCache(LatentCache&& other) noexcept { swap(other); }
  LatentCache& operator=(LatentCache other) noexcept {
    swap(other);
    return *this;
  }
  ~LatentCache() = default;

  Index position() const { return rows_; }  // of the next token
  Index rows() const { return rows_; }
  Index capacity() const { return config_.capacity; }
  Index latent_dim() const { return config_.latent_dim; }
  Index rope_dim() const { return config_.rope_dim; }
  Index max_append() const { return config_.capacity - rows_; }

  /// Scratch memory for attention over this cache, kept between calls. A copy of the cache starts with none.
  Workspace& workspace() { return workspace_; }

  /// Appends latent [n, latent_dim] (normed) and rope_key [n, rope_dim] (rotated) of any floating-point scalar.
  /// std::length_error unless n <= max_append(); errors leave the cache as it was.
  template <MatrixLike C, MatrixLike R>
  void append(const C& latent, const R& rope_key) {
    check_rows(latent, rope_key);
    detail::require<std::length_error>(latent.rows() <= max_append(), "the latent cache (capacity ", capacity(),
                                       ", rows held ", rows_, ") takes at most ", max_append(), " more rows; given ",
                                       latent.rows());
    write(latent, rope_key);
  }
  /// False where the cache is full; nothing has changed then.
  template <MatrixLike C, MatrixLike R>
  [[nodiscard]] bool try_append(const C& latent, const R& rope_key) {
    check_rows(latent, rope_key);
    if (latent.rows() > max_append()) return false;
    write(latent, rope_key);
    return true;
  }

  /// Goes back to `position`, forgetting the rows from there on. std::out_of_range unless can_truncate(position).
  void truncate(Index position) {
    detail::require<std::out_of_range>(can_truncate(position), "truncate(position) needs 0 <= position <= ", rows_,
                                       "; given position ", position);
    hold(position);
  }
  [[nodiscard]] bool try_truncate(Index position) {
    if (!can_truncate(position)) return false;
    hold(position);
    return true;
  }
  bool can_truncate(Index position) const { return position >= 0 && position <= rows_; }
  void clear() { hold(0); }

  /// Context shift: forgets rows first … first+n-1, and those behind them move n positions down. A latent knows no
  /// position and is moved as it is; only the rope keys turn, by -n (`rope`: the layer's, of head_dim rope_dim). Equal to
  /// a cache built without those rows, but for one more rounding of each rope key to T and S. std::out_of_range unless
  /// 0 <= first and first + n <= rows(). Allocates nothing once the workspace is warm.
  template <class T>
  void drop_rows(Index first, Index n, const Rope<T>& rope) {
    detail::check_drop(first, n, rows_);
    detail::require(rope.head_dim() == rope_dim(), "the rope of a latent cache must have head_dim = rope_dim ",
                    rope_dim(), "; given ", rope.head_dim());
    const auto scratch = workspace_.lease(static_cast<std::size_t>(detail::shift_rows * rope_dim()) * sizeof(T));
    View<T> keys(reinterpret_cast<T*>(scratch.data()), 0, rope_dim(), Eigen::OuterStride<>(rope_dim()));
    detail::for_each_shifted(first, n, rows_, [&](Index from, Index count) {
      new (&keys) View<T>(keys.data(), count, rope_dim(), Eigen::OuterStride<>(rope_dim()));
      for (Index i = 0; i < count; ++i)
        load_row(rope_data() + (from + i) * rope_stride(), rope_dim(), 1.0F, keys.data() + i * rope_dim());
      rope.shift_in_place(keys, 1, -n);
      for (Index i = 0; i < count; ++i) {
        const Index row = from + i, to = row - n;
        std::copy_n(latent_.data() + row * latent_stride(), latent_dim(), latent_.data() + to * latent_stride());
        if constexpr (!one_row) scales_.data()[to] = scales_.data()[row];
        store_row(keys.data() + i * rope_dim(), rope_dim(), rope_data() + to * rope_stride(), nullptr);
      }
    });
    hold(rows_ - n);
  }

  /// Bytes of latents, rope keys and scales at capacity.
  Index bytes() const { return latent_.bytes() + rope_.bytes() + scales_.bytes(); }
  /// Bytes of the workspace beside them. bytes() + overhead_bytes() is everything the cache has allocated.
  Index overhead_bytes() const { return static_cast<Index>(workspace_.bytes()); }

  /// What the cache holds: latents [rows, latent_dim], rope keys [rows, rope_dim].
  template <class T = detail::ReadAs<S>>
  Matrix<T> latent() const {
    Matrix<T> out(rows_, latent_dim());
    const LatentRows<S> all = latent_rows();
    for (Index i = 0; i < rows_; ++i)
      load_row(all.latent(run_, i), latent_dim(), all.scale(run_, i), out.data() + i * latent_dim());
    return out;
  }
  template <class T = detail::ReadAs<S>>
  Matrix<T> rope_keys() const {
    Matrix<T> out(rows_, rope_dim());
    const LatentRows<S> all = latent_rows();
    for (Index i = 0; i < rows_; ++i) load_row(all.rope(run_, i), rope_dim(), 1.0F, out.data() + i * rope_dim());
    return out;
  }

  /// For kernels; valid until the next change of the cache.
  LatentRows<S> latent_rows() const {
    return {.runs = {&run_, rows_ > 0 ? 1U : 0U},
            .rows = rows_,
            .latent_dim = latent_dim(),
            .rope_dim = rope_dim(),
            .latent_row_stride = latent_stride(),
            .rope_row_stride = rope_stride()};
  }

 private:
  friend detail::CacheFile;
  bool can_restore(Index position, Index rows) const { return rows == position && rows >= 0 && rows <= capacity(); }
  void restore(Index, Index rows) { hold(rows); }
  Index latent_stride() const { return one_row ? config_.latent_dim + config_.rope_dim : config_.latent_dim; }
  Index rope_stride() const { return one_row ? latent_stride() : config_.rope_dim; }
  WideStorage<S>* rope_data() const {
    if constexpr (one_row)
      return latent_.data() + config_.latent_dim;
    else
      return rope_.data();
  }

  template <class C, class R>
  void check_rows(const C& latent, const R& rope_key) const {
    detail::require(latent.rows() == rope_key.rows() && latent.cols() == latent_dim() && rope_key.cols() == rope_dim(),
                    "a latent cache takes latent [n, latent_dim] and rope_key [n, rope_dim]; given latent ",
                    detail::Shape{latent.rows(), latent.cols()}, ", rope_key ",
                    detail::Shape{rope_key.rows(), rope_key.cols()}, " for latent_dim ", latent_dim(), ", rope_dim ",
                    rope_dim());
  }
  template <class C, class R>
  void write(const C& latent, const R& rope_key) {
    const auto& latents = viewable(latent);
    const auto& rope_keys = viewable(rope_key);
    for (Index i = 0; i < latent.rows(); ++i) {
      const Index row = rows_ + i;
      store_row(view(latents).row(i).data(), latent_dim(), latent_.data() + row * latent_stride(), scale_at(row));
      store_row(view(rope_keys).row(i).data(), rope_dim(), rope_data() + row * rope_stride(), nullptr);
    }
    hold(rows_ + latent.rows());
  }
  float* scale_at(Index row) const { return one_row ? nullptr : scales_.data() + row; }
  void hold(Index rows) {
    rows_ = rows;
    run_ = {.rows = rows, .position = 0, .latent = latent_.data(), .rope = rope_data(), .scales = scales_.data()};
  }
  void swap(LatentCache& other) noexcept {
    std::swap(config_, other.config_);
    std::swap(rows_, other.rows_);
    std::swap(run_, other.run_);
    std::swap(latent_, other.latent_);
    std::swap(rope_, other.rope_);
    std::swap(scales_, other.scales_);
  }

  LatentCacheConfig config_;
  Index rows_ = 0;
  LatentRun<S> run_;
  detail::Numbers<S> latent_;             // with the rope keys in it, except in int8
  detail::Numbers<float> rope_, scales_;  // int8 only
  Workspace workspace_;
};

}  // namespace qkv::inline QKV_ABI

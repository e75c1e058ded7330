// latent_cache.hpp — MLA's cache: one latent and one rope key per token, whatever the number of heads.
//
//     c  = RMSNorm(x·W_DKV)           [latent_dim]   normed before it is cached; keys and values of all heads come from it
//     kr = rotate(x·W_KR, position)   [rope_dim]     rotated before it is cached; shared by all heads
//
// latent_dim + rope_dim numbers per token: 512 + 64 in DeepSeek-V2 and V3. In the absorbed form a row [c | kr] *is* the
// key that all heads share, and its latent part is the value. An int8 cache keeps the latent as bytes with one scale
// per row, and the rope key, which sets the position, in float. DeepSeek-V2, arXiv:2405.04434, section 2.1.2 and 2.1.3.
//
// Before: latent_form.hpp   Next: paged_latent_cache.hpp
#pragma once

#include <utility>

#include "cache/latent_memory.hpp"
#include "rope.hpp"

namespace qkv { inline namespace QKV_ABI {

struct LatentCacheConfig {
  Index latent_dim = 0, rope_dim = 0;
  Index capacity = 0;  // the most rows it will hold
};

template <StorageType S = float>
class LatentCache {
 public:
  using Storage = S;

  /// Allocates all of the capacity. std::invalid_argument unless latent_dim, rope_dim and capacity are positive.
  explicit LatentCache(const LatentCacheConfig& config) : config_(config) {
    detail::require(config.latent_dim >= 1 && config.rope_dim >= 1 && config.capacity >= 1,
                    "a latent cache needs latent_dim, rope_dim and capacity >= 1; given ", config.latent_dim, ", ",
                    config.rope_dim, ", ", config.capacity);
    memory_ = detail::LatentMemory<S>(config.latent_dim, config.rope_dim, config.capacity);
  }

  /// A copy holds the same bytes in its own memory.
  LatentCache(const LatentCache& other) {
    if (other.config_.capacity == 0) return;
    *this = LatentCache(other.config_);
    memory_.copy_rows(other.memory_, 0, 0, other.rows_);
    hold(other.rows_);
  }
  /// A moved-from cache has capacity 0.
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
  /// Whether n more rows fit.
  bool make_room(Index n) const { return n <= max_append(); }

  /// Scratch memory for attention over this cache, kept between calls. A cache that was copied or moved starts with none.
  Workspace& workspace() { return workspace_; }

  /// Appends latent [n, latent_dim] (normed) and rope_key [n, rope_dim] (rotated) of any floating-point scalar.
  /// std::length_error unless n <= max_append(); errors leave the cache as it was.
  template <MatrixLike C, MatrixLike R>
  void append(const C& latent, const R& rope_key) {
    detail::check_latents(latent_dim(), rope_dim(), latent, rope_key);
    detail::require<std::length_error>(latent.rows() <= max_append(), "the latent cache (capacity ", capacity(),
                                       ", rows held ", rows_, ") takes at most ", max_append(), " more rows; given ",
                                       latent.rows());
    write(latent, rope_key);
  }
  /// False where the cache is full; the cache is unchanged then.
  template <MatrixLike C, MatrixLike R>
  [[nodiscard]] bool try_append(const C& latent, const R& rope_key) {
    detail::check_latents(latent_dim(), rope_dim(), latent, rope_key);
    if (!make_room(latent.rows())) return false;
    write(latent, rope_key);
    return true;
  }

  /// Truncates to `position`: rows from there on are removed. std::out_of_range unless can_truncate(position).
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

  /// Context shift: evicts rows first … first+n-1; later rows move n positions down. Latents have no position and are
  /// moved unchanged; rope keys are rotated by -n (`rope`: as for KvCache, of head_dim rope_dim). Equal to a cache
  /// built without those rows, but for one more rounding of each rope key to S, after any number of shifts: as
  /// KvCache::drop_rows. The first one allocates a second copy of the rope keys and 8 bytes per row; Shift::in_place
  /// allocates neither, and rounds at every shift. std::out_of_range unless 0 <= first and first + n <= rows(). Later
  /// shifts allocate nothing once the workspace is warm.
  template <class R>
  void drop_rows(Index first, Index n, const R& rope, Shift how = Shift::exact) {
    const auto* const rotation = detail::rope_of(rope);
    detail::check_shift(first, n, rows_, rotation, rope_dim());
    const auto scratch = workspace_.lease(detail::shift_bytes<WideStorage<S>>(rotation, rope_dim()));
    if (rotation && how == Shift::exact && n > 0 && first + n < rows_) memory_.keep_unrotated();
    memory_.shift(first, n, rows_, rotation, how, scratch.data(), [](Index row) { return row; });
    hold(rows_ - n);
  }

  /// Bytes of latents, rope keys and scales at capacity.
  Index bytes() const { return memory_.bytes(); }
  /// All other bytes: workspace, and unrotated rope keys for context shifts.
  Index overhead_bytes() const { return memory_.unrotated().bytes() + workspace_.bytes(); }

  /// What the cache holds: latents [rows, latent_dim], rope keys [rows, rope_dim].
  template <class T = detail::ReadAs<S>>
  Matrix<T> latent() const {
    return detail::load_latents<T, false>(latent_rows());
  }
  template <class T = detail::ReadAs<S>>
  Matrix<T> rope_keys() const {
    return detail::load_latents<T, true>(latent_rows());
  }

  /// For kernels; valid until the next change of the cache.
  LatentRows<S> latent_rows() const { return memory_.rows({&run_, rows_ > 0 ? 1U : 0U}, rows_); }

 private:
  friend detail::CacheFile;
  bool can_restore(Index position, Index rows) const { return rows == position && rows >= 0 && rows <= capacity(); }
  void restore(Index, Index rows) {
    memory_.unrotated().forget(0, rows);
    hold(rows);
  }
  template <class C, class R>
  void write(const C& latent, const R& rope_key) {
    const auto& latents = viewable(latent);
    const auto& rope_keys = viewable(rope_key);
    for (Index i = 0; i < latent.rows(); ++i)
      memory_.store(rows_ + i, view(latents).row(i).data(), view(rope_keys).row(i).data());
    hold(rows_ + latent.rows());
  }
  void hold(Index rows) {
    rows_ = rows;
    run_ = memory_.run(0, rows, 0);
  }
  void swap(LatentCache& other) noexcept {
    std::swap(config_, other.config_);
    std::swap(rows_, other.rows_);
    std::swap(run_, other.run_);
    std::swap(memory_, other.memory_);
  }

  LatentCacheConfig config_;
  Index rows_ = 0;
  LatentRun<S> run_;
  detail::LatentMemory<S> memory_;
  Workspace workspace_;
};

template <StorageType S>
inline constexpr bool detail::owns_rows<LatentCache<S>> = true;

}}  // namespace qkv::QKV_ABI

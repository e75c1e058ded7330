// ring_cache.hpp — a sliding window in fixed memory, for input of any length.
//
//     pinned │ slack + window                      slot(p) = p                                    p < pinned
//     0 … 3  │ 36 37 38 │ 31 32 33 34 35           slot(p) = pinned + (p − pinned) mod (window + slack)
//
// capacity = pinned + window + slack. A query at position p sees itself, the `window` positions before it and the pinned
// first ones: mask `prefix(pinned) | window(window, 0)`, which layers apply themselves. `slack` rows are held beyond
// the window: a chunk of up to slack rows is appended at once, while its first token still has its whole window, and up
// to slack rows can be truncated (speculative decoding). Longer chunks are appended in pieces of max_append() rows, as
// layers do.
//
// Pinned tokens keep their absolute positions, so their distance from the query grows without bound. Models with RoPE
// that were not trained for that need `positions_in_cache`: distances to pinned tokens are then those in a text without
// the evicted rows (in the rotation by layers with RoPE; stored keys, masks and scores are unaffected).
//
// Sliding window: Beltagy et al. 2020, arXiv:2004.05150; pinned first tokens ("attention sinks"): Xiao et al. 2023,
// arXiv:2309.17453.
//
// Before: kv_cache.hpp   Next: page_pool.hpp
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <limits>
#include <span>
#include <utility>

#include "kv_cache.hpp"

namespace qkv { inline namespace QKV_ABI {

struct RingCacheConfig {
  Index kv_heads = 1;
  Index head_dim = 0;
  Index v_head_dim = head_dim;
  Index window = 0;                 // rows before its own that a query sees: the `left` of window(left, 0)
  Index pinned = 0;                 // first rows, never evicted
  Index slack = 1;                  // the most rows that can be appended, or truncated, at once
  bool positions_in_cache = false;  // of the pinned rows, for RoPE: as in StreamingLLM
};

template <StorageType S = float>
class RingCache : public CacheInterface<RingCache<S>, S> {
  using Base = CacheInterface<RingCache<S>, S>;

 public:
  /// Allocates all its memory here. std::invalid_argument unless window, pinned >= 0 and slack >= 1.
  explicit RingCache(const RingCacheConfig& config)
      : Base({config.kv_heads, config.head_dim, config.v_head_dim}),
        window_(config.window),
        pinned_(config.pinned),
        oldest_(config.pinned),
        positions_in_cache_(config.positions_in_cache) {
    constexpr Index most = std::numeric_limits<Index>::max() / 4;
    detail::require(
        window_ >= 0 && window_ < most && pinned_ >= 0 && pinned_ < most && config.slack >= 1 && config.slack < most,
        "a ring cache needs window >= 0, pinned >= 0 and slack >= 1; given ", window_, ", ", pinned_, ", ",
        config.slack);
    ring_ = window_ + config.slack;
    block_ = detail::CacheBlocks<S>(this->shape_, capacity(), 1);
  }

  /// A copy holds the same bytes in its own memory.
  RingCache(const RingCache& other)
      : Base(other),
        window_(other.window_),
        pinned_(other.pinned_),
        ring_(other.ring_),
        position_(other.position_),
        oldest_(other.oldest_),
        positions_in_cache_(other.positions_in_cache_),
        block_(this->shape_, capacity(), 1) {
    for (std::size_t r = 0; r < other.n_runs_; ++r) {
      const Index row = slot(other.runs_[r].position);
      block_.copy_rows(other.block_, 0, row, 0, row, other.runs_[r].rows);
    }
    update_runs();
  }
  /// A moved-from cache has capacity 0.
  RingCache(RingCache&& other) noexcept { swap(other); }
  RingCache& operator=(RingCache other) noexcept {
    swap(other);
    return *this;
  }
  ~RingCache() = default;

  Index position() const { return position_; }
  Index rows() const { return std::min(position_, pinned_) + std::max<Index>(position_ - oldest_, 0); }
  Index capacity() const { return pinned_ + ring_; }
  Index window() const { return window_; }
  Index pinned() const { return pinned_; }
  Index slack() const { return ring_ - window_; }
  bool positions_in_cache() const { return positions_in_cache_; }

  /// The most rows that one append may add while the first of them still has its whole window: slack, and more while
  /// the window is not full.
  Index max_append() const { return ring_ - position_ + first_visible(position_); }

  /// Whether every row that a query at `position` sees is still held; true for the last slack positions.
  bool can_truncate(Index position) const {
    return position >= 0 && position <= position_ &&
           (first_visible(position) >= oldest_ || first_visible(position) >= position);
  }

  void clear() { rewind(0); }

  /// Lower-level than append: overwrites the held rows at absolute positions position … position+n-1, and appends those
  /// from position() on. std::out_of_range where one of them is neither, std::length_error past max_append().
  template <MatrixLike K, MatrixLike V>
  void scatter_rows(Index position, const K& k, const V& v) {
    detail::check_rows(this->shape_, k, v);
    this->check_write(position, k.rows());
    const Index end = position + k.rows();
    detail::require<std::out_of_range>(position >= oldest_ || end <= pinned_ || oldest_ == pinned_,
                                       "the ring holds positions below ", pinned_, " and from ", oldest_,
                                       " on; rows to write begin at ", position, " and end before ", end);
    const auto& keys = viewable(k);
    const auto& values = viewable(v);
    for (Index i = 0; i < k.rows(); ++i)
      block_.store(0, slot(position + i), view(keys).row(i).data(), view(values).row(i).data());
    position_ = std::max(position_, end);
    oldest_ = std::max(oldest_, position_ - ring_);
    update_runs();
  }

  /// Bytes of keys, values and scales at capacity.
  Index bytes() const { return block_.bytes(); }
  /// All other bytes: the workspace.
  Index overhead_bytes() const { return this->workspace_.bytes(); }

  /// Rollback, for a layer's call that fails (layer/appended.hpp): saves the old rows that n more rows overwrite. Sized
  /// for the most rows that n can overwrite, so it does not depend on how full the ring is.
  std::size_t undo_bytes(Index n) const {
    detail::Carver carver(nullptr);
    carver.take<Undo>(1);
    const auto count = [&]<class N>(N*, Index numbers) { carver.take<N>(numbers); };
    const Index most = std::min(n, ring_);
    block_.for_each_array(0, pinned_, most, count);
    block_.for_each_array(0, pinned_, std::min<Index>(most, 1), count);  // they may lie in two pieces
    return carver.used();
  }
  void prepare_undo(Index n, std::byte* memory) const {
    *reinterpret_cast<Undo*>(memory) = {n, position_, oldest_};
    for_each_undone(n, memory, [](auto* held, auto* kept, Index count) { std::copy_n(held, count, kept); });
  }
  void undo(std::byte* memory) {
    const Undo before = *reinterpret_cast<const Undo*>(memory);
    position_ = before.position, oldest_ = before.oldest;
    for_each_undone(before.n, memory, [](auto* held, auto* kept, Index count) { std::copy_n(kept, count, held); });
    update_runs();
  }

  /// For kernels; valid until the next change of the cache. One run until the first row is evicted, then up to three:
  /// pinned, tail and head of the ring.
  KeyRows<S> key_rows() const {
    return detail::key_rows_of<S>(this->shape_, capacity(), std::span(runs_).first(n_runs_), rows());
  }

 private:
  friend Base;
  friend detail::CacheFile;

  /// The first position in the ring if so many rows are held; can_restore checks that it is valid.
  Index oldest_for(Index position, Index rows) const {
    return std::max(pinned_, position) - (rows - std::min(position, pinned_));
  }
  bool can_restore(Index position, Index rows) const {
    if (position < 0 || position > std::numeric_limits<Index>::max() / 4 || rows < std::min(position, pinned_))
      return false;
    const Index oldest = oldest_for(position, rows);
    return rows <= capacity() && oldest >= pinned_ && std::max(position, pinned_) - oldest <= ring_ &&
           (first_visible(position) >= oldest || first_visible(position) >= position);
  }
  void restore(Index position, Index rows) {
    oldest_ = oldest_for(position, rows);
    position_ = position;
    update_runs();
  }
  /// The oldest position outside the pinned ones that a query at `position` sees.
  Index first_visible(Index position) const { return std::max(pinned_, position - window_); }
  Index slot(Index position) const { return position < pinned_ ? position : pinned_ + (position - pinned_) % ring_; }
  void rewind(Index position) {
    position_ = position;
    oldest_ = std::min(oldest_, std::max(pinned_, position));
    update_runs();
  }
  struct Undo {
    Index n, position, oldest;
  };
  /// f(held, kept, count) for the arrays of the rows that n more rows will overwrite, and their copies in `memory`.
  template <class F>
  void for_each_undone(Index n, std::byte* memory, F&& f) const {
    detail::Carver carver(memory);
    carver.take<Undo>(1);
    const Index held = std::max<Index>(position_ - oldest_, 0), rows = std::clamp<Index>(held + n - ring_, 0, held),
                before_end = std::min(rows, capacity() - slot(oldest_));
    const auto arrays = [&]<class N>(N* held_numbers, Index count) { f(held_numbers, carver.take<N>(count), count); };
    if (rows > 0) block_.for_each_array(0, slot(oldest_), before_end, arrays);
    if (rows > before_end) block_.for_each_array(0, pinned_, rows - before_end, arrays);
  }
  void add_run(Index position, Index rows) {
    if (rows > 0) runs_[n_runs_++] = block_.run(0, slot(position), rows, position);
  }
  void update_runs() {
    n_runs_ = 0;
    if (oldest_ == pinned_) return add_run(0, position_);  // nothing evicted: slots are positions
    add_run(0, pinned_);
    const Index rows = position_ - oldest_, before_end = std::min(rows, capacity() - slot(oldest_));
    add_run(oldest_, before_end);
    add_run(oldest_ + before_end, rows - before_end);
  }
  void swap(RingCache& other) noexcept {
    std::swap(this->shape_, other.shape_);
    std::swap(window_, other.window_);
    std::swap(pinned_, other.pinned_);
    std::swap(ring_, other.ring_);
    std::swap(position_, other.position_);
    std::swap(oldest_, other.oldest_);
    std::swap(positions_in_cache_, other.positions_in_cache_);
    std::swap(block_, other.block_);
    std::swap(runs_, other.runs_);
    std::swap(n_runs_, other.n_runs_);
  }

  Index window_ = 0, pinned_ = 0, ring_ = 0;
  Index position_ = 0;
  Index oldest_ = 0;  // of the positions >= pinned that are held
  bool positions_in_cache_ = false;
  detail::CacheBlocks<S> block_;
  std::array<KeyRun<S>, 3> runs_;
  std::size_t n_runs_ = 0;
};

template <StorageType S>
inline constexpr bool detail::owns_rows<RingCache<S>> = true;

}}  // namespace qkv::QKV_ABI

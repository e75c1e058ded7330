// paged_latent_cache.hpp — many sequences of latents in one pool of pages: a fork shares its prefix until one side writes.
//
//     pool      [page 0][page 1][page 2] …       a page: page_tokens rows of one latent and one rope key
//     sequence  table 2, 0, 1                    fork: the same table, each page counted once more
//
// The paged cache of keys and values (paged_cache.hpp) for MLA: whoever writes into a page that others read copies it first.
// Rows are stored as in latent_cache.hpp, and a sequence gives the same bits from either.
// PagedAttention: Kwon et al. 2023, arXiv:2309.06180.
//
// The pool owns the bytes and must outlive its sequences; it and they belong to one thread at a time.
//
// Before: latent_cache.hpp   Next: saved_cache.hpp
#pragma once

#include <algorithm>
#include <span>
#include <utility>
#include <vector>

#include "latent_cache.hpp"

namespace qkv::inline QKV_ABI {

struct LatentPagePoolConfig {
  Index latent_dim = 0, rope_dim = 0;
  Index page_tokens = 64;
  Index pages = 0;
};

template <StorageType S>
class PagedLatentCache;

/// A fixed number of pages, how many sequences use each, and which are free.
template <StorageType S = float>
class LatentPagePool {
 public:
  /// Allocates everything it will ever need. std::invalid_argument unless all sizes are positive.
  explicit LatentPagePool(const LatentPagePoolConfig& config) : config_(config) {
    detail::require(config.latent_dim >= 1 && config.rope_dim >= 1 && config.page_tokens >= 1 && config.pages >= 1,
                    "a pool of latent pages needs latent_dim, rope_dim, page_tokens and pages >= 1; given ",
                    config.latent_dim, ", ", config.rope_dim, ", ", config.page_tokens, ", ", config.pages);
    const Index rows = detail::checked_product(config.page_tokens, config.pages);
    latent_ = detail::Numbers<S>(detail::checked_product(rows, latent_stride()));
    if constexpr (has_row_scale<S>) {
      rope_ = detail::Numbers<float>(detail::checked_product(rows, config.rope_dim));
      scales_ = detail::Numbers<float>(rows);
    }
    references_.assign(static_cast<std::size_t>(config.pages), 0);
    free_.reserve(references_.size());
    for (Index page = config.pages; page-- > 0;) free_.push_back(page);  // page 0 goes first
  }
  LatentPagePool(const LatentPagePool&) = delete;  // sequences point here
  LatentPagePool& operator=(const LatentPagePool&) = delete;
  ~LatentPagePool() = default;

  Index latent_dim() const { return config_.latent_dim; }
  Index rope_dim() const { return config_.rope_dim; }
  Index page_tokens() const { return config_.page_tokens; }
  Index pages() const { return config_.pages; }
  Index free_pages() const { return static_cast<Index>(free_.size()); }

  /// Bytes of latents, rope keys and scales in all pages.
  Index bytes() const { return latent_.bytes() + rope_.bytes() + scales_.bytes(); }
  /// … and in those that are in use; a shared page counts once.
  Index used_bytes() const { return page_bytes() * (pages() - free_pages()); }
  Index page_bytes() const { return bytes() / pages(); }
  /// Bytes of the tables beside them. bytes() + overhead_bytes() is everything the pool has allocated.
  Index overhead_bytes() const {
    return static_cast<Index>(references_.capacity() * sizeof(references_[0]) + free_.capacity() * sizeof(free_[0]));
  }
  /// Whether nothing is missing: unlike PagePool this one has no owner to ask.
  template <class F>
  bool make_room(const F& missing) const {
    return missing() <= 0;
  }
  /// How many sequences use a page; 0 where it is free. std::out_of_range for a page that is not there.
  Index references(Index page) const {
    detail::require<std::out_of_range>(page >= 0 && page < pages(), "the pool has pages 0 ... ", pages() - 1,
                                       "; given page ", page);
    return references_[static_cast<std::size_t>(page)];
  }

 private:
  friend PagedLatentCache<S>;

  Index latent_stride() const { return config_.latent_dim + (has_row_scale<S> ? 0 : config_.rope_dim); }
  Index rope_stride() const { return has_row_scale<S> ? config_.rope_dim : latent_stride(); }
  S* latent(Index row) const { return latent_.data() + row * latent_stride(); }
  WideStorage<S>* rope(Index row) const {
    if constexpr (has_row_scale<S>)
      return rope_.data() + row * rope_stride();
    else
      return latent(row) + config_.latent_dim;
  }
  float* scale(Index row) const { return has_row_scale<S> ? scales_.data() + row : nullptr; }

  Index acquire() {
    const Index page = free_.back();
    free_.pop_back();
    references_[static_cast<std::size_t>(page)] = 1;
    return page;
  }
  void retain(Index page) { ++references_[static_cast<std::size_t>(page)]; }
  void release(Index page) {
    if (--references_[static_cast<std::size_t>(page)] == 0) free_.push_back(page);
  }
  void copy_rows(Index from, Index to, Index n) {
    from *= page_tokens(), to *= page_tokens();
    std::copy_n(latent(from), n * latent_stride(), latent(to));
    if constexpr (has_row_scale<S>) {
      std::copy_n(rope(from), n * rope_stride(), rope(to));
      std::copy_n(scale(from), n, scale(to));
    }
  }

  LatentPagePoolConfig config_;
  detail::Numbers<S> latent_;             // with the rope keys in it, except in int8
  detail::Numbers<float> rope_, scales_;  // int8 only
  std::vector<Index> references_, free_;
};

/// One sequence: a table of pages. Gives its pages back when it is cleared, truncated or destroyed.
template <StorageType S = float>
class PagedLatentCache {
 public:
  using Storage = S;

  /// A sequence of at most `capacity` rows (at most, and unless given, those of the whole pool).
  explicit PagedLatentCache(LatentPagePool<S>& pool) : PagedLatentCache(pool, pool.pages() * pool.page_tokens()) {}
  PagedLatentCache(LatentPagePool<S>& pool, Index capacity) : pool_(&pool), capacity_(capacity) {
    detail::require(capacity >= 1 && capacity <= pool.pages() * page_tokens(),
                    "a paged sequence needs 1 <= capacity <= pages * page_tokens = ", pool.pages() * page_tokens(),
                    "; given ", capacity);
    reserve();
  }
  PagedLatentCache(const PagedLatentCache&) = delete;  // fork() instead
  /// What was moved from has capacity 0.
  PagedLatentCache(PagedLatentCache&& other) noexcept { swap(other); }
  PagedLatentCache& operator=(PagedLatentCache&& other) noexcept {
    PagedLatentCache moved(std::move(other));
    swap(moved);
    return *this;
  }
  ~PagedLatentCache() { release_from(0); }

  /// A second sequence with the same rows (those before `position`), which shares the pages until one of the two writes.
  PagedLatentCache fork() const { return fork(rows_); }
  PagedLatentCache fork(Index position) const {
    detail::require<std::out_of_range>(can_truncate(position), "fork(position) needs 0 <= position <= ", rows_,
                                       "; given ", position);
    PagedLatentCache copy;
    copy.pool_ = pool_;
    copy.capacity_ = capacity_;
    if (!pool_) return copy;
    copy.reserve();
    for (const Index page : pages().first(static_cast<std::size_t>(pages_for(position)))) {
      pool_->retain(page);
      copy.table_.push_back(page);
    }
    copy.hold(position);
    return copy;
  }

  Index position() const { return rows_; }  // of the next token
  Index rows() const { return rows_; }
  Index capacity() const { return capacity_; }
  Index latent_dim() const { return pool_ ? pool_->latent_dim() : 0; }
  Index rope_dim() const { return pool_ ? pool_->rope_dim() : 0; }
  Index page_tokens() const { return pool_ ? pool_->page_tokens() : 1; }
  /// The table: page i holds rows i·page_tokens …
  std::span<const Index> pages() const { return table_; }

  /// What capacity and the pool's free pages allow now; other sequences of the pool change it.
  Index max_append() const {
    if (!pool_) return 0;
    const Index in_last_page = static_cast<Index>(table_.size()) * page_tokens() - rows_;
    const Index free = pool_->free_pages() - (copies_last_page(0) ? 1 : 0);
    return free < 0 ? 0 : std::min(capacity_ - rows_, in_last_page + free * page_tokens());
  }

  /// Scratch memory for attention over this cache, kept between calls. A fork starts with none.
  Workspace& workspace() { return workspace_; }

  /// Appends latent [n, latent_dim] (normed) and rope_key [n, rope_dim] (rotated) of any floating-point scalar.
  /// std::length_error unless n <= max_append(); errors leave cache and pool as they were.
  template <MatrixLike C, MatrixLike R>
  void append(const C& latent, const R& rope_key) {
    check_rows(latent, rope_key);
    detail::require<std::length_error>(latent.rows() <= max_append(), "the paged latent cache (capacity ", capacity(),
                                       ", rows held ", rows_, ", free pages ", pool_ ? pool_->free_pages() : 0,
                                       ") takes at most ", max_append(), " more rows; given ", latent.rows());
    write(latent, rope_key);
  }
  /// False where there is no room; nothing has changed then.
  template <MatrixLike C, MatrixLike R>
  [[nodiscard]] bool try_append(const C& latent, const R& rope_key) {
    check_rows(latent, rope_key);
    if (latent.rows() > max_append()) return false;
    write(latent, rope_key);
    return true;
  }

  /// Goes back to `position`; pages that hold no row any more are given back. std::out_of_range unless
  /// can_truncate(position).
  void truncate(Index position) {
    detail::require<std::out_of_range>(can_truncate(position), "truncate(position) needs 0 <= position <= ", rows_,
                                       "; given position ", position);
    rewind(position);
  }
  [[nodiscard]] bool try_truncate(Index position) {
    if (!can_truncate(position)) return false;
    rewind(position);
    return true;
  }
  bool can_truncate(Index position) const { return position >= 0 && position <= rows_; }
  void clear() { rewind(0); }

  /// For layers and batches, which must fit as a whole: see PagedCache.
  void make_room(Index) const {}
  const LatentPagePool<S>* pool() const { return pool_; }
  Index pages_to_append(Index n, Index copied = 0) const {
    if (n == 0) return 0;
    return pages_for(rows_ + n) - static_cast<Index>(table_.size()) + (copies_last_page(copied) ? 1 : 0);
  }
  bool shares_last_page(const PagedLatentCache& other) const {
    return pool_ == other.pool_ && fills_last_page() && other.fills_last_page() && table_.back() == other.table_.back();
  }

  /// Bytes of the pages in its table, shared or not. They are the pool's: add up LatentPagePool::bytes(), not these.
  Index bytes() const { return pool_ ? static_cast<Index>(table_.size()) * pool_->page_bytes() : 0; }
  /// Bytes of its own table and workspace: everything that the sequence itself has allocated.
  Index overhead_bytes() const {
    return static_cast<Index>(table_.capacity() * sizeof(table_[0]) + runs_.capacity() * sizeof(runs_[0]) +
                              workspace_.bytes());
  }

  /// What the cache holds: latents [rows, latent_dim], rope keys [rows, rope_dim].
  template <class T = detail::ReadAs<S>>
  Matrix<T> latent() const {
    Matrix<T> out(rows_, latent_dim());
    for (Index i = 0; i < rows_; ++i)
      load_row(pool_->latent(slot(i)), latent_dim(), has_row_scale<S> ? *pool_->scale(slot(i)) : 1.0F,
               out.data() + i * latent_dim());
    return out;
  }
  template <class T = detail::ReadAs<S>>
  Matrix<T> rope_keys() const {
    Matrix<T> out(rows_, rope_dim());
    for (Index i = 0; i < rows_; ++i) load_row(pool_->rope(slot(i)), rope_dim(), 1.0F, out.data() + i * rope_dim());
    return out;
  }

  /// For kernels, one run per page; valid until the next change of the cache.
  LatentRows<S> latent_rows() const {
    return {.runs = runs_,
            .rows = rows_,
            .latent_dim = latent_dim(),
            .rope_dim = rope_dim(),
            .latent_row_stride = pool_ ? pool_->latent_stride() : 0,
            .rope_row_stride = pool_ ? pool_->rope_stride() : 0};
  }

 private:
  PagedLatentCache() = default;

  void reserve() {
    table_.reserve(static_cast<std::size_t>(pages_for(capacity_)));
    runs_.reserve(table_.capacity());
  }
  Index pages_for(Index rows) const { return rows / page_tokens() + (rows % page_tokens() > 0 ? 1 : 0); }
  bool fills_last_page() const { return rows_ % page_tokens() > 0; }  // the next row goes into a page that is there
  bool copies_last_page(Index copied) const {
    return fills_last_page() && pool_->references(table_.back()) - copied > 1;
  }
  Index slot(Index row) const {
    return table_[static_cast<std::size_t>(row / page_tokens())] * page_tokens() + row % page_tokens();
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
    if (latent.rows() == 0) return;
    const auto& latents = viewable(latent);
    const auto& rope_keys = viewable(rope_key);
    if (copies_last_page(0)) {
      const Index fresh = pool_->acquire();
      pool_->copy_rows(table_.back(), fresh, rows_ % page_tokens());
      pool_->release(table_.back());
      table_.back() = fresh;
    }
    const Index end = rows_ + latent.rows();
    while (static_cast<Index>(table_.size()) < pages_for(end)) table_.push_back(pool_->acquire());
    for (Index i = 0; i < latent.rows(); ++i) {
      const Index to = slot(rows_ + i);
      store_row(view(latents).row(i).data(), latent_dim(), pool_->latent(to), pool_->scale(to));
      store_row(view(rope_keys).row(i).data(), rope_dim(), pool_->rope(to), nullptr);
    }
    hold(end);
  }
  void release_from(Index first) {
    while (static_cast<Index>(table_.size()) > first) {
      pool_->release(table_.back());
      table_.pop_back();
    }
  }
  void rewind(Index position) {
    release_from(pages_for(position));
    hold(position);
  }
  /// Pages before the first row that changes keep their runs: amortised O(1) per appended row.
  void hold(Index rows) {
    const Index kept = std::min(rows_, rows) / page_tokens();
    rows_ = rows;
    runs_.resize(static_cast<std::size_t>(kept));
    for (Index first = kept * page_tokens(); first < rows_; first += page_tokens()) {
      const Index at = slot(first);
      runs_.push_back({.rows = std::min(page_tokens(), rows_ - first),
                       .position = first,
                       .latent = pool_->latent(at),
                       .rope = pool_->rope(at),
                       .scales = pool_->scale(at)});
    }
  }
  void swap(PagedLatentCache& other) noexcept {
    std::swap(pool_, other.pool_);
    std::swap(capacity_, other.capacity_);
    std::swap(rows_, other.rows_);
    std::swap(table_, other.table_);
    std::swap(runs_, other.runs_);
  }

  LatentPagePool<S>* pool_ = nullptr;
  Index capacity_ = 0, rows_ = 0;
  std::vector<Index> table_;
  std::vector<LatentRun<S>> runs_;
  Workspace workspace_;
};

}  // namespace qkv::inline QKV_ABI

// paged_latent_cache.hpp — many sequences of latents in one pool of pages: a fork shares its prefix until one side writes.
//
//     pool      [page 0][page 1][page 2] …       a page: page_tokens rows of one latent and one rope key
//     sequence  table 2, 0, 1                    fork: the same table, each page counted once more
//
// The paged cache of keys and values (paged_cache.hpp) for MLA: a shared page is copied before it is written.
// Rows are stored as in latent_cache.hpp, and a sequence gives the same bits from either.
// PagedAttention: Kwon et al. 2023, arXiv:2309.06180.
//
// The pool owns the bytes and must outlive its sequences (page_pool.hpp); it and they belong to one thread at a time.
//
// Before: latent_cache.hpp   Next: absorbed_attention.hpp
#pragma once

#include <utility>

#include "cache/paged_rows.hpp"
#include "latent_cache.hpp"

namespace qkv { inline namespace QKV_ABI {

struct LatentPagePoolConfig {
  Index latent_dim = 0, rope_dim = 0;
  Index page_tokens = 64;
  Index pages = 0;
};

template <StorageType S>
class PagedLatentCache;

/// Pages of latents and rope keys. PageUse: reference counts, free pages, eviction.
template <StorageType S = float>
class LatentPagePool : public PageUse {
 public:
  /// Allocates all its memory here. std::invalid_argument unless all sizes are positive.
  explicit LatentPagePool(const LatentPagePoolConfig& config) : PageUse(config.page_tokens, config.pages) {
    detail::require(config.latent_dim >= 1 && config.rope_dim >= 1,
                    "a pool of latent pages needs latent_dim and rope_dim >= 1; given ", config.latent_dim, " and ",
                    config.rope_dim);
    memory_ = detail::LatentMemory<S>(config.latent_dim, config.rope_dim,
                                      detail::checked_product(config.page_tokens, config.pages));
  }

  Index latent_dim() const { return memory_.latent_dim(); }
  Index rope_dim() const { return memory_.rope_dim(); }

  /// Bytes of latents, rope keys and scales in all pages.
  Index bytes() const { return memory_.bytes(); }
  /// … and in those that are in use; a shared page counts once.
  Index used_bytes() const { return page_bytes() * (pages() - free_pages()); }
  Index page_bytes() const { return bytes() / pages(); }
  /// Bytes of the tables, and of unrotated rope keys for context shifts.
  Index overhead_bytes() const { return PageUse::overhead_bytes() + memory_.unrotated().bytes(); }

 private:
  friend PagedLatentCache<S>;
  friend detail::PagedRows<LatentPagePool>;
  using Run = LatentRun<S>;
  Run run(Index page, Index rows, Index position) const { return memory_.run(page * page_tokens(), rows, position); }
  void copy_page(Index from, Index to, Index rows) {
    memory_.copy_rows(memory_, from * page_tokens(), to * page_tokens(), rows);
  }
  Index rotated_dim() const { return rope_dim(); }
  template <class T>
  std::size_t shift_bytes(const Rope<T>* rope) const {
    return detail::shift_bytes<WideStorage<S>>(rope, rope_dim());
  }
  void keep_unrotated() { memory_.keep_unrotated(); }
  void forget_unrotated(Index page, Index rows) const { memory_.unrotated().forget(page * page_tokens(), rows); }
  template <class T, class At>
  void shift(Index first, Index n, Index rows, const Rope<T>* rope, Shift how, std::byte* scratch, const At& at) {
    memory_.shift(first, n, rows, rope, how, scratch, [&](Index row) {
      const auto [page, place] = at(row);
      return page * page_tokens() + place;
    });
  }

  detail::LatentMemory<S> memory_;
};

/// One sequence: a table of pages, released when it is cleared, truncated or destroyed.
template <StorageType S = float>
class PagedLatentCache : public detail::PagedRows<LatentPagePool<S>> {
  using Pages = detail::PagedRows<LatentPagePool<S>>;

 public:
  using Storage = S;
  using Pages::rows, Pages::max_append, Pages::page_tokens, Pages::make_room, Pages::can_truncate;

  /// A sequence of at most `capacity` rows; by default, and at most, those of the whole pool.
  explicit PagedLatentCache(LatentPagePool<S>& pool) : PagedLatentCache(pool, pool.pages() * pool.page_tokens()) {}
  PagedLatentCache(LatentPagePool<S>& pool, Index capacity) : Pages(pool, capacity) {}
  PagedLatentCache(const PagedLatentCache&) = delete;  // fork() instead
  /// A moved-from sequence has capacity 0.
  PagedLatentCache(PagedLatentCache&& other) noexcept { this->swap_pages(other); }
  PagedLatentCache& operator=(PagedLatentCache&& other) noexcept {
    PagedLatentCache moved(std::move(other));
    this->swap_pages(moved);
    return *this;
  }
  ~PagedLatentCache() = default;

  /// A second sequence with the same rows (those before `position`), which shares the pages until one of the two writes.
  PagedLatentCache fork() const { return fork(rows()); }
  PagedLatentCache fork(Index position) const {
    this->check_fork(position);
    PagedLatentCache copy;
    copy.share(*this, position);
    return copy;
  }

  Index latent_dim() const { return this->pool_ ? this->pool_->latent_dim() : 0; }
  Index rope_dim() const { return this->pool_ ? this->pool_->rope_dim() : 0; }

  /// Scratch memory for attention over this cache, kept between calls. A cache that was forked or moved starts with none.
  Workspace& workspace() { return workspace_; }

  /// Appends latent [n, latent_dim] (normed) and rope_key [n, rope_dim] (rotated) of any floating-point scalar.
  /// std::length_error where capacity or pool have no room, eviction included: nothing has changed then.
  template <MatrixLike C, MatrixLike R>
  void append(const C& latent, const R& rope_key) {
    detail::check_latents(latent_dim(), rope_dim(), latent, rope_key);
    detail::require<std::length_error>(make_room(latent.rows()), "the paged latent cache (capacity ", this->capacity(),
                                       ", rows held ", rows(), ", free pages ",
                                       this->pool_ ? this->pool_->free_pages() : 0, ") takes at most ", max_append(),
                                       " more rows; given ", latent.rows());
    write(latent, rope_key);
  }
  /// False where there is no room; nothing has changed then.
  template <MatrixLike C, MatrixLike R>
  [[nodiscard]] bool try_append(const C& latent, const R& rope_key) {
    detail::check_latents(latent_dim(), rope_dim(), latent, rope_key);
    if (!make_room(latent.rows())) return false;
    write(latent, rope_key);
    return true;
  }

  /// Truncates to `position`; pages without rows are released. std::out_of_range unless can_truncate(position).
  void truncate(Index position) {
    detail::require<std::out_of_range>(can_truncate(position), "truncate(position) needs 0 <= position <= ", rows(),
                                       "; given position ", position);
    this->rewind(position);
  }
  [[nodiscard]] bool try_truncate(Index position) {
    if (!can_truncate(position)) return false;
    this->rewind(position);
    return true;
  }

  /// Context shift, as LatentCache::drop_rows: the same bits. Shared pages from row `first` on are copied first;
  /// std::length_error where the pool has no pages for that: nothing has changed then. The first exact shift of any
  /// sequence allocates a second copy of the rope keys of all pages in the pool.
  template <class R>
  void drop_rows(Index first, Index n, const R& rope, Shift how = Shift::exact) {
    this->shift_rows(first, n, detail::rope_of(rope), how, workspace_);
  }

  /// Bytes of its own table and workspace: everything that the sequence itself has allocated.
  Index overhead_bytes() const { return this->table_bytes() + workspace_.bytes(); }

  /// What the cache holds: latents [rows, latent_dim], rope keys [rows, rope_dim].
  template <class T = detail::ReadAs<S>>
  Matrix<T> latent() const {
    return detail::load_latents<T, false>(latent_rows());
  }
  template <class T = detail::ReadAs<S>>
  Matrix<T> rope_keys() const {
    return detail::load_latents<T, true>(latent_rows());
  }

  /// For kernels, one run per page; valid until the next change of the cache.
  LatentRows<S> latent_rows() const {
    return this->pool_ ? this->pool_->memory_.rows(this->runs_, rows()) : LatentRows<S>{};
  }

 private:
  friend detail::CacheFile;
  PagedLatentCache() = default;

  Index slot(Index row) const { return this->page(row / page_tokens()) * page_tokens() + row % page_tokens(); }
  template <class C, class R>
  void write(const C& latent, const R& rope_key) {
    const Index first = rows(), n = latent.rows();
    if (n == 0) return;
    const auto& latents = viewable(latent);
    const auto& rope_keys = viewable(rope_key);
    this->own(first, n);
    for (Index i = 0; i < n; ++i)
      this->pool_->memory_.store(slot(first + i), view(latents).row(i).data(), view(rope_keys).row(i).data());
    this->hold(first + n, first / page_tokens());
  }

  Workspace workspace_;
};

template <StorageType S>
inline constexpr bool detail::owns_rows<PagedLatentCache<S>> = true;

}}  // namespace qkv::QKV_ABI

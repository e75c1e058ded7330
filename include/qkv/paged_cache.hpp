// paged_cache.hpp — many sequences in one pool of pages: allocated page by page, shared prefixes stored once.
//
//     pool      [page 0][page 1][page 2][page 3][page 4] …       a page: [kv_head][page_tokens][head_dim]
//     sequence  table 3, 0, 4    rows 0 … 2·page_tokens+i        fork: table 3, 0, 4 as well, each page counted once
//
// `fork` gives a second sequence over the same pages; a shared page is copied before it is written (copy-on-write).
// `fork(position)` shares a prefix. PagedAttention: Kwon et al. 2023, arXiv:2309.06180.
//
// Where the pool has no page left and evicting frees none (page_pool.hpp), a write is an error, or false from the try_
// forms, and the sequence is as it was. Pool and sequences belong to one thread at a time.
//
// Before: page_pool.hpp   Next: saved_cache.hpp
#pragma once

#include <algorithm>
#include <utility>

#include "cache/paged_rows.hpp"
#include "kv_cache.hpp"
#include "page_pool.hpp"

namespace qkv { inline namespace QKV_ABI {

/// One sequence: a table of pages, released when it is cleared, truncated or destroyed. Appending a row costs O(1)
/// beyond writing its bytes, whatever the number of pages, and allocates nothing.
template <StorageType S = float>
class PagedCache : public CacheInterface<PagedCache<S>, S>, public detail::PagedRows<PagePool<S>> {
  using Base = CacheInterface<PagedCache<S>, S>;
  using Pages = detail::PagedRows<PagePool<S>>;

 public:
  using Pages::page_tokens, Pages::make_room;

  /// A sequence of at most `capacity` rows; by default, and at most, those of the whole pool.
  explicit PagedCache(PagePool<S>& pool) : PagedCache(pool, pool.pages() * pool.page_tokens()) {}
  PagedCache(PagePool<S>& pool, Index capacity) : Base(pool.shape()), Pages(pool, capacity) {}
  PagedCache(const PagedCache&) = delete;  // fork() instead
  /// A moved-from sequence has capacity 0.
  PagedCache(PagedCache&& other) noexcept { swap(other); }
  PagedCache& operator=(PagedCache&& other) noexcept {
    PagedCache moved(std::move(other));
    swap(moved);
    return *this;
  }
  ~PagedCache() = default;

  /// A second sequence with the same rows (those before `position`), which shares the pages until one of the two writes.
  PagedCache fork() const { return fork(this->rows()); }
  PagedCache fork(Index position) const {
    this->check_fork(position);
    PagedCache copy;
    copy.shape_ = this->shape_;
    copy.share(*this, position);
    return copy;
  }

  /// Lower-level than append: overwrites rows position … position+n-1, and appends those past rows(). Shared pages are
  /// copied first. std::out_of_range where rows would be left out, std::length_error where capacity or the pool is
  /// exhausted: nothing has changed then.
  template <MatrixLike K, MatrixLike V>
  void scatter_rows(Index position, const K& k, const V& v) {
    detail::check_rows(this->shape_, k, v);
    const Index n = k.rows();
    auto* const pool = this->pool_;
    this->ask_for([&] { return this->missing_pages(position, n); });
    this->check_write(position, n);
    if (n == 0) return;
    this->require_pages(position, n);
    const auto& keys = viewable(k);
    const auto& values = viewable(v);
    this->own(position, n);
    for (Index i = 0; i < n; ++i)
      pool->pages_.store(this->page((position + i) / page_tokens()), (position + i) % page_tokens(),
                         view(keys).row(i).data(), view(values).row(i).data());
    this->hold(std::max(this->rows(), position + n), position / page_tokens());
  }

  /// Context shift, as KvCache::drop_rows: the same bits. Shared pages from row `first` on are copied first;
  /// std::length_error where the pool has no pages for that: nothing has changed then. The first exact shift of any
  /// sequence allocates a second copy of the keys of all pages in the pool.
  template <class R>
  void drop_rows(Index first, Index n, const R& rope, Shift how = Shift::exact) {
    this->shift_rows(first, n, detail::rope_of(rope), how, this->workspace_);
  }

  /// Bytes of its own table and workspace: everything that the sequence itself has allocated.
  Index overhead_bytes() const { return this->table_bytes() + this->workspace_.bytes(); }

  /// For kernels, one run per page; valid until the next change of the cache.
  KeyRows<S> key_rows() const { return detail::key_rows_of<S>(this->shape_, page_tokens(), this->runs_, this->rows()); }

 private:
  friend Base;
  friend detail::CacheFile;
  PagedCache() = default;
  void swap(PagedCache& other) noexcept {
    std::swap(this->shape_, other.shape_);
    this->swap_pages(other);
  }
};

template <StorageType S>
inline constexpr bool detail::owns_rows<PagedCache<S>> = true;

}}  // namespace qkv::QKV_ABI

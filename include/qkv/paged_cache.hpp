// paged_cache.hpp — many sequences in one pool of pages: memory is taken as it is needed, and shared prefixes are kept once.
//
//     pool      [page 0][page 1][page 2][page 3][page 4] …       a page: [kv_head][page_tokens][head_dim]
//     sequence  table 3, 0, 4    rows 0 … 2·page_tokens+i        fork: table 3, 0, 4 as well, each page counted once
//
// `fork` gives a second sequence over the same pages; whoever writes into a page that others read copies it first
// (copy-on-write). `fork(position)` shares a prefix. PagedAttention: Kwon et al. 2023, arXiv:2309.06180.
//
// Where the pool has no page left and evicting frees none (page_pool.hpp), a write is an error, or false from the try_
// forms, and the sequence is as it was. Pool and sequences belong to one thread at a time.
//
// Before: page_pool.hpp   Next: latent_cache.hpp
#pragma once

#include <algorithm>
#include <span>
#include <utility>
#include <vector>

#include "kv_cache.hpp"
#include "page_pool.hpp"

namespace qkv::inline QKV_ABI {

/// One sequence: a table of pages. Gives its pages back when it is cleared, truncated or destroyed. A row costs O(1) beside
/// its own bytes to append, however many pages there are, and allocates nothing.
template <StorageType S = float>
class PagedCache : public CacheInterface<PagedCache<S>, S> {
  using Base = CacheInterface<PagedCache<S>, S>;

 public:
  /// A sequence of at most `capacity` rows (at most, and unless given, those of the whole pool).
  explicit PagedCache(PagePool<S>& pool) : PagedCache(pool, pool.pages() * pool.page_tokens()) {}
  PagedCache(PagePool<S>& pool, Index capacity) : Base(pool.shape()), pool_(&pool), capacity_(capacity) {
    detail::require(capacity >= 1 && capacity <= pool.pages() * page_tokens(),
                    "a paged sequence needs 1 <= capacity <= pages * page_tokens = ", pool.pages() * page_tokens(),
                    "; given ", capacity);
    table_.reserve(static_cast<std::size_t>(pages_for(capacity)));
    runs_.reserve(table_.capacity());
  }
  PagedCache(const PagedCache&) = delete;  // fork() instead
  /// What was moved from has capacity 0.
  PagedCache(PagedCache&& other) noexcept { swap(other); }
  PagedCache& operator=(PagedCache&& other) noexcept {
    PagedCache moved(std::move(other));
    swap(moved);
    return *this;
  }
  ~PagedCache() { release_from(0); }

  /// A second sequence with the same rows (those before `position`), which shares the pages until one of the two writes.
  PagedCache fork() const { return fork(rows_); }
  PagedCache fork(Index position) const {
    detail::require<std::out_of_range>(can_truncate(position), "fork(position) needs 0 <= position <= ", rows_,
                                       "; given ", position);
    PagedCache copy;
    copy.shape_ = this->shape_;
    copy.pool_ = pool_;
    copy.capacity_ = capacity_;
    copy.table_.reserve(table_.capacity());
    copy.runs_.reserve(runs_.capacity());
    for (const Index page : pages().first(static_cast<std::size_t>(pages_for(position)))) {
      pool_->retain(page);
      copy.table_.push_back(page);
    }
    copy.rewind(position);
    return copy;
  }

  Index position() const { return rows_; }
  Index rows() const { return rows_; }
  Index capacity() const { return capacity_; }
  Index page_tokens() const { return pool_ ? pool_->page_tokens() : 1; }
  /// The table: page i holds rows i·page_tokens …
  std::span<const Index> pages() const { return table_; }

  /// What capacity and the pool's free pages allow now; other sequences of the pool change it.
  Index max_append() const {
    if (!pool_) return 0;
    const Index in_last_page = static_cast<Index>(table_.size()) * page_tokens() - rows_;
    const bool copies_last_page = fills_last_page() && pool_->references(table_.back()) > 1;
    const Index free = pool_->free_pages() - (copies_last_page ? 1 : 0);
    return free < 0 ? 0 : std::min(capacity_ - rows_, in_last_page + free * page_tokens());
  }
  /// Whether n more rows fit, once the pool's owner has been asked for what is missing.
  bool make_room(Index n) {
    if (pool_) pool_->make_room([&] { return missing_pages(rows_, n); });
    return n <= max_append();
  }
  bool can_truncate(Index position) const { return position >= 0 && position <= rows_; }

  /// For batches, which must fit as a whole: where the pages come from, how many free ones n more rows take once `copied`
  /// other users of the last page have copied it, and whether another sequence would be such a user.
  PagePool<S>* pool() const { return pool_; }
  Index pages_to_append(Index n, Index copied = 0) const {
    if (n == 0) return 0;
    const bool copies = fills_last_page() && pool_->references(table_.back()) - copied > 1;
    return pages_for(rows_ + n) - static_cast<Index>(table_.size()) + (copies ? 1 : 0);
  }
  bool shares_last_page(const PagedCache& other) const {
    return pool_ == other.pool_ && fills_last_page() && other.fills_last_page() && table_.back() == other.table_.back();
  }

  /// Forgets all rows and gives the pages back.
  void clear() { rewind(0); }

  /// Below append: overwrites rows position … position+n-1, and appends those past rows(). Pages that another sequence
  /// reads are copied first. std::out_of_range where rows would be left out, std::length_error where capacity or the
  /// pool is exhausted: nothing has changed then.
  template <MatrixLike K, MatrixLike V>
  void scatter_rows(Index position, const K& k, const V& v) {
    detail::check_rows(this->shape_, k, v);
    if (pool_) pool_->make_room([&] { return missing_pages(position, k.rows()); });
    this->check_write(position, k.rows());
    if (k.rows() == 0) return;
    const Index end = position + k.rows();
    const Index first_page = position / page_tokens(), end_page = pages_for(end);
    const Index missing = missing_pages(position, k.rows());
    detail::require<std::length_error>(missing == 0, "the pool has ", pool_->free_pages(), " free pages of ",
                                       pool_->pages(), "; writing rows ", position, " ... ", end - 1, " needs ",
                                       pool_->free_pages() + missing);
    const auto& keys = viewable(k);
    const auto& values = viewable(v);
    for (Index i = first_page; i < end_page; ++i) make_owned(i);
    for (Index i = 0; i < k.rows(); ++i)
      pool_->pages_.store(page((position + i) / page_tokens()), (position + i) % page_tokens(),
                          view(keys).row(i).data(), view(values).row(i).data());
    hold(std::max(rows_, end), first_page);
  }

  /// Bytes of keys, values and scales in the pages of its table, shared or not. They are the pool's: add up
  /// PagePool::bytes(), not these.
  Index bytes() const { return pool_ ? static_cast<Index>(table_.size()) * pool_->page_bytes() : 0; }
  /// Bytes of its own table and workspace: everything that the sequence itself has allocated.
  Index overhead_bytes() const {
    return static_cast<Index>(table_.capacity() * sizeof(table_[0]) + runs_.capacity() * sizeof(runs_[0]) +
                              this->workspace_.bytes());
  }

  /// For kernels, one run per page; valid until the next change of the cache.
  KeyRows<S> key_rows() const { return detail::key_rows_of<S>(this->shape_, page_tokens(), runs_, rows_); }

 private:
  friend Base;
  friend detail::CacheFile;
  PagedCache() = default;

  /// Rows go into pages of its own; those that only this sequence uses are given back first.
  bool can_restore(Index position, Index rows) {
    if (!pool_ || rows != position || rows < 0 || rows > capacity_) return false;
    return pool_->make_room([&] {
      Index own = 0;
      for (Index i = 0; i < static_cast<Index>(table_.size()); ++i) own += owned(i) ? 1 : 0;
      return std::max<Index>(pages_for(rows) - pool_->free_pages() - own, 0);
    });
  }
  void restore(Index, Index rows) {
    rewind(0);
    for (Index i = 0; i < pages_for(rows); ++i) make_owned(i);
    hold(rows, 0);
  }

  Index pages_for(Index rows) const { return rows / page_tokens() + (rows % page_tokens() > 0 ? 1 : 0); }
  bool fills_last_page() const { return rows_ % page_tokens() > 0; }  // the next row goes into a page that is there
  Index page(Index i) const { return table_[static_cast<std::size_t>(i)]; }
  bool owned(Index i) const { return i < static_cast<Index>(table_.size()) && pool_->references(page(i)) == 1; }

  /// How many pages more than are free it takes to write n rows at `position`; 0 too where no page would help.
  Index missing_pages(Index position, Index n) const {
    if (n <= 0 || position < 0 || position > rows_ || n > capacity_ - position) return 0;
    Index needed = 0;
    for (Index i = position / page_tokens(); i < pages_for(position + n); ++i) needed += owned(i) ? 0 : 1;
    return std::max<Index>(needed - pool_->free_pages(), 0);
  }

  /// Makes entry i of the table, which may be the next one, a page that nobody else reads.
  void make_owned(Index i) {
    if (owned(i)) return;
    const Index fresh = pool_->acquire();
    if (i == static_cast<Index>(table_.size())) return table_.push_back(fresh);
    pool_->pages_.copy_rows(pool_->pages_, page(i), fresh, 0, std::min(page_tokens(), rows_ - i * page_tokens()));
    pool_->release(page(i));
    table_[static_cast<std::size_t>(i)] = fresh;
  }
  void release_from(Index first) {
    while (static_cast<Index>(table_.size()) > first) {
      pool_->release(table_.back());
      table_.pop_back();
    }
  }
  void rewind(Index position) {
    release_from(pages_for(position));
    hold(position, position / page_tokens());
  }
  /// Holds `rows` rows; the runs of the first `unchanged` pages are as they were, so that an append touches the last ones.
  void hold(Index rows, Index unchanged) {
    rows_ = rows;
    runs_.resize(std::min(static_cast<std::size_t>(unchanged), runs_.size()));
    for (Index i = static_cast<Index>(runs_.size()); i < static_cast<Index>(table_.size()); ++i) {
      const Index first = i * page_tokens();
      runs_.push_back(pool_->pages_.run(page(i), 0, std::min(page_tokens(), rows_ - first), first));
    }
  }
  void swap(PagedCache& other) noexcept {
    std::swap(this->shape_, other.shape_);
    std::swap(pool_, other.pool_);
    std::swap(capacity_, other.capacity_);
    std::swap(rows_, other.rows_);
    std::swap(table_, other.table_);
    std::swap(runs_, other.runs_);
  }

  PagePool<S>* pool_ = nullptr;
  Index capacity_ = 0, rows_ = 0;
  std::vector<Index> table_;
  std::vector<KeyRun<S>> runs_;
};

}  // namespace qkv::inline QKV_ABI

// cache/paged_rows.hpp — one sequence's table of pages over a pool, whatever a page holds: room, forks, copy-on-write.
//
//     table    3, 0, 4      page i holds rows i·page_tokens …; a shared page is copied before it is written
//
// A pool has pages (PageUse), `Run`, run(page, rows, position), copy_page(from, to, rows), and for context shifts rotated_dim(),
// shift_bytes(rope), keep_unrotated(), forget_unrotated(page, rows) and shift(…, at), at(row) being {page, place in it}.
//
// Before: cache/latent_memory.hpp   Next: cache/file.hpp
#pragma once

#include <algorithm>
#include <cstddef>
#include <span>
#include <utility>
#include <vector>

#include "../page_pool.hpp"

namespace qkv { inline namespace QKV_ABI { namespace detail {

template <class Pool>
class PagedRows {
 public:
  Index position() const { return rows_; }  // of the next token
  Index rows() const { return rows_; }
  Index capacity() const { return capacity_; }
  Index page_tokens() const { return pool_ ? pool_->page_tokens() : 1; }
  /// The table: page i holds rows i·page_tokens …
  std::span<const Index> pages() const { return table_; }

  /// As capacity and the free pages of the pool allow now; other sequences of the pool change it.
  Index max_append() const {
    if (!pool_) return 0;
    const Index in_last_page = static_cast<Index>(table_.size()) * page_tokens() - rows_;
    const bool copies_last_page = fills_last_page() && pool_->references(table_.back()) > 1;
    const Index free = pool_->free_pages() - (copies_last_page ? 1 : 0);
    return free < 0 ? 0 : std::min(capacity_ - rows_, in_last_page + free * page_tokens());
  }
  /// Whether n more rows fit, after eviction for missing pages.
  bool make_room(Index n) {
    ask_for([&] { return missing_pages(rows_, n); });
    return n <= max_append();
  }
  bool can_truncate(Index position) const { return position >= 0 && position <= rows_; }

  /// For batches, which must fit as a whole: the pool; the free pages that n more rows need once `copied` other
  /// sequences that share the last page have copied it; whether another sequence shares it.
  Pool* pool() const { return pool_; }
  Index pages_to_append(Index n, Index copied = 0) const {
    if (n == 0) return 0;
    const bool copies = fills_last_page() && pool_->references(table_.back()) - copied > 1;
    return pages_for(rows_ + n) - static_cast<Index>(table_.size()) + (copies ? 1 : 0);
  }
  bool shares_last_page(const PagedRows& other) const {
    return pool_ == other.pool_ && fills_last_page() && other.fills_last_page() && table_.back() == other.table_.back();
  }

  /// Rollback, for a layer's call that fails (layer/appended.hpp): a shared last page that was copied is shared again.
  std::size_t undo_bytes(Index) const { return sizeof(Undo); }
  void prepare_undo(Index, std::byte* memory) const {
    *reinterpret_cast<Undo*>(memory) = {rows_, fills_last_page() ? table_.back() : Index(-1)};
  }
  void undo(std::byte* memory) {
    const Undo before = *reinterpret_cast<const Undo*>(memory);
    go_back(std::min(before.rows, rows_));
    if (before.last_page < 0 || before.last_page == table_.back() || pool_->references(before.last_page) == 0) return;
    pool_->retain(before.last_page);
    pool_->release(table_.back());
    table_.back() = before.last_page;
    hold(rows_, static_cast<Index>(table_.size()) - 1);
  }

  /// While a call evicts to get pages, its sequences are busy: they refuse changes.
  void set_busy(bool on) { busy_ += on ? 1 : -1; }
  void require_idle() const { require<std::logic_error>(busy_ == 0, busy_rule); }

  /// Removes all rows and releases the pages.
  void clear() { rewind(0); }

  /// Bytes of the pages in its table, shared or not. They belong to the pool: see memory.hpp.
  Index bytes() const { return pool_ ? static_cast<Index>(table_.size()) * pool_->page_bytes() : 0; }

 protected:
  using Run = typename Pool::Run;

  PagedRows() = default;
  PagedRows(Pool& pool, Index capacity) : pool_(&pool), capacity_(capacity) {
    require(capacity >= 1 && capacity <= pool.pages() * page_tokens(),
            "a paged sequence needs 1 <= capacity <= pages * page_tokens = ", pool.pages() * page_tokens(), "; given ",
            capacity);
    table_.reserve(static_cast<std::size_t>(pages_for(capacity)));
    runs_.reserve(table_.capacity());
    pool_->join();
  }
  PagedRows(const PagedRows&) = delete;
  PagedRows& operator=(const PagedRows&) = delete;
  ~PagedRows() {
    stop_if_busy();
    if (!pool_) return;
    release_from(0);
    pool_->leave();
  }

  void check_fork(Index position) const {
    require<std::out_of_range>(can_truncate(position), "fork(position) needs 0 <= position <= ", rows_, "; given ",
                               position);
  }
  /// Shares the pages of the rows before `position` of another sequence.
  void share(const PagedRows& other, Index position) {
    if (!other.pool_) return;
    pool_ = other.pool_;
    pool_->join();
    capacity_ = other.capacity_;
    table_.reserve(other.table_.capacity());
    runs_.reserve(other.runs_.capacity());
    for (const Index page : other.pages().first(static_cast<std::size_t>(other.pages_for(position)))) {
      pool_->retain(page);
      table_.push_back(page);
    }
    rewind(position);
  }

  /// Restored rows go into unshared pages; those that only this sequence uses are freed first. Eviction for pages comes
  /// after the checksum of the rows.
  bool can_restore(Index position, Index rows) const {
    return pool_ && rows == position && rows >= 0 && rows <= capacity_;
  }
  bool make_room_to_restore(Index rows) {
    return ask_for([&] {
      Index own = 0;
      for (Index i = 0; i < static_cast<Index>(table_.size()); ++i) own += owned(i) ? 1 : 0;
      return std::max<Index>(pages_for(rows) - pool_->free_pages() - own, 0);
    });
  }
  void restore(Index, Index rows) {
    rewind(0);
    own(0, rows);
    for (const Index page : table_) pool_->forget_unrotated(page, page_tokens());
    hold(rows, 0);
  }

  /// Context shift: evicts rows first … first+n-1. Shared pages that later rows move into are copied first.
  template <class T>
  void shift_rows(Index first, Index n, const Rope<T>* rope, Shift how, Workspace& workspace) {
    check_shift(first, n, rows_, rope, pool_ ? pool_->rotated_dim() : 0);
    const Index left = rows_ - n, moved = left - first;
    if (n == 0) return;
    if (moved > 0) {
      ask_for([&] { return missing_pages(first, moved); });
      require_pages(first, moved);
      const auto scratch = workspace.lease(pool_->shift_bytes(rope));  // fails before pages are copied
      if (rope && how == Shift::exact) pool_->keep_unrotated();
      own(first, moved);
      pool_->shift(first, n, rows_, rope, how, scratch.data(),
                   [&](Index row) { return std::pair(page(row / page_tokens()), row % page_tokens()); });
    }
    rewind(left);
    hold(left, first / page_tokens());
  }

  /// Evicts while missing() > 0 and that helps. Every change of rows begins here: a busy sequence is refused before
  /// anything has changed.
  template <class Missing>
  bool ask_for(const Missing& missing) {
    require_idle();
    struct Busy {
      PagedRows& sequence;
      explicit Busy(PagedRows& rows) : sequence(rows) { sequence.set_busy(true); }
      ~Busy() { sequence.set_busy(false); }
    } const busy(*this);
    return !pool_ || pool_->make_room(missing);
  }

  Index pages_for(Index rows) const { return rows / page_tokens() + (rows % page_tokens() > 0 ? 1 : 0); }
  Index page(Index i) const { return table_[static_cast<std::size_t>(i)]; }

  /// Pages beyond the free ones that writing n rows at `position` needs; 0 too where no page would help.
  Index missing_pages(Index position, Index n) const {
    if (n <= 0 || position < 0 || position > rows_ || n > capacity_ - position) return 0;
    Index needed = 0;
    for (Index i = position / page_tokens(); i < pages_for(position + n); ++i) needed += owned(i) ? 0 : 1;
    return std::max<Index>(needed - pool_->free_pages(), 0);
  }
  /// std::length_error unless there are enough.
  void require_pages(Index position, Index n) const {
    const Index missing = missing_pages(position, n);
    require<std::length_error>(missing == 0, "the pool has ", pool_->free_pages(), " free pages of ", pool_->pages(),
                               "; writing rows ", position, " ... ", position + n - 1, " needs ",
                               pool_->free_pages() + missing);
  }

  /// Makes the pages of rows position … position+n-1 unshared.
  void own(Index position, Index n) {
    for (Index i = position / page_tokens(); i < pages_for(position + n); ++i) make_owned(i);
  }
  void rewind(Index position) {
    require_idle();
    go_back(position);
  }
  /// Sets the number of rows. Runs of the first `unchanged` pages are kept, so that an append updates only the last
  /// ones.
  void hold(Index rows, Index unchanged) {
    rows_ = rows;
    runs_.resize(std::min(static_cast<std::size_t>(unchanged), runs_.size()));
    for (Index i = static_cast<Index>(runs_.size()); i < static_cast<Index>(table_.size()); ++i) {
      const Index first = i * page_tokens();
      runs_.push_back(pool_->run(page(i), std::min(page_tokens(), rows_ - first), first));
    }
  }
  Index table_bytes() const {
    return static_cast<Index>(table_.capacity() * sizeof(table_[0]) + runs_.capacity() * sizeof(runs_[0]));
  }
  void swap_pages(PagedRows& other) noexcept {
    stop_if_busy(), other.stop_if_busy();
    std::swap(pool_, other.pool_);
    std::swap(capacity_, other.capacity_);
    std::swap(rows_, other.rows_);
    std::swap(table_, other.table_);
    std::swap(runs_, other.runs_);
  }

  Pool* pool_ = nullptr;
  Index capacity_ = 0, rows_ = 0;
  std::vector<Index> table_;
  std::vector<Run> runs_;

 private:
  static constexpr const char* busy_rule =
      "a sequence stays as it is while a call about it asks for pages: on_exhausted may give up others only";
  void stop_if_busy() const {  // where errors cannot be thrown
    if (busy_ > 0) [[unlikely]]
      give_up(busy_rule);
  }
  struct Undo {
    Index rows, last_page;  // partly filled, or -1
  };
  void go_back(Index position) {
    release_from(pages_for(position));
    hold(position, position / page_tokens());
  }
  bool fills_last_page() const { return rows_ % page_tokens() > 0; }  // the last page has room
  bool owned(Index i) const { return i < static_cast<Index>(table_.size()) && pool_->references(page(i)) == 1; }

  /// Makes entry i of the table, which may be the next one, an unshared page.
  void make_owned(Index i) {
    if (owned(i)) return;
    const Index fresh = pool_->acquire();
    if (i == static_cast<Index>(table_.size())) return table_.push_back(fresh);
    pool_->copy_page(page(i), fresh, std::min(page_tokens(), rows_ - i * page_tokens()));
    pool_->release(page(i));
    table_[static_cast<std::size_t>(i)] = fresh;
  }
  void release_from(Index first) {
    while (static_cast<Index>(table_.size()) > first) {
      pool_->release(table_.back());
      table_.pop_back();
    }
  }

  int busy_ = 0;  // calls that evict on its behalf, nested
};

}}}  // namespace qkv::QKV_ABI::detail

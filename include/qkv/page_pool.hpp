// page_pool.hpp — a fixed number of pages that sequences share: reference counts, free pages, eviction.
//
//     [page 0][page 1][page 2] …      a page: [kv_head][page_tokens][head_dim] of keys, the same of values
//     references   2  0  1            how many sequences use it; 0: free
//
// When a sequence needs more pages than are free, the pool calls `on_exhausted`, which may evict sequences: any but
// those of the call in progress, which refuse changes until it has its pages.
//
// The pool owns the bytes and must outlive its sequences: destroying it earlier terminates the program, with this rule
// as the message (set_error_handler, which prints and aborts unless another is set).
//
// Before: ring_cache.hpp   Next: paged_cache.hpp
#pragma once

#include <functional>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "cache/blocks.hpp"
#include "cache/context_shift.hpp"

namespace qkv { inline namespace QKV_ABI {

struct PagePoolConfig {
  Index kv_heads = 1;
  Index head_dim = 0;
  Index v_head_dim = head_dim;
  Index page_tokens = 64;
  Index pages = 0;
};

template <StorageType S>
class PagedCache;
namespace detail {
template <class Pool>
class PagedRows;
}  // namespace detail

/// Reference counts of the pages of a pool, the free pages, and the eviction callback.
class PageUse {
 public:
  Index page_tokens() const { return page_tokens_; }
  Index pages() const { return static_cast<Index>(references_.size()); }
  Index free_pages() const { return static_cast<Index>(free_.size()); }
  /// Number of sequences of this pool, those without pages included.
  Index sequences() const { return sequences_; }
  /// Bytes of the tables.
  Index overhead_bytes() const {
    return static_cast<Index>(references_.capacity() * sizeof(references_[0]) + free_.capacity() * sizeof(free_[0]));
  }

  /// Number of sequences that use a page; 0: free. std::out_of_range unless 0 <= page < pages().
  Index references(Index page) const {
    detail::require<std::out_of_range>(page >= 0 && page < pages(), "the pool has pages 0 ... ", pages() - 1,
                                       "; given page ", page);
    return references_[static_cast<std::size_t>(page)];
  }
  /// A free page, now with one reference. std::length_error where none is free and eviction frees none.
  Index acquire() {
    const std::optional<Index> page = try_acquire();
    detail::require<std::length_error>(page.has_value(), "all ", pages(), " pages of the pool are in use");
    return *page;
  }
  [[nodiscard]] std::optional<Index> try_acquire() {
    if (!make_room([&] { return free_.empty() ? Index(1) : Index(0); })) return std::nullopt;
    const Index page = free_.back();
    free_.pop_back();
    references_[static_cast<std::size_t>(page)] = 1;
    return page;
  }
  /// One reference more. std::out_of_range for a free page.
  void retain(Index page) {
    require_used(page);
    ++references_[static_cast<std::size_t>(page)];
  }
  /// One reference fewer; without any the page is free.
  void release(Index page) {
    require_used(page);
    if (--references_[static_cast<std::size_t>(page)] == 0) free_.push_back(page);
  }

  /// evict(missing) is called when a sequence needs `missing` pages more than are free. It may clear, truncate, replace
  /// or destroy sequences of this pool, except those of the call in progress: to change one of them is a
  /// std::logic_error, which leaves it as it was; to destroy or move one, or the pool, terminates the program with that
  /// rule. It is called again while pages are missing and the last call reduced their number. An empty function: no
  /// eviction. It is never called from inside itself, nor may it be replaced there (std::logic_error).
  void on_exhausted(std::function<void(Index missing)> evict) {
    detail::require<std::logic_error>(!evicting_, "on_exhausted cannot be replaced from inside itself");
    evict_ = std::move(evict);
  }
  /// Calls evict while missing() > 0 and decreases; whether nothing is missing now.
  template <class Missing>
  bool make_room(Missing&& missing) {
    for (Index before = missing(); before > 0;) {
      if (!evict_ || evicting_) return false;
      {
        struct Evicting {  // also where evict raises
          bool& now;
          explicit Evicting(bool& flag) : now(flag) { now = true; }
          ~Evicting() { now = false; }
        } const guard(evicting_);
        evict_(before);
      }
      const Index after = missing();
      if (after >= before) return false;
      before = after;
    }
    return true;
  }

 protected:
  PageUse(Index page_tokens, Index pages) : page_tokens_(page_tokens) {
    detail::require(page_tokens >= 1 && pages >= 1, "a page pool needs page_tokens and pages >= 1; given ", page_tokens,
                    " and ", pages);
    references_.assign(static_cast<std::size_t>(pages), 0);
    free_.reserve(references_.size());
    for (Index page = pages; page-- > 0;) free_.push_back(page);  // page 0 is used first
  }
  PageUse(const PageUse&) = delete;  // sequences point here
  PageUse& operator=(const PageUse&) = delete;
  ~PageUse() {
    if (sequences_ > 0) [[unlikely]]
      outlived();
    if (evicting_) [[unlikely]]
      detail::give_up("a page pool cannot be destroyed from inside on_exhausted");
  }

 private:
  template <class>
  friend class detail::PagedRows;
  void join() { ++sequences_; }
  void leave() { --sequences_; }
  [[noreturn]] void outlived() const {
    detail::give_up(detail::message_of(
        {"a page pool must outlive its sequences; it is destroyed while there are still ", sequences_}));
  }
  void require_used(Index page) const {
    detail::require<std::out_of_range>(references(page) > 0, "page ", page, " of the pool is free");
  }

  Index page_tokens_;
  std::vector<Index> references_, free_;
  std::function<void(Index)> evict_;
  bool evicting_ = false;
  Index sequences_ = 0;
};

/// Pages of keys and values.
template <StorageType S = float>
class PagePool : public PageUse {
 public:
  /// Allocates all its memory here. std::invalid_argument unless all sizes are positive.
  explicit PagePool(const PagePoolConfig& config) : PageUse(config.page_tokens, config.pages), config_(config) {
    detail::check(shape());
    pages_ = detail::CacheBlocks<S>(shape(), config.page_tokens, config.pages);
  }

  Index kv_heads() const { return config_.kv_heads; }
  Index head_dim() const { return config_.head_dim; }
  Index v_head_dim() const { return config_.v_head_dim; }

  /// Bytes of keys, values and scales in all pages.
  Index bytes() const { return pages_.bytes(); }
  /// … and in those that are in use; a shared page counts once.
  Index used_bytes() const { return page_bytes() * (pages() - free_pages()); }
  Index page_bytes() const { return bytes() / pages(); }
  /// Bytes of the tables, and of unrotated keys for context shifts.
  Index overhead_bytes() const { return PageUse::overhead_bytes() + pages_.unrotated().bytes(); }

 private:
  friend PagedCache<S>;
  friend detail::PagedRows<PagePool>;
  using Run = KeyRun<S>;
  detail::CacheShape shape() const { return {config_.kv_heads, config_.head_dim, config_.v_head_dim}; }
  Run run(Index page, Index rows, Index position) const { return pages_.run(page, 0, rows, position); }
  void copy_page(Index from, Index to, Index rows) { pages_.copy_rows(pages_, from, 0, to, 0, rows); }

  Index rotated_dim() const { return head_dim(); }
  template <class T>
  std::size_t shift_bytes(const Rope<T>* rope) const {
    return detail::shift_bytes<S>(rope, kv_heads() * head_dim());
  }
  void keep_unrotated() { pages_.keep_unrotated(); }
  void forget_unrotated(Index page, Index rows) const {
    pages_.unrotated().forget(pages_.unrotated_row(page, 0), rows);
  }
  template <class T, class At>
  void shift(Index first, Index n, Index rows, const Rope<T>* rope, Shift how, std::byte* scratch, const At& at) {
    detail::shift_blocks<S>(first, n, rows, shape(), rope, how, scratch, [&](Index row) {
      const auto [page, place] = at(row);
      return detail::BlockRow<S>{pages_, page, place};
    });
  }

  PagePoolConfig config_;
  detail::CacheBlocks<S> pages_;
};

}}  // namespace qkv::QKV_ABI

// layer/appended.hpp — rows that a call appends to its caches: all of them stay, or none.
//
// A mask, a score, an executor and every allocation may throw while a layer runs. Before it appends, it saves what a
// rollback needs; the rollback allocates nothing and cannot fail. For caches that truncate can restore, nothing is saved.
// Others have three members:
//
//     size_t undo_bytes(n) const               memory for what is lost when n rows are appended
//     void prepare_undo(n, memory) const       saves it, before the first of them is appended
//     void undo(memory)                        restores it, however many of the n were appended; memory is freed afterwards
//
// Before: layer/forward.hpp   Next: layer/batch_rows.hpp
#pragma once

#include <span>
#include <string>

#include "common.hpp"

namespace qkv { inline namespace QKV_ABI { namespace detail {

template <class C>
concept CanUndo = requires(C& cache, const C& constant, Index n, std::byte* memory) {
  { constant.undo_bytes(n) } -> std::same_as<std::size_t>;
  constant.prepare_undo(n, memory);
  cache.undo(memory);
};

/// The rows row_offsets[s] … row_offsets[s+1]-1 that are about to be appended to caches[s]: removed again unless keep()
/// is called.
template <class C>
class Appended {
 public:
  Appended(std::span<const Index> row_offsets, std::span<C* const> caches, Workspace& workspace)
      : caches_(caches), memory_(workspace.lease(prepare(row_offsets, nullptr))) {
    prepare(row_offsets, memory_.data());
  }
  Appended(const Appended&) = delete;
  Appended& operator=(const Appended&) = delete;
  ~Appended() {
    for (std::size_t s = caches_.size(); s-- > 0;) {  // in reverse order of appending
      C& cache = *caches_[s];
      if constexpr (CanUndo<C>) {
        cache.undo(before_[s].memory);
      } else {
        if constexpr (requires { cache.can_truncate(Index{}); })
          if (!cache.can_truncate(before_[s].position)) continue;
        cache.truncate(before_[s].position);
      }
    }
  }
  void keep() { caches_ = {}; }

 private:
  struct Before {
    Index position;
    std::byte* memory;
  };
  /// Without memory only counts the bytes.
  std::size_t prepare(std::span<const Index> row_offsets, std::byte* base) {
    Carver carver(base);
    before_ = carver.take<Before>(static_cast<Index>(caches_.size()));
    for (std::size_t s = 0; s < caches_.size(); ++s) {
      std::byte* memory = nullptr;
      if constexpr (CanUndo<C>) {
        const Index n = row_offsets[s + 1] - row_offsets[s];
        memory = carver.take<std::byte>(static_cast<Index>(caches_[s]->undo_bytes(n)));
        if (base) caches_[s]->prepare_undo(n, memory);
      }
      if (base) before_[s] = {caches_[s]->position(), memory};
    }
    return carver.used();
  }

  std::span<C* const> caches_;
  Before* before_ = nullptr;
  Workspace::Lease memory_;
};

/// Appends each sequence's rows; raises if a cache refuses rows for which it had room.
template <class C, class A, class B>
void append_all(std::span<const Index> row_offsets, std::span<C* const> caches, const A& a, const B& b) {
  for (std::size_t s = 0; s < caches.size(); ++s) {
    const Index first = row_offsets[s], n = row_offsets[s + 1] - first;
    if (!caches[s]->try_append(a.middleRows(first, n), b.middleRows(first, n)))
      raise<std::length_error>("caches[" + std::to_string(s) + "] ran out of room; all caches are as they were");
  }
}

}}}  // namespace qkv::QKV_ABI::detail

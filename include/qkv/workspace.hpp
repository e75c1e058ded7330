// workspace.hpp — scratch memory that belongs to the caller (or to a cache), never to a layer.
//
// A kernel leases a piece per work item and gives it back; a piece is allocated once and reused by later calls, so with
// the serial executor repeated calls allocate nothing. Several threads may lease at once without locks: up to `slots`
// pieces are kept, and a call that needs more allocates for itself.
//
// Before: parallel.hpp   Next: call/rule.hpp
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <memory>
#include <new>
#include <utility>

#include "matrix.hpp"

namespace qkv { inline namespace QKV_ABI {

namespace detail {

inline constexpr std::size_t cache_line = 64;

struct AlignedDelete {
  void operator()(std::byte* p) const { ::operator delete (p, std::align_val_t{cache_line}); }
};
using AlignedBytes = std::unique_ptr<std::byte, AlignedDelete>;

inline AlignedBytes aligned_bytes(std::size_t n) {
  return AlignedBytes(static_cast<std::byte*>(::operator new (n, std::align_val_t{cache_line})));
}

/// Cuts a piece of scratch memory into aligned arrays; with a null base it only counts the bytes.
class Carver {
 public:
  explicit Carver(std::byte* base) : base_(base) {}
  template <class T>
  T* take(Index count) {
    T* p = base_ ? reinterpret_cast<T*>(base_ + used_) : nullptr;
    const std::size_t bytes = static_cast<std::size_t>(count) * sizeof(T);
    used_ += (bytes + cache_line - 1) / cache_line * cache_line;
    return p;
  }
  std::size_t used() const { return used_; }

 private:
  std::byte* base_;
  std::size_t used_ = 0;
};

}  // namespace detail

class Workspace {
  struct Slot {
    std::atomic<bool> taken{false};
    std::size_t size = 0;
    detail::AlignedBytes bytes;
  };

 public:
  static constexpr std::size_t slots = 64;

  /// A piece of scratch memory, given back when it goes out of scope. Contents are undefined.
  class Lease {
   public:
    Lease(Slot* slot, detail::AlignedBytes own) : slot_(slot), own_(std::move(own)) {}
    Lease(const Lease&) = delete;
    Lease& operator=(const Lease&) = delete;
    ~Lease() {
      if (slot_) slot_->taken.store(false, std::memory_order_release);
    }
    std::byte* data() const { return slot_ ? slot_->bytes.get() : own_.get(); }

   private:
    Slot* slot_;
    detail::AlignedBytes own_;
  };

  Workspace() = default;
  // Scratch has no value: a copy starts empty.
  Workspace(const Workspace&) {}
  Workspace& operator=(const Workspace&) { return *this; }

  /// At least `bytes` bytes, 64-byte aligned.
  EIGEN_DONT_INLINE Lease lease(std::size_t bytes) {
    for (Slot& slot : slots_) {
      if (slot.taken.exchange(true, std::memory_order_acquire)) continue;
      if (slot.size < bytes) {
        struct Release {  // the slot, should the allocation fail
          Slot* slot;
          ~Release() {
            if (slot) slot->taken.store(false, std::memory_order_release);
          }
        } release{&slot};
        slot.bytes.reset();
        slot.size = 0;
        slot.bytes = detail::aligned_bytes(bytes);
        slot.size = bytes;
        release.slot = nullptr;
      }
      return {&slot, nullptr};
    }
    return {nullptr, detail::aligned_bytes(bytes)};
  }

  /// Allocates `bytes` for one lease now. A call may hold two or three at once: one call of the same sizes warms them all.
  void reserve(Index bytes) {
    detail::require(bytes >= 0, "a workspace reserves bytes >= 0; given ", bytes);
    lease(static_cast<std::size_t>(bytes));
  }

  /// Bytes held at present. Not to be called while leases are out.
  Index bytes() const {
    std::size_t sum = 0;
    for (const Slot& slot : slots_) sum += slot.size;
    return static_cast<Index>(sum);
  }

 private:
  std::array<Slot, slots> slots_;
};

}}  // namespace qkv::QKV_ABI

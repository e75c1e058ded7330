// support/allocations.hpp — what a piece of code allocates: exact bytes of operator new, and calls of malloc beside it. Any
// one of them can be made to fail.
//
// Include it in one translation unit per program: it replaces operator new and delete, and with glibc (but not under
// sanitizers, which do that themselves) malloc and its relatives.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define QKV_TEST_SANITIZED 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(memory_sanitizer) || __has_feature(thread_sanitizer)
#define QKV_TEST_SANITIZED 1
#endif
#endif

#if defined(__GLIBC__) && !defined(QKV_TEST_SANITIZED)
#define QKV_TEST_COUNTS_MALLOC 1
extern "C" {
void* __libc_malloc(std::size_t);
void* __libc_calloc(std::size_t, std::size_t);
void* __libc_realloc(void*, std::size_t);
void* __libc_memalign(std::size_t, std::size_t);
void __libc_free(void*);
}
#endif

namespace support {

struct Allocations {
  std::int64_t count = 0;      // calls of operator new and of malloc and its relatives
  std::int64_t new_bytes = 0;  // asked from operator new and not yet given back

  friend Allocations operator-(Allocations a, Allocations b) { return {a.count - b.count, a.new_bytes - b.new_bytes}; }
};

namespace detail {

inline std::atomic<std::int64_t> count{0}, new_bytes{0};
inline std::atomic<std::int64_t> until_failure{-1};  // allocations that succeed before one fails; -1: none does

inline bool fails() { return until_failure >= 0 && until_failure-- == 0; }

/// The size is kept in front of the block.
inline void* counted_new(std::size_t size, std::size_t alignment) {
  if (fails()) throw std::bad_alloc();
  const std::size_t front = alignment < 2 * sizeof(std::size_t) ? 2 * sizeof(std::size_t) : alignment;
#ifdef QKV_TEST_COUNTS_MALLOC
  void* base = __libc_memalign(front, front + size);
#else
  void* base = std::aligned_alloc(front, (front + size + front - 1) / front * front);
#endif
  if (!base) throw std::bad_alloc();
  count += 1;
  new_bytes += static_cast<std::int64_t>(size);
  char* p = static_cast<char*>(base) + front;
  reinterpret_cast<std::size_t*>(p)[-1] = size;
  reinterpret_cast<std::size_t*>(p)[-2] = front;
  return p;
}
inline void counted_delete(void* p) noexcept {
  if (!p) return;
  new_bytes -= static_cast<std::int64_t>(static_cast<std::size_t*>(p)[-1]);
  void* base = static_cast<char*>(p) - static_cast<std::size_t*>(p)[-2];
#ifdef QKV_TEST_COUNTS_MALLOC
  __libc_free(base);
#else
  std::free(base);
#endif
}

}  // namespace detail

/// So far in this program; take the difference of two.
inline Allocations allocations() { return {detail::count.load(), detail::new_bytes.load()}; }

/// What f allocates.
template <class F>
Allocations allocations_of(F&& f) {
  const Allocations before = allocations();
  f();
  return allocations() - before;
}

/// As long as it lives, the k-th allocation from here on fails, and no other.
class FailingAllocation {
 public:
  explicit FailingAllocation(std::int64_t k) { detail::until_failure = k; }
  FailingAllocation(const FailingAllocation&) = delete;
  FailingAllocation& operator=(const FailingAllocation&) = delete;
  ~FailingAllocation() { detail::until_failure = -1; }
};

}  // namespace support

void* operator new(std::size_t size) { return support::detail::counted_new(size, 1); }
void* operator new[](std::size_t size) { return support::detail::counted_new(size, 1); }
void* operator new(std::size_t size, std::align_val_t alignment) {
  return support::detail::counted_new(size, static_cast<std::size_t>(alignment));
}
void* operator new[](std::size_t size, std::align_val_t alignment) {
  return support::detail::counted_new(size, static_cast<std::size_t>(alignment));
}
// The nothrow forms are used by std::stable_sort and by Catch2.
void* operator new(std::size_t size, const std::nothrow_t&) noexcept {
  try {
    return support::detail::counted_new(size, 1);
  } catch (const std::bad_alloc&) {
    return nullptr;
  }
}
void* operator new[](std::size_t size, const std::nothrow_t& none) noexcept { return ::operator new(size, none); }
void operator delete(void* p, const std::nothrow_t&) noexcept { support::detail::counted_delete(p); }
void operator delete[](void* p, const std::nothrow_t&) noexcept { support::detail::counted_delete(p); }
void operator delete(void* p) noexcept { support::detail::counted_delete(p); }
void operator delete[](void* p) noexcept { support::detail::counted_delete(p); }
void operator delete(void* p, std::size_t) noexcept { support::detail::counted_delete(p); }
void operator delete[](void* p, std::size_t) noexcept { support::detail::counted_delete(p); }
void operator delete(void* p, std::align_val_t) noexcept { support::detail::counted_delete(p); }
void operator delete[](void* p, std::align_val_t) noexcept { support::detail::counted_delete(p); }
void operator delete(void* p, std::size_t, std::align_val_t) noexcept { support::detail::counted_delete(p); }
void operator delete[](void* p, std::size_t, std::align_val_t) noexcept { support::detail::counted_delete(p); }

#ifdef QKV_TEST_COUNTS_MALLOC
extern "C" {
void* malloc(std::size_t size) noexcept {
  support::detail::count += 1;
  if (support::detail::fails()) return nullptr;
  return __libc_malloc(size);
}
void* calloc(std::size_t n, std::size_t size) noexcept {
  support::detail::count += 1;
  if (support::detail::fails()) return nullptr;
  return __libc_calloc(n, size);
}
void* realloc(void* p, std::size_t size) noexcept {
  support::detail::count += 1;
  if (support::detail::fails()) return nullptr;
  return __libc_realloc(p, size);
}
void* aligned_alloc(std::size_t alignment, std::size_t size) noexcept {
  support::detail::count += 1;
  if (support::detail::fails()) return nullptr;
  return __libc_memalign(alignment, size);
}
void* memalign(std::size_t alignment, std::size_t size) noexcept {
  support::detail::count += 1;
  if (support::detail::fails()) return nullptr;
  return __libc_memalign(alignment, size);
}
void free(void* p) noexcept { __libc_free(p); }
}
#endif

// parallel.hpp — the library owns no threads: an executor is a value that you pass.
//
//     executor(n, f)   calls f(0) … f(n-1), in any order, on any thread, and returns when all are done; f may throw.
//
// Work items are chosen from sizes only, never from the number of threads, so the bits of a result do not depend on it.
// `serial` is the default. `OpenMp` exists where the compiler has OpenMP switched on. `PoolExecutor` runs on
// Eigen::ThreadPool or anything else with Schedule(function). Your own callable of this form is an executor too.
//
// Before: compress.hpp   Next: workspace.hpp
#pragma once

#include <algorithm>
#include <atomic>
#include <concepts>
#include <condition_variable>
#include <exception>
#include <memory>
#include <mutex>
#include <type_traits>

#include "matrix.hpp"

namespace qkv { inline namespace QKV_ABI {

template <class E>
concept Executor = requires(const E& executor, void (*f)(Index)) {
  executor(Index{}, f);
};

/// Everything on the calling thread, in order.
struct Serial {
  template <class F>
  void operator()(Index n, F&& f) const {
    for (Index i = 0; i < n; ++i) f(i);
  }
};
inline constexpr Serial serial{};

namespace detail {

/// A reference to something callable, of one type for all: a pointer to it and a pointer to a function that calls it.
template <class Signature>
class FunctionRef;
template <class R, class... Args>
class FunctionRef<R(Args...)> {
 public:
  template <class F>
  requires(!std::same_as<std::remove_cvref_t<F>, FunctionRef>) FunctionRef(F&& f)
      : object_(const_cast<void*>(static_cast<const void*>(std::addressof(f)))),
        call_([](void* object, Args... args) -> R {
          return (*static_cast<std::remove_reference_t<F>*>(object))(args...);
        }) {}
  R operator()(Args... args) const { return call_(object_, args...); }

 private:
  void* object_;
  R (*call_)(void*, Args...);
};

/// An executor of whatever type, as kernels see it: they are compiled once for all executors.
class AnyExecutor {
 public:
  template <Executor E>
  requires(!std::same_as<E, AnyExecutor>) AnyExecutor(const E& executor)  // implicit: any executor will do
      : executor_(&executor),
        serial_(std::same_as<E, Serial>),
        run_([](const void* e, Index n, FunctionRef<void(Index)> f) { (*static_cast<const E*>(e))(n, f); }) {}
  /// Everything on the calling thread: work need not be cut finer than it is fast.
  bool serial() const { return serial_; }
  void operator()(Index n, FunctionRef<void(Index)> f) const { run_(executor_, n, f); }

 private:
  const void* executor_;
  bool serial_;
  void (*run_)(const void*, Index, FunctionRef<void(Index)>);
};

/// Keeps the first exception of several threads, for rethrowing on the caller's. Empty without exceptions.
class FirstError {
 public:
  template <class F>
  void run(F&& f, Index i) {
#if defined(__cpp_exceptions) || defined(_CPPUNWIND)
    try {
      f(i);
    } catch (...) {
      const std::lock_guard lock(mutex_);
      if (!error_) error_ = std::current_exception();
    }
#else
    f(i);
#endif
  }
  void rethrow() const {
#if defined(__cpp_exceptions) || defined(_CPPUNWIND)
    if (error_) std::rethrow_exception(error_);
#endif
  }

 private:
  std::mutex mutex_;
  std::exception_ptr error_;
};

/// Whether f() returns; false where it throws.
template <class F>
bool succeeds(F&& f) {
#if defined(__cpp_exceptions) || defined(_CPPUNWIND)
  try {
    f();
  } catch (...) {
    return false;
  }
#else
  f();
#endif
  return true;
}

}  // namespace detail

#ifdef _OPENMP
/// `#pragma omp parallel for` over the items; compile with -fopenmp.
struct OpenMp {
  int threads = 0;  // 0: OpenMP's own default

  template <class F>
  void operator()(Index n, F&& f) const {
    if (n <= 1 || threads == 1) return serial(n, f);
    detail::FirstError error;
    if (threads > 0) {
#pragma omp parallel for schedule(dynamic) num_threads(threads)
      for (Index i = 0; i < n; ++i) error.run(f, i);
    } else {
#pragma omp parallel for schedule(dynamic)
      for (Index i = 0; i < n; ++i) error.run(f, i);
    }
    error.rethrow();
  }
};
#endif

/// Runs on a pool that has `Schedule(std::function<void()>)` and `NumThreads()` (Eigen::ThreadPool, for one). The calling
/// thread works too, alone where Schedule throws. Do not call it from inside one of the pool's own tasks.
template <class Pool>
class PoolExecutor {
 public:
  explicit PoolExecutor(Pool& pool) : pool_(&pool) {}

  template <class F>
  void operator()(Index n, F&& f) const {
    if (n <= 1) return serial(n, f);
    detail::FirstError error;
    std::atomic<Index> next{0};
    const auto work = [&] {
      for (Index i = next.fetch_add(1); i < n; i = next.fetch_add(1)) error.run(f, i);
    };
    const Index helpers = std::min<Index>(static_cast<Index>(pool_->NumThreads()), n - 1);
    std::mutex mutex;
    std::condition_variable all_done;
    Index running = 0;
    const auto count = [&](Index change) {
      const std::lock_guard lock(mutex);
      running += change;
      if (running == 0) all_done.notify_one();
    };
    const auto help = [&] {
      work();
      count(-1);
    };
    for (Index h = 0; h < helpers; ++h) {
      count(1);
      if (!detail::succeeds([&] { pool_->Schedule(help); })) {
        count(-1);  // there are fewer helpers then: those there are, and this thread, do all of the work
        break;
      }
    }
    work();
    std::unique_lock lock(mutex);
    all_done.wait(lock, [&] { return running == 0; });
    error.rethrow();
  }

 private:
  Pool* pool_;
};

}}  // namespace qkv::QKV_ABI

// support/executors.hpp — executors as users might write them.
#pragma once

#include <qkv/matrix.hpp>

#include <algorithm>
#include <atomic>
#include <exception>
#include <functional>
#include <mutex>
#include <numeric>
#include <random>
#include <thread>
#include <vector>

namespace support {

/// On the calling thread, in a random order.
struct Shuffled {
  std::uint64_t seed;

  template <class F>
  void operator()(qkv::Index n, F&& f) const {
    std::vector<qkv::Index> order(static_cast<std::size_t>(n));
    std::iota(order.begin(), order.end(), qkv::Index{0});
    std::shuffle(order.begin(), order.end(), std::mt19937_64(seed));
    for (const qkv::Index i : order) f(i);
  }
};

/// Threads that live for one call; the first exception is handed on.
struct Threaded {
  int threads;

  template <class F>
  void operator()(qkv::Index n, F&& f) const {
    std::atomic<qkv::Index> next{0};
    std::mutex mutex;
    std::exception_ptr error;
    std::vector<std::thread> pool;
    for (int t = 0; t < threads; ++t)
      pool.emplace_back([&] {
        for (qkv::Index i = next++; i < n; i = next++) {
          try {
            f(i);
          } catch (...) {
            const std::lock_guard lock(mutex);
            if (!error) error = std::current_exception();
          }
        }
      });
    for (auto& thread : pool) thread.join();
    if (error) std::rethrow_exception(error);
  }
};

/// Any of them behind one type: a kernel is compiled once for all.
class AnyExecutor {
 public:
  template <class E>
  explicit AnyExecutor(E executor) : run_([executor](qkv::Index n, const Item& f) { executor(n, f); }) {}

  template <class F>
  void operator()(qkv::Index n, F&& f) const {
    run_(n, [&f](qkv::Index i) { f(i); });
  }

 private:
  using Item = std::function<void(qkv::Index)>;
  std::function<void(qkv::Index, const Item&)> run_;
};
inline AnyExecutor threaded(int threads) { return AnyExecutor(Threaded{threads}); }
inline AnyExecutor shuffled(std::uint64_t seed) { return AnyExecutor(Shuffled{seed}); }

}  // namespace support

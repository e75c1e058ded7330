// support/threads.hpp — executors for benchmarks: threads that wait between calls, as a program's own pool would; those of
// `Threads` spin, those of `SleepingThreads` are Eigen's.
#pragma once

#include <qkv/parallel.hpp>

#include <unsupported/Eigen/CXX11/ThreadPool>

#include <atomic>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

namespace support {

/// `count` threads, the caller's among them. They spin while they wait: short calls are then measured, not wake-ups.
class Threads {
 public:
  explicit Threads(qkv::Index count) {
    for (qkv::Index t = 1; t < count; ++t) others_.emplace_back([this] { work(); });
  }
  Threads(const Threads&) = delete;
  Threads& operator=(const Threads&) = delete;
  ~Threads() {
    stop_ = true;
    for (auto& t : others_) t.join();
  }

  template <class F>
  void operator()(qkv::Index n, F&& f) const {
    if (others_.empty() || n <= 1) return qkv::serial(n, f);
    next_ = 0;
    items_ = n;
    call_ = [&f](qkv::Index i) { f(i); };
    busy_ = static_cast<int>(others_.size());
    round_.fetch_add(1);
    take();
    while (busy_.load() > 0) std::this_thread::yield();
  }

 private:
  void take() const {
    for (qkv::Index i = next_.fetch_add(1); i < items_; i = next_.fetch_add(1)) call_(i);
  }
  void work() const {
    for (int seen = 0; !stop_;) {
      if (round_.load() == seen) {
        std::this_thread::yield();
        continue;
      }
      ++seen;
      take();
      busy_.fetch_sub(1);
    }
  }

  mutable std::atomic<qkv::Index> next_{0};
  mutable std::atomic<int> busy_{0}, round_{0};
  mutable qkv::Index items_ = 0;
  mutable std::function<void(qkv::Index)> call_;
  std::atomic<bool> stop_{false};
  std::vector<std::thread> others_;
};

/// `count` threads, the caller's among them. They sleep between calls and take no time from what else runs.
class SleepingThreads {
 public:
  explicit SleepingThreads(qkv::Index count) {
    if (count > 1) pool_ = std::make_unique<Eigen::ThreadPool>(static_cast<int>(count - 1));
  }
  template <class F>
  void operator()(qkv::Index n, F&& f) const {
    if (pool_)
      qkv::PoolExecutor<Eigen::ThreadPool>{*pool_}(n, f);
    else
      qkv::serial(n, f);
  }

 private:
  std::unique_ptr<Eigen::ThreadPool> pool_;
};

}  // namespace support

#include <qkv/attention.hpp>
#include <qkv/parallel.hpp>

#include <unsupported/Eigen/CXX11/ThreadPool>

#include <numeric>
#include <stdexcept>
#include <vector>

#include "support/catch.hpp"
#include "support/executors.hpp"
#include "support/numbers.hpp"

using namespace support;

namespace {

struct NotAnExecutor {};
static_assert(qkv::Executor<qkv::Serial>);
static_assert(qkv::Executor<qkv::PoolExecutor<Eigen::ThreadPool>>);
static_assert(qkv::Executor<Shuffled> && qkv::Executor<Threaded>);
static_assert(!qkv::Executor<NotAnExecutor>);
static_assert(!qkv::Executor<int>);

/// Every item once, whatever their number; and an exception of one item reaches the caller after all have ended.
template <class E>
void check_executor(const E& executor) {
  for (const Index n : {0, 1, 2, 3, 7, 100, 1001}) {
    std::vector<std::atomic<int>> calls(static_cast<std::size_t>(n));
    executor(n, [&](Index i) { ++calls[static_cast<std::size_t>(i)]; });
    for (const auto& count : calls) REQUIRE(count == 1);
  }
  for (const Index bad : {0, 4, 12}) {
    std::atomic<int> running{0};
    const auto message = message_of<std::runtime_error>([&] {
      executor(13, [&](Index i) {
        ++running;
        --running;
        if (i == bad) throw std::runtime_error("item " + std::to_string(i));
      });
    });
    CHECK(message == "item " + std::to_string(bad));
    CHECK(running == 0);
  }
}

}  // namespace

TEST_CASE("the serial executor calls items in order on the calling thread", "[parallel]") {
  std::vector<Index> order;
  std::thread::id where;
  qkv::serial(5, [&](Index i) { order.push_back(i), where = std::this_thread::get_id(); });
  CHECK(order == std::vector<Index>{0, 1, 2, 3, 4});
  CHECK(where == std::this_thread::get_id());
  check_executor(qkv::serial);
}

TEST_CASE("a pool executor calls every item once and hands on exceptions", "[parallel]") {
  for (const int threads : {1, 3}) {
    Eigen::ThreadPool pool(threads);
    check_executor(qkv::PoolExecutor(pool));
  }
}

TEST_CASE("several exceptions at once reach the caller as one", "[parallel]") {
  Eigen::ThreadPool pool(2);
  for (int trial = 0; trial < 50; ++trial)
    CHECK_THROWS_AS(qkv::PoolExecutor(pool)(20, [](Index) { throw std::runtime_error("all"); }), std::runtime_error);
}

TEST_CASE("a pool executor returns only when all items are done", "[parallel]") {
  Eigen::ThreadPool pool(3);
  const qkv::PoolExecutor executor(pool);
  for (int trial = 0; trial < 300; ++trial) {
    std::vector<int> done(17);  // destroyed at once: a straggler would write into freed memory
    executor(17, [&](Index i) { done[static_cast<std::size_t>(i)] = 1; });
    REQUIRE(std::accumulate(done.begin(), done.end(), 0) == 17);
  }
}

namespace {

/// A pool that takes a few tasks and then throws.
struct FullPool {
  Eigen::ThreadPool pool{2};
  int room;

  explicit FullPool(int tasks) : room(tasks) {}
  int NumThreads() const { return 5; }
  void Schedule(std::function<void()> task) {
    if (room-- <= 0) throw std::runtime_error("the pool is full");
    pool.Schedule(std::move(task));
  }
};

}  // namespace

TEST_CASE("a pool that takes no more tasks leaves the work to the threads that are there", "[parallel]") {
  for (const int room : {0, 1, 3})
    for (int trial = 0; trial < 50; ++trial) {
      FullPool pool(room);
      std::vector<std::atomic<int>> calls(101);
      const qkv::PoolExecutor executor(pool);
      executor(101, [&](Index i) { ++calls[static_cast<std::size_t>(i)]; });
      for (const auto& count : calls) REQUIRE(count == 1);
    }
}

#ifdef _OPENMP
TEST_CASE("the OpenMP executor calls every item once and hands on exceptions", "[parallel]") {
  check_executor(qkv::OpenMp{});
  check_executor(qkv::OpenMp{3});
}
#endif

TEST_CASE("attention has the same bits on one thread, on a pool and on OpenMP's threads", "[parallel]") {
  const qkv::Heads heads{4, 2};
  const auto q = numbers<float>(300, 4 * 24, 1), k = numbers<float>(410, 2 * 24, 2), v = numbers<float>(410, 2 * 16, 3);
  const qkv::Matrix<float> alone = qkv::attention(q, k, v, heads, qkv::causal);
  const auto check = [&](const auto& executor) {
    CHECK(same_bits(alone, qkv::attention(q, k, v, heads, qkv::causal, qkv::plain, {}, executor)));
  };
  Eigen::ThreadPool pool(2);
  check(qkv::PoolExecutor(pool));
#ifdef _OPENMP
  check(qkv::OpenMp{});
  check(qkv::OpenMp{3});
#endif
}

TEST_CASE("the test suite's own executors keep the rules", "[parallel]") {
  check_executor(Threaded{3});
  std::vector<int> calls(101);
  Shuffled{9}(101, [&](Index i) { ++calls[static_cast<std::size_t>(i)]; });
  CHECK(std::count(calls.begin(), calls.end(), 1) == 101);
}

#include <qkv/workspace.hpp>

#include <memory>
#include <set>
#include <thread>
#include <vector>

#include "support/catch.hpp"
#include "support/numbers.hpp"

using qkv::Workspace;
using support::contains, support::message_of;

TEST_CASE("leases are aligned, writable and distinct while they are out", "[workspace]") {
  Workspace workspace;
  std::vector<std::unique_ptr<Workspace::Lease>> leases;
  std::set<std::byte*> seen;
  for (std::size_t i = 0; i < Workspace::slots + 5; ++i) {  // more than it keeps
    leases.emplace_back(new Workspace::Lease(workspace.lease(100 + i)));
    std::byte* p = leases.back()->data();
    CHECK(reinterpret_cast<std::uintptr_t>(p) % 64 == 0);
    std::fill_n(p, 100 + i, std::byte(i));
    CHECK(seen.insert(p).second);
  }
  for (std::size_t i = 0; i < leases.size(); ++i) CHECK(leases[i]->data()[99 + i] == std::byte(i));
}

TEST_CASE("a piece that was given back is used again", "[workspace]") {
  Workspace workspace;
  std::byte* first = workspace.lease(1000).data();
  CHECK(workspace.lease(1000).data() == first);
  CHECK(workspace.lease(17).data() == first);
  CHECK(workspace.bytes() == 1000);
  { const auto larger = workspace.lease(1001); }
  CHECK(workspace.bytes() == 1001);
}

TEST_CASE("reserve holds its bytes before the first call", "[workspace]") {
  Workspace workspace;
  CHECK(workspace.bytes() == 0);
  workspace.reserve(4096);
  CHECK(workspace.bytes() == 4096);
  { const auto lease = workspace.lease(4096); }
  CHECK(workspace.bytes() == 4096);
  CHECK(contains(message_of([&] { workspace.reserve(-1); }), "bytes >= 0; given -1"));
  CHECK(workspace.bytes() == 4096);
}

TEST_CASE("a copy of a workspace starts empty and leaves the other alone", "[workspace]") {
  Workspace workspace;
  workspace.reserve(128);
  Workspace copy = workspace;
  CHECK(copy.bytes() == 0);
  copy.reserve(64);
  copy = workspace;
  CHECK(copy.bytes() == 64);
  CHECK(workspace.bytes() == 128);
}

TEST_CASE("several threads lease at once without sharing a piece", "[workspace]") {
  Workspace workspace;
  std::atomic<int> clashes{0};
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t)
    threads.emplace_back([&, t] {
      for (int i = 0; i < 3000; ++i) {
        const auto lease = workspace.lease(static_cast<std::size_t>(8 + 8 * (i % 7)));
        auto* word = reinterpret_cast<volatile int*>(lease.data());
        *word = t;
        if (*word != t) ++clashes;
      }
    });
  for (auto& thread : threads) thread.join();
  CHECK(clashes == 0);
}

TEST_CASE("a carver counts exactly what it hands out", "[workspace]") {
  const auto carve = [](qkv::detail::Carver& carver) {
    auto* a = carver.take<float>(3);
    auto* b = carver.take<bool>(65);
    auto* c = carver.take<double>(0);
    auto* d = carver.take<double>(9);
    return std::vector<std::byte*>{reinterpret_cast<std::byte*>(a), reinterpret_cast<std::byte*>(b),
                                   reinterpret_cast<std::byte*>(c), reinterpret_cast<std::byte*>(d)};
  };
  qkv::detail::Carver counter(nullptr);
  for (std::byte* p : carve(counter)) CHECK(p == nullptr);
  CHECK(counter.used() == 64 + 128 + 0 + 128);

  Workspace workspace;
  const auto lease = workspace.lease(counter.used());
  qkv::detail::Carver carver(lease.data());
  const auto parts = carve(carver);
  CHECK(carver.used() == counter.used());
  CHECK(parts == std::vector<std::byte*>{lease.data(), lease.data() + 64, lease.data() + 192, lease.data() + 192});
}

#include "support/allocations.hpp"
#include "support/cache_rows.hpp"
#include "support/catch.hpp"
#include "support/storages.hpp"

#include <qkv/memory.hpp>
#include <qkv/ring_cache.hpp>

#include <cstdint>
#include <stdexcept>
#include <utility>

using namespace qkv;
using support::append_ids;
using support::contains;
using support::HeldRow;
using support::holds;
using support::ids;
using support::message_of;
using support::rows_until;

namespace {

constexpr RingCacheConfig sizes{
    .kv_heads = 3, .head_dim = 5, .v_head_dim = 7, .window = 4, .pinned = 2, .slack = 3};  // capacity 9, ring of 7

/// The pinned rows and those at positions oldest … end-1, each being its own id.
std::vector<HeldRow> pinned_and(Index oldest, Index end, Index pinned = 2) {
  std::vector<HeldRow> rows = rows_until(pinned);
  for (Index p = oldest; p < end; ++p) rows.push_back({p, p});
  return rows;
}

}  // namespace

TEMPLATE_TEST_CASE("a ring holds the pinned rows and the last window + slack, however long it runs", "", float, double,
                   half, bfloat16, std::int8_t) {
  RingCache<TestType> cache(sizes);
  for (Index p = 0; p < 40; ++p) {  // around the ring more than five times
    REQUIRE(cache.position() == p);
    append_ids(cache, ids(p, p + 1));
    const Index end = p + 1, oldest = std::max<Index>(2, end - 7);
    REQUIRE(holds(cache.key_rows(), end <= 9 ? rows_until(end) : pinned_and(oldest, end)));
    REQUIRE(cache.rows() == std::min<Index>(end, 9));
    REQUIRE(cache.key_rows().runs.size() <= 3);
  }
  REQUIRE(cache.capacity() == 9);
  REQUIRE(cache.keys().rows() == 9);
  REQUIRE(cache.keys()(0, 1) == static_cast<float>(support::cache_number(0, 1, 5, false)));
  REQUIRE(cache.values()(8, 1) == static_cast<float>(support::cache_number(39, 1, 7, true)));
}

TEST_CASE("after a piece of up to max_append rows its first token still finds its whole window") {
  for (const Index start : {0, 1, 2, 3, 6, 7, 13, 30})
    for (Index n = 1; n <= 9; ++n) {
      RingCache<float> cache(sizes);
      for (Index p = 0; p < start; ++p) append_ids(cache, ids(p, p + 1));
      const auto before = cache.keys();
      if (n > cache.max_append()) {
        REQUIRE_THROWS_AS(append_ids(cache, ids(start, start + n)), std::length_error);
        REQUIRE_FALSE(support::try_append_ids(cache, ids(start, start + n)));
        REQUIRE(support::same_bits(cache.keys(), before));
        continue;
      }
      append_ids(cache, ids(start, start + n));
      std::vector<bool> held(static_cast<std::size_t>(start + n), false);
      const auto rows = cache.key_rows();
      for (const auto& run : rows.runs)
        for (Index i = 0; i < run.rows; ++i) held[static_cast<std::size_t>(run.position + i)] = true;
      for (Index p = 0; p < start + n; ++p)
        if (p < 2 || p >= start - 4) REQUIRE(held[static_cast<std::size_t>(p)]);
    }
  RingCache<float> empty(sizes), full(sizes);
  REQUIRE(empty.max_append() == 9);  // nothing to forget yet: all of the capacity
  for (Index p = 0; p < 20; ++p) append_ids(full, ids(p, p + 1));
  REQUIRE(full.max_append() == full.slack());
  REQUIRE(full.window() == 4);
  REQUIRE(full.pinned() == 2);
  const std::string message = message_of<std::length_error>([&] { append_ids(full, ids(20, 24)); });
  for (const char* part : {"capacity 9", "position 20", "at most 3", "given 4"}) REQUIRE(contains(message, part));
}

TEST_CASE("pieces of any length give the same cache") {
  RingCache<std::int8_t> one(sizes), pieces(sizes);
  for (Index p = 0; p < 30; ++p) append_ids(one, ids(p, p + 1));
  for (Index p = 0, n = 1; p < 30; p += n, n = 1 + n * 5 % 7) {
    n = std::min({n, pieces.max_append(), 30 - p});
    append_ids(pieces, ids(p, p + n));
  }
  REQUIRE(holds(one.key_rows(), pinned_and(23, 30)));
  REQUIRE(holds(pieces.key_rows(), pinned_and(23, 30)));
}

TEST_CASE("a wrapped ring goes back only where every visible row is still held") {
  RingCache<float> cache(sizes);
  for (Index p = 0; p < 20; ++p) append_ids(cache, ids(p, p + 1));  // holds 0, 1 and 13 … 19
  REQUIRE_FALSE(cache.try_truncate(16));                            // would see 12
  REQUIRE_THROWS_AS(cache.truncate(16), std::out_of_range);
  REQUIRE_THROWS_AS(cache.truncate(21), std::out_of_range);
  REQUIRE_THROWS_AS(cache.truncate(-1), std::out_of_range);
  REQUIRE_THROWS_AS(cache.truncate(3), std::out_of_range);
  REQUIRE(holds(cache.key_rows(), pinned_and(13, 20)));
  REQUIRE(cache.try_truncate(17));  // sees 13 … 16
  REQUIRE(holds(cache.key_rows(), pinned_and(13, 17)));
  REQUIRE_FALSE(cache.can_truncate(16));
  append_ids(cache, {100, 101});
  REQUIRE(holds(cache.key_rows(), {{0, 0}, {1, 1}, {13, 13}, {14, 14}, {15, 15}, {16, 16}, {17, 100}, {18, 101}}));
  append_ids(cache, {102, 103});
  REQUIRE(holds(cache.key_rows(),
                {{0, 0}, {1, 1}, {14, 14}, {15, 15}, {16, 16}, {17, 100}, {18, 101}, {19, 102}, {20, 103}}));
  // Back to the pinned rows or before: they are all that is visible there.
  cache.truncate(2);
  REQUIRE(holds(cache.key_rows(), rows_until(2)));
  append_ids(cache, ids(2, 9));
  REQUIRE(holds(cache.key_rows(), rows_until(9)));
  append_ids(cache, ids(9, 10));
  cache.truncate(1);
  append_ids(cache, ids(1, 4));
  REQUIRE(holds(cache.key_rows(), rows_until(4)));
  cache.clear();
  REQUIRE(cache.rows() == 0);
  REQUIRE(cache.position() == 0);
  REQUIRE(cache.key_rows().runs.empty());
}

TEST_CASE("the last slack positions can always be taken back") {
  for (const Index start : {1, 5, 9, 10, 16, 33}) {
    RingCache<float> cache(sizes);
    for (Index p = 0; p < start; ++p) append_ids(cache, ids(p, p + 1));
    for (Index n = 1; n <= cache.slack(); ++n) {
      append_ids(cache, ids(500, 500 + n));
      REQUIRE(cache.try_truncate(start));
      std::vector<HeldRow> visible = pinned_and(std::max<Index>(2, start - 4), start);
      if (start <= 2) visible = rows_until(start);
      const auto rows = cache.key_rows();
      // All that is visible from `start` is there, as it was.
      Index found = 0;
      for (const auto& run : rows.runs)
        for (Index i = 0; i < run.rows; ++i)
          for (const HeldRow& row : visible)
            if (row.position == run.position + i) {
              REQUIRE(static_cast<double>(rows.key(run, 2, i)[3]) == support::cache_number(row.id, 13, 5, false));
              ++found;
            }
      REQUIRE(found == static_cast<Index>(visible.size()));
    }
  }
}

TEST_CASE("scatter_rows reaches held positions and the next ones, no others") {
  RingCache<float> cache(sizes);
  for (Index p = 0; p < 20; ++p) append_ids(cache, ids(p, p + 1));
  REQUIRE_THROWS_AS(support::scatter_ids(cache, 12, {100}), std::out_of_range);
  REQUIRE_THROWS_AS(support::scatter_ids(cache, 1, {100, 101}), std::out_of_range);
  REQUIRE_THROWS_AS(support::scatter_ids(cache, 21, {100}), std::out_of_range);
  REQUIRE_THROWS_AS(support::scatter_ids(cache, -1, {100}), std::out_of_range);
  REQUIRE_THROWS_AS(support::scatter_ids(cache, 19, ids(0, 5)), std::length_error);
  REQUIRE(holds(cache.key_rows(), pinned_and(13, 20)));
  support::scatter_ids(cache, 0, {200, 201});
  support::scatter_ids(cache, 18, {300, 301, 302, 303});
  REQUIRE(holds(cache.key_rows(),
                {{0, 200}, {1, 201}, {15, 15}, {16, 16}, {17, 17}, {18, 300}, {19, 301}, {20, 302}, {21, 303}}));
}

TEST_CASE("a ring without pinned rows, and one whose queries see only themselves") {
  RingCache<float> bare({.kv_heads = 1, .head_dim = 3, .window = 5, .slack = 2});
  for (Index p = 0; p < 23; ++p) append_ids(bare, ids(p, p + 1));
  REQUIRE(holds(bare.key_rows(), pinned_and(16, 23, 0)));
  RingCache<float> alone({.kv_heads = 2, .head_dim = 3});
  REQUIRE(alone.capacity() == 1);
  for (Index p = 0; p < 5; ++p) {
    append_ids(alone, ids(p, p + 1));
    REQUIRE(holds(alone.key_rows(), {{p, p}}));
  }
  REQUIRE(alone.try_truncate(2));  // nothing is visible from there but the row to come
  REQUIRE(alone.rows() == 0);
  REQUIRE(alone.position() == 2);
  append_ids(alone, {9});
  REQUIRE(holds(alone.key_rows(), {{2, 9}}));
}

TEST_CASE("ring settings that make no sense are refused") {
  REQUIRE_THROWS_AS(RingCache<float>({.kv_heads = 1, .head_dim = 3, .window = -1}), std::invalid_argument);
  REQUIRE_THROWS_AS(RingCache<float>({.kv_heads = 1, .head_dim = 3, .window = 4, .pinned = -1}), std::invalid_argument);
  REQUIRE_THROWS_AS(RingCache<float>({.kv_heads = 1, .head_dim = 3, .window = 4, .slack = 0}), std::invalid_argument);
  REQUIRE_THROWS_AS(RingCache<float>({.kv_heads = 1, .head_dim = 0, .window = 4}), std::invalid_argument);
  constexpr Index most = std::numeric_limits<Index>::max();
  REQUIRE_THROWS_AS(RingCache<float>({.kv_heads = 1, .head_dim = 3, .window = most}), std::invalid_argument);
  REQUIRE_THROWS_AS(RingCache<float>({.kv_heads = 1, .head_dim = 3, .window = most / 8}), std::length_error);
}

TEMPLATE_TEST_CASE("ring copies do not see each other, and what was moved from has capacity 0", "", float,
                   std::int8_t) {
  RingCache<TestType> a(sizes);
  for (Index p = 0; p < 13; ++p) append_ids(a, ids(p, p + 1));
  RingCache<TestType> b = a;
  append_ids(b, {100, 101});
  append_ids(a, ids(13, 15));
  REQUIRE(holds(a.key_rows(), pinned_and(8, 15)));
  REQUIRE(holds(b.key_rows(), {{0, 0}, {1, 1}, {8, 8}, {9, 9}, {10, 10}, {11, 11}, {12, 12}, {13, 100}, {14, 101}}));
  RingCache<TestType> c = std::move(a);
  REQUIRE(holds(c.key_rows(), pinned_and(8, 15)));
  REQUIRE(a.capacity() == 0);
  REQUIRE(a.rows() == 0);
  REQUIRE_FALSE(support::try_append_ids(a, {1}));
  a = c;
  append_ids(c, ids(15, 16));
  REQUIRE(holds(a.key_rows(), pinned_and(8, 15)));
  a = std::move(c);
  REQUIRE(holds(a.key_rows(), pinned_and(9, 16)));
}

TEMPLATE_LIST_TEST_CASE(
    "a ring's bytes are what the allocator sees and the figure of memory.hpp; it never allocates again", "",
    support::AllStorages) {
  constexpr MultiHeadAttentionConfig layer{.model_dim = 30, .heads = 6, .kv_heads = 3, .head_dim = 5, .v_head_dim = 7};
  const auto k = support::cache_rows<float>(ids(0, 3), 3, 5, false),
             v = support::cache_rows<float>(ids(0, 3), 3, 7, true);
  const auto before = support::allocations();
  RingCache<TestType> cache(sizes);
  const Index sum = cache.bytes() + cache.overhead_bytes();
  const auto built = support::allocations();
  REQUIRE((built - before).new_bytes == sum);
  REQUIRE(cache.bytes() == cache_bytes<TestType>(layer, 9));
  const auto used = support::allocations_of([&] {
    for (int i = 0; i < 50; ++i) {
      cache.append(k.topRows(2), v.topRows(2));
      cache.append(k, v);
      cache.truncate(cache.position() - 2);
    }
    cache.clear();
  });
  REQUIRE(used.count == 0);
}

TEMPLATE_TEST_CASE("what a ring keeps for the way back takes as much memory while it fills as when it is full", "",
                   float, bfloat16, std::int8_t) {
  RingCache<TestType> cache(sizes);
  const auto k = support::cache_rows<float>(ids(0, 1), 3, 5, false),
             v = support::cache_rows<float>(ids(0, 1), 3, 7, true);
  std::vector<std::size_t> empty;
  for (Index n = 0; n <= 9; ++n) empty.push_back(cache.undo_bytes(n));
  CHECK(empty[1] > empty[0]);
  for (int i = 0; i < 30; ++i) {
    cache.append(k, v);
    for (Index n = 0; n <= 9; ++n) REQUIRE(cache.undo_bytes(n) == empty[static_cast<std::size_t>(n)]);
    // Within it, and back: the rows held are as they were.
    const Index more = std::min<Index>(2, cache.max_append());
    std::vector<std::byte> memory(cache.undo_bytes(more) + 64, std::byte{0x5A});
    auto* const aligned = memory.data() + (64 - reinterpret_cast<std::uintptr_t>(memory.data()) % 64) % 64;
    const Matrix<float> keys = cache.template keys<float>(), values = cache.template values<float>();
    const Index position = cache.position();
    cache.prepare_undo(more, aligned);
    for (Index j = 0; j < more; ++j) cache.append(k * 2, v * 2);
    cache.undo(aligned);
    REQUIRE(cache.position() == position);
    REQUIRE((cache.template keys<float>() == keys && cache.template values<float>() == values));
  }
}

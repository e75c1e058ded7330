#include "support/allocations.hpp"
#include "support/cache_rows.hpp"
#include "support/cache_shift.hpp"
#include "support/catch.hpp"
#include "support/storages.hpp"

#include <qkv/kv_cache.hpp>
#include <qkv/memory.hpp>
#include <qkv/saved_cache.hpp>

#include <cstdint>
#include <new>
#include <sstream>
#include <stdexcept>
#include <utility>

using namespace qkv;
using support::append_ids;
using support::contains;
using support::holds;
using support::ids;
using support::max_error;
using support::message_of;
using support::rows_until;

namespace {

/// A cache with a part taken away is none.
struct WithoutTryAppend : private KvCache<float> {
  using Storage = float;
  using KvCache<float>::key_rows, KvCache<float>::kv_heads, KvCache<float>::head_dim, KvCache<float>::v_head_dim;
  using KvCache<float>::position, KvCache<float>::rows, KvCache<float>::max_append, KvCache<float>::append;
  using KvCache<float>::truncate, KvCache<float>::workspace;
};
struct Whole : WithoutTryAppend {
  bool try_append(const View<float>&, const View<float>&);
};
struct WithoutWorkspace : Whole {
  void workspace() = delete;
};
struct WithoutHeads : Whole {
  void kv_heads() = delete;
};
static_assert(KeyValueCache<KvCache<float>> && KeyValueCache<KvCache<std::int8_t>> && KeyValueCache<Whole>);
static_assert(!KeyValueCache<WithoutTryAppend> && !KeyValueCache<WithoutWorkspace> && !KeyValueCache<WithoutHeads>);

constexpr KvCacheConfig sizes{.kv_heads = 3, .head_dim = 5, .v_head_dim = 7, .capacity = 12};

}  // namespace

TEMPLATE_LIST_TEST_CASE("rows come back within the rounding of their storage", "", support::AllStorages) {
  KvCache<TestType> cache(sizes);
  const auto k = support::numbers<double>(9, 15, 1), v = support::numbers<double>(9, 21, 2);
  cache.append(k.topRows(4), v.topRows(4));
  cache.append(k.bottomRows(5), v.bottomRows(5));
  REQUIRE(cache.rows() == 9);
  REQUIRE(cache.position() == 9);
  REQUIRE(cache.max_append() == 3);
  REQUIRE(max_error(cache.template keys<double>(), k) <= support::rounding<TestType>);
  REQUIRE(max_error(cache.template values<double>(), v) <= support::rounding<TestType>);
}

TEMPLATE_TEST_CASE("whole numbers come back exactly, whatever scalar they came in", "", float, double, half, bfloat16,
                   std::int8_t) {
  KvCache<TestType> cache(sizes);
  append_ids<float>(cache, ids(0, 2));
  append_ids<double>(cache, ids(2, 5));
  append_ids<half>(cache, ids(5, 6));
  append_ids<bfloat16>(cache, ids(6, 7));
  append_ids<long double>(cache, ids(7, 9));
  REQUIRE(holds(cache.key_rows(), rows_until(9)));
  REQUIRE(max_error(cache.keys(), support::cache_rows<float>(ids(0, 9), 3, 5, false)) == 0);
  REQUIRE(max_error(cache.values(), support::cache_rows<float>(ids(0, 9), 3, 7, true)) == 0);
}

TEST_CASE("append takes column blocks, other storage orders and expressions") {
  const auto qkv_rows = support::numbers<float>(6, 15 + 21 + 4, 3);
  const Eigen::MatrixXf k = qkv_rows.middleCols(4, 15);
  KvCache<float> blocks(sizes), plain(sizes), column_major(sizes);
  blocks.append(qkv_rows.middleCols(4, 15), qkv_rows.rightCols(21));
  column_major.append(k, 2 * qkv_rows.rightCols(21) - qkv_rows.rightCols(21));
  for (Index i = 0; i < 6; ++i)
    plain.append(RowVector<float>(qkv_rows.row(i).segment(4, 15)), RowVector<float>(qkv_rows.row(i).tail(21)));
  REQUIRE(max_error(blocks.keys(), k) == 0);
  REQUIRE(max_error(plain.keys(), k) == 0);
  REQUIRE(max_error(column_major.keys(), k) == 0);
  REQUIRE(max_error(column_major.values(), plain.values()) == 0);
}

TEST_CASE("int8: a NaN or an infinity poisons its own head of its own row, zeros stay zeros") {
  KvCache<std::int8_t> cache(sizes);
  Matrix<float> k = support::numbers<float>(4, 15, 4), v = support::numbers<float>(4, 21, 5);
  k(1, 7) = std::numeric_limits<float>::quiet_NaN();  // head 1
  v(2, 20) = std::numeric_limits<float>::infinity();  // head 2
  k.row(3).setZero();
  cache.append(k, v);
  const Matrix<float> keys = cache.keys(), values = cache.values();
  for (Index i = 0; i < 4; ++i) {
    for (Index j = 0; j < 15; ++j) REQUIRE(std::isnan(keys(i, j)) == (i == 1 && j >= 5 && j < 10));
    for (Index j = 0; j < 21; ++j) REQUIRE(std::isnan(values(i, j)) == (i == 2 && j >= 14));
  }
  REQUIRE(keys.row(3).cwiseAbs().maxCoeff() == 0);
  const auto rows = cache.key_rows();
  REQUIRE(rows.key_scale(rows.runs[0], 0, 3) == 0);
}

TEST_CASE("a full cache refuses, names the numbers and stays as it was") {
  KvCache<float> cache(sizes);
  append_ids(cache, ids(0, 10));
  const std::string message = message_of<std::length_error>([&] { append_ids(cache, ids(10, 13)); });
  for (const char* part : {"12", "10", "at most 2", "given 3"}) REQUIRE(contains(message, part));
  REQUIRE_FALSE(support::try_append_ids(cache, ids(10, 13)));
  REQUIRE(holds(cache.key_rows(), rows_until(10)));
  REQUIRE(support::try_append_ids(cache, ids(10, 12)));
  REQUIRE_FALSE(support::try_append_ids(cache, ids(12, 13)));
  REQUIRE(support::try_append_ids(cache, {}));
  REQUIRE(holds(cache.key_rows(), rows_until(12)));
}

TEST_CASE("wrong shapes are errors that show both shapes") {
  KvCache<float> cache(sizes);
  append_ids(cache, ids(0, 2));
  const Matrix<float> k(2, 15), v(2, 21), long_v(3, 21), narrow_k(2, 14);
  REQUIRE(contains(message_of([&] { cache.append(narrow_k, v); }), "[2, 14]"));
  REQUIRE(contains(message_of([&] { cache.append(k, long_v); }), "[3, 21]"));
  REQUIRE(contains(message_of([&] { (void)cache.try_append(v, k); }), "head_dim 5"));
  REQUIRE(contains(message_of([&] { cache.scatter_rows(0, narrow_k, v); }), "[2, 14]"));
  REQUIRE(contains(message_of([&] { cache.scatter_rows(0, k, long_v, Wrap::circular); }), "[3, 21]"));
  REQUIRE(holds(cache.key_rows(), rows_until(2)));
}

TEST_CASE("settings that make no sense are refused") {
  REQUIRE_THROWS_AS(KvCache<float>({.kv_heads = 0, .head_dim = 4, .capacity = 4}), std::invalid_argument);
  REQUIRE_THROWS_AS(KvCache<float>({.kv_heads = 2, .head_dim = 0, .capacity = 4}), std::invalid_argument);
  REQUIRE_THROWS_AS(KvCache<float>({.kv_heads = 2, .head_dim = 4, .v_head_dim = -1, .capacity = 4}),
                    std::invalid_argument);
  REQUIRE_THROWS_AS(KvCache<float>({.kv_heads = 2, .head_dim = 4, .capacity = 0}), std::invalid_argument);
  REQUIRE_THROWS_AS(KvCache<float>({.kv_heads = 2, .head_dim = 4, .capacity = 10, .block = 4}), std::invalid_argument);
  constexpr Index huge = std::numeric_limits<Index>::max() / 2;
  REQUIRE_THROWS_AS(KvCache<float>({.kv_heads = 2, .head_dim = 4, .capacity = huge}), std::length_error);
  // A growing cache allocates nothing at first, and asks all the same.
  REQUIRE_THROWS_AS(KvCache<float>({.kv_heads = Index{1} << 32, .head_dim = Index{1} << 32, .capacity = 4, .block = 2}),
                    std::length_error);
  constexpr Index most = std::numeric_limits<Index>::max();  // a multiple of 7
  KvCache<float> endless({.kv_heads = 1, .head_dim = 1, .capacity = most, .block = 7});
  endless.append(Matrix<float>::Ones(1, 1), Matrix<float>::Ones(1, 1));
  REQUIRE(endless.rows() == 1);
  REQUIRE_THROWS_AS(endless.reserve(most), std::length_error);
  REQUIRE(endless.rows() == 1);
}

TEST_CASE("truncate forgets what came after, as if it had never been there") {
  KvCache<half> cache(sizes);
  append_ids(cache, ids(0, 9));
  REQUIRE_THROWS_AS(cache.truncate(10), std::out_of_range);
  REQUIRE_THROWS_AS(cache.truncate(-1), std::out_of_range);
  REQUIRE_FALSE(cache.try_truncate(10));
  REQUIRE(holds(cache.key_rows(), rows_until(9)));
  cache.truncate(9);
  cache.truncate(5);
  REQUIRE(holds(cache.key_rows(), rows_until(5)));
  append_ids(cache, ids(5, 12));
  REQUIRE(holds(cache.key_rows(), rows_until(12)));
  REQUIRE(cache.try_truncate(0));
  REQUIRE(cache.rows() == 0);
  REQUIRE(cache.key_rows().runs.empty());
  append_ids(cache, ids(0, 1));
  cache.clear();
  REQUIRE(cache.position() == 0);
  REQUIRE(cache.keys().rows() == 0);
}

TEST_CASE("a growing cache takes memory in blocks and never moves a row") {
  KvCache<std::int8_t> cache({.kv_heads = 3, .head_dim = 5, .v_head_dim = 7, .capacity = 20, .block = 4});
  REQUIRE(cache.bytes() == 0);
  append_ids(cache, ids(0, 3));
  const std::int8_t* first = cache.key_rows().runs[0].keys;
  const Index block_bytes = cache.bytes();
  for (Index n = 3; n < 20; ++n) {
    append_ids(cache, ids(n, n + 1));
    REQUIRE(cache.key_rows().runs.size() == static_cast<std::size_t>(n / 4 + 1));
    REQUIRE(cache.bytes() == block_bytes * (n / 4 + 1));
    REQUIRE(holds(cache.key_rows(), rows_until(n + 1)));
  }
  REQUIRE(cache.key_rows().runs[0].keys == first);
  REQUIRE_THROWS_AS(append_ids(cache, ids(20, 21)), std::length_error);
  cache.truncate(6);
  append_ids(cache, ids(6, 17));
  REQUIRE(holds(cache.key_rows(), rows_until(17)));

  KvCache<float> reserved({.kv_heads = 3, .head_dim = 5, .v_head_dim = 7, .capacity = 1 << 20, .block = 4});
  reserved.reserve(-3);
  REQUIRE(reserved.bytes() == 0);
  reserved.reserve(9);
  REQUIRE(reserved.bytes() == 12 * 3 * (5 + 7) * 4);
}

TEST_CASE("scatter_rows overwrites, and appends past the rows held") {
  KvCache<float> cache(sizes);
  append_ids(cache, ids(0, 6));
  support::scatter_ids(cache, 4, {100, 101, 102});
  REQUIRE(holds(cache.key_rows(), {{0, 0}, {1, 1}, {2, 2}, {3, 3}, {4, 100}, {5, 101}, {6, 102}}));
  support::scatter_ids(cache, 0, {200});
  REQUIRE(cache.rows() == 7);
  REQUIRE_THROWS_AS(support::scatter_ids(cache, 8, {1}), std::out_of_range);
  REQUIRE_THROWS_AS(support::scatter_ids(cache, -1, {1}), std::out_of_range);
  REQUIRE_THROWS_AS(support::scatter_ids(cache, 7, ids(0, 6)), std::length_error);
  constexpr Index most = std::numeric_limits<Index>::max();  // position + n would not fit
  REQUIRE_THROWS_AS(support::scatter_ids(cache, most, {1}), std::out_of_range);
  REQUIRE_THROWS_AS(support::scatter_ids(cache, most - 1, {1, 2}), std::out_of_range);
  REQUIRE(holds(cache.key_rows(), {{0, 200}, {1, 1}, {2, 2}, {3, 3}, {4, 100}, {5, 101}, {6, 102}}));
}

TEST_CASE("a circular write is ONNX TensorScatter: row (position + i) modulo capacity") {
  for (const Index block : {0, 4}) {
    KvCacheConfig config = sizes;
    config.block = block;
    for (const Index position : {0, 5, 10, 11, 12, 23})
      for (const Index n : {0, 1, 2, 7, 12}) {
        KvCache<float> cache(config);
        append_ids(cache, ids(0, 12));
        auto expected = rows_until(12);
        for (Index i = 0; i < n; ++i) expected[static_cast<std::size_t>((position + i) % 12)].id = 100 + i;
        support::scatter_ids(cache, n == 0 ? 0 : position, ids(100, 100 + n), Wrap::circular);
        REQUIRE(holds(cache.key_rows(), expected));
      }
    KvCache<float> cache(config);
    append_ids(cache, ids(0, 9));
    REQUIRE_THROWS_AS(support::scatter_ids(cache, 10, {1}, Wrap::circular), std::out_of_range);
    REQUIRE_THROWS_AS(support::scatter_ids(cache, -2, {1}, Wrap::circular), std::out_of_range);
    REQUIRE_THROWS_AS(support::scatter_ids(cache, 3, ids(0, 13), Wrap::circular), std::length_error);
    REQUIRE(holds(cache.key_rows(), rows_until(9)));
    support::scatter_ids(cache, 9, {9, 10, 11, 100}, Wrap::circular);  // fills the cache and goes on
    REQUIRE(cache.rows() == 12);
    REQUIRE(
        holds(cache.key_rows(),
              {{0, 100}, {1, 1}, {2, 2}, {3, 3}, {4, 4}, {5, 5}, {6, 6}, {7, 7}, {8, 8}, {9, 9}, {10, 10}, {11, 11}}));
  }
}

TEMPLATE_TEST_CASE("copies do not see each other, and what was moved from is an empty cache of capacity 0", "", float,
                   std::int8_t) {
  for (const Index block : {0, 4}) {
    KvCacheConfig config = sizes;
    config.block = block;
    KvCache<TestType> a(config);
    append_ids(a, ids(0, 6));
    KvCache<TestType> b = a;
    append_ids(a, {77});
    append_ids(b, ids(6, 11));
    REQUIRE(holds(b.key_rows(), rows_until(11)));
    REQUIRE(a.rows() == 7);
    b.truncate(2);
    append_ids(b, {55});
    REQUIRE(holds(a.key_rows(), {{0, 0}, {1, 1}, {2, 2}, {3, 3}, {4, 4}, {5, 5}, {6, 77}}));
    a = b;
    REQUIRE(holds(a.key_rows(), {{0, 0}, {1, 1}, {2, 55}}));
    KvCache<TestType>& self = a;
    a = self;
    REQUIRE(holds(a.key_rows(), {{0, 0}, {1, 1}, {2, 55}}));

    KvCache<TestType> c = std::move(a);
    REQUIRE(holds(c.key_rows(), {{0, 0}, {1, 1}, {2, 55}}));
    REQUIRE(a.rows() == 0);
    REQUIRE(a.capacity() == 0);
    REQUIRE(a.bytes() == 0);
    REQUIRE(a.key_rows().runs.empty());
    REQUIRE_FALSE(support::try_append_ids(a, {1}));
    a = c;
    REQUIRE(holds(a.key_rows(), {{0, 0}, {1, 1}, {2, 55}}));
  }
}

TEMPLATE_LIST_TEST_CASE("bytes and overhead_bytes are what the allocator sees, and the figure of memory.hpp", "",
                        support::AllStorages) {
  constexpr MultiHeadAttentionConfig layer{.model_dim = 30, .heads = 6, .kv_heads = 3, .head_dim = 5, .v_head_dim = 7};
  const auto before = support::allocations();
  {
    const KvCache<TestType> cache(sizes);
    REQUIRE(cache.bytes() == cache_bytes<TestType>(layer, 12));
    const Index sum = cache.bytes() + cache.overhead_bytes();
    REQUIRE((support::allocations() - before).new_bytes == sum);
  }
  REQUIRE((support::allocations() - before).new_bytes == 0);

  KvCache<TestType> growing({.kv_heads = 3, .head_dim = 5, .v_head_dim = 7, .capacity = 40, .block = 4});
  append_ids(growing, ids(0, 22));
  growing.workspace().reserve(1000);
  const Index bytes = growing.bytes(), overhead = growing.overhead_bytes();
  const auto held = support::allocations();
  { const KvCache<TestType> gone = std::move(growing); }
  REQUIRE((held - support::allocations()).new_bytes == bytes + overhead - 1000);  // a workspace stays where it is
  REQUIRE(growing.overhead_bytes() == 1000);
  REQUIRE(bytes == cache_bytes<TestType>(layer, 24));
}

TEST_CASE("appending to a cache of fixed capacity allocates nothing") {
  KvCache<std::int8_t> cache(sizes);
  const auto k = support::numbers<float>(12, 15, 1), v = support::numbers<float>(12, 21, 2);
  const auto used = support::allocations_of([&] {
    for (Index i = 0; i < 12; ++i) cache.append(k.middleRows(i, 1), v.middleRows(i, 1));
    cache.truncate(4);
    cache.append(k.topRows(8), v.topRows(8));
    cache.scatter_rows(11, k.topRows(3), v.topRows(3), Wrap::circular);
  });
  REQUIRE(used.count == 0);
}

TEST_CASE("the rows of a head lie one after another, from a 64-byte boundary on") {
  KvCache<float> cache(sizes);
  append_ids(cache, ids(0, 4));
  const auto rows = cache.key_rows();
  REQUIRE(rows.runs.size() == 1);
  REQUIRE(rows.key_row_stride == 5);
  REQUIRE(rows.key_head_stride == 12 * 5);
  REQUIRE(rows.value_row_stride == 7);
  REQUIRE(reinterpret_cast<std::uintptr_t>(rows.runs[0].keys) % 64 == 0);
  REQUIRE(reinterpret_cast<std::uintptr_t>(rows.runs[0].values) % 64 == 0);
}

TEMPLATE_LIST_TEST_CASE("after a context shift a cache is what it would be without the dropped rows", "",
                        qkv::StorageTypes) {
  const Matrix<float> k = support::numbers<float>(131, 3 * 6, 1), v = support::numbers<float>(131, 3 * 7, 2);
  for (const RopeConfig& config : support::shifted_ropes) {
    const Rope<float> rope(config, 6);
    for (const auto& [first, n] : support::drops)
      for (const Index block : {Index{0}, Index{20}}) {
        CAPTURE(first, n, block);
        KvCache<TestType> cache({.kv_heads = 3, .head_dim = 6, .v_head_dim = 7, .capacity = 140, .block = block});
        KvCache<TestType> rebuilt(cache);
        cache.append(rope.apply(k, 3, 0), v);
        rebuilt.append(rope.apply(support::without(k, first, n), 3, 0), support::without(v, first, n));
        cache.drop_rows(first, n, rope);
        REQUIRE(cache.position() == 131 - n);
        REQUIRE(support::same_bits(cache.values(), rebuilt.values()));
        // int8: half a step of the largest key each time; the turn takes √2 of the first.
        const double tolerance = has_row_scale<TestType> ? 3.5 * 1.7 * support::rounding<TestType>
                                                         : support::shift_tolerance<WideStorage<TestType>>;
        REQUIRE(support::max_error(cache.keys(), rebuilt.keys()) <= tolerance);
        REQUIRE(support::same_bits(cache.keys().topRows(first), rebuilt.keys().topRows(first)));
      }
  }
}

TEST_CASE("a context shift that cannot be leaves a cache as it was; one that can allocates nothing when warm") {
  KvCache<float> cache({.kv_heads = 3, .head_dim = 6, .v_head_dim = 7, .capacity = 20, .block = 4});
  append_ids(cache, ids(0, 9));
  const Rope<float> rope(support::shifted_ropes[0], 6), narrower(support::shifted_ropes[0], 4);
  for (const auto& drop : {std::pair<Index, Index>{-1, 2}, {0, 10}, {8, 2}, {3, -1}, {10, 0}})
    REQUIRE(support::contains(
        support::message_of<std::out_of_range>([&] { cache.drop_rows(drop.first, drop.second, rope); }),
        "rows held 9"));
  REQUIRE(support::contains(support::message_of([&] { cache.drop_rows(0, 2, narrower); }),
                            "(of latents: rope_dim) 6; given 4"));
  REQUIRE(holds(cache.key_rows(), support::rows_until(9)));
  cache.drop_rows(0, 2, rope);
  REQUIRE(support::allocations_of([&] { cache.drop_rows(1, 3, rope); }).count == 0);
  REQUIRE(cache.rows() == 4);
}

namespace {

template <class S>
void append_numbers(KvCache<S>& cache, Index n) {
  const auto seed = static_cast<std::uint64_t>(n + cache.rows());
  cache.append(support::numbers<float>(n, 3 * 6, seed), support::numbers<float>(n, 3 * 7, seed + 1));
}

}  // namespace

TEMPLATE_LIST_TEST_CASE("however often a cache is shifted, its keys are rounded once", "", support::AllStorages) {
  const auto held = [](const KvCache<TestType>& cache) { return cache.template keys<double>(); };
  const auto after = [&](Index k, const RopeConfig& config, Index block, auto... how) {
    KvCache<TestType> cache({.kv_heads = 3, .head_dim = 6, .v_head_dim = 7, .capacity = 4080, .block = block});
    const support::ShiftedRows expected(config, 3, 6);
    if constexpr (std::is_same_v<TestType, double>)
      return support::roundings_after<TestType>(k, cache, expected, Rope<double>(config, 6), held,
                                                append_numbers<TestType>, how...);
    else
      return support::roundings_after<TestType>(k, cache, expected, Rope<float>(config, 6), held,
                                                append_numbers<TestType>, how...);
  };
  for (const RopeConfig& config : support::shifted_ropes)
    for (const Index k : {1, 10, 300, 2000}) {
      CAPTURE(k);
      REQUIRE(after(k, config, k == 300 ? 20 : 0) <= 1);
    }
  // In place every shift rounds again.
  REQUIRE(after(1, support::shifted_ropes[0], 20, Shift::in_place) <= 1);
  const double in_place = after(300, support::shifted_ropes[0], 20, Shift::in_place);
  CAPTURE(in_place);
  REQUIRE((in_place > 4 || std::is_same_v<TestType, double>));  // double: too fine to be told from its angles
}

TEMPLATE_TEST_CASE("shifts, writes, copies and files in any order: every key as it came, turned once", "", float, half,
                   std::int8_t) {
  std::uint64_t state = 4711;
  const auto roll = [&](Index sides) {
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    return static_cast<Index>(state % static_cast<std::uint64_t>(sides));
  };
  for (const Index block : {0, 8}) {
    const RopeConfig config = support::shifted_ropes[0];
    const Rope<float> rope(config, 6);
    KvCache<TestType> cache({.kv_heads = 3, .head_dim = 6, .v_head_dim = 7, .capacity = 40, .block = block});
    support::ShiftedRows expected(config, 3, 6);
    const auto came = [&](Index first, Index n) { expected.came(cache.template keys<double>(), first, n); };
    for (int step = 0; step < 500; ++step) {
      const Index rows = cache.rows(), n = roll(4), first = roll(rows + 1);
      switch (roll(8)) {
        case 0:
        case 1:
        case 2:
          if (first + n > rows) break;
          cache.drop_rows(first, n, rope);
          expected.drop(first, n);
          break;
        case 3: {  // overwritten: original again
          const auto seed = static_cast<std::uint64_t>(step);
          if (first + n > 40) break;
          cache.scatter_rows(first, support::numbers<float>(n, 18, seed), support::numbers<float>(n, 21, seed));
          came(first, n);
          break;
        }
        case 4:
          if (roll(5) > 0) break;
          cache.truncate(first);
          expected.truncate(first);
          break;
        case 5: {  // a copy has the originals too, and not those of its model
          KvCache<TestType> copy(cache);
          cache.clear();
          append_numbers(cache, 40);
          if (roll(2) == 0) cache.drop_rows(1, 2, rope);
          cache = roll(2) == 0 ? copy : std::move(copy);
          break;
        }
        case 6: {  // a file has not: what was saved is what came
          if (roll(4) > 0) break;
          std::stringstream file;
          save_cache(file, cache);
          if (roll(2) == 0) cache.drop_rows(0, rows, rope);
          load_cache(file, cache);
          came(0, rows);
          break;
        }
        default:
          if (rows + n > 40) break;
          append_numbers(cache, n);
          came(rows, n);
      }
      CAPTURE(step, block);
      REQUIRE(expected.template roundings<TestType>(cache.template keys<double>()) <= 1);
    }
  }
}

TEMPLATE_TEST_CASE("a shift that finds no memory leaves a cache as it was, and counts what it finds", "", float,
                   std::int8_t) {
  const Rope<float> rope(support::shifted_ropes[0], 6);
  for (const Index block : {0, 4}) {
    for (std::int64_t k = 0, failed = 1; failed > 0; ++k) {
      const auto before = support::allocations();
      KvCache<TestType> cache({.kv_heads = 3, .head_dim = 6, .v_head_dim = 7, .capacity = 20, .block = block});
      append_ids(cache, ids(0, 19));
      const Index bytes = cache.bytes();
      failed = 0;
      try {
        const support::FailingAllocation failing(k);
        cache.drop_rows(3, 2, rope);
      } catch (const std::bad_alloc&) {
        failed = 1;
      }
      if (failed > 0) REQUIRE(holds(cache.key_rows(), support::rows_until(19)));
      if (failed == 0) REQUIRE((k > 1 && cache.rows() == 17));
      REQUIRE(cache.bytes() == bytes);
      REQUIRE((support::allocations() - before).new_bytes == cache.bytes() + cache.overhead_bytes());
      const Index overhead = cache.overhead_bytes();
      cache.drop_rows(0, 1, rope, Shift::in_place);
      if (failed == 0) REQUIRE(cache.overhead_bytes() == overhead);
      const KvCache<TestType> copy(cache);
      REQUIRE((support::allocations() - before).new_bytes ==
              cache.bytes() + cache.overhead_bytes() + copy.bytes() + copy.overhead_bytes());
    }
  }
  // In place takes no memory but for the workspace; nor does a shift that turns nothing.
  KvCache<TestType> cache({.kv_heads = 3, .head_dim = 6, .v_head_dim = 7, .capacity = 20});
  append_ids(cache, ids(0, 19));
  const Index before = cache.overhead_bytes() - cache.workspace().bytes();
  cache.drop_rows(3, 2, rope, Shift::in_place), cache.drop_rows(14, 3, rope), cache.drop_rows(2, 0, rope);
  REQUIRE(cache.overhead_bytes() - cache.workspace().bytes() == before);
  cache.drop_rows(3, 2, rope);
  constexpr Index copies = 20 * (3 * row_bytes<TestType>(6) + static_cast<Index>(sizeof(Index)));
  REQUIRE(cache.overhead_bytes() - cache.workspace().bytes() == before + copies);
}

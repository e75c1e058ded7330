#include "support/allocations.hpp"
#include "support/cache_shift.hpp"
#include "support/catch.hpp"
#include "support/numbers.hpp"
#include "support/storages.hpp"

#include <qkv/latent_cache.hpp>
#include <qkv/memory.hpp>
#include <qkv/saved_cache.hpp>

#include <cstdint>
#include <limits>
#include <new>
#include <sstream>
#include <stdexcept>
#include <utility>

using namespace qkv;
using support::contains;
using support::max_error;
using support::message_of;
using support::numbers;

namespace {

constexpr LatentCacheConfig sizes{.latent_dim = 11, .rope_dim = 6, .capacity = 9};

/// Whole numbers that every storage keeps exactly: the largest of each row is 127.
Matrix<float> whole(Index rows, Index cols, std::uint64_t seed) {
  Matrix<float> m = (numbers<float>(rows, cols, seed) * 127).array().floor();
  m.col(0).setConstant(127);
  return m;
}

template <class T, class S>
Matrix<T> read_latent(const LatentRows<S>& all) {
  Matrix<T> out(all.rows, all.latent_dim);
  Index at = 0;
  for (const auto& run : all.runs)
    for (Index i = 0; i < run.rows; ++i, ++at)
      for (Index j = 0; j < all.latent_dim; ++j)
        out(at, j) = static_cast<T>(all.latent(run, i)[j]) * static_cast<T>(all.scale(run, i));
  return out;
}

}  // namespace

TEMPLATE_TEST_CASE("latents and rope keys come back, whatever scalar they came in", "", float, double, half, bfloat16,
                   std::int8_t) {
  LatentCache<TestType> cache(sizes);
  const auto c = whole(7, 11, 1), r = whole(7, 6, 2);
  cache.append(c.topRows(2), r.topRows(2));
  cache.append(c.middleRows(2, 3).template cast<double>(), r.middleRows(2, 3).template cast<half>());
  cache.append(c.bottomRows(2).template cast<bfloat16>(), r.bottomRows(2).template cast<long double>());
  REQUIRE(cache.rows() == 7);
  REQUIRE(cache.position() == 7);
  REQUIRE(cache.max_append() == 2);
  REQUIRE(max_error(cache.latent(), c) == 0);
  REQUIRE(max_error(cache.rope_keys(), r) == 0);
  REQUIRE(max_error(cache.template latent<double>(), c) == 0);
  REQUIRE(max_error(read_latent<double>(cache.latent_rows()), c) == 0);
  REQUIRE(cache.latent_rows().runs.size() == 1);
  REQUIRE(cache.latent_rows().runs[0].position == 0);
}

TEMPLATE_TEST_CASE("a row is the absorbed key: the rope key follows its latent", "", float, double, half, bfloat16) {
  LatentCache<TestType> cache(sizes);
  const auto c = whole(3, 11, 1), r = whole(3, 6, 2);
  cache.append(c, r);
  const auto all = cache.latent_rows();
  REQUIRE(all.latent_row_stride == 17);
  REQUIRE(all.rope_row_stride == 17);
  REQUIRE(reinterpret_cast<std::uintptr_t>(all.runs[0].latent) % 64 == 0);
  for (Index i = 0; i < 3; ++i) REQUIRE(all.rope(all.runs[0], i) == all.latent(all.runs[0], i) + 11);
}

TEST_CASE("int8: one scale per latent row, and a rope key that is not rounded to bytes") {
  LatentCache<std::int8_t> cache(sizes);
  Matrix<float> c = numbers<float>(4, 11, 3);
  const auto r = numbers<float>(4, 6, 4);
  c.row(1).setZero();
  c(2, 10) = std::numeric_limits<float>::quiet_NaN();
  cache.append(c, r);
  REQUIRE(max_error(cache.rope_keys(), r) == 0);
  const auto back = cache.latent();
  for (const Index i : {0, 3})
    REQUIRE(max_error(back.row(i), c.row(i)) <= c.row(i).cwiseAbs().maxCoeff() / 127 / 2 * 1.0001);
  REQUIRE(back.row(1).cwiseAbs().maxCoeff() == 0);
  REQUIRE(back.row(2).array().isNaN().all());
}

TEST_CASE("a full latent cache and wrong shapes leave it as it was") {
  LatentCache<float> cache(sizes);
  const auto c = whole(10, 11, 1), r = whole(10, 6, 2);
  cache.append(c.topRows(8), r.topRows(8));
  const std::string message = message_of<std::length_error>([&] { cache.append(c.topRows(2), r.topRows(2)); });
  for (const char* part : {"capacity 9", "held 8", "at most 1", "given 2"}) REQUIRE(contains(message, part));
  REQUIRE_FALSE(cache.try_append(c.topRows(2), r.topRows(2)));
  REQUIRE(contains(message_of([&] { cache.append(c.topRows(1), r.topRows(2)); }), "[2, 6]"));
  REQUIRE(contains(message_of([&] { cache.append(c.leftCols(10), r); }), "[10, 10]"));
  REQUIRE(contains(message_of([&] { (void)cache.try_append(r, c); }), "latent_dim 11"));
  REQUIRE(max_error(cache.latent(), c.topRows(8)) == 0);
  REQUIRE(cache.try_append(c.middleRows(8, 1), r.middleRows(8, 1)));
  REQUIRE(max_error(cache.latent(), c.topRows(9)) == 0);
  REQUIRE_THROWS_AS(LatentCache<float>({.latent_dim = 0, .rope_dim = 2, .capacity = 3}), std::invalid_argument);
  REQUIRE_THROWS_AS(LatentCache<float>({.latent_dim = 4, .rope_dim = 0, .capacity = 3}), std::invalid_argument);
  REQUIRE_THROWS_AS(LatentCache<float>({.latent_dim = 4, .rope_dim = 2, .capacity = 0}), std::invalid_argument);
  REQUIRE_THROWS_AS(
      LatentCache<float>({.latent_dim = 4, .rope_dim = 2, .capacity = std::numeric_limits<Index>::max() / 2}),
      std::length_error);
  REQUIRE_THROWS_AS(LatentCache<float>({.latent_dim = std::numeric_limits<Index>::max(), .rope_dim = 1, .capacity = 1}),
                    std::length_error);
}

TEMPLATE_TEST_CASE("truncate and clear forget, and the rows can be written again", "", float, std::int8_t) {
  LatentCache<TestType> cache(sizes);
  const auto c = whole(9, 11, 1), r = whole(9, 6, 2);
  cache.append(c, r);
  REQUIRE_THROWS_AS(cache.truncate(10), std::out_of_range);
  REQUIRE_FALSE(cache.try_truncate(-1));
  cache.truncate(9);
  REQUIRE(cache.try_truncate(4));
  REQUIRE(max_error(cache.latent(), c.topRows(4)) == 0);
  cache.append(c.topRows(2), r.topRows(2));
  REQUIRE(max_error(cache.latent().bottomRows(2), c.topRows(2)) == 0);
  REQUIRE(max_error(cache.rope_keys().topRows(4), r.topRows(4)) == 0);
  cache.clear();
  REQUIRE(cache.position() == 0);
  REQUIRE(cache.latent_rows().runs.empty());
  REQUIRE(cache.latent().rows() == 0);
}

TEMPLATE_TEST_CASE("latent copies do not see each other, and what was moved from has capacity 0", "", half,
                   std::int8_t) {
  LatentCache<TestType> a(sizes);
  const auto c = whole(9, 11, 1), r = whole(9, 6, 2);
  a.append(c.topRows(4), r.topRows(4));
  LatentCache<TestType> b = a;
  b.append(c.middleRows(4, 2), r.middleRows(4, 2));
  a.append(c.bottomRows(1), r.bottomRows(1));
  REQUIRE(max_error(b.latent(), c.topRows(6)) == 0);
  REQUIRE(max_error(b.rope_keys(), r.topRows(6)) == 0);
  REQUIRE(max_error(a.latent().bottomRows(1), c.bottomRows(1)) == 0);
  LatentCache<TestType> moved = std::move(b);
  REQUIRE(max_error(read_latent<float>(moved.latent_rows()), c.topRows(6)) == 0);
  REQUIRE(b.capacity() == 0);
  REQUIRE(b.rows() == 0);
  REQUIRE(b.bytes() == 0);
  const LatentCache<TestType> empty = b;
  REQUIRE(empty.capacity() == 0);
  b = moved;
  b = std::move(moved);
  REQUIRE(max_error(b.rope_keys(), r.topRows(6)) == 0);
}

TEMPLATE_LIST_TEST_CASE("a latent cache's bytes are what the allocator sees; appending allocates nothing", "",
                        support::AllStorages) {
  const auto c = whole(9, 11, 1), r = whole(9, 6, 2);
  const auto before = support::allocations();
  LatentCache<TestType> cache(sizes);
  const Index sum = cache.bytes() + cache.overhead_bytes();
  const auto built = support::allocations();
  REQUIRE((built - before).new_bytes == sum);
  const auto used = support::allocations_of([&] {
    for (Index i = 0; i < 9; ++i) cache.append(c.middleRows(i, 1), r.middleRows(i, 1));
    cache.truncate(2);
    cache.append(c.topRows(7), r.topRows(7));
  });
  REQUIRE(used.count == 0);
}

TEMPLATE_LIST_TEST_CASE("after a context shift a latent cache is what it would be without the dropped rows", "",
                        support::AllStorages) {
  const Matrix<double> c = numbers<double>(131, 11, 1), r = numbers<double>(131, 6, 2);  // r not yet turned
  for (const RopeConfig& config : support::shifted_ropes) {
    const Rope<double> rope(config, 6);
    for (const auto& [first, n] : support::drops) {
      CAPTURE(first, n);
      LatentCache<TestType> cache({.latent_dim = 11, .rope_dim = 6, .capacity = 140}), rebuilt(cache);
      cache.append(c, rope.apply(r, 1, 0));
      rebuilt.append(support::without(c, first, n), rope.apply(support::without(r, first, n), 1, 0));
      if constexpr (std::is_same_v<TestType, double>)
        cache.drop_rows(first, n, rope);
      else
        cache.drop_rows(first, n, Rope<float>(config, 6));
      REQUIRE(cache.position() == 131 - n);
      REQUIRE(support::same_bits(cache.latent(), rebuilt.latent()));
      REQUIRE(max_error(cache.rope_keys(), rebuilt.rope_keys()) <= support::shift_tolerance<WideStorage<TestType>>);
      REQUIRE(support::same_bits(cache.rope_keys().topRows(first), rebuilt.rope_keys().topRows(first)));
      cache.append(c.topRows(1), r.topRows(1));
      REQUIRE(cache.latent_rows().runs[0].rows == 132 - n);
    }
  }
}

TEST_CASE("a context shift that cannot be leaves a latent cache as it was; one that can allocates nothing when warm") {
  LatentCache<half> cache(sizes);
  const auto c = whole(9, 11, 1), r = whole(9, 6, 2);
  cache.append(c, r);
  const Rope<float> rope(support::shifted_ropes[0], 6), wider(support::shifted_ropes[0], 8);
  for (const auto& drop : {std::pair<Index, Index>{-1, 2}, {0, 10}, {8, 2}, {3, -1}, {10, 0}})
    REQUIRE(contains(message_of<std::out_of_range>([&] { cache.drop_rows(drop.first, drop.second, rope); }),
                     "rows held 9"));
  REQUIRE(contains(message_of([&] { cache.drop_rows(0, 2, wider); }), "(of latents: rope_dim) 6; given 8"));
  REQUIRE(cache.rows() == 9);
  REQUIRE(max_error(cache.latent(), c) == 0);
  REQUIRE(max_error(cache.rope_keys(), r) == 0);
  cache.drop_rows(0, 2, rope);
  REQUIRE(support::allocations_of([&] { cache.drop_rows(1, 3, rope); }).count == 0);
  REQUIRE(cache.rows() == 4);
}

namespace {

template <class S>
void append_latents(LatentCache<S>& cache, Index n) {
  const auto seed = static_cast<std::uint64_t>(n + cache.rows());
  cache.append(numbers<float>(n, 11, seed), numbers<float>(n, 6, seed + 1));
}

}  // namespace

TEMPLATE_LIST_TEST_CASE("however often a latent cache is shifted, its rope keys are rounded once", "",
                        support::AllStorages) {
  using Wide = WideStorage<TestType>;
  const auto held = [](const LatentCache<TestType>& cache) { return cache.template rope_keys<double>(); };
  const auto after = [&](Index k, const RopeConfig& config, auto... how) {
    LatentCache<TestType> cache({.latent_dim = 11, .rope_dim = 6, .capacity = 4080});
    const support::ShiftedRows expected(config, 1, 6);
    if constexpr (std::is_same_v<TestType, double>)
      return support::roundings_after<Wide>(k, cache, expected, Rope<double>(config, 6), held, append_latents<TestType>,
                                            how...);
    else
      return support::roundings_after<Wide>(k, cache, expected, Rope<float>(config, 6), held, append_latents<TestType>,
                                            how...);
  };
  for (const RopeConfig& config : support::shifted_ropes)
    for (const Index k : {1, 10, 300, 2000}) {
      CAPTURE(k);
      REQUIRE(after(k, config) <= 1);
    }
  REQUIRE(after(1, support::shifted_ropes[0], Shift::in_place) <= 1);
  REQUIRE((after(300, support::shifted_ropes[0], Shift::in_place) > 4 || std::is_same_v<TestType, double>));
}

TEST_CASE("latent copies keep the keys as they came, overwritten rows and files begin anew") {
  const RopeConfig config = support::shifted_ropes[0];
  const Rope<float> rope(config, 6);
  LatentCache<half> cache({.latent_dim = 11, .rope_dim = 6, .capacity = 60});
  support::ShiftedRows expected(config, 1, 6);
  append_latents(cache, 60);
  expected.came(cache.rope_keys<double>(), 0, 60);
  const auto shift = [&](Index first, Index n) { cache.drop_rows(first, n, rope), expected.drop(first, n); };
  const auto right = [&] { return expected.roundings<half>(cache.rope_keys<double>()) <= 1; };
  for (Index i = 0; i < 10; ++i) shift(2, i % 3);
  REQUIRE(right());
  LatentCache<half> copy(cache), moved(std::move(copy));
  cache.clear(), append_latents(cache, 60), cache.drop_rows(1, 2, rope);
  cache = moved;
  for (Index i = 0; i < 10; ++i) shift(3, i % 3);
  REQUIRE(right());
  cache.truncate(20), expected.truncate(20);
  append_latents(cache, 25);
  expected.came(cache.rope_keys<double>(), 20, 25);
  for (Index i = 0; i < 10; ++i) shift(3, i % 2);
  REQUIRE(right());
  std::stringstream file;
  save_cache(file, cache);
  cache.drop_rows(0, 3, rope);
  load_cache(file, cache);
  expected.came(cache.rope_keys<double>(), 0, cache.rows());
  shift(0, 4);
  REQUIRE(right());
}

TEST_CASE("a latent shift that finds no memory leaves the cache as it was, and counts what it finds") {
  const Rope<float> rope(support::shifted_ropes[0], 6);
  for (std::int64_t k = 0, failed = 1; failed > 0; ++k) {
    const auto before = support::allocations();
    LatentCache<std::int8_t> cache({.latent_dim = 11, .rope_dim = 6, .capacity = 20});
    append_latents(cache, 19);
    const Matrix<float> latent = cache.latent(), keys = cache.rope_keys();
    const auto unaccounted = [&] {
      return (support::allocations() - before).new_bytes - cache.bytes() - cache.overhead_bytes();
    };
    const std::int64_t beside = unaccounted();
    failed = 0;
    try {
      const support::FailingAllocation failing(k);
      cache.drop_rows(3, 2, rope);
    } catch (const std::bad_alloc&) {
      failed = 1;
    }
    const bool same = support::same_bits(cache.latent(), latent) && support::same_bits(cache.rope_keys(), keys);
    REQUIRE(same == (failed > 0));
    REQUIRE(unaccounted() == beside);
    REQUIRE((failed > 0 || (k > 1 && cache.rows() == 17)));
  }
  LatentCache<half> cache({.latent_dim = 11, .rope_dim = 6, .capacity = 20});
  append_latents(cache, 19);
  cache.drop_rows(3, 2, rope, Shift::in_place), cache.drop_rows(14, 3, rope);
  REQUIRE(cache.overhead_bytes() == cache.workspace().bytes());
  cache.drop_rows(3, 2, rope);
  REQUIRE(cache.overhead_bytes() == cache.workspace().bytes() + 20 * (6 * 2 + static_cast<Index>(sizeof(Index))));
}

#include <qkv/multi_head_attention.hpp>
#include <qkv/paged_cache.hpp>
#include <qkv/ring_cache.hpp>

#include "support/batches.hpp"
#include "support/catch.hpp"
#include "support/executors.hpp"

using namespace support;
using qkv::KvCache, qkv::LayerOptions, qkv::PagedCache, qkv::PagePool, qkv::RingCache;

namespace {

/// For small_gqa.
template <class S = float>
std::vector<KvCache<S>> contiguous(Index capacity = 90) {
  const KvCache<S> empty({.kv_heads = 2, .head_dim = 10, .v_head_dim = 7, .capacity = capacity});
  return std::vector<KvCache<S>>(4, empty);
}
template <class S>
std::vector<PagedCache<S>> paged(PagePool<S>& pool, int sequences = 4) {
  std::vector<PagedCache<S>> caches;
  for (int s = 0; s < sequences; ++s) caches.emplace_back(pool);
  return caches;
}
qkv::PagePoolConfig pages_for_small_gqa(Index page_tokens, Index pages) {
  return {.kv_heads = 2, .head_dim = 10, .v_head_dim = 7, .page_tokens = page_tokens, .pages = pages};
}

template <class Cache>
auto state_of(const Cache& cache) {
  std::vector<Index> table;
  if constexpr (requires { cache.pages(); }) table.assign(cache.pages().begin(), cache.pages().end());
  return std::tuple(cache.position(), cache.rows(), cache.keys(), cache.values(), table);
}

/// A batch that must fail as a whole: the complaint, or "" where anything has changed.
template <class Error, class Cache>
std::string refused(const MultiHeadAttention<float>& layer, const Round& round, std::vector<Cache>& caches) {
  const auto offsets = offsets_of(round);
  const Matrix<float> x = normals<float>(offsets.back(), 23, 99);
  Matrix<float> out = Matrix<float>::Constant(x.rows(), 23, 7);
  std::vector<decltype(state_of(caches[0]))> before;
  for (const Cache& cache : caches) before.push_back(state_of(cache));
  const auto pointers = pointers_to(caches);
  const std::string text = message_of<Error>(
      [&] { layer.forward_into(out, x, std::span<const Index>(offsets), std::span<Cache* const>(pointers)); });
  bool same = (out.array() == 7).all();
  for (std::size_t s = 0; s < caches.size(); ++s) same = same && state_of(caches[s]) == before[s];
  return same ? text : "";
}

}  // namespace

TEMPLATE_TEST_CASE("in a batch each sequence has the bits it has alone", "[layer]", float, std::int8_t) {
  const auto layer = multi_head_layer<float>(small_gqa, true);
  auto together = contiguous<TestType>(), alone = contiguous<TestType>();
  CHECK(batch_equals_alone<float>(layer, together, alone));
}

TEST_CASE("batches in double, and on threads", "[layer]") {
  const auto layer = multi_head_layer<double>(small_gqa);
  auto together = contiguous<double>(), alone = contiguous<double>();
  CHECK(batch_equals_alone<double>(layer, together, alone, qkv::causal, qkv::plain, qkv::LayerOptions{}, threaded(3)));
}

TEST_CASE("sequences of a batch may share a pool", "[layer]") {
  const auto layer = multi_head_layer<float>(small_gqa, true);
  PagePool<float> pool(pages_for_small_gqa(6, 60));
  auto together = paged(pool);
  auto alone = contiguous<float>();
  CHECK(batch_equals_alone<float>(layer, together, alone));
}

TEST_CASE("rings in a batch take chunks of any length", "[layer]") {
  const auto layer = multi_head_layer<float>(small_gqa, true);
  const RingCache<float> empty({.kv_heads = 2, .head_dim = 10, .v_head_dim = 7, .window = 9, .pinned = 2, .slack = 4});
  std::vector<RingCache<float>> together(4, empty), alone(4, empty);
  CHECK(batch_equals_alone<float>(layer, together, alone));
}

TEST_CASE("a cache of the user's own whose rows stand before position 0 is refused, in a batch too", "[layer]") {
  struct Early : KvCache<float> {
    using KvCache<float>::KvCache;
    qkv::KeyRun<float> mutable run = {};
    bool early = false;

    qkv::KeyRows<float> key_rows() const {
      auto all = KvCache<float>::key_rows();
      run = all.runs[0], run.position -= early ? 2 : 0;
      all.runs = {&run, 1};
      return all;
    }
  };
  const auto layer = multi_head_layer<float>(small_gqa);
  std::vector<Early> caches(2, Early({.kv_heads = 2, .head_dim = 10, .v_head_dim = 7, .capacity = 9}));
  const Matrix<float> x = normals<float>(3, 23, 1);
  for (auto& cache : caches) layer.forward(x, cache);
  caches[1].early = true;
  CHECK(contains(message_of([&] { layer.forward(x, caches[1]); }), "given 6 rows at position -2"));
  CHECK(contains(message_of([&] {
                   run_batch(layer, x, {0, 1, 3}, pointers_to(caches));
                 }),
                 "given 5 rows at position -2"));
  for (const auto& cache : caches) CHECK(cache.rows() == 3);
}

TEST_CASE("sequences of a batch may have masks of their own", "[layer]") {
  const auto layer = multi_head_layer<float>(small_gqa, true);
  const std::vector<qkv::Window> windows = {qkv::causal, qkv::window(3, 0), qkv::window(0, 0), qkv::window(20, 0)};
  const std::vector<qkv::SoftCap> caps = {qkv::soft_cap(3), qkv::soft_cap(0.5), qkv::soft_cap(9), qkv::soft_cap(1)};
  auto together = contiguous(), alone = contiguous();
  CHECK(batch_equals_alone<float>(layer, together, alone, qkv::per_sequence(windows)));
  auto capped = contiguous(), capped_alone = contiguous();
  CHECK(batch_equals_alone<float>(layer, capped, capped_alone, qkv::per_sequence(windows), qkv::per_sequence(caps)));
  const RingCache<float> empty({.kv_heads = 2, .head_dim = 10, .v_head_dim = 7, .window = 9, .pinned = 2, .slack = 4});
  std::vector<RingCache<float>> rings(4, empty), alone_rings(4, empty);
  CHECK(batch_equals_alone<float>(layer, rings, alone_rings, qkv::per_sequence(windows)));
  const auto few = std::span(windows).first(3);
  const auto pointers = pointers_to(together);
  const std::vector<Index> offsets = {0, 1, 1, 1, 2};
  const Index before = together[0].position();
  CHECK(contains(
      message_of([&] { run_batch(layer, normals<float>(2, 23, 1), offsets, pointers, qkv::per_sequence(few)); }),
      "per_sequence needs one mask or score for each sequence; given 3 for 4 sequences"));
  CHECK(together[0].position() == before);
}

TEST_CASE("one full cache stops the whole batch before it begins", "[layer]") {
  const auto layer = multi_head_layer<float>(small_gqa);
  auto caches = contiguous<float>(12);
  for (std::size_t s = 0; s < 4; ++s) layer.forward(normals<float>(static_cast<Index>(9 - s), 23, s + 1), caches[s]);
  CHECK(contains(refused<std::length_error>(layer, {1, 4, 5, 7}, caches), "caches[3] takes at most 6 more rows"));
  CHECK(contains(refused<std::length_error>(layer, {4, 0, 0, 0}, caches), "caches[0] takes at most 3 more rows"));
  run_batch(layer, normals<float>(18, 23, 7), {0, 3, 7, 12, 18}, pointers_to(caches));
  CHECK(contains(refused<std::length_error>(layer, {0, 0, 0, 1}, caches), "takes at most 0 more rows"));
}

TEST_CASE("a pool that would run dry midway stops the whole batch before it begins", "[layer]") {
  const auto layer = multi_head_layer<float>(small_gqa);
  PagePool<float> pool(pages_for_small_gqa(4, 8)), second(pages_for_small_gqa(4, 2));
  auto caches = paged(pool, 3);
  for (auto& cache : caches) layer.forward(normals<float>(5, 23, 1), cache);
  REQUIRE(pool.free_pages() == 2);
  caches.emplace_back(second);  // has room of its own
  // Each would find room alone: 3 rows in its second page, 8 in free ones.
  CHECK(contains(refused<std::length_error>(layer, {8, 1, 8, 8}, caches),
                 "the pool has 2 free pages; the rows of all its sequences need 4"));
  CHECK(contains(refused<std::length_error>(layer, {4, 4, 4, 0}, caches), "need 3"));
  CHECK(pool.free_pages() == 2);
  CHECK(second.free_pages() == 2);
  run_batch(layer, normals<float>(19, 23, 2), {0, 7, 8, 11, 19}, pointers_to(caches));
  CHECK(pool.free_pages() == 1);
  CHECK(second.free_pages() == 0);
}

TEST_CASE("pages that forks share are counted as they will be copied", "[layer]") {
  const auto layer = multi_head_layer<float>(small_gqa);
  const Matrix<float> prompt = normals<float>(6, 23, 3);
  PagePool<float> pool(pages_for_small_gqa(4, 4));
  std::vector<PagedCache<float>> caches = paged(pool, 1);
  layer.forward(prompt, caches[0]);
  caches.push_back(caches[0].fork()), caches.push_back(caches[0].fork()), caches.push_back(caches[0].fork(5));
  REQUIRE(pool.free_pages() == 2);
  // The half-full page has four users: the first three to write copy it, the last one keeps it.
  CHECK(contains(refused<std::length_error>(layer, {1, 1, 1, 1}, caches), "need 3"));
  CHECK(contains(refused<std::length_error>(layer, {1, 3, 0, 0}, caches), "need 3"));
  CHECK(contains(refused<std::length_error>(layer, {0, 1, 1, 1}, caches),
                 "need 3"));  // who writes nothing, copies nothing
  CHECK(pool.free_pages() == 2);
  caches.pop_back();
  const Matrix<float> x = normals<float>(3, 23, 4), out = run_batch(layer, x, {0, 1, 2, 3}, pointers_to(caches));
  CHECK(pool.free_pages() == 0);
  for (Index s = 0; s < 3; ++s) {
    auto alone = layer.make_cache(7);
    layer.forward(prompt, alone);
    CHECK(same_bits(layer.forward(x.row(s), alone), out.row(s)));
  }
}

TEST_CASE("a batch says what is wrong with it", "[layer]") {
  const auto layer = multi_head_layer<float>(small_gqa);
  auto caches = contiguous<float>();
  const Matrix<float> x = normals<float>(8, 23, 5);
  const auto complaint = [&](const std::vector<Index>& offsets, const std::vector<KvCache<float>*>& pointers) {
    const std::string text = message_of([&] { run_batch(layer, x, offsets, pointers); });
    for (const auto& cache : caches) REQUIRE(cache.rows() == 0);
    return text;
  };
  KvCache<float>*a = &caches[0], *b = &caches[1], odd({.kv_heads = 1, .head_dim = 10, .capacity = 9});
  CHECK(contains(complaint({0, 8}, {a, b}), "given 2 for 2 caches"));
  CHECK(contains(complaint({1, 3, 8}, {a, b}), "begin with 0"));
  CHECK(contains(complaint({0, 3, 7}, {a, b}), "end with n 8; given 0 and 7"));
  CHECK(contains(complaint({0, 9, 8}, {a, b}), "entry 2 is 8 after 9"));
  constexpr Index least = std::numeric_limits<Index>::min();
  CHECK(contains(complaint({0, 3, least, 8}, {a, b, &caches[2]}), "entry 2 is -9223372036854775808 after 3"));
  CHECK(contains(complaint({0, 3, 8}, {a, nullptr}), "caches[1] is null"));
  CHECK(contains(complaint({0, 3, 8}, {a, a}), "caches[0] and caches[1] are the same cache"));
  CHECK(contains(complaint({0, 3, 8}, {a, &odd}), "the cache must have kv_heads 2"));
  CHECK(contains(complaint({0}, {}), "given 8 rows and no cache"));
  CHECK(run_batch(layer, Matrix<float>(0, 23), {0}, std::vector<KvCache<float>*>{}).rows() == 0);
  CHECK(run_batch(layer, Matrix<float>(0, 23), {}, std::vector<KvCache<float>*>{}).rows() == 0);
}

TEST_CASE("a batch takes its offsets and the addresses of its caches in vectors too", "[layer]") {
  const auto layer = multi_head_layer<float>(small_gqa);
  auto in_spans = contiguous<float>(), in_vectors = contiguous<float>();
  const Matrix<float> x = normals<float>(8, 23, 5);
  const std::vector<Index> offsets = {0, 3, 4, 4, 8};
  Matrix<float> out(8, 23);
  layer.forward_into(out, x, offsets, pointers_to(in_vectors), qkv::window(1, 0), qkv::plain,
                     {.kernel = qkv::Kernel::tiled});
  const LayerOptions options{.kernel = qkv::Kernel::tiled};
  CHECK(same_bits(out, run_batch(layer, x, offsets, pointers_to(in_spans), qkv::window(1, 0), qkv::plain, options)));
}

TEST_CASE("a sequence without new rows takes no part in the mask", "[layer]") {
  const auto layer = multi_head_layer<float>(small_gqa);
  auto caches = contiguous<float>();
  const Matrix<bool> sees = Matrix<bool>::Constant(3, 3, true);
  const Matrix<float> x = normals<float>(6, 23, 6);
  const Matrix<float> out = run_batch(layer, x, {0, 3, 3, 6, 6}, pointers_to(caches), qkv::boolean(sees));
  CHECK(same_bits(out.topRows(3), layer.forward(x.topRows(3), qkv::full)));
  CHECK(caches[1].rows() == 0);
  const auto pointers = pointers_to(caches);
  CHECK(contains(message_of([&] { run_batch(layer, x, {0, 3, 3, 6, 6}, pointers, qkv::boolean(sees)); }), "n_keys 6"));
  CHECK(caches[0].rows() == 3);
}

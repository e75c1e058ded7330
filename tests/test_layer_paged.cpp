#include <qkv/multi_head_attention.hpp>
#include <qkv/paged_cache.hpp>

#include "support/batches.hpp"
#include "support/catch.hpp"
#include "support/executors.hpp"

using namespace support;
using qkv::Kernel, qkv::LayerOptions, qkv::PagedCache, qkv::PagePool;

namespace {

qkv::PagePoolConfig pages_for_small_gqa(Index page_tokens, Index pages) {
  return {.kv_heads = 2, .head_dim = 10, .v_head_dim = 7, .page_tokens = page_tokens, .pages = pages};
}

}  // namespace

TEMPLATE_LIST_TEST_CASE("pages give the bits of one block", "[layer]", qkv::StorageTypes) {
  const auto layer = multi_head_layer<float>(small_gqa, true);
  const Matrix<float> x = normals<float>(151, 23, 1);
  for (const Index page_tokens : {1, 7, 64}) {
    PagePool<TestType> pool(pages_for_small_gqa(page_tokens, 200));
    PagedCache<TestType> other(pool), cache(pool);  // two take pages in turn: those of one are not in a row
    auto whole = layer.template make_cache<TestType>(151);
    const Matrix<float> expected = feed(layer, whole, x, {40, 1, 1, 1, 9});
    Matrix<float> out(151, 23);
    const std::vector<Index> sizes = {40, 1, 1, 1};
    for (Index first = 0, piece = 0; first < 151; ++piece) {
      const Index n = piece < 4 ? sizes[static_cast<std::size_t>(piece)] : std::min<Index>(9, 151 - first);
      layer.forward_into(out.middleRows(first, n), x.middleRows(first, n), cache);
      if (piece < 3) layer.forward(x.topRows(8), other);
      first += n;
    }
    CHECK(same_bits(out, expected));
    CHECK(same_bits(cache.keys(), whole.keys()));
  }
}

TEST_CASE("forks share their past and do not see each other's future", "[layer]") {
  const auto layer = multi_head_layer<float>(small_gqa);
  const Matrix<float> prompt = normals<float>(19, 23, 2), a = normals<float>(12, 23, 3), b = normals<float>(12, 23, 4),
                      c = normals<float>(12, 23, 5);
  const auto alone = [&](Index shared, const Matrix<float>& own) {
    auto cache = layer.make_cache(40);
    layer.forward(prompt.topRows(shared), cache);
    return feed(layer, cache, own, {1, 3});
  };
  PagePool<float> pool(pages_for_small_gqa(5, 20));
  PagedCache<float> trunk(pool);
  layer.forward(prompt, trunk);
  REQUIRE(pool.free_pages() == 16);
  auto left = trunk.fork(), right = trunk.fork(7);
  CHECK(pool.free_pages() == 16);  // nothing is copied yet
  const std::vector<Index> steps = {1, 3, 3, 3, 2};
  Matrix<float> of_trunk(12, 23), of_left(12, 23), of_right(12, 23);
  for (Index first = 0, i = 0; first < 12; first += steps[static_cast<std::size_t>(i++)]) {
    const Index n = steps[static_cast<std::size_t>(i)];
    layer.forward_into(of_trunk.middleRows(first, n), a.middleRows(first, n), trunk);
    layer.forward_into(of_left.middleRows(first, n), b.middleRows(first, n), left);
    layer.forward_into(of_right.middleRows(first, n), c.middleRows(first, n), right);
  }
  CHECK(same_bits(of_trunk, alone(19, a)));
  CHECK(same_bits(of_left, alone(19, b)));
  CHECK(same_bits(of_right, alone(7, c)));
  CHECK(trunk.pages()[0] == left.pages()[0]);  // still shared
  CHECK(trunk.pages()[3] != left.pages()[3]);  // copied on write
  CHECK(trunk.pages()[1] != right.pages()[1]);
}

TEST_CASE("a pool that has run dry leaves the sequence as it was", "[layer]") {
  const auto layer = multi_head_layer<float>(small_gqa);
  const Matrix<float> x = normals<float>(20, 23, 6);
  PagePool<float> pool(pages_for_small_gqa(4, 5));
  PagedCache<float> cache(pool), other(pool);
  layer.forward(x.topRows(9), cache);
  layer.forward(x.topRows(5), other);
  Matrix<float> out = Matrix<float>::Constant(4, 23, 7);
  CHECK(contains(message_of<std::length_error>([&] { layer.forward_into(out, x.topRows(4), cache); }), "at most 3"));
  CHECK((out.array() == 7).all());
  CHECK(cache.position() == 9);
  auto whole = layer.make_cache(20);
  layer.forward(x.topRows(9), whole);
  CHECK(same_bits(layer.forward(x.middleRows(9, 3), cache), layer.forward(x.middleRows(9, 3), whole)));
  other.clear();
  CHECK(same_bits(layer.forward(x.bottomRows(8), cache), layer.forward(x.bottomRows(8), whole)));
}

TEST_CASE("a layer's call may evict other sequences, alone and in a batch", "[layer]") {
  const auto layer = multi_head_layer<float>(small_gqa);
  const Matrix<float> x = normals<float>(20, 23, 6);
  PagePool<float> pool(pages_for_small_gqa(4, 5));
  PagedCache<float> cache(pool), second(pool), idle(pool);
  pool.on_exhausted([&](Index) { idle.clear(); });
  auto whole = layer.make_cache(20);
  layer.forward(x.topRows(9), cache), layer.forward(x.topRows(9), whole);
  layer.forward(x.topRows(6), idle);
  CHECK(same_bits(layer.forward(x.middleRows(9, 4), cache), layer.forward(x.middleRows(9, 4), whole)));
  CHECK(idle.rows() == 0);

  layer.forward(x.topRows(2), idle);
  Matrix<float> out(4, 23), batch(4, 23);
  batch << x.middleRows(13, 3), x.topRows(1);
  const Index offsets[] = {0, 3, 4};
  PagedCache<float>* const caches[] = {&cache, &second};
  CHECK(contains(message_of([&] {
                   layer.forward_into(out, batch.leftCols(22), std::span<const Index>(offsets),
                                      std::span<PagedCache<float>* const>(caches));
                 }),
                 "x must be [n, model_dim 23]"));
  CHECK(idle.rows() == 2);  // for a call that cannot be, nobody is asked
  layer.forward_into(out, batch, std::span<const Index>(offsets), std::span<PagedCache<float>* const>(caches));
  CHECK(idle.rows() == 0);
  CHECK(same_bits(out.topRows(3), layer.forward(x.middleRows(13, 3), whole)));
  CHECK(second.rows() == 1);
}

TEST_CASE("pages go back and on again", "[layer]") {
  const auto layer = multi_head_layer<float>(small_gqa);
  const Matrix<float> x = normals<float>(23, 23, 7), astray = normals<float>(6, 23, 8);
  PagePool<float> pool(pages_for_small_gqa(4, 20));
  PagedCache<float> cache(pool);
  auto whole = layer.make_cache(23);
  layer.forward(x.topRows(10), cache), layer.forward(x.topRows(10), whole);
  const auto keeper = cache.fork();
  layer.forward(astray, cache);
  cache.truncate(10);
  layer.forward(astray, cache);
  cache.truncate(6);
  const LayerOptions options{.kernel = Kernel::tiled};
  layer.forward(x.middleRows(6, 4), cache);
  CHECK(same_bits(layer.forward(x.bottomRows(13), cache, qkv::causal, qkv::plain, options),
                  layer.forward(x.bottomRows(13), whole, qkv::causal, qkv::plain, options)));
  CHECK(same_bits(keeper.keys(), whole.keys().topRows(10)));
}

namespace {

/// Two families of forks and strangers: {0, 1, 2, 3} begin with the 19 rows of one prompt (1 only with 13, 3 with 7), 4 is
/// alone, 5 and 6 share another's.
template <class S>
std::vector<PagedCache<S>> families(const MultiHeadAttention<float>& layer, PagePool<S>& pool) {
  std::vector<PagedCache<S>> caches;
  caches.emplace_back(pool);
  layer.forward(normals<float>(19, 23, 31), caches[0]);
  for (const Index position : {13, 19, 7}) caches.push_back(caches[0].fork(position));
  caches.emplace_back(pool);
  layer.forward(normals<float>(3, 23, 32), caches[4]);
  caches.emplace_back(pool);
  layer.forward(normals<float>(13, 23, 33), caches[5]);
  caches.push_back(caches[5].fork());
  return caches;
}

/// Some rounds of all families in one call: prefixes shared, against each read by itself.
template <class S, class M, class F, class E>
double cascade_error(const M& mask, const F& score, Kernel kernel, const E& executor) {
  const auto layer = multi_head_layer<float>(small_gqa, true);
  PagePool<S> pool(pages_for_small_gqa(3, 200));
  auto shared = families(layer, pool), single = families(layer, pool);
  double worst = 0;
  for (const Round& round : {Round{1, 1, 1, 1, 1, 1, 1}, {1, 0, 2, 1, 0, 5, 1}, {9, 1, 1, 3, 70, 1, 1}}) {
    const auto offsets = offsets_of(round);
    const Matrix<float> x = normals<float>(offsets.back(), 23, 34);
    LayerOptions options{.kernel = kernel};
    const Matrix<float> expected = run_batch(layer, x, offsets, pointers_to(single), mask, score, options);
    options.share_prefixes = true;
    const Matrix<float> got = run_batch(layer, x, offsets, pointers_to(shared), mask, score, options, executor);
    const double error = max_error(got, expected);
    if (!(error <= worst)) worst = error;
  }
  return worst;
}

}  // namespace

TEST_CASE("neighbours share the pages that all of them begin with", "[layer]") {
  const auto layer = multi_head_layer<float>(small_gqa);
  PagePool<float> pool(pages_for_small_gqa(3, 200));
  auto caches = families(layer, pool);
  const auto group_of = [&](const Round& round, Index first) {
    const auto offsets = offsets_of(round);
    const auto pointers = pointers_to(caches);
    run_batch(layer, normals<float>(offsets.back(), 23, 35), offsets, pointers);
    const qkv::detail::Batch<float, PagedCache<float>> batch{{nullptr, 0, 0, Eigen::OuterStride<>(0)},
                                                             {nullptr, 0, 0, Eigen::OuterStride<>(0)},
                                                             offsets,
                                                             pointers,
                                                             {6, 2},
                                                             {}};
    const auto group = qkv::detail::shared_prefix(batch, first);
    return std::tuple(group.first, group.last, group.rows);
  };
  const Round all = {1, 1, 1, 1, 1, 1, 1};
  CHECK(group_of(all, 0) ==
        std::tuple(0, 3, 12));  // in whole pages of 3, the second has 12 rows, the third 18, the fourth 6
  CHECK(group_of(all, 2) == std::tuple(2, 4, 6));
  CHECK(group_of(all, 3) == std::tuple(3, 4, 0));
  CHECK(group_of(all, 5) == std::tuple(5, 7, 12));
  CHECK(group_of({0, 1, 0, 1, 1, 1, 1}, 0) == std::tuple(0, 1, 0));  // who asks nothing, shares nothing
  CHECK(group_of({0, 1, 0, 1, 1, 1, 1}, 1) == std::tuple(1, 4, 6));
}

TEMPLATE_TEST_CASE("a shared prefix gives the same numbers", "[layer]", float, std::int8_t) {
  // Narrow products round where exact ones do not; with exact ones only the bracketing differs.
  const double bound = std::is_same_v<TestType, float> ? 2e-6 : 2e-2;
  for (const Kernel kernel : {Kernel::automatic, Kernel::tiled, Kernel::decode, Kernel::reference}) {
    CHECK(cascade_error<TestType>(qkv::causal, qkv::plain, kernel, qkv::serial) <= bound);
    CHECK(cascade_error<TestType>(qkv::causal, qkv::plain, kernel, threaded(3)) <= bound);
  }
  // Masks and scores are told which sequence's query, head and position it is.
  const auto odd = [](const qkv::At& at) {
    return (at.query + 2 * at.head + at.key + at.query_position + 3 * at.key_position) % 5 != 0 || at.key == 4;
  };
  const auto slanted = [](auto s, const qkv::At& at) {
    return s - static_cast<decltype(s)>(at.query_position - at.key_position) * 0.05F * static_cast<float>(at.head + 1) +
           static_cast<decltype(s)>(at.query) * 0.1F * static_cast<float>(at.key % 3);
  };
  std::vector<qkv::Window> windows;  // of each sequence
  for (const Index left : {11, 3, 14, 6, 5, 20, 8}) windows.push_back(qkv::window(left, 0));
  CHECK(cascade_error<TestType>(qkv::per_sequence(windows), slanted, Kernel::automatic, qkv::serial) <= bound);
  CHECK(cascade_error<TestType>(odd, qkv::soft_cap(2), Kernel::automatic, shuffled(5)) <= bound);
}

TEST_CASE("shared prefixes have the same bits on any executor", "[layer]") {
  const auto layer = multi_head_layer<float>(small_gqa, true);
  PagePool<float> pool(pages_for_small_gqa(3, 200));
  auto first = families(layer, pool), second = families(layer, pool);
  const std::vector<Index> offsets = {0, 1, 3, 4, 5, 9, 10, 11};
  const Matrix<float> x = normals<float>(11, 23, 36);
  const LayerOptions options{.share_prefixes = true};
  CHECK(same_bits(run_batch(layer, x, offsets, pointers_to(first), qkv::causal, qkv::plain, options),
                  run_batch(layer, x, offsets, pointers_to(second), qkv::causal, qkv::plain, options, threaded(4))));
}

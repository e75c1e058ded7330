#include <qkv/multi_head_attention.hpp>
#include <qkv/paged_cache.hpp>

#include "support/catch.hpp"
#include "support/layers.hpp"

using namespace support;
using qkv::Kernel, qkv::LayerOptions, qkv::PagedCache, qkv::PagePool;

namespace {

qkv::PagePoolConfig pages_for_small_gqa(Index page_tokens, Index pages) {
  return {.kv_heads = 2, .head_dim = 10, .v_head_dim = 7, .page_tokens = page_tokens, .pages = pages};
}

}  // namespace

TEMPLATE_TEST_CASE("pages give the bits of one block", "[layer]", float, qkv::half, qkv::bfloat16, std::int8_t) {
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

#include <qkv/multi_head_attention.hpp>
#include <qkv/paged_cache.hpp>
#include <qkv/ring_cache.hpp>
#include <qkv/saved_cache.hpp>

#include <sstream>
#include <stdexcept>
#include <thread>

#include "support/catch.hpp"
#include "support/executors.hpp"
#include "support/layers.hpp"

using namespace support;

TEST_CASE("what a call asks of its operands, it says before it writes", "[layer]") {
  const auto layer = multi_head_layer<float>(small_gqa);
  const Matrix<float> x = normals<float>(4, 23, 1);
  auto cache = layer.make_cache(6);
  layer.forward(x.topRows(3), cache);
  const Matrix<float> held = cache.keys();
  Matrix<float> out = Matrix<float>::Constant(4, 23, 7);
  const auto complains = [&](const std::string& text, const std::string& part) {
    CAPTURE(text);
    return contains(text, part) && (out.array() == 7).all() && cache.rows() == 3 && same_bits(cache.keys(), held);
  };
  CHECK(complains(message_of([&] { layer.forward_into(out, x.leftCols(22), cache); }), "model_dim 23]; given [4, 22]"));
  CHECK(complains(message_of([&] { layer.forward_into(out.topRows(3), x, cache); }),
                  "out must be [4, 23]; given [3, 23]"));
  CHECK(complains(message_of<std::length_error>([&] { layer.forward_into(out, x, cache); }),
                  "at most 3 more rows (position 3); given 4"));
  for (const auto& [kv_heads, head_dim, v_head_dim] : {std::array{3, 10, 7}, {2, 9, 7}, {2, 10, 8}}) {
    qkv::KvCache<float> odd({.kv_heads = kv_heads, .head_dim = head_dim, .v_head_dim = v_head_dim, .capacity = 6});
    CHECK(complains(message_of([&] { layer.forward_into(out, x, odd); }),
                    "the cache must have kv_heads 2, head_dim 10, v_head_dim 7; it has " + std::to_string(kv_heads) +
                        ", " + std::to_string(head_dim) + ", " + std::to_string(v_head_dim)));
    CHECK(odd.rows() == 0);
  }
}

namespace {

template <class Cache>
std::string saved(const Cache& cache) {
  std::ostringstream out;
  qkv::save_cache(out, cache);
  return out.str();
}

float fails_at_six(float s, const At& at) {
  if (at.key_position == 6) throw std::runtime_error("a score that fails");
  return s;
}

}  // namespace

TEST_CASE("a call that fails half way leaves its caches as they were", "[layer]") {
  const auto layer = multi_head_layer<float>(small_gqa);
  const Matrix<float> x = normals<float>(9, 23, 1), prompt = x.topRows(4), more = x.bottomRows(5);
  const auto check = [&](auto cache, auto other) {
    std::array<decltype(&cache), 2> both = {&cache, &other};
    const Index offsets[] = {0, 2, 5};
    layer.forward(prompt, cache), layer.forward(x, other);
    const std::string before = saved(cache), other_before = saved(other);
    CHECK(message_of<std::runtime_error>([&] { layer.forward(more, cache, qkv::causal, fails_at_six); }) ==
          "a score that fails");
    CHECK(saved(cache) == before);
    Matrix<float> out(5, 23);
    CHECK(message_of<std::runtime_error>([&] {
            layer.forward_into(out, more, std::span<const Index>(offsets), std::span<decltype(&cache) const>(both),
                               qkv::causal, fails_at_six);
          }) == "a score that fails");
    CHECK(saved(cache) == before);
    CHECK(saved(other) == other_before);
    auto twin = layer.make_cache(9);
    layer.forward(prompt, twin);
    CHECK(same_bits(layer.forward(more, cache), layer.forward(more, twin)));
  };
  check(layer.make_cache(9), layer.make_cache(12));
  const qkv::RingCacheConfig ring{.kv_heads = 2, .head_dim = 10, .v_head_dim = 7, .window = 12};
  check(qkv::RingCache<float>(ring), qkv::RingCache<float>(ring));
  qkv::PagePool<float> pool({.kv_heads = 2, .head_dim = 10, .v_head_dim = 7, .page_tokens = 2, .pages = 14});
  check(qkv::PagedCache<float>(pool), qkv::PagedCache<float>(pool));
  CHECK(pool.free_pages() == 14);

  // A ring gets back what the call had overwritten.
  qkv::RingCache<float> narrow({.kv_heads = 2, .head_dim = 10, .v_head_dim = 7, .window = 2});
  layer.forward(prompt, narrow);
  const std::string before = saved(narrow);
  CHECK(message_of<std::runtime_error>([&] { layer.forward(more, narrow, qkv::causal, fails_at_six); }) ==
        "a score that fails");
  CHECK(saved(narrow) == before);
}

TEST_CASE("x and out may be column blocks of one buffer, but share no element", "[layer]") {
  const auto layer = multi_head_layer<float>(small_gqa);
  const Matrix<float> x = normals<float>(5, 23, 2);
  auto cache = layer.make_cache(20);
  const Matrix<float> expected = layer.forward(x, cache);

  Matrix<float> buffer = Matrix<float>::Constant(7, 60, 7);
  buffer.block(1, 3, 5, 23) = x;
  cache.clear();
  layer.forward_into(buffer.block(1, 30, 5, 23), buffer.block(1, 3, 5, 23), cache);
  CHECK(same_bits(buffer.block(1, 30, 5, 23), expected));
  CHECK(same_bits(buffer.block(1, 3, 5, 23), x));
  buffer.block(1, 30, 5, 23).setConstant(7), buffer.block(1, 3, 5, 23).setConstant(7);
  CHECK((buffer.array() == 7).all());

  buffer.setConstant(1);
  for (const Index column : {3, 2, 25}) {
    CHECK(contains(
        message_of([&] { layer.forward_into(buffer.block(1, column, 5, 23), buffer.block(1, 3, 5, 23), cache); }),
        "must not share elements with the input x"));
    CHECK(cache.rows() == 5);
    CHECK((buffer.array() == 1).all());
  }
}

TEST_CASE("a layer refuses an output that its mask or score still reads", "[layer]") {
  const auto layer = multi_head_layer<float>(small_gqa);
  const Matrix<float> x = normals<float>(5, 23, 2);
  auto cache = layer.make_cache(20);
  Matrix<float> out = Matrix<float>::Constant(5, 23, 7);
  const auto added = out.leftCols(5);  // [n_queries, n_keys]
  const auto text = message_of([&] { layer.forward_into(out, x, cache, qkv::causal, qkv::bias(added)); });
  CHECK(contains(text, "must not share elements with the operand of a bias"));
  CHECK(cache.rows() == 0);
  CHECK((out.array() == 7).all());
}

TEST_CASE("a const layer serves two threads at once", "[layer]") {
  auto prepared = multi_head_layer<float>(small_gqa, true);
  prepared.reserve_positions(40);
  const auto& layer = prepared;
  const Matrix<float> a = normals<float>(90, 23, 3), b = normals<float>(90, 23, 4);
  const auto run = [&](const Matrix<float>& x) {
    auto cache = layer.make_cache(90);
    return feed(layer, cache, x, {31, 1, 1, 5, 8});
  };
  const Matrix<float> alone_a = run(a), alone_b = run(b);
  for (int round = 0; round < 5; ++round) {
    Matrix<float> of_a, of_b;
    std::thread first([&] { of_a = run(a); }), second([&] { of_b = run(b); });
    first.join(), second.join();
    CHECK(same_bits(of_a, alone_a));
    CHECK(same_bits(of_b, alone_b));
  }
}

TEST_CASE("an executor changes no bit of a layer", "[layer]") {
  const auto layer = multi_head_layer<float>(small_gqa, true);
  const Matrix<float> x = normals<float>(140, 23, 5);
  const auto run = [&](const auto& executor) {
    auto cache = layer.make_cache(140);
    return feed(layer, cache, x, {130, 1, 2}, qkv::causal, qkv::plain, qkv::LayerOptions{}, executor);
  };
  const Matrix<float> expected = run(qkv::serial);
  CHECK(same_bits(run(threaded(3)), expected));
  CHECK(same_bits(run(shuffled(1)), expected));
  CHECK(same_bits(layer.forward(x, qkv::causal, qkv::plain, {}, threaded(2)), layer.forward(x)));
}

TEST_CASE("a layer may keep its weights narrow", "[layer]") {
  const auto exact = multi_head_layer<float>(small_gqa, true);
  const auto& w = exact.weights();
  const auto narrow = w.stored_as<qkv::bfloat16>();
  const auto rounded = [](const qkv::Projection<float>& p) {
    return qkv::Projection<float>(p.weight().cast<qkv::bfloat16>().cast<float>(), p.bias());
  };
  CHECK(narrow.query.bytes() * 2 == w.query.bytes());
  const MultiHeadAttention<float> layer(small_gqa, narrow),
      wide(small_gqa,
           {rounded(w.query), rounded(w.key), rounded(w.value), rounded(w.output), w.query_norm, w.key_norm, w.sinks});
  const Matrix<float> x = normals<float>(60, 23, 6);
  CHECK(same_bits(layer.forward(x), wide.forward(x)));
  auto cache = layer.make_cache(60), other = layer.make_cache(60);
  const qkv::LayerOptions options{.kernel = qkv::Kernel::tiled};
  CHECK(same_bits(feed(layer, cache, x, {31, 1, 1, 5}, qkv::causal, qkv::plain, options),
                  layer.forward(x, other, qkv::causal, qkv::plain, options, threaded(3))));
}

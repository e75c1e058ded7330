#include <qkv/multi_head_attention.hpp>
#include <qkv/ring_cache.hpp>

#include "support/batches.hpp"
#include "support/catch.hpp"
#include "support/executors.hpp"

using namespace support;
using qkv::Kernel, qkv::LayerOptions, qkv::RingCache, qkv::RingCacheConfig;

namespace {

/// For small_gqa.
template <class S = float>
RingCache<S> ring(Index window, Index pinned, Index slack) {
  return RingCache<S>(
      {.kv_heads = 2, .head_dim = 10, .v_head_dim = 7, .window = window, .pinned = pinned, .slack = slack});
}

/// The outputs with a cache that keeps everything, under the mask that a ring stands for.
template <class S, class T>
Matrix<T> windowed(const MultiHeadAttention<T>& layer, const Matrix<T>& x, Index window, Index pinned,
                   const LayerOptions& options = {}) {
  auto cache = layer.template make_cache<S>(x.rows());
  return layer.forward(x, cache, (qkv::prefix(pinned) | qkv::window(window, 0)) & qkv::causal, qkv::plain, options);
}

struct Sizes {
  Index window, pinned, slack;
};
const Sizes sizes[] = {{7, 0, 1}, {7, 3, 5}, {0, 2, 3}, {0, 0, 1}, {13, 1, 40}, {200, 5, 2}};

}  // namespace

TEST_CASE("a ring is a window over a cache that keeps everything", "[layer]") {
  const auto layer = multi_head_layer<double>(small_gqa, true);
  const Matrix<double> x = normals<double>(97, 23, 1);
  for (const auto& [window, pinned, slack] : sizes) {
    CAPTURE(window, pinned, slack);
    const Matrix<double> expected = windowed<double>(layer, x, window, pinned);
    REQUIRE(max_error(expected, multi_head_by_formula(layer, x, [&, w = window, p = pinned](const At& at) {
                        return at.key_position <= at.query_position &&
                               (at.key_position < p || at.query_position - at.key_position <= w);
                      })) <= layer_tolerance<double>);
    for (const std::vector<Index>& pieces :
         {std::vector<Index>{1}, {97}, {slack, 1}, {29, 1, 1, 2, 17}, {3, 60, 1}}) {  // longer than the slack too
      auto cache = ring<double>(window, pinned, slack);
      CHECK(max_error(feed(layer, cache, x, pieces), expected) <= layer_tolerance<double>);
      CHECK(cache.position() == 97);
      CHECK(cache.rows() == std::min<Index>(97, cache.capacity()));
    }
  }
}

TEST_CASE("a pinned token's position in the cache is the one it would have if nothing had been forgotten", "[layer]") {
  const auto layer = multi_head_layer<double>(small_gqa, true);
  const Matrix<double> x = normals<double>(83, 23, 1);
  for (const auto& [window, pinned, slack] : {Sizes{7, 3, 5}, {0, 2, 3}, {13, 1, 40}, {6, 0, 2}, {200, 5, 2}}) {
    CAPTURE(window, pinned, slack);
    // StreamingLLM as it is told: the tokens that are there, one after another, and the last of them asks.
    Wide expected(83, 23);
    for (Index t = 0; t < 83; ++t) {
      const Index n_pinned = std::min(pinned, t + 1), from = std::max(n_pinned, t - window);
      Matrix<double> there(n_pinned + t + 1 - from, 23);
      there << x.topRows(n_pinned), x.middleRows(from, t + 1 - from);
      expected.row(t) = multi_head_by_formula(layer, there).bottomRows(1);
    }
    for (const Kernel kernel : {Kernel::reference, Kernel::tiled, Kernel::decode})
      for (const std::vector<Index>& pieces : {std::vector<Index>{1}, {83}, {29, 1, 1, 2, 17}}) {
        RingCache<double> cache({.kv_heads = 2,
                                 .head_dim = 10,
                                 .v_head_dim = 7,
                                 .window = window,
                                 .pinned = pinned,
                                 .slack = slack,
                                 .positions_in_cache = true});
        const Matrix<double> out =
            feed(layer, cache, x, pieces, qkv::causal, qkv::plain, LayerOptions{.kernel = kernel});
        CHECK(max_error(out, expected) <= layer_tolerance<double>);
        if (pinned > 0 && window < 50)  // and it does make a difference
          CHECK(max_error(windowed<double>(layer, x, window, pinned), expected) > 1e-3);
      }
  }
}

TEMPLATE_TEST_CASE("positions in the cache: quantised, rolled back, in batches", "[layer]", float, std::int8_t) {
  const auto layer = multi_head_layer<float>(small_gqa, true);
  const Matrix<float> x = normals<float>(60, 23, 2);
  const auto make = [] {
    return RingCache<TestType>({.kv_heads = 2,
                                .head_dim = 10,
                                .v_head_dim = 7,
                                .window = 9,
                                .pinned = 3,
                                .slack = 4,
                                .positions_in_cache = true});
  };
  const LayerOptions options{.kernel = Kernel::decode};
  auto one = make(), chunks = make(), copy = make();
  const Matrix<float> expected = feed(layer, one, x, {1}, qkv::causal, qkv::plain, options);
  CHECK(max_error(feed(layer, chunks, x, {23, 4, 2, 1}, qkv::causal, qkv::plain, options), expected) <=
        layer_tolerance<float>);
  layer.forward(x.topRows(50), copy, qkv::causal, qkv::plain, options);
  layer.forward(x.topRows(3), copy, qkv::causal, qkv::plain, options);
  copy.truncate(50);
  auto moved = copy;  // the option is copied too
  Matrix<float> out(20, 23), batch(20, 23);
  batch << x.bottomRows(10), x.bottomRows(10);
  const Index offsets[] = {0, 10, 20};
  RingCache<TestType>* const caches[] = {&copy, &moved};
  layer.forward_into(out, batch, std::span<const Index>(offsets), std::span<RingCache<TestType>* const>(caches),
                     qkv::causal, qkv::plain, options);
  CHECK(max_error(out.topRows(10), expected.bottomRows(10)) <= layer_tolerance<float>);
  CHECK(max_error(out.bottomRows(10), expected.bottomRows(10)) <= layer_tolerance<float>);
}

TEST_CASE("a ring has the bits of the window, however its rows arrive", "[layer]") {
  const auto layer = multi_head_layer<float>(small_gqa, true);
  const Matrix<float> x = normals<float>(300, 23, 2);  // wraps more than twice, across the kernels' chunks
  for (const Kernel kernel : {Kernel::reference, Kernel::tiled, Kernel::decode}) {
    const LayerOptions options{.kernel = kernel};
    const Matrix<float> expected = windowed<float>(layer, x, 90, 4, options);
    for (const std::vector<Index>& pieces : {std::vector<Index>{300}, {1}, {120, 2, 9}}) {
      auto cache = ring(90, 4, 31);
      CHECK(same_bits(feed(layer, cache, x, pieces, qkv::causal, qkv::plain, options), expected));
    }
  }
}

TEMPLATE_TEST_CASE("rings keep their rows in any storage", "[layer]", qkv::half, std::int8_t) {
  const auto layer = multi_head_layer<float>(small_gqa);
  const Matrix<float> x = normals<float>(70, 23, 3);
  const LayerOptions options{.kernel = Kernel::tiled};
  auto cache = ring<TestType>(11, 2, 6);
  CHECK(same_bits(feed(layer, cache, x, {20, 1, 7}, qkv::causal, qkv::plain, options),
                  windowed<TestType>(layer, x, 11, 2, options)));
}

TEST_CASE("a ring can go back by its slack, and on again", "[layer]") {
  const auto layer = multi_head_layer<float>(small_gqa);
  const Matrix<float> x = normals<float>(83, 23, 4), astray = normals<float>(5, 23, 5);
  auto straight = ring(11, 2, 5), winding = ring(11, 2, 5);
  const auto expected = feed(layer, straight, x, {5});
  for (Index at = 0; at < 83; at += 5) {
    const Index n = std::min<Index>(5, 83 - at);
    for (const Index wrong : {1, 3, 5}) {
      layer.forward(astray.topRows(wrong), winding);
      winding.truncate(at);
    }
    CHECK(same_bits(layer.forward(x.middleRows(at, n), winding), expected.middleRows(at, n)));
  }
  CHECK_FALSE(winding.can_truncate(60));
  CHECK(contains(message_of<std::out_of_range>([&] { winding.truncate(60); }), "60"));
  CHECK(winding.position() == 83);
  winding.clear();
  CHECK(same_bits(feed(layer, winding, x, {5}), expected));
}

TEST_CASE("the caller's mask narrows the window", "[layer]") {
  const auto layer = multi_head_layer<double>(small_gqa);
  const Matrix<double> x = normals<double>(40, 23, 6);
  auto cache = ring<double>(9, 1, 4);
  std::vector<Index> ids(40);
  for (std::size_t i = 0; i < 40; ++i) ids[i] = i < 17 ? 0 : 1;
  const auto out = feed(layer, cache, x, {13, 2}, qkv::causal & qkv::documents(ids));
  CHECK(max_error(out, multi_head_by_formula(layer, x, [](const At& at) {
                    return causally(at) && (at.key_position < 17) == (at.query_position < 17) &&
                           (at.key_position < 1 || at.query_position - at.key_position <= 9);
                  })) <= layer_tolerance<double>);
}

TEST_CASE("in a batch a ring that counts positions in the cache has the bits it has alone, on any executor",
          "[layer]") {
  const auto layer = multi_head_layer<float>(small_gqa, true);
  const auto empty = layer.make_ring_cache({.window = 9, .pinned = 2, .slack = 20, .positions_in_cache = true});
  std::vector<RingCache<float>> together(4, empty), alone(4, empty);
  CHECK(batch_equals_alone<float>(layer, together, alone));
  // So many that none is much of the work: their heads are shared out among threads.
  constexpr Index n = 40;
  std::vector<RingCache<float>> many(n, empty);
  std::vector<Index> offsets = {0};
  for (auto& cache : many) {
    layer.forward(normals<float>(20 + offsets.back() % 7, 23, 5), cache);
    offsets.push_back(offsets.back() + 1);
  }
  auto by_themselves = many;
  const Matrix<float> x = normals<float>(n, 23, 6),
                      out = layer.forward(x, offsets, pointers_to(many), {}, {}, {}, threaded(3));
  for (Index s = 0; s < n; ++s)
    CHECK(same_bits(out.row(s), layer.forward(x.row(s), by_themselves[static_cast<std::size_t>(s)])));
}

TEST_CASE("a mask that does not fit one of a chunk's pieces is refused before the first", "[layer]") {
  const auto layer = multi_head_layer<float>(small_gqa);
  const Matrix<float> x = normals<float>(12, 23, 7);
  auto cache = ring(5, 0, 3);
  layer.forward(x, cache);
  const Matrix<float> held = cache.keys();
  REQUIRE(cache.rows() == 8);
  Matrix<float> out = Matrix<float>::Constant(12, 23, 7);
  const auto complaint = [&](const auto& mask, Index n) {
    return message_of([&] { layer.forward_into(out.topRows(n), x.topRows(n), cache, mask); });
  };
  const std::vector<Index> ids(16, 0);  // positions 12, 13, 14, 15: the chunk goes on
  CHECK(contains(complaint(qkv::documents(ids), 9), "16 ids"));
  using Bools = Matrix<bool>;
  const Bools piece = Bools::Constant(3, 8, true), whole = Bools::Constant(9, 8, true);
  CHECK(contains(complaint(qkv::boolean(piece), 9 - 1), "n_queries 2"));  // fits the first pieces only
  CHECK(contains(complaint(qkv::boolean(whole), 9), "n_queries 3"));
  CHECK(cache.position() == 12);
  CHECK(same_bits(cache.keys(), held));
  CHECK((out.array() == 7).all());
  CHECK(complaint(qkv::boolean(piece), 3).empty());
}

#include <qkv/multi_head_attention.hpp>

#include "support/catch.hpp"
#include "support/layers.hpp"

using namespace support;
using qkv::Kernel, qkv::LayerOptions;

namespace {

template <class Computed, class Stored>
struct In {
  using T = Computed;
  using S = Stored;
};
using F32 = In<float, float>;
using F16 = In<float, qkv::half>;
using BF16 = In<float, qkv::bfloat16>;
using Int8 = In<float, std::int8_t>;
using F64 = In<double, double>;
using WideInt8 = In<double, std::int8_t>;

inline constexpr Index n_rows = 151;  // across the borders of both kernels' chunks and of a block of queries

}  // namespace

TEMPLATE_TEST_CASE("a prompt in pieces gives the bits of the prompt at once", "[layer]", F32, F16, BF16, Int8, F64,
                   WideInt8) {
  using T = typename TestType::T;
  using S = typename TestType::S;
  const auto layer = multi_head_layer<T>(small_gqa, true);
  const Matrix<T> x = normals<T>(n_rows, small_gqa.model_dim, 1);
  for (const Kernel kernel : {Kernel::reference, Kernel::tiled, Kernel::decode}) {
    INFO(name(kernel));
    const auto fed = [&](const std::vector<Index>& sizes) {
      auto cache = layer.template make_cache<S>(n_rows);
      return feed(layer, cache, x, sizes, qkv::causal, qkv::plain, LayerOptions{.kernel = kernel});
    };
    const Matrix<T> whole = fed({n_rows});
    CHECK(same_bits(fed({1}), whole));
    CHECK(same_bits(fed({67, 1, 5, 2}), whole));
    CHECK(same_bits(fed({129, 7, 3}), whole));
  }
}

TEMPLATE_TEST_CASE("a layer attends what its cache holds, the rows of this call included", "[layer]", F32, F16, BF16,
                   Int8, F64, WideInt8) {
  using T = typename TestType::T;
  using S = typename TestType::S;
  const auto layer = multi_head_layer<T>(small_gqa, true);
  const Matrix<T> x = normals<T>(n_rows, small_gqa.model_dim, 2);
  auto cache = layer.template make_cache<S>(n_rows + 3), narrow = cache;
  const Matrix<T> out = feed(layer, cache, x, {97, 1, 1, 30, 4}, qkv::causal, qkv::plain,
                             LayerOptions{.arithmetic = qkv::Arithmetic::exact});
  CHECK(cache.rows() == n_rows);
  const auto& sinks = layer.weights().sinks;
  const Setting setting{.heads = layer.heads(), .sinks = {sinks.data(), sinks.data() + sinks.size()}};
  const Wide context = attention_by_formula(layer.queries(x), cache.template keys<double>(),
                                            cache.template values<double>(), setting, causally, unchanged)
                           .out;
  CHECK(max_error(out, project(context, layer.weights().output)) <= layer_tolerance<T>);
  // and that is, up to what the storage lost, the layer without a cache
  const double lost = qkv::has_row_scale<S> ? 0.1 : sizeof(S) == 2 ? 0.03 : layer_tolerance<T>;
  CHECK(max_error(out, layer.forward(x)) <= lost);
  // Products as stored, where the CPU has them, lose no more than the storage does.
  CHECK(max_error(feed(layer, narrow, x, {97, 1, 1, 30, 4}), out) <= lost / 2);
  CHECK(same_bits(narrow.keys(), cache.keys()));
}

TEMPLATE_TEST_CASE("going back and on again is as if one had never been there", "[layer]", F32, F16, BF16, Int8, F64,
                   WideInt8) {
  using T = typename TestType::T;
  using S = typename TestType::S;
  const auto layer = multi_head_layer<T>(small_gqa);
  const Matrix<T> x = normals<T>(21, small_gqa.model_dim, 3), astray = normals<T>(9, small_gqa.model_dim, 4);
  auto straight = layer.template make_cache<S>(24), winding = straight;
  const Matrix<T> first = layer.forward(x.topRows(12), straight), second = layer.forward(x.bottomRows(9), straight);

  CHECK(same_bits(layer.forward(x.topRows(12), winding), first));
  for (const Index back : {12, 7, 0}) {
    layer.forward(astray, winding);
    winding.truncate(back);
    if (back < 12) layer.forward(x.middleRows(back, 12 - back), winding);
  }
  CHECK(winding.position() == 12);
  CHECK(same_bits(layer.forward(x.bottomRows(9), winding), second));
}

TEST_CASE("a cache that grows in blocks gives the bits of one that does not", "[layer]") {
  const auto layer = multi_head_layer<float>(small_gqa, true);
  const Matrix<float> x = normals<float>(n_rows, small_gqa.model_dim, 5);
  for (const Index block : {1, 17, 40}) {
    auto fixed = layer.make_cache(680);
    qkv::KvCache<float> growing({.kv_heads = 2, .head_dim = 10, .v_head_dim = 7, .capacity = 680, .block = block});
    CHECK(same_bits(feed(layer, growing, x, {90, 1, 13}), feed(layer, fixed, x, {90, 1, 13})));
  }
}

TEST_CASE("a copied cache goes its own way", "[layer]") {
  const auto layer = multi_head_layer<float>(small_gqa);
  const Matrix<float> x = normals<float>(9, small_gqa.model_dim, 6), y = normals<float>(3, small_gqa.model_dim, 7);
  auto a = layer.make_cache(12), alone = layer.make_cache(12);
  layer.forward(x, a);
  auto b = a;
  layer.forward(y, b);
  const Matrix<float> rest = layer.forward(y.bottomRows(2), a);
  layer.forward(x, alone);
  CHECK(same_bits(layer.forward(y.bottomRows(2), alone), rest));
}

TEST_CASE("token by token, by any kernel, is the layer without a cache", "[layer]") {
  const MultiHeadAttentionConfig configs[] = {
      {.model_dim = 24, .heads = 3},
      {.model_dim = 19, .heads = 14, .kv_heads = 2, .head_dim = 8, .v_head_dim = 3, .rope = interleaved},
      {.model_dim = 17, .heads = 7, .kv_heads = 1, .head_dim = 5, .scale = 0.3}};
  for (const auto& config : configs) {
    const auto layer = multi_head_layer<double>(config);
    const Matrix<double> x = normals<double>(n_rows, config.model_dim, 8), whole = layer.forward(x);
    for (const Kernel kernel : {Kernel::automatic, Kernel::reference, Kernel::tiled, Kernel::decode}) {
      auto cache = layer.make_cache(n_rows);
      CHECK(max_error(feed(layer, cache, x, {1}, qkv::causal, qkv::plain, LayerOptions{.kernel = kernel}), whole) <=
            layer_tolerance<double>);
    }
  }
}

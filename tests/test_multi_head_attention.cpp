#include <qkv/multi_head_attention.hpp>
#include <qkv/position.hpp>

#include "support/catch.hpp"
#include "support/layers.hpp"

using namespace support;

namespace {

struct Named {
  const char* name;
  MultiHeadAttentionConfig config;
  bool sinks = false;
};

const Named layers[] = {
    {"MHA", {.model_dim = 24, .heads = 3}},
    {"MHA, interleaved RoPE", {.model_dim = 21, .heads = 5, .head_dim = 6, .rope = interleaved}},
    {"GQA, partial RoPE",
     {.model_dim = 19,
      .heads = 14,
      .kv_heads = 2,
      .head_dim = 8,
      .v_head_dim = 3,
      .rope = RopeConfig{.pairing = qkv::Pairing::half_split, .dim = 6, .theta = 500}}},
    {"GQA with everything", small_gqa, true},
    {"MQA, own scale", {.model_dim = 17, .heads = 7, .kv_heads = 1, .head_dim = 5, .qkv_bias = true, .scale = 0.3}},
    {"sinks", {.model_dim = 16, .heads = 2, .kv_heads = 1}, true},
};

}  // namespace

TEMPLATE_TEST_CASE("a layer is its formula", "[layer]", float, double) {
  for (const Named& named : layers) {
    INFO(named.name);
    const auto layer = multi_head_layer<TestType>(named.config, named.sinks);
    const Matrix<TestType> x = normals<TestType>(13, named.config.model_dim, 1);
    CHECK(max_error(layer.forward(x), multi_head_by_formula(layer, x)) <= layer_tolerance<TestType>);
    auto cache = layer.make_cache(13);
    CHECK(max_error(layer.forward(x, cache), multi_head_by_formula(layer, x)) <= layer_tolerance<TestType>);
  }
}

TEST_CASE("a layer of long double runs on the reference kernel", "[layer]") {
  const auto layer = multi_head_layer<long double>(small_gqa, true);
  const Wide x = normals<long double>(7, 23, 2);  // RoPE takes its angles in double
  CHECK(max_error(layer.forward(x), multi_head_by_formula(layer, x)) <= 1e-14);
  auto cache = layer.make_cache(7);
  CHECK(max_error(feed(layer, cache, x, {3, 1}), multi_head_by_formula(layer, x)) <= 1e-14);
}

TEST_CASE("the steps one by one are the layer", "[layer]") {
  const auto layer = multi_head_layer<double>(small_gqa);
  const Matrix<double> x = normals<double>(9, 23, 3);
  const auto context = qkv::attention(layer.queries(x), layer.keys(x), layer.values(x), layer.heads(), qkv::causal);
  CHECK(same_bits(layer.output(context), layer.forward(x)));
  CHECK(same_bits(layer.queries(x).bottomRows(4), layer.queries(x.bottomRows(4), 5)));
  CHECK(same_bits(layer.keys(x).bottomRows(4), layer.keys(x.bottomRows(4), 5)));
  CHECK(layer.heads().heads == 6);
  CHECK(layer.heads().kv_heads == 2);
  auto cache = layer.make_cache(9);
  layer.forward(x, cache);
  CHECK(same_bits(cache.keys(), layer.keys(x)));  // rotated and normed before they are cached
  CHECK(same_bits(cache.values(), layer.values(x)));
}

TEST_CASE("reserved positions change no bit", "[layer]") {
  auto layer = multi_head_layer<float>(small_gqa);
  const Matrix<float> x = normals<float>(9, 23, 4);
  const Matrix<float> before = layer.forward(x);
  layer.reserve_positions(5);  // fewer than are asked for
  CHECK(same_bits(layer.forward(x), before));
}

TEST_CASE("grouped heads are equal heads: GQA is MHA with its keys and values repeated", "[layer]") {
  for (const Index kv_heads : {1, 2, 3}) {
    MultiHeadAttentionConfig gqa = small_gqa, mha = small_gqa;
    gqa.kv_heads = kv_heads, mha.kv_heads = 6;
    const auto layer = multi_head_layer<float>(gqa);
    auto weights = layer.weights();
    const auto repeated = [&](const Projection<float>& p) {
      const Index width = p.out_dim() / kv_heads, group = 6 / kv_heads;
      Matrix<float> w(p.in_dim(), 6 * width);
      RowVector<float> b(6 * width);
      for (Index h = 0; h < 6; ++h) {
        w.middleCols(h * width, width) = p.weight().middleCols(h / group * width, width);
        b.segment(h * width, width) = p.bias().segment(h / group * width, width);
      }
      return Projection<float>(w, b);
    };
    weights.key = repeated(weights.key), weights.value = repeated(weights.value);
    const MultiHeadAttention<float> expanded(mha, weights);
    const Matrix<float> x = normals<float>(11, 23, 5);
    CHECK(same_bits(layer.forward(x), expanded.forward(x)));
  }
}

TEST_CASE("cross-attention reads another text", "[layer]") {
  MultiHeadAttentionConfig config = small_gqa;
  config.key_dim = 18, config.value_dim = 31;
  const auto layer = multi_head_layer<double>(config, true);
  const Matrix<double> query = normals<double>(5, 23, 6), key = normals<double>(12, 18, 7),
                       value = normals<double>(12, 31, 8);
  for (const Index n : {0, 3, 5})
    CHECK(max_error(layer.forward(query.topRows(n), key, value),
                    multi_head_by_formula(layer, wide(query.topRows(n)), wide(key), wide(value), everyone,
                                          unchanged)) <= layer_tolerance<double>);
  CHECK(max_error(layer.forward(query, key, value, qkv::window(3, 1)),
                  multi_head_by_formula(
                      layer, wide(query), wide(key), wide(value),
                      [](const At& at) {
                        return at.key_position >= at.query_position - 3 && at.key_position <= at.query_position + 1;
                      },
                      unchanged)) <= layer_tolerance<double>);
  CHECK(contains(message_of([&] { layer.forward(query, query, value); }), "x is [5, 23]"));
  CHECK(contains(message_of([&] { layer.forward(query, key.topRows(3), value); }), "same number of rows"));
  qkv::KvCache<double> cache = layer.make_cache(4);
  CHECK(contains(message_of([&] { layer.forward(query, cache); }), "key_dim 18 and value_dim 31"));
}

TEST_CASE("masks and scores reach the attention", "[layer]") {
  const auto layer = multi_head_layer<double>(small_gqa);
  const Matrix<double> x = normals<double>(14, 23, 9);
  const RowVector<double> slopes = qkv::alibi_slopes<double>(6);
  const auto penalised = [&](long double score, const At& at) {
    return score -
           static_cast<long double>(slopes(at.head)) * static_cast<long double>(at.query_position - at.key_position);
  };
  CHECK(max_error(layer.forward(x, qkv::causal, qkv::alibi(slopes)),
                  multi_head_by_formula(layer, x, causally, penalised)) <= layer_tolerance<double>);
  const auto odd_distance = [](const At& at) { return (at.query_position - at.key_position) % 2 == 1; };
  CHECK(max_error(layer.forward(x, odd_distance), multi_head_by_formula(layer, x, odd_distance)) <=
        layer_tolerance<double>);
}

TEST_CASE("padding at the end of a text moves nobody", "[layer]") {
  const auto layer = multi_head_layer<double>(small_gqa);
  const Matrix<double> x = normals<double>(8, 23, 10);
  const Index length[] = {5};
  const auto padded = layer.forward(x, qkv::causal & qkv::lengths(length));
  CHECK(same_bits(padded.topRows(5), layer.forward(x).topRows(5)));
}

TEST_CASE("no rows give no rows", "[layer]") {
  const auto layer = multi_head_layer<float>(small_gqa);
  const Matrix<float> none(0, 23);
  CHECK(layer.forward(none).rows() == 0);
  CHECK(layer.forward(none).cols() == 23);
  auto cache = layer.make_cache(2);
  CHECK(layer.forward(none, cache).rows() == 0);
  CHECK(cache.rows() == 0);
  layer.forward(normals<float>(2, 23, 11), cache);
  CHECK(layer.forward(none, cache).rows() == 0);  // a full cache takes no row more
}

TEST_CASE("any Eigen expression may be x", "[layer]") {
  const auto layer = multi_head_layer<float>(small_gqa);
  const Matrix<float> x = normals<float>(6, 23, 12);
  const Eigen::MatrixXf column_major = x;
  const auto expected = layer.forward(x);
  CHECK(same_bits(layer.forward(column_major), expected));
  auto a = layer.make_cache(6), b = layer.make_cache(6);
  CHECK(same_bits(layer.forward(column_major, a), layer.forward(x * 1.0F, b)));
  CHECK(same_bits(layer.forward(x.row(0)), expected.row(0)));
}

TEST_CASE("later tokens never change earlier outputs", "[layer]") {
  const auto layer = multi_head_layer<float>(small_gqa, true);
  Matrix<float> x = normals<float>(150, 23, 13);
  const auto before = layer.forward(x);
  x.bottomRows(71).setConstant(std::numeric_limits<float>::quiet_NaN());
  const auto after = layer.forward(x);
  CHECK(same_bits(after.topRows(79), before.topRows(79)));
  CHECK(after.bottomRows(71).array().isNaN().all());
}

TEST_CASE("a weight of the wrong shape is named", "[layer]") {
  const auto good = multi_head_layer<float>(small_gqa).weights();
  const auto complaint = [&](auto&& spoil) {
    auto weights = good;
    spoil(weights);
    return message_of([&] { MultiHeadAttention<float>(small_gqa, weights); });
  };
  const Projection<float> odd(numbers<float>(23, 5, 1));
  CHECK(complaint([](auto&) {}).empty());
  CHECK(contains(complaint([&](auto& w) { w.query = odd; }), "weight `query` must be [in, out] = [23, 60]"));
  CHECK(contains(complaint([&](auto& w) { w.key = odd; }), "weight `key` must be [in, out] = [23, 20]; given [23, 5]"));
  CHECK(contains(complaint([&](auto& w) { w.value = odd; }), "weight `value` must be [in, out] = [23, 14]"));
  CHECK(contains(complaint([&](auto& w) { w.output = odd; }), "weight `output` must be [in, out] = [42, 23]"));
  CHECK(contains(complaint([](auto& w) { w.query_norm.resize(60); }), "weight `query_norm` must have 10 elements"));
  CHECK(contains(complaint([](auto& w) { w.key_norm.resize(0); }), "weight `key_norm` must have 10 elements; given 0"));
  CHECK(contains(complaint([](auto& w) { w.sinks.setZero(5); }), "weight `sinks` must have 6 elements; given 5"));
  MultiHeadAttentionConfig plain = small_gqa;
  plain.qk_norm = false;
  CHECK(contains(message_of([&] { MultiHeadAttention<float>(plain, good); }), "weight `query_norm` must have 0"));
  MultiHeadAttentionConfig sharp = small_gqa;
  sharp.scale = 1e39;
  CHECK(contains(message_of([&] { MultiHeadAttention<float>(sharp, good); }), "scale must be 0"));
}

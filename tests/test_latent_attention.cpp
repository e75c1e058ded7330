#include <qkv/latent_attention.hpp>

#include "support/catch.hpp"
#include "support/layers.hpp"

using namespace support;
using qkv::Kernel, qkv::LatentForm, qkv::LayerOptions;

namespace {

struct OnlyRows {  // what kernels read, without what the layer writes
  using Storage = float;
  qkv::LatentRows<float> latent_rows() const;
};
static_assert(qkv::LatentKeySource<qkv::LatentCache<float>> && qkv::LatentKeySource<qkv::LatentCache<std::int8_t>>);
static_assert(!qkv::LatentKeySource<OnlyRows> && !qkv::LatentKeySource<qkv::KvCache<float>>);

inline constexpr LatentAttentionConfig with_q_latent{.model_dim = 29,
                                                     .heads = 5,
                                                     .q_latent_dim = 13,
                                                     .latent_dim = 7,
                                                     .nope_dim = 10,
                                                     .rope_dim = 4,
                                                     .v_head_dim = 3,
                                                     .rope = interleaved};

inline constexpr LatentAttentionConfig with_yarn{
    .model_dim = 21,
    .heads = 2,
    .q_latent_dim = 9,
    .latent_dim = 15,
    .nope_dim = 5,
    .rope_dim = 14,
    .norm_eps = 1e-5,
    .rope = RopeConfig{
        .pairing = qkv::Pairing::half_split,
        .theta = 2000,
        .scaling = qkv::yarn_scaling({.factor = 16, .original_context = 64, .beta_fast = 24, .mscale = 0.8})}};

const LatentAttentionConfig configs[] = {small_mla, with_q_latent, with_yarn};

LayerOptions by(LatentForm form, Kernel kernel = Kernel::automatic) { return {.kernel = kernel, .form = form}; }

}  // namespace

TEMPLATE_TEST_CASE("latent attention is its formula, in every form and by every kernel", "[layer]", float, double) {
  for (const auto& config : configs) {
    const auto layer = latent_layer<TestType>(config);
    const Matrix<TestType> x = normals<TestType>(37, config.model_dim, 1);
    const Wide expected = latent_by_formula(layer, x);
    CHECK(max_error(layer.forward(x), expected) <= layer_tolerance<TestType>);
    for (const LatentForm form : {LatentForm::naive, LatentForm::absorbed})
      for (const Kernel kernel : {Kernel::automatic, Kernel::reference, Kernel::tiled, Kernel::decode}) {
        CAPTURE(name(kernel), form == LatentForm::naive);
        CHECK(max_error(layer.forward(x, qkv::causal, qkv::plain, by(form, kernel)), expected) <=
              layer_tolerance<TestType>);
        auto cache = layer.make_cache(37);
        CHECK(max_error(feed(layer, cache, x, {19, 1, 1, 7}, qkv::causal, qkv::plain, by(form, kernel)), expected) <=
              layer_tolerance<TestType>);
      }
    auto cache = layer.make_cache(37);
    CHECK(max_error(feed(layer, cache, x, {1}), expected) <= layer_tolerance<TestType>);
  }
}

TEST_CASE("latent attention of long double runs on the reference kernel", "[layer]") {
  const auto layer = latent_layer<long double>(with_q_latent);
  const Wide x = normals<long double>(9, 29, 2), expected = latent_by_formula(layer, x);
  for (const LatentForm form : {LatentForm::naive, LatentForm::absorbed})  // RoPE takes its angles in double
    CHECK(max_error(layer.forward(x, qkv::causal, qkv::plain, by(form)), expected) <= 1e-14);
}

TEST_CASE("the softmax scale knows nope and rope, never the latent", "[layer]") {
  CHECK(std::abs(latent_layer<float>(small_mla).scale() - 1 / std::sqrt(17.0)) <= 1e-15);
  const double m = 0.1 * 0.8 * std::log(16.0) + 1;
  CHECK(std::abs(latent_layer<float>(with_yarn).scale() - m * m / std::sqrt(19.0)) <= 1e-15);
  LatentAttentionConfig own = small_mla;
  own.scale = 0.7;
  const auto layer = latent_layer<double>(own);
  const Matrix<double> x = normals<double>(9, 29, 3);
  CHECK(layer.scale() == 0.7);
  CHECK(max_error(layer.forward(x), latent_by_formula(layer, x)) <= layer_tolerance<double>);
}

TEST_CASE("a latent is normed and a rope key rotated before they are cached", "[layer]") {
  const auto layer = latent_layer<double>(with_yarn);
  const auto& [c, w] = std::tie(layer.config(), layer.weights());
  const Matrix<double> x = normals<double>(11, 21, 4);
  auto cache = layer.make_cache(11);
  feed(layer, cache, x, {4, 1, 6});
  const Wide down = project(wide(x), w.latent_down);
  CHECK(max_error(cache.latent(), rms_norm_by_formula<double>(down.leftCols(15), w.latent_norm, 1e-5)) <= 1e-14);
  CHECK(max_error(cache.rope_keys(), turn(down.rightCols(14), 1, 0, 14, c.rope)) <= 1e-14);
  CHECK(same_bits(cache.latent(), layer.latents(x).leftCols(15)));
  CHECK(same_bits(cache.rope_keys().bottomRows(3), layer.latents(x.bottomRows(3), 8).rightCols(14)));
  CHECK(layer.restored_keys(cache.latent()).cols() == 2 * 5);
  CHECK(layer.restored_values(cache.latent()).cols() == 2 * 5);
  CHECK(same_bits(layer.queries(x).bottomRows(3), layer.queries(x.bottomRows(3), 8)));
}

TEST_CASE("masks and scores reach latent attention", "[layer]") {
  const auto layer = latent_layer<double>(small_mla);
  const Matrix<double> x = normals<double>(22, 29, 5), table = normals<double>(8, 22, 6);
  std::vector<Index> ids(22, 1);
  std::fill_n(ids.begin(), 9, 4);
  const auto sees = [](const At& at) { return causally(at) && (at.key_position < 9) == (at.query_position < 9); };
  const auto biased = [&](long double s, const At& at) {
    return at.query_position < 14 ? s : s + static_cast<long double>(table(at.query_position - 14, at.key_position));
  };
  const Wide expected = latent_by_formula(layer, x, sees, biased);
  for (const LatentForm form : {LatentForm::naive, LatentForm::absorbed}) {
    auto cache = layer.make_cache(22);
    const auto mask = qkv::causal & qkv::documents(ids);
    const auto first = layer.forward(x.topRows(14), cache, mask, qkv::plain, by(form));
    const auto rest = layer.forward(x.bottomRows(8), cache, mask, qkv::bias(table), by(form));
    CHECK(max_error(first, expected.topRows(14)) <= layer_tolerance<double>);
    CHECK(max_error(rest, expected.bottomRows(8)) <= layer_tolerance<double>);
  }
}

TEST_CASE("a query that sees nothing attends to zeros", "[layer]") {
  const auto layer = latent_layer<float>(small_mla);
  const Matrix<float> x = normals<float>(6, 29, 7);
  const auto nobody_at_2 = [](const At& at) { return at.query_position != 2; };
  for (const LatentForm form : {LatentForm::naive, LatentForm::absorbed}) {
    const auto out = layer.forward(x, nobody_at_2, qkv::plain, by(form));
    CHECK((out.row(2).array() == 0).all());
    CHECK(max_error(out, latent_by_formula(layer, x, nobody_at_2)) <= layer_tolerance<float>);
  }
}

TEST_CASE("latent attention: no rows, and any Eigen expression", "[layer]") {
  const auto layer = latent_layer<float>(with_q_latent);
  const Matrix<float> x = normals<float>(6, 29, 8);
  auto cache = layer.make_cache(6);
  CHECK(layer.forward(Matrix<float>(0, 29)).rows() == 0);
  CHECK(layer.forward(Matrix<float>(0, 29), cache).cols() == 29);
  const Eigen::MatrixXf column_major = x;
  const auto expected = layer.forward(x, cache);
  CHECK(same_bits(layer.forward(column_major), expected));
  CHECK(same_bits(layer.forward(x * 1.0F), expected));
  CHECK(layer.forward(Matrix<float>(0, 29), cache).rows() == 0);
  CHECK(cache.rows() == 6);
}

TEST_CASE("a weight of latent attention that has the wrong shape is named", "[layer]") {
  const auto complaint = [](const LatentAttentionConfig& config, auto&& spoil) {
    auto weights = latent_layer<float>(config).weights();
    spoil(weights);
    return message_of([&] { LatentAttention<float>(config, weights); });
  };
  const Projection<float> odd(numbers<float>(29, 4, 1));
  CHECK(contains(complaint(small_mla, [&](auto& w) { w.query = odd; }), "weight `query` must be [in, out] = [29, 51]"));
  CHECK(contains(complaint(with_q_latent, [&](auto& w) { w.query_down = odd; }),
                 "`query_down` must be [in, out] = [29, 13]"));
  CHECK(contains(complaint(with_q_latent, [&](auto& w) { w.query_norm.resize(2); }),
                 "`query_norm` must have 13 elements; given 2"));
  CHECK(contains(complaint(with_q_latent, [&](auto& w) { w.query_up = {}; }),
                 "`query_up` must be [in, out] = [13, 70]; given [0, 0]"));
  CHECK(contains(complaint(small_mla, [&](auto& w) { w.latent_down = odd; }),
                 "`latent_down` must be [in, out] = [29, 25]"));
  CHECK(contains(complaint(small_mla, [&](auto& w) { w.latent_norm.resize(25); }),
                 "`latent_norm` must have 19 elements"));
  CHECK(contains(complaint(small_mla, [&](auto& w) { w.key_up = odd; }), "`key_up` must be [in, out] = [19, 33]"));
  CHECK(contains(complaint(small_mla, [&](auto& w) { w.value_up = odd; }), "`value_up` must be [in, out] = [19, 27]"));
  CHECK(contains(complaint(small_mla, [&](auto& w) { w.output = odd; }), "`output` must be [in, out] = [27, 29]"));
  LatentAttentionConfig sharp = small_mla;
  sharp.scale = -1e39;
  CHECK(contains(message_of([&] { LatentAttention<float>(sharp, latent_layer<float>(small_mla).weights()); }),
                 "scale must be 0"));
}

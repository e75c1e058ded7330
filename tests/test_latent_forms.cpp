#include <qkv/latent_attention.hpp>

#include "support/catch.hpp"
#include "support/layers.hpp"

using namespace support;
using qkv::Kernel, qkv::LatentForm, qkv::LayerOptions;

namespace {

constexpr LayerOptions naive{.form = LatentForm::naive}, absorbed{.form = LatentForm::absorbed};

bool naive_is_chosen(const LatentAttentionConfig& c, Index n_new, Index cached) {
  return choose_latent_form(LatentForm::automatic, c, n_new, cached + n_new) == LatentForm::naive;
}

/// Multiplications and additions of one head, counted key by key; up- and down-projections of the whole sequence. Each
/// weighed by what it was measured to take.
struct Flops {
  double naive = 0, absorbed = 0;
};
Flops count(const LatentAttentionConfig& c, Index n_new, Index cached) {
  const auto d = [](Index n) { return static_cast<double>(n); };
  Flops f;
  for (Index i = 0; i < n_new; ++i)
    for (Index key = 0; key <= cached + i; ++key) {
      f.naive += qkv::naive_attention_cost * (2 * d(c.nope_dim + c.rope_dim) + 2 * d(c.v_head_dim));
      f.absorbed += 2 * d(c.latent_dim + c.rope_dim) + 2 * d(c.latent_dim);
    }
  for (Index key = 0; key < cached + n_new; ++key)
    f.naive += qkv::projection_cost * (2 * d(c.latent_dim * c.nope_dim) + 2 * d(c.latent_dim * c.v_head_dim));
  for (Index i = 0; i < n_new; ++i)
    f.absorbed += qkv::projection_cost * (2 * d(c.nope_dim * c.latent_dim) + 2 * d(c.latent_dim * c.v_head_dim));
  return f;
}

}  // namespace

TEST_CASE("an asked form is the form", "[latent_form]") {
  STATIC_REQUIRE(choose_latent_form(LatentForm::naive, qkv::deepseek_v3, 1, 5000) == LatentForm::naive);
  STATIC_REQUIRE(choose_latent_form(LatentForm::absorbed, qkv::deepseek_v3, 900, 900) == LatentForm::absorbed);
}

TEST_CASE("the automatic form takes less time, by flops and what each was measured to take", "[latent_form]") {
  LatentAttentionConfig small = small_mla;
  for (const auto& config : {qkv::deepseek_v3, small})
    for (const Index cached : {0, 1, 5, 60, 300})
      for (const Index n_new : {1, 2, 7, 60, 110, 170, 210}) {
        const Flops flops = count(config, n_new, cached);
        CAPTURE(cached, n_new);
        CHECK(naive_is_chosen(config, n_new, cached) == (flops.naive < flops.absorbed));
      }
}

TEST_CASE("break-even of the two forms at DeepSeek's sizes", "[latent_form]") {
  const struct { Index cached, s; } expected[] = {{128, 132}, {1024, 184}, {4096, 196}, {16384, 199}};
  for (const auto& config : {qkv::deepseek_v2_lite, qkv::deepseek_v2, qkv::deepseek_v3})
    for (const auto& [cached, s] : expected) {
      CAPTURE(cached);
      const double c = static_cast<double>(cached);
      const double exact = std::sqrt(c * c + 2 * 1.15 * 131072 / 752 * c) - c;  // for pairs s·c + s²/2
      CHECK(std::abs(exact - static_cast<double>(s)) <= 0.5);
      Index first = 1;
      while (!naive_is_chosen(config, first, cached)) ++first;
      CHECK(std::abs(static_cast<double>(first) - exact) <= 1);
      for (const Index more : {1, 10, 1000, 100000}) CHECK(naive_is_chosen(config, first + more, cached));
    }
  CHECK_FALSE(naive_is_chosen(qkv::deepseek_v3, 200, 1000000));
  CHECK(naive_is_chosen(qkv::deepseek_v3, 201, 1000000));
  CHECK(naive_is_chosen(qkv::deepseek_v3, 1, 0));  // a first prompt of any length
  CHECK_FALSE(naive_is_chosen(qkv::deepseek_v3, 1, 1));
}

TEMPLATE_TEST_CASE("absorbed, naive and automatic are one function", "[latent_form]", float, double) {
  const LatentAttentionConfig configs[] = {
      small_mla,
      {.model_dim = 31,
       .heads = 7,
       .q_latent_dim = 17,
       .latent_dim = 5,
       .nope_dim = 3,
       .rope_dim = 2,
       .v_head_dim = 1,
       .rope = half_split},
      {.model_dim = 18, .heads = 1, .latent_dim = 1, .nope_dim = 1, .rope_dim = 8, .rope = interleaved},
      {.model_dim = 25,
       .heads = 2,
       .q_latent_dim = 3,
       .latent_dim = 67,
       .nope_dim = 33,
       .rope_dim = 14,
       .v_head_dim = 21,
       .rope = qkv::deepseek_rope(0.707)}};
  for (const auto& config : configs) {
    const auto layer = latent_layer<TestType>(config);
    const Matrix<TestType> x = normals<TestType>(300, config.model_dim, 1);  // more than a latent chunk
    auto a = layer.make_cache(300), b = layer.make_cache(300), c = layer.make_cache(300);
    const std::vector<Index> sizes = {200, 1, 3, 60, 1};
    const auto restored = feed(layer, a, x, sizes, qkv::causal, qkv::plain, naive);
    CHECK(max_error(feed(layer, b, x, sizes, qkv::causal, qkv::plain, absorbed), restored) <=
          layer_tolerance<TestType>);
    CHECK(max_error(feed(layer, c, x, sizes), restored) <= layer_tolerance<TestType>);
    CHECK(same_bits(a.latent(), b.latent()));
  }
}

TEMPLATE_TEST_CASE("both forms read the same quantised rows", "[latent_form]", qkv::half, qkv::bfloat16, std::int8_t) {
  const auto layer = latent_layer<float>(small_mla);
  const Matrix<float> x = normals<float>(50, 29, 2);
  auto a = layer.template make_cache<TestType>(50), b = a, c = a;
  const LayerOptions exactly{.arithmetic = qkv::Arithmetic::exact, .form = LatentForm::absorbed};
  const auto restored = feed(layer, a, x, {30, 1, 5}, qkv::causal, qkv::plain, naive);
  CHECK(max_error(feed(layer, b, x, {30, 1, 5}, qkv::causal, qkv::plain, exactly), restored) <= layer_tolerance<float>);
  // As stored: queries and weights are rounded too, where the CPU multiplies narrow numbers.
  CHECK(max_error(feed(layer, c, x, {30, 1, 5}, qkv::causal, qkv::plain, absorbed), restored) <= 0.02);
}

TEST_CASE("the automatic form has the bits of the form that it chooses", "[latent_form]") {
  const auto layer = latent_layer<float>(small_mla);
  const Matrix<float> x = normals<float>(70, 29, 3);
  for (const Index n_new : {1, 2, 5, 9, 40}) {
    auto a = layer.make_cache(70);
    layer.forward(x.topRows(30), a);
    auto b = a;
    const auto rows = x.middleRows(30, n_new);
    CHECK(same_bits(layer.forward(rows, a), layer.forward(rows, b, qkv::causal, qkv::plain,
                                                          naive_is_chosen(small_mla, n_new, 30) ? naive : absorbed)));
  }
}

TEST_CASE("a layer of DeepSeek-V2-Lite's size: naive is absorbed", "[latent_form]") {
  const auto& config = qkv::deepseek_v2_lite;
  const LatentAttention<float> layer(config, LatentAttentionWeights<float>::random(config));
  const Matrix<float> x = normals<float>(6, config.model_dim, 4);
  auto a = layer.make_cache(8), b = layer.make_cache(8);
  CHECK(a.bytes() == 8 * 576 * 4);
  const auto restored = feed(layer, a, x, {4, 2}, qkv::causal, qkv::plain, naive);
  const auto folded = feed(layer, b, x, {5, 1}, qkv::causal, qkv::plain, absorbed);
  CHECK(restored.cwiseAbs().maxCoeff() >= 0.1F);
  CHECK(max_error(folded, restored) <= 2e-5);
}

TEST_CASE("both forms see the same narrow weights", "[latent_form]") {
  const auto exact = latent_layer<float>(small_mla);
  const qkv::LatentAttention<float> layer(small_mla, exact.weights().stored_as<std::int8_t>());
  const Matrix<float> x = normals<float>(50, small_mla.model_dim, 9);
  auto one = layer.make_cache(50), two = layer.make_cache(50), wide = exact.make_cache(50);
  const Matrix<float> restored = layer.forward(x, one, qkv::causal, qkv::plain, naive);
  CHECK(max_error(layer.forward(x, two, qkv::causal, qkv::plain, absorbed), restored) <= 1e-5);
  const double rounding = max_error(exact.forward(x, wide, qkv::causal, qkv::plain, naive), restored);
  CHECK(rounding > 1e-4);
  CHECK(rounding < 0.1);
}

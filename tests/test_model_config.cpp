#include "support/catch.hpp"
#include "support/numbers.hpp"

#include <qkv/model_config.hpp>

#include <cmath>
#include <stdexcept>

using namespace qkv;
using support::contains;
using support::message_of;

namespace {

constexpr LatentAttentionConfig small_latent{.model_dim = 48,
                                             .heads = 3,
                                             .latent_dim = 20,
                                             .nope_dim = 10,
                                             .rope_dim = 6,
                                             .v_head_dim = 14,
                                             .rope = {.pairing = Pairing::interleaved}};

}  // namespace

TEST_CASE("what is not said follows: one kv head per head, head_dim = model_dim / heads, self-attention") {
  constexpr MultiHeadAttentionConfig config{.model_dim = 60, .heads = 12};
  static_assert(config.kv_heads == 12);
  static_assert(config.head_dim == 5);
  static_assert(config.v_head_dim == 5);
  static_assert(config.key_dim == 60 && config.value_dim == 60);
  constexpr MultiHeadAttentionConfig wide{.model_dim = 60, .heads = 12, .kv_heads = 4, .head_dim = 7};
  static_assert(wide.v_head_dim == 7);
  static_assert(wide != config);
  static_assert(small_latent.head_dim() == 16);
  REQUIRE_NOTHROW(check(config));
  REQUIRE_NOTHROW(check(wide));
  REQUIRE_NOTHROW(check(small_latent));
}

TEST_CASE("the presets make sense, and have the published sizes") {
  for (const auto& config : {gpt2_small, llama_2_7b, llama_3_8b, llama_3_70b, mistral_7b, falcon_7b}) {
    REQUIRE_NOTHROW(check(config));
    REQUIRE(config.heads * config.head_dim == config.model_dim);
    REQUIRE((config.head_dim == 128 || config.head_dim == 64));
  }
  for (const auto& config : {deepseek_v2_lite, deepseek_v2, deepseek_v3}) {
    REQUIRE_NOTHROW(check(config));
    REQUIRE(config.latent_dim == 512);
    REQUIRE(config.head_dim() == 192);
    REQUIRE(config.v_head_dim == 128);
    REQUIRE(config.rope.scaling.kind == RopeScaling::Kind::yarn);
    REQUIRE(config.rope.pairing == Pairing::interleaved);
  }
  REQUIRE(deepseek_v2_lite.q_latent_dim == 0);
  REQUIRE(deepseek_v2.q_latent_dim == 1536);
  REQUIRE(deepseek_v3.q_latent_dim == 1536);
}

TEST_CASE(
    "the scale is 1/sqrt(head_dim), and under YaRN 1/sqrt(nope + rope) times (0.1 mscale ln(factor) + 1) squared") {
  REQUIRE(std::abs(softmax_scale(llama_2_7b) - 0.08838834764831845) < 1e-16);
  REQUIRE(std::abs(softmax_scale(small_latent) - 0.25) < 1e-16);
  // ln 40 = 3.6888794541139363, sqrt(192) = 13.856406460551018
  const double v3 = 1.36888794541139363, v2 = 1 + 0.0707 * 3.6888794541139363;
  REQUIRE(std::abs(softmax_scale(deepseek_v3) - v3 * v3 / 13.856406460551018) < 1e-15);
  REQUIRE(std::abs(softmax_scale(deepseek_v2) - v2 * v2 / 13.856406460551018) < 1e-15);
  REQUIRE(softmax_scale(deepseek_v2) == softmax_scale(deepseek_v2_lite));
  MultiHeadAttentionConfig own = llama_2_7b;
  own.scale = 0.5;
  REQUIRE(softmax_scale(own) == 0.5);
  own.scale = 0;  // as none
  REQUIRE(softmax_scale(own) == softmax_scale(llama_2_7b));
  LatentAttentionConfig own_latent = deepseek_v3;
  own_latent.scale = 0.125;
  REQUIRE(softmax_scale(own_latent) == 0.125);
  own_latent.scale = 0;
  REQUIRE(softmax_scale(own_latent) == softmax_scale(deepseek_v3));
}

TEST_CASE("settings that make no sense are errors that show the numbers") {
  using Config = MultiHeadAttentionConfig;
  REQUIRE(contains(message_of([] { check(Config{.model_dim = 64, .heads = 8, .kv_heads = 3}); }), "kv_heads 3"));
  REQUIRE_THROWS_AS(check(Config{.model_dim = 64, .heads = 0}), std::invalid_argument);
  REQUIRE_THROWS_AS(check(Config{.model_dim = 64, .heads = 8, .kv_heads = 0}), std::invalid_argument);
  REQUIRE_THROWS_AS(check(Config{}), std::invalid_argument);
  REQUIRE_THROWS_AS(check(Config{.model_dim = 4, .heads = 8}), std::invalid_argument);  // head_dim 0
  REQUIRE(contains(message_of([] { check(Config{.model_dim = 64, .heads = 3}); }), "where heads 3 do not divide"));
  REQUIRE_NOTHROW(check(Config{.model_dim = 64, .heads = 3, .head_dim = 21}));
  constexpr Index huge = Index{1} << 40;
  REQUIRE_THROWS_AS(check(Config{.model_dim = 64, .heads = huge, .head_dim = huge}), std::length_error);
  REQUIRE_THROWS_AS(check(Config{.model_dim = 64, .heads = 8, .v_head_dim = 0}), std::invalid_argument);
  REQUIRE_THROWS_AS(check(Config{.model_dim = 64, .heads = 8, .key_dim = 0}), std::invalid_argument);
  REQUIRE_THROWS_AS(check(Config{.model_dim = 64, .heads = 8, .norm_eps = -1}), std::invalid_argument);
  REQUIRE_THROWS_AS(check(Config{.model_dim = 64, .heads = 8, .scale = std::nan("")}), std::invalid_argument);
  REQUIRE_THROWS_AS(check(Config{.model_dim = 15, .heads = 5, .rope = RopeConfig{.pairing = Pairing::half_split}}),
                    std::invalid_argument);  // an odd head does not pair

  const auto broken = [](auto&& change) {
    LatentAttentionConfig config = small_latent;
    change(config);
    return message_of([&] { check(config); });
  };
  REQUIRE(broken([](auto&) {}).empty());
  REQUIRE(contains(broken([](auto& c) { c.latent_dim = 0; }), "latent_dim"));
  REQUIRE(contains(broken([](auto& c) { c.q_latent_dim = -7; }), "-7"));
  REQUIRE_FALSE(broken([](auto& c) { c.heads = 0; }).empty());
  REQUIRE_FALSE(broken([](auto& c) { c.model_dim = 0; }).empty());
  REQUIRE_FALSE(broken([](auto& c) { c.nope_dim = 0; }).empty());
  REQUIRE_FALSE(broken([](auto& c) { c.rope_dim = 5; }).empty());
  REQUIRE_FALSE(broken([](auto& c) { c.v_head_dim = 0; }).empty());
  REQUIRE_FALSE(broken([](auto& c) { c.norm_eps = std::nan(""); }).empty());
  REQUIRE_FALSE(broken([](auto& c) { c.scale = INFINITY; }).empty());
  REQUIRE_FALSE(broken([](auto& c) { c.rope.theta = 0; }).empty());
  LatentAttentionConfig many = small_latent;
  many.heads = huge, many.nope_dim = huge;
  REQUIRE_THROWS_AS(check(many), std::length_error);
}

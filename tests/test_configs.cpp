#include <qkv/latent_attention.hpp>
#include <qkv/memory.hpp>
#include <qkv/model_config.hpp>
#include <qkv/multi_head_attention.hpp>

#include "support/catch.hpp"
#include "support/layers.hpp"

using namespace support;

TEST_CASE("presets have the published sizes", "[config]") {
  const struct {
    const MultiHeadAttentionConfig& config;
    Index model_dim, heads, kv_heads, head_dim;
    double theta;
  } models[] = {{qkv::gpt2_small, 768, 12, 12, 64, 0},    {qkv::llama_2_7b, 4096, 32, 32, 128, 1e4},
                {qkv::llama_3_8b, 4096, 32, 8, 128, 5e5}, {qkv::llama_3_70b, 8192, 64, 8, 128, 5e5},
                {qkv::mistral_7b, 4096, 32, 8, 128, 1e4}, {qkv::falcon_7b, 4544, 71, 1, 64, 1e4}};
  for (const auto& m : models) {
    CHECK(m.config.model_dim == m.model_dim);
    CHECK(m.config.heads == m.heads);
    CHECK(m.config.kv_heads == m.kv_heads);
    CHECK(m.config.head_dim == m.head_dim);
    CHECK((m.config.rope ? m.config.rope->theta : 0) == m.theta);
    check(m.config);
  }
  const struct {
    const LatentAttentionConfig& config;
    Index model_dim, heads, q_latent_dim;
    double mscale;
  } deepseek[] = {{qkv::deepseek_v2_lite, 2048, 16, 0, 0.707},
                  {qkv::deepseek_v2, 5120, 128, 1536, 0.707},
                  {qkv::deepseek_v3, 7168, 128, 1536, 1.0}};
  for (const auto& m : deepseek) {
    CHECK(m.config.model_dim == m.model_dim);
    CHECK(m.config.heads == m.heads);
    CHECK(m.config.q_latent_dim == m.q_latent_dim);
    CHECK(m.config.latent_dim == 512);
    CHECK(m.config.nope_dim == 128);
    CHECK(m.config.rope_dim == 64);
    CHECK(m.config.v_head_dim == 128);
    CHECK(m.config.rope.pairing == qkv::Pairing::interleaved);
    const double multiplier = 0.1 * m.mscale * std::log(40.0) + 1;
    CHECK(std::abs(softmax_scale(m.config) - multiplier * multiplier / std::sqrt(192.0)) <= 1e-15);
    check(m.config);
  }
}

TEST_CASE("a layer refuses settings that make none", "[config]") {
  MultiHeadAttentionConfig c = small_gqa;
  c.kv_heads = 4;
  CHECK(contains(message_of([&] { MultiHeadAttention<float>(c, {}); }), "kv_heads 4"));
  CHECK(contains(message_of([&] { MultiHeadAttentionWeights<float>::random(c); }), "kv_heads 4"));
  c = small_gqa, c.rope->dim = 12;
  CHECK(contains(message_of([&] { MultiHeadAttention<float>(c, {}); }), "dim <= head_dim"));
  LatentAttentionConfig d = small_mla;
  d.rope_dim = 7;
  CHECK(contains(message_of([&] { LatentAttention<float>(d, {}); }), "even number"));
  d.rope_dim = 0;
  CHECK(contains(message_of([&] { LatentAttention<float>(d, {}); }), "rope_dim >= 2"));
  d = small_mla, d.latent_dim = 0;
  CHECK(contains(message_of([&] { LatentAttention<float>(d, {}); }), "latent_dim"));
  CHECK(contains(message_of([&] { LatentAttentionWeights<float>::random(d); }), "latent_dim"));
}

TEST_CASE("random weights fit their layer, have variance 1/in, and depend on the seed only", "[config]") {
  const auto a = MultiHeadAttentionWeights<float>::random(small_gqa, 3),
             b = MultiHeadAttentionWeights<float>::random(small_gqa, 3);
  CHECK(same_bits(a.query.weight(), b.query.weight()));
  CHECK(same_bits(a.output.bias(), b.output.bias()));
  CHECK_FALSE(same_bits(a.query.weight(), MultiHeadAttentionWeights<float>::random(small_gqa, 4).query.weight()));
  CHECK(std::abs(static_cast<double>(a.query.weight().squaredNorm()) / 60 - 1) <= 0.2);
  CHECK(MultiHeadAttention<float>(small_gqa, a).forward(normals<float>(4, 23, 1)).allFinite());
  const auto wide = MultiHeadAttentionWeights<double>::random(small_gqa, 3);
  CHECK(max_error(a.key.weight(), wide.key.weight()) <= 1e-7);  // the same numbers in every scalar
  LatentAttentionConfig c = small_mla;
  for (const Index q_latent_dim : {0, 13}) {
    c.q_latent_dim = q_latent_dim;
    const LatentAttention<float> layer(c, LatentAttentionWeights<float>::random(c, 5));
    CHECK(layer.forward(normals<float>(4, 29, 1)).allFinite());
    CHECK(layer.weights().query.in_dim() == (q_latent_dim == 0 ? 29 : 0));
  }
}

TEST_CASE("caches made by a layer cost what the settings say", "[config]") {
  const auto layer = multi_head_layer<float>(small_gqa);
  CHECK(layer.make_cache(5).bytes() == qkv::cache_bytes<float>(small_gqa, 5));
  CHECK(layer.make_cache<qkv::half>(5).bytes() == qkv::cache_bytes<qkv::half>(small_gqa, 5));
  CHECK(layer.make_cache<std::int8_t>(5).bytes() == qkv::cache_bytes<std::int8_t>(small_gqa, 5));
  const auto latent = latent_layer<float>(small_mla);
  CHECK(latent.make_cache(5).bytes() == 5 * (19 + 6) * 4);
  CHECK(latent.make_cache<qkv::bfloat16>(5).bytes() == qkv::cache_bytes<qkv::bfloat16>(small_mla, 5));
  CHECK(latent.make_cache<std::int8_t>(5).bytes() == 5 * (19 + 4 + 6 * 4));
}

#include "support/catch.hpp"
#include "support/storages.hpp"

#include <qkv/memory.hpp>
#include <qkv/qkv.hpp>

#include <cmath>
#include <concepts>
#include <cstdint>
#include <limits>
#include <stdexcept>

using namespace qkv;

// Bytes are an Index wherever they are asked for, so that they add up and compare without casts.
template <class X>
concept CountsBytes = requires(const X& x) {
  { x.bytes() } -> std::same_as<Index>;
};
template <class X>
concept CountsOverhead = CountsBytes<X> && requires(const X& x) {
  { x.overhead_bytes() } -> std::same_as<Index>;
};
static_assert(CountsOverhead<KvCache<half>> && CountsOverhead<RingCache<float>> && CountsOverhead<LatentCache<float>>);
static_assert(CountsOverhead<PagedCache<float>> && CountsOverhead<PagedLatentCache<float>>);
static_assert(CountsOverhead<PagePool<float>> && CountsOverhead<LatentPagePool<float>>);
static_assert(CountsBytes<Projection<float>> && CountsBytes<kernel::PackedWeights<float>> && CountsBytes<Workspace>);
static_assert(std::same_as<decltype(required_bytes<float>(Kernel::tiled, 1, 1, Heads{}, 1, 1)), Index>);
static_assert(std::same_as<decltype(Explanation{}.workspace_bytes), Index>);

TEST_CASE("MLA keeps 576 numbers per token: 56.9 times fewer than MHA, 71.1 than its naive form, 3.6 than GQA-8") {
  constexpr Index mla = elements_per_token(deepseek_v3);
  static_assert(mla == 512 + 64);
  constexpr Index mha = elements_per_token(multi_head_equivalent(deepseek_v3));
  constexpr Index gqa = elements_per_token(multi_head_equivalent(deepseek_v3, 8));
  constexpr Index mqa = elements_per_token(multi_head_equivalent(deepseek_v3, 1));
  static_assert(mha == 2 * 128 * 128);
  static_assert(gqa == 2 * 8 * 128);
  static_assert(mqa == 2 * 128);
  static_assert(naive_elements_per_token(deepseek_v3) == 128 * (192 + 128));
  REQUIRE(std::abs(ratio(mha, mla) - 56.9) < 0.05);
  REQUIRE(std::abs(ratio(naive_elements_per_token(deepseek_v3), mla) - 71.1) < 0.05);
  REQUIRE(std::abs(ratio(gqa, mla) - 3.6) < 0.05);
  REQUIRE(ratio(mla, mqa) == 2.25);  // MQA's cache is smaller still
  REQUIRE(std::abs(
              ratio(elements_per_token(multi_head_equivalent(deepseek_v2_lite)), elements_per_token(deepseek_v2_lite)) -
              7.1) < 0.05);
  // 32 heads of 128, compressed to the same 512 + 64: 14.2 times, not 57.
  constexpr MultiHeadAttentionConfig thirty_two{.model_dim = 4096, .heads = 32};
  REQUIRE(std::abs(ratio(elements_per_token(thirty_two), mla) - 14.2) < 0.05);
}

TEST_CASE("a 32-layer, 32-head model of head_dim 128 keeps 4.3 GB for 8192 tokens in 16 bit") {
  static_assert(cache_bytes<half>(llama_2_7b, 8192, 32) == 4294967296);
  static_assert(cache_bytes<half>(llama_2_7b, 8192) == 134217728);  // one layer: the often quoted 134 MB
  static_assert(cache_bytes<half>(llama_3_8b, 8192, 32) * 4 == 4294967296);
  static_assert(bytes_per_token<float>(falcon_7b) == 2 * 64 * 4);
  static_assert(elements_per_token(mistral_7b) == 2048);
  REQUIRE(cache_bytes<float>(gpt2_small, 0, 12) == 0);
}

TEST_CASE("int8 pays a float per row, and keeps the rope key as floats") {
  static_assert(bytes_per_token<std::int8_t>(llama_3_8b) == 8 * 2 * (128 + 4));
  static_assert(bytes_per_token<std::int8_t>(deepseek_v3) == 512 + 4 + 64 * 4);
  static_assert(bytes_per_token<bfloat16>(deepseek_v3) == 576 * 2);
  static_assert(naive_bytes_per_token<std::int8_t>(deepseek_v3) == 128 * (192 + 4 + 128 + 4));
  REQUIRE(naive_cache_bytes<half>(deepseek_v3, 1000, 61) == Index{61} * 1000 * 40960 * 2);
}

TEMPLATE_LIST_TEST_CASE("the figures are what the caches allocate", "", support::AllStorages) {
  constexpr MultiHeadAttentionConfig layer{.model_dim = 66, .heads = 6, .kv_heads = 3, .head_dim = 9, .v_head_dim = 5};
  constexpr LatentAttentionConfig mla{.model_dim = 40,
                                      .heads = 5,
                                      .latent_dim = 19,
                                      .nope_dim = 7,
                                      .rope_dim = 6,
                                      .v_head_dim = 11,
                                      .rope = {.pairing = Pairing::interleaved}};
  constexpr Index tokens = 37;
  const KvCache<TestType> kv({.kv_heads = 3, .head_dim = 9, .v_head_dim = 5, .capacity = tokens});
  const KvCache<TestType> naive({.kv_heads = 5, .head_dim = 13, .v_head_dim = 11, .capacity = tokens});
  const LatentCache<TestType> latent({.latent_dim = 19, .rope_dim = 6, .capacity = tokens});
  REQUIRE(kv.bytes() == cache_bytes<TestType>(layer, tokens));
  REQUIRE(naive.bytes() == naive_cache_bytes<TestType>(mla, tokens));
  REQUIRE(latent.bytes() == cache_bytes<TestType>(mla, tokens));
}

TEST_CASE("a figure that does not fit is an error") {
  constexpr Index most = std::numeric_limits<Index>::max();
  REQUIRE_THROWS_AS(cache_bytes<half>(llama_2_7b, most / 1000), std::length_error);
  REQUIRE_THROWS_AS(cache_bytes<half>(llama_2_7b, most / 32768, 32), std::length_error);
  REQUIRE_THROWS_AS(cache_bytes<half>(deepseek_v3, -1), std::invalid_argument);
  const MultiHeadAttentionConfig wide{.model_dim = 1, .heads = 1, .head_dim = most, .v_head_dim = most};
  const MultiHeadAttentionConfig negative{.model_dim = 1, .heads = 1, .head_dim = -4, .v_head_dim = 8};
  REQUIRE_THROWS_AS(elements_per_token(wide), std::length_error);
  REQUIRE_THROWS_AS(bytes_per_token<std::int8_t>(wide), std::length_error);
  REQUIRE_THROWS_AS(elements_per_token(negative), std::invalid_argument);
  LatentAttentionConfig mla = deepseek_v3;
  mla.rope_dim = most;
  REQUIRE_THROWS_AS(elements_per_token(mla), std::length_error);
  REQUIRE_THROWS_AS(naive_elements_per_token(mla), std::length_error);
  REQUIRE_THROWS_AS(bytes_per_token<half>(mla), std::length_error);
  REQUIRE_THROWS_AS(naive_bytes_per_token<std::int8_t>(mla), std::length_error);
}

#include "support/allocations.hpp"
#include "support/catch.hpp"
#include "support/numbers.hpp"
#include "support/storages.hpp"

#include <qkv/memory.hpp>
#include <qkv/qkv.hpp>

#include <algorithm>
#include <cmath>
#include <concepts>
#include <cstdint>
#include <limits>
#include <optional>
#include <set>
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

namespace {

constexpr MultiHeadAttentionConfig gqa{.model_dim = 66, .heads = 6, .kv_heads = 3, .head_dim = 10, .v_head_dim = 5};
constexpr LatentAttentionConfig small_mla{.model_dim = 40,
                                          .heads = 5,
                                          .latent_dim = 19,
                                          .nope_dim = 7,
                                          .rope_dim = 10,
                                          .v_head_dim = 11,
                                          .rope = {.pairing = Pairing::interleaved}};

template <class Cache>
void append(Cache& cache, Index n) {
  if constexpr (requires { cache.latent_dim(); })
    cache.append(support::numbers<float>(n, 19, 1), support::numbers<float>(n, 10, 2));
  else
    cache.append(support::numbers<float>(n, 3 * 10, 1), support::numbers<float>(n, 3 * 5, 2));
}

/// Rows that a cache has memory for; most: that it has held, where it grows by blocks and keeps them.
template <class Cache>
Index rows_with_memory(const Cache& cache, Index block, Index most) {
  if constexpr (requires { cache.pages(); })
    return static_cast<Index>(cache.pages().size()) * cache.page_tokens();
  else
    return block == 0 ? cache.capacity() : (most + block - 1) / block * block;
}

/// What every cache offers, whatever is behind it: README's table.
template <class Cache>
void offers_what_all_do(Cache& cache, Index block = 0) {
  using S = typename Cache::Storage;
  Index most = 0;
  const auto follows_the_rule = [&] {
    const Index tokens = rows_with_memory(cache, block, most = std::max(most, cache.rows()));
    if constexpr (requires { cache.latent_dim(); })
      return cache.bytes() == cache_bytes<S>(small_mla, tokens);
    else
      return cache.bytes() == cache_bytes<S>(gqa, tokens);
  };
  CHECK(follows_the_rule());
  CHECK((cache.make_room(7) && !cache.make_room(cache.capacity() + 1)));
  append(cache, 7);
  CHECK((cache.rows() == 7 && cache.position() == 7 && follows_the_rule()));
  cache.workspace().lease(1000);
  CHECK((cache.overhead_bytes() >= 1000 && follows_the_rule()));
  if constexpr (requires { cache.drop_rows(0, 0, std::nullopt); }) {  // not a ring, which forgets by itself
    const Rope<float> rope({.pairing = Pairing::half_split}, 10);
    cache.drop_rows(1, 1, rope);
    cache.drop_rows(1, 1, std::optional(rope));
    cache.drop_rows(1, 1, std::nullopt);
    CHECK((cache.rows() == 4 && follows_the_rule()));
  }
  CHECK((!cache.can_truncate(8) && cache.try_truncate(3) && cache.position() == 3 && follows_the_rule()));
}

}  // namespace

TEMPLATE_TEST_CASE("bytes and overhead_bytes follow one rule in every cache, to the byte that is allocated", "", float,
                   std::int8_t) {
  using S = TestType;
  const auto before = support::allocations();
  const auto allocated = [&] { return (support::allocations() - before).new_bytes; };
  const auto own = [](const auto& owner) { return owner.bytes() + owner.overhead_bytes(); };
  for (const Index block : {0, 4}) {
    KvCache<S> cache({.kv_heads = 3, .head_dim = 10, .v_head_dim = 5, .capacity = 12, .block = block});
    offers_what_all_do(cache, block);
    CHECK(allocated() == own(cache));
  }
  {
    RingCache<S> cache({.kv_heads = 3, .head_dim = 10, .v_head_dim = 5, .window = 9, .pinned = 2, .slack = 8});
    offers_what_all_do(cache);
    CHECK(allocated() == own(cache));
  }
  {
    LatentCache<S> cache({.latent_dim = 19, .rope_dim = 10, .capacity = 12});
    offers_what_all_do(cache);
    CHECK(allocated() == own(cache));
  }
  const auto pages = [&]<class Cache>(auto& pool, std::type_identity<Cache>) {
    Cache cache(pool);
    offers_what_all_do(cache);
    append(cache, 4);
    Cache fork = cache.fork(5);
    append(fork, 9);
    CHECK(allocated() == own(pool) + cache.overhead_bytes() + fork.overhead_bytes());
    std::set<Index> used(cache.pages().begin(), cache.pages().end());
    used.insert(fork.pages().begin(), fork.pages().end());
    CHECK(used.size() == cache.pages().size() + fork.pages().size() - 1);  // one is shared
    CHECK(pool.used_bytes() == static_cast<Index>(used.size()) * pool.page_bytes());
    CHECK(cache.bytes() + fork.bytes() == pool.used_bytes() + pool.page_bytes());
  };
  {
    PagePool<S> pool({.kv_heads = 3, .head_dim = 10, .v_head_dim = 5, .page_tokens = 4, .pages = 9});
    pages(pool, std::type_identity<PagedCache<S>>());
  }
  {
    LatentPagePool<S> pool({.latent_dim = 19, .rope_dim = 10, .page_tokens = 4, .pages = 9});
    pages(pool, std::type_identity<PagedLatentCache<S>>());
  }
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

#include <qkv/latent_attention.hpp>
#include <qkv/memory.hpp>
#include <qkv/paged_latent_cache.hpp>
#include <qkv/saved_cache.hpp>

#include <optional>
#include <sstream>

#include "support/batches.hpp"
#include "support/catch.hpp"

using namespace support;
using qkv::LatentForm, qkv::LatentPagePool, qkv::LayerOptions, qkv::PagedLatentCache;

namespace {

qkv::LatentPagePoolConfig pages_for_small_mla(Index page_tokens, Index pages) {
  return {
      .latent_dim = small_mla.latent_dim, .rope_dim = small_mla.rope_dim, .page_tokens = page_tokens, .pages = pages};
}

}  // namespace

TEMPLATE_LIST_TEST_CASE("latent pages give the bits of one block, in either form", "[paged_latent_cache]",
                        qkv::StorageTypes) {
  const auto layer = latent_layer<float>(small_mla);
  const Matrix<float> x = normals<float>(251, 29, 1);
  for (const LatentForm form : {LatentForm::naive, LatentForm::absorbed, LatentForm::automatic})
    for (const Index page_tokens : {1, 7, 64}) {
      LatentPagePool<TestType> pool(pages_for_small_mla(page_tokens, 330));
      PagedLatentCache<TestType> other(pool), cache(pool);  // two take pages in turn: those of one are not in a row
      auto whole = layer.template make_cache<TestType>(251);
      for (Index first = 0, n = 40; first < 251; first += n, n = std::min<Index>(n == 40 ? 1 : 2 * n, 251 - first)) {
        const LayerOptions options{.form = form};
        const auto rows = x.middleRows(first, n);
        CHECK(same_bits(layer.forward(rows, cache, qkv::causal, qkv::plain, options),
                        layer.forward(rows, whole, qkv::causal, qkv::plain, options)));
        if (other.rows() < 30) layer.forward(x.topRows(8), other);
      }
      CHECK(same_bits(cache.latent(), whole.latent()));
      CHECK(same_bits(cache.rope_keys(), whole.rope_keys()));
    }
}

TEMPLATE_TEST_CASE("forks of latents share their past and do not see each other's future", "[paged_latent_cache]",
                   float, std::int8_t) {
  const auto layer = latent_layer<float>(small_mla);
  const Matrix<float> prompt = normals<float>(19, 29, 2), a = normals<float>(12, 29, 3), b = normals<float>(12, 29, 4);
  const auto alone = [&](Index shared, const Matrix<float>& own) {
    auto cache = layer.template make_cache<TestType>(40);
    layer.forward(prompt, cache);
    cache.truncate(shared);
    return feed(layer, cache, own, {1, 3});
  };
  LatentPagePool<TestType> pool(pages_for_small_mla(5, 20));
  PagedLatentCache<TestType> trunk(pool);
  layer.forward(prompt, trunk);
  REQUIRE(pool.free_pages() == 16);
  auto left = trunk.fork(), right = trunk.fork(7);
  CHECK(pool.free_pages() == 16);  // nothing is copied yet
  CHECK(pool.references(trunk.pages()[0]) == 3);
  CHECK(pool.references(trunk.pages()[3]) == 2);
  Matrix<float> of_trunk(12, 29), of_left(12, 29), of_right(12, 29);
  for (Index first = 0, n = 1; first < 12; first += n, n = std::min<Index>(3, 12 - first)) {
    layer.forward_into(of_trunk.middleRows(first, n), a.middleRows(first, n), trunk);
    layer.forward_into(of_left.middleRows(first, n), b.middleRows(first, n), left);
    layer.forward_into(of_right.middleRows(first, n), a.middleRows(first, n), right);
  }
  CHECK(same_bits(of_trunk, alone(19, a)));
  CHECK(same_bits(of_left, alone(19, b)));
  CHECK(same_bits(of_right, alone(7, a)));
  trunk.clear(), left.clear();
  CHECK(pool.free_pages() == 20 - 4);
  { const auto moved = std::move(right); }
  CHECK(right.capacity() == 0);
  CHECK(pool.free_pages() == 20);
}

TEST_CASE("a batch of paged latents is each sequence alone, and takes its rows as a whole", "[paged_latent_cache]") {
  const auto layer = latent_layer<float>(small_mla);
  LatentPagePool<float> pool(pages_for_small_mla(5, 100));
  std::vector<PagedLatentCache<float>> together;
  for (int i = 0; i < 4; ++i) together.emplace_back(pool);
  std::vector<qkv::LatentCache<float>> alone(4, layer.make_cache(120));
  CHECK(batch_equals_alone<float>(layer, together, alone));

  LatentPagePool<float> small(pages_for_small_mla(4, 3));
  PagedLatentCache<float> one(small), two(small);
  const Matrix<float> x = normals<float>(14, 29, 5);
  PagedLatentCache<float>* const both[] = {&one, &two};
  Matrix<float> out(14, 29);
  const std::vector<Index> offsets = {0, 7, 14}, fitting = {0, 4, 12};
  const auto run = [&](const std::vector<Index>& rows) {
    const Index n = rows.back();
    layer.forward_into(out.topRows(n), x.topRows(n), std::span<const Index>(rows),
                       std::span<PagedLatentCache<float>* const>(both));
  };
  CHECK(contains(message_of<std::length_error>([&] { run(offsets); }),
                 "the pool has 3 free pages; the rows of all its sequences need 4"));
  CHECK((one.rows() == 0 && two.rows() == 0 && small.free_pages() == 3));
  run(fitting);
  CHECK((one.rows() == 4 && two.rows() == 8 && small.free_pages() == 0));
}

TEST_CASE("a paged latent cache says what is wrong and stays as it was", "[paged_latent_cache]") {
  LatentPagePool<float> pool({.latent_dim = 3, .rope_dim = 2, .page_tokens = 4, .pages = 2});
  PagedLatentCache<float> cache(pool, 7);
  const Matrix<float> c = numbers<float>(8, 3, 1), r = numbers<float>(8, 2, 2);
  cache.append(c.topRows(5), r.topRows(5));
  const auto unchanged = [&] {
    return cache.rows() == 5 && pool.free_pages() == 0 && same_bits(cache.latent(), c.topRows(5));
  };
  CHECK(cache.max_append() == 2);
  CHECK(contains(message_of<std::length_error>([&] { cache.append(c.topRows(3), r.topRows(3)); }),
                 "takes at most 2 more rows; given 3"));
  CHECK_FALSE(cache.try_append(c.topRows(3), r.topRows(3)));
  CHECK(
      contains(message_of([&] { cache.append(c.topRows(1), r.topRows(2)); }), "given latent [1, 3], rope_key [2, 2]"));
  CHECK(contains(message_of<std::out_of_range>([&] { cache.truncate(6); }), "0 <= position <= 5; given position 6"));
  CHECK_FALSE(cache.try_truncate(-1));
  CHECK(contains(message_of<std::out_of_range>([&] { cache.fork(6); }), "given 6"));
  CHECK(contains(message_of<std::out_of_range>([&] { pool.references(2); }), "given page 2"));
  CHECK(unchanged());
  CHECK(contains(message_of([&] { PagedLatentCache<float>(pool, 9); }), "= 8; given 9"));
  CHECK(contains(message_of([&] { LatentPagePool<float>({.latent_dim = 3, .rope_dim = 0, .pages = 1}); }),
                 "given 3 and 0"));
  // A fork needs a page of its own for the next row, and there is none.
  PagedLatentCache<float> fork = cache.fork();
  CHECK(fork.max_append() == 0);
  CHECK_FALSE(fork.try_append(c.topRows(1), r.topRows(1)));
  CHECK(unchanged());
  cache.truncate(4);
  CHECK((fork.max_append() == 2 && same_bits(fork.latent(), c.topRows(5))));
}

TEMPLATE_TEST_CASE("rows dropped from pages leave the bits of one block, and forks as they were",
                   "[paged_latent_cache]", float, qkv::half, std::int8_t) {
  const qkv::Rope<float> rope({qkv::Pairing::interleaved}, 6);
  const Matrix<float> c = numbers<float>(150, 19, 1), r = numbers<float>(150, 6, 2);
  for (const auto& [first, n] :
       {std::pair<Index, Index>{0, 5}, {3, 70}, {13, 1}, {0, 150}, {149, 1}, {7, 0}, {20, 130}})
    for (const Index page_tokens : {1, 7, 64}) {
      CAPTURE(first, n, page_tokens);
      LatentPagePool<TestType> pool(pages_for_small_mla(page_tokens, 400));
      PagedLatentCache<TestType> cache(pool);
      qkv::LatentCache<TestType> whole({.latent_dim = 19, .rope_dim = 6, .capacity = 200});
      cache.append(c, r), whole.append(c, r);
      const auto fork = cache.fork();
      const auto before = fork.latent();
      cache.drop_rows(first, n, std::optional(rope)), whole.drop_rows(first, n, rope);
      CHECK((cache.rows() == 150 - n && cache.position() == whole.position()));
      CHECK((same_bits(cache.latent(), whole.latent()) && same_bits(cache.rope_keys(), whole.rope_keys())));
      CHECK((fork.rows() == 150 && same_bits(fork.latent(), before)));
      cache.append(c.topRows(9), r.topRows(9)), whole.append(c.topRows(9), r.topRows(9));
      CHECK((same_bits(cache.latent(), whole.latent()) && same_bits(cache.rope_keys(), whole.rope_keys())));
      const auto rows = cache.latent_rows();
      Index position = 0;
      for (const auto& run : rows.runs) {
        CHECK(run.position == position);
        position += run.rows;
      }
      CHECK(position == cache.rows());
    }
  LatentPagePool<TestType> small(pages_for_small_mla(4, 3));
  PagedLatentCache<TestType> cache(small);
  cache.append(c.topRows(12), r.topRows(12));
  auto fork = cache.fork();
  CHECK(contains(message_of<std::length_error>([&] { cache.drop_rows(0, 1, rope); }), "0 free pages of 3"));
  CHECK((cache.rows() == 12 && same_bits(cache.latent(), fork.latent())));
  small.on_exhausted([&](Index) { fork.clear(); });
  cache.drop_rows(0, 1, rope);
  CHECK((cache.rows() == 11 && fork.rows() == 0));
}

TEMPLATE_TEST_CASE("forks that share pages are shifted each its own way, by the roundings of one block",
                   "[paged_latent_cache]", float, qkv::half) {
  const qkv::Rope<float> rope({qkv::Pairing::half_split}, 6);
  LatentPagePool<TestType> pool(pages_for_small_mla(5, 100));
  const Index tables = pool.overhead_bytes();
  std::vector<PagedLatentCache<TestType>> paged;
  std::vector<qkv::LatentCache<TestType>> whole;
  const auto add = [&](std::size_t s, Index n, std::uint64_t seed) {
    const Matrix<float> c = numbers<float>(n, 19, seed), r = numbers<float>(n, 6, seed + 1);
    paged[s].append(c, r), whole[s].append(c, r);
  };
  const auto drop = [&](std::size_t s, Index first, Index n, auto... how) {
    paged[s].drop_rows(first, n, rope, how...), whole[s].drop_rows(first, n, rope, how...);
  };
  const auto fork = [&](std::size_t s) { paged.push_back(paged[s].fork()), whole.push_back(whole[s]); };
  paged.emplace_back(pool), whole.emplace_back(qkv::LatentCacheConfig{.latent_dim = 19, .rope_dim = 6, .capacity = 90});
  add(0, 50, 1);
  CHECK(pool.overhead_bytes() == tables);
  drop(0, 4, 3), drop(0, 20, 2);
  CHECK(pool.overhead_bytes() ==
        tables + 500 * (6 * static_cast<Index>(sizeof(TestType)) + 8));  // of the rope keys only
  fork(0), fork(0), fork(1);
  for (Index round = 0; round < 30; ++round) {
    const auto seed = static_cast<std::uint64_t>(round + 5);
    drop(0, round % 7, 1), add(0, 1, seed);
    drop(1, 11, round % 3), add(1, round % 3, 2 * seed);
    if (round == 9) drop(2, 3, 2, qkv::Shift::in_place);
    if (round == 11) paged[3].truncate(31), whole[3].truncate(31), add(3, 9, seed);
    if (round == 12) paged[2].clear(), whole[2].clear(), add(2, 40, seed);  // pages whose rows had turned
    if (round == 15) {  // a file begins anew, in pages whose rows had turned
      std::stringstream file;
      qkv::save_cache(file, paged[0]), qkv::save_cache(file, paged[0]);
      qkv::load_cache(file, paged[2]), qkv::load_cache(file, whole[2]);
      drop(2, 0, 2);
    }
    if (round == 20) paged[1] = paged[3].fork(), whole[1] = whole[3];
    drop(3, 8, round % 2), add(3, round % 2, seed);
    for (std::size_t s = 0; s < 4; ++s)
      REQUIRE(
          (same_bits(paged[s].latent(), whole[s].latent()) && same_bits(paged[s].rope_keys(), whole[s].rope_keys())));
  }
}

TEST_CASE("the owner of latent pages is asked before a sequence or a layer's call is refused", "[paged_latent_cache]") {
  const auto layer = latent_layer<float>(small_mla);
  LatentPagePool<float> pool(pages_for_small_mla(4, 4));
  PagedLatentCache<float> idle(pool), cache(pool);
  const Matrix<float> c = numbers<float>(12, 19, 1), r = numbers<float>(12, 6, 2), x = normals<float>(12, 29, 5);
  Index asked = 0;
  pool.on_exhausted([&](Index missing) { asked = missing, idle.clear(); });
  idle.append(c, r);
  CHECK(cache.try_append(c.topRows(8), r.topRows(8)));
  CHECK((asked == 1 && idle.rows() == 0 && cache.rows() == 8));
  cache.clear();
  idle.append(c, r);
  layer.forward(x, cache);
  CHECK((cache.rows() == 12 && idle.rows() == 0));
  CHECK(contains(message_of<std::length_error>([&] { layer.forward(x, cache); }), "at most 4 more rows"));
}

TEMPLATE_TEST_CASE("a pool of latent pages has the bytes that memory.hpp computes", "[paged_latent_cache]", float,
                   qkv::half, std::int8_t) {
  qkv::LatentAttentionConfig config = small_mla;
  LatentPagePool<TestType> pool(pages_for_small_mla(6, 9));
  CHECK(pool.bytes() == qkv::cache_bytes<TestType>(config, 54));
  PagedLatentCache<TestType> cache(pool);
  cache.append(numbers<float>(13, 19, 1), numbers<float>(13, 6, 2));
  CHECK(cache.bytes() == qkv::cache_bytes<TestType>(config, 18));
  const auto fork = cache.fork();
  CHECK(pool.used_bytes() == cache.bytes());
}

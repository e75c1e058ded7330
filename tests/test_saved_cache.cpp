#include "support/cache_rows.hpp"
#include "support/catch.hpp"
#include "support/storages.hpp"

#include <qkv/paged_latent_cache.hpp>
#include <qkv/saved_cache.hpp>

#include <cstdint>
#include <cstring>
#include <memory>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

using namespace qkv;
using support::contains;
using support::ids;
using support::message_of;
using support::numbers;

namespace {

template <class Cache>
std::string saved(const Cache& cache) {
  std::ostringstream out;
  save_cache(out, cache);
  return out.str();
}

/// The reason, or nothing and the cache loaded.
template <class Cache>
std::string why_not(const std::string& bytes, Cache& cache) {
  std::istringstream in(bytes);
  std::string why = "?";
  const bool loaded = try_load_cache(in, cache, &why);
  CHECK(loaded == why.empty());
  return why;
}

template <class Cache>
void append_numbers(Cache& cache, Index n, std::uint64_t seed) {
  cache.append(numbers<float>(n, cache.kv_heads() * cache.head_dim(), seed),
               numbers<float>(n, cache.kv_heads() * cache.v_head_dim(), seed + 1));
}
template <class Cache>
requires(detail::CacheFile::latent<Cache>) void append_numbers(Cache& cache, Index n, std::uint64_t seed) {
  cache.append(numbers<float>(n, cache.latent_dim(), seed), numbers<float>(n, cache.rope_dim(), seed + 1));
}

// One maker for each kind: an empty cache. The pool of a paged one lives as long as the maker.
template <class S>
struct Contiguous {
  KvCache<S> operator()() const { return KvCache<S>({.kv_heads = 2, .head_dim = 3, .v_head_dim = 5, .capacity = 12}); }
};
template <class S>
struct Growing {
  KvCache<S> operator()() const {
    return KvCache<S>({.kv_heads = 2, .head_dim = 3, .v_head_dim = 5, .capacity = 12, .block = 4});
  }
};
template <class S>
struct Ring {
  RingCache<S> operator()() const {
    return RingCache<S>({.kv_heads = 2, .head_dim = 3, .v_head_dim = 5, .window = 4, .pinned = 2, .slack = 3});
  }
};
template <class S>
struct Paged {
  std::shared_ptr<PagePool<S>> pool = std::make_shared<PagePool<S>>(
      PagePoolConfig{.kv_heads = 2, .head_dim = 3, .v_head_dim = 5, .page_tokens = 4, .pages = 18});
  PagedCache<S> operator()() const { return PagedCache<S>(*pool); }
};
template <class S>
struct Latent {
  LatentCache<S> operator()() const { return LatentCache<S>({.latent_dim = 7, .rope_dim = 3, .capacity = 12}); }
};

template <class S>
struct PagedLatent {
  std::shared_ptr<LatentPagePool<S>> pool = std::make_shared<LatentPagePool<S>>(
      LatentPagePoolConfig{.latent_dim = 7, .rope_dim = 3, .page_tokens = 5, .pages = 15});
  PagedLatentCache<S> operator()() const { return PagedLatentCache<S>(*pool, 12); }
};

template <class S, class F>
void for_each_kind(F&& f) {
  f(Contiguous<S>{}), f(Growing<S>{}), f(Ring<S>{}), f(Paged<S>{}), f(Latent<S>{}), f(PagedLatent<S>{});
}

/// What kernels see of two caches: the same positions and the same bits of every number and scale.
template <StorageType S>
bool same_rows(const KeyRows<S>& a, const KeyRows<S>& b) {
  const auto flat = [](const KeyRows<S>& all) {
    std::vector<unsigned char> bytes;
    const auto put = [&](const auto* p, Index n) {
      const auto* first = reinterpret_cast<const unsigned char*>(p);
      bytes.insert(bytes.end(), first, first + static_cast<std::size_t>(n) * sizeof *p);
    };
    for (const auto& run : all.runs)
      for (Index i = 0; i < run.rows; ++i) {
        const Index position = run.position + i;
        put(&position, 1);
        for (Index h = 0; h < all.kv_heads; ++h) {
          put(all.key(run, h, i), all.head_dim), put(all.value(run, h, i), all.v_head_dim);
          const float scales[] = {all.key_scale(run, h, i), all.value_scale(run, h, i)};
          put(scales, 2);
        }
      }
    return bytes;
  };
  return a.rows == b.rows && flat(a) == flat(b);
}
template <class Cache>
requires(!detail::CacheFile::latent<Cache>) bool same_content(const Cache& a, const Cache& b) {
  return a.position() == b.position() && same_rows(a.key_rows(), b.key_rows());
}
template <class A, class B>
requires(detail::CacheFile::latent<A>) bool same_content(const A& a, const B& b) {
  return a.rows() == b.rows() && support::same_bits(a.latent(), b.latent()) &&
         support::same_bits(a.rope_keys(), b.rope_keys());
}

std::string with_checksum(std::string head) {
  detail::Crc32c crc;
  crc.add(reinterpret_cast<const std::byte*>(head.data()), head.size());
  for (int i = 0; i < 4; ++i) head += static_cast<char>(crc.value() >> 8 * i & 255);
  return head;
}

}  // namespace

TEST_CASE("the checksum is CRC-32C") {
  const std::string text = "123456789";
  const auto* p = reinterpret_cast<const std::byte*>(text.data());
  detail::Crc32c whole, pieces;
  whole.add(p, 9);
  CHECK(whole.value() == 0xE3069283U);  // the check value of the catalogues
  for (std::size_t i = 0; i < 9; ++i) pieces.add(p + i, 1);
  CHECK(pieces.value() == whole.value());
  detail::Crc32c zeros;
  const std::vector<std::byte> thirty_two(32);
  zeros.add(thirty_two.data(), 32);
  CHECK(zeros.value() == 0x8A9136AAU);  // RFC 3720, appendix B.4
}

TEMPLATE_LIST_TEST_CASE("a cache comes back from a stream with the same bits, and goes on", "", support::AllStorages) {
  for_each_kind<TestType>([](const auto& make) {
    for (const Index n : {0, 1, 2, 5, 8, 11, 12, 30}) {
      auto cache = make(), back = make();
      for (Index i = 0; i < n && cache.max_append() > 0; ++i)
        append_numbers(cache, 1, static_cast<std::uint64_t>(10 * i));
      if (n == 30 && cache.position() == 30) cache.truncate(28);  // a wrapped ring that has gone back
      append_numbers(back, 3, 77);
      REQUIRE(why_not(saved(cache), back).empty());
      REQUIRE(same_content(cache, back));
      REQUIRE(cache.max_append() == back.max_append());
      if (cache.max_append() == 0) continue;
      append_numbers(cache, 1, 5), append_numbers(back, 1, 5);
      REQUIRE(same_content(cache, back));
      const Index to = cache.position() - 1;
      cache.truncate(to), back.truncate(to);
      REQUIRE(same_content(cache, back));
    }
  });
}

TEST_CASE("NaN, its payload, infinities and -0 come back as they were") {
  KvCache<float> cache({.head_dim = 5, .capacity = 3}), back = cache;
  Matrix<float> k = numbers<float>(2, 5, 1);
  const std::uint32_t bits = 0xFFC12345U;
  std::memcpy(&k(0, 2), &bits, 4);
  k(0, 3) = -std::numeric_limits<float>::infinity();
  k(1, 0) = -0.0F;
  cache.append(k, k);
  REQUIRE(why_not(saved(cache), back).empty());
  REQUIRE(same_content(cache, back));
  REQUIRE(std::memcmp(back.key_rows().runs[0].keys, k.data(), 40) == 0);
}

TEMPLATE_TEST_CASE("a saved cache cut at any byte, or with any byte altered, is refused and changes nothing", "", half,
                   std::int8_t) {
  for_each_kind<TestType>([](const auto& make) {
    auto cache = make(), target = make();
    for (Index i = 0; i < 11; ++i) append_numbers(cache, 1, static_cast<std::uint64_t>(i));
    append_numbers(target, 2, 50);
    auto expected = make();
    append_numbers(expected, 2, 50);
    const std::string good = saved(cache);
    for (std::size_t cut = 0; cut < good.size(); ++cut) {
      const std::string why = why_not(good.substr(0, cut), target);
      if (why.empty() || !same_content(target, expected)) FAIL("cut at " << cut << ": " << why);
    }
    for (std::size_t at = 0; at < good.size(); ++at)
      for (const int change : {0x01, 0x80, 0xFF}) {
        std::string bad = good;
        bad[at] = static_cast<char>(bad[at] ^ change);
        const std::string why = why_not(bad, target);
        if (why.empty() || !same_content(target, expected)) FAIL("byte " << at << " ^ " << change << ": " << why);
      }
    REQUIRE(why_not(good, target).empty());
    REQUIRE(same_content(target, cache));
  });
}

TEST_CASE("contiguous and paged caches read each other's files, whatever their blocks and capacity") {
  PagePool<half> pool({.kv_heads = 2, .head_dim = 3, .v_head_dim = 5, .page_tokens = 5, .pages = 4});
  PagedCache<half> paged(pool);
  auto contiguous = Contiguous<half>{}(), growing = Growing<half>{}();
  append_numbers(contiguous, 11, 1);
  REQUIRE(why_not(saved(contiguous), paged).empty());
  REQUIRE(same_rows(paged.key_rows(), contiguous.key_rows()));
  REQUIRE(pool.free_pages() == 1);
  REQUIRE(why_not(saved(paged), growing).empty());
  REQUIRE(same_rows(growing.key_rows(), contiguous.key_rows()));
  REQUIRE(saved(growing) == saved(paged));  // the file knows nothing of blocks

  auto latent = Latent<half>{}();
  const PagedLatent<half> pages;
  auto paged_latent = pages();
  append_numbers(latent, 11, 1);
  REQUIRE(why_not(saved(latent), paged_latent).empty());
  REQUIRE(same_content(latent, paged_latent));
  REQUIRE(saved(paged_latent) == saved(latent));
}

TEST_CASE("another kind, storage, shape, ring or capacity is refused in words") {
  auto contiguous = Contiguous<float>{}();
  auto ring = Ring<float>{}();
  auto latent = Latent<float>{}();
  auto halves = Contiguous<half>{}();
  append_numbers(contiguous, 9, 1), append_numbers(ring, 9, 2), append_numbers(latent, 9, 3);
  const std::string contiguous_before = saved(contiguous), ring_before = saved(ring), latent_before = saved(latent);
  CHECK(contains(why_not(ring_before, contiguous), "of kind 2, this cache of kind 1"));
  CHECK(contains(why_not(contiguous_before, ring), "of kind 1, this cache of kind 2"));
  CHECK(contains(why_not(latent_before, contiguous), "of kind 3, this cache of kind 1"));
  CHECK(contains(why_not(contiguous_before, latent), "of kind 1, this cache of kind 3"));
  CHECK(contains(why_not(contiguous_before, halves), "storage f32, this cache f16"));

  KvCache<float> narrow({.kv_heads = 2, .head_dim = 3, .v_head_dim = 4, .capacity = 12});
  CHECK(contains(why_not(contiguous_before, narrow), "[2, 3, 5], this cache [2, 3, 4]"));
  RingCache<float> longer({.kv_heads = 2, .head_dim = 3, .v_head_dim = 5, .window = 5, .pinned = 2, .slack = 3});
  CHECK(contains(why_not(ring_before, longer), "[4, 2, 3], this cache [5, 2, 3]"));
  RingCache<float> counting({.kv_heads = 2,
                             .head_dim = 3,
                             .v_head_dim = 5,
                             .window = 4,
                             .pinned = 2,
                             .slack = 3,
                             .positions_in_cache = true});
  CHECK(contains(why_not(ring_before, counting), "of kind 2, this cache of kind 4"));
  append_numbers(counting, 9, 4);
  CHECK(contains(why_not(saved(counting), ring), "of kind 4, this cache of kind 2"));
  CHECK(why_not(saved(counting), counting).empty());
  KvCache<float> small({.kv_heads = 2, .head_dim = 3, .v_head_dim = 5, .capacity = 8});
  CHECK(contains(why_not(contiguous_before, small),
                 "9 rows up to position 9, which do not fit this cache of capacity 8"));
  LatentCache<float> small_latent({.latent_dim = 7, .rope_dim = 3, .capacity = 8});
  CHECK(contains(why_not(latent_before, small_latent), "9 rows"));

  CHECK(contains(why_not("GGUF and more", contiguous), "does not begin with \"qkvcache\""));
  CHECK(contains(why_not("", contiguous), "the stream is at its end"));
  CHECK(contains(why_not(contiguous_before.substr(0, 50), contiguous), "ends inside its header, after 50 bytes"));
  CHECK(contains(why_not(contiguous_before.substr(0, 100), contiguous), "ends after 12 of the 580 bytes"));
  std::string newer = contiguous_before.substr(0, 84);
  newer[8] = 2;
  CHECK(contains(why_not(with_checksum(newer), contiguous), "version 2 of the format; this program reads version 1"));
  std::istringstream in(ring_before);
  CHECK(contains(message_of<std::runtime_error>([&] { load_cache(in, contiguous); }), "of kind 2"));
  CHECK(saved(contiguous) == contiguous_before);
  CHECK(saved(ring) == ring_before);
  CHECK(saved(latent) == latent_before);
  CHECK(halves.rows() + narrow.rows() + longer.rows() + small.rows() == 0);
}

TEST_CASE("a header that promises absurd sizes, under a right checksum, allocates nothing for them") {
  KvCache<float> growing({.kv_heads = 2, .head_dim = 3, .v_head_dim = 5, .capacity = Index{1} << 59, .block = 4});
  append_numbers(growing, 3, 1);
  const std::string before = saved(growing);
  const auto with_place = [&](Index position, Index rows) {
    std::string head = before.substr(0, 84);
    std::memcpy(head.data() + 68, &position, 8);
    std::memcpy(head.data() + 76, &rows, 8);
    return with_checksum(head) + std::string(200, 'x');
  };
  if constexpr (std::endian::native == std::endian::little) {
    CHECK(contains(why_not(with_place(Index{1} << 50, Index{1} << 50), growing), "ends after 200 of the"));
    CHECK(contains(why_not(with_place(Index{1} << 59, Index{1} << 59), growing), "do not fit"));  // in bytes
    for (const Index n : {Index{-1}, Index{1} << 62, std::numeric_limits<Index>::min()})
      CHECK(contains(why_not(with_place(n, n), growing), "do not fit"));
    CHECK(contains(why_not(with_place(4, 3), growing), "do not fit"));
  }
  CHECK(saved(growing) == before);
  CHECK(growing.bytes() == 4 * 2 * (3 + 5) * 4);
}

TEST_CASE("a ring's file with rows that no ring of its sizes can hold is refused") {
  auto ring = Ring<half>{}();  // window 4, pinned 2, slack 3
  for (Index i = 0; i < 20; ++i) append_numbers(ring, 1, static_cast<std::uint64_t>(i));
  const std::string before = saved(ring);
  const auto refused = [&](Index position, Index rows) {
    std::string head = before.substr(0, 84);
    std::memcpy(head.data() + 68, &position, 8);
    std::memcpy(head.data() + 76, &rows, 8);
    return contains(why_not(with_checksum(head) + std::string(2000, 'x'), ring), "do not fit");
  };
  constexpr Index most = std::numeric_limits<Index>::max();
  if constexpr (std::endian::native == std::endian::little) {
    CHECK(refused(20, 10));  // more than its capacity
    CHECK(refused(20, 5));   // less than its window
    CHECK(refused(1, 2));
    CHECK(refused(2, 1));
    CHECK(refused(0, -1));
    CHECK(refused(-1, 0));
    CHECK(refused(most, 9));
    CHECK(refused(9, most));
    CHECK(refused(6, 5));
  }
  CHECK(saved(ring) == before);
}

TEST_CASE("caches follow one another in a stream: one per layer") {
  std::stringstream stream;
  auto a = Contiguous<std::int8_t>{}();
  auto b = Ring<float>{}();
  auto c = Latent<half>{}();
  append_numbers(a, 7, 1), append_numbers(b, 8, 2), append_numbers(c, 9, 3);
  save_cache(stream, a), save_cache(stream, b), save_cache(stream, c);
  auto a2 = Contiguous<std::int8_t>{}();
  auto b2 = Ring<float>{}();
  auto c2 = Latent<half>{}();
  load_cache(stream, a2), load_cache(stream, b2), load_cache(stream, c2);
  CHECK(same_content(a, a2));
  CHECK(same_content(b, b2));
  CHECK(same_content(c, c2));
  CHECK(stream.peek() == std::stringstream::traits_type::eof());
}

TEST_CASE("a paged sequence loads into its own pages, and needs room for all of them") {
  PagePool<float> pool({.kv_heads = 2, .head_dim = 3, .v_head_dim = 5, .page_tokens = 4, .pages = 4});
  PagedCache<float> a(pool), b(pool);
  auto file = Contiguous<float>{}();
  append_numbers(file, 12, 1);
  append_numbers(a, 7, 2);  // two pages
  append_numbers(b, 5, 3);  // two pages
  PagedCache<float> fork = a.fork();
  const std::string a_before = saved(a), b_before = saved(b);
  CHECK(contains(why_not(saved(file), a), "do not fit"));  // three pages, none free, none of its own alone
  CHECK(saved(a) == a_before);
  CHECK(saved(fork) == a_before);
  b.clear();
  CHECK(contains(why_not(saved(file), a), "do not fit"));  // two free
  fork.clear();
  CHECK(why_not(saved(file), a).empty());  // two free and two of its own
  CHECK(same_rows(a.key_rows(), file.key_rows()));
  CHECK(pool.free_pages() == 1);
}

TEST_CASE("nobody gives up pages for a file that is damaged") {
  PagePool<float> pool({.kv_heads = 2, .head_dim = 3, .v_head_dim = 5, .page_tokens = 4, .pages = 4});
  PagedCache<float> a(pool), idle(pool);
  append_numbers(idle, 13, 1);
  pool.on_exhausted([&](Index) { idle.clear(); });
  auto file = Contiguous<float>{}();
  append_numbers(file, 7, 2);
  std::string bytes = saved(file);
  CHECK(contains(why_not(bytes.substr(0, bytes.size() - 5), a), "ends after"));
  bytes.back() = static_cast<char>(bytes.back() ^ 1);
  CHECK(contains(why_not(bytes, a), "damaged rows"));
  CHECK(idle.rows() == 13);
  CHECK(why_not(saved(file), a).empty());
  CHECK((idle.rows() == 0 && a.rows() == 7));
}

TEST_CASE("a stream that takes no more is an error, one that throws leaves the cache alone") {
  auto cache = Contiguous<float>{}();
  append_numbers(cache, 5, 1);
  std::ostringstream out;
  out.setstate(std::ios::badbit);
  CHECK_FALSE(try_save_cache(out, cache));
  CHECK(contains(message_of<std::runtime_error>([&] { save_cache(out, cache); }), "did not take"));
  const std::string before = saved(cache);
  std::istringstream in(before.substr(0, 120));
  in.exceptions(std::ios::failbit | std::ios::eofbit);
  CHECK_THROWS_AS(load_cache(in, cache), std::ios_base::failure);
  CHECK(saved(cache) == before);
}

TEST_CASE("what was moved from can be saved and loaded: nothing, into nothing") {
  auto cache = Contiguous<float>{}();
  const auto moved = std::move(cache);
  const std::string nothing = saved(cache);
  CHECK(why_not(nothing, cache).empty());
  auto other = Contiguous<float>{}();
  CHECK(contains(why_not(nothing, other), "[1, 0, 0], this cache [2, 3, 5]"));
}

TEST_CASE("the format is fixed: these bytes are version 1") {
  KvCache<std::int8_t> cache({.kv_heads = 1, .head_dim = 2, .v_head_dim = 1, .capacity = 4});
  cache.append((Matrix<float>(1, 2) << 254, -2).finished(), Matrix<float>::Constant(1, 1, -127));
  const unsigned char expected[] = {
      'q', 'k', 'v', 'c', 'a', 'c', 'h', 'e', 1, 0, 0, 0, 1, 0, 0, 0, 5, 0, 0, 0,  // magic, version, kind, storage
      1,   0,   0,   0,   0,   0,   0,   0,   2, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0,  // shape
      0,   0,   0,   0,   0,   0,   0,   0,   0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,  // no ring
      1,   0,   0,   0,   0,   0,   0,   0,   1, 0, 0, 0, 0, 0, 0, 0};                         // position, rows
  const std::string bytes = saved(cache);
  REQUIRE(bytes.size() == 88 + 3 + 8 + 4);
  CHECK(std::memcmp(bytes.data(), expected, sizeof expected) == 0);
  const unsigned char row[] = {127, 255, 129, 0, 0, 0, 64, 0, 0, 128, 63};  // 127 -1 | -127 | 2.0F 1.0F
  CHECK(std::memcmp(bytes.data() + 88, row, sizeof row) == 0);
}

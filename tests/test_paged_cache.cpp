#include "support/allocations.hpp"
#include "support/cache_rows.hpp"
#include "support/catch.hpp"
#include "support/storages.hpp"

#include <qkv/memory.hpp>
#include <qkv/paged_cache.hpp>
#include <qkv/paged_latent_cache.hpp>
#include <qkv/saved_cache.hpp>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <utility>
#include <vector>

#if __has_include(<sys/wait.h>)
#include <sys/wait.h>
#include <unistd.h>
#endif

using namespace qkv;
using support::append_ids;
using support::contains;
using support::HeldRow;
using support::holds;
using support::ids;
using support::message_of;
using support::rows_until;

namespace {

constexpr PagePoolConfig sizes{.kv_heads = 3, .head_dim = 5, .v_head_dim = 7, .page_tokens = 4, .pages = 6};

template <class S>
std::vector<Index> table(const PagedCache<S>& cache) {
  return {cache.pages().begin(), cache.pages().end()};
}

}  // namespace

TEMPLATE_TEST_CASE("a sequence takes a page when it needs one, and gives all back at its end", "", float, double, half,
                   bfloat16, std::int8_t) {
  PagePool<TestType> pool(sizes);
  {
    PagedCache<TestType> cache(pool);
    REQUIRE(cache.capacity() == 24);
    for (Index n = 1; n <= 11; ++n) {
      append_ids(cache, ids(n - 1, n));
      REQUIRE(pool.free_pages() == 6 - (n + 3) / 4);
      REQUIRE(holds(cache.key_rows(), rows_until(n)));
      REQUIRE(cache.key_rows().runs.size() == static_cast<std::size_t>((n + 3) / 4));
    }
    REQUIRE(pool.used_bytes() == 3 * pool.page_bytes());
    REQUIRE(cache.bytes() == pool.used_bytes());
    cache.truncate(8);
    REQUIRE(pool.free_pages() == 4);
    cache.truncate(5);
    REQUIRE(pool.free_pages() == 4);
    append_ids(cache, ids(5, 16));
    REQUIRE(holds(cache.key_rows(), rows_until(16)));
    REQUIRE(support::max_error(cache.values(), support::cache_rows<float>(ids(0, 16), 3, 7, true)) == 0);
    cache.clear();
    REQUIRE(pool.free_pages() == 6);
    append_ids(cache, ids(0, 3));
  }
  REQUIRE(pool.free_pages() == 6);
}

TEST_CASE("two sequences of one pool interleave and do not see each other") {
  PagePool<float> pool(sizes);
  PagedCache<float> a(pool), b(pool);
  for (Index n = 0; n < 11; ++n) {
    append_ids(a, ids(n, n + 1));
    append_ids(b, {100 + n});
  }
  std::vector<HeldRow> b_rows;
  for (Index n = 0; n < 11; ++n) b_rows.push_back({n, 100 + n});
  REQUIRE(holds(a.key_rows(), rows_until(11)));
  REQUIRE(holds(b.key_rows(), b_rows));
  REQUIRE(table(a) == std::vector<Index>{0, 2, 4});
}

TEST_CASE("an exhausted pool is an error that names the numbers and changes nothing") {
  PagePool<float> pool(sizes);
  PagedCache<float> a(pool), b(pool);
  append_ids(a, ids(0, 13));
  append_ids(b, ids(0, 6));
  REQUIRE(pool.free_pages() == 0);
  REQUIRE(a.max_append() == 3);
  REQUIRE(b.max_append() == 2);
  const auto pages = table(b);
  const std::string message = message_of<std::length_error>([&] { append_ids(b, ids(6, 9)); });
  for (const char* part : {"rows held 6", "at most 2", "given 3"}) REQUIRE(contains(message, part));
  REQUIRE_FALSE(support::try_append_ids(b, ids(6, 9)));
  REQUIRE(table(b) == pages);
  REQUIRE(holds(b.key_rows(), rows_until(6)));
  REQUIRE_THROWS_AS(pool.acquire(), std::length_error);
  a.truncate(12);
  append_ids(b, ids(6, 9));
  REQUIRE(holds(b.key_rows(), rows_until(9)));
  REQUIRE(holds(a.key_rows(), rows_until(12)));
}

TEST_CASE("a sequence's own capacity is a limit too") {
  PagePool<float> pool(sizes);
  PagedCache<float> cache(pool, 6);
  append_ids(cache, ids(0, 5));
  REQUIRE(cache.max_append() == 1);
  REQUIRE_THROWS_AS(append_ids(cache, ids(5, 7)), std::length_error);
  append_ids(cache, ids(5, 6));
  REQUIRE(holds(cache.key_rows(), rows_until(6)));
  REQUIRE_THROWS_AS(PagedCache<float>(pool, 0), std::invalid_argument);
  REQUIRE_THROWS_AS(PagedCache<float>(pool, 25), std::invalid_argument);
}

TEMPLATE_TEST_CASE("forks share pages, each counted once, and copy only the page they write into", "", float,
                   std::int8_t) {
  PagePool<TestType> pool(sizes);
  PagedCache<TestType> parent(pool);
  append_ids(parent, ids(0, 6));
  std::optional<PagedCache<TestType>> child = parent.fork();
  REQUIRE(table(*child) == table(parent));
  REQUIRE(pool.free_pages() == 4);
  REQUIRE(pool.used_bytes() == 2 * pool.page_bytes());
  REQUIRE(pool.references(table(parent)[1]) == 2);

  append_ids(*child, {100});  // copies page 1
  REQUIRE(table(*child)[0] == table(parent)[0]);
  REQUIRE(table(*child)[1] != table(parent)[1]);
  REQUIRE(pool.free_pages() == 3);
  append_ids(parent, {6});  // page 1 is its own again: no copy
  REQUIRE(pool.free_pages() == 3);
  REQUIRE(holds(parent.key_rows(), rows_until(7)));
  auto child_rows = rows_until(6);
  child_rows.push_back({6, 100});
  REQUIRE(holds(child->key_rows(), child_rows));

  PagedCache<TestType> grandchild = child->fork(3);  // a prefix inside a page
  REQUIRE(holds(grandchild.key_rows(), rows_until(3)));
  REQUIRE(pool.references(table(parent)[0]) == 3);
  append_ids(grandchild, {300, 301});
  REQUIRE(holds(grandchild.key_rows(), {{0, 0}, {1, 1}, {2, 2}, {3, 300}, {4, 301}}));
  REQUIRE(pool.references(table(parent)[0]) == 2);
  child.reset();
  REQUIRE(pool.references(table(parent)[0]) == 1);
  parent.clear();
  REQUIRE(holds(grandchild.key_rows(), {{0, 0}, {1, 1}, {2, 2}, {3, 300}, {4, 301}}));
  REQUIRE(pool.free_pages() == 4);
  REQUIRE_THROWS_AS(grandchild.fork(6), std::out_of_range);
  REQUIRE_THROWS_AS(grandchild.fork(-1), std::out_of_range);
  REQUIRE(grandchild.fork(0).rows() == 0);
}

TEST_CASE("a fork at a page border shares whole pages and copies none") {
  PagePool<float> pool(sizes);
  PagedCache<float> parent(pool);
  append_ids(parent, ids(0, 8));
  PagedCache<float> child = parent.fork();
  append_ids(child, {100});
  append_ids(parent, {8});
  REQUIRE(pool.free_pages() == 2);
  REQUIRE(table(child)[1] == table(parent)[1]);
  REQUIRE(holds(parent.key_rows(), rows_until(9)));
}

TEST_CASE("a shared last page costs a page before a row can be appended") {
  PagePool<float> pool({.kv_heads = 3, .head_dim = 5, .v_head_dim = 7, .page_tokens = 4, .pages = 2});
  PagedCache<float> parent(pool);
  append_ids(parent, ids(0, 6));
  REQUIRE(parent.max_append() == 2);
  std::optional<PagedCache<float>> child = parent.fork();
  REQUIRE(parent.max_append() == 0);
  REQUIRE_FALSE(support::try_append_ids(parent, {1}));
  REQUIRE_THROWS_AS(append_ids(*child, {1}), std::length_error);
  REQUIRE_THROWS_AS(support::scatter_ids(*child, 0, {1}), std::length_error);
  REQUIRE(support::try_append_ids(parent, {}));
  REQUIRE(holds(child->key_rows(), rows_until(6)));
  child->truncate(4);
  REQUIRE(parent.max_append() == 2);
  append_ids(parent, ids(6, 8));
  REQUIRE(holds(parent.key_rows(), rows_until(8)));
  REQUIRE(holds(child->key_rows(), rows_until(4)));
}

TEST_CASE("overwriting a shared page leaves the other reader's rows alone") {
  PagePool<float> pool(sizes);
  PagedCache<float> parent(pool);
  append_ids(parent, ids(0, 10));
  PagedCache<float> child = parent.fork(9);
  support::scatter_ids(child, 3, {100, 101, 102});  // two pages
  REQUIRE(pool.free_pages() == 1);
  REQUIRE(holds(parent.key_rows(), rows_until(10)));
  REQUIRE(holds(child.key_rows(), {{0, 0}, {1, 1}, {2, 2}, {3, 100}, {4, 101}, {5, 102}, {6, 6}, {7, 7}, {8, 8}}));
  REQUIRE_THROWS_AS(support::scatter_ids(child, 10, {1}), std::out_of_range);
  REQUIRE_THROWS_AS(support::scatter_ids(child, -1, {1}), std::out_of_range);
  REQUIRE_THROWS_AS(child.append(Matrix<float>(1, 14), Matrix<float>(1, 21)), std::invalid_argument);
}

TEST_CASE("rewinding a sequence that shares its pages does not touch the other") {
  PagePool<float> pool(sizes);
  PagedCache<float> parent(pool);
  append_ids(parent, ids(0, 7));
  PagedCache<float> child = parent.fork();
  parent.truncate(5);
  append_ids(parent, {200});
  REQUIRE(holds(child.key_rows(), rows_until(7)));
  REQUIRE(holds(parent.key_rows(), {{0, 0}, {1, 1}, {2, 2}, {3, 3}, {4, 4}, {5, 200}}));
  REQUIRE_THROWS_AS(parent.truncate(7), std::out_of_range);
  REQUIRE_FALSE(parent.try_truncate(-1));
}

TEST_CASE("an exhausted pool asks its owner, who may give up other sequences") {
  PagePool<float> pool(sizes);  // 6 pages of 4 rows
  std::vector<PagedCache<float>> idle;
  std::vector<Index> asked;
  for (Index i = 0; i < 3; ++i) {
    idle.emplace_back(pool);
    append_ids(idle.back(), ids(10 * i, 10 * i + 5));  // two pages each
  }
  PagedCache<float> cache(pool);
  REQUIRE_FALSE(support::try_append_ids(cache, {0}));
  pool.on_exhausted([&](Index missing) {
    asked.push_back(missing);
    if (!idle.empty()) idle.pop_back();
  });
  append_ids(cache, ids(0, 3));
  REQUIRE(asked == std::vector<Index>{1});
  REQUIRE(pool.free_pages() == 1);
  append_ids(cache, ids(3, 16));  // three pages more, one is free: asked until it fits
  REQUIRE(asked == std::vector<Index>{1, 2});
  REQUIRE(support::try_append_ids(cache, ids(16, 24)));
  REQUIRE(asked == std::vector<Index>{1, 2, 2});
  REQUIRE(idle.empty());
  REQUIRE(holds(cache.key_rows(), rows_until(24)));
  // Where its own capacity is the limit nobody is asked.
  REQUIRE_FALSE(support::try_append_ids(cache, {24}));
  REQUIRE(asked.size() == 3);
  // Asking in vain is an error that changes nothing.
  const PagedCache<float> fork = cache.fork();
  REQUIRE_THROWS_AS(support::scatter_ids(cache, 2, {100}), std::length_error);
  REQUIRE(asked == std::vector<Index>{1, 2, 2, 1});
  REQUIRE_FALSE(pool.try_acquire().has_value());
  REQUIRE_THROWS_AS(pool.acquire(), std::length_error);
  REQUIRE(holds(cache.key_rows(), rows_until(24)));
  REQUIRE(holds(fork.key_rows(), rows_until(24)));
  pool.on_exhausted({});
  REQUIRE_FALSE(pool.try_acquire().has_value());
  REQUIRE(asked.size() == 6);
}

TEST_CASE("an owner who gives a page at a time is asked again while that helps") {
  PagePool<float> pool({.kv_heads = 3, .head_dim = 5, .v_head_dim = 7, .page_tokens = 4, .pages = 3});
  Index missing = 3, least = 0;
  std::vector<Index> asked;
  pool.on_exhausted([&](Index some) {
    asked.push_back(some);
    if (missing > least) --missing;
  });
  REQUIRE(pool.make_room([&] { return missing; }));
  REQUIRE(asked == std::vector<Index>{3, 2, 1});
  missing = 3, least = 2;
  REQUIRE_FALSE(pool.make_room([&] { return missing; }));
  REQUIRE(asked == std::vector<Index>{3, 2, 1, 3, 2});
}

TEST_CASE("an owner may free the other reader of a page, ask the pool itself, or raise") {
  PagePool<float> pool({.kv_heads = 3, .head_dim = 5, .v_head_dim = 7, .page_tokens = 4, .pages = 2});
  PagedCache<float> cache(pool), late(pool);
  append_ids(cache, ids(0, 6));
  std::optional<PagedCache<float>> reader = cache.fork();
  bool raise = true, nested = false;
  pool.on_exhausted([&](Index) {
    if (raise) throw std::runtime_error("the owner");
    nested = support::try_append_ids(late, {7});  // inside: nobody is asked again
    reader.reset();                               // no page comes free, but nobody shares the last one any more
  });
  REQUIRE(message_of<std::runtime_error>([&] { append_ids(cache, {6}); }) == "the owner");
  REQUIRE(holds(cache.key_rows(), rows_until(6)));
  raise = false;
  append_ids(cache, {6});
  REQUIRE_FALSE(nested);
  REQUIRE(holds(cache.key_rows(), rows_until(7)));
  REQUIRE(pool.free_pages() == 0);
}

namespace {

const char* const busy_rule =
    "a sequence stays as it is while a call about it asks for pages: on_exhausted may give up others only";

/// n rows of numbers, of either kind of sequence, at the end or from a position on.
struct Rows {
  Matrix<float> a, b;

  template <class Cache>
  static Rows of(const Cache& cache, Index n) {
    if constexpr (requires { cache.latent_dim(); })
      return {support::numbers<float>(n, cache.latent_dim(), 1), support::numbers<float>(n, cache.rope_dim(), 2)};
    else
      return {support::numbers<float>(n, 15, 1), support::numbers<float>(n, 21, 2)};
  }
};

template <class Cache>
std::string bytes_of(const Cache& cache) {
  std::ostringstream out;
  save_cache(out, cache);
  for (const Index page : cache.pages()) out << ' ' << page << ':' << cache.pool()->references(page);
  return out.str();
}

using Step = std::function<void()>;

/// All that changes a sequence, and may throw: `asks` is one step that needs a page, the others would change `cache`.
template <class Cache>
void refuses_while_it_asks(Cache& cache, Cache& idle, auto& pool, const std::vector<Step>& asking,
                           const std::vector<Step>& changing) {
  const std::string before = bytes_of(cache), idle_before = bytes_of(idle);
  for (const Step& asks : asking)
    for (const Step& changes : changing) {
      pool.on_exhausted([&](Index) { changes(); });
      REQUIRE(message_of<std::logic_error>(asks) == busy_rule);  // out of the owner, and out of who asked
      REQUIRE((bytes_of(cache) == before));
      // An owner who takes the error himself may go on.
      Index refused = 0;
      pool.on_exhausted([&](Index) { refused += message_of<std::logic_error>(changes) == busy_rule ? 1 : 0; });
      REQUIRE_THROWS_AS(asks(), std::length_error);
      REQUIRE(refused == 1);
      REQUIRE((bytes_of(cache) == before));
      REQUIRE((bytes_of(idle) == idle_before));
    }
  pool.on_exhausted([&](Index) { idle.clear(); });
  asking.front()();
  REQUIRE(cache.rows() > 6);
  cache.clear();  // not busy any more
}

}  // namespace

TEST_CASE("a sequence that asks for pages refuses to be changed by whom it asks") {
  PagePool<float> pool({.kv_heads = 3, .head_dim = 5, .v_head_dim = 7, .page_tokens = 4, .pages = 4});
  PagedCache<float> cache(pool), idle(pool);
  append_ids(cache, ids(0, 6)), append_ids(idle, ids(0, 7));
  std::ostringstream file;
  save_cache(file, idle);
  std::istringstream in;
  const auto load = [&] { in = std::istringstream(file.str()), load_cache(in, cache); };
  const Rows rows = Rows::of(cache, 5), one = Rows::of(cache, 1);
  refuses_while_it_asks(cache, idle, pool,
                        {[&] { cache.append(rows.a, rows.b); }, [&] { cache.scatter_rows(5, rows.a, rows.b); },
                         [&] {
                           if (!cache.try_append(rows.a, rows.b)) throw std::length_error("no room");
                         }},
                        {[&] { cache.clear(); }, [&] { cache.truncate(2); }, [&] { (void)cache.try_truncate(2); },
                         [&] { cache.append(one.a, one.b); }, [&] { (void)cache.try_append(one.a, one.b); },
                         [&] { cache.scatter_rows(1, one.a, one.b); }, load});

  LatentPagePool<float> latents({.latent_dim = 3, .rope_dim = 2, .page_tokens = 4, .pages = 4});
  PagedLatentCache<float> latent(latents), other(latents);
  const Rows c = Rows::of(latent, 6), few = Rows::of(latent, 5), last = Rows::of(latent, 1);
  latent.append(c.a, c.b), other.append(c.a, c.b);
  const Rope<float> rope({.pairing = Pairing::interleaved}, 2);
  refuses_while_it_asks(latent, other, latents,
                        {[&] { latent.append(few.a, few.b); },
                         [&] {
                           if (!latent.try_append(few.a, few.b)) throw std::length_error("no room");
                         }},
                        {[&] { latent.clear(); }, [&] { latent.truncate(2); }, [&] { (void)latent.try_truncate(2); },
                         [&] { latent.append(last.a, last.b); }, [&] { (void)latent.try_append(last.a, last.b); },
                         [&] { latent.drop_rows(0, 2, rope); }, [&] { latent.drop_rows(4, 2, rope); }});

  // A shift asks for the pages that a fork still reads.
  const Rows all = Rows::of(latent, 7);
  latent.clear(), other.clear();
  latent.append(all.a, all.b);
  PagedLatentCache<float> fork = latent.fork(), filler(latents);
  filler.append(all.a, all.b);
  const std::string before = bytes_of(latent);
  latents.on_exhausted([&](Index) { latent.truncate(1); });
  REQUIRE(message_of<std::logic_error>([&] { latent.drop_rows(0, 2, rope); }) == busy_rule);
  REQUIRE((bytes_of(latent) == before));
  latents.on_exhausted([&](Index) { fork.clear(); });
  latent.drop_rows(0, 2, rope);
  REQUIRE(latent.rows() == 5);
}

TEST_CASE("on_exhausted is not replaced from inside itself") {
  PagePool<float> pool({.kv_heads = 3, .head_dim = 5, .v_head_dim = 7, .page_tokens = 4, .pages = 1});
  PagedCache<float> cache(pool), idle(pool);
  append_ids(idle, ids(0, 1));
  std::vector<Index> captured(100, 7);  // on the heap: gone with the function that runs, were it replaced
  pool.on_exhausted([&, captured](Index) {
    pool.on_exhausted({});
    REQUIRE(captured[50] == 7);
  });
  REQUIRE(contains(message_of<std::logic_error>([&] { append_ids(cache, ids(0, 1)); }), "from inside itself"));
  REQUIRE(cache.rows() == 0);
  pool.on_exhausted([&](Index) { idle.clear(); });
  append_ids(cache, ids(0, 1));
}

TEST_CASE("a tree of forks keeps a shared prefix once, and gives it back with the last that reads it") {
  PagePool<float> pool({.kv_heads = 3, .head_dim = 5, .v_head_dim = 7, .page_tokens = 4, .pages = 40});
  std::vector<PagedCache<float>> tree;
  std::vector<std::vector<HeldRow>> expected;
  tree.emplace_back(pool);
  append_ids(tree[0], ids(0, 10));
  expected.push_back(rows_until(10));
  for (Index i = 1; i < 13; ++i) {  // three children each: of the whole, of a page border, of the middle of a page
    const auto parent = static_cast<std::size_t>((i - 1) / 3);
    const Index at = i % 3 == 1 ? tree[parent].rows() : i % 3 == 2 ? 8 : 6;
    tree.push_back(tree[parent].fork(at));
    expected.push_back({expected[parent].begin(), expected[parent].begin() + at});
    append_ids(tree.back(), {1000 * i, 1000 * i + 1});
    for (const Index id : {1000 * i, 1000 * i + 1})
      expected.back().push_back({static_cast<Index>(expected.back().size()), id});
  }
  REQUIRE(pool.references(tree[0].pages()[0]) == 13);
  for (std::size_t i = 0; i < tree.size(); ++i) REQUIRE(holds(tree[i].key_rows(), expected[i]));
  const Index prefix_page = tree[0].pages()[0];
  while (tree.size() > 1) {
    tree.erase(tree.begin() + static_cast<std::ptrdiff_t>(tree.size() / 2));
    expected.erase(expected.begin() + static_cast<std::ptrdiff_t>(expected.size() / 2));
    for (std::size_t i = 0; i < tree.size(); ++i) REQUIRE(holds(tree[i].key_rows(), expected[i]));
    REQUIRE(pool.references(prefix_page) == static_cast<Index>(tree.size()));
  }
  tree.clear();
  REQUIRE(pool.free_pages() == 40);
}

TEST_CASE("unknown and free pages are errors") {
  PagePool<float> pool(sizes);
  REQUIRE_THROWS_AS(pool.references(6), std::out_of_range);
  REQUIRE_THROWS_AS(pool.references(-1), std::out_of_range);
  REQUIRE_THROWS_AS(pool.retain(6), std::out_of_range);
  REQUIRE(contains(message_of<std::out_of_range>([&] { pool.release(6); }), "given page 6"));
  REQUIRE(contains(message_of<std::out_of_range>([&] { pool.release(2); }), "page 2 of the pool is free"));
  REQUIRE_THROWS_AS(pool.retain(2), std::out_of_range);
  const Index page = pool.acquire();
  pool.retain(page);
  pool.release(page);
  REQUIRE(pool.references(page) == 1);
  pool.release(page);
  REQUIRE(pool.free_pages() == 6);
  REQUIRE_THROWS_AS(pool.release(page), std::out_of_range);
  REQUIRE_THROWS_AS(PagePool<float>({.kv_heads = 1, .head_dim = 4, .page_tokens = 0, .pages = 3}),
                    std::invalid_argument);
  REQUIRE_THROWS_AS(PagePool<float>({.kv_heads = 1, .head_dim = 4, .pages = 0}), std::invalid_argument);
  REQUIRE_THROWS_AS(PagePool<float>({.kv_heads = 0, .head_dim = 4, .pages = 3}), std::invalid_argument);
}

TEST_CASE("moving a sequence moves its pages; the target's old pages go back to the pool") {
  PagePool<float> pool(sizes);
  PagedCache<float> a(pool), b(pool);
  append_ids(a, ids(0, 6));
  append_ids(b, ids(0, 9));
  b = std::move(a);
  REQUIRE(pool.free_pages() == 4);
  REQUIRE(holds(b.key_rows(), rows_until(6)));
  REQUIRE(a.capacity() == 0);
  REQUIRE(a.rows() == 0);
  REQUIRE(a.max_append() == 0);
  REQUIRE_FALSE(support::try_append_ids(a, {1}));
  REQUIRE(a.key_rows().runs.empty());
  REQUIRE(a.bytes() == 0);
  a = b.fork(5);
  b = PagedCache<float>(pool);
  REQUIRE(holds(a.key_rows(), rows_until(5)));
  REQUIRE(pool.free_pages() == 4);
  PagedCache<float>& self = a;
  a = std::move(self);
  REQUIRE(holds(a.key_rows(), rows_until(5)));
  static_assert(!std::is_copy_constructible_v<PagedCache<float>>);
  static_assert(!std::is_copy_assignable_v<PagedCache<float>>);
}

TEMPLATE_LIST_TEST_CASE("pool and sequences account for every byte, and appending allocates nothing", "",
                        support::AllStorages) {
  constexpr MultiHeadAttentionConfig layer{.model_dim = 30, .heads = 6, .kv_heads = 3, .head_dim = 5, .v_head_dim = 7};
  const auto k = support::cache_rows<float>(ids(0, 5), 3, 5, false),
             v = support::cache_rows<float>(ids(0, 5), 3, 7, true);
  const auto before = support::allocations();
  PagePool<TestType> pool(sizes);
  const auto with_pool = support::allocations();
  REQUIRE((with_pool - before).new_bytes == pool.bytes() + pool.overhead_bytes());
  REQUIRE(pool.bytes() == cache_bytes<TestType>(layer, 24));
  REQUIRE(pool.page_bytes() == cache_bytes<TestType>(layer, 4));
  const auto before_cache = support::allocations();
  PagedCache<TestType> cache(pool);
  PagedCache<TestType> other = cache.fork();
  const auto with_caches = support::allocations();
  REQUIRE((with_caches - before_cache).new_bytes == cache.overhead_bytes() + other.overhead_bytes());
  const auto used = support::allocations_of([&] {
    for (int i = 0; i < 4; ++i) {
      cache.append(k, v);
      other.append(k.topRows(1), v.topRows(1));
    }
    cache.truncate(3);
    cache.append(k, v);
    cache.clear();
  });
  REQUIRE(used.count == 0);
}

TEMPLATE_TEST_CASE("rows dropped from pages leave the bits of a contiguous cache, and forks as they were", "", float,
                   half, std::int8_t) {
  const Rope<float> rope({.pairing = Pairing::interleaved, .theta = 30}, 6);
  const Matrix<float> k = support::numbers<float>(150, 3 * 6, 1), v = support::numbers<float>(150, 3 * 7, 2);
  const PagePoolConfig config{.kv_heads = 3, .head_dim = 6, .v_head_dim = 7};
  const auto same = [](const auto& a, const auto& b) {
    return a.position() == b.position() && support::same_bits(a.keys(), b.keys()) &&
           support::same_bits(a.values(), b.values());
  };
  for (const auto& [first, n] :
       {std::pair<Index, Index>{0, 5}, {3, 70}, {13, 1}, {0, 150}, {149, 1}, {7, 0}, {20, 130}})
    for (const Index page_tokens : {1, 7, 64}) {
      CAPTURE(first, n, page_tokens);
      PagePoolConfig of_pool = config;
      of_pool.page_tokens = page_tokens, of_pool.pages = 400 / page_tokens + 2;
      PagePool<TestType> pool(of_pool);
      PagedCache<TestType> cache(pool);
      KvCache<TestType> whole({.kv_heads = 3, .head_dim = 6, .v_head_dim = 7, .capacity = 200});
      cache.append(k, v), whole.append(k, v);
      const auto fork = cache.fork();
      const KvCache<TestType> before = whole;
      cache.drop_rows(first, n, rope), whole.drop_rows(first, n, std::optional(rope));
      REQUIRE((same(cache, whole) && same(fork, before)));
      cache.append(k.topRows(9), v.topRows(9)), whole.append(k.topRows(9), v.topRows(9));
      cache.drop_rows(1, 2, rope), whole.drop_rows(1, 2, rope);
      REQUIRE((same(cache, whole) && same(fork, before)));
      Index position = 0;
      for (const auto& run : cache.key_rows().runs)
        REQUIRE(std::exchange(position, position + run.rows) == run.position);
    }

  // Forks that share pages, each shifted its own way, however often: as caches of their own.
  PagePoolConfig of_pool = config;
  of_pool.page_tokens = 5, of_pool.pages = 100;
  PagePool<TestType> pool(of_pool);
  const Index tables = pool.overhead_bytes();
  std::vector<PagedCache<TestType>> paged;
  std::vector<KvCache<TestType>> whole;
  const auto add = [&](std::size_t s, Index n, Index seed) {
    paged[s].append(k.middleRows(seed, n), v.middleRows(seed, n)),
        whole[s].append(k.middleRows(seed, n), v.middleRows(seed, n));
  };
  const auto drop = [&](std::size_t s, Index first, Index n, const auto&... how) {
    paged[s].drop_rows(first, n, rope, how...), whole[s].drop_rows(first, n, rope, how...);
  };
  const auto fork = [&](std::size_t s) { paged.push_back(paged[s].fork()), whole.push_back(whole[s]); };
  paged.emplace_back(pool);
  whole.emplace_back(KvCacheConfig{.kv_heads = 3, .head_dim = 6, .v_head_dim = 7, .capacity = 90});
  add(0, 50, 1);
  drop(0, 3, 2, Shift::in_place);
  REQUIRE(pool.overhead_bytes() == tables);
  drop(0, 4, 3), drop(0, 20, 2);
  const Index row = 3 * (6 * static_cast<Index>(sizeof(TestType)) + (has_row_scale<TestType> ? 4 : 0)) + 8;
  REQUIRE(pool.overhead_bytes() == tables + 500 * row);  // of the keys only
  fork(0), fork(0), fork(1);
  for (Index round = 0; round < 30; ++round) {
    drop(0, round % 7, 1), add(0, 1, round);
    drop(1, 11, round % 3), add(1, round % 3, 2 * round);
    if (round == 9) drop(2, 3, 2, Shift::in_place);
    if (round == 10) paged[3].drop_rows(2, 1, std::nullopt), whole[3].drop_rows(2, 1, std::nullopt);
    if (round == 11) paged[3].truncate(31), whole[3].truncate(31), add(3, 9, round);
    if (round == 12) paged[2].clear(), whole[2].clear(), add(2, 40, round);  // pages whose rows had turned
    if (round == 13)
      paged[1].scatter_rows(12, k.topRows(3), v.topRows(3)), whole[1].scatter_rows(12, k.topRows(3), v.topRows(3));
    if (round == 15) {  // a file begins anew, in pages whose rows had turned
      std::stringstream file;
      save_cache(file, paged[0]), save_cache(file, paged[0]);
      load_cache(file, paged[2]), load_cache(file, whole[2]);
      drop(2, 0, 2);
    }
    if (round == 20) paged[1] = paged[3].fork(), whole[1] = whole[3];
    drop(3, 8, round % 2), add(3, round % 2, round);
    for (std::size_t s = 0; s < 4; ++s) REQUIRE(same(paged[s], whole[s]));
  }
}

TEST_CASE("a shift of pages that cannot be leaves them as they were; one that can allocates nothing when warm") {
  const Rope<float> rope({Pairing::half_split}, 4), wider({Pairing::half_split}, 6);
  PagePool<float> small({.kv_heads = 1, .head_dim = 4, .v_head_dim = 3, .page_tokens = 4, .pages = 3});
  PagedCache<float> cache(small);
  append_ids(cache, ids(0, 12));
  PagedCache<float> fork = cache.fork();
  REQUIRE(contains(message_of<std::length_error>([&] { cache.drop_rows(0, 1, rope); }), "0 free pages of 3"));
  REQUIRE(contains(message_of<std::out_of_range>([&] { cache.drop_rows(8, 5, rope); }), "rows held 12"));
  REQUIRE(contains(message_of([&] { cache.drop_rows(0, 1, wider); }), "4; given 6"));
  REQUIRE((holds(cache.key_rows(), rows_until(12)) && holds(fork.key_rows(), rows_until(12))));
  cache.drop_rows(10, 2, rope);  // nothing moves
  REQUIRE((holds(cache.key_rows(), rows_until(10)) && small.references(2) == 2));
  small.on_exhausted([&](Index) { fork.clear(); });
  cache.drop_rows(0, 1, rope);
  REQUIRE((cache.rows() == 9 && fork.rows() == 0));
  REQUIRE(support::allocations_of([&] { cache.drop_rows(1, 3, rope); }).count == 0);
}

TEST_CASE("a pool counts its sequences: forks, those that hold no page, not what was moved from") {
  PagePool<float> pool(sizes);
  REQUIRE(pool.sequences() == 0);
  PagedCache<float> a(pool);
  REQUIRE(pool.sequences() == 1);
  append_ids(a, ids(0, 5));
  {
    const PagedCache<float> b = a.fork(), c = a.fork(0);
    REQUIRE(pool.sequences() == 3);
  }
  REQUIRE(pool.sequences() == 1);
  PagedCache<float> d(std::move(a));
  REQUIRE(pool.sequences() == 1);
  const PagedCache<float> of_nothing = a.fork();  // NOLINT(bugprone-use-after-move): it is of no pool
  REQUIRE(of_nothing.capacity() == 0);
  REQUIRE(pool.sequences() == 1);
  a = d.fork();
  REQUIRE(pool.sequences() == 2);
  a = std::move(d);
  REQUIRE(pool.sequences() == 1);
  REQUIRE_THROWS_AS(PagedCache<float>(pool, 25), std::invalid_argument);
  REQUIRE(pool.sequences() == 1);
}

#if __has_include(<sys/wait.h>)
namespace {

/// What a program does that ends in f(): 0 where the error handler is called with the rule, 1 with something else, 2 never.
const char* rule = "";
template <class F>
int handled(F&& f) {
  const pid_t child = ::fork();
  if (child == 0) {
    set_error_handler([](const char* message) { std::_Exit(std::strcmp(message, rule) == 0 ? 0 : 1); });
    f();
    std::_Exit(2);
  }
  int status = 0;
  ::waitpid(child, &status, 0);
  return WIFEXITED(status) ? WEXITSTATUS(status) : 3;
}

}  // namespace

TEST_CASE("a busy sequence, or its pool, that is destroyed or moved stops the program with the rule") {
  PagePool<float> pool({.kv_heads = 3, .head_dim = 5, .v_head_dim = 7, .page_tokens = 4, .pages = 2});
  std::optional<PagedCache<float>> cache(pool), idle(pool);
  append_ids(*cache, ids(0, 3)), append_ids(*idle, ids(0, 3));
  const auto asked = [&](const Step& owner) {
    pool.on_exhausted([&](Index) { owner(); });
    return handled([&] { append_ids(*cache, ids(3, 5)); });
  };
  rule = busy_rule;
  REQUIRE(asked([&] { cache.reset(); }) == 0);
  REQUIRE(asked([&] { const PagedCache<float> thief(std::move(*cache)); }) == 0);
  REQUIRE(asked([&] { *idle = std::move(*cache); }) == 0);
  REQUIRE(asked([&] { *cache = idle->fork(); }) == 0);
  REQUIRE(asked([&] { idle.reset(); }) == 2);

  LatentPagePool<float> latents({.latent_dim = 3, .rope_dim = 2, .page_tokens = 4, .pages = 1});
  std::optional<PagedLatentCache<float>> latent(latents);
  const Rows rows = Rows::of(*latent, 4);
  latent->append(rows.a, rows.b);
  auto fork = latent->fork();
  latents.on_exhausted([&](Index) { *latent = fork.fork(); });
  const Rope<float> rope({.pairing = Pairing::interleaved}, 2);
  REQUIRE(handled([&] { latent->drop_rows(0, 1, rope); }) == 0);

  rule = "a page pool cannot be destroyed from inside on_exhausted";
  std::optional<PagePool<float>> alone(PagePoolConfig{.head_dim = 1, .pages = 1});
  (void)alone->acquire();
  alone->on_exhausted([&](Index) { alone.reset(); });
  REQUIRE(handled([&] { (void)alone->try_acquire(); }) == 0);
}

TEST_CASE("a pool that is destroyed before its sequences stops the program with the rule") {
  rule = "a page pool must outlive its sequences; it is destroyed while there are still 1";
  std::optional<PagePool<float>> pool(sizes);
  std::optional<PagedCache<float>> cache(*pool);
  REQUIRE(handled([&] { pool.reset(); }) == 0);  // without a page, too
  append_ids(*cache, ids(0, 5));
  REQUIRE(handled([&] { pool.reset(); }) == 0);
  REQUIRE(handled([&] { cache.reset(), pool.reset(); }) == 2);

  constexpr LatentPagePoolConfig small{.latent_dim = 3, .rope_dim = 2, .page_tokens = 4, .pages = 5};
  std::optional<LatentPagePool<float>> latents(small);
  const PagedLatentCache<float> of_latents(*latents);
  REQUIRE(handled([&] { latents.reset(); }) == 0);
}
#endif

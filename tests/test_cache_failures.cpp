// Whatever fails inside a layer's call, and whenever: its caches are as they were, bit for bit, and the call can be made
// again. Every call of mask, score and executor is made to throw once, and every allocation to fail.

#include <qkv/latent_attention.hpp>
#include <qkv/multi_head_attention.hpp>
#include <qkv/paged_cache.hpp>
#include <qkv/paged_latent_cache.hpp>
#include <qkv/ring_cache.hpp>
#include <qkv/saved_cache.hpp>

#include <functional>
#include <memory>
#include <sstream>
#include <stdexcept>
#include <tuple>
#include <type_traits>

#include "support/allocations.hpp"
#include "support/batches.hpp"
#include "support/catch.hpp"

using namespace support;
using qkv::KvCache, qkv::RingCache, qkv::PagedCache, qkv::PagePool;
using qkv::LatentCache, qkv::PagedLatentCache, qkv::LatentPagePool, qkv::LatentForm;

namespace {

/// Counts down to an exception; below zero it never comes.
struct Fuse {
  Index left = -1;
  void burn() {
    if (left >= 0 && left-- == 0) throw std::runtime_error("the fuse");
  }
};

/// Causal; no `cover`, so that it is asked for every pair. Fits a call, or not.
struct FusedMask {
  Fuse* fuse;
  bool fits = true;
  void check(const qkv::CallShape&) const {
    if (!fits) throw std::invalid_argument("it does not fit");
  }
  bool sees(const At& at) const {
    fuse->burn();
    return at.key_position <= at.query_position;
  }
};
struct FusedScore {
  Fuse* fuse;
  bool fits = true;
  void check(const qkv::CallShape&) const {
    if (!fits) throw std::invalid_argument("it does not fit");
  }
  template <class T>
  T operator()(T s, const At&) const {
    fuse->burn();
    return s;
  }
};
struct FusedExecutor {
  Fuse* fuse;
  template <class F>
  void operator()(Index n, F&& f) const {
    fuse->burn();
    for (Index i = 0; i < n; ++i) f(i), fuse->burn();
  }
};

/// Sequences of any kind, with what they live in.
template <class Cache>
struct Sequences {
  std::shared_ptr<void> pool;
  std::vector<Cache> caches;
};

/// Everything that can be seen of the sequences: rows, and who uses which page.
template <class Cache>
std::string state_of(const Sequences<Cache>& all) {
  std::ostringstream out;
  for (const Cache& cache : all.caches) {
    qkv::save_cache(out, cache);
    if constexpr (requires { cache.pages(); }) {
      for (const Index page : cache.pages()) out << ' ' << page << ':' << cache.pool()->references(page);
      out << " free " << cache.pool()->free_pages();
    }
  }
  return out.str();
}

/// n rows from nowhere, in pieces that fit.
template <class Cache>
void fill(Cache& cache, Index n) {
  for (Index done = 0; done < n; ++done) {
    const auto seed = static_cast<std::uint64_t>(cache.position() + 1);
    if constexpr (requires { cache.latent_dim(); })
      cache.append(numbers<float>(1, cache.latent_dim(), seed), numbers<float>(1, cache.rope_dim(), seed + 50));
    else
      cache.append(numbers<float>(1, cache.kv_heads() * cache.head_dim(), seed),
                   numbers<float>(1, cache.kv_heads() * cache.v_head_dim(), seed + 50));
  }
}

/// The rows of these sizes from x go to the sequences, all in one call or (a single one) alone.
template <class Layer, class Cache, class Options>
Matrix<float> call(const Layer& layer, Sequences<Cache>& all, const Round& round, Options options,
                   std::array<Fuse, 3>& fuses) {
  const auto offsets = offsets_of(round);
  const Matrix<float> x = normals<float>(offsets.back(), layer.config().model_dim, 5);
  const FusedMask mask{&fuses[0]};
  const FusedScore score{&fuses[1]};
  const FusedExecutor executor{&fuses[2]};
  if (round.size() > 1) return run_batch(layer, x, offsets, pointers_to(all.caches), mask, score, options, executor);
  return layer.forward(x, all.caches[0], mask, score, options, executor);
}

/// Makes the k-th of something fail for every k (for every one of the first, then for ever fewer), and the call succeed in
/// the end. `make` gives the sequences as they stand before the call.
template <class Layer, class Make>
bool all_or_nothing(const Layer& layer, const Make& make, const Round& round, const qkv::LayerOptions& options) {
  std::array<Fuse, 3> fuses;
  auto whole = make();
  const std::string before = state_of(whole);
  const Matrix<float> expected = call(layer, whole, round, options, fuses);
  const std::string after = state_of(whole);
  bool right = before != after;
  for (std::size_t what = 0; what < 4; ++what) {
    Index k = 0, failures = 0;
    for (bool failed = true; failed; k += 1 + (what < 3 ? k / 16 : 0), failures += failed ? 1 : 0) {
      auto all = make();
      failed = false;
      try {
        const FailingAllocation allocation(what == 3 ? k : -1);
        if (what < 3) fuses[what].left = k;
        (void)call(layer, all, round, options, fuses);
      } catch (const std::exception& error) {
        failed = true;
      }
      fuses = {};
      right = right && state_of(all) == (failed ? before : after);
      if (failed)
        right = right && same_bits(call(layer, all, round, options, fuses), expected) && state_of(all) == after;
      if (!right) {
        UNSCOPED_INFO("failure " << k << " of "
                                 << (what == 0   ? "mask"
                                     : what == 1 ? "score"
                                     : what == 2 ? "executor"
                                                 : "memory"));
        return false;
      }
    }
    right = right && failures > 5;  // there was something to fail
  }
  return right;
}

/// One sequence alone, and three in a batch of which the second brings nothing.
const Round rounds_of_failures[] = {{3}, {14}, {4, 0, 2}, {2, 1, 13}};

const auto gqa = [](auto config) {
  config.kv_heads = small_gqa.kv_heads, config.head_dim = small_gqa.head_dim, config.v_head_dim = small_gqa.v_head_dim;
  return config;
};

}  // namespace

TEST_CASE("a call that fails anywhere leaves contiguous caches as they were", "[failures]") {
  const auto layer = multi_head_layer<float>(small_gqa, true);
  for (const Index block : {0, 2})
    for (const Round& round : rounds_of_failures) {
      CAPTURE(block, round);
      const auto make = [&] {
        Sequences<KvCache<float>> all;
        for (const Index rows : {5, 2, 6}) {
          all.caches.emplace_back(gqa(qkv::KvCacheConfig{.capacity = 22, .block = block}));
          fill(all.caches.back(), rows);
        }
        return all;
      };
      CHECK(all_or_nothing(layer, make, round, {}));
    }
}

TEST_CASE("a call that fails anywhere leaves rings as they were, overwritten rows too", "[failures]") {
  const auto layer = multi_head_layer<float>(small_gqa, true);
  for (const bool in_cache : {false, true})
    for (const auto& [window, pinned, slack] : {std::array<Index, 3>{5, 2, 3}, {4, 0, 1}, {20, 3, 4}})
      for (const Round& round : rounds_of_failures) {
        CAPTURE(in_cache, window, round);
        const auto make = [&, w = window, p = pinned, s = slack] {
          Sequences<RingCache<std::int8_t>> all;
          for (const Index rows : {19, 1, 9}) {  // wrapped, begun, just full
            all.caches.emplace_back(
                gqa(qkv::RingCacheConfig{.window = w, .pinned = p, .slack = s, .positions_in_cache = in_cache}));
            fill(all.caches.back(), rows);
          }
          return all;
        };
        CHECK(all_or_nothing(layer, make, round, {}));
      }
}

TEST_CASE("a call that fails anywhere leaves pages as they were, shared ones shared", "[failures]") {
  const auto layer = multi_head_layer<float>(small_gqa, true);
  for (const bool share_prefixes : {false, true})
    for (const Round& round : rounds_of_failures) {
      CAPTURE(share_prefixes, round);
      const auto make = [&] {
        Sequences<PagedCache<float>> all;
        const auto pool = std::make_shared<PagePool<float>>(gqa(qkv::PagePoolConfig{.page_tokens = 4, .pages = 20}));
        all.pool = pool;
        all.caches.emplace_back(*pool);
        fill(all.caches[0], 6);
        all.caches.push_back(all.caches[0].fork());
        all.caches.push_back(all.caches[0].fork());  // of the three, two write into the page that all share
        return all;
      };
      CHECK(all_or_nothing(layer, make, round, {.share_prefixes = share_prefixes}));
    }
}

TEST_CASE("a call that fails anywhere leaves latents as they were, in pages too", "[failures]") {
  const auto layer = latent_layer<float>(small_mla);
  for (const LatentForm form : {LatentForm::naive, LatentForm::absorbed})
    for (const Round& round : rounds_of_failures) {
      CAPTURE(round);
      const auto contiguous = [&] {
        Sequences<LatentCache<float>> all;
        for (const Index rows : {5, 2, 6}) fill(all.caches.emplace_back(layer.make_cache(22)), rows);
        return all;
      };
      CHECK(all_or_nothing(layer, contiguous, round, {.form = form}));
      const auto paged = [&] {
        Sequences<PagedLatentCache<float>> all;
        const auto pool = std::make_shared<LatentPagePool<float>>(
            qkv::LatentPagePoolConfig{.latent_dim = 19, .rope_dim = 6, .page_tokens = 4, .pages = 20});
        all.pool = pool;
        all.caches.emplace_back(*pool);
        fill(all.caches[0], 6);
        all.caches.push_back(all.caches[0].fork()), all.caches.push_back(all.caches[0].fork(3));
        return all;
      };
      CHECK(all_or_nothing(layer, paged, round, {.form = form}));
    }
}

namespace {

constexpr qkv::PagePoolConfig pages{.kv_heads = 2, .head_dim = 10, .v_head_dim = 7, .page_tokens = 4, .pages = 5};
constexpr qkv::LatentPagePoolConfig latent_pages{.latent_dim = 19, .rope_dim = 6, .page_tokens = 4, .pages = 5};

/// Two sequences that will have to ask for pages, an idle one that has some, and one of another shape; the owner counts.
template <class Layer, class Pool, class Cache>
struct Crowded {
  Layer layer;
  Pool pool, second, misfit_pool;
  Cache a, b, idle, misfit, elsewhere;
  Index evictions = 0;
  Fuse fuse;

  template <class Config>
  Crowded(Layer of, const Config& config, Config other)
      : layer(std::move(of)),
        pool(config),
        second(config),
        misfit_pool(other),
        a(pool, 16),
        b(pool, 12),
        idle(pool),
        misfit(misfit_pool),
        elsewhere(second) {
    fill(a, 7), fill(b, 3), fill(idle, 5), fill(elsewhere, 9);
    REQUIRE(pool.free_pages() == 0);
    for (Pool* some : {&pool, &second, &misfit_pool}) some->on_exhausted([this](Index) { ++evictions, idle.clear(); });
  }
  void forward(Matrix<float>& out, const Matrix<float>& x, Cache& cache, bool mask = true, bool score = true) {
    layer.forward_into(out, x, cache, FusedMask{&fuse, mask}, FusedScore{&fuse, score}, {}, FusedExecutor{&fuse});
  }
  void forward(Matrix<float>& out, const Matrix<float>& x, const std::vector<Index>& offsets,
               const std::vector<Cache*>& caches, bool mask = true, bool score = true) {
    layer.forward_into(out, x, offsets, caches, FusedMask{&fuse, mask}, FusedScore{&fuse, score}, {},
                       FusedExecutor{&fuse});
  }
  std::string state() const {
    std::ostringstream all;
    for (const Cache* cache : {&a, &b, &idle, &misfit, &elsewhere}) {
      qkv::save_cache(all, *cache);
      for (const Index page : cache->pages()) all << ' ' << page << ':' << cache->pool()->references(page);
    }
    return all.str();
  }
};

auto crowded_gqa() {
  qkv::PagePoolConfig other = pages;
  other.v_head_dim = 8;
  return std::make_unique<Crowded<MultiHeadAttention<float>, PagePool<float>, PagedCache<float>>>(
      multi_head_layer<float>(small_gqa), pages, other);
}
auto crowded_mla() {
  qkv::LatentPagePoolConfig other = latent_pages;
  other.rope_dim = 8;
  return std::make_unique<Crowded<LatentAttention<float>, LatentPagePool<float>, PagedLatentCache<float>>>(
      latent_layer<float>(small_mla), latent_pages, other);
}

/// Calls that are refused for what they are given, each a little away from one that asks for pages and is served.
template <class Scene>
void nobody_is_asked_in_vain(Scene& s) {
  using Cache = std::remove_cvref_t<decltype(s.a)>;
  const Index width = s.layer.config().model_dim;
  const auto x = [&](Index n) { return normals<float>(n, width, 3); };
  Matrix<float> out(5, width), buffer(9, width);
  const auto five = x(5);
  const Matrix<float> narrow = five.leftCols(width - 1);
  const std::string before = s.state();
  const qkv::LayerOptions of_other_layer{
      .form = s.layer.rope()->head_dim() == 10 ? LatentForm::naive : LatentForm::automatic,
      .share_prefixes = s.layer.rope()->head_dim() != 10};
  std::vector<std::function<void()>> calls = {
      [&] { s.layer.forward_into(out, five, s.a, of_other_layer); },
      [&] {
        s.layer.forward_into(out, five, std::vector<Index>{0, 3, 5}, std::vector{&s.a, &s.b}, of_other_layer);
      },
      [&] { s.forward(out, narrow, s.a); },
      [&] { s.forward(out, x(6), s.a); },
      [&] { s.forward(out, five, s.a, false); },
      [&] { s.forward(out, five, s.a, true, false); },
      [&] { s.forward(out, five, s.misfit); },
      [&] {
        Matrix<float> y(10, width);
        s.forward(y, x(10), s.b);
      },  // more than its capacity
      [&] { s.forward(buffer, buffer, s.b); },
      [&] {
        s.forward(out, five, {0, 5}, {&s.a, &s.b});
      },
      [&] {
        s.forward(out, five, {1, 3, 5}, {&s.a, &s.b});
      },
      [&] {
        s.forward(out, five, {0, 3, 4}, {&s.a, &s.b});
      },
      [&] {
        s.forward(out, five, {0, 6, 5}, {&s.a, &s.b});
      },
      [&] {
        s.forward(out, five, {0, 3, 5}, {&s.a, nullptr});
      },
      [&] {
        s.forward(out, five, {0, 3, 5}, {&s.a, &s.a});
      },
      [&] {
        s.forward(out, five, {0, 3, 5}, {&s.a, &s.misfit});
      },
      [&] {
        s.forward(out, narrow, {0, 3, 5}, {&s.a, &s.b});
      },
      [&] {
        s.forward(out, x(6), {0, 3, 6}, {&s.a, &s.b});
      },
      [&] {
        s.forward(out, five, {0, 3, 5}, {&s.a, &s.b}, false);
      },
      [&] {
        s.forward(out, five, {0, 3, 5}, {&s.a, &s.b}, true, false);
      },
      [&] {
        Matrix<float> y(16, width);
        s.forward(y, x(16), {0, 6, 16}, {&s.a, &s.b});
      },  // more than one's capacity
      [&] {
        Matrix<float> y(18, width);
        s.forward(y, x(18), {0, 9, 18}, {&s.a, &s.b});
      },  // more than the pool is
      [&] { buffer.topRows(5) = five, s.layer.forward_into(buffer.middleRows(1, 5), buffer.topRows(5), s.a); },
  };
  const auto rows = [&](Cache& cache, Index n, Index m, const auto& f) {
    if constexpr (requires { cache.latent_dim(); })
      f(numbers<float>(n, cache.latent_dim(), 1), numbers<float>(m, cache.rope_dim(), 2));
    else
      f(numbers<float>(n, 20, 1), numbers<float>(m, 14, 2));
  };
  for (const auto& [n, m, narrower] : {std::tuple<Index, Index, Index>{5, 4, 0}, {5, 5, 1}, {10, 10, 0}})
    calls.push_back([&, n = n, m = m, narrower = narrower] {
      rows(s.a, n, m, [&](const Matrix<float>& k, const Matrix<float>& v) {
        std::string refusals;
        const auto refused = [&](const auto& f) { refusals += message_of<std::logic_error>(f).empty() ? 'n' : 'y'; };
        const Matrix<float> cut = k.leftCols(k.cols() - narrower);
        refused([&] { s.a.append(cut, v); });
        refused([&] {
          if (!s.a.try_append(cut, v)) throw std::logic_error("does not fit");
        });
        if constexpr (requires { s.a.scatter_rows(0, k, v); }) {
          refused([&] { s.a.scatter_rows(7, cut, v); });
          if (n == m && narrower == 0) {
            refused([&] { s.a.scatter_rows(-1, k.topRows(5), v.topRows(5)); });
            refused([&] { s.a.scatter_rows(8, k.topRows(5), v.topRows(5)); });
          }
        }
        REQUIRE(contains(refusals, "y"));
        REQUIRE_FALSE(contains(refusals, "n"));
        throw std::logic_error("as it should");
      });
    });
  for (std::size_t i = 0; i < calls.size(); ++i) {
    CAPTURE(i);
    CHECK_THROWS_AS(calls[i](), std::logic_error);
    CHECK(s.evictions == 0);
    CHECK((s.state() == before));
  }
  s.forward(out, five, {0, 3, 5}, {&s.a, &s.b});
  CHECK(s.evictions == 1);
  CHECK((s.a.rows() == 10 && s.b.rows() == 5));
}

/// Whatever an owner who is asked for pages would do to the sequences of the call, it is refused, and so is the call.
template <class Scene>
void owners_leave_the_call_alone(Scene& s) {
  const Index width = s.layer.config().model_dim;
  const Matrix<float> x = normals<float>(8, width, 3), five = x.topRows(5);
  Matrix<float> out(8, width), few(5, width);
  const std::string before = s.state();
  const std::vector<std::function<void()>> calls = {
      [&] { s.forward(out, x, s.a); },
      [&] {
        s.forward(out, x, {0, 5, 6, 8}, {&s.a, &s.b, &s.elsewhere});
      },
      [&] {
        s.forward(out, x, {0, 2, 6, 8}, {&s.elsewhere, &s.b, &s.a});
      },
  };
  for (std::size_t i = 0; i < calls.size(); ++i) {
    using Cache = std::remove_cvref_t<decltype(s.a)>;
    for (Cache* cache : {&s.a, &s.b, &s.elsewhere}) {
      if (i == 0 && cache != &s.a) continue;
      const std::vector<std::function<void()>> steps = {[&] { cache->clear(); }, [&] { cache->truncate(1); },
                                                        [&] { fill(*cache, 1); },
                                                        [&] { s.forward(few, five, *cache); }};
      for (std::size_t step = 0; step < steps.size(); ++step) {
        CAPTURE(i, step);
        s.pool.on_exhausted([&](Index) { steps[step](); });
        CHECK(contains(message_of<std::logic_error>(calls[i]), "on_exhausted may give up others only"));
        CHECK((s.state() == before));
      }
    }
  }
  // Who goes on after the error, and then gives up another, has done no harm.
  std::string texts;
  s.pool.on_exhausted([&](Index) {
    texts += message_of<std::logic_error>([&] { s.b.clear(); });
    s.idle.clear();
  });
  auto twin = s.layer.template make_cache<float>(16);
  fill(twin, 7);
  s.forward(out, x, {0, 5, 6, 8}, {&s.a, &s.b, &s.elsewhere});
  Matrix<float> expected(5, width);
  s.layer.forward_into(expected, five, twin, FusedMask{&s.fuse}, FusedScore{&s.fuse}, {}, FusedExecutor{&s.fuse});
  CHECK(same_bits(out.topRows(5), expected));
  CHECK(contains(texts, "others only"));
  s.a.clear(), s.b.clear();  // not busy any more
}

}  // namespace

TEST_CASE("a call that is refused for its operands has asked nobody for pages", "[failures]") {
  nobody_is_asked_in_vain(*crowded_gqa());
  nobody_is_asked_in_vain(*crowded_mla());
}

TEST_CASE("an owner cannot give up what the call is about", "[failures]") {
  owners_leave_the_call_alone(*crowded_gqa());
  owners_leave_the_call_alone(*crowded_mla());
}

TEMPLATE_TEST_CASE("a shift that finds no memory leaves pages as they were, shared ones shared", "[failures]",
                   PagedLatentCache<float>, PagedCache<float>) {
  constexpr bool latent = std::is_same_v<TestType, PagedLatentCache<float>>;
  using Pool = std::conditional_t<latent, LatentPagePool<float>, PagePool<float>>;
  const auto& config = std::get < latent ? 1 : 0 > (std::tie(pages, latent_pages));
  const qkv::Rope<float> rope(interleaved, latent ? 6 : 10);
  for (std::int64_t k = 0, failed = 1; failed > 0; ++k) {
    Pool pool(config);
    TestType cache(pool);
    fill(cache, 7);
    const auto fork = cache.fork();
    const auto state = [&] {
      std::ostringstream all;
      qkv::save_cache(all, cache), qkv::save_cache(all, fork);
      for (const Index page : cache.pages()) all << ' ' << page << ':' << pool.references(page);
      return all.str();
    };
    const std::string before = state();
    failed = 0;
    try {
      const FailingAllocation failing(k);
      cache.drop_rows(1, 2, rope);
    } catch (const std::bad_alloc&) {
      failed = 1;
    }
    CHECK((state() == before) == (failed > 0));
    CHECK((failed > 0 || k > 1));
    CHECK(cache.rows() == (failed > 0 ? 7 : 5));
  }
}

#include <qkv/latent_attention.hpp>
#include <qkv/multi_head_attention.hpp>
#include <qkv/paged_cache.hpp>
#include <qkv/ring_cache.hpp>

#include "support/allocations.hpp"
#include "support/batches.hpp"
#include "support/catch.hpp"
#include "support/storages.hpp"

using namespace support;
using qkv::Kernel, qkv::LatentForm, qkv::LayerOptions;

namespace {

inline constexpr Index prompt = 33, capacity = 48;

/// A prompt, a chunk and single tokens into an empty cache; what the second time allocates.
template <class T, class Layer, class Cache>
std::int64_t allocations_when_warm(const Layer& layer, Cache& cache, const LayerOptions& options = {}) {
  const Matrix<T> x = normals<T>(capacity, layer.config().model_dim, 1);
  Matrix<T> out(capacity, layer.config().model_dim);
  const auto run = [&] {
    Index first = 0;
    for (const Index n : {prompt, Index{9}, Index{1}, Index{1}, Index{1}, Index{3}}) {
      layer.forward_into(out.middleRows(first, n), x.middleRows(first, n), cache, qkv::causal, qkv::plain, options);
      first += n;
    }
  };
  run();
  cache.clear();
  return allocations_of(run).count;
}

}  // namespace

TEST_CASE("what is counted is all that a program allocates", "[allocations]") {
  CHECK(allocations_of([] { ::operator delete(::operator new(8)); }).count >= 1);  // `new int` may be optimised away
  CHECK(allocations_of([] { qkv::Workspace().reserve(100); }).count >= 1);
#ifdef QKV_TEST_COUNTS_MALLOC
  CHECK(allocations_of([] {
          void* volatile p = std::malloc(10);
          std::free(p);
          p = std::aligned_alloc(64, 128);
          std::free(p);
        }).count == 2);
#endif
}

TEMPLATE_LIST_TEST_CASE("a warm layer allocates nothing, whatever its cache keeps", "[allocations]",
                        support::AllStorages) {
  using T = std::conditional_t<std::is_same_v<TestType, double>, double, float>;
  const auto layer = multi_head_layer<T>(small_gqa, true);
  auto cache = layer.template make_cache<TestType>(capacity);
  CHECK(allocations_when_warm<T>(layer, cache) == 0);
}

TEMPLATE_LIST_TEST_CASE("warm latent attention allocates nothing, in either form", "[allocations]",
                        support::AllStorages) {
  using T = std::conditional_t<std::is_same_v<TestType, double>, double, float>;
  LatentAttentionConfig with_q_latent = small_mla;
  with_q_latent.q_latent_dim = 12;
  for (const auto& config : {small_mla, with_q_latent}) {
    const auto layer = latent_layer<T>(config);
    for (const LatentForm form : {LatentForm::automatic, LatentForm::naive, LatentForm::absorbed}) {
      auto cache = layer.template make_cache<TestType>(capacity);
      CHECK(allocations_when_warm<T>(layer, cache, LayerOptions{.form = form}) == 0);
    }
  }
}

TEST_CASE("every kernel of a warm layer allocates nothing", "[allocations]") {
  const auto mha = multi_head_layer<float>(small_gqa);
  const auto mla = latent_layer<float>(small_mla);
  for (const Kernel kernel : {Kernel::reference, Kernel::tiled, Kernel::decode}) {
    auto cache = mha.make_cache(capacity);
    CHECK(allocations_when_warm<float>(mha, cache, LayerOptions{.kernel = kernel}) == 0);
    auto latents = mla.make_cache(capacity);
    CHECK(allocations_when_warm<float>(mla, latents, LayerOptions{.kernel = kernel}) == 0);
  }
}

TEST_CASE("a token costs no allocation while the cache grows longer", "[allocations]") {
  const auto mha = multi_head_layer<float>(small_gqa);
  const auto mla = latent_layer<float>(small_mla);
  const Matrix<float> x = normals<float>(1, 23, 2), y = normals<float>(1, 29, 3);
  Matrix<float> out(1, 23), latent_out(1, 29);
  auto cache = mha.make_cache(600);
  auto latents = mla.make_cache(600), restored = latents;
  const auto step = [&] {
    mha.forward_into(out, x, cache);
    mla.forward_into(latent_out, y, latents, qkv::causal, qkv::plain, LayerOptions{.form = LatentForm::absorbed});
    mla.forward_into(latent_out, y, restored, qkv::causal, qkv::plain, LayerOptions{.form = LatentForm::naive});
  };
  step();
  CHECK(allocations_of([&] {
          for (int i = 0; i < 599; ++i) step();
        }).count == 0);
}

TEST_CASE("warm layers with rings and pages allocate nothing", "[allocations]") {
  const auto layer = multi_head_layer<float>(small_gqa, true);
  qkv::RingCache<float> ring({.kv_heads = 2, .head_dim = 10, .v_head_dim = 7, .window = 6, .pinned = 1, .slack = 5});
  CHECK(allocations_when_warm<float>(layer, ring) == 0);
  qkv::RingCache<float> in_cache({.kv_heads = 2,
                                  .head_dim = 10,
                                  .v_head_dim = 7,
                                  .window = 6,
                                  .pinned = 1,
                                  .slack = 5,
                                  .positions_in_cache = true});
  CHECK(allocations_when_warm<float>(layer, in_cache) == 0);
  qkv::PagePool<float> pool({.kv_heads = 2, .head_dim = 10, .v_head_dim = 7, .page_tokens = 7, .pages = 8});
  qkv::PagedCache<float> pages(pool);
  CHECK(allocations_when_warm<float>(layer, pages) == 0);
}

TEST_CASE("a warm batch allocates nothing", "[allocations]") {
  const auto mha = multi_head_layer<float>(small_gqa);
  const auto mla = latent_layer<float>(small_mla);
  const std::vector<Index> offsets = {0, 20, 20, 21, 28};
  const Matrix<float> x = normals<float>(28, 23, 4), y = normals<float>(28, 29, 5);
  Matrix<float> out(28, 23), latent_out(28, 29);
  qkv::PagePool<float> pool({.kv_heads = 2, .head_dim = 10, .v_head_dim = 7, .page_tokens = 7, .pages = 20});
  std::vector<qkv::KvCache<float>> caches(4, mha.make_cache(20));
  std::vector<qkv::LatentCache<float>> latents(4, mla.make_cache(20));
  std::vector<qkv::PagedCache<float>> pages;
  for (int s = 0; s < 4; ++s) pages.emplace_back(pool);
  // One sequence that grows behind 14 shared rows, and forks of it.
  const std::vector<Index> singles = {0, 1, 2, 3, 4};
  std::vector<qkv::PagedCache<float>> family;
  family.emplace_back(pool);
  mha.forward(x.topRows(14), family[0]);
  for (int s = 0; s < 3; ++s) family.push_back(family[0].fork());
  const auto forks = pointers_to(family);
  const auto contiguous = pointers_to(caches);
  const auto paged = pointers_to(pages);
  const auto latent = pointers_to(latents);
  const std::span<const Index> rows(offsets);
  const auto run = [&] {
    mha.forward_into(out, x, rows, std::span<qkv::KvCache<float>* const>(contiguous));
    mha.forward_into(out, x, rows, std::span<qkv::PagedCache<float>* const>(paged));
    mha.forward_into(out.topRows(4), x.topRows(4), std::span<const Index>(singles),
                     std::span<qkv::PagedCache<float>* const>(forks), qkv::causal, qkv::plain,
                     qkv::LayerOptions{.share_prefixes = true});
    mla.forward_into(latent_out, y, rows, std::span<qkv::LatentCache<float>* const>(latent));
  };
  run();
  for (std::size_t s = 0; s < 4; ++s) caches[s].clear(), latents[s].clear(), pages[s].clear(), family[s].truncate(14);
  CHECK(allocations_of(run).count == 0);
}

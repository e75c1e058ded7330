// bench_variants — what does one layer of MHA, GQA, MQA and MLA cost per token, with caches of these sizes?
//
//     variant/<mha|gqa|mqa|mla_naive|mla>/<prefill|decode>/n:<>
//
// Equal model width and heads, f32, one thread; a row is a whole layer with its projections. prefill: n tokens into an
// empty cache. decode: one token on top of n. mla_naive caches every head's keys and values, mla the latents. Outputs are
// compared with kernel::reference in double before anything is timed.
#include <benchmark/benchmark.h>

#include <map>
#include <memory>
#include <string>

#include "support/variants.hpp"

namespace {

using qkv::Index;
using qkv::Matrix;

/// Outputs are of size 1 to 4; float leaves about 3e-6.
constexpr double tolerance = 2e-5;
constexpr Index sizes[] = {128, 512, 2048};

const Matrix<float>& text() {
  static const Matrix<float> x = 2 * support::numbers<float>(sizes[2] + 1, variants::model_dim, 1);
  return x;
}

/// A cache of n tokens, and the errors of what filled it.
template <class Cache>
struct Filled {
  Cache cache;
  double prefill_error = 0, decode_error = 0;
};

template <class Variant>
auto& variant_of() {
  static const Variant variant;
  return variant;
}

template <class Variant>
auto& filled(Index n) {
  const Variant& variant = variant_of<Variant>();
  using Cache = decltype(variant.layer.make_cache(n));
  static std::map<Index, std::unique_ptr<Filled<Cache>>> all;
  auto& entry = all[n];
  if (entry) return *entry;
  entry = std::make_unique<Filled<Cache>>(Filled<Cache>{variant.layer.make_cache(n + 1)});
  const Matrix<float> out = variant.layer.forward(text().topRows(n), entry->cache);
  for (const Index first : {Index{0}, n / 2, n - 8})
    entry->prefill_error =
        std::max(entry->prefill_error, variants::error_of(variant, text(), first, out.middleRows(first, 8)));
  const Matrix<float> next = variant.layer.forward(text().middleRows(n, 1), entry->cache);
  entry->decode_error = variants::error_of(variant, text(), n, next);
  entry->cache.truncate(n);
  return *entry;
}

bool report(benchmark::State& state, const auto& cache, double error) {
  state.counters["max_abs_error"] = error;
  state.counters["cache_bytes_per_token"] = static_cast<double>(cache.bytes()) / static_cast<double>(cache.capacity());
  if (error <= tolerance) return true;
  state.SkipWithError(("wrong: differs from the reference by " + std::to_string(error)).c_str());
  return false;
}

template <class Variant>
void prefill(benchmark::State& state) {
  const Index n = state.range(0);
  auto& [cache, error, unused] = filled<Variant>(n);
  if (!report(state, cache, error)) return;
  for (auto _ : state) {
    cache.clear();
    benchmark::DoNotOptimize(variant_of<Variant>().layer.forward(text().topRows(n), cache).data());
  }
  state.counters["tokens_per_second"] =
      benchmark::Counter(static_cast<double>(n), benchmark::Counter::kIsIterationInvariantRate);
}

template <class Variant>
void decode(benchmark::State& state) {
  const Index n = state.range(0);
  auto& [cache, unused, error] = filled<Variant>(n);
  if (!report(state, cache, error)) return;
  for (auto _ : state) {
    benchmark::DoNotOptimize(variant_of<Variant>().layer.forward(text().middleRows(n, 1), cache).data());
    cache.truncate(n);
  }
  state.counters["tokens_per_second"] = benchmark::Counter(1, benchmark::Counter::kIsIterationInvariantRate);
}

template <class Variant>
void add(const std::string& name) {
  using Run = void (*)(benchmark::State&);
  for (const auto& [phase, run] :
       {std::pair<const char*, Run>{"prefill", prefill<Variant>}, {"decode", decode<Variant>}})
    for (const Index n : sizes)
      benchmark::RegisterBenchmark(("variant/" + name + "/" + phase).c_str(), run)
          ->ArgName("n")
          ->Arg(n)
          ->Unit(benchmark::kMicrosecond);
}

[[maybe_unused]] const bool registered = [] {
  add<variants::MultiHead<variants::heads>>("mha");
  add<variants::MultiHead<variants::heads / 4>>("gqa");
  add<variants::MultiHead<1>>("mqa");
  add<variants::Latent<NaiveLatentAttention<float>>>("mla_naive");
  add<variants::Latent<qkv::LatentAttention<float>>>("mla");
  benchmark::AddCustomContext("qkv build", qkv::build_name);
  benchmark::AddCustomContext("layer", "model_dim 512, 16 heads of 64, GQA 4 kv heads, MLA latent 256 + rope 32, f32");
  return true;
}();

}  // namespace

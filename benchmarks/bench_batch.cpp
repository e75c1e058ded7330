// bench_batch — decode of many sequences of unequal length: what does one call for all of them gain?
//
//     batch/<cache>/<storage>/n:<>/batch:<>/threads:<>     one new token for each sequence; n: rows of the caches, mean
//
// cache: contiguous, paged: one call; each: contiguous, one call per sequence; forks: pages of which 3/4 · n are common to
// all sequences; cascade: the same, the common pages read once (share_prefixes). storage of weights and caches: f32, bf16,
// int8. Lengths run from n/2 to 3/2 · n (forks: of what is their own). A layer of 16 heads of 128, 4 key/value heads.
//
// tokens_per_second: of this one layer. bytes: weights and cache rows, each once per call (cascade: common rows once;
// each: weights once per sequence), beside a sample of the read bandwidth. Before anything is timed every sequence must
// have the bits that it has alone (cascade: its numbers); max_abs_error is against the layer on kernel::reference.
#include <benchmark/benchmark.h>
#include <qkv/multi_head_attention.hpp>
#include <qkv/paged_cache.hpp>

#include <memory>
#include <string>
#include <type_traits>

#include "support/machine.hpp"
#include "support/threads.hpp"

namespace {

using qkv::Index;
using qkv::Matrix;

constexpr qkv::RopeConfig rope{.pairing = qkv::Pairing::half_split};
constexpr qkv::MultiHeadAttentionConfig config{
    .model_dim = 2048, .heads = 16, .kv_heads = 4, .head_dim = 128, .rope = rope};
constexpr Index page_tokens = 64, probe_bytes = Index{64} << 20;

template <class S>
const qkv::MultiHeadAttention<float>& layer() {
  using Weights = qkv::MultiHeadAttentionWeights<float>;
  static const qkv::MultiHeadAttention<float> one(config, [] {
    if constexpr (std::is_same_v<S, float>)
      return Weights::random(config);
    else
      return Weights::random(config).template stored_as<S>();
  }());
  return one;
}

struct Sizes {
  Index n, batch, threads = 1;
};

/// Sequence s has this much of n: 1/2 … 3/2, in no order.
Index length(Index n, Index s, Index batch) { return n / 2 + (batch == 1 ? n / 2 : n * (s * 7 % batch) / (batch - 1)); }

template <class C>
void fill(C& cache, Index rows, std::uint64_t seed) {
  for (Index first = 0; first < rows; first += 1024) {
    const Index some = std::min<Index>(1024, rows - first);
    cache.append(machine::normal(some, config.kv_heads * config.head_dim, seed + 1),
                 machine::normal(some, config.kv_heads * config.head_dim, seed + 2));
  }
}

/// The caches of a batch, one row short of full.
template <class S>
struct Contiguous {
  std::vector<qkv::KvCache<S>> caches;
  Index common = 0;
  explicit Contiguous(const Sizes& s) {
    for (Index i = 0; i < s.batch; ++i) {
      caches.push_back(layer<S>().template make_cache<S>(length(s.n, i, s.batch) + 1));
      fill(caches.back(), length(s.n, i, s.batch), static_cast<std::uint64_t>(2 * i));
    }
  }
};

template <class S, bool Forks>
struct Paged {
  Index common;
  std::unique_ptr<qkv::PagePool<S>> pool;
  std::vector<qkv::PagedCache<S>> caches;
  explicit Paged(const Sizes& s) : common(Forks ? s.n * 3 / 4 / page_tokens * page_tokens : 0) {
    const Index pages = common / page_tokens + s.batch * (s.n * 3 / 2 / page_tokens + 2);
    pool = std::make_unique<qkv::PagePool<S>>(qkv::PagePoolConfig{
        .kv_heads = config.kv_heads, .head_dim = config.head_dim, .page_tokens = page_tokens, .pages = pages});
    for (Index i = 0; i < s.batch; ++i) {
      if (i == 0 || !Forks)
        caches.emplace_back(*pool);
      else
        caches.push_back(caches[0].fork(common));
      if (i == 0) fill(caches[0], common, 99);
      fill(caches.back(), length(s.n - common, i, s.batch), static_cast<std::uint64_t>(2 * i));
    }
  }
};

template <class S, class Caches>
void run(benchmark::State& state, const Sizes& s, bool each, bool cascade) {
  const auto& mha = layer<S>();
  Caches source(s);
  using C = std::remove_reference_t<decltype(source.caches[0])>;
  std::vector<C*> caches;
  for (C& cache : source.caches) caches.push_back(&cache);
  std::vector<Index> offsets;
  for (Index i = 0; i <= s.batch; ++i) offsets.push_back(i);
  const Matrix<float> x = machine::normal(s.batch, config.model_dim, 7);
  Matrix<float> out(s.batch, config.model_dim), alone = out, reference = out;
  const support::Threads executor(s.threads);
  const auto rewind = [&] {
    for (C* cache : caches) cache->truncate(cache->position() - 1);
  };
  const auto one_call = [&](Matrix<float>& to, const qkv::LayerOptions& options, const auto& how) {
    mha.forward_into(to, x, std::span<const Index>(offsets), std::span<C* const>(caches), qkv::causal, qkv::plain,
                     options, how);
  };
  const auto call = [&] {
    if (each)
      for (Index i = 0; i < s.batch; ++i)
        mha.forward_into(out.row(i), x.row(i), *caches[static_cast<std::size_t>(i)], qkv::causal, qkv::plain, {},
                         executor);
    else
      one_call(out, {.share_prefixes = cascade}, executor);
  };

  call(), rewind();
  for (Index i = 0; i < s.batch; ++i) mha.forward_into(alone.row(i), x.row(i), *caches[static_cast<std::size_t>(i)]);
  rewind();
  one_call(reference, {.kernel = qkv::Kernel::reference}, qkv::serial), rewind();
  const double error = (out - reference).cwiseAbs().maxCoeff(), size = reference.cwiseAbs().maxCoeff();
  state.counters["max_abs_error"] = error;
  // int8 keys are multiplied in int8, narrow rows of a cascade in their own numbers.
  const double tolerance = std::is_same_v<S, std::int8_t> ? 2e-2 : cascade && !std::is_same_v<S, float> ? 5e-3 : 1e-5;
  if (!(error <= tolerance * size)) return state.SkipWithError("wrong");
  if (!cascade && out != alone) return state.SkipWithError("not the bits of a sequence alone");

  const auto weight_bytes = static_cast<double>(mha.weights().query.bytes() + mha.weights().key.bytes() +
                                                mha.weights().value.bytes() + mha.weights().output.bytes());
  const double token_bytes = static_cast<double>(2 * config.kv_heads * qkv::row_bytes<S>(config.head_dim));
  double rows = 0;
  for (const C* cache : caches) rows += static_cast<double>(cache->rows() + 1);
  if (cascade) rows -= static_cast<double>(source.common * (s.batch - 1));
  const double bytes = weight_bytes * static_cast<double>(each ? s.batch : 1) + rows * token_bytes;
  std::vector<double> fractions;
  for (auto _ : state) {
    const double reads = machine::read_bandwidth(probe_bytes, s.threads), start = machine::seconds();
    call();
    const double time = machine::seconds() - start;
    state.SetIterationTime(time);
    fractions.push_back(bytes / time / reads);
    rewind();
  }
  state.counters["bytes"] = benchmark::Counter(bytes, benchmark::Counter::kIsIterationInvariantRate);
  state.counters["bandwidth_fraction"] = machine::median(fractions);
  state.counters["cache_bytes_per_token"] = token_bytes;
  state.counters["tokens_per_second"] =
      benchmark::Counter(static_cast<double>(s.batch), benchmark::Counter::kIsIterationInvariantRate);
}

template <class S, class Caches>
void add(const std::string& cache, const Sizes& s, bool each = false, bool cascade = false) {
  const std::string name = "batch/" + cache + "/" + qkv::storage_name<S> + "/n:" + std::to_string(s.n) +
                           "/batch:" + std::to_string(s.batch) + "/threads:" + std::to_string(s.threads);
  benchmark::RegisterBenchmark(name.c_str(), [=](benchmark::State& state) { run<S, Caches>(state, s, each, cascade); })
      ->UseManualTime()
      ->Unit(benchmark::kMillisecond);
}

template <class S>
void add_all(Index batch, Index threads) {
  const Sizes s{1024, batch, threads};
  add<S, Contiguous<S>>("each", s, true);
  add<S, Contiguous<S>>("contiguous", s);
  add<S, Paged<S, false>>("paged", s);
  add<S, Paged<S, true>>("forks", s);
  add<S, Paged<S, true>>("cascade", s, false, true);
}

[[maybe_unused]] const bool registered = [] {
  for (const Index threads : {1, 2})
    for (const Index batch : {1, 2, 4, 8, 16, 32, 64}) add_all<float>(batch, threads);
  for (const Index batch : {1, 4, 16, 64}) {
    add_all<qkv::bfloat16>(batch, 1);
    add_all<std::int8_t>(batch, 1);
  }
  return true;
}();

}  // namespace

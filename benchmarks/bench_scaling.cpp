// bench_scaling — how does time grow with the length of the text?
//
//     scaling/prefill/f32/n:<>/threads:<>             causal attention of n tokens                        n²
//     scaling/decode/f32/n:<>/threads:<>              one token on n cached                               n
//     scaling/generate/<cached|recompute>/f32/n:<>    n tokens one by one through a layer, in total       n²; n³
//     scaling/slope/<as above without n>              log-log slopes fitted to the rows above
//
// Attention has 8 heads of 64. The layer of `generate` is of model_dim 64, so narrow that projections (n with a cache, n²
// without) do not hide how attention grows; recompute runs the layer over the whole text again for every token. A slope
// is fitted by least squares to the fastest time of each of the three largest sizes; `expected` is the exponent of large n.
// Every size is compared with kernel::reference before it is timed.
#include <benchmark/benchmark.h>
#include <qkv/qkv.hpp>

#include <limits>
#include <map>
#include <string>
#include <vector>

#include "support/machine.hpp"
#include "support/threads.hpp"

namespace {

using qkv::Index;
using qkv::Matrix;

constexpr Index heads = 8, d = 64, width = heads * d, model_dim = 64;
constexpr double tolerance = 1e-5;  // rms error over rms output

/// The fastest time of every size so far, by family of rows.
std::map<std::string, std::map<Index, double>>& times() {
  static std::map<std::string, std::map<Index, double>> all;
  return all;
}

bool verify(benchmark::State& state, const Matrix<float>& out, const Matrix<double>& expected) {
  const Matrix<double> error = out.cast<double>() - expected;
  const double rms = error.norm() / expected.norm();
  state.counters["max_abs_error"] = error.cwiseAbs().maxCoeff();
  state.counters["rms_error"] = rms;
  if (rms <= tolerance) return true;
  state.SkipWithError(("wrong: rms error " + std::to_string(rms)).c_str());
  return false;
}

void time_calls(benchmark::State& state, const std::string& family, Index n, Index tokens, const auto& call) {
  double& best = times()[family].try_emplace(n, std::numeric_limits<double>::infinity()).first->second;
  for (auto _ : state) {
    const double start = machine::seconds();
    call();
    const double time = machine::seconds() - start;
    state.SetIterationTime(time);
    best = std::min(best, time);
  }
  state.counters["tokens_per_second"] =
      benchmark::Counter(static_cast<double>(tokens), benchmark::Counter::kIsIterationInvariantRate);
}

Matrix<double> reference(const Matrix<float>& q, const auto& k, const auto& v) {
  qkv::Options<double> options;
  options.kernel = qkv::Kernel::reference;
  return qkv::attention(q.cast<double>(), k.template cast<double>(), v.template cast<double>(), {heads}, qkv::causal,
                        qkv::plain, options);
}

void prefill(benchmark::State& state, const std::string& family, Index n, Index threads) {
  const Matrix<float> q = machine::normal(n, width, 1), k = machine::normal(n, width, 2),
                      v = machine::normal(n, width, 3);
  Matrix<float> out(n, width);
  qkv::Workspace workspace;
  qkv::Options<float> options;
  options.workspace = &workspace;
  const support::Threads executor(threads);
  const auto call = [&] { qkv::attention_into(out, q, k, v, {heads}, qkv::causal, qkv::plain, options, executor); };
  call();
  const Index some = std::min<Index>(n, 8);  // the last tokens see all keys
  if (!verify(state, out.bottomRows(some), reference(q.bottomRows(some), k, v))) return;
  time_calls(state, family, n, n, call);
  state.counters["flops"] = benchmark::Counter(2.0 * static_cast<double>(n * (n + 1)) * static_cast<double>(width),
                                               benchmark::Counter::kIsIterationInvariantRate);
}

void decode(benchmark::State& state, const std::string& family, Index n, Index threads) {
  qkv::KvCache<float> cache({.kv_heads = heads, .head_dim = d, .capacity = n});
  constexpr Index piece = 509;  // one block of random rows, over and over
  const Matrix<float> k = machine::normal(piece, width, 1), v = machine::normal(piece, width, 2);
  while (cache.position() < n) {
    const Index rows = std::min(piece, n - cache.position());
    cache.append(k.topRows(rows), v.topRows(rows));
  }
  const Matrix<float> q = machine::normal(1, width, 3);
  Matrix<float> out(1, width);
  qkv::Workspace workspace;
  qkv::Options<float> options;
  options.workspace = &workspace;
  const support::Threads executor(threads);
  const auto call = [&] { qkv::attention_into(out, q, cache, {heads}, qkv::causal, qkv::plain, options, executor); };
  call();
  qkv::Options<double> exact;
  exact.kernel = qkv::Kernel::reference;
  if (!verify(state, out, qkv::attention(q.cast<double>(), cache, {heads}, qkv::causal, qkv::plain, exact))) return;
  time_calls(state, family, n, 1, call);
  state.counters["bytes"] =
      benchmark::Counter(static_cast<double>(cache.bytes()), benchmark::Counter::kIsIterationInvariantRate);
  state.counters["cache_bytes_per_token"] = static_cast<double>(cache.bytes()) / static_cast<double>(n);
}

/// Every token of a text after the one before it: with a cache one new row each, without all rows so far again.
void generate(benchmark::State& state, const std::string& family, Index n, bool cached) {
  constexpr qkv::MultiHeadAttentionConfig config{.model_dim = model_dim, .heads = heads, .head_dim = d};
  const qkv::MultiHeadAttention<float> layer(config, qkv::MultiHeadAttentionWeights<float>::random(config));
  auto cache = layer.make_cache(n);
  const Matrix<float> x = machine::normal(n, model_dim, 4);
  Matrix<float> out(n, model_dim);
  const auto call = [&] {
    cache.clear();
    for (Index t = 0; t < n; ++t)
      if (cached)
        layer.forward_into(out.row(t), x.row(t), cache);
      else
        out.row(t) = layer.forward(x.topRows(t + 1)).row(t);
  };
  // The last tokens against the reference; of recompute the last one stands for all, for n³ is not run twice.
  const Index some = cached ? 8 : 1;
  cache.append(layer.keys(x.topRows(n - some)), layer.values(x.topRows(n - some)));
  const Matrix<float> expected =
      layer.forward(x.bottomRows(some), cache, qkv::causal, qkv::plain, {.kernel = qkv::Kernel::reference});
  if (cached)
    call();
  else
    out.row(n - 1) = layer.forward(x).row(n - 1);
  if (!verify(state, out.bottomRows(some), expected.cast<double>())) return;
  time_calls(state, family, n, n, call);
  if (cached) state.counters["cache_bytes_per_token"] = static_cast<double>(cache.bytes()) / static_cast<double>(n);
}

/// Least squares through log time over log n.
double slope(const std::map<Index, double>& points) {
  double x = 0, y = 0, xx = 0, xy = 0;
  const auto count = static_cast<double>(points.size());
  for (const auto& [n, time] : points) {
    const double a = std::log(static_cast<double>(n)), b = std::log(time);
    x += a, y += b, xx += a * a, xy += a * b;
  }
  return (count * xy - x * y) / (count * xx - x * x);
}

void add_slope(const std::string& family, double expected) {
  benchmark::RegisterBenchmark(("scaling/slope/" + family).c_str(), [=](benchmark::State& state) {
    const auto& points = times()[family];
    if (points.size() < 3) return state.SkipWithError("fewer than three sizes were timed in this run");
    for (auto _ : state) benchmark::DoNotOptimize(points.size());
    state.counters["slope"] = slope(points);
    state.counters["expected"] = expected;
    state.counters["from_n"] = static_cast<double>(points.begin()->first);
    state.counters["to_n"] = static_cast<double>(points.rbegin()->first);
  })->Iterations(1);
}

void add_row(const std::string& name, auto run) {
  benchmark::RegisterBenchmark(name.c_str(), run)->UseManualTime()->Unit(benchmark::kMillisecond);
}

[[maybe_unused]] const bool registered = [] {
  const auto at = [](Index n) { return "/n:" + std::to_string(n); };
  for (const Index threads : {1, 2}) {
    const std::string end = "/threads:" + std::to_string(threads);
    for (const Index n : {512, 1024, 2048, 4096, 8192})
      add_row("scaling/prefill/f32" + at(n) + end,
              [=](benchmark::State& state) { prefill(state, "prefill/f32" + end, n, threads); });
    for (const Index n : {2048, 4096, 8192, 16384, 32768, 65536})
      add_row("scaling/decode/f32" + at(n) + end,
              [=](benchmark::State& state) { decode(state, "decode/f32" + end, n, threads); });
  }
  for (const Index n : {256, 512, 1024, 2048, 4096})
    add_row("scaling/generate/cached/f32" + at(n),
            [=](benchmark::State& state) { generate(state, "generate/cached/f32", n, true); });
  for (const Index n : {128, 256, 512, 1024})  // 2048: a minute
    add_row("scaling/generate/recompute/f32" + at(n),
            [=](benchmark::State& state) { generate(state, "generate/recompute/f32", n, false); });
  for (const char* threads : {"/threads:1", "/threads:2"}) {
    add_slope(std::string("prefill/f32") + threads, 2);
    add_slope(std::string("decode/f32") + threads, 1);
  }
  add_slope("generate/cached/f32", 2);
  add_slope("generate/recompute/f32", 3);
  benchmark::AddCustomContext("qkv build", qkv::build_name);
  return true;
}();

}  // namespace

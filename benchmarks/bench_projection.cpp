// bench_projection — x·W + b for 1 … 512 tokens: how far from what the machine can read and multiply?
//
//     projection/<storage>/rows:<>/in:<>/out:<>/threads:<>     storage of W: f32, f16, bf16, int8; f64 (x too); eigen (f32)
//
// roofline_fraction: max(flops / FMA peak, bytes of W / read bandwidth) over the time taken. Before each call a sample of
// the peak and one of the bandwidth, which also leaves nothing of W in the caches, as in a model of many layers. Several
// threads: peak and bandwidth of as many. max_abs_error is against double on the weights as stored, relative to the
// root of in; every row of x must have the bits that it has alone.
#include <benchmark/benchmark.h>
#include <qkv/projection.hpp>

#include <string>
#include <type_traits>

#include "support/machine.hpp"
#include "support/threads.hpp"

namespace {

using qkv::Index;
using qkv::Matrix;

struct Sizes {
  Index rows, in, out, threads = 1;
};

constexpr Index probe_bytes = Index{64} << 20;

/// Weights of one size, kept for the rows that follow: they are the expensive part of a case.
template <class T>
const Matrix<T>& weights(Index in, Index out) {
  static Matrix<T> w;
  if (w.rows() != in || w.cols() != out) w = machine::normal(in, out, 1).template cast<T>();
  return w;
}

template <class T, class S>
const qkv::Projection<T>& projection(Index in, Index out) {
  static qkv::Projection<T> p;
  if (p.in_dim() != in || p.out_dim() != out) {
    const qkv::Projection<T> exact(weights<T>(in, out), machine::normal(1, out, 2).template cast<T>());
    if constexpr (std::is_same_v<S, T>)
      p = exact;
    else
      p = exact.template stored_as<S>();
  }
  return p;
}

/// Times `call` beside samples of what it is measured against.
template <class T>
void time_call(benchmark::State& state, const Sizes& s, double bytes, auto call) {
  const double flops = 2.0 * static_cast<double>(s.rows) * static_cast<double>(s.in) * static_cast<double>(s.out);
  std::vector<double> roofline, peak, bandwidth;
  for (auto _ : state) {
    const double multiplies = machine::fma_peak<T>() * static_cast<double>(s.threads);
    const double reads = machine::read_bandwidth(probe_bytes, s.threads), start = machine::seconds();
    call();
    const double time = machine::seconds() - start;
    state.SetIterationTime(time);
    peak.push_back(flops / time / multiplies);
    bandwidth.push_back(bytes / time / reads);
    roofline.push_back(std::max(peak.back(), bandwidth.back()));
  }
  state.counters["flops"] = benchmark::Counter(flops, benchmark::Counter::kIsIterationInvariantRate);
  state.counters["bytes"] = benchmark::Counter(bytes, benchmark::Counter::kIsIterationInvariantRate);
  state.counters["peak_fraction"] = machine::median(peak);
  state.counters["bandwidth_fraction"] = machine::median(bandwidth);
  state.counters["roofline_fraction"] = machine::median(roofline);
  state.counters["tokens_per_second"] =
      benchmark::Counter(static_cast<double>(s.rows), benchmark::Counter::kIsIterationInvariantRate);
}

/// The largest error of some outputs, in units of √in; NaN where one is NaN.
template <class T>
double worst_error(const Matrix<T>& out, const Matrix<T>& x, const Matrix<T>& w, const qkv::RowVector<T>& bias) {
  double worst = 0;
  for (Index r = 0; r < x.rows(); r += std::max<Index>(1, x.rows() / 4))
    for (Index c = 0; c < w.cols(); c += std::max<Index>(1, w.cols() / 97)) {
      double sum = bias.size() > 0 ? static_cast<double>(bias(c)) : 0;
      for (Index k = 0; k < x.cols(); ++k) sum += static_cast<double>(x(r, k)) * static_cast<double>(w(k, c));
      const double error = std::abs(static_cast<double>(out(r, c)) - sum) / std::sqrt(static_cast<double>(x.cols()));
      if (!(error <= worst)) worst = error;
    }
  return worst;
}

template <class T, class S>
void run(benchmark::State& state, const Sizes& s) {
  const auto& p = projection<T, S>(s.in, s.out);
  const Matrix<T> x = machine::normal(s.rows, s.in, 3).template cast<T>();
  Matrix<T> out(s.rows, s.out);
  const support::Threads executor(s.threads);
  const auto call = [&] { p.forward_into(out, x, executor); };
  call();
  const double error = worst_error<T>(out, x, p.weight(), p.bias());
  state.counters["max_abs_error"] = error;
  const bool same = p.forward(x.bottomRows(1)) == out.bottomRows(1);
  if (!same || !(error < (std::is_same_v<T, double> ? 1e-14 : 1e-5)))
    return state.SkipWithError(same ? "wrong" : "a row alone has other bits");
  time_call<T>(state, s, static_cast<double>(p.bytes()), call);
}

void run_eigen(benchmark::State& state, const Sizes& s) {
  const Matrix<float>& w = weights<float>(s.in, s.out);
  const Matrix<float> x = machine::normal(s.rows, s.in, 3);
  Matrix<float> out(s.rows, s.out);
  const auto call = [&] { out.noalias() = x * w; };
  call();
  const double error = worst_error<float>(out, x, w, {});
  state.counters["max_abs_error"] = error;
  if (!(error < 1e-5)) return state.SkipWithError("wrong");
  time_call<float>(state, s, static_cast<double>(w.size()) * sizeof(float), call);
}

void add_row(const std::string& storage, const Sizes& s, auto f) {
  const std::string name = "projection/" + storage + "/rows:" + std::to_string(s.rows) + "/in:" + std::to_string(s.in) +
                           "/out:" + std::to_string(s.out) + "/threads:" + std::to_string(s.threads);
  benchmark::RegisterBenchmark(name.c_str(), [=](benchmark::State& state) { f(state, s); })
      ->UseManualTime()
      ->Unit(benchmark::kMillisecond);
}

template <class S>
void add(const Sizes& s) {
  using T = std::conditional_t<std::is_same_v<S, double>, double, float>;
  add_row(qkv::storage_name<S>, s, run<T, S>);
}

[[maybe_unused]] const bool registered = [] {
  for (const Index rows : {1, 2, 4, 8, 16, 32, 64, 512}) add<float>({rows, 4096, 4096});
  for (const Index rows : {1, 4, 16, 512}) add<float>({rows, 4096, 4096, 2});
  for (const Index rows : {1, 2, 4, 8, 16, 32, 64}) add<qkv::bfloat16>({rows, 4096, 4096});
  for (const Index rows : {1, 2, 4, 8, 16, 32, 64}) add<std::int8_t>({rows, 4096, 4096});
  for (const Index rows : {1, 16}) add<qkv::half>({rows, 4096, 4096});
  for (const Index rows : {1, 16, 64}) add<double>({rows, 4096, 4096});
  for (const Index rows : {1, 2, 4, 16, 64, 512}) add_row("eigen", {rows, 4096, 4096}, run_eigen);
  for (const Index rows : {1, 4, 64}) add<float>({rows, 4096, 11008});
  for (const Index rows : {1, 4, 64}) add<float>({rows, 2560, 80});  // one head of 80
  for (const Index rows : {1, 64}) add<float>({rows, 1, 4096});      // a chain of one
  return true;
}();

}  // namespace

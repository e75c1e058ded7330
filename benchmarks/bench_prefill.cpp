// bench_prefill — how much of the machine does attention over a prompt use?
//
//     prefill/<mask>/<storage>/n:<>/heads:<>/kv_heads:<>/d:<>/threads:<>     the tiled kernel
//     … /openmp                                                              on OpenMP's threads, not Eigen's pool
//     prefill/<mask>/eigen_naive|eigen_tiled|eigen_gemm/…                    what Eigen products give
//
// mask: causal, full, window (255 keys back), chunk (512 queries on 4096 keys), softcap, alibi, lambda (causal with that
// score). storage: f32, f64, f16, bf16, int8 (q·k in int8, values in bfloat16; with AVX-VNNI in int16; with AVX2 and SSE2
// both in int16), int8_throughout (both in int8, where there are such products), and *_exact (widened to float).
// peak_fraction: useful flops over the FMA peak (f64: the f64 peak), each call beside a peak sample; the median of all.
// Several threads: over the sum of their peaks, all running at once. max_abs_error and rms_error are against kernel::reference in
// double on the stored keys and values, for some of the queries, taken before anything is timed.
#include <benchmark/benchmark.h>
#include <qkv/qkv.hpp>

#include <unsupported/Eigen/CXX11/ThreadPool>

#include <numeric>
#include <string>
#include <thread>
#include <type_traits>
#include <vector>

#include "support/machine.hpp"

namespace {

using qkv::Index;
using qkv::Matrix;

struct Sizes {
  Index n_queries, n_keys, heads, kv_heads, d, threads = 1;
  bool openmp = false;
};

/// As many FMA peaks as threads, all running at once: what the row's threads could reach together.
template <class T>
double fma_peak_of(Index threads) {
  std::vector<double> peaks(static_cast<std::size_t>(threads));
  std::vector<std::thread> others;
  for (Index t = 1; t < threads; ++t)
    others.emplace_back([&peaks, t] { peaks[static_cast<std::size_t>(t)] = machine::fma_peak<T>(); });
  peaks[0] = machine::fma_peak<T>();
  for (std::thread& other : others) other.join();
  return std::accumulate(peaks.begin(), peaks.end(), 0.0);
}

template <class M>
double visible_pairs(const M& mask, const Sizes& s) {
  double pairs = 0;
  for (Index i = 0; i < s.n_queries; ++i) {
    const Index position = s.n_keys - s.n_queries + i;
    if constexpr (std::is_same_v<M, qkv::Window>) {
      const Index first = mask.left == qkv::infinite ? 0 : std::max<Index>(0, position - mask.left);
      pairs += static_cast<double>(position - first + 1);
    } else {
      pairs += static_cast<double>(s.n_keys);
    }
  }
  return pairs;
}

/// A call, its reference and its budget.
template <class T, class S, class M, class F>
struct Case {
  Sizes sizes;
  M mask;
  F score;
  qkv::Arithmetic arithmetic;
  double tolerance;  // rms error over rms output

  void operator()(benchmark::State& state) const {
    const Sizes& s = sizes;
    const Matrix<T> q = machine::normal(s.n_queries, s.heads * s.d, 1).template cast<T>();
    qkv::KvCache<S> cache({.kv_heads = s.kv_heads, .head_dim = s.d, .capacity = s.n_keys});
    cache.append(machine::normal(s.n_keys, s.kv_heads * s.d, 2), machine::normal(s.n_keys, s.kv_heads * s.d, 3));
    Matrix<T> out(s.n_queries, s.heads * s.d);
    qkv::Workspace workspace;
    qkv::Options<T> options;
    options.kernel = qkv::Kernel::tiled;
    options.arithmetic = arithmetic;
    options.workspace = &workspace;
    const qkv::Heads heads{s.heads, s.kv_heads};
    Eigen::ThreadPool pool(static_cast<int>(std::max<Index>(s.threads - 1, 1)));  // the calling thread works too
    const qkv::PoolExecutor executor(pool);
    const auto call = [&] {
      if (s.threads == 1) return qkv::attention_into(out, q, cache, heads, mask, score, options);
#ifdef _OPENMP
      if (s.openmp)
        return qkv::attention_into(out, q, cache, heads, mask, score, options,
                                   qkv::OpenMp{static_cast<int>(s.threads)});
#endif
      qkv::attention_into(out, q, cache, heads, mask, score, options, executor);
    };

    call();
    double squares = 0, reference_squares = 0, worst = 0;
    const Matrix<double> keys = cache.template keys<double>(), values = cache.template values<double>();
    for (Index i = 0; i < s.n_queries; i += std::max<Index>(1, s.n_queries / 5)) {
      qkv::Options<double> exact;
      exact.kernel = qkv::Kernel::reference;
      exact.first_position = s.n_keys - s.n_queries + i;
      const Matrix<double> expected =
          qkv::attention(q.row(i).template cast<double>(), keys, values, heads, mask, score, exact);
      const Matrix<double> error = out.row(i).template cast<double>() - expected;
      squares += error.squaredNorm(), reference_squares += expected.squaredNorm();
      worst = std::max(worst, error.cwiseAbs().maxCoeff());
    }
    const double rms = std::sqrt(squares / reference_squares);
    state.counters["max_abs_error"] = worst;
    state.counters["rms_error"] = rms;
    if (!(rms <= tolerance)) {
      state.SkipWithError(("wrong: rms error " + std::to_string(rms)).c_str());
      return;
    }

    const double flops = 4.0 * visible_pairs(mask, s) * static_cast<double>(s.heads * s.d);
    std::vector<double> fractions;
    for (auto _ : state) {
      const double peak = fma_peak_of<T>(s.threads), start = machine::seconds();
      call();
      const double time = machine::seconds() - start;
      state.SetIterationTime(time);
      fractions.push_back(flops / time / peak);
    }
    state.counters["flops"] = benchmark::Counter(flops, benchmark::Counter::kIsIterationInvariantRate);
    state.counters["peak_fraction"] = machine::median(fractions);
    state.counters["tokens_per_second"] =
        benchmark::Counter(static_cast<double>(s.n_queries), benchmark::Counter::kIsIterationInvariantRate);
  }
};

std::string row_name(const std::string& mask, const std::string& storage, const Sizes& s) {
  return "prefill/" + mask + "/" + storage + "/n:" + std::to_string(s.n_keys) + "/heads:" + std::to_string(s.heads) +
         "/kv_heads:" + std::to_string(s.kv_heads) + "/d:" + std::to_string(s.d) +
         "/threads:" + std::to_string(s.threads) + (s.openmp ? "/openmp" : "");
}

void add_row(const std::string& name, auto run) {
  benchmark::RegisterBenchmark(name.c_str(), run)->UseManualTime()->Unit(benchmark::kMillisecond);
}

template <class S, class M, class F = qkv::Plain>
void add(const std::string& mask_name, const M& mask, const Sizes& sizes, const F& score = {},
         qkv::Arithmetic arithmetic = qkv::Arithmetic::automatic) {
  using T = std::conditional_t<std::is_same_v<S, double>, double, float>;
  const bool exact = arithmetic == qkv::Arithmetic::exact;
  const bool coarse = arithmetic == qkv::Arithmetic::int8;
  const double tolerance = coarse                                       ? 2e-2
                           : std::is_same_v<S, double>                  ? 1e-13
                           : std::is_same_v<S, qkv::bfloat16> && !exact ? 3e-3
                           : std::is_same_v<S, std::int8_t> && !exact   ? 1e-2
                                                                        : 5e-6;
  add_row(row_name(mask_name,
                   std::string(qkv::storage_name<S>) + (exact    ? "_exact"
                                                        : coarse ? "_throughout"
                                                                 : ""),
                   sizes),
          Case<T, S, M, F>{sizes, mask, score, arithmetic, tolerance});
}

// ---- what Eigen gives ----

/// softmax(q kᵀ) v with the whole matrix of scores, head by head.
void eigen_naive(const Matrix<float>& q, const Matrix<float>& k, const Matrix<float>& v, Matrix<float>& out,
                 Index heads) {
  const Index d = q.cols() / heads;
  for (Index h = 0; h < heads; ++h) {
    Matrix<float> s = q.middleCols(h * d, d) * k.middleCols(h * d, d).transpose() / std::sqrt(static_cast<float>(d));
    for (Index i = 0; i < s.rows(); ++i) {
      s.row(i).tail(s.cols() - i - 1).setConstant(-std::numeric_limits<float>::infinity());
      s.row(i) = (s.row(i).array() - s.row(i).maxCoeff()).exp();
      s.row(i) /= s.row(i).sum();
    }
    out.middleCols(h * d, d).noalias() = s * v.middleCols(h * d, d);
  }
}

/// The running softmax on blocks of 128 x 128, Eigen products, blocks above the diagonal skipped.
void eigen_tiled(const Matrix<float>& q, const Matrix<float>& k, const Matrix<float>& v, Matrix<float>& out,
                 Index heads) {
  constexpr Index block = 128;
  const Index d = q.cols() / heads, n = q.rows();
  Matrix<float> s, o;
  for (Index h = 0; h < heads; ++h)
    for (Index i = 0; i < n; i += block) {
      const Index rows = std::min(block, n - i);
      o.setZero(rows, d);
      Eigen::ArrayXf m = Eigen::ArrayXf::Constant(rows, -std::numeric_limits<float>::infinity()),
                     l = Eigen::ArrayXf::Zero(rows);
      for (Index j = 0; j <= i; j += block) {
        const Index cols = std::min(block, n - j);
        s.noalias() = q.block(i, h * d, rows, d) * k.block(j, h * d, cols, d).transpose();
        s /= std::sqrt(static_cast<float>(d));
        if (j == i)
          for (Index r = 0; r < rows; ++r)
            s.row(r).tail(cols - r - 1).setConstant(-std::numeric_limits<float>::infinity());
        const Eigen::ArrayXf top = m.max(s.rowwise().maxCoeff().array()), keep = (m - top).exp();
        s = (s.array().colwise() - top).exp();
        l = l * keep + s.rowwise().sum().array();
        o.array().colwise() *= keep;
        o.noalias() += s * v.block(j, h * d, cols, d);
        m = top;
      }
      out.block(i, h * d, rows, d) = o.array().colwise() / l;
    }
}

void add_eigen(const std::string& name, Index n, Index heads, Index d, auto attention) {
  const Sizes sizes{n, n, heads, heads, d};
  add_row(row_name("causal", name, sizes), [=](benchmark::State& state) {
    const Matrix<float> q = machine::normal(n, heads * d, 1), k = machine::normal(n, heads * d, 2),
                        v = machine::normal(n, heads * d, 3);
    Matrix<float> out(n, heads * d);
    attention(q, k, v, out, heads);
    const double error = (out - qkv::attention(q, k, v, {heads}, qkv::causal)).cwiseAbs().maxCoeff();
    state.counters["max_abs_error"] = error;
    if (!(error < 1e-4)) {
      state.SkipWithError("wrong");
      return;
    }
    const double flops = 2.0 * static_cast<double>(n * (n + 1)) * static_cast<double>(heads * d);
    std::vector<double> fractions;
    for (auto _ : state) {
      const double peak = machine::fma_peak<float>(), start = machine::seconds();
      attention(q, k, v, out, heads);
      const double time = machine::seconds() - start;
      state.SetIterationTime(time);
      fractions.push_back(flops / time / peak);
    }
    state.counters["flops"] = benchmark::Counter(flops, benchmark::Counter::kIsIterationInvariantRate);
    state.counters["peak_fraction"] = machine::median(fractions);
  });
}

/// One Eigen product with the flops of a causal call: what a general matrix product reaches here.
void add_eigen_gemm(Index n, Index heads, Index d) {
  add_row(row_name("causal", "eigen_gemm", {n, n, heads, heads, d}), [=](benchmark::State& state) {
    const Index depth = std::max<Index>(1, (n + 1) * heads * d / n);  // 2·n·n·depth = 2·n(n+1)·heads·d
    const Matrix<float> a = machine::normal(n, depth, 1), b = machine::normal(depth, n, 2);
    Matrix<float> c(n, n);
    const double flops = 2.0 * static_cast<double>(n * n) * static_cast<double>(depth);
    std::vector<double> fractions;
    for (auto _ : state) {
      const double peak = machine::fma_peak<float>(), start = machine::seconds();
      c.noalias() = a * b;
      const double time = machine::seconds() - start;
      benchmark::DoNotOptimize(c.data());
      state.SetIterationTime(time);
      fractions.push_back(flops / time / peak);
    }
    state.counters["flops"] = benchmark::Counter(flops, benchmark::Counter::kIsIterationInvariantRate);
    state.counters["peak_fraction"] = machine::median(fractions);
  });
}

[[maybe_unused]] const bool registered = [] {
  using namespace qkv;
  for (const Index n : {512, 1024, 2048, 4096}) add<float>("causal", causal, {n, n, 8, 8, 128});
  add<float>("causal", causal, {2048, 2048, 8, 8, 64});
  add<float>("full", full, {2048, 2048, 8, 8, 128});
  add<float>("causal", causal, {1024, 1024, 32, 8, 128});
  add<float>("chunk", causal, {512, 4096, 8, 8, 128});
  for (const Index d : {128, 64}) {
    add<bfloat16>("causal", causal, {2048, 2048, 8, 8, d});
    add<std::int8_t>("causal", causal, {2048, 2048, 8, 8, d});
    add<std::int8_t>("causal", causal, {2048, 2048, 8, 8, d}, plain, Arithmetic::int8);
  }
  add<bfloat16>("causal", causal, {2048, 2048, 8, 8, 128}, plain, Arithmetic::exact);
  add<std::int8_t>("causal", causal, {2048, 2048, 8, 8, 128}, plain, Arithmetic::exact);
  add<half>("causal", causal, {2048, 2048, 8, 8, 128});
  static const RowVector<float> slopes = alibi_slopes<float>(8);
  add<float>("softcap", causal, {2048, 2048, 8, 8, 128}, soft_cap(30));
  add<float>("alibi", causal, {2048, 2048, 8, 8, 128}, alibi(slopes));
  add<float>("lambda", causal, {2048, 2048, 8, 8, 128}, [](auto s, const At& at) {
    return s - decltype(s)(0.01) * static_cast<decltype(s)>(at.query_position - at.key_position);
  });
  add<double>("causal", causal, {2048, 2048, 8, 8, 128});
  add<float>("causal", causal, {2048, 2048, 8, 8, 128, 2});
#ifdef _OPENMP
  Eigen::setNbThreads(1);  // its products are rows of one thread
  add<float>("causal", causal, {2048, 2048, 8, 8, 128, 2, true});
#endif
  add<float>("causal", causal, {8192, 8192, 8, 8, 128});
  add<float>("window", window(255, 0), {8192, 8192, 8, 8, 128});
  add_eigen("eigen_naive", 2048, 8, 128, eigen_naive);
  add_eigen("eigen_tiled", 2048, 8, 128, eigen_tiled);
  add_eigen_gemm(2048, 8, 128);
  benchmark::AddCustomContext("qkv build", build_name);
  return true;
}();

}  // namespace

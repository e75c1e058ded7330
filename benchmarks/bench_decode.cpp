// bench_decode — does one new token against a long cache run at the speed of memory?
//
//     decode/<cache>/<storage>/n:<>/heads:<>/kv_heads:<>/d:<>/batch:<>/threads:<>     the decode kernel
//     decode/<baseline>/…                                                             what else could be done
//
// cache: contiguous, ring (its window full and wrapped), paged (64-token pages in permuted order). storage: f32, f16, bf16,
// int8 and *_exact (widened to float where the kernel would multiply in narrower numbers). Baselines: eigen (products on
// the rows of the same cache), bare_read (the same bytes, nothing but read), recompute (one layer over the whole text
// again for every token) beside cached (the same layer with its cache).
//
// bandwidth_fraction: bytes of keys, values and scales over the read bandwidth, every call beside a sample: as many bytes
// from the same allocator, on the same kind of pages, read in order by as many threads; the median of all. The sample also
// pushes the cache out of the processor's caches as far as its size does. max_abs_error and rms_error are against the
// formula in double on the stored rows, of three heads, taken before anything is timed.
#include <benchmark/benchmark.h>
#include <qkv/qkv.hpp>

#include <limits>
#include <memory>
#include <numeric>
#include <string>
#include <type_traits>

#include "support/kept.hpp"
#include "support/machine.hpp"
#include "support/threads.hpp"

namespace {

using qkv::Index;
using qkv::Matrix;

struct Sizes {
  Index n, heads, kv_heads, d, batch = 1, threads = 1, n_queries = 1;

  std::string text() const {
    const auto part = [](const char* key, Index value) { return std::string(key) + ":" + std::to_string(value); };
    return part("/n", n) + part("/heads", heads) + part("/kv_heads", kv_heads) + part("/d", d) + part("/batch", batch) +
           part("/threads", threads) + (n_queries > 1 ? part("/queries", n_queries) : "");
  }
};

// ---- caches of n random rows ----

/// Appends rows until `n` are there; one block of random rows, over and over.
template <class Cache>
void fill(Cache& cache, Index n, const Sizes& s, std::uint64_t seed) {
  constexpr Index piece = 509;
  const Matrix<float> k = machine::normal(piece, s.kv_heads * s.d, seed),
                      v = machine::normal(piece, k.cols(), seed + 1);
  while (cache.position() < n) {
    const Index at = cache.position() % piece;
    const Index rows = std::min({piece - at, n - cache.position(), cache.max_append()});
    cache.append(k.middleRows(at, rows), v.middleRows(at, rows));
  }
}

template <class S>
struct Contiguous {
  static constexpr const char* name = "contiguous";
  qkv::KvCache<S> cache;
  Contiguous(const Sizes& s, std::uint64_t seed)
      : cache({.kv_heads = s.kv_heads, .head_dim = s.d, .v_head_dim = s.d, .capacity = s.n}) {
    fill(cache, s.n, s, seed);
  }
};

template <class S>
struct Ring {
  static constexpr const char* name = "ring";
  qkv::RingCache<S> cache;
  Ring(const Sizes& s, std::uint64_t seed)
      : cache({.kv_heads = s.kv_heads, .head_dim = s.d, .v_head_dim = s.d, .window = s.n - 1, .slack = 1}) {
    fill(cache, s.n + s.n / 3, s, seed);
  }
};

template <class S>
struct Paged {
  static constexpr const char* name = "paged";
  static constexpr Index page = 64;
  qkv::PagePool<S> pool;
  qkv::PagedCache<S> cache;
  Paged(const Sizes& s, std::uint64_t seed)
      : pool({.kv_heads = s.kv_heads,
              .head_dim = s.d,
              .v_head_dim = s.d,
              .page_tokens = page,
              .pages = (s.n + page - 1) / page}),
        cache(pool) {
    // Given back in steps that visit every page once: that is the order in which they are taken again.
    const Index pages = pool.pages();
    for (Index i = 0; i < pages; ++i) pool.acquire();
    Index step = pages * 5 / 13 + 1;
    while (std::gcd(step, pages) != 1) ++step;
    for (Index i = 0; i < pages; ++i) pool.release(i * step % pages);
    fill(cache, s.n, s, seed);
  }
};

template <class S>
Index row_bytes(const Sizes& s) {
  return 2 * s.kv_heads * qkv::row_bytes<S>(s.d);
}

void set_counters(benchmark::State& state, const Sizes& s, double bytes, double bytes_per_token,
                  const std::vector<double>& fractions) {
  using benchmark::Counter;
  state.counters["bytes"] = Counter(bytes, Counter::kIsIterationInvariantRate);
  state.counters["bandwidth_fraction"] = machine::median(fractions);
  state.counters["tokens_per_second"] =
      Counter(static_cast<double>(s.batch * s.n_queries), Counter::kIsIterationInvariantRate);
  state.counters["cache_bytes_per_token"] = bytes_per_token;
}

/// Each call beside a sample of the bandwidth.
template <class Call>
void measure(benchmark::State& state, const Sizes& s, Index bytes, const machine::ReadProbe& probe,
             const support::SleepingThreads& threads, double bytes_per_token, Call&& call) {
  std::vector<double> fractions;
  for (auto _ : state) {
    const double bandwidth = probe.bandwidth(threads, s.threads), start = machine::seconds();
    call();
    const double time = machine::seconds() - start;
    state.SetIterationTime(time);
    fractions.push_back(static_cast<double>(bytes) / time / bandwidth);
  }
  set_counters(state, s, static_cast<double>(bytes), bytes_per_token, fractions);
}

/// Over several heads: the largest error, and rms error over rms output.
struct Errors {
  double largest = 0, squares = 0, reference = 0;

  void add(const Matrix<double>& out, const Matrix<double>& expected) {
    const double most = (out - expected).cwiseAbs().maxCoeff();
    largest = most <= largest ? largest : most;  // NaN too
    squares += (out - expected).squaredNorm(), reference += expected.squaredNorm();
  }
  bool report(benchmark::State& state, double tolerance) const {
    const double rms = std::sqrt(squares / reference);
    state.counters["max_abs_error"] = largest;
    state.counters["rms_error"] = rms;
    if (rms <= tolerance) return true;
    state.SkipWithError(("wrong: rms error " + std::to_string(rms)).c_str());
    return false;
  }
};

/// softmax(q·kᵀ/√d)·v of one head in double, on the rows as stored; queries are the last tokens before `position`.
template <class S>
Matrix<double> formula(const Matrix<double>& q, const qkv::KeyRows<S>& rows, Index position, Index kv_head) {
  Matrix<double> k(rows.rows, q.cols()), v(rows.rows, q.cols());
  std::vector<Index> at;
  for (const auto& run : rows.runs)
    for (Index r = 0; r < run.rows; ++r) {
      const Index i = static_cast<Index>(at.size());
      at.push_back(run.position + r);
      qkv::load_row(rows.key(run, kv_head, r), k.cols(), rows.key_scale(run, kv_head, r), k.row(i).data());
      qkv::load_row(rows.value(run, kv_head, r), v.cols(), rows.value_scale(run, kv_head, r), v.row(i).data());
    }
  Matrix<double> out(q.rows(), q.cols());
  for (Index i = 0; i < q.rows(); ++i) {
    Eigen::VectorXd s = k * q.row(i).transpose() / std::sqrt(static_cast<double>(q.cols()));
    for (Index r = 0; r < s.size(); ++r)
      if (at[static_cast<std::size_t>(r)] > position - q.rows() + i) s[r] = -std::numeric_limits<double>::infinity();
    s = (s.array() - s.maxCoeff()).exp();
    out.row(i) = s.transpose() * v / s.sum();
  }
  return out;
}

/// Of the first, a middle and the last head.
template <class Cache>
Errors errors_of(const Matrix<float>& out, const Matrix<float>& q, const Cache& cache, const Sizes& s) {
  Errors errors;
  for (const Index h : {Index(0), s.heads / 2, s.heads - 1})
    errors.add(qkv::head_columns(out, h, s.heads).template cast<double>(),
               formula(qkv::head_columns(q, h, s.heads).template cast<double>(), cache.key_rows(), cache.position(),
                       h / (s.heads / s.kv_heads)));
  return errors;
}

// ---- rows ----

/// One call for every sequence of a batch, and how far it is from the reference.
template <class S, class Holder>
struct Decode {
  Sizes s;
  std::vector<std::unique_ptr<Holder>> holders;
  std::vector<Matrix<float>> q, out;
  qkv::Workspace workspace;
  qkv::Options<float> options;
  support::SleepingThreads threads;
  Index bytes;
  machine::ReadProbe probe;
  Errors errors;

  Decode(const Sizes& sizes, qkv::Arithmetic arithmetic, qkv::Kernel kernel)
      : s(sizes), threads(s.threads), bytes(s.batch * s.n * row_bytes<S>(s)), probe(bytes) {
    for (Index b = 0; b < s.batch; ++b) {
      const auto seed = static_cast<std::uint64_t>(3 * b + 1);
      holders.push_back(std::make_unique<Holder>(s, seed));
      q.push_back(machine::normal(s.n_queries, s.heads * s.d, seed + 2));
      out.emplace_back(s.n_queries, s.heads * s.d);
    }
    options.kernel = kernel;
    options.arithmetic = arithmetic;
    options.workspace = &workspace;
    (*this)();
    errors = errors_of(out[0], q[0], holders[0]->cache, s);
  }

  void operator()() {
    for (std::size_t b = 0; b < q.size(); ++b)
      qkv::attention_into(out[b], q[b], holders[b]->cache, {s.heads, s.kv_heads}, qkv::causal, qkv::plain, options,
                          threads);
  }
};

template <class S, class Holder>
void decode(benchmark::State& state, const std::string& row, const Sizes& s, qkv::Arithmetic arithmetic,
            double tolerance, qkv::Kernel kernel) {
  auto& call = support::kept<Decode<S, Holder>>(row, s, arithmetic, kernel);
  if (!call.errors.report(state, tolerance)) return;
  measure(state, s, call.bytes, call.probe, call.threads,
          static_cast<double>(call.holders[0]->cache.bytes()) / static_cast<double>(s.n), call);
}

/// The same bytes read and nothing done with them: what decode could reach.
template <class S>
void bare_read(benchmark::State& state, const Sizes& s) {
  const Index bytes = s.batch * s.n * row_bytes<S>(s);
  const machine::ReadProbe probe(bytes), memory(bytes);
  const support::SleepingThreads threads(s.threads);
  measure(state, s, bytes, probe, threads, static_cast<double>(row_bytes<S>(s)),
          [&] { memory.bandwidth(threads, s.threads); });
}

/// Two Eigen products and a softmax for each kv head, on the rows of the cache.
void eigen(benchmark::State& state, const Sizes& s) {
  Contiguous<float> holder(s, 1);
  const Index group = s.heads / s.kv_heads;
  const Matrix<float> q = machine::normal(1, s.heads * s.d, 3);
  Matrix<float> out(1, s.heads * s.d), scores;
  const auto rows = holder.cache.key_rows();
  using Rows = Eigen::Map<const Matrix<float>>;
  const auto call = [&] {
    for (Index h = 0; h < s.kv_heads; ++h) {
      const Rows queries(q.data() + h * group * s.d, group, s.d), keys(rows.key(rows.runs[0], h, 0), s.n, s.d),
          values(rows.value(rows.runs[0], h, 0), s.n, s.d);
      scores.noalias() = queries * keys.transpose();
      scores /= std::sqrt(static_cast<float>(s.d));
      scores = (scores.array().colwise() - scores.rowwise().maxCoeff().array()).exp();
      scores.array().colwise() /= scores.rowwise().sum().array().eval();
      Eigen::Map<Matrix<float>>(out.data() + h * group * s.d, group, s.d).noalias() = scores * values;
    }
  };
  call();
  if (!errors_of(out, q, holder.cache, s).report(state, 5e-6)) return;
  const Index bytes = s.n * row_bytes<float>(s);
  measure(state, s, bytes, machine::ReadProbe(bytes), support::SleepingThreads(1),
          static_cast<double>(row_bytes<float>(s)), call);
}

/// One layer, token n: with a cache it projects and attends for one token; without, for all n again.
void layer(benchmark::State& state, const Sizes& s, bool cached) {
  const Index model_dim = s.heads * s.d;
  const qkv::MultiHeadAttentionConfig config{
      .model_dim = model_dim, .heads = s.heads, .kv_heads = s.kv_heads, .head_dim = s.d};
  const qkv::MultiHeadAttention<float> mha(config, qkv::MultiHeadAttentionWeights<float>::random(config));
  const Matrix<float> x = machine::normal(s.n, model_dim, 2);
  auto cache = mha.make_cache(s.n);
  mha.forward(x.topRows(s.n - 1), cache);
  Matrix<float> last;
  const auto call = [&] {
    if (cached) {
      last = mha.forward(x.bottomRows(1), cache);
      cache.truncate(s.n - 1);
    } else {
      last = mha.forward(x).bottomRows(1);
    }
  };
  call();
  const Matrix<double> expected = mha.forward(x).bottomRows(1).cast<double>();
  Errors errors;
  errors.add(last.cast<double>(), expected);
  if (!errors.report(state, 1e-5)) return;
  const double tokens = cached ? 1 : static_cast<double>(s.n), n = static_cast<double>(s.n);
  const double width = static_cast<double>(model_dim), kv_width = static_cast<double>(s.kv_heads * s.d);
  const double pairs = cached ? n : n * (n + 1) / 2;
  for (auto _ : state) {
    const double start = machine::seconds();
    call();
    state.SetIterationTime(machine::seconds() - start);
  }
  using benchmark::Counter;
  state.counters["multiplications"] = tokens * width * (2 * width + 2 * kv_width) + 2 * pairs * width;
  state.counters["tokens_per_second"] = Counter(1, Counter::kIsIterationInvariantRate);
}

void add_row(const std::string& name, auto run) {
  benchmark::RegisterBenchmark(name.c_str(), run)->UseManualTime()->Unit(benchmark::kMillisecond);
}

template <class S, template <class> class Holder = Contiguous>
void add(const Sizes& s, qkv::Arithmetic arithmetic = qkv::Arithmetic::automatic,
         qkv::Kernel kernel = qkv::Kernel::decode) {
  const bool exact = arithmetic == qkv::Arithmetic::exact;
  // Where an output is one chain of sums over all keys (tiled), its error grows as the root of their number.
  const double f32 =
      kernel == qkv::Kernel::tiled ? std::max(5e-6, 0x1p-24 * std::sqrt(static_cast<double>(s.n))) : 5e-6;
  const double tolerance = exact || sizeof(S) == 4 ? f32 : qkv::has_row_scale<S> ? 1e-2 : 3e-3;
  const std::string row = std::string("decode/") + Holder<S>::name + "/" + qkv::storage_name<S> +
                          (exact ? "_exact" : "") + (kernel == qkv::Kernel::tiled ? "_tiled" : "") + s.text();
  add_row(row, [=](benchmark::State& state) { decode<S, Holder<S>>(state, row, s, arithmetic, tolerance, kernel); });
}

template <class S>
void add_caches(const Sizes& s) {
  add<S>(s);
  add<S, Ring>(s);
  add<S, Paged>(s);
}

[[maybe_unused]] const bool registered = [] {
  using qkv::Arithmetic;
  constexpr Sizes gqa{.n = 32768, .heads = 32, .kv_heads = 8, .d = 128};
  constexpr Sizes mha{.n = 8192, .heads = 32, .kv_heads = 32, .d = 128};
  [&]<class... S>(std::type_identity<std::tuple<S...>>) {
    for (const Sizes& s : {gqa, mha}) (add_caches<S>(s), ...);
  }(std::type_identity<qkv::StorageTypes>{});
  add<qkv::bfloat16>(gqa, Arithmetic::exact);
  add<std::int8_t>(gqa, Arithmetic::exact);
  add<std::int8_t>(mha, Arithmetic::exact);
  for (const Index n : {1024, 32768})
    for (const Index threads : {1, 2}) {
      const Sizes s{.n = n, .heads = 32, .kv_heads = 8, .d = 128, .threads = threads};
      if (n == 32768 && threads == 1) continue;  // above
      add<float>(s);
      add<qkv::bfloat16>(s);
      add<std::int8_t>(s);
    }
  for (const Index threads : {1, 2}) add<float>({32768, 8, 1, 128, 1, threads});  // one kv head: keys are split
  for (const Index d : {64, 256}) add<float>({16384, 16, 4, d});
  for (const Index threads : {1, 2}) add<float>({2048, 32, 8, 128, 16, threads});
  // Several new tokens: where the tiled kernel takes over.
  for (const Sizes& s : {Sizes{16384, 32, 32, 128}, Sizes{16384, 64, 8, 128}})
    for (const Index queries : {2, 4, 8, 16, 32})
      for (const auto kernel : {qkv::Kernel::decode, qkv::Kernel::tiled}) {
        Sizes several = s;
        several.n = s.kv_heads == 32 ? 4096 : 16384;
        several.n_queries = queries;
        add<float>(several, Arithmetic::automatic, kernel);
        add<qkv::bfloat16>(several, Arithmetic::automatic, kernel);
      }
  for (const Sizes& s : {gqa, mha}) {
    add_row("decode/eigen/f32" + s.text(), [=](benchmark::State& state) { eigen(state, s); });
    add_row("decode/bare_read/f32" + s.text(), [=](benchmark::State& state) { bare_read<float>(state, s); });
    add_row("decode/bare_read/int8" + s.text(), [=](benchmark::State& state) { bare_read<std::int8_t>(state, s); });
  }
  for (const bool cached : {true, false}) {
    const Sizes s{1024, 16, 16, 64};
    add_row(std::string("decode/") + (cached ? "cached" : "recompute") + "/f32" + s.text(),
            [=](benchmark::State& state) { layer(state, s, cached); });
  }
  benchmark::AddCustomContext("qkv build", qkv::build_name);
  return true;
}();

}  // namespace

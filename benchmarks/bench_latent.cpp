// bench_latent — what does latent attention of DeepSeek's size cost, in its two forms, beside MHA, GQA and MQA?
//
//     decode/absorbed/<storage>/n:<>/heads:<>/threads:<>       one token on n cached rows, the attention part
//     decode/naive/<storage>/…                                 the same, keys and values restored for every call
//     prefill/<absorbed|naive>/<storage>/n:<>/heads:<>/…       a text of n tokens, causal, into an empty cache
//     prefill/naive_attend/f32/…                               its attention alone, d 192 / 128, keys and values restored
//     decode/<mha|gqa8|mqa>/<storage>/…                        heads of 128 features, keys and values cached
//     break_even/<absorbed|naive>/f32/n:<>/heads:<>/new:<>     `new` tokens on n cached rows, both ends of the form
//     layer/<mla|mha>/<storage>/n:<>/model_dim:<>              a whole layer, one token, projections included
//
// heads: 16 as in DeepSeek-V2-Lite, 128 as in V3; latent 512, rope key 64, heads of 128 + 64 and 128 features. storage:
// f32, f16, bf16, int8, *_exact, widened to float, and int8_throughout. peak_fraction: useful flops over the f32 FMA peak, each call beside
// a peak sample; for several threads over the peak of as many. rms_error and max_abs_error are against the formula in
// double on the stored rows. cache_bytes_per_token: as allocated; saved_against_*: another cache's bytes over these.
#include <benchmark/benchmark.h>
#include <qkv/qkv.hpp>

#include <condition_variable>
#include <mutex>
#include <string>
#include <thread>
#include <type_traits>

#include "support/machine.hpp"

namespace {

using qkv::Index;
using qkv::Matrix;

constexpr Index latent_dim = 512, rope_dim = 64, nope_dim = 128, v_head_dim = 128;
const float scale = 1 / std::sqrt(static_cast<float>(nope_dim + rope_dim));

/// The caller and, for two threads, a helper that spins between calls: no thread is started inside what is timed.
class Pair {
 public:
  explicit Pair(Index threads) {
    if (threads > 1) helper_ = std::thread([this] { help(); });
  }
  ~Pair() {
    if (!helper_.joinable()) return;
    stop_ = true;
    ++round_;
    helper_.join();
  }
  template <class F>
  void operator()(Index n, F&& f) const {
    if (!helper_.joinable() || n == 1) return qkv::serial(n, f);
    next_ = 0, n_ = n, idle_ = false;
    work_ = [&f](Index i) { f(i); };
    ++round_;
    run();
    while (!idle_) {
    }
  }

 private:
  void run() const {
    for (Index i = next_++; i < n_; i = next_++) work_(i);
  }
  void help() const {
    for (Index seen = 0;;) {
      while (round_ == seen) {
      }
      ++seen;
      if (stop_) return;
      run();
      idle_ = true;
    }
  }
  mutable std::atomic<Index> next_{0}, round_{0};
  mutable std::atomic<bool> idle_{true}, stop_{false};
  mutable Index n_ = 0;
  mutable std::function<void(Index)> work_;
  std::thread helper_;
};

/// The peak of `threads` threads at once.
double peak_of(const Pair& threads, Index count) {
  std::vector<double> each(static_cast<std::size_t>(count));
  threads(count, [&](Index i) { each[static_cast<std::size_t>(i)] = machine::fma_peak<float>(); });
  double sum = 0;
  for (const double x : each) sum += x;
  return sum;
}

/// Times `call` and reports; `flops` and `bytes` are those of one call.
template <class F>
void time_calls(benchmark::State& state, double flops, double bytes, Index tokens, Index threads, const Pair& pair,
                F&& call) {
  std::vector<double> fractions;
  for (auto _ : state) {
    const double peak = peak_of(pair, threads), start = machine::seconds();
    call();
    const double time = machine::seconds() - start;
    state.SetIterationTime(time);
    fractions.push_back(flops / time / peak);
  }
  state.counters["flops"] = benchmark::Counter(flops, benchmark::Counter::kIsIterationInvariantRate);
  state.counters["bytes"] = benchmark::Counter(bytes, benchmark::Counter::kIsIterationInvariantRate);
  state.counters["peak_fraction"] = machine::median(fractions);
  state.counters["tokens_per_second"] =
      benchmark::Counter(static_cast<double>(tokens), benchmark::Counter::kIsIterationInvariantRate);
}

/// Adds up errors; false where the relative root mean square is past the tolerance.
struct Errors {
  double worst = 0, squares = 0, reference = 0;
  template <class A, class B>
  void add(const A& got, const B& expected) {
    const Matrix<double> error = got.template cast<double>() - expected;
    const double most = error.cwiseAbs().maxCoeff();
    worst = most <= worst ? worst : most;  // NaN too
    squares += error.squaredNorm(), reference += expected.squaredNorm();
  }
  bool report(benchmark::State& state, double tolerance) const {
    const double rms = std::sqrt(squares / reference);
    state.counters["max_abs_error"] = worst;
    state.counters["rms_error"] = rms;
    if (rms <= tolerance) return true;
    state.SkipWithError(("wrong: rms error " + std::to_string(rms)).c_str());
    return false;
  }
};

template <class S>
double tolerance(bool exact) {
  return exact || sizeof(S) == 4 || std::is_same_v<S, qkv::half> ? 1e-5 : qkv::has_row_scale<S> ? 3e-2 : 5e-3;
}

/// softmax(scale·(q_nope·k + q_rope·r))·v of one head in double.
Matrix<double> formula(const Matrix<double>& q, const Matrix<double>& k, const Matrix<double>& v, Index first) {
  Matrix<double> out(q.rows(), v.cols());
  for (Index i = 0; i < q.rows(); ++i) {
    const Index n = std::min(first + i + 1, k.rows());
    Eigen::VectorXd s = static_cast<double>(scale) * (k.topRows(n) * q.row(i).transpose());
    s = (s.array() - s.maxCoeff()).exp();
    out.row(i) = (s.transpose() * v.topRows(n)) / s.sum();
  }
  return out;
}
Matrix<double> beside(const Matrix<double>& a, const Matrix<double>& b) {
  Matrix<double> both(a.rows(), a.cols() + b.cols());
  both << a, b;
  return both;
}

struct Sizes {
  Index n, heads, n_new = 1, threads = 1;
};
/// Pairs of a new token and a key that it sees.
double pairs(const Sizes& s) {
  return static_cast<double>(s.n_new) * (static_cast<double>(s.n - s.n_new) + static_cast<double>(s.n_new + 1) / 2);
}

template <class S>
qkv::LatentCache<S> filled(Index n) {
  qkv::LatentCache<S> cache({.latent_dim = latent_dim, .rope_dim = rope_dim, .capacity = n});
  cache.append(machine::normal(n, latent_dim, 1), machine::normal(n, rope_dim, 2));
  return cache;
}

/// Bytes that a token takes in the cache itself and in those of multi-head attention and its relatives.
template <class S>
void report_bytes(benchmark::State& state, Index bytes, Index n, Index heads) {
  const auto per_token = [n](Index all) { return static_cast<double>(all) / static_cast<double>(n); };
  const auto other = [&](Index kv_heads, Index head_dim) {
    return per_token(
        qkv::KvCache<S>({.kv_heads = kv_heads, .head_dim = head_dim, .v_head_dim = v_head_dim, .capacity = n}).bytes());
  };
  const double own = per_token(bytes);
  state.counters["cache_bytes_per_token"] = own;
  state.counters["saved_against_mha"] = other(heads, nope_dim) / own;
  state.counters["saved_against_naive"] = other(heads, nope_dim + rope_dim) / own;
  state.counters["saved_against_gqa8"] = other(8, nope_dim) / own;
}

template <class S>
void absorbed(benchmark::State& state, const Sizes& s, qkv::Arithmetic arithmetic) {
  const auto cache = filled<S>(s.n);
  const Index width = latent_dim + rope_dim;
  // As W_UK of variance 1/latent_dim makes them of normal queries: deviation ½ for latents, 1 for the rope part. Scores then
  // deviate by 1; with 1 throughout they would by 1.7, and int8's error with them.
  Matrix<float> q = machine::normal(s.n_new, s.heads * width, 3);
  for (Index h = 0; h < s.heads; ++h)
    q.middleCols(h * width, latent_dim) *= std::sqrt(static_cast<float>(nope_dim) / latent_dim);
  Matrix<float> out(s.n_new, s.heads * latent_dim);
  qkv::Workspace workspace;
  const Pair pair(s.threads);
  const qkv::Options<float> options{
      .scale = static_cast<double>(scale), .arithmetic = arithmetic, .workspace = &workspace};
  const auto call = [&] {
    if (s.threads == 1)
      qkv::absorbed_attention_into(out, q, cache, s.heads, qkv::causal, options);
    else
      qkv::absorbed_attention_into(out, q, cache, s.heads, qkv::causal, options, pair);
  };
  call();
  Errors errors;
  const Matrix<double> c = cache.template latent<double>(), k = beside(c, cache.template rope_keys<double>());
  for (const Index h : {Index(0), s.heads / 2, s.heads - 1})
    for (Index i = 0; i < s.n_new; i += std::max<Index>(1, s.n_new / 3))
      errors.add(out.row(i).segment(h * latent_dim, latent_dim),
                 formula(q.row(i).segment(h * width, width).cast<double>(), k, c, s.n - s.n_new + i));
  if (!errors.report(state, tolerance<S>(arithmetic == qkv::Arithmetic::exact))) return;
  time_calls(state, 2 * pairs(s) * static_cast<double>(s.heads * (2 * latent_dim + rope_dim)),
             static_cast<double>(cache.bytes()), s.n_new, s.threads, pair, call);
  report_bytes<S>(state, cache.bytes(), s.n, s.heads);
}

/// Naive: `whole` counts the up-projections as well; their flops are useful, if only in this form.
template <class S>
void naive(benchmark::State& state, const Sizes& s) {
  const auto cache = filled<S>(s.n);
  const Index d = nope_dim + rope_dim;
  const Matrix<float> q = machine::normal(s.n_new, s.heads * d, 3);
  const float deviation = 1 / std::sqrt(static_cast<float>(latent_dim));
  const qkv::Projection<float> key_up(machine::normal(latent_dim, s.heads * nope_dim, 4) * deviation),
      value_up(machine::normal(latent_dim, s.heads * v_head_dim, 5) * deviation);
  Matrix<float> out(s.n_new, s.heads * v_head_dim), m(s.n_new, s.heads), l(s.n_new, s.heads);
  qkv::Workspace workspace;
  const Pair pair(s.threads);
  const auto rule = qkv::detail::rule_of<float, float>(qkv::causal, qkv::plain);
  const qkv::kernel::LatentTask<float, S> task{cache.latent_rows(), s.heads, scale, 0, s.n - s.n_new, rule};
  const qkv::kernel::StateView<float> view{m.data(), l.data(), qkv::writable_view(out), s.heads};
  const auto call = [&] {
    qkv::kernel::latent_naive(task, qkv::view(q), key_up, value_up, view, workspace, qkv::serial);
  };
  call();
  Errors errors;
  const Matrix<double> c = cache.template latent<double>(), w_key = key_up.weight().template cast<double>(),
                       w_value = value_up.weight().template cast<double>();
  for (const Index h : {Index(0), s.heads - 1}) {
    const Matrix<double> k = beside(c * qkv::head_columns(w_key, h, s.heads), cache.template rope_keys<double>()),
                         v = c * qkv::head_columns(w_value, h, s.heads);
    for (Index i = 0; i < s.n_new; i += std::max<Index>(1, s.n_new / 3))
      errors.add(out.row(i).segment(h * v_head_dim, v_head_dim) / l(i, h),
                 formula(q.row(i).segment(h * d, d).cast<double>(), k, v, s.n - s.n_new + i));
  }
  if (!errors.report(state, 1e-5)) return;
  const double up = static_cast<double>(s.n) * static_cast<double>(s.heads * latent_dim * (nope_dim + v_head_dim));
  time_calls(state, 2 * (pairs(s) * static_cast<double>(s.heads * (d + v_head_dim)) + up),
             static_cast<double>(cache.bytes()), s.n_new, s.threads, pair, call);
  report_bytes<S>(state, cache.bytes(), s.n, s.heads);
}

/// n rows: one block of random ones, over and over. A copy of all of it would not fit beside it.
template <class Cache>
void fill(Cache& cache, Index n, Index key_width, Index value_width) {
  const Index block = std::min<Index>(509, n);
  const Matrix<float> k = machine::normal(block, key_width, 1), v = machine::normal(block, value_width, 2);
  for (Index first = 0; first < n; first += block) {
    const Index rows = std::min(block, n - first);
    cache.append(k.topRows(rows), v.topRows(rows));
  }
}

/// Keys and values in a cache of their own: naive latent attention once restored (kv_heads = heads, d 192), MHA, GQA, MQA.
template <class S>
void with_keys(benchmark::State& state, const Sizes& s, Index kv_heads, Index d) {
  qkv::KvCache<S> cache({.kv_heads = kv_heads, .head_dim = d, .v_head_dim = v_head_dim, .capacity = s.n});
  fill(cache, s.n, kv_heads * d, kv_heads * v_head_dim);
  const Matrix<float> q = machine::normal(s.n_new, s.heads * d, 3);
  Matrix<float> out(s.n_new, s.heads * v_head_dim);
  qkv::Workspace workspace;
  qkv::Options<float> options;
  options.scale = static_cast<double>(scale);
  options.workspace = &workspace;
  const Pair pair(1);
  const auto call = [&] {
    qkv::attention_into(out, q, cache, {s.heads, kv_heads}, qkv::causal, qkv::plain, options, qkv::serial);
  };
  call();
  Errors errors;
  const qkv::KeyRows<S> rows = cache.key_rows();
  const auto& run = rows.runs[0];
  Matrix<double> k(s.n, d), v(s.n, v_head_dim);
  const Index head = s.heads - 1, kv_head = kv_heads - 1;
  for (Index i = 0; i < s.n; ++i) {
    qkv::load_row(rows.key(run, kv_head, i), d, rows.key_scale(run, kv_head, i), k.row(i).data());
    qkv::load_row(rows.value(run, kv_head, i), v_head_dim, rows.value_scale(run, kv_head, i), v.row(i).data());
  }
  for (Index i = 0; i < s.n_new; i += std::max<Index>(1, s.n_new / 3))
    errors.add(out.row(i).segment(head * v_head_dim, v_head_dim),
               formula(q.row(i).segment(head * d, d).cast<double>(), k, v, s.n - s.n_new + i));
  if (!errors.report(state, tolerance<S>(false))) return;
  time_calls(state, 2 * pairs(s) * static_cast<double>(s.heads * (d + v_head_dim)), static_cast<double>(cache.bytes()),
             s.n_new, 1, pair, call);
  state.counters["cache_bytes_per_token"] = static_cast<double>(cache.bytes()) / static_cast<double>(s.n);
}

/// The latent parts of a form together, as `choose_latent_form` weighs them: absorption of queries and of outputs, or the
/// restoring of keys and values, and attention.
void break_even(benchmark::State& state, const Sizes& s, qkv::LatentForm form) {
  qkv::LatentAttentionConfig config = qkv::deepseek_v2_lite;
  config.heads = s.heads;
  config.model_dim = 64;  // what is projected besides is the same in both
  const qkv::LatentAttention<float> layer(config, qkv::LatentAttentionWeights<float>::random(config));
  auto cache = layer.make_cache(s.n);
  cache.append(machine::normal(s.n - s.n_new, latent_dim, 1), machine::normal(s.n - s.n_new, rope_dim, 2));
  const Matrix<float> x = machine::normal(s.n_new, config.model_dim, 3);
  Matrix<float> out(s.n_new, config.model_dim);
  const auto call = [&] {
    cache.truncate(s.n - s.n_new);
    layer.forward_into(out, x, cache, qkv::causal, qkv::plain, {.form = form});
  };
  call();
  const Matrix<float> one = out;
  cache.truncate(s.n - s.n_new);
  layer.forward_into(out, x, cache, qkv::causal, qkv::plain,
                     {.form = form == qkv::LatentForm::naive ? qkv::LatentForm::absorbed : qkv::LatentForm::naive});
  Errors errors;
  errors.add(one, out.cast<double>());
  if (!errors.report(state, 1e-5)) return;
  const Pair pair(1);
  time_calls(state, 0, static_cast<double>(cache.bytes()), s.n_new, 1, pair, call);
}

/// One token through a whole layer.
template <class S>
void layer_mla(benchmark::State& state, Index n, Index model_dim) {
  qkv::LatentAttentionConfig config = qkv::deepseek_v3;
  config.model_dim = model_dim;
  const qkv::LatentAttention<float> layer(config, qkv::LatentAttentionWeights<float>::random(config));
  auto cache = layer.template make_cache<S>(n);
  cache.append(machine::normal(n - 1, latent_dim, 1), machine::normal(n - 1, rope_dim, 2));
  const Matrix<float> x = machine::normal(1, model_dim, 3);
  Matrix<float> out(1, model_dim);
  const auto call = [&] {
    cache.truncate(n - 1);
    layer.forward_into(out, x, cache);
  };
  call();
  const Pair pair(1);
  time_calls(state, 0, static_cast<double>(cache.bytes()), 1, 1, pair, call);
  report_bytes<S>(state, cache.bytes(), n, config.heads);
}
template <class S>
void layer_mha(benchmark::State& state, Index n, Index model_dim) {
  qkv::LatentAttentionConfig mla = qkv::deepseek_v3;
  mla.model_dim = model_dim;
  const qkv::MultiHeadAttentionConfig config = qkv::multi_head_equivalent(mla);
  const qkv::MultiHeadAttention<float> layer(config, qkv::MultiHeadAttentionWeights<float>::random(config));
  auto cache = layer.template make_cache<S>(n);
  fill(cache, n - 1, config.kv_heads * config.head_dim, config.kv_heads * config.v_head_dim);
  const Matrix<float> x = machine::normal(1, model_dim, 3);
  Matrix<float> out(1, model_dim);
  const auto call = [&] {
    cache.truncate(n - 1);
    layer.forward_into(out, x, cache);
  };
  call();
  const Pair pair(1);
  time_calls(state, 0, static_cast<double>(cache.bytes()), 1, 1, pair, call);
  state.counters["cache_bytes_per_token"] = static_cast<double>(cache.bytes()) / static_cast<double>(n);
}

void add_row(const std::string& name, auto run) {
  benchmark::RegisterBenchmark(name.c_str(), run)->UseManualTime()->Unit(benchmark::kMillisecond);
}
std::string at(const Sizes& s) {
  return "/n:" + std::to_string(s.n) + "/heads:" + std::to_string(s.heads) + "/threads:" + std::to_string(s.threads);
}

template <class S>
void add_storage() {
  using namespace qkv;
  const std::string storage = storage_name<S>;
  for (const Index heads : {8, 16, 128})
    for (const Index n : {1024, 4096, 16384}) {
      if (heads == 8 && n != 4096) continue;
      const Sizes s{n, heads};
      add_row("decode/absorbed/" + storage + at(s),
              [=](benchmark::State& state) { absorbed<S>(state, s, Arithmetic::automatic); });
      if (heads == 128) {
        const Sizes two{n, heads, 1, 2};
        add_row("decode/absorbed/" + storage + at(two),
                [=](benchmark::State& state) { absorbed<S>(state, two, Arithmetic::automatic); });
      }
    }
  if (sizeof(S) < 2 || std::is_same_v<S, bfloat16>)
    for (const Index heads : {16, 128}) {
      const Sizes s{4096, heads};
      add_row("decode/absorbed/" + storage + "_exact" + at(s),
              [=](benchmark::State& state) { absorbed<S>(state, s, Arithmetic::exact); });
    }
  if (has_row_scale<S>)
    for (const Index heads : {16, 128})
      for (const Index n : {1024, 4096, 16384}) {
        const Sizes s{n, heads};
        add_row("decode/absorbed/" + storage + "_throughout" + at(s),
                [=](benchmark::State& state) { absorbed<S>(state, s, Arithmetic::int8); });
      }
  for (const Index heads : {16, 128}) {
    for (const Index n : {1024, 4096}) {
      const Sizes s{n, heads};
      add_row("decode/mha/" + storage + at(s), [=](benchmark::State& state) { with_keys<S>(state, s, heads, 128); });
      add_row("decode/gqa8/" + storage + at(s), [=](benchmark::State& state) { with_keys<S>(state, s, 8, 128); });
      add_row("decode/mqa/" + storage + at(s), [=](benchmark::State& state) { with_keys<S>(state, s, 1, 128); });
    }
    const Sizes s{1024, heads};
    add_row("decode/naive/" + storage + at(s), [=](benchmark::State& state) { naive<S>(state, s); });
  }
  for (const Index n : {1024, 2048}) {
    const Sizes s{n, 16, n};
    add_row("prefill/naive/" + storage + at(s), [=](benchmark::State& state) { naive<S>(state, s); });
    add_row("prefill/absorbed/" + storage + at(s),
            [=](benchmark::State& state) { absorbed<S>(state, s, Arithmetic::automatic); });
  }
  const Sizes s{512, 128, 512};
  add_row("prefill/naive/" + storage + at(s), [=](benchmark::State& state) { naive<S>(state, s); });
  add_row("prefill/absorbed/" + storage + at(s),
          [=](benchmark::State& state) { absorbed<S>(state, s, Arithmetic::automatic); });
}

[[maybe_unused]] const bool registered = [] {
  using namespace qkv;
  add_storage<float>();
  add_storage<half>();
  add_storage<bfloat16>();
  add_storage<std::int8_t>();
  const Sizes attend{2048, 16, 2048};
  add_row("prefill/naive_attend/f32" + at(attend),
          [=](benchmark::State& state) { with_keys<float>(state, attend, 16, nope_dim + rope_dim); });
  for (const Index heads : {16, 128})
    for (const Index cached : {0, 1024, 4096})
      for (const Index n_new : {64, 128, 192, 256, 384, 512})
        for (const LatentForm form : {LatentForm::absorbed, LatentForm::naive}) {
          if (heads == 128 && (cached != 1024 || n_new % 128 != 0 || n_new > 256))
            continue;  // the same ratio, 8x the time
          const Sizes s{cached + n_new, heads, n_new};
          add_row(std::string("break_even/") + (form == LatentForm::naive ? "naive" : "absorbed") + "/f32/n:" +
                      std::to_string(cached) + "/heads:" + std::to_string(heads) + "/new:" + std::to_string(n_new),
                  [=](benchmark::State& state) { break_even(state, s, form); });
        }
  for (const Index n : {1024, 16384}) {
    const std::string rest = "/n:" + std::to_string(n) + "/model_dim:";
    add_row("layer/mla/bf16" + rest + "7168", [=](benchmark::State& state) { layer_mla<bfloat16>(state, n, 7168); });
    add_row("layer/mha/bf16" + rest + "7168", [=](benchmark::State& state) { layer_mha<bfloat16>(state, n, 7168); });
  }
  benchmark::AddCustomContext("qkv build", build_name);
  return true;
}();

}  // namespace

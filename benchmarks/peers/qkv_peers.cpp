// qkv_peers — the library behind a C interface, so that benchmarks/peers/run can call it in the process of its peers.
//
// A call is prepared once (caches filled, scratch warm) and then run as often as it is timed. Beside it: the machine's peak
// and bandwidth, and attention on top of whatever sgemm the caller has found (OpenBLAS').
#include <qkv/qkv.hpp>

#include <exception>
#include <functional>
#include <memory>
#include <string>

#include "support/machine.hpp"
#include "support/threads.hpp"

namespace {

using qkv::Index;
using qkv::Matrix;
using Rows = Eigen::Map<const Matrix<float>>;
using Out = Eigen::Map<Matrix<float>>;

std::string last_error;

struct Call {
  explicit Call(Index count) : threads(count) { options.workspace = &workspace; }
  support::SleepingThreads threads;
  qkv::Workspace workspace;
  qkv::Options<float> options;
  std::function<void()> run;
};

/// make(S()) for the storage of that name; null, and last_error, where it fails.
template <class F>
Call* prepared(const char* storage, const F& make) {
  const std::string name = storage;
  try {
    if (name == "f32") return make(float()).release();
    if (name == "f16") return make(qkv::half()).release();
    if (name == "bf16") return make(qkv::bfloat16()).release();
    if (name == "int8") return make(std::int8_t()).release();
    last_error = "unknown storage " + name;
  } catch (const std::exception& error) {
    last_error = error.what();
  }
  return nullptr;
}

}  // namespace

extern "C" {

using Sgemm = void (*)(int order, int transpose_a, int transpose_b, std::int64_t m, std::int64_t n, std::int64_t k,
                       float alpha, const float* a, std::int64_t lda, const float* b, std::int64_t ldb, float beta,
                       float* c, std::int64_t ldc);

const char* qkv_peers_build() { return qkv::build_name; }
const char* qkv_peers_error() { return last_error.c_str(); }
double qkv_peers_fma_peak() { return machine::fma_peak<float>(); }
double qkv_peers_bandwidth(std::int64_t bytes, std::int64_t threads) { return machine::read_bandwidth(bytes, threads); }
void qkv_peers_run(Call* call) { call->run(); }
void qkv_peers_free(Call* call) { delete call; }

/// q [n, heads·d], k and v [n, kv_heads·d] and out stay the caller's; causal. Stored as S beforehand.
Call* qkv_peers_prefill(const char* storage, std::int64_t n, std::int64_t heads, std::int64_t kv_heads, std::int64_t d,
                        std::int64_t threads, const float* q, const float* k, const float* v, float* out) {
  return prepared(storage, [&]<class S>(S) {
    auto call = std::make_unique<Call>(threads);
    const Rows queries(q, n, heads * d), keys(k, n, kv_heads * d), values(v, n, kv_heads * d);
    Call& c = *call;
    if constexpr (qkv::has_row_scale<S>) {
      auto cache = std::make_shared<qkv::KvCache<S>>(
          qkv::KvCacheConfig{.kv_heads = kv_heads, .head_dim = d, .v_head_dim = d, .capacity = n});
      cache->append(keys, values);
      c.run = [=, &c] {
        qkv::attention_into(Out(out, n, heads * d), Rows(q, n, heads * d), *cache, {heads, kv_heads}, qkv::causal,
                            qkv::plain, c.options, c.threads);
      };
    } else {
      auto stored_keys = std::make_shared<Matrix<S>>(keys.template cast<S>()),
           stored_values = std::make_shared<Matrix<S>>(values.template cast<S>());
      c.run = [=, &c] {
        qkv::attention_into(Out(out, n, heads * d), Rows(q, n, heads * d), *stored_keys, *stored_values,
                            {heads, kv_heads}, qkv::causal, qkv::plain, c.options, c.threads);
      };
    }
    c.run();
    return call;
  });
}

/// One token, q and out [1, heads·d], on a full cache of n.
Call* qkv_peers_decode(const char* storage, std::int64_t n, std::int64_t heads, std::int64_t kv_heads, std::int64_t d,
                       std::int64_t threads, const float* q, const float* k, const float* v, float* out) {
  return prepared(storage, [&]<class S>(S) {
    auto call = std::make_unique<Call>(threads);
    Call& c = *call;
    auto cache = std::make_shared<qkv::KvCache<S>>(
        qkv::KvCacheConfig{.kv_heads = kv_heads, .head_dim = d, .v_head_dim = d, .capacity = n});
    cache->append(Rows(k, n, kv_heads * d), Rows(v, n, kv_heads * d));
    c.run = [=, &c] {
      qkv::attention_into(Out(out, 1, heads * d), Rows(q, 1, heads * d), *cache, {heads, kv_heads}, qkv::causal,
                          qkv::plain, c.options, c.threads);
    };
    c.run();
    return call;
  });
}

/// Absorbed: q [1, heads·(latent + rope)] against n rows c [n, latent] and r [n, rope]; out [1, heads·latent].
Call* qkv_peers_latent_decode(const char* storage, std::int64_t n, std::int64_t heads, std::int64_t latent,
                              std::int64_t rope, float scale, std::int64_t threads, const float* q, const float* c,
                              const float* r, float* out) {
  return prepared(storage, [&]<class S>(S) {
    auto call = std::make_unique<Call>(threads);
    auto cache = std::make_shared<qkv::LatentCache<S>>(
        qkv::LatentCacheConfig{.latent_dim = latent, .rope_dim = rope, .capacity = n});
    cache->append(Rows(c, n, latent), Rows(r, n, rope));
    auto m = std::make_shared<Matrix<float>>(1, heads), l = std::make_shared<Matrix<float>>(1, heads);
    call->run = [=, &own = *call] {
      const auto rule = qkv::detail::rule_of<float, float>(qkv::causal, qkv::plain);
      const qkv::kernel::LatentTask<float, S> task{cache->latent_rows(), heads, scale, 0, n - 1, rule};
      Out weighted(out, 1, heads * latent);
      const qkv::kernel::StateView<float> state{m->data(), l->data(), qkv::writable_view(weighted), heads};
      const Rows query(q, 1, heads * (latent + rope));
      qkv::kernel::latent_absorbed(task, qkv::view(query), state, own.workspace, own.threads);
      for (Index h = 0; h < heads; ++h) weighted.middleCols(h * latent, latent) /= (*l)(0, h);
    };
    call->run();
    return call;
  });
}

/// Naive: restores k = [c·key_up | r] and v = c·value_up, then attends causally. q [n, heads·(nope + rope)], key_up [latent,
/// heads·nope], value_up [latent, heads·v_dim], out [n, heads·v_dim].
Call* qkv_peers_latent_prefill(const char* storage, std::int64_t n, std::int64_t heads, std::int64_t latent,
                               std::int64_t nope, std::int64_t rope, std::int64_t v_dim, float scale,
                               std::int64_t threads, const float* q, const float* c, const float* r,
                               const float* key_up, const float* value_up, float* out) {
  return prepared(storage, [&]<class S>(S) {
    auto call = std::make_unique<Call>(threads);
    auto cache = std::make_shared<qkv::LatentCache<S>>(
        qkv::LatentCacheConfig{.latent_dim = latent, .rope_dim = rope, .capacity = n});
    cache->append(Rows(c, n, latent), Rows(r, n, rope));
    auto keys = std::make_shared<qkv::Projection<float>>(Matrix<float>(Rows(key_up, latent, heads * nope))),
         values = std::make_shared<qkv::Projection<float>>(Matrix<float>(Rows(value_up, latent, heads * v_dim)));
    auto m = std::make_shared<Matrix<float>>(n, heads), l = std::make_shared<Matrix<float>>(n, heads);
    call->run = [=, &own = *call] {
      const auto rule = qkv::detail::rule_of<float, float>(qkv::causal, qkv::plain);
      const qkv::kernel::LatentTask<float, S> task{cache->latent_rows(), heads, scale, 0, 0, rule};
      Out weighted(out, n, heads * v_dim);
      const qkv::kernel::StateView<float> state{m->data(), l->data(), qkv::writable_view(weighted), heads};
      const Rows queries(q, n, heads * (nope + rope));
      qkv::kernel::latent_naive(task, qkv::view(queries), *keys, *values, state, own.workspace, own.threads);
      for (Index i = 0; i < n; ++i)
        for (Index h = 0; h < heads; ++h) weighted.row(i).segment(h * v_dim, v_dim) /= (*l)(i, h);
    };
    call->run();
    return call;
  });
}

/// What one writes on top of a BLAS: for every head, blocks of queries, the keys they see, two products and a softmax.
/// q, k, v, out as in qkv_peers_prefill; all heads of a group are one product where there is one query (decode).
void qkv_peers_blas(Sgemm sgemm, std::int64_t n_queries, std::int64_t n_keys, std::int64_t heads, std::int64_t kv_heads,
                    std::int64_t d, const float* q, const float* k, const float* v, float* out) {
  constexpr int row_major = 101, plain = 111, transposed = 112;
  constexpr Index block = 256;
  static Matrix<float> scores;
  const Index group = heads / kv_heads;
  const float scale = 1 / std::sqrt(static_cast<float>(d));
  const bool one = n_queries == 1;
  for (Index h = 0; h < (one ? kv_heads : heads); ++h)
    for (Index first = 0; first < n_queries; first += block) {
      const Index tokens = std::min(block, n_queries - first), rows = one ? group : tokens;
      const Index seen = n_keys - n_queries + first + tokens, stride = one ? d : heads * d;
      const Index kv = one ? h : h / group, offset = first * heads * d + (one ? h * group : h) * d;
      scores.resize(rows, seen);
      sgemm(row_major, plain, transposed, rows, seen, d, scale, q + offset, stride, k + kv * d, kv_heads * d, 0,
            scores.data(), seen);
      for (Index i = 0; i < rows; ++i) {
        const Index own = one ? seen : seen - tokens + i + 1;
        auto row = scores.row(i).head(own).array();
        row = (row - row.maxCoeff()).exp();
        row /= row.sum();
        scores.row(i).tail(seen - own).setZero();
      }
      sgemm(row_major, plain, plain, rows, d, seen, 1, scores.data(), seen, v + kv * d, kv_heads * d, 0, out + offset,
            stride);
    }
}

}  // extern "C"

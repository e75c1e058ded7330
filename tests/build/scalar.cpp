// Compiled with one lane: -DEIGEN_DONT_VECTORIZE, and -DEIGEN_MAX_ALIGN_BYTES=0, which makes Eigen say the same. Products,
// attention by every kernel and latent attention must be right; status 1 and a line for each that is not.
#include <qkv/kv_cache.hpp>
#include <qkv/latent_attention.hpp>
#include <qkv/position.hpp>

#include <cstdio>
#include <cstring>

using namespace qkv;

namespace {

int failures = 0;

template <class A, class B>
void expect(const char* what, Index size, const A& got, const B& expected, double allowed) {
  const double error = (got.template cast<double>() - expected.template cast<double>()).cwiseAbs().maxCoeff();
  if (error <= allowed) return;
  std::printf("%s, %d: off by %g\n", what, static_cast<int>(size), error);
  ++failures;
}

Matrix<float> numbers(Index rows, Index cols, Index seed) {
  return sinusoidal_positions<float>(rows + seed, cols + 3).bottomRightCorner(rows, cols);
}

void products() {
  for (Index n = 1; n <= 14; ++n)
    for (const Index out : {1, 7, 31, 32, 33, 70}) {
      const Matrix<float> x = numbers(n, 45, 1), w = numbers(45, out, 20);
      const Matrix<double> expected = x.cast<double>() * w.cast<double>();
      expect("projection", n, Projection<float>(w).forward(x), expected, 1e-5);
      expect("projection of int8", n, Projection<float>(w).stored_as<std::int8_t>().forward(x), expected, 0.3);
    }
}

void attentions() {
  for (const Index n : {1, 3, 17, 40}) {
    const Index n_keys = 45, heads = 6, kv_heads = 2;
    const Matrix<float> q = numbers(n, heads * 13, 2), k = numbers(n_keys, kv_heads * 13, 9),
                        v = numbers(n_keys, kv_heads * 11, 31);
    const Matrix<double> expected = attention(q.cast<double>().eval(), k.cast<double>().eval(), v.cast<double>().eval(),
                                              {heads, kv_heads}, causal, plain, {.kernel = Kernel::reference});
    KvCache<float> cache({.kv_heads = kv_heads, .head_dim = 13, .v_head_dim = 11, .capacity = n_keys});
    KvCache<std::int8_t> narrow({.kv_heads = kv_heads, .head_dim = 13, .v_head_dim = 11, .capacity = n_keys});
    cache.append(k, v), narrow.append(k, v);
    for (const Kernel kernel : {Kernel::reference, Kernel::tiled, Kernel::decode}) {
      const Options<float> options{.kernel = kernel};
      expect(name(kernel), n, attention(q, cache, {heads, kv_heads}, causal, plain, options), expected, 2e-6);
      expect("int8", n, attention(q, narrow, {heads, kv_heads}, causal, plain, options), expected, 0.03);
    }
  }
}

void latent_attentions() {
  for (const Index heads : {1, 3, 8, 17}) {
    const LatentAttentionConfig config{.model_dim = 24,
                                       .heads = heads,
                                       .latent_dim = 19,
                                       .nope_dim = 11,
                                       .rope_dim = 6,
                                       .v_head_dim = 9,
                                       .rope = RopeConfig{.pairing = Pairing::interleaved}};
    const auto weights = LatentAttentionWeights<float>::random(config);
    const LatentAttention<float> layer(config, weights);
    const Matrix<float> x = numbers(37, 24, 5);
    const Matrix<float> expected =
        layer.forward(x, causal, plain, {.kernel = Kernel::reference, .form = LatentForm::naive});
    expect("naive", heads, layer.forward(x, causal, plain, {.form = LatentForm::naive}), expected, 1e-5);
    expect("absorbed", heads, layer.forward(x, causal, plain, {.form = LatentForm::absorbed}), expected, 1e-5);
    auto cache = layer.make_cache(40);
    Matrix<float> one_by_one(37, 24);
    for (Index i = 0; i < 37; ++i) layer.forward_into(one_by_one.middleRows(i, 1), x.middleRows(i, 1), cache);
    expect("token by token", heads, one_by_one, expected, 1e-5);
  }
}

}  // namespace

int main() {
  if (std::strstr(build_name, "_novector") == nullptr) return std::printf("%s has vectors\n", build_name), 2;
  products();
  attentions();
  latent_attentions();
  std::printf("%s: %d failures\n", build_name, failures);
  return failures == 0 ? 0 : 1;
}

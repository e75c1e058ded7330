// support/variants.hpp — five attention layers of equal width, each beside itself in double as its reference.
#pragma once

#include <qkv/qkv.hpp>

#include <algorithm>
#include <utility>

#include "../../examples/naive_latent_attention.hpp"
#include "support/numbers.hpp"

namespace variants {

using qkv::Index;
using qkv::Matrix;
using qkv::Projection;

inline constexpr Index model_dim = 512, heads = 16, head_dim = 64;
inline constexpr qkv::RopeConfig rope{.pairing = qkv::Pairing::interleaved};
/// The proportions of DeepSeek-V2-Lite: 16 heads, latent 4·head_dim, rope key head_dim / 2.
inline constexpr qkv::LatentAttentionConfig latent{.model_dim = model_dim,
                                                   .heads = heads,
                                                   .latent_dim = 4 * head_dim,
                                                   .nope_dim = head_dim,
                                                   .rope_dim = head_dim / 2,
                                                   .v_head_dim = head_dim,
                                                   .rope = rope};
constexpr qkv::MultiHeadAttentionConfig multi_head(Index kv_heads) {
  return {.model_dim = model_dim, .heads = heads, .kv_heads = kv_heads, .head_dim = head_dim, .rope = rope};
}

inline Projection<double> widened(const Projection<float>& p) {
  return Projection<double>(p.weight().cast<double>(), p.bias().cast<double>());
}
inline qkv::MultiHeadAttentionWeights<double> widened(const qkv::MultiHeadAttentionWeights<float>& w) {
  return {widened(w.query), widened(w.key), widened(w.value), widened(w.output)};
}
inline qkv::LatentAttentionWeights<double> widened(const qkv::LatentAttentionWeights<float>& w) {
  qkv::LatentAttentionWeights<double> wide;
  wide.query = widened(w.query), wide.latent_down = widened(w.latent_down),
  wide.latent_norm = w.latent_norm.cast<double>();
  wide.key_up = widened(w.key_up), wide.value_up = widened(w.value_up), wide.output = widened(w.output);
  return wide;
}

template <Index KvHeads>
struct MultiHead {
  qkv::MultiHeadAttentionWeights<float> weights = qkv::MultiHeadAttentionWeights<float>::random(multi_head(KvHeads));
  qkv::MultiHeadAttention<float> layer{multi_head(KvHeads), weights};
  qkv::MultiHeadAttention<double> exact{multi_head(KvHeads), widened(weights)};

  std::pair<Matrix<double>, Matrix<double>> keys_and_values(const Matrix<double>& x) const {
    return {exact.keys(x), exact.values(x)};
  }
  double scale() const { return 0; }  // 1/√head_dim
};

/// Layer is qkv::LatentAttention or, with the other cache, NaiveLatentAttention; both must equal the naive form.
template <class Layer>
struct Latent {
  qkv::LatentAttentionWeights<float> weights = qkv::LatentAttentionWeights<float>::random(latent);
  Layer layer{qkv::LatentAttention<float>(latent, weights)};
  NaiveLatentAttention<double> exact{qkv::LatentAttention<double>(latent, widened(weights))};

  std::pair<Matrix<double>, Matrix<double>> keys_and_values(const Matrix<double>& x) const {
    const Matrix<double> c = exact.latents(x);
    return {exact.keys(c), exact.values(c)};
  }
  double scale() const { return exact.scale(); }
};

/// Largest difference of `out`, the outputs of tokens first, first + 1 … of the text x, from kernel::reference in double.
/// Infinite where a NaN is among them.
template <class Variant>
double error_of(const Variant& variant, const Matrix<float>& x, Index first, const Matrix<float>& out) {
  const Index n = out.rows();
  const auto [k, v] = variant.keys_and_values(x.topRows(first + n).cast<double>());
  const Matrix<double> context =
      qkv::attention(variant.exact.queries(x.middleRows(first, n).cast<double>(), first), k, v, variant.exact.heads(),
                     qkv::causal, {.scale = variant.scale(), .kernel = qkv::Kernel::reference});
  return support::max_error(out, variant.exact.output(context));
}

}  // namespace variants

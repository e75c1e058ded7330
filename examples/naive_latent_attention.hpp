// naive_latent_attention.hpp — MLA with the cache that MLA was invented to avoid: every head's keys and values.
//
//     k_h = [c·W_UK(h) | r]     v_h = c·W_UV(h)          restored once, then kept in an ordinary KvCache
//
// Same weights and same output as qkv::LatentAttention, but heads·(nope_dim + rope_dim + v_head_dim) numbers per token
// instead of latent_dim + rope_dim: 71.1 times as many for DeepSeek-V3. Written with the layer's public steps, and so an
// example of how to build a layer of one's own.
#pragma once

#include <qkv/qkv.hpp>

#include <utility>

template <class T = float>
class NaiveLatentAttention {
 public:
  explicit NaiveLatentAttention(qkv::LatentAttention<T> layer) : layer_(std::move(layer)) {}

  void reserve_positions(qkv::Index n) { layer_.reserve_positions(n); }

  template <qkv::StorageType S = T>
  qkv::KvCache<S> make_cache(qkv::Index capacity) const {
    const auto& c = layer_.config();
    return qkv::KvCache<S>(
        {.kv_heads = c.heads, .head_dim = c.head_dim(), .v_head_dim = c.v_head_dim, .capacity = capacity});
  }

  /// The steps one by one. x [n, model_dim]; row i stands at first_position + i.
  template <qkv::MatrixLike X>
  qkv::Matrix<T> queries(const X& x, qkv::Index first_position = 0) const {  // [n, heads·(nope_dim + rope_dim)]
    return layer_.queries(x, first_position);
  }
  template <qkv::MatrixLike X>
  qkv::Matrix<T> latents(const X& x, qkv::Index first_position = 0) const {  // [n, latent_dim + rope_dim]
    return layer_.latents(x, first_position);
  }
  /// The rope key is repeated for each head.
  qkv::Matrix<T> keys(const qkv::Matrix<T>& latents) const {  // [n, heads·(nope_dim + rope_dim)]
    const auto& c = layer_.config();
    const qkv::Matrix<T> nope = layer_.restored_keys(latents.leftCols(c.latent_dim));
    qkv::Matrix<T> k(latents.rows(), c.heads * c.head_dim());
    for (qkv::Index h = 0; h < c.heads; ++h)
      qkv::head_columns(k, h, c.heads) << qkv::head_columns(nope, h, c.heads), latents.rightCols(c.rope_dim);
    return k;
  }
  qkv::Matrix<T> values(const qkv::Matrix<T>& latents) const {  // [n, heads·v_head_dim]
    return layer_.restored_values(latents.leftCols(layer_.config().latent_dim));
  }
  qkv::Matrix<T> output(const qkv::Matrix<T>& context) const {  // [n, heads·v_head_dim] -> [n, model_dim]
    return layer_.output(context);
  }
  qkv::Heads heads() const { return layer_.heads(); }
  double scale() const { return layer_.scale(); }  // of nope_dim + rope_dim features, with YaRN's factor

  /// A whole text without any cache. x [n, model_dim] -> [n, model_dim]
  template <qkv::MatrixLike X>
  qkv::Matrix<T> forward(const X& x) const {
    const qkv::Matrix<T> c = latents(x);
    return output(qkv::attention(queries(x), keys(c), values(c), heads(), qkv::causal, {.scale = scale()}));
  }

  /// The next tokens of the cache's sequence.
  template <qkv::MatrixLike X, qkv::StorageType S>
  qkv::Matrix<T> forward(const X& x, qkv::KvCache<S>& cache) const {
    const qkv::Index position = cache.position();
    const qkv::Matrix<T> c = latents(x, position);
    cache.append(keys(c), values(c));
    return output(qkv::attention(queries(x, position), cache, heads(), qkv::causal,
                                 {.scale = scale(), .workspace = &cache.workspace()}));
  }

 private:
  qkv::LatentAttention<T> layer_;
};

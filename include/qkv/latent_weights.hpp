// latent_weights.hpp — the matrices of a latent attention layer, their shapes, and random ones.
//
//     W_Q    or    W_DQ, norm, W_UQ        queries        W_DKV, norm      what is cached
//     W_UK, W_UV                           keys and values from a latent   W_O    output
//
// As in DeepSeek-V2, arXiv:2405.04434, section 2.1. checkpoint.hpp fills them from a model's tensors.
//
// Before: multi_head_attention.hpp   Next: latent_form.hpp
#pragma once

#include <cstdint>

#include "layer/common.hpp"
#include "model_config.hpp"
#include "projection.hpp"

namespace qkv { inline namespace QKV_ABI {

template <class T>
struct LatentAttentionWeights {
  Projection<T> query = {};        // W_Q [model_dim, heads·(nope_dim + rope_dim)]; q_latent_dim == 0 only
  Projection<T> query_down = {};   // W_DQ [model_dim, q_latent_dim]; the other three with q_latent_dim > 0 only
  RowVector<T> query_norm = {};    // [q_latent_dim]
  Projection<T> query_up = {};     // W_UQ [q_latent_dim, heads·(nope_dim + rope_dim)]
  Projection<T> latent_down = {};  // W_DKV [model_dim, latent_dim + rope_dim]
  RowVector<T> latent_norm = {};   // [latent_dim]; empty without config.latent_norm
  Projection<T> key_up = {};       // W_UK [latent_dim, heads·nope_dim]
  Projection<T> value_up = {};     // W_UV [latent_dim, heads·v_head_dim]
  Projection<T> output = {};       // W_O [heads·v_head_dim, model_dim]
  RowVector<double> rope_frequencies = {};  // [rope_dim / 2] radians per position, or empty: those of config.rope

  /// Normal random weights of variance 1/in_dim, gains 1; the same on every machine.
  static LatentAttentionWeights random(const LatentAttentionConfig& c, std::uint32_t seed = 1) {
    check(c);
    detail::RandomWeights<T> draw(seed);
    LatentAttentionWeights w;
    const Index q_dim = c.heads * (c.nope_dim + c.rope_dim);
    if (c.q_latent_dim == 0) {
      w.query = draw.projection(c.model_dim, q_dim, false);
    } else {
      w.query_down = draw.projection(c.model_dim, c.q_latent_dim, false);
      w.query_norm = RowVector<T>::Ones(c.q_latent_dim);
      w.query_up = draw.projection(c.q_latent_dim, q_dim, false);
    }
    w.latent_down = draw.projection(c.model_dim, c.latent_dim + c.rope_dim, false);
    if (c.latent_norm) w.latent_norm = RowVector<T>::Ones(c.latent_dim);
    w.key_up = draw.projection(c.latent_dim, c.heads * c.nope_dim, false);
    w.value_up = draw.projection(c.latent_dim, c.heads * c.v_head_dim, false);
    w.output = draw.projection(c.heads * c.v_head_dim, c.model_dim, false);
    return w;
  }

  /// The same with all matrices rounded to S (half, bfloat16, int8): see Projection. Norms stay in T, and so does the
  /// absorbed form's own copy of the rounded W_UK and W_UV.
  template <StorageType S>
  LatentAttentionWeights stored_as() const {
    LatentAttentionWeights w = *this;
    for (Projection<T> LatentAttentionWeights::*p :
         {&LatentAttentionWeights::query, &LatentAttentionWeights::query_down, &LatentAttentionWeights::query_up,
          &LatentAttentionWeights::latent_down, &LatentAttentionWeights::key_up, &LatentAttentionWeights::value_up,
          &LatentAttentionWeights::output})
      w.*p = (this->*p).template stored_as<S>();
    return w;
  }
};

/// Throws std::invalid_argument naming the first weight whose shape does not fit the settings.
template <class T>
void check(const LatentAttentionConfig& c, const LatentAttentionWeights<T>& w) {
  check(c);
  const Index q_dim = c.heads * c.head_dim();
  if (c.q_latent_dim == 0) {
    detail::check_projection("query", w.query, c.model_dim, q_dim);
  } else {
    detail::check_projection("query_down", w.query_down, c.model_dim, c.q_latent_dim);
    detail::check_gain("query_norm", w.query_norm, c.q_latent_dim);
    detail::check_projection("query_up", w.query_up, c.q_latent_dim, q_dim);
  }
  detail::check_projection("latent_down", w.latent_down, c.model_dim, c.latent_dim + c.rope_dim);
  detail::check_gain("latent_norm", w.latent_norm, c.latent_norm ? c.latent_dim : 0);
  detail::check_projection("key_up", w.key_up, c.latent_dim, c.heads * c.nope_dim);
  detail::check_projection("value_up", w.value_up, c.latent_dim, c.heads * c.v_head_dim);
  detail::check_projection("output", w.output, c.heads * c.v_head_dim, c.model_dim);
}

}}  // namespace qkv::QKV_ABI

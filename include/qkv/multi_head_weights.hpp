// multi_head_weights.hpp — the matrices of a multi-head attention layer, their shapes, and random ones.
//
//     W_q, W_k, W_v    queries, keys and values, heads as column blocks        W_o    output
//
// Where a model has them, also the gains of a QK-norm and learned sinks. checkpoint.hpp fills them from a model's
// tensors. Vaswani et al. 2017, section 3.2.2.
//
// Before: saved_cache.hpp   Next: multi_head_attention.hpp
#pragma once

#include <cstdint>

#include "layer/common.hpp"
#include "model_config.hpp"
#include "projection.hpp"

namespace qkv { inline namespace QKV_ABI {

template <class T>
struct MultiHeadAttentionWeights {
  Projection<T> query;           // [model_dim, heads·head_dim]
  Projection<T> key;             // [key_dim, kv_heads·head_dim]
  Projection<T> value;           // [value_dim, kv_heads·v_head_dim]
  Projection<T> output;          // [heads·v_head_dim, model_dim]
  RowVector<T> query_norm = {};  // [head_dim], with config.qk_norm
  RowVector<T> key_norm = {};    // [head_dim], with config.qk_norm
  RowVector<T> sinks = {};       // [heads], or empty: no learned sinks

  /// Normal random weights of variance 1/in_dim, for benchmarks, examples and tests. The same on every machine.
  static MultiHeadAttentionWeights random(const MultiHeadAttentionConfig& config, std::uint32_t seed = 1) {
    check(config);
    detail::RandomWeights<T> draw(seed);
    MultiHeadAttentionWeights w{draw.projection(config.model_dim, config.heads * config.head_dim, config.qkv_bias),
                                draw.projection(config.key_dim, config.kv_heads * config.head_dim, config.qkv_bias),
                                draw.projection(config.value_dim, config.kv_heads * config.v_head_dim, config.qkv_bias),
                                draw.projection(config.heads * config.v_head_dim, config.model_dim, config.out_bias)};
    if (config.qk_norm) w.query_norm = w.key_norm = RowVector<T>::Ones(config.head_dim);
    return w;
  }

  /// The same with all matrices rounded to S (half, bfloat16, int8): see Projection. Norms, biases and sinks stay in T.
  template <StorageType S>
  MultiHeadAttentionWeights stored_as() const {
    return {query.template stored_as<S>(),
            key.template stored_as<S>(),
            value.template stored_as<S>(),
            output.template stored_as<S>(),
            query_norm,
            key_norm,
            sinks};
  }
};

/// Throws std::invalid_argument naming the first weight whose shape does not fit the settings.
template <class T>
void check(const MultiHeadAttentionConfig& config, const MultiHeadAttentionWeights<T>& w) {
  check(config);
  detail::check_projection("query", w.query, config.model_dim, config.heads * config.head_dim);
  detail::check_projection("key", w.key, config.key_dim, config.kv_heads * config.head_dim);
  detail::check_projection("value", w.value, config.value_dim, config.kv_heads * config.v_head_dim);
  detail::check_projection("output", w.output, config.heads * config.v_head_dim, config.model_dim);
  detail::check_gain("query_norm", w.query_norm, config.qk_norm ? config.head_dim : 0);
  detail::check_gain("key_norm", w.key_norm, config.qk_norm ? config.head_dim : 0);
  detail::check_gain("sinks", w.sinks, w.sinks.size() == 0 ? 0 : config.heads);
}

}}  // namespace qkv::QKV_ABI

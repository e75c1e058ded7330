// multi_head_attention.hpp — one attention layer; MHA, GQA and MQA are settings of it.
//
//     q = x·W_q   k = x·W_k   v = x·W_v      project
//     q, k = norm(q), norm(k)                 per head, where the model has a QK-norm
//     q, k = rotate(q, k, position)           where the model has RoPE; k is rotated before it is cached
//     out  = attention(q, k, v) · W_o         over these tokens, or over all that the cache holds
//
//     layer.forward(x)                        a whole text, causal                  x [n, model_dim] -> [n, model_dim]
//     layer.forward(x, cache)                 the next tokens: a prompt, a chunk of one, or a single new token
//     layer.forward(x, offsets, caches)       several sequences, one cache each
//     layer.forward(query, key, value)        cross-attention, no mask
//     …_into(out, x, …)                       the same without an allocation; the calls with caches: layer/forward.hpp
//
// A prompt gives the same numbers whole, in chunks and token by token. Layers attend to the rows as the cache stores
// them: in a quantised cache, the rows of this very call too. A const layer may be used from several threads at once;
// the workspace belongs to the cache. Vaswani et al. 2017, section 3.2.2; GQA arXiv:2305.13245; QK-norm
// arXiv:2010.04245.
//
// Before: multi_head_weights.hpp   Next: latent_weights.hpp
#pragma once

#include <optional>
#include <span>
#include <type_traits>
#include <utility>

#include "attention.hpp"
#include "kv_cache.hpp"
#include "layer/batch.hpp"
#include "layer/forward.hpp"
#include "model_config.hpp"
#include "multi_head_weights.hpp"
#include "norm.hpp"
#include "paged_cache.hpp"
#include "projection.hpp"
#include "ring_cache.hpp"
#include "rope.hpp"

namespace qkv { inline namespace QKV_ABI {

template <class T = float>
class MultiHeadAttention : public detail::LayerCalls<MultiHeadAttention<T>, T> {
  using Calls = detail::LayerCalls<MultiHeadAttention, T>;

 public:
  using Scalar = T;
  using Calls::forward;

  /// Whether C is a cache for this layer.
  template <class C>
  static constexpr bool serves = KeyValueCache<C>;

  /// Throws std::invalid_argument naming the first weight whose shape does not fit the settings.
  MultiHeadAttention(const MultiHeadAttentionConfig& config, MultiHeadAttentionWeights<T> weights)
      : config_(config), weights_(std::move(weights)) {
    check(config_, weights_);
    detail::check_scale<T>(config.scale);
    if (config.rope) rope_.emplace(*config.rope, config.head_dim);
  }

  const MultiHeadAttentionConfig& config() const { return config_; }
  const MultiHeadAttentionWeights<T>& weights() const { return weights_; }
  Heads heads() const { return {config_.heads, config_.kv_heads}; }
  Index head_dim() const { return config_.head_dim; }
  Index v_head_dim() const { return config_.v_head_dim; }
  /// The scale of scores: config.scale, or 1/√head_dim in T.
  double scale() const { return static_cast<double>(detail::scale_of(call_options({}, 0), config_.head_dim)); }

  /// Precomputes RoPE's cosines for positions 0 … n-1: faster, same bits.
  void reserve_positions(Index n) {
    if (rope_) rope_->reserve(n);
  }
  /// The rotation of its queries and keys, if it has one: for cache.drop_rows.
  const std::optional<Rope<T>>& rope() const { return rope_; }

  /// Empty caches, and a pool for them, that fit this layer. Leave kv_heads, head_dim and v_head_dim out of a config:
  /// they are the layer's.
  template <StorageType S = T>
  KvCache<S> make_cache(Index capacity) const {
    return KvCache<S>(sized(KvCacheConfig{.capacity = capacity}));
  }
  template <StorageType S = T>
  RingCache<S> make_ring_cache(const RingCacheConfig& config) const {
    return RingCache<S>(sized(config));
  }
  template <StorageType S = T>
  PagePool<S> make_page_pool(const PagePoolConfig& config) const {
    return PagePool<S>(sized(config));
  }
  template <StorageType S>
  PagedCache<S> make_paged_cache(PagePool<S>& pool) const {
    check_cache(pool);
    return PagedCache<S>(pool);
  }

  /// The steps one by one. x [n, model_dim]; row i is at position first_position + i.
  template <MatrixLike X, Executor E = Serial>
  Matrix<T> queries(const X& x, Index first_position = 0, const E& executor = serial) const {  // [n, heads·head_dim]
    Matrix<T> q = weights_.query.forward(x, executor);
    finish_queries(q, first_position);
    return q;
  }
  template <MatrixLike X, Executor E = Serial>
  Matrix<T> keys(const X& x, Index first_position = 0, const E& executor = serial) const {  // [n, kv_heads·head_dim]
    Matrix<T> k = weights_.key.forward(x, executor);
    finish_keys(k, first_position);
    return k;
  }
  template <MatrixLike X, Executor E = Serial>
  Matrix<T> values(const X& x, const E& executor = serial) const {  // [n, kv_heads·v_head_dim]
    return weights_.value.forward(x, executor);
  }
  template <MatrixLike X, Executor E = Serial>
  Matrix<T> output(const X& context, const E& executor = serial) const {  // [n, heads·v_head_dim] -> [n, model_dim]
    return weights_.output.forward(context, executor);
  }

  /// A whole text at positions 0 … n-1, without a cache. The mask is causal by default, and for `{}`.
  template <MatrixLike X, detail::InMaskPlace M = detail::Omitted, class F = detail::Omitted, Executor E = Serial>
  Matrix<T> forward(const X& x, const M& mask = {}, const F& score = {}, const LayerOptions& options = {},
                    const E& executor = serial) const {
    return forward(x, x, x, detail::given_or(mask, causal), score, options, executor);
  }
  template <MatrixLike X, Executor E = Serial>
  Matrix<T> forward(const X& x, const LayerOptions& options, const E& executor = serial) const {
    return forward(x, causal, plain, options, executor);
  }

  /// Cross-attention: query [n_queries, model_dim], key [n_keys, key_dim], value [n_keys, value_dim]. Both sides count
  /// positions from 0. No mask unless one is given.
  template <MatrixLike Q, MatrixLike K, MatrixLike V, detail::InMaskPlace M = detail::Omitted,
            class F = detail::Omitted, Executor E = Serial>
  Matrix<T> forward(const Q& query, const K& key, const V& value, const M& mask = {}, const F& score = {},
                    const LayerOptions& options = {}, const E& executor = serial) const {
    check_settings<void>(options);
    return output(
        attention(queries(query, 0, executor), keys(key, 0, executor), values(value, executor), heads(),
                  detail::given_or(mask, full), detail::given_or(score, plain), call_options(options, 0), executor),
        executor);
  }
  template <MatrixLike Q, MatrixLike K, MatrixLike V, Executor E = Serial>
  Matrix<T> forward(const Q& query, const K& key, const V& value, const LayerOptions& options,
                    const E& executor = serial) const {
    return forward(query, key, value, full, plain, options, executor);
  }

 private:
  friend Calls;
  friend detail::LayerExplainer;
  static constexpr bool shares_prefixes = true;
  template <class C>
  using RulesOf = detail::Rules<T, typename C::Storage>;

  // --- the steps of a call with caches, in the order of layer/forward.hpp; C: the caches, or void without ---

  template <class C>
  void check_settings(const LayerOptions& options) const {
    detail::require(options.form == LatentForm::automatic,
                    "LayerOptions::form is of latent attention; a MultiHeadAttention needs automatic; given ",
                    name(options.form));
    detail::require(!options.share_prefixes || detail::PooledCache<C>,
                    "LayerOptions::share_prefixes needs caches whose pages sequences can share: PagedCaches");
    if constexpr (!std::is_void_v<C>)
      detail::require(config_.key_dim == config_.model_dim && config_.value_dim == config_.model_dim,
                      "a layer with a cache takes keys and values from x: key_dim ", config_.key_dim, " and value_dim ",
                      config_.value_dim, " must be model_dim ", config_.model_dim);
  }
  template <class C>
  void check_cache(const C& cache) const {
    detail::require(cache.kv_heads() == config_.kv_heads && cache.head_dim() == config_.head_dim &&
                        cache.v_head_dim() == config_.v_head_dim,
                    "the cache must have kv_heads ", config_.kv_heads, ", head_dim ", config_.head_dim, ", v_head_dim ",
                    config_.v_head_dim, "; it has ", cache.kv_heads(), ", ", cache.head_dim(), ", ",
                    cache.v_head_dim());
  }

  struct Rows {  // of a call
    View<T> q = detail::no_view<T>(), k = q, v = q, context = q;
  };
  void lay_out(detail::Carver& carver, Rows& rows, Index n) const {
    detail::carve_matrix(carver, rows.q, n, weights_.query.out_dim());
    detail::carve_matrix(carver, rows.k, n, weights_.key.out_dim());
    detail::carve_matrix(carver, rows.v, n, weights_.value.out_dim());
    detail::carve_matrix(carver, rows.context, n, weights_.output.in_dim());
  }
  void project(Rows& rows, const ConstView<T>& x, const detail::AnyExecutor& executor) const {
    detail::run_together<T, 3>(
        {{{&weights_.query, rows.q, x}, {&weights_.key, rows.k, x}, {&weights_.value, rows.v, x}}}, executor);
  }
  void finish(const Rows& rows, Index first, Index n, Index position) const {
    finish_queries(detail::rows_of(rows.q, first, n), position);
    finish_keys(detail::rows_of(rows.k, first, n), position);
  }
  template <class C>
  void append(const Rows& rows, std::span<const Index> row_offsets, std::span<C* const> caches) const {
    detail::append_all(row_offsets, caches, rows.k, rows.v);
  }
  template <class C>
  void attend(const Rows& rows, std::span<const Index> row_offsets, std::span<C* const> caches, const RulesOf<C>& rules,
              const LayerOptions& options, const detail::AnyExecutor& executor) const {
    const detail::Batch<T, C> batch{
        rows.context, rows.q, row_offsets, caches, heads(), call_options(options, 0), rope_ ? &*rope_ : nullptr};
    detail::attend_batch(batch, options.share_prefixes, rules, executor);
  }

  template <class X>
  void finish_queries(X&& q, Index first_position) const {
    if (config_.qk_norm) rms_norm_into(q, q, weights_.query_norm, config_.norm_eps, config_.heads);
    if (rope_) rope_->apply_in_place(q, config_.heads, first_position);
  }
  template <class X>
  void finish_keys(X&& k, Index first_position) const {
    if (config_.qk_norm) rms_norm_into(k, k, weights_.key_norm, config_.norm_eps, config_.kv_heads);
    if (rope_) rope_->apply_in_place(k, config_.kv_heads, first_position);
  }

  Options<T> call_options(const LayerOptions& options, Index first_position) const {
    Options<T> o;
    o.scale = config_.scale;
    o.first_position = first_position;
    o.kernel = options.kernel;
    o.arithmetic = options.arithmetic;
    if (weights_.sinks.size() > 0) o.sinks = {weights_.sinks.data(), static_cast<std::size_t>(weights_.sinks.size())};
    return o;
  }
  template <class Config>
  Config sized(Config config) const {
    detail::require(config.kv_heads == 1 && config.head_dim == 0 && config.v_head_dim == 0,
                    "kv_heads, head_dim and v_head_dim of its caches are the layer's: leave them out; given ",
                    config.kv_heads, ", ", config.head_dim, ", ", config.v_head_dim);
    config.kv_heads = config_.kv_heads, config.head_dim = config_.head_dim, config.v_head_dim = config_.v_head_dim;
    return config;
  }

  MultiHeadAttentionConfig config_;
  MultiHeadAttentionWeights<T> weights_;
  std::optional<Rope<T>> rope_;
};

}}  // namespace qkv::QKV_ABI

// multi_head_attention.hpp — one attention layer; MHA, GQA and MQA are settings of it.
//
//     q = x·W_q   k = x·W_k   v = x·W_v      project
//     q, k = norm(q), norm(k)                 per head, where the model has a QK-norm
//     q, k = rotate(q, k, position)           where the model has RoPE; k is rotated before it is cached
//     out  = attention(q, k, v) · W_o         over these tokens, or over all that the cache holds
//
//     layer.forward(x)                        a whole text, causal                  x [n, model_dim] -> [n, model_dim]
//     layer.forward(x, cache)                 the next tokens: a prompt, a chunk of one, or a single new token
//     layer.forward(query, key, value)        cross-attention, no mask
//     layer.forward_into(out, x, offsets, caches)    several sequences, one cache each
//
// A prompt gives the same numbers whole, in chunks and token by token. Layers attend what the cache holds: with a
// quantised cache that includes the rows of this very call. A const layer may be used from several threads at once; the
// workspace belongs to the cache. Vaswani et al. 2017, section 3.2.2; GQA arXiv:2305.13245; QK-norm arXiv:2010.04245.
//
// Before: multi_head_weights.hpp   Next: latent_weights.hpp
#pragma once

#include <algorithm>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include "attention.hpp"
#include "kv_cache.hpp"
#include "layer/appended.hpp"
#include "layer/batch.hpp"
#include "layer/common.hpp"
#include "layer/ring_positions.hpp"
#include "model_config.hpp"
#include "multi_head_weights.hpp"
#include "norm.hpp"
#include "projection.hpp"
#include "rope.hpp"

namespace qkv { inline namespace QKV_ABI {

template <class T = float>
class MultiHeadAttention {
 public:
  using Scalar = T;

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

  /// Keeps RoPE's cosines for positions 0 … n-1: faster, same bits.
  void reserve_positions(Index n) {
    if (rope_) rope_->reserve(n);
  }
  /// The rotation of its queries and keys, if it has one: for cache.drop_rows.
  const std::optional<Rope<T>>& rope() const { return rope_; }

  /// An empty cache that fits this layer.
  template <StorageType S = T>
  KvCache<S> make_cache(Index capacity) const {
    return KvCache<S>({.kv_heads = config_.kv_heads,
                       .head_dim = config_.head_dim,
                       .v_head_dim = config_.v_head_dim,
                       .capacity = capacity});
  }

  /// The steps one by one. x [n, model_dim]; row i stands at first_position + i.
  template <MatrixLike X, Executor E = Serial>
  Matrix<T> queries(const X& x, Index first_position = 0, const E& executor = serial) const {  // [n, heads·head_dim]
    Matrix<T> q = weights_.query.forward(x, executor);
    turn_queries(q, first_position);
    return q;
  }
  template <MatrixLike X, Executor E = Serial>
  Matrix<T> keys(const X& x, Index first_position = 0, const E& executor = serial) const {  // [n, kv_heads·head_dim]
    Matrix<T> k = weights_.key.forward(x, executor);
    turn_keys(k, first_position);
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

  /// A whole text at positions 0 … n-1, without a cache.
  template <MatrixLike X, detail::NeitherCacheNorMatrix M = Window, class F = Plain, Executor E = Serial>
  Matrix<T> forward(const X& x, const M& mask = causal, const F& score = plain, const LayerOptions& options = {},
                    const E& executor = serial) const {
    return output(attention(queries(x, 0, executor), keys(x, 0, executor), values(x, executor), heads(), mask, score,
                            call_options(options, 0), executor),
                  executor);
  }

  /// Cross-attention: query [n_queries, model_dim], key [n_keys, key_dim], value [n_keys, value_dim]. Both sides count
  /// positions from 0.
  template <MatrixLike Q, MatrixLike K, MatrixLike V, class M = Full, class F = Plain, Executor E = Serial>
  Matrix<T> forward(const Q& query, const K& key, const V& value, const M& mask = full, const F& score = plain,
                    const LayerOptions& options = {}, const E& executor = serial) const {
    return output(attention(queries(query, 0, executor), keys(key, 0, executor), values(value, executor), heads(), mask,
                            score, call_options(options, 0), executor),
                  executor);
  }

  /// The next tokens of the cache's sequence: appends their keys and values, attends all that the cache holds. Full
  /// caches throw std::length_error. Whatever throws, an allocation included, caches stay as they were; what a ring will
  /// overwrite is kept for that in its workspace, so long as the call lasts.
  template <MatrixLike X, KeyValueCache C, class M = Window, class F = Plain, Executor E = Serial>
  Matrix<T> forward(const X& x, C& cache, const M& mask = causal, const F& score = plain,
                    const LayerOptions& options = {}, const E& executor = serial) const {
    Matrix<T> out(x.rows(), config_.model_dim);
    forward_into(out, viewable(x), cache, mask, score, options, executor);
    return out;
  }

  /// The same into out [n, model_dim], which shares no element with x. Allocates nothing once the cache's workspace is
  /// warm (serial executor).
  template <MatrixLike Out, MatrixLike X, KeyValueCache C, class M = Window, class F = Plain, Executor E = Serial>
  void forward_into(Out&& out, const X& x, C& cache, const M& mask = causal, const F& score = plain,
                    const LayerOptions& options = {}, const E& executor = serial) const {
    check_operands(out, x);
    check_cache(cache);
    detail::check_growth(detail::as_mask(mask), score, cache, heads(), x.rows(), detail::footprint(out));
    detail::find_room(cache, x.rows());
    C* const caches[] = {&cache};
    const Index offsets[] = {0, x.rows()};
    detail::Appended<C> appended(offsets, caches, cache.workspace());
    forward_pieces(writable_view(out), view(x), cache, mask, score, options, executor);
    appended.keep();
  }

  /// The next tokens of several sequences: rows row_offsets[s] … row_offsets[s+1]-1 of x belong to caches[s]. One
  /// projection for all rows (with a ring: where each sequence goes in one piece); each sequence gives the same bits as
  /// alone. Either all caches take their rows or none. The executor gets kv heads of all sequences, the longest first.
  /// With options.share_prefixes neighbours whose page tables begin alike (forks of a PagedCache) read those pages once.
  template <MatrixLike Out, MatrixLike X, KeyValueCache C, class M = Window, class F = Plain, Executor E = Serial>
  void forward_into(Out&& out, const X& x, std::span<const Index> row_offsets, std::span<C* const> caches,
                    const M& mask = causal, const F& score = plain, const LayerOptions& options = {},
                    const E& any = serial) const {
    const detail::AnyExecutor executor(any);
    const ConstView<T> rows = view(x);
    check_operands(out, x);
    detail::check_batch(row_offsets, caches, x.rows());
    if (caches.empty()) return;
    for (const C* cache : caches) check_cache(*cache);
    const auto& m = detail::as_mask(mask);
    const auto of_sequence = [&](const auto& each, std::size_t s) -> decltype(auto) {
      return detail::of_sequence(each, static_cast<Index>(s), static_cast<Index>(caches.size()));
    };
    for (std::size_t s = 0; s < caches.size(); ++s)
      detail::check_growth(of_sequence(m, s), of_sequence(score, s), *caches[s], heads(),
                           row_offsets[s + 1] - row_offsets[s], detail::footprint(out));
    detail::find_room(row_offsets, caches);

    if constexpr (detail::SlidingCache<C>)
      if (detail::needs_pieces(row_offsets, caches) ||
          (rope_ && std::any_of(caches.begin(), caches.end(), [](C* c) { return detail::counts_in_cache(*c); }))) {
        detail::Appended<C> appended(row_offsets, caches, caches[0]->workspace());
        for (std::size_t s = 0; s < caches.size(); ++s) {
          const Index first = row_offsets[s], n = row_offsets[s + 1] - first;
          forward_pieces(detail::rows_of(writable_view(out), first, n), detail::rows_of(rows, first, n), *caches[s],
                         of_sequence(m, s), of_sequence(score, s), options, executor);
        }
        return appended.keep();
      }
    Buffers buffers(*this, caches[0]->workspace(), x.rows());
    project(buffers, rows, executor, [&](View<T> q, View<T> k, Index row) {
      detail::for_each_sequence(row_offsets, row, q.rows(), [&](std::size_t s, Index first, Index n) {
        const Index position = caches[s]->position() + first - row_offsets[s];
        turn_queries(detail::rows_of(q, first - row, n), position);
        turn_keys(detail::rows_of(k, first - row, n), position);
      });
    });
    detail::Appended<C> appended(row_offsets, caches, caches[0]->workspace());
    detail::append_all(row_offsets, caches, buffers.k, buffers.v);
    const detail::Batch<T, C> batch{buffers.context, buffers.q, row_offsets, caches, heads(), call_options(options, 0)};
    detail::attend_batch(batch, options.share_prefixes, m, score, caches[0]->workspace(), executor);
    weights_.output.forward_into(out, buffers.context, executor);
    appended.keep();
  }

  /// The same with the caches' addresses in a vector.
  template <MatrixLike Out, MatrixLike X, KeyValueCache C, class M = Window, class F = Plain, Executor E = Serial>
  void forward_into(Out&& out, const X& x, std::span<const Index> row_offsets, const std::vector<C*>& caches,
                    const M& mask = causal, const F& score = plain, const LayerOptions& options = {},
                    const E& executor = serial) const {
    forward_into(out, x, row_offsets, std::span<C* const>(caches), mask, score, options, executor);
  }

 private:
  /// Scratch for n rows, in one piece of the cache's workspace.
  struct Buffers {
    Buffers(const MultiHeadAttention& layer, Workspace& workspace, Index n)
        : q(nullptr, 0, 0, Eigen::OuterStride<>(0)),
          k(q),
          v(q),
          context(q),
          lease(workspace.lease(carve(layer, n, nullptr))) {
      carve(layer, n, lease.data());
    }
    std::size_t carve(const MultiHeadAttention& layer, Index n, std::byte* base) {
      detail::Carver carver(base);
      detail::carve_matrix(carver, q, n, layer.weights_.query.out_dim());
      detail::carve_matrix(carver, k, n, layer.weights_.key.out_dim());
      detail::carve_matrix(carver, v, n, layer.weights_.value.out_dim());
      detail::carve_matrix(carver, context, n, layer.weights_.output.in_dim());
      return carver.used();
    }
    View<T> q, k, v, context;
    Workspace::Lease lease;
  };

  /// One sequence, checked and with room. A window that slides must still see its old rows: long chunks go in pieces.
  template <class C, class M, class F>
  void forward_pieces(const View<T>& out, const ConstView<T>& x, C& cache, const M& mask, const F& score,
                      const LayerOptions& options, const detail::AnyExecutor& executor) const {
    for (Index first = 0; first < x.rows();) {
      const Index position = cache.position(), n = detail::piece(cache, position, x.rows() - first);
      Buffers buffers(*this, cache.workspace(), n);
      project(buffers, detail::rows_of(x, first, n), executor, [&](View<T> q, View<T> k, Index row) {
        turn_queries(q, position + row);
        turn_keys(k, position + row);
      });
      cache.append(buffers.k, buffers.v);
      Options<T> call = call_options(options, position);
      call.workspace = &cache.workspace();
      const auto seen = detail::visible(cache) & detail::as_mask(mask);
      const bool in_cache = rope_ && detail::counts_in_cache(cache);
      if constexpr (detail::CanCountInCache<C>)
        if (in_cache)
          detail::attend_in_cache(buffers.context, view(buffers.q), cache, *rope_, heads(),
                                  detail::rule_of<T, typename C::Storage>(seen, score), call, executor);
      if (!in_cache) attention_into(buffers.context, buffers.q, cache, heads(), seen, score, call, executor);
      weights_.output.forward_into(detail::rows_of(out, first, n), buffers.context, executor);
      first += n;
    }
  }

  /// All three products in one go of the executor; then turn(q, k, row) for blocks of rows that begin at `row`.
  template <class Turn>
  void project(Buffers& b, const ConstView<T>& x, const detail::AnyExecutor& executor, Turn&& turn) const {
    detail::run_together<T, 3>({{{&weights_.query, b.q, x}, {&weights_.key, b.k, x}, {&weights_.value, b.v, x}}},
                               executor);
    constexpr Index rows = 16;
    executor((x.rows() + rows - 1) / rows, [&](Index block) {
      const Index row = block * rows, n = std::min(rows, x.rows() - row);
      turn(detail::rows_of(b.q, row, n), detail::rows_of(b.k, row, n), row);
    });
  }

  template <class X>
  void turn_queries(X&& q, Index first_position) const {
    if (config_.qk_norm) rms_norm_into(q, q, weights_.query_norm, config_.norm_eps, config_.heads);
    if (rope_) rope_->apply_in_place(q, config_.heads, first_position);
  }
  template <class X>
  void turn_keys(X&& k, Index first_position) const {
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

  template <class Out, class X>
  void check_operands(const Out& out, const X& x) const {
    detail::require(config_.key_dim == config_.model_dim && config_.value_dim == config_.model_dim,
                    "a layer with a cache takes keys and values from x: key_dim ", config_.key_dim, " and value_dim ",
                    config_.value_dim, " must be model_dim ", config_.model_dim);
    detail::require(x.cols() == config_.model_dim, "x must be [n, model_dim ", config_.model_dim, "]; given ",
                    detail::Shape{x.rows(), x.cols()});
    detail::check_out(out, x.rows(), config_.model_dim);
    detail::require_disjoint(out, x, "x");
  }
  template <class C>
  void check_cache(const C& cache) const {
    detail::require(cache.kv_heads() == config_.kv_heads && cache.head_dim() == config_.head_dim &&
                        cache.v_head_dim() == config_.v_head_dim,
                    "the cache must have kv_heads ", config_.kv_heads, ", head_dim ", config_.head_dim, ", v_head_dim ",
                    config_.v_head_dim, "; it has ", cache.kv_heads(), ", ", cache.head_dim(), ", ",
                    cache.v_head_dim());
  }

  MultiHeadAttentionConfig config_;
  MultiHeadAttentionWeights<T> weights_;
  std::optional<Rope<T>> rope_;
};

}}  // namespace qkv::QKV_ABI

// latent_attention.hpp — multi-head latent attention (MLA), the attention of DeepSeek-V2 and V3.
//
//     q      = x·W_Q                    or   RMSNorm(x·W_DQ)·W_UQ        [n, heads·(nope_dim + rope_dim)]
//     c | r  = x·W_DKV                  c = RMSNorm(c), r = rotate(r)    [n, latent_dim | rope_dim]: all that is cached
//     k_h    = [c·W_UK(h) | r]          v_h = c·W_UV(h)                  never stored: restored or absorbed
//     out    = attention(q, k, v)·W_O   scale 1/√(nope_dim + rope_dim), times m² under YaRN
//
// A token costs latent_dim + rope_dim numbers instead of heads·(head_dim + v_head_dim): 576 instead of 40,960 for
// DeepSeek-V3. RoPE does not commute with the up-projection, hence the separate rope key r, one per token for all heads.
// Nothing is approximated at run time: the model *is* of low rank.
//
// Two forms compute the same: naive (restores keys and values; for many queries) and absorbed (never restores them; for
// few), see call/latent_forms.hpp. `automatic` chooses by sizes and arithmetic of the call: latent_form.hpp. The calls
// with caches: layer/forward.hpp.
// DeepSeek-V2, arXiv:2405.04434, section 2.1; V3, arXiv:2412.19437.
//
// Before: absorbed_attention.hpp   Next: explain_layer.hpp
#pragma once

#include <algorithm>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include "call/latent_forms.hpp"
#include "latent_cache.hpp"
#include "latent_form.hpp"
#include "latent_weights.hpp"
#include "layer/forward.hpp"
#include "model_config.hpp"
#include "norm.hpp"
#include "paged_latent_cache.hpp"
#include "rope.hpp"

namespace qkv { inline namespace QKV_ABI {

/// All that the layer requires of a cache of latent rows: LatentCache, PagedLatentCache, or your own type.
template <class C>
concept LatentKeySource = requires(C& cache, const C& constant, const View<float>& rows, Index position) {
  typename C::Storage;
  { constant.latent_rows() } -> std::same_as<LatentRows<typename C::Storage>>;
  { constant.latent_dim() } -> std::same_as<Index>;
  { constant.rope_dim() } -> std::same_as<Index>;
  { constant.position() } -> std::same_as<Index>;
  { constant.rows() } -> std::same_as<Index>;
  { constant.max_append() } -> std::same_as<Index>;
  { cache.try_append(rows, rows) } -> std::same_as<bool>;
  cache.truncate(position);
  { cache.workspace() } -> std::same_as<Workspace&>;
};

template <class T = float>
class LatentAttention : public detail::LayerCalls<LatentAttention<T>, T> {
  using Calls = detail::LayerCalls<LatentAttention, T>;

 public:
  using Scalar = T;
  using Calls::forward;

  /// Whether C is a cache for this layer.
  template <class C>
  static constexpr bool serves = LatentKeySource<C>;

  /// Throws std::invalid_argument naming the first weight whose shape does not fit the settings.
  LatentAttention(const LatentAttentionConfig& config, LatentAttentionWeights<T> weights)
      : config_((check(config, weights), config)),
        weights_(std::move(weights)),
        rope_(weights_.rope_frequencies.size() == 0
                  ? Rope<T>(config.rope, config.rope_dim)
                  : Rope<T>(config.rope, config.rope_dim, weights_.rope_frequencies)) {
    detail::check_scale<T>(scale());
    const Index heads = config_.heads;
    const Matrix<T> key_up = weights_.key_up.weight(), value_up = weights_.value_up.weight();
    for (Index h = 0; h < heads; ++h) {
      absorb_key_.emplace_back(head_columns(key_up, h, heads).transpose());
      absorb_value_.emplace_back(head_columns(value_up, h, heads));
    }
  }

  const LatentAttentionConfig& config() const { return config_; }
  const LatentAttentionWeights<T>& weights() const { return weights_; }
  Heads heads() const { return {config_.heads, config_.heads}; }
  Index head_dim() const { return config_.head_dim(); }  // nope_dim + rope_dim
  Index v_head_dim() const { return config_.v_head_dim; }
  /// The scale of scores: config.scale, or 1/√(nope_dim + rope_dim) times YaRN's m².
  double scale() const { return softmax_scale(config_); }

  /// Precomputes RoPE's cosines for positions 0 … n-1: faster, same bits.
  void reserve_positions(Index n) {
    if (rope_) rope_->reserve(n);
  }
  /// The rotation of its rope keys: for cache.drop_rows.
  const std::optional<Rope<T>>& rope() const { return rope_; }

  /// Empty caches, and a pool for them, that fit this layer. Leave latent_dim and rope_dim out of a config: they are
  /// the layer's.
  template <StorageType S = T>
  LatentCache<S> make_cache(Index capacity) const {
    return LatentCache<S>({.latent_dim = config_.latent_dim, .rope_dim = config_.rope_dim, .capacity = capacity});
  }
  template <StorageType S = T>
  LatentPagePool<S> make_page_pool(LatentPagePoolConfig config) const {
    detail::require(config.latent_dim == 0 && config.rope_dim == 0,
                    "latent_dim and rope_dim of its caches are the layer's: leave them out; given ", config.latent_dim,
                    ", ", config.rope_dim);
    config.latent_dim = config_.latent_dim, config.rope_dim = config_.rope_dim;
    return LatentPagePool<S>(config);
  }
  template <StorageType S>
  PagedLatentCache<S> make_paged_cache(LatentPagePool<S>& pool) const {
    check_cache(pool);
    return PagedLatentCache<S>(pool);
  }

  /// The steps one by one. x [n, model_dim]; row i is at position first_position + i.
  template <MatrixLike X, Executor E = Serial>
  Matrix<T> queries(const X& x, Index first_position = 0,
                    const E& executor = serial) const {  // [n, heads·(nope_dim + rope_dim)], rope part rotated
    Matrix<T> q = first_queries().forward(x, executor);
    if (config_.q_latent_dim > 0) {
      Matrix<T> q_latent(x.rows(), config_.heads * config_.head_dim());
      q.swap(q_latent);
      restore_queries(writable_view(q), writable_view(q_latent), executor);
    }
    finish_queries(writable_view(q), first_position);
    return q;
  }
  template <MatrixLike X, Executor E = Serial>
  Matrix<T> latents(const X& x, Index first_position = 0,
                    const E& executor = serial) const {  // [n, latent_dim + rope_dim]: what is cached
    Matrix<T> c = weights_.latent_down.forward(x, executor);
    finish_latents(writable_view(c), first_position);
    return c;
  }
  /// c [n, latent_dim] -> every head's keys without their rope part [n, heads·nope_dim].
  template <MatrixLike X, Executor E = Serial>
  Matrix<T> restored_keys(const X& c, const E& executor = serial) const {
    return weights_.key_up.forward(c, executor);
  }
  /// c [n, latent_dim] -> every head's values [n, heads·v_head_dim].
  template <MatrixLike X, Executor E = Serial>
  Matrix<T> restored_values(const X& c, const E& executor = serial) const {
    return weights_.value_up.forward(c, executor);
  }
  template <MatrixLike X, Executor E = Serial>
  Matrix<T> output(const X& context, const E& executor = serial) const {  // [n, heads·v_head_dim] -> [n, model_dim]
    return weights_.output.forward(context, executor);
  }

  /// A whole text at positions 0 … n-1, through a cache of its own. The mask is causal by default, and for `{}`.
  template <MatrixLike X, detail::InMaskPlace M = detail::Omitted, class F = detail::Omitted, Executor E = Serial>
  Matrix<T> forward(const X& x, const M& mask = {}, const F& score = {}, const LayerOptions& options = {},
                    const E& executor = serial) const {
    auto cache = make_cache<T>(std::max<Index>(x.rows(), 1));
    return forward(x, cache, mask, score, options, executor);
  }
  template <MatrixLike X, Executor E = Serial>
  Matrix<T> forward(const X& x, const LayerOptions& options, const E& executor = serial) const {
    return forward(x, causal, plain, options, executor);
  }

 private:
  friend Calls;
  friend detail::LayerExplainer;
  static constexpr bool shares_prefixes = false;
  template <class>
  using RulesOf = detail::Rules<T, T>;  // rows are widened or restored to T

  // --- the steps of a call, in the order of layer/forward.hpp ---

  template <class>
  static void check_settings(const LayerOptions& options) {
    detail::require(!options.share_prefixes,
                    "LayerOptions::share_prefixes is of a MultiHeadAttention over PagedCaches; a LatentAttention "
                    "attends to each sequence by itself");
  }
  template <class C>
  void check_cache(const C& cache) const {
    detail::require(cache.latent_dim() == config_.latent_dim && cache.rope_dim() == config_.rope_dim,
                    "the cache must have latent_dim ", config_.latent_dim, " and rope_dim ", config_.rope_dim,
                    "; it has ", cache.latent_dim(), " and ", cache.rope_dim());
  }

  struct Rows {  // of a call
    View<T> q = detail::no_view<T>(), q_latent = q, latents = q, context = q;
  };
  void lay_out(detail::Carver& carver, Rows& rows, Index n) const {
    detail::carve_matrix(carver, rows.q, n, config_.heads * config_.head_dim());
    detail::carve_matrix(carver, rows.q_latent, n, config_.q_latent_dim);
    detail::carve_matrix(carver, rows.latents, n, config_.latent_dim + config_.rope_dim);
    detail::carve_matrix(carver, rows.context, n, config_.heads * config_.v_head_dim);
  }
  void project(Rows& rows, const ConstView<T>& x, const detail::AnyExecutor& executor) const {
    const bool direct = config_.q_latent_dim == 0;
    detail::run_together<T, 2>(
        {{{&first_queries(), direct ? rows.q : rows.q_latent, x}, {&weights_.latent_down, rows.latents, x}}}, executor);
    if (!direct) restore_queries(rows.q, rows.q_latent, executor);
  }
  void finish(const Rows& rows, Index first, Index n, Index position) const {
    finish_queries(detail::rows_of(rows.q, first, n), position);
    finish_latents(detail::rows_of(rows.latents, first, n), position);
  }
  template <class C>
  void append(const Rows& rows, std::span<const Index> row_offsets, std::span<C* const> caches) const {
    detail::append_all(row_offsets, caches, rows.latents.leftCols(config_.latent_dim),
                       rows.latents.rightCols(config_.rope_dim));
  }
  template <class C>
  void attend(const Rows& rows, std::span<const Index> row_offsets, std::span<C* const> caches, const RulesOf<C>& rules,
              const LayerOptions& options, const detail::AnyExecutor& executor) const {
    for (std::size_t s = 0; s < caches.size(); ++s) {
      const Index first = row_offsets[s], n = row_offsets[s + 1] - first;
      if (n > 0)
        rules.of(static_cast<Index>(s), [&](const detail::Rule<T, T>& rule) {
          attend_to(*caches[s], view(detail::rows_of(rows.q, first, n)), detail::rows_of(rows.context, first, n), rule,
                    options, executor);
        });
    }
  }

  /// The projections of x that give queries, or their latents.
  const Projection<T>& first_queries() const {
    return config_.q_latent_dim == 0 ? weights_.query : weights_.query_down;
  }
  void restore_queries(View<T> q, View<T> q_latent, const detail::AnyExecutor& executor) const {
    rms_norm_into(q_latent, q_latent, weights_.query_norm, config_.norm_eps);
    weights_.query_up.forward_into(q, q_latent, executor);
  }
  void finish_queries(View<T> q, Index first_position) const {
    if (rope_) rope_->apply_in_place(q, config_.heads, first_position, config_.nope_dim);
  }
  /// The latent is normed before it is cached, the rope key is rotated before it is cached and never normed.
  void finish_latents(View<T> c, Index first_position) const {
    auto latent = c.leftCols(config_.latent_dim);
    if (config_.latent_norm) rms_norm_into(latent, latent, weights_.latent_norm, config_.norm_eps);
    if (rope_) rope_->apply_in_place(c.rightCols(config_.rope_dim), 1, first_position);
  }

  /// context [n, heads·v_head_dim] of the last n tokens of the cache; q [n, heads·head_dim] is only read.
  template <class C>
  void attend_to(C& cache, const ConstView<T>& q, View<T> context, const detail::Rule<T, T>& rule,
                 const LayerOptions& options, const detail::AnyExecutor& executor) const {
    using S = typename C::Storage;
    const auto& c = config_;
    const Index n = q.rows();
    const LatentRows<S> rows = cache.latent_rows();
    if constexpr (!detail::owns_rows<C>) detail::check_runs(rows.runs, rows.rows);
    const kernel::LatentTask<T, S> task{rows, c.heads,        static_cast<T>(scale()), 0, cache.position() - n,
                                        rule, options.kernel, options.arithmetic};
    Workspace& workspace = cache.workspace();
    const auto sums = workspace.lease(static_cast<std::size_t>(2 * n * c.heads) * sizeof(T));
    T* maximum = reinterpret_cast<T*>(sums.data());
    T* sum = maximum + n * c.heads;
    if (choose_latent_form<T, S>(options, c, n, rows.rows) == LatentForm::naive) {
      const kernel::StateView<T> state{maximum, sum, context, c.heads};
      kernel::latent_naive(task, q, weights_.key_up, weights_.value_up, state, workspace, executor);
      detail::finish_rows(state, 0, n, 0, c.heads, c.v_head_dim, Options<T>{}, 0);
      return;
    }
    View<T> absorbed = detail::no_view<T>(), weighted = absorbed;
    const detail::Scratch scratch(workspace, [&](detail::Carver& carver) {
      detail::carve_matrix(carver, absorbed, n, c.heads * (c.latent_dim + c.rope_dim));
      detail::carve_matrix(carver, weighted, n, c.heads * c.latent_dim);
    });
    executor(c.heads, [&](Index h) {
      auto to = head_columns(absorbed, h, c.heads);
      const auto from = head_columns(q, h, c.heads);
      absorb_key_[static_cast<std::size_t>(h)].forward_into(to.leftCols(c.latent_dim), from.leftCols(c.nope_dim));
      to.rightCols(c.rope_dim) = from.rightCols(c.rope_dim);
    });
    const kernel::StateView<T> state{maximum, sum, weighted, c.heads};
    kernel::latent_absorbed(task, view(absorbed), state, workspace, executor);
    detail::finish_rows(state, 0, n, 0, c.heads, c.latent_dim, Options<T>{}, 0);
    executor(c.heads, [&](Index h) {
      absorb_value_[static_cast<std::size_t>(h)].forward_into(head_columns(context, h, c.heads),
                                                              head_columns(weighted, h, c.heads));
    });
  }

  LatentAttentionConfig config_;
  LatentAttentionWeights<T> weights_;
  std::optional<Rope<T>> rope_;
  std::vector<Projection<T>> absorb_key_;    // W_UK(h)ᵀ [nope_dim, latent_dim]
  std::vector<Projection<T>> absorb_value_;  // W_UV(h) [latent_dim, v_head_dim]
};

}}  // namespace qkv::QKV_ABI

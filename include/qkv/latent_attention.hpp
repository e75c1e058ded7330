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
// Two forms compute the same: naive (restore keys and values, for many queries) and absorbed (never restore them, for few);
// see call/latent_forms.hpp. `automatic` chooses by numbers of queries and keys only: latent_form.hpp.
// DeepSeek-V2, arXiv:2405.04434, section 2.1; V3, arXiv:2412.19437.
//
// Before: absorbed_attention.hpp   Next: checkpoint.hpp
#pragma once

#include <algorithm>
#include <span>
#include <utility>
#include <vector>

#include "attention.hpp"
#include "call/latent_forms.hpp"
#include "latent_cache.hpp"
#include "latent_form.hpp"
#include "latent_weights.hpp"
#include "layer/appended.hpp"
#include "layer/common.hpp"
#include "model_config.hpp"
#include "norm.hpp"
#include "rope.hpp"

namespace qkv { inline namespace QKV_ABI {

/// All that the layer asks of what holds one sequence's latent rows: LatentCache, PagedLatentCache, or your own type.
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
class LatentAttention {
 public:
  using Scalar = T;

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
  /// What scores are multiplied with: config.scale, or 1/√(nope_dim + rope_dim) times YaRN's m².
  double scale() const { return softmax_scale(config_); }

  void reserve_positions(Index n) { rope_.reserve(n); }
  /// The rotation of its rope keys: for cache.drop_rows.
  const Rope<T>& rope() const { return rope_; }

  /// An empty cache that fits this layer.
  template <StorageType S = T>
  LatentCache<S> make_cache(Index capacity) const {
    return LatentCache<S>({.latent_dim = config_.latent_dim, .rope_dim = config_.rope_dim, .capacity = capacity});
  }

  /// The steps one by one. x [n, model_dim]; row i stands at first_position + i.
  template <MatrixLike X>
  Matrix<T> queries(const X& x,
                    Index first_position = 0) const {  // [n, heads·(nope_dim + rope_dim)], rope part rotated
    Matrix<T> q(x.rows(), config_.heads * config_.head_dim()), down(x.rows(), config_.q_latent_dim);
    const auto& rows = viewable(x);
    project_queries(writable_view(q), writable_view(down), view(rows), serial);
    rope_.apply_in_place(q, config_.heads, first_position, config_.nope_dim);
    return q;
  }
  template <MatrixLike X>
  Matrix<T> latents(const X& x, Index first_position = 0) const {  // [n, latent_dim + rope_dim]: what is cached
    Matrix<T> c = weights_.latent_down.forward(x);
    finish_latents(writable_view(c), first_position);
    return c;
  }
  /// c [n, latent_dim] -> every head's keys without their rope part [n, heads·nope_dim].
  template <MatrixLike X>
  Matrix<T> restored_keys(const X& c) const {
    return weights_.key_up.forward(c);
  }
  /// c [n, latent_dim] -> every head's values [n, heads·v_head_dim].
  template <MatrixLike X>
  Matrix<T> restored_values(const X& c) const {
    return weights_.value_up.forward(c);
  }

  /// A whole text at positions 0 … n-1. Goes through a cache of its own.
  template <MatrixLike X, detail::NeitherCacheNorMatrix M = Window, class F = Plain, Executor E = Serial>
  Matrix<T> forward(const X& x, const M& mask = causal, const F& score = plain, const LayerOptions& options = {},
                    const E& executor = serial) const {
    auto cache = make_cache<T>(std::max<Index>(x.rows(), 1));
    return forward(x, cache, mask, score, options, executor);
  }

  /// The next tokens of the cache's sequence: a prompt, a chunk of one, or a single new token. Full caches throw
  /// std::length_error. Whatever throws, caches stay as they were.
  template <MatrixLike X, LatentKeySource C, class M = Window, class F = Plain, Executor E = Serial>
  Matrix<T> forward(const X& x, C& cache, const M& mask = causal, const F& score = plain,
                    const LayerOptions& options = {}, const E& executor = serial) const {
    Matrix<T> out(x.rows(), config_.model_dim);
    forward_into(out, viewable(x), cache, mask, score, options, executor);
    return out;
  }

  /// The same into out [n, model_dim], which shares no element with x. Allocates nothing once the cache's workspace is
  /// warm (serial executor).
  template <MatrixLike Out, MatrixLike X, LatentKeySource C, class M = Window, class F = Plain, Executor E = Serial>
  void forward_into(Out&& out, const X& x, C& cache, const M& mask = causal, const F& score = plain,
                    const LayerOptions& options = {}, const E& executor = serial) const {
    C* const caches[] = {&cache};
    const Index offsets[] = {0, x.rows()};
    forward_into(out, x, std::span<const Index>(offsets), std::span<C* const>(caches), mask, score, options, executor);
  }

  /// The next tokens of several sequences: rows row_offsets[s] … row_offsets[s+1]-1 of x belong to caches[s]. One
  /// projection for all rows; each sequence gives the same bits as alone. Either all caches take their rows or none.
  template <MatrixLike Out, MatrixLike X, LatentKeySource C, class M = Window, class F = Plain, Executor E = Serial>
  void forward_into(Out&& out, const X& x, std::span<const Index> row_offsets, std::span<C* const> caches,
                    const M& mask = causal, const F& score = plain, const LayerOptions& options = {},
                    const E& any = serial) const {
    const detail::AnyExecutor executor(any);
    const auto& m = detail::as_mask(mask);
    detail::check_functions<M, F, T>();
    const ConstView<T> rows = view(x);
    detail::require(x.cols() == config_.model_dim, "x must be [n, model_dim ", config_.model_dim, "]; given ",
                    detail::Shape{x.rows(), x.cols()});
    detail::check_out(out, x.rows(), config_.model_dim);
    detail::require_disjoint(out, x, "x");
    detail::check_batch(row_offsets, caches, x.rows());
    if (caches.empty() || x.rows() == 0) return;
    const auto of_sequence = [&](const auto& each, std::size_t s) -> decltype(auto) {
      return detail::of_sequence(each, static_cast<Index>(s), static_cast<Index>(caches.size()));
    };
    for (std::size_t s = 0; s < caches.size(); ++s) {
      detail::require(caches[s]->latent_dim() == config_.latent_dim && caches[s]->rope_dim() == config_.rope_dim,
                      "the cache must have latent_dim ", config_.latent_dim, " and rope_dim ", config_.rope_dim,
                      "; it has ", caches[s]->latent_dim(), " and ", caches[s]->rope_dim());
      detail::check_growth(of_sequence(m, s), of_sequence(score, s), *caches[s], {config_.heads, config_.heads},
                           row_offsets[s + 1] - row_offsets[s], detail::footprint(out));
    }
    detail::find_room(row_offsets, caches);

    Buffers b(*this, caches[0]->workspace(), x.rows());
    project_queries(b.q, b.q_latent, rows, executor);
    weights_.latent_down.forward_into(b.latents, rows, executor);
    for (std::size_t s = 0; s < caches.size(); ++s) {
      const Index first = row_offsets[s], n = row_offsets[s + 1] - first, position = caches[s]->position();
      rope_.apply_in_place(detail::rows_of(b.q, first, n), config_.heads, position, config_.nope_dim);
      finish_latents(detail::rows_of(b.latents, first, n), position);
    }
    detail::Appended<C> appended(row_offsets, caches, caches[0]->workspace());
    detail::append_all(row_offsets, caches, b.latents.leftCols(config_.latent_dim),
                       b.latents.rightCols(config_.rope_dim));
    for (std::size_t s = 0; s < caches.size(); ++s) {
      const Index first = row_offsets[s], n = row_offsets[s + 1] - first;
      if (n > 0)
        attend(detail::rows_of(b.context, first, n), detail::rows_of(b.q, first, n), *caches[s], of_sequence(m, s),
               of_sequence(score, s), options, executor);
    }
    weights_.output.forward_into(out, b.context, executor);
    appended.keep();
  }

  /// The same with the caches' addresses in a vector.
  template <MatrixLike Out, MatrixLike X, LatentKeySource C, class M = Window, class F = Plain, Executor E = Serial>
  void forward_into(Out&& out, const X& x, std::span<const Index> row_offsets, const std::vector<C*>& caches,
                    const M& mask = causal, const F& score = plain, const LayerOptions& options = {},
                    const E& executor = serial) const {
    forward_into(out, x, row_offsets, std::span<C* const>(caches), mask, score, options, executor);
  }

 private:
  /// Scratch for n rows, in one piece of a cache's workspace.
  struct Buffers {
    Buffers(const LatentAttention& layer, Workspace& workspace, Index n)
        : q(nullptr, 0, 0, Eigen::OuterStride<>(0)),
          q_latent(q),
          latents(q),
          context(q),
          lease(workspace.lease(carve(layer.config_, n, nullptr))) {
      carve(layer.config_, n, lease.data());
    }
    std::size_t carve(const LatentAttentionConfig& c, Index n, std::byte* base) {
      detail::Carver carver(base);
      detail::carve_matrix(carver, q, n, c.heads * c.head_dim());
      detail::carve_matrix(carver, q_latent, n, c.q_latent_dim);
      detail::carve_matrix(carver, latents, n, c.latent_dim + c.rope_dim);
      detail::carve_matrix(carver, context, n, c.heads * c.v_head_dim);
      return carver.used();
    }
    View<T> q, q_latent, latents, context;
    Workspace::Lease lease;
  };

  void project_queries(View<T> q, View<T> q_latent, const ConstView<T>& x, const detail::AnyExecutor& executor) const {
    if (config_.q_latent_dim == 0) return weights_.query.forward_into(q, x, executor);
    weights_.query_down.forward_into(q_latent, x, executor);
    rms_norm_into(q_latent, q_latent, weights_.query_norm, config_.norm_eps);
    weights_.query_up.forward_into(q, q_latent, executor);
  }

  /// The latent is normed before it is cached, the rope key is rotated before it is cached and never normed.
  void finish_latents(View<T> c, Index first_position) const {
    auto latent = c.leftCols(config_.latent_dim);
    if (config_.latent_norm) rms_norm_into(latent, latent, weights_.latent_norm, config_.norm_eps);
    rope_.apply_in_place(c.rightCols(config_.rope_dim), 1, first_position);
  }

  /// context [n, heads·v_head_dim] of the last n tokens of the cache; q is only read.
  template <LatentKeySource C, class M, class F>
  void attend(View<T> context, View<T> q, C& cache, const M& mask, const F& score, const LayerOptions& options,
              const detail::AnyExecutor& executor) const {
    using S = typename C::Storage;
    const auto& c = config_;
    const LatentRows<S> rows = cache.latent_rows();
    detail::check_runs(rows.runs, rows.rows);
    using Narrow = kernel::NarrowArithmetic<T, S>;
    constexpr double cost = Narrow::shorts ? short_absorbed_cost : Narrow::words ? narrow_absorbed_cost : 1.0;
    const LatentForm form =
        choose_latent_form(options.form, c, q.rows(), rows.rows, options.arithmetic != Arithmetic::exact ? cost : 1.0);
    const Index n = q.rows();
    const kernel::LatentTask<T, S, M, F> task{
        rows,   c.heads,        static_cast<T>(scale()), 0, cache.position() - n, &mask,
        &score, options.kernel, options.arithmetic};
    Workspace& workspace = cache.workspace();
    const auto sums = workspace.lease(static_cast<std::size_t>(2 * n * c.heads) * sizeof(T));
    T* maximum = reinterpret_cast<T*>(sums.data());
    T* sum = maximum + n * c.heads;
    if (form == LatentForm::naive) {
      const kernel::StateView<T> state{maximum, sum, context, c.heads};
      kernel::latent_naive(task, view(q), weights_.key_up, weights_.value_up, state, workspace, executor);
      detail::finish_rows(state, 0, n, 0, c.heads, c.v_head_dim, Options<T>{}, 0);
      return;
    }
    View<T> absorbed(nullptr, 0, 0, Eigen::OuterStride<>(0)), weighted(absorbed);
    const auto carve = [&](std::byte* base) {
      detail::Carver carver(base);
      detail::carve_matrix(carver, absorbed, n, c.heads * (c.latent_dim + c.rope_dim));
      detail::carve_matrix(carver, weighted, n, c.heads * c.latent_dim);
      return carver.used();
    };
    const auto scratch = workspace.lease(carve(nullptr));
    carve(scratch.data());
    executor(c.heads, [&](Index h) {
      auto to = head_columns(absorbed, h, c.heads);
      auto from = head_columns(q, h, c.heads);
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
  Rope<T> rope_;
  std::vector<Projection<T>> absorb_key_;    // W_UK(h)ᵀ [nope_dim, latent_dim]
  std::vector<Projection<T>> absorb_value_;  // W_UV(h) [latent_dim, v_head_dim]
};

}}  // namespace qkv::QKV_ABI

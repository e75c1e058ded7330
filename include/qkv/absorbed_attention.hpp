// absorbed_attention.hpp — latent attention on matrices: absorbed queries against latent rows that all heads share.
//
//     out = absorbed_attention(q, cache, 128, causal, {.scale = layer.scale()});
//
//     q [n_queries, heads·(latent_dim + rope_dim)]   of head h [q_nope·W_UK(h)ᵀ | q_rope]: W_UK absorbed into the query
//     latents                                         LatentCache, PagedLatentCache, or latent_rows(matrix, latent_dim)
//     out [n_queries, heads·latent_dim]               Σ p·c of every head; without W_UV
//
// It is attention() with kv_heads = 1, keys [c | r] and values c; mask, score, options and executor are the same. The
// scale has no default: a model's is computed from nope_dim, which latents do not have.
// DeepSeek-V2, arXiv:2405.04434, section 2.1 and appendix C; the two forms: call/latent_forms.hpp.
//
// Before: paged_latent_cache.hpp   Next: latent_attention.hpp
#pragma once

#include <optional>

#include "call/latent_forms.hpp"

namespace qkv { inline namespace QKV_ABI {

/// Anything that holds the latent rows of one sequence: LatentCache, PagedLatentCache, LatentMatrix, or your own type.
template <class C>
concept LatentSource = requires(const C& source) {
  source.latent_rows().runs;
  source.latent_rows().latent_dim;
};

/// The rows [c | r] of a matrix, at positions 0 … n_keys-1: a view of it, which must outlive the call.
template <StorageType S>
class LatentMatrix {
 public:
  LatentMatrix(const ConstView<S>& rows, Index latent_dim)
      : run_{.rows = rows.rows(), .latent = rows.data(), .rope = rows.data() + latent_dim},
        latent_dim_(latent_dim),
        rope_dim_(rows.cols() - latent_dim),
        stride_(rows.outerStride()) {
    static_assert(!has_row_scale<S>, "qkv: int8 latents have a scale per row: they live in a cache");
    detail::require(latent_dim >= 1 && rope_dim_ >= 1,
                    "latent rows are [c | r] with latent_dim and rope_dim >= 1; given latent_dim ", latent_dim, " of ",
                    rows.cols(), " columns");
  }
  LatentRows<S> latent_rows() const {
    return {.runs = {&run_, 1},
            .rows = run_.rows,
            .latent_dim = latent_dim_,
            .rope_dim = rope_dim_,
            .latent_row_stride = stride_,
            .rope_row_stride = stride_};
  }

 private:
  LatentRun<S> run_;
  Index latent_dim_, rope_dim_, stride_;
};

/// x [n_keys, latent_dim + rope_dim] as latent rows.
template <MatrixLike X>
LatentMatrix<ScalarOf<X>> latent_rows(const X& x, Index latent_dim) {
  return {view(x), latent_dim};
}
template <detail::DyingOperand X>
LatentMatrix<ScalarOf<X>> latent_rows(X&&,
                                      Index) = delete;  // a view: latent_rows(m, d), of std::as_const(m).topRows(n)

namespace detail {

template <StorageType S>
bool lies_in(const Footprint& output, const LatentRows<S>& rows) {
  for (const auto& run : rows.runs)
    if (share_an_element(output, footprint(run.latent, run.rows, rows.latent_dim, rows.latent_row_stride)) ||
        share_an_element(output, footprint(run.rope, run.rows, rows.rope_dim, rows.rope_row_stride)))
      return true;
  return false;
}

inline void check_absorbed_query(Index q_cols, Index heads, Index latent_dim, Index rope_dim) {
  check(Heads{heads, 1});
  require(q_cols % heads == 0 && q_cols / heads == checked_sum(latent_dim, rope_dim),
          "q must have heads*(latent_dim + rope_dim) columns; given ", q_cols, " for heads ", heads, ", latent_dim ",
          latent_dim, ", rope_dim ", rope_dim);
}

template <class T, StorageType S>
void attend_latents(const View<T>& out, const ConstView<T>& q, const LatentRows<S>& rows, Index n_heads,
                    const Rule<T, T>& rule, const Options<T>& options, const AnyExecutor& executor, bool own) {
  const Heads heads{n_heads, 1};
  const Index n = q.rows(), width = checked_sum(rows.latent_dim, rows.rope_dim);
  if (!own) check_runs(rows.runs, rows.rows);
  check_absorbed_query(q.cols(), n_heads, rows.latent_dim, rows.rope_dim);
  check_sizes(n, rows.rows, heads, width, rows.latent_dim);
  check_out(out, n, checked_product(n_heads, rows.latent_dim));
  check_options(options, heads);
  require(options.scale.value_or(0) != 0,
          "absorbed attention needs options.scale, the layer's 1/sqrt(nope_dim + "
          "rope_dim), which latent rows do not know");
  check_one_sequence(options, "latent rows are of");
  check_own_positions(options);
  check_outputs(out, options, q);
  const Index first = first_position(rule, rows, 0, n, options);
  const CallShape call{.heads = n_heads,
                       .n_queries = n,
                       .n_keys = rows.rows,
                       .first_position = first,
                       .last_key_position = end_position(rows, rows.rows) - 1,
                       .output = footprint(out),
                       .log_sum_exp = log_sum_exp_footprint(options)};
  require(own || (!lies_in(call.output, rows) && !lies_in(call.log_sum_exp, rows)),
          "the output (and the log-sum-exp) must not share elements with the latent rows");
  rule.check(call);

  std::optional<Workspace> local;
  Workspace& workspace = options.workspace ? *options.workspace : local.emplace();
  if (options.log_sum_exp) options.log_sum_exp->resize(n, n_heads);
  if (n == 0) return;
  const auto memory = workspace.lease(static_cast<std::size_t>(2 * n * n_heads) * sizeof(T));
  T* const maximum = reinterpret_cast<T*>(memory.data());
  const kernel::StateView<T> state{maximum, maximum + n * n_heads, out, n_heads};
  kernel::latent_absorbed(kernel::LatentTask<T, S>{rows, n_heads, scale_of(options, width), 0, first, rule,
                                                   options.kernel, options.arithmetic},
                          q, state, workspace, executor);
  finish_rows(state, 0, n, 0, n_heads, rows.latent_dim, options, 0);
}

}  // namespace detail

/// out [n_queries, heads·latent_dim] must have its shape and share no element with an input; options.scale must be given.
/// By default the queries are the last tokens of the latents. Throws std::invalid_argument before anything is written.
/// Allocates nothing with the serial executor and a warm options.workspace.
template <MatrixLike Out, MatrixLike Q, LatentSource C, detail::MaskOrScore M = detail::Omitted,
          detail::MaskOrScore F = detail::Omitted, Executor E = Serial>
void absorbed_attention_into(Out&& out, const Q& q, const C& latents, Index heads, const M& mask, const F& score,
                             const Options<ScalarOf<Q>>& options, const E& executor = serial) {
  using T = ScalarOf<Q>;
  detail::check_functions<M, F, T>();
  const auto& m = detail::as_mask(detail::given_or(mask, full));
  const auto rule = detail::rule_of<T, T>(m, detail::given_or(score, plain));
  detail::attend_latents(writable_view(out), view(q), latents.latent_rows(), heads, rule, options, executor,
                         detail::owns_rows<C>);
}
template <MatrixLike Out, MatrixLike Q, LatentSource C, Executor E = Serial>
void absorbed_attention_into(Out&& out, const Q& q, const C& latents, Index heads, const Options<ScalarOf<Q>>& options,
                             const E& executor = serial) {
  absorbed_attention_into(out, q, latents, heads, full, plain, options, executor);
}
template <MatrixLike Out, MatrixLike Q, LatentSource C, detail::MaskOrScore M = detail::Omitted, Executor E = Serial>
void absorbed_attention_into(Out&& out, const Q& q, const C& latents, Index heads, const M& mask,
                             const Options<ScalarOf<Q>>& options, const E& executor = serial) {
  absorbed_attention_into(out, q, latents, heads, mask, plain, options, executor);
}

/// Takes any Eigen expression as q.
template <MatrixLike Q, LatentSource C, detail::MaskOrScore M = detail::Omitted,
          detail::MaskOrScore F = detail::Omitted, Executor E = Serial>
Matrix<ScalarOf<Q>> absorbed_attention(const Q& q, const C& latents, Index heads, const M& mask, const F& score,
                                       const Options<ScalarOf<Q>>& options, const E& executor = serial) {
  const auto rows = latents.latent_rows();
  detail::check_absorbed_query(q.cols(), heads, rows.latent_dim, rows.rope_dim);
  Matrix<ScalarOf<Q>> out(q.rows(), detail::checked_product(heads, rows.latent_dim));
  absorbed_attention_into(out, viewable(q), latents, heads, mask, score, options, executor);
  return out;
}
template <MatrixLike Q, LatentSource C, Executor E = Serial>
Matrix<ScalarOf<Q>> absorbed_attention(const Q& q, const C& latents, Index heads, const Options<ScalarOf<Q>>& options,
                                       const E& executor = serial) {
  return absorbed_attention(q, latents, heads, full, plain, options, executor);
}
template <MatrixLike Q, LatentSource C, detail::MaskOrScore M = detail::Omitted, Executor E = Serial>
Matrix<ScalarOf<Q>> absorbed_attention(const Q& q, const C& latents, Index heads, const M& mask,
                                       const Options<ScalarOf<Q>>& options, const E& executor = serial) {
  return absorbed_attention(q, latents, heads, mask, plain, options, executor);
}

}}  // namespace qkv::QKV_ABI

// attention.hpp — the front door: softmax(score(scale · Q Kᵀ) under a mask) V, for all heads at once.
//
//     out = attention(q, k, v, {.heads = 8, .kv_heads = 2}, causal, {.scale = 0.1});
//
//     q [n_queries, heads·head_dim]   k [n_keys, kv_heads·head_dim]   v [n_keys, kv_heads·v_head_dim]
//     out [n_queries, heads·v_head_dim]                       cost 2·n_queries·n_keys·heads·(head_dim + v_head_dim) flops
//
//     mask      which keys a query sees  mask.hpp     default: full
//     score     what happens to q·k      score.hpp    default: plain
//     options   scale, positions, sinks, kernel, log-sum-exp, workspace, batches      options.hpp
//     executor  where work items run     parallel.hpp default: serial
//
// Arguments after heads, in this order; before options the score, or mask and score, may be omitted.
//
// Queries are the *last* tokens unless options.first_position says otherwise: with n_keys keys of which none is padding,
// query i is at position n_keys - n_queries + i. The output of a query that sees no key is zero.
// Vaswani et al. 2017, arXiv:1706.03762, equation 1; semantics of ONNX Attention, opset 25.
//
// Before: options.hpp   Next: explain.hpp
#pragma once

#include <optional>

#include "call/dispatch.hpp"
#include "data_masks.hpp"

namespace qkv { inline namespace QKV_ABI {

/// Anything that holds the keys and values of one sequence: KvCache, RingCache, PagedCache, or your own type with
/// key_rows(), whose runs stand at ascending positions from 0 on.
template <class C>
concept KeySource = !MatrixLike<C> && requires(const C& cache) {
  cache.key_rows().runs;
  cache.key_rows().kv_heads;
};

/// Scratch bytes that a call of these sizes needs with the serial executor, in two or three leases; after one call a
/// Workspace holds them and further calls allocate nothing. Grows with n_queries (two numbers per query and head) and
/// with n_keys (packed keys of one kv head; other executors: of as many as fit 32 MB), never with n_queries · n_keys.
/// For keys and values in T, at positions from 0 on. An int8 cache may need more: in decode, and in prefill with heads
/// of one feature.
template <class T>
Index required_bytes(Kernel kernel, Index n_queries, Index n_keys, Heads heads, Index head_dim, Index v_head_dim) {
  check(heads);
  detail::require(n_queries >= 0 && n_keys >= 0 && head_dim >= 0 && v_head_dim >= 0,
                  "a call needs n_queries, n_keys, head_dim and v_head_dim >= 0; given ", n_queries, ", ", n_keys, ", ",
                  head_dim, ", ", v_head_dim);
  detail::check_sizes(n_queries, n_keys, heads, head_dim, v_head_dim);
  const auto state = static_cast<std::size_t>(2 * n_queries * heads.heads) * sizeof(T);
  switch (choose_kernel<T>(kernel, n_queries)) {
    case Kernel::tiled: {
      const std::size_t per_head = kernel::packed_kv_bytes<kernel::Exact<T>>(
          (n_keys + kernel::tile_keys - 1) / kernel::tile_keys, head_dim, v_head_dim);
      return static_cast<Index>(state + per_head + kernel::TiledScratch<T>::bytes(head_dim, v_head_dim));
    }
    case Kernel::decode: {
      const std::size_t head =
          kernel::DecodeHeadOf<kernel::WidenedDot<T, T>>::bytes(n_queries * heads.group_size(), head_dim, v_head_dim);
      const Index at_once = kernel::decode_heads_at_once(head_dim * static_cast<Index>(sizeof(T)), heads.kv_heads,
                                                         head);  // of plain matrices: the most
      return static_cast<Index>(state + kernel::Decode<T>::bytes(at_once, head));
    }
    default:
      return static_cast<Index>(state + kernel::ReferenceScratch<T>::bytes(n_keys, v_head_dim));
  }
}

/// out [n_queries, heads·v_head_dim] must have its shape and share no element with an input; all operands are row-major
/// with unit inner stride. Throws std::invalid_argument before anything is written. Allocates nothing with the serial
/// executor and a warm options.workspace.
template <MatrixLike Out, MatrixLike Q, MatrixLike K, MatrixLike V, detail::MaskOrScore M = detail::Omitted,
          detail::MaskOrScore F = detail::Omitted, Executor E = Serial>
void attention_into(Out&& out, const Q& q, const K& k, const V& v, Heads heads = {}, const M& mask = {},
                    const F& score = {}, const Options<ScalarOf<Q>>& options = {}, const E& executor = serial) {
  using T = ScalarOf<Q>;
  using S = ScalarOf<K>;
  using Rule = detail::Rule<T, S>;
  detail::check_scalars<T, S, ScalarOf<V>>();
  detail::check_functions<M, F, T>();
  const auto& m = detail::as_mask(detail::given_or(mask, full));
  const auto& f = detail::given_or(score, plain);
  detail::attend_matrices<T, S>(
      writable_view(out), view(q), view(k), view(v), heads,
      [&](Index s, Index n, detail::FunctionRef<void(const Rule&)> use) {
        decltype(auto) own_mask = detail::of_sequence(m, s, n);
        decltype(auto) own_score = detail::of_sequence(f, s, n);
        use(detail::rule_of<T, S>(own_mask, own_score));
      },
      options, executor);
}
template <MatrixLike Out, MatrixLike Q, MatrixLike K, MatrixLike V, Executor E = Serial>
void attention_into(Out&& out, const Q& q, const K& k, const V& v, Heads heads, const Options<ScalarOf<Q>>& options,
                    const E& executor = serial) {
  attention_into(out, q, k, v, heads, full, plain, options, executor);
}
template <MatrixLike Out, MatrixLike Q, MatrixLike K, MatrixLike V, detail::MaskOrScore M = detail::Omitted,
          Executor E = Serial>
void attention_into(Out&& out, const Q& q, const K& k, const V& v, Heads heads, const M& mask,
                    const Options<ScalarOf<Q>>& options, const E& executor = serial) {
  attention_into(out, q, k, v, heads, mask, plain, options, executor);
}

/// Operands are any Eigen expressions; those that are not row-major in memory are copied first.
template <MatrixLike Q, MatrixLike K, MatrixLike V, detail::MaskOrScore M = detail::Omitted,
          detail::MaskOrScore F = detail::Omitted, Executor E = Serial>
Matrix<ScalarOf<Q>> attention(const Q& q, const K& k, const V& v, Heads heads = {}, const M& mask = {},
                              const F& score = {}, const Options<ScalarOf<Q>>& options = {},
                              const E& executor = serial) {
  detail::check_keys(k, v, heads);
  detail::check_query(q.cols(), heads, heads.kv_heads, k.cols() / heads.kv_heads);
  Matrix<ScalarOf<Q>> out(q.rows(), detail::checked_product(heads.heads, v.cols() / heads.kv_heads));
  attention_into(out, viewable(q), viewable(k), viewable(v), heads, mask, score, options, executor);
  return out;
}
template <MatrixLike Q, MatrixLike K, MatrixLike V, Executor E = Serial>
Matrix<ScalarOf<Q>> attention(const Q& q, const K& k, const V& v, Heads heads, const Options<ScalarOf<Q>>& options,
                              const E& executor = serial) {
  return attention(q, k, v, heads, full, plain, options, executor);
}
template <MatrixLike Q, MatrixLike K, MatrixLike V, detail::MaskOrScore M = detail::Omitted, Executor E = Serial>
Matrix<ScalarOf<Q>> attention(const Q& q, const K& k, const V& v, Heads heads, const M& mask,
                              const Options<ScalarOf<Q>>& options, const E& executor = serial) {
  return attention(q, k, v, heads, mask, plain, options, executor);
}

/// Queries against what a cache holds. By default the queries are the last tokens of the cache.
template <MatrixLike Out, MatrixLike Q, KeySource C, detail::MaskOrScore M = detail::Omitted,
          detail::MaskOrScore F = detail::Omitted, Executor E = Serial>
void attention_into(Out&& out, const Q& q, const C& cache, Heads heads = {}, const M& mask = {}, const F& score = {},
                    const Options<ScalarOf<Q>>& options = {}, const E& executor = serial) {
  using T = ScalarOf<Q>;
  detail::check_functions<M, F, T>();
  const auto& m = detail::as_mask(detail::given_or(mask, full));
  const auto rows = cache.key_rows();
  detail::attend_rows(writable_view(out), view(q), rows, heads,
                      detail::rule_for<T>(rows, m, detail::given_or(score, plain)), options, executor,
                      detail::owns_rows<C>);
}
template <MatrixLike Out, MatrixLike Q, KeySource C, Executor E = Serial>
void attention_into(Out&& out, const Q& q, const C& cache, Heads heads, const Options<ScalarOf<Q>>& options,
                    const E& executor = serial) {
  attention_into(out, q, cache, heads, full, plain, options, executor);
}
template <MatrixLike Out, MatrixLike Q, KeySource C, detail::MaskOrScore M = detail::Omitted, Executor E = Serial>
void attention_into(Out&& out, const Q& q, const C& cache, Heads heads, const M& mask,
                    const Options<ScalarOf<Q>>& options, const E& executor = serial) {
  attention_into(out, q, cache, heads, mask, plain, options, executor);
}

template <MatrixLike Q, KeySource C, detail::MaskOrScore M = detail::Omitted, detail::MaskOrScore F = detail::Omitted,
          Executor E = Serial>
Matrix<ScalarOf<Q>> attention(const Q& q, const C& cache, Heads heads = {}, const M& mask = {}, const F& score = {},
                              const Options<ScalarOf<Q>>& options = {}, const E& executor = serial) {
  const auto rows = cache.key_rows();
  detail::check_query(q.cols(), heads, rows.kv_heads, rows.head_dim);
  Matrix<ScalarOf<Q>> out(q.rows(), detail::checked_product(heads.heads, rows.v_head_dim));
  attention_into(out, viewable(q), cache, heads, mask, score, options, executor);
  return out;
}
template <MatrixLike Q, KeySource C, Executor E = Serial>
Matrix<ScalarOf<Q>> attention(const Q& q, const C& cache, Heads heads, const Options<ScalarOf<Q>>& options,
                              const E& executor = serial) {
  return attention(q, cache, heads, full, plain, options, executor);
}
template <MatrixLike Q, KeySource C, detail::MaskOrScore M = detail::Omitted, Executor E = Serial>
Matrix<ScalarOf<Q>> attention(const Q& q, const C& cache, Heads heads, const M& mask,
                              const Options<ScalarOf<Q>>& options, const E& executor = serial) {
  return attention(q, cache, heads, mask, plain, options, executor);
}

namespace detail {

/// The state of one sequence's queries over the keys of these matrices.
template <class T, StorageType S>
SoftmaxState<T> state_of(const ConstView<T>& q, const ConstView<S>& k, const ConstView<S>& v, Heads heads,
                         const Rule<T, S>& rule, const Options<T>& options, const AnyExecutor& executor) {
  check_query(q.cols(), heads, heads.kv_heads, k.cols() / heads.kv_heads);
  check_sizes(q.rows(), k.rows(), heads, k.cols() / heads.kv_heads, v.cols() / heads.kv_heads);
  check_options(options, heads);
  check_one_sequence(options, "a state is of");
  require(options.sinks.empty() && !options.log_sum_exp,
          "a state is of one sequence and without sinks: sinks and log_sum_exp must be empty");
  const MatrixKeys<S> source(k, v, 0, k.rows(), heads.kv_heads, options.first_key_position);
  const auto task = make_task(q, source.rows, heads, rule, options, 0);
  check_call(rule, source.rows, {.heads = heads.heads, .n_queries = q.rows(), .first_position = task.first_position});

  auto state = SoftmaxState<T>::empty(q.rows(), heads.heads, task.v_head_dim);
  std::optional<Workspace> local;
  launch(choose_kernel<T>(options.kernel, q.rows()), task, rule,
         kernel::StateView<T>{state.maximum.data(), state.sum.data(), writable_view(state.weighted), heads.heads},
         options.workspace ? *options.workspace : local.emplace(), executor, nothing_more);
  return state;
}

}  // namespace detail

/// The softmax state of q over these keys: states over disjoint keys merge, and finish() gives the output of
/// attention(). For a part of the keys that begins at row r set .first_key_position = r: masks and scores then see the
/// positions of the whole text (operands indexed by rows, such as lengths and bias, are those of the part). Set
/// .first_position too, unless the queries are the last tokens of this part. Sinks are refused here; they join in
/// finish().
template <MatrixLike Q, MatrixLike K, MatrixLike V, detail::MaskOrScore M = detail::Omitted,
          detail::MaskOrScore F = detail::Omitted, Executor E = Serial>
SoftmaxState<ScalarOf<Q>> attention_state(const Q& q, const K& k, const V& v, Heads heads = {}, const M& mask = {},
                                          const F& score = {}, const Options<ScalarOf<Q>>& options = {},
                                          const E& executor = serial) {
  using T = ScalarOf<Q>;
  using S = ScalarOf<K>;
  detail::check_scalars<T, S, ScalarOf<V>>();
  const auto& q_rows = viewable(q);
  const auto& k_rows = viewable(k);
  const auto& v_rows = viewable(v);
  detail::check_functions<M, F, T>();
  const auto& m = detail::as_mask(detail::given_or(mask, full));
  detail::check_keys(k, v, heads);
  return detail::state_of<T, S>(view(q_rows), view(k_rows), view(v_rows), heads,
                                detail::rule_of<T, S>(m, detail::given_or(score, plain)), options, executor);
}
template <MatrixLike Q, MatrixLike K, MatrixLike V, Executor E = Serial>
SoftmaxState<ScalarOf<Q>> attention_state(const Q& q, const K& k, const V& v, Heads heads,
                                          const Options<ScalarOf<Q>>& options, const E& executor = serial) {
  return attention_state(q, k, v, heads, full, plain, options, executor);
}
template <MatrixLike Q, MatrixLike K, MatrixLike V, detail::MaskOrScore M = detail::Omitted, Executor E = Serial>
SoftmaxState<ScalarOf<Q>> attention_state(const Q& q, const K& k, const V& v, Heads heads, const M& mask,
                                          const Options<ScalarOf<Q>>& options, const E& executor = serial) {
  return attention_state(q, k, v, heads, mask, plain, options, executor);
}

namespace detail {

template <class T, StorageType S, class M, class F>
Matrix<T> weights_of(const ConstView<T>& q, const KeyRows<S>& keys, Heads heads, const M& mask, const F& score,
                     std::optional<Stage> stage, const Options<T>& options) {
  check_runs(keys.runs, keys.rows);
  check_query(q.cols(), heads, keys.kv_heads, keys.head_dim);
  check_sizes(q.rows(), keys.rows, heads, keys.head_dim, keys.v_head_dim);
  check_options(options, heads);
  check_one_sequence(options, "weights are of");
  const auto rule = rule_of<T, S>(mask, score);
  const auto task = make_task(q, keys, heads, rule, options, 0);
  check_call(rule, keys, {.heads = heads.heads, .n_queries = q.rows(), .first_position = task.first_position});
  Matrix<T> weights(checked_product(heads.heads, q.rows()), keys.rows);
  for (Index row = 0; row < weights.rows(); ++row) {
    const Index h = row / q.rows(), i = row % q.rows();
    kernel::reference_weights(task, mask, score, h, i,
                              options.sinks.empty() ? minus_infinity<T> : options.sinks[static_cast<std::size_t>(h)],
                              stage.value_or(Stage::probabilities), weights.data() + row * keys.rows);
  }
  return weights;
}

}  // namespace detail

/// The attention weights, for learning and debugging: [heads·n_queries, n_keys], head h in rows h·n_queries …: the matrix
/// that attention() never builds. stage: by default Stage::probabilities. Loops of kernel::reference.
template <MatrixLike Q, MatrixLike K, class M = Full, class F = Plain>
Matrix<ScalarOf<Q>> attention_weights(const Q& q, const K& k, Heads heads = {}, const M& mask = full,
                                      const F& score = plain, std::optional<Stage> stage = {},
                                      const Options<ScalarOf<Q>>& options = {}) {
  using S = ScalarOf<K>;
  detail::check_functions<M, F, ScalarOf<Q>>();
  detail::check_scalars<ScalarOf<Q>, S, S>();
  const auto& q_rows = viewable(q);
  const auto& k_rows = viewable(k);
  detail::check_keys(k, k, heads);
  const detail::MatrixKeys<S> source(view(k_rows), view(k_rows), 0, k.rows(), heads.kv_heads,
                                     options.first_key_position);
  return detail::weights_of(view(q_rows), source.rows, heads, detail::as_mask(mask), score, stage, options);
}

/// The same against what a cache holds.
template <MatrixLike Q, KeySource C, class M = Full, class F = Plain>
Matrix<ScalarOf<Q>> attention_weights(const Q& q, const C& cache, Heads heads = {}, const M& mask = full,
                                      const F& score = plain, std::optional<Stage> stage = {},
                                      const Options<ScalarOf<Q>>& options = {}) {
  detail::check_functions<M, F, ScalarOf<Q>>();
  const auto& q_rows = viewable(q);
  detail::check_own_positions(options);
  return detail::weights_of(view(q_rows), cache.key_rows(), heads, detail::as_mask(mask), score, stage, options);
}

}}  // namespace qkv::QKV_ABI

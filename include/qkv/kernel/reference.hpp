// kernel/reference.hpp — attention in loops straight from the formula: the oracle of every other kernel.
//
//     s_ij = score(scale · q_i·k_j)      p_ij = exp(s_ij - m_i) / (Σ_j exp(s_ij - m_i) + exp(sink - m_i))      out_i = Σ_j p_ij v_j
//
// over the keys j that the mask lets query i see and whose score is not -inf; others are not read. Generic in the scalar:
// float, double, long double or your own. Cost O(n_queries · n_keys · heads · (head_dim + v_head_dim)), no blocking.
// ONNX Attention, opset 25.
//
// Before: kernel/task.hpp   Next: kernel/arithmetic.hpp
#pragma once

#include <cmath>

#include "../options.hpp"
#include "../softmax.hpp"
#include "../workspace.hpp"
#include "task.hpp"

namespace qkv { inline namespace QKV_ABI { namespace kernel {

/// Scratch of one head.
template <class T>
struct ReferenceScratch {
  T* row;      // [n_keys]
  bool* seen;  // [n_keys]
  T* out;      // [v_head_dim]

  ReferenceScratch(detail::Carver& carver, Index n_keys, Index v_head_dim)
      : row(carver.take<T>(n_keys)), seen(carver.take<bool>(n_keys)), out(carver.take<T>(v_head_dim)) {}

  static std::size_t bytes(Index n_keys, Index v_head_dim) {
    detail::Carver carver(nullptr);
    ReferenceScratch(carver, n_keys, v_head_dim);
    return carver.used();
  }
};

/// One row of the matrix of weights, at any stage, as ONNX orders the steps.
/// row [n_keys] is written; returns the log-sum-exp (only where stage is probabilities). The task's rule is not used.
template <class T, StorageType S, class M, class F>
T reference_weights(const Task<T, S>& task, const M& mask, const F& score, Index head, Index query, T sink, Stage stage,
                    T* row) {
  using std::exp;
  using std::log;
  const Index kv_head = task.heads.kv_head(head);
  T top = detail::minus_infinity<T>;
  Index j = 0;
  for (const auto& run : task.keys.runs)
    for (Index r = 0; r < run.rows; ++r, ++j) {
      const At at{task.sequence,           task.first_head + head,      query,
                  task.keys.first_row + j, task.first_position + query, run.position + r};
      if (stage >= Stage::masked && !mask.sees(at)) {
        row[j] = detail::minus_infinity<T>;
        continue;
      }
      const T* q = task.query(query, head);
      const S* k = task.keys.key(run, kv_head, r);
      const T key_scale = static_cast<T>(task.keys.key_scale(run, kv_head, r));
      T dot = 0;
      for (Index d = 0; d < task.head_dim; ++d)
        dot += q[d] * (has_row_scale<S> ? static_cast<T>(k[d]) * key_scale : static_cast<T>(k[d]));
      row[j] = task.scale * dot;
      if (stage >= Stage::scored) row[j] = score(row[j], at);
      top = detail::nan_max(top, row[j]);
    }
  if (stage < Stage::probabilities) return 0;

  top = detail::nan_max(top, sink);
  if (top == detail::minus_infinity<T>) {
    for (Index i = 0; i < j; ++i) row[i] = 0;
    return top;
  }
  T total = sink == detail::minus_infinity<T> ? T(0) : exp(sink - top);
  for (Index i = 0; i < j; ++i) total += row[i] == detail::minus_infinity<T> ? T(0) : exp(row[i] - top);
  for (Index i = 0; i < j; ++i) row[i] = row[i] == detail::minus_infinity<T> ? T(0) : exp(row[i] - top) / total;
  return top + log(total);
}

/// One query and head: out [v_head_dim] is written; returns the log-sum-exp. `row` and `seen` are scratch for n_keys.
template <class T, StorageType S, class M, class F>
T reference(const Task<T, S>& task, const M& mask, const F& score, Index head, Index query, T sink, T* row, bool* seen,
            T* out) {
  const Index kv_head = task.heads.kv_head(head);
  reference_weights(task, mask, score, head, query, sink, Stage::masked, row);
  for (Index j = 0; j < task.keys.rows; ++j) seen[j] = row[j] != detail::minus_infinity<T>;
  const T lse = reference_weights(task, mask, score, head, query, sink, Stage::probabilities, row);
  for (Index d = 0; d < task.v_head_dim; ++d) out[d] = 0;
  Index j = 0;
  for (const auto& run : task.keys.runs)
    for (Index r = 0; r < run.rows; ++r, ++j) {
      if (!seen[j]) continue;
      const S* v = task.keys.value(run, kv_head, r);
      const T p = row[j] * static_cast<T>(task.keys.value_scale(run, kv_head, r));
      for (Index d = 0; d < task.v_head_dim; ++d) out[d] += p * static_cast<T>(v[d]);
    }
  return lse;
}

}}}  // namespace qkv::QKV_ABI::kernel

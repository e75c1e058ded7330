// kernel/decode.hpp — a few queries against a long cache: every key and value row is read once, in order.
//
//     for each chunk of keys on the position grid:   s = scale · K q for all queries of the kv group, row by row
//                                                    m, l, o ← merge with (max s, Σ e^s, Σ e^s v)
//
// The work is bound by reading memory: 2 · n_keys · kv_heads · head_dim numbers. Queries of a group (and several new
// tokens) share each row while it is in registers or L1.
//
// Before: kernel/tiled.hpp   Next: attention.hpp
#pragma once

#include <algorithm>
#include <cmath>

#include "../softmax.hpp"
#include "../workspace.hpp"
#include "task.hpp"

namespace qkv::inline QKV_ABI::kernel {

inline constexpr Index decode_chunk = 256;

/// Dot product in 16 interleaved partial sums, added in a fixed order.
template <class T>
T lane_dot(const T* a, const T* b, Index n) {
  constexpr Index lanes = 16;
  T acc[lanes] = {};
  Index i = 0;
  for (; i + lanes <= n; i += lanes)
    for (Index j = 0; j < lanes; ++j) acc[j] += a[i + j] * b[i + j];
  for (Index j = 0; i < n; ++i, ++j) acc[j] += a[i] * b[i];
  for (Index half = lanes / 2; half > 0; half /= 2)
    for (Index j = 0; j < half; ++j) acc[j] += acc[j + half];
  return acc[0];
}

template <class T>
std::size_t decode_scratch_bytes(Index n_queries, Index group_size, Index head_dim, Index v_head_dim) {
  detail::Carver carver(nullptr);
  carver.take<T>(std::max(head_dim, v_head_dim));
  carver.take<T>(n_queries * group_size * decode_chunk);
  return carver.used();
}

/// One kv head of a task, for all its query heads and all (few) queries.
template <class T, StorageType S, class M, class F>
class Decode {
 public:
  Decode(const Task<T, S, M, F>& task, const StateView<T>& state, Index kv_head, std::byte* scratch)
      : task_(task), state_(state), kv_head_(kv_head), carver_(scratch) {
    row_ = carver_.template take<T>(std::max(task.head_dim(), task.v_head_dim()));
    scores_ = carver_.template take<T>(task.n_queries() * task.heads.group_size() * decode_chunk);
  }

  /// Merges all keys of the task into the state of this kv head's queries.
  void run() {
    for_each_chunk(task_.keys, decode_chunk, [&](Index first, std::size_t r, Index base, Index row) {
      if (score_chunk(first, r, base, row)) weigh_chunk(first, r, base, row);
    });
  }

 private:
  Index group() const { return task_.heads.group_size(); }
  Index first_head() const { return kv_head_ * group(); }
  T* scores(Index query, Index h) const { return scores_ + (query * group() + h - first_head()) * decode_chunk; }

  /// Scores of the chunk; -inf where a query does not see a key. False: nobody sees anything.
  bool score_chunk(Index first, std::size_t r, Index base, Index row) {
    bool any = false;
    std::fill_n(scores_, task_.n_queries() * group() * decode_chunk, detail::minus_infinity<T>);
    for_each_piece(task_.keys, decode_chunk, first, r, base, row,
                   [&](const KeyRun<S>& run, Index run_base, Index run_row, Index count, Index column) {
                     Cover least = Cover::all, most = Cover::none;
                     for (Index h = first_head(); h < first_head() + group(); ++h) {
                       const Cover c = detail::cover(
                           *task_.mask, task_.block(h, 0, task_.n_queries(), run, run_base, run_row, count));
                       least = std::min(least, c), most = std::max(most, c);
                     }
                     if (most == Cover::none) return;
                     any = true;
                     for (Index k = 0; k < count; ++k) {
                       const T* key = read(task_.keys.key(run, kv_head_, run_row + k), task_.head_dim(),
                                           task_.keys.key_scale(run, kv_head_, run_row + k));
                       for (Index i = 0; i < task_.n_queries(); ++i)
                         for (Index h = first_head(); h < first_head() + group(); ++h) {
                           const At at = task_.at(h, i, run_base + run_row + k, run.position + run_row + k);
                           if (least != Cover::all && !task_.mask->sees(at)) continue;
                           const T dot = lane_dot(task_.query(i, h), key, task_.head_dim());
                           scores(i, h)[column + k] = (*task_.score)(task_.scale * dot, at);
                         }
                     }
                   });
    return any;
  }

  void weigh_chunk(Index first, std::size_t r, Index base, Index row) {
    using std::exp;
    const Index dv = task_.v_head_dim();
    for (Index i = 0; i < task_.n_queries(); ++i)
      for (Index h = first_head(); h < first_head() + group(); ++h) {
        T* s = scores(i, h);
        T top = state_.m(i, h);
        for (Index j = 0; j < decode_chunk; ++j) top = detail::nan_max(top, s[j]);
        if (top == detail::minus_infinity<T>) continue;
        const T keep = detail::weight_of(state_.m(i, h), top);
        T sum = keep * state_.l(i, h);
        for (Index j = 0; j < decode_chunk; ++j) {
          if (s[j] == detail::minus_infinity<T>) continue;
          s[j] = exp(s[j] - top);
          sum += s[j];
        }
        state_.m(i, h) = top;
        state_.l(i, h) = sum;
        T* o = state_.o(i, h, dv);
        if (keep != T(1))
          for (Index x = 0; x < dv; ++x) o[x] *= keep;
      }
    for_each_piece(task_.keys, decode_chunk, first, r, base, row,
                   [&](const KeyRun<S>& run, Index, Index run_row, Index count, Index column) {
                     for (Index k = 0; k < count; ++k) weigh_row(run, run_row + k, column + k);
                   });
  }

  void weigh_row(const KeyRun<S>& run, Index row, Index column) {
    const Index dv = task_.v_head_dim();
    const T* value = nullptr;
    for (Index i = 0; i < task_.n_queries(); ++i)
      for (Index h = first_head(); h < first_head() + group(); ++h) {
        const T p = scores(i, h)[column];
        if (p == detail::minus_infinity<T>) continue;  // not seen: the value is not read
        if (!value) value = read(task_.keys.value(run, kv_head_, row), dv, task_.keys.value_scale(run, kv_head_, row));
        T* o = state_.o(i, h, dv);
        for (Index x = 0; x < dv; ++x) o[x] += p * value[x];
      }
  }

  /// The row as T: itself where it is stored so, otherwise converted.
  const T* read(const S* row, Index n, float scale) const {
    if constexpr (std::same_as<S, T>) {
      return row;
    } else {
      load_row(row, n, scale, row_);
      return row_;
    }
  }

  const Task<T, S, M, F>& task_;
  const StateView<T>& state_;
  Index kv_head_;
  detail::Carver carver_;
  T *row_, *scores_;
};

}  // namespace qkv::inline QKV_ABI::kernel

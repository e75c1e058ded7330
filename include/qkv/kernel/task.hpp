// kernel/task.hpp — the attention of one sequence as every kernel sees it, and what every kernel must produce.
//
// Before: kernel/pair_rule.hpp   Next: kernel/reference.hpp
#pragma once

#include <algorithm>
#include <utility>

#include "../heads.hpp"
#include "../key_rows.hpp"
#include "../options.hpp"
#include "../softmax.hpp"
#include "pair_rule.hpp"

namespace qkv::inline QKV_ABI::kernel {

/// Inputs. Everything has been checked; nothing here is written.
template <class T, StorageType S>
struct Task {
  ConstView<T> q;  // [n_queries, heads·head_dim]
  KeyRows<S> keys;
  Heads heads;
  T scale;
  Index sequence = 0, first_position = 0;
  PairRule<T> rule = {};
  Arithmetic arithmetic = Arithmetic::automatic;
  Index first_head = 0;  // as masks and scores count heads: not 0 where this is a part of them

  Index n_queries() const { return q.rows(); }
  Index head_dim() const { return keys.head_dim; }
  Index v_head_dim() const { return keys.v_head_dim; }
  const T* query(Index row, Index head) const { return q.data() + row * q.outerStride() + head * keys.head_dim; }

  /// `lanes` lanes, queries of `heads` heads side by side, from lane `lane` on × the keys [row, row + count) of `run`, whose
  /// rows begin at logical row `base`.
  PairTile tile(Index head, Index n_heads, Index lane, Index lanes, const KeyRun<S>& run, Index base, Index row,
                Index count) const {
    return {sequence, first_head + head, n_heads, lane, lanes, first_position, base + row, run.position + row, count};
  }
};

/// Output: the softmax state of every query and head. A kernel merges its keys into what is there, so that keys may come
/// in several parts; clear() makes the state of no keys.
template <class T>
struct StateView {
  T* maximum;        // [n_queries, heads]
  T* sum;            // [n_queries, heads]
  View<T> weighted;  // [n_queries, heads·v_head_dim]
  Index heads;

  T& m(Index query, Index head) const { return maximum[query * heads + head]; }
  T& l(Index query, Index head) const { return sum[query * heads + head]; }
  T* o(Index query, Index head, Index v_head_dim) const {
    return const_cast<T*>(weighted.data()) + query * weighted.outerStride() + head * v_head_dim;
  }
  /// Without `weighted`: for a kernel that writes a row where its maximum is -inf.
  void clear_sums(Index query, Index n_queries, Index head) const {
    for (Index i = query; i < query + n_queries; ++i) m(i, head) = detail::minus_infinity<T>, l(i, head) = 0;
  }
  void clear(Index query, Index n_queries, Index head, Index n_heads, Index v_head_dim) const {
    for (Index i = query; i < query + n_queries; ++i)
      for (Index h = head; h < head + n_heads; ++h) {
        m(i, h) = detail::minus_infinity<T>;
        l(i, h) = 0;
        std::fill_n(o(i, h, v_head_dim), v_head_dim, T(0));
      }
  }
};

/// Kernels cut the keys on a fixed grid of absolute positions: whatever runs hold them, and however the queries arrive,
/// a chunk holds the same keys, so paged, ring and contiguous caches give the same bits.
/// Chunks before the position `end`, from row `row` of run r on; the first row of that run is logical row `base`.
template <StorageType S, class F>
void for_each_chunk(const KeyRows<S>& keys, Index chunk, std::size_t r, Index base, Index row, Index end, F&& f) {
  while (r < keys.runs.size()) {
    if (row == keys.runs[r].rows) {
      base += keys.runs[r].rows, row = 0, ++r;
      continue;
    }
    const Index first = (keys.runs[r].position + row) / chunk * chunk;
    if (first >= end) return;
    f(first, r, base, row);  // the chunk [first, first + chunk) begins at run r, row `row`
    while (r < keys.runs.size()) {
      const auto& run = keys.runs[r];
      row = std::min(run.rows, first + chunk - run.position);
      if (row < run.rows) break;
      base += run.rows, row = 0, ++r;
      if (r < keys.runs.size() && keys.runs[r].position >= first + chunk) break;
    }
  }
}
/// All of them.
template <StorageType S, class F>
void for_each_chunk(const KeyRows<S>& keys, Index chunk, F&& f) {
  for_each_chunk(keys, chunk, 0, keys.first_row, 0, infinite, std::forward<F>(f));
}

/// The pieces of the chunk that begins at (r, base, row): f(run, base, row, count, column), column = position - first.
template <StorageType S, class F>
void for_each_piece(const KeyRows<S>& keys, Index chunk, Index first, std::size_t r, Index base, Index row, F&& f) {
  for (; r < keys.runs.size(); base += keys.runs[r].rows, row = 0, ++r) {
    const auto& run = keys.runs[r];
    if (run.rows == 0) continue;
    const Index end = std::min(run.rows, first + chunk - run.position);
    if (end <= row) return;
    f(run, base, row, end - row, run.position + row - first);
  }
}

}  // namespace qkv::inline QKV_ABI::kernel

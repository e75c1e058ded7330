// layer/batch_rows.hpp — a batch of sequences in a layer, its masks and scores, and parts of the rows in caches.
//
// Before: layer/appended.hpp   Next: layer/batch.hpp
#pragma once

#include <span>

#include "../call/dispatch.hpp"
#include "../rope.hpp"

namespace qkv { inline namespace QKV_ABI { namespace detail {

struct Stacked;

/// The masks and scores of a call's sequences, whatever their types. S: storage of the keys that kernels see.
template <class T, StorageType S>
struct Rules {
  using Use = FunctionRef<void(const Rule<T, S>&)>;

  template <class M, class F>
  static Rule<T, S> rule(const M& mask, const F& score) {
    return rule_of<T, S>(mask, score);
  }

  FunctionRef<void(Index sequence, Use)> of;         // the mask of its cache included
  FunctionRef<void(const Stacked&, Use)> of_prefix;  // for the queries of several sequences: layer/shared_prefix.hpp
};

/// The batch in a layer: rows row_offsets[s] … of q and context belong to caches[s], which already holds their keys.
template <class T, class C>
struct Batch {
  View<T> context;  // [n, heads·v_head_dim]
  View<T> q;        // [n, heads·head_dim]
  std::span<const Index> row_offsets;
  std::span<C* const> caches;
  Heads heads;
  Options<T> options;             // scale, sinks, kernel, arithmetic
  const Rope<T>* rope = nullptr;  // of the layer: for rings that count positions in the cache

  Index size() const { return static_cast<Index>(caches.size()); }
  const C& cache(Index s) const { return *caches[static_cast<std::size_t>(s)]; }
  Index first(Index s) const { return row_offsets[static_cast<std::size_t>(s)]; }
  Index n(Index s) const { return first(s + 1) - first(s); }
  Index first_position(Index s) const { return cache(s).position() - n(s); }
};

/// Rows [row, …) of a cache; `row` begins a run.
template <StorageType S>
KeyRows<S> rows_from(KeyRows<S> keys, Index row) {
  while (!keys.runs.empty() && row > 0) {
    const Index count = keys.runs.front().rows;
    keys.runs = keys.runs.subspan(1);
    keys.rows -= count, keys.first_row += count, row -= count;
  }
  return keys;
}
template <StorageType S>
KeyRows<S> rows_before(KeyRows<S> keys, Index row) {
  std::size_t runs = 0;
  Index rows = 0;
  while (runs < keys.runs.size() && rows < row) rows += keys.runs[runs++].rows;
  keys.runs = keys.runs.first(runs);
  keys.rows = rows;
  return keys;
}

}}}  // namespace qkv::QKV_ABI::detail

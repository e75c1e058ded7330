// detail/batch.hpp — several sequences at once, each against its own cache, as one pool of work items.
//
// An item is one kv head of one sequence; the longest go first, so that no thread is left with one at the end. A sequence
// that is much of the whole work is cut finer, by its own kernel. None of this changes a bit: an item computes what the
// sequence alone would.
//
// Shared prefixes (opt-in): sequences of the batch whose page tables begin with the same pages attend to those together.
// All their queries, and all heads of a group, are the queries of one call, so a prefix row is read once for all of them;
// each sequence then merges its own rows. The same sums in another bracketing: equal within rounding, not in bits.
// Juravsky et al. 2024, arXiv:2402.05099.
#pragma once

#include <algorithm>
#include <span>

#include "launch.hpp"
#include "layer.hpp"

namespace qkv::inline QKV_ABI::detail {

/// The batch as the layer has it: rows row_offsets[s] … of q and context belong to caches[s], which holds them already.
template <class T, class C>
struct Batch {
  View<T> context;  // [n, heads·v_head_dim]
  View<T> q;        // [n, heads·head_dim]
  std::span<const Index> row_offsets;
  std::span<C* const> caches;
  Heads heads;
  Options<T> options;  // scale, sinks, kernel, arithmetic

  Index size() const { return static_cast<Index>(caches.size()); }
  const C& cache(Index s) const { return *caches[static_cast<std::size_t>(s)]; }
  Index first(Index s) const { return row_offsets[static_cast<std::size_t>(s)]; }
  Index n(Index s) const { return first(s + 1) - first(s); }
  Index first_position(Index s) const { return cache(s).position() - n(s); }
};

/// Rows [row, …) of what a cache holds, for a row that begins a run.
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

// ---- shared prefixes ----

/// Rows of whole pages with which both sequences begin.
template <class C>
Index shared_rows(const C& a, const C& b) {
  if constexpr (PooledCache<C>) {
    if (a.pool() == nullptr || a.pool() != b.pool()) return 0;
    const auto x = a.pages(), y = b.pages();
    const auto most = static_cast<std::size_t>(std::min(a.rows(), b.rows()) / a.page_tokens());
    std::size_t pages = 0;
    while (pages < most && x[pages] == y[pages]) ++pages;
    return static_cast<Index>(pages) * a.page_tokens();
  } else {
    return 0;
  }
}

/// Sequences [first, last) of the batch, and the rows that all of them (those with queries) begin with.
struct SharedPrefix {
  Index first = 0, last = 0, rows = 0;
};

/// From sequence `first` on: takes in neighbours as long as that saves more rows of reading.
template <class T, class C>
SharedPrefix shared_prefix(const Batch<T, C>& batch, Index first) {
  SharedPrefix group{first, first + 1, 0};
  if (batch.n(first) == 0) return group;
  for (Index members = 1, s = first + 1; s < batch.size(); ++s) {
    if (batch.n(s) == 0) continue;
    const Index rows = shared_rows(batch.cache(first), batch.cache(s));
    const Index shorter = members == 1 ? rows : std::min(rows, group.rows);
    if (shorter == 0 || members * shorter < (members - 1) * group.rows) break;
    group.rows = shorter, group.last = s + 1, ++members;
  }
  return group;
}

/// Query row i of the common call is query row i / group_size of these sequences, head i % group_size of the kv group.
struct Stacked {
  std::span<const Index> row_offsets;  // of the group's sequences, from the batch's rows
  const Index* first_position;         // of each
  Index group_size;

  std::size_t sequence(Index row) const {
    const auto after = std::upper_bound(row_offsets.begin(), row_offsets.end(), row + row_offsets.front());
    return static_cast<std::size_t>(after - row_offsets.begin()) - 1;
  }
  At at(At at) const {
    const Index row = at.query / group_size;
    const std::size_t s = sequence(row);
    at.head = at.head * group_size + at.query % group_size;
    at.query = row + row_offsets.front() - row_offsets[s];
    at.query_position = first_position[s] + at.query;
    return at;
  }
};

template <class M>
struct StackedMask {
  const M& mask;
  const Stacked& stacked;

  bool sees(const At& at) const { return mask.sees(stacked.at(at)); }
  Cover cover(const Block& block) const {
    Cover least = Cover::all, most = Cover::none;
    const Index group = stacked.group_size, end = (block.query + block.n_queries - 1) / group + 1;
    for (Index row = block.query / group; row < end;) {
      const std::size_t s = stacked.sequence(row);
      const Index next = std::min(end, stacked.row_offsets[s + 1] - stacked.row_offsets.front());
      for (Index g = 0; g < group; ++g) {
        Block part = block;
        part.head = block.head * group + g;
        part.query = row + stacked.row_offsets.front() - stacked.row_offsets[s];
        part.n_queries = next - row;
        part.query_position = stacked.first_position[s] + part.query;
        const Cover c = detail::cover(mask, part);
        least = std::min(least, c), most = std::max(most, c);
      }
      row = next;
    }
    return least == most ? least : Cover::some;
  }
};

template <class F>
struct StackedScore {
  const F& score;
  const Stacked& stacked;
  template <class T>
  T operator()(T s, const At& at) const {
    return score(s, stacked.at(at));
  }
};
/// A score that does not ask where it is needs no disguise, and keeps its vectors.
inline Plain stacked_score(const Plain& score, const Stacked&) { return score; }
inline SoftCap stacked_score(const SoftCap& score, const Stacked&) { return score; }
template <class F>
StackedScore<F> stacked_score(const F& score, const Stacked& stacked) {
  return {score, stacked};
}

/// The states of all queries of a group over its prefix.
template <class T>
class PrefixStates {
 public:
  template <class C, class M, class F, class E>
  PrefixStates(const Batch<T, C>& batch, const SharedPrefix& group, const M& mask, const F& score, Workspace& workspace,
               const E& executor)
      : first_row_(batch.first(group.first)),
        group_(batch.heads.group_size()),
        state_{nullptr, nullptr, View<T>(nullptr, 0, 0, Eigen::OuterStride<>(0)), batch.heads.kv_heads},
        lease_(workspace.lease(carve(batch, group, nullptr))) {
    carve(batch, group, lease_.data());
    const auto keys = rows_before(batch.cache(group.first).key_rows(), group.rows);
    const Index d = keys.head_dim, kv_heads = batch.heads.kv_heads, n = q_.rows();
    for (Index s = group.first; s < group.last; ++s) positions_[s - group.first] = batch.first_position(s);
    for (Index i = 0; i < n; ++i)
      for (Index h = 0; h < kv_heads; ++h)
        std::copy_n(&batch.q.coeffRef(first_row_ + i / group_, (h * group_ + i % group_) * d), d,
                    &q_.coeffRef(i, h * d));
    const Stacked stacked{batch.row_offsets.subspan(static_cast<std::size_t>(group.first),
                                                    static_cast<std::size_t>(group.last - group.first) + 1),
                          positions_, group_};
    const StackedMask<M> stacked_mask{mask, stacked};
    const auto f = stacked_score(score, stacked);
    // Positions are the mask's business; 0 keeps the kernel's own away from overflow.
    Options<T> options = batch.options;
    options.first_position = 0;
    const auto task = make_task(ConstView<T>(q_.data(), n, q_.cols(), Eigen::OuterStride<>(q_.outerStride())), keys,
                                {kv_heads, kv_heads}, stacked_mask, f, options, 0);
    launch(choose_kernel<T>(options.kernel, n, decode_max_stacked_queries), task, state_, workspace, executor,
           [](Index, Index, Index, Index) {});
  }

  /// Copies the states of query rows [row, row + to's rows) of the batch and some heads: what their own rows merge into.
  void copy_to(const kernel::StateView<T>& to, Index row, Index n, Index first_head, Index v_head_dim) const {
    for (Index i = 0; i < n; ++i)
      for (Index h = 0; h < to.heads; ++h) {
        const Index from = (row - first_row_ + i) * group_ + (first_head + h) % group_,
                    kv_head = (first_head + h) / group_;
        to.m(i, h) = state_.m(from, kv_head);
        to.l(i, h) = state_.l(from, kv_head);
        std::copy_n(state_.o(from, kv_head, v_head_dim), v_head_dim, to.o(i, h, v_head_dim));
      }
  }

 private:
  template <class C>
  std::size_t carve(const Batch<T, C>& batch, const SharedPrefix& group, std::byte* base) {
    const auto& cache = batch.cache(group.first);
    const Index n = (batch.first(group.last) - first_row_) * group_, kv_heads = batch.heads.kv_heads;
    Carver carver(base);
    carve_matrix(carver, q_, n, kv_heads * cache.head_dim());
    carve_matrix(carver, state_.weighted, n, kv_heads * cache.v_head_dim());
    state_.maximum = carver.take<T>(n * kv_heads);
    state_.sum = carver.take<T>(n * kv_heads);
    positions_ = carver.take<Index>(group.last - group.first);
    return carver.used();
  }

  Index first_row_, group_;
  View<T> q_{nullptr, 0, 0, Eigen::OuterStride<>(0)};  // [rows·group, kv_heads·head_dim]
  kernel::StateView<T> state_;                         // heads: kv_heads
  Index* positions_ = nullptr;
  Workspace::Lease lease_;
};

// ---- the batch ----

/// Rows [own, …) of a cache for query heads [first_head, first_head + heads.heads) of sequence s, on top of `prefix`.
template <class T, class C, class M, class F, class E>
void attend_heads(const Batch<T, C>& batch, Index s, Index own, const PrefixStates<T>* prefix, Heads heads,
                  Index first_head, const M& mask, const F& score, const E& executor) {
  const Index n = batch.n(s), group = heads.group_size();
  auto keys = rows_from(batch.cache(s).key_rows(), own);
  const Index d = keys.head_dim, dv = keys.v_head_dim;
  keys.kv_heads = heads.kv_heads;
  keys.first_kv_head = first_head / group;
  const auto columns = [&](const View<T>& x, Index width) {
    return View<T>(const_cast<T*>(x.data()) + batch.first(s) * x.outerStride() + first_head * width, n,
                   heads.heads * width, Eigen::OuterStride<>(x.outerStride()));
  };
  Options<T> options = batch.options;
  options.first_position = batch.first_position(s);
  if (!options.sinks.empty())
    options.sinks = options.sinks.subspan(static_cast<std::size_t>(first_head), static_cast<std::size_t>(heads.heads));
  auto task = make_task(view(columns(batch.q, d)), keys, heads, mask, score, options, 0);
  task.first_head = first_head;

  Workspace& workspace = batch.caches[static_cast<std::size_t>(s)]->workspace();
  const auto memory = workspace.lease(static_cast<std::size_t>(2 * n * heads.heads) * sizeof(T));
  T* maximum = reinterpret_cast<T*>(memory.data());
  const kernel::StateView<T> state{maximum, maximum + n * heads.heads, columns(batch.context, dv), heads.heads};
  if (prefix != nullptr) prefix->copy_to(state, batch.first(s), n, first_head, dv);
  launch(
      choose_kernel<T>(options.kernel, n), task, state, workspace, executor,
      [&](Index query, Index n_queries, Index head, Index n_heads) {
        finish_rows(state, query, n_queries, head, n_heads, dv, options, 0);
      },
      prefix != nullptr ? Start::merge : Start::empty);
}

/// Sequences [first, last) with queries, which have `own` rows and more each; those before are in `prefix`.
template <class T, class C, class M, class F, class E>
void attend_sequences(const Batch<T, C>& batch, Index first, Index last, Index own, const PrefixStates<T>* prefix,
                      const M& mask, const F& score, Workspace& workspace, const E& executor) {
  const auto attend_to = [&](Index s, Heads heads, Index first_head, const auto& how) {
    const auto seen = visible(batch.cache(s)) & mask;
    attend_heads(batch, s, own, prefix, heads, first_head, seen, score, how);
  };
  if constexpr (std::is_same_v<E, Serial>) {
    for (Index s = first; s < last; ++s)
      if (batch.n(s) > 0) attend_to(s, batch.heads, 0, executor);
  } else {
    // Pairs of query and key are the cost. What is more than 1/32 of it in one item has more items of its own.
    constexpr double finest = 32;
    const auto cost = [&](Index s) {
      return static_cast<double>(batch.cache(s).rows() - own) * static_cast<double>(batch.n(s));
    };
    double all = 0;
    for (Index s = first; s < last; ++s) all += cost(s);
    const auto memory = workspace.lease(static_cast<std::size_t>(last - first) * sizeof(Index));
    Index* const order = reinterpret_cast<Index*>(memory.data());
    Index count = 0;
    const Index kv_heads = batch.heads.kv_heads, group = batch.heads.group_size();
    for (Index s = first; s < last; ++s) {
      if (batch.n(s) == 0) continue;
      if (cost(s) * finest > all * static_cast<double>(kv_heads))
        attend_to(s, batch.heads, 0, executor);
      else
        order[count++] = s;
    }
    std::sort(order, order + count, [&](Index a, Index b) { return cost(a) != cost(b) ? cost(a) > cost(b) : a < b; });
    executor(count * kv_heads, [&](Index item) {
      attend_to(order[item / kv_heads], {group, 1}, item % kv_heads * group, serial);
    });
  }
}

/// batch.context ← the attention of every sequence over what its cache holds.
template <class T, class C, class M, class F, class E>
void attend_batch(const Batch<T, C>& batch, bool share_prefixes, const M& mask, const F& score, Workspace& workspace,
                  const E& executor) {
  check_functions<M, F, T>();
  if constexpr (PooledCache<C>)
    if (share_prefixes) {
      for (Index s = 0; s < batch.size();) {
        SharedPrefix group = shared_prefix(batch, s);
        if (group.rows == 0) {  // on to the next that shares anything
          while (group.last < batch.size() && shared_prefix(batch, group.last).rows == 0) ++group.last;
          attend_sequences<T>(batch, s, group.last, 0, nullptr, mask, score, workspace, executor);
        } else {
          const PrefixStates<T> states(batch, group, mask, score, workspace, executor);
          attend_sequences<T>(batch, s, group.last, group.rows, &states, mask, score, workspace, executor);
        }
        s = group.last;
      }
      return;
    }
  attend_sequences<T>(batch, 0, batch.size(), 0, nullptr, mask, score, workspace, executor);
}

}  // namespace qkv::inline QKV_ABI::detail

// layer/shared_prefix.hpp — attention over the common prefix of several sequences of a batch, once for all of them.
//
// Opt-in: sequences whose page tables begin with the same pages attend to those together. All their queries, and all
// heads of a group, become the queries of one call, so a prefix row is read once for all of them; each sequence then
// merges its own rows. The same sums in another order: equal within rounding, not in bits. Juravsky et al. 2024,
// arXiv:2402.05099.
//
// Before: layer/batch.hpp   Next: layer/ring_positions.hpp
#pragma once

#include <algorithm>
#include <span>

#include "batch_rows.hpp"
#include "common.hpp"

namespace qkv { inline namespace QKV_ABI { namespace detail {

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

/// From sequence `first` on: the next ones join while that reduces the rows to read.
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
  const Index* first_position;         // of each of them
  Index group_size;
  Index first, count;  // the first of them in the batch, and how many the batch has

  std::size_t sequence(Index row) const {
    const auto after = std::upper_bound(row_offsets.begin(), row_offsets.end(), row + row_offsets.front());
    return static_cast<std::size_t>(after - row_offsets.begin()) - 1;
  }
  /// The mask or score of sequence s of the group; of the sequence of a query.
  template <class M>
  decltype(auto) of(const M& mask, std::size_t s) const {
    return of_sequence(mask, first + static_cast<Index>(s), count);
  }
  template <class M>
  decltype(auto) of_its_sequence(const M& mask, const At& at) const {
    return of(mask, OfSequence<M>::differs ? sequence(at.query / group_size) : 0);
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

  bool sees(const At& at) const { return stacked.of_its_sequence(mask, at).sees(stacked.at(at)); }
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
        const Cover c = detail::cover(stacked.of(mask, s), part);
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
    return stacked.of_its_sequence(score, at)(s, stacked.at(at));
  }
};
/// A score that does not depend on the pair stays as it is, and is computed on registers.
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
  template <class C>
  PrefixStates(const Batch<T, C>& batch, const SharedPrefix& group, const Rules<T, typename C::Storage>& rules,
               Workspace& workspace, const AnyExecutor& executor)
      : first_row_(batch.first(group.first)),
        group_(batch.heads.group_size()),
        state_{nullptr, nullptr, no_view<T>(), batch.heads.kv_heads},
        scratch_(workspace, [&](Carver& carver) { lay_out(carver, batch, group); }) {
    const auto keys = rows_before(batch.cache(group.first).key_rows(), group.rows);
    const Index d = keys.head_dim, kv_heads = batch.heads.kv_heads, n = q_.rows();
    for (Index s = group.first; s < group.last; ++s) positions_[s - group.first] = batch.first_position(s);
    for (Index i = 0; i < n; ++i)
      for (Index h = 0; h < kv_heads; ++h)
        std::copy_n(&batch.q.coeffRef(first_row_ + i / group_, (h * group_ + i % group_) * d), d,
                    &q_.coeffRef(i, h * d));
    const Stacked stacked{batch.row_offsets.subspan(static_cast<std::size_t>(group.first),
                                                    static_cast<std::size_t>(group.last - group.first) + 1),
                          positions_, group_, group.first, batch.size()};
    // Only the mask uses positions; 0 keeps those of the kernel from overflowing.
    Options<T> options = batch.options;
    options.first_position = 0;
    rules.of_prefix(stacked, [&](const Rule<T, typename C::Storage>& rule) {
      const auto task = make_task(view(q_), keys, {kv_heads, kv_heads}, rule, options, 0);
      launch(choose_kernel<T>(options.kernel, n, decode_max_stacked_queries), task, rule, state_, workspace, executor,
             nothing_more);
    });
  }

  /// Copies the prefix states of query rows [row, row + n) of the batch, heads first_head …, to `to`: the states into
  /// which the sequence's own rows merge.
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
  void lay_out(Carver& carver, const Batch<T, C>& batch, const SharedPrefix& group) {
    const auto& cache = batch.cache(group.first);
    const Index n = (batch.first(group.last) - first_row_) * group_, kv_heads = batch.heads.kv_heads;
    carve_matrix(carver, q_, n, kv_heads * cache.head_dim());
    carve_matrix(carver, state_.weighted, n, kv_heads * cache.v_head_dim());
    state_.maximum = carver.take<T>(n * kv_heads);
    state_.sum = carver.take<T>(n * kv_heads);
    positions_ = carver.take<Index>(group.last - group.first);
  }

  Index first_row_, group_;
  View<T> q_ = no_view<T>();    // [rows·group, kv_heads·head_dim]
  kernel::StateView<T> state_;  // heads: kv_heads
  Index* positions_ = nullptr;
  Scratch scratch_;
};

}}}  // namespace qkv::QKV_ABI::detail

// layer/batch.hpp — several sequences at once, each against its own cache, as one pool of work items.
//
// An item is one kv head of one sequence; the longest go first, so that threads finish together. A sequence that is
// much of the whole work is divided further, by its own kernel. None of this changes a bit: an item computes what the
// sequence alone would. A common prefix of sequences may be attended to once: layer/shared_prefix.hpp.
//
// Before: layer/batch_rows.hpp   Next: layer/shared_prefix.hpp
#pragma once

#include <algorithm>

#include "batch_rows.hpp"
#include "ring_positions.hpp"
#include "shared_prefix.hpp"

namespace qkv { inline namespace QKV_ABI { namespace detail {

/// Rows [own, …) of a cache for query heads [first_head, first_head + heads.heads) of sequence s, on top of `prefix`.
template <class T, class C>
void attend_heads(const Batch<T, C>& batch, Index s, Index own, const PrefixStates<T>* prefix, Heads heads,
                  Index first_head, const Rule<T, typename C::Storage>& rule, const AnyExecutor& executor) {
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
  auto task = make_task(view(columns(batch.q, d)), keys, heads, rule, options, 0);
  task.first_head = first_head;

  Workspace& workspace = batch.caches[static_cast<std::size_t>(s)]->workspace();
  const auto memory = workspace.lease(static_cast<std::size_t>(2 * n * heads.heads) * sizeof(T));
  T* maximum = reinterpret_cast<T*>(memory.data());
  const kernel::StateView<T> state{maximum, maximum + n * heads.heads, columns(batch.context, dv), heads.heads};
  if (prefix != nullptr) prefix->copy_to(state, batch.first(s), n, first_head, dv);
  launch(
      choose_kernel<T>(options.kernel, n), task, rule, state, workspace, executor,
      [&](Index query, Index n_queries, Index head, Index n_heads) {
        finish_rows(state, query, n_queries, head, n_heads, dv, options, 0);
      },
      prefix != nullptr ? Start::merge : Start::empty);
}

/// Sequences [first, last), those with queries: their rows from `own` on; the rows before are in `prefix`.
template <class T, class C>
void attend_sequences(const Batch<T, C>& batch, Index first, Index last, Index own, const PrefixStates<T>* prefix,
                      const Rules<T, typename C::Storage>& rules, Workspace& workspace, const AnyExecutor& executor) {
  const auto attend_to = [&](Index s, Heads heads, Index first_head, const AnyExecutor& how) {
    rules.of(s, [&](const Rule<T, typename C::Storage>& rule) {
      attend_heads(batch, s, own, prefix, heads, first_head, rule, how);
    });
  };
  const auto attend_to_all_heads = [&](Index s) {
    if constexpr (CanCountInCache<C>)
      if (batch.rope != nullptr && counts_in_cache(batch.cache(s)))
        return rules.of(s,
                        [&](const Rule<T, typename C::Storage>& rule) { attend_in_cache(batch, s, rule, executor); });
    attend_to(s, batch.heads, 0, executor);
  };
  if (executor.serial()) {
    for (Index s = first; s < last; ++s)
      if (batch.n(s) > 0) attend_to_all_heads(s);
  } else {
    // The cost of a sequence is its pairs of query and key. Where an item has over 1/32 of all cost, it is divided.
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
      if (cost(s) * finest > all * static_cast<double>(kv_heads) || counts_in_cache(batch.cache(s)))
        attend_to_all_heads(s);
      else
        order[count++] = s;
    }
    std::sort(order, order + count, [&](Index a, Index b) { return cost(a) != cost(b) ? cost(a) > cost(b) : a < b; });
    executor(count * kv_heads, [&](Index item) {
      attend_to(order[item / kv_heads], {group, 1}, item % kv_heads * group, serial);
    });
  }
}

/// batch.context ← the attention of every sequence over the rows in its cache.
template <class T, class C>
void attend_batch(const Batch<T, C>& batch, bool share_prefixes, const Rules<T, typename C::Storage>& rules,
                  const AnyExecutor& executor) {
  Workspace& workspace = batch.caches[0]->workspace();
  if constexpr (!owns_rows<C>)
    for (Index s = 0; s < batch.size(); ++s) {
      const auto keys = batch.cache(s).key_rows();
      check_runs(keys.runs, keys.rows);
    }
  if constexpr (PooledCache<C>)
    if (share_prefixes) {
      for (Index s = 0; s < batch.size();) {
        SharedPrefix group = shared_prefix(batch, s);
        if (group.rows == 0) {  // up to the next shared prefix
          while (group.last < batch.size() && shared_prefix(batch, group.last).rows == 0) ++group.last;
          attend_sequences<T>(batch, s, group.last, 0, nullptr, rules, workspace, executor);
        } else {
          const PrefixStates<T> states(batch, group, rules, workspace, executor);
          attend_sequences<T>(batch, s, group.last, group.rows, &states, rules, workspace, executor);
        }
        s = group.last;
      }
      return;
    }
  attend_sequences<T>(batch, 0, batch.size(), 0, nullptr, rules, workspace, executor);
}

}}}  // namespace qkv::QKV_ABI::detail

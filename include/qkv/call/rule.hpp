// call/rule.hpp — the mask and the score of a call as one plain value: its checks, its PairRule, its reference kernel.
//
// Everything behind attention() is compiled once for all masks and scores; only what is defined here is compiled for
// each.
//
// Before: workspace.hpp   Next: call/pair_rule_of.hpp
#pragma once

#include "../kernel/reference.hpp"
#include "../parallel.hpp"
#include "pair_rule_of.hpp"

namespace qkv { inline namespace QKV_ABI { namespace detail {

/// Called when parts of a result are complete: (query, n_queries, head, n_heads).
using Done = FunctionRef<void(Index, Index, Index, Index)>;
inline constexpr auto nothing_more = [](Index, Index, Index, Index) {};

/// Whether a launch begins with the state of no keys, or merges into what is there.
enum class Start { empty, merge };

/// The reference kernel, compiled for the types of mask and score.
template <class T, StorageType S, class M, class F>
void launch_reference(const kernel::Task<T, S>& task, const M& mask, const F& score, const kernel::StateView<T>& state,
                      Workspace& workspace, const AnyExecutor& executor, Done done, Start start) {
  const Index n = task.n_queries(), dv = task.v_head_dim;
  executor(task.heads.heads, [&](Index head) {
    const auto memory = workspace.lease(kernel::ReferenceScratch<T>::bytes(task.keys.rows, dv));
    Carver carver(memory.data());
    const kernel::ReferenceScratch<T> scratch(carver, task.keys.rows, dv);
    if (start == Start::empty) state.clear(0, n, head, 1, dv);
    for (Index i = 0; i < n; ++i) {
      // A finished output is a state too: maximum = log-sum-exp, sum = 1.
      const T lse =
          kernel::reference(task, mask, score, head, i, minus_infinity<T>, scratch.row, scratch.seen, scratch.out);
      const T sum = lse == minus_infinity<T> ? T(0) : T(1);
      merge_row(state.m(i, head), state.l(i, head), state.o(i, head, dv), lse, sum, scratch.out, dv);
    }
    done(0, n, head, 1);
  });
}

/// A mask and a score, which outlive it. S: storage of the keys.
template <class T, StorageType S>
struct Rule {
  using Pairs = kernel::PairRule<T>;

  Pairs pairs;
  void (*check_with)(const Pairs&, const CallShape&);
  Index (*valid_keys_of)(const Pairs&, Index sequence, Index n_keys);
  void (*reference)(const Pairs&, const kernel::Task<T, S>&, const kernel::StateView<T>&, Workspace&,
                    const AnyExecutor&, Done, Start);

  /// Raises where mask or score do not fit a call.
  void check(const CallShape& call) const { check_with(pairs, call); }
  Index valid_keys(Index sequence, Index n_keys) const { return valid_keys_of(pairs, sequence, n_keys); }
};

template <class T, StorageType S, class M, class F>
Rule<T, S> rule_of(const M& mask, const F& score) {
  using Pairs = kernel::PairRule<T>;
  return {pair_rule<T>(mask, score),
          [](const Pairs& p, const CallShape& call) {
            check_operand(kernel::object_at<M>(p.mask), call);
            check_operand(kernel::object_at<F>(p.score), call);
          },
          [](const Pairs& p, Index sequence, Index n_keys) {
            return valid_keys(kernel::object_at<M>(p.mask), sequence, n_keys);
          },
          [](const Pairs& p, const kernel::Task<T, S>& task, const kernel::StateView<T>& state, Workspace& workspace,
             const AnyExecutor& executor, Done done, Start start) {
            launch_reference(task, kernel::object_at<M>(p.mask), kernel::object_at<F>(p.score), state, workspace,
                             executor, done, start);
          }};
}

/// The same, with S deduced from the keys.
template <class T, StorageType S, class M, class F>
Rule<T, S> rule_for(const KeyRows<S>&, const M& mask, const F& score) {
  return rule_of<T, S>(mask, score);
}

}}}  // namespace qkv::QKV_ABI::detail

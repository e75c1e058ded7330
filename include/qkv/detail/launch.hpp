// detail/launch.hpp — runs the kernel that serves a task, item by item, and finishes what each item has computed.
#pragma once

#include "../kernel/decode.hpp"
#include "../kernel/reference.hpp"
#include "../kernel/tiled.hpp"
#include "../parallel.hpp"
#include "call.hpp"

namespace qkv::inline QKV_ABI::detail {

/// Whether a launch begins with the state of no keys, or merges into what is there (tiled and decode only).
enum class Start { empty, merge };

/// Leaves the softmax state; `done(query, n_queries, head, n_heads)` is called by the item that computed its part.
template <class T, StorageType S, class M, class F, class E, class Done>
void launch(Kernel kernel, const kernel::Task<T, S, M, F>& task, const kernel::StateView<T>& state,
            Workspace& workspace, const E& executor, const Done& done, Start start = Start::empty) {
  const Heads heads = task.heads;
  const Index n = task.n_queries(), group = heads.group_size();
  if (n == 0) return;
  if (kernel == Kernel::tiled) {
    executor(kernel::tiled_items(n, heads.kv_heads), [&](Index item) {
      const auto scratch = workspace.lease(kernel::TiledScratch<T>::bytes(task.head_dim(), task.v_head_dim()));
      const Index query = item / heads.kv_heads * kernel::tile_queries,
                  count = std::min(kernel::tile_queries, n - query);
      const Index head = item % heads.kv_heads * group;
      if (start == Start::empty) state.clear(query, count, head, group, task.v_head_dim());
      kernel::Tiled(task, state, item, scratch.data()).run();
      done(query, count, head, group);
    });
  } else if (kernel == Kernel::decode) {
    executor(heads.kv_heads, [&](Index kv_head) {
      const auto scratch =
          workspace.lease(kernel::decode_scratch_bytes<T>(n, group, task.head_dim(), task.v_head_dim()));
      if (start == Start::empty) state.clear(0, n, kv_head * group, group, task.v_head_dim());
      kernel::Decode(task, state, kv_head, scratch.data()).run();
      done(Index(0), n, kv_head * group, group);
    });
  } else {
    const Index dv = task.v_head_dim();
    executor(heads.heads, [&](Index head) {
      Carver sizes(nullptr);
      sizes.take<T>(task.keys.rows), sizes.take<bool>(task.keys.rows), sizes.take<T>(dv);
      const auto scratch = workspace.lease(sizes.used());
      Carver carver(scratch.data());
      T* row = carver.take<T>(task.keys.rows);
      bool* seen = carver.take<bool>(task.keys.rows);
      T* out = carver.take<T>(dv);
      if (start == Start::empty) state.clear(0, n, head, 1, dv);
      for (Index i = 0; i < n; ++i) {
        // A finished output is a state too: maximum = log-sum-exp, sum = 1.
        const T lse = kernel::reference(task, head, i, minus_infinity<T>, row, seen, out);
        const T sum = lse == minus_infinity<T> ? T(0) : T(1);
        merge_row(state.m(i, head), state.l(i, head), state.o(i, head, dv), lse, sum, out, dv);
      }
      done(Index(0), n, head, Index(1));
    });
  }
}

/// Divides by the sums: the last step of every item. The sinks join here; first_row is that of the log-sum-exp.
template <class T>
void finish_rows(const kernel::StateView<T>& state, Index query, Index n_queries, Index head, Index n_heads,
                 Index v_head_dim, const Options<T>& options, Index first_row) {
  for (Index i = query; i < query + n_queries; ++i)
    for (Index h = head; h < head + n_heads; ++h) {
      const T sink = options.sinks.empty() ? minus_infinity<T> : options.sinks[static_cast<std::size_t>(h)];
      const auto end = finish(state.m(i, h), state.l(i, h), sink);
      T* o = state.o(i, h, v_head_dim);
      if (state.m(i, h) != minus_infinity<T>)
        for (Index x = 0; x < v_head_dim; ++x) o[x] *= end.factor;
      if (options.log_sum_exp) (*options.log_sum_exp)(first_row + i, h) = end.log_sum_exp;
    }
}

/// The output of one sequence: its rows of out and of the log-sum-exp.
template <class T, StorageType S, class M, class F, class E>
void attend(const kernel::Task<T, S, M, F>& task, const View<T>& out, Index first_row, const Options<T>& options,
            Workspace& workspace, const E& executor) {
  const Index n = task.n_queries(), heads = task.heads.heads, dv = task.v_head_dim();
  if (n == 0) return;
  const auto memory = workspace.lease(static_cast<std::size_t>(2 * n * heads) * sizeof(T));
  T* maximum = reinterpret_cast<T*>(memory.data());
  const kernel::StateView<T> state{maximum, maximum + n * heads, out, heads};
  launch(choose_kernel<T>(options.kernel, n), task, state, workspace, executor,
         [&](Index query, Index n_queries, Index head, Index n_heads) {
           finish_rows(state, query, n_queries, head, n_heads, dv, options, first_row);
         });
}

/// The task of one sequence.
template <class T, StorageType S, class M, class F>
kernel::Task<T, S, M, F> make_task(const ConstView<T>& q, const KeyRows<S>& keys, Heads heads, const M& mask,
                                   const F& score, const Options<T>& options, Index sequence) {
  return {q,        keys,
          heads,    scale_of(options, keys.head_dim),
          sequence, first_position(mask, keys, sequence, q.rows(), options),
          &mask,    &score};
}

}  // namespace qkv::inline QKV_ABI::detail

// call/dispatch.hpp — runs the kernel that serves a task, item by item, and finishes what each item has computed.
//
// Before: call/checks.hpp   Next: call/latent_forms.hpp
#pragma once

#include <algorithm>
#include <iterator>
#include <memory>
#include <span>

#include "../kernel/decode/decode.hpp"
#include "../kernel/tiled/pack_kv.hpp"
#include "../kernel/tiled/tiled.hpp"
#include "../parallel.hpp"
#include "checks.hpp"

namespace qkv { inline namespace QKV_ABI { namespace detail {

/// The tiled kernel: pack the keys of some kv heads, then attend to them, and so on.
template <class A>
void launch_tiled(const kernel::QueryTask<typename A::Scalar>& task, const kernel::BlockSource<A>& source,
                  Index first_row, const kernel::StateView<typename A::Scalar>& state, Workspace& workspace,
                  const AnyExecutor& executor, Done done, Start start) {
  using T = typename A::Scalar;
  using Panels = kernel::Panels<A>;
  const Index n = task.n_queries(), d = task.head_dim, dv = task.v_head_dim, group = task.heads.group_size();
  const Index n_blocks = kernel::count_cells(source.runs, kernel::tile_keys),
              query_blocks = (n + kernel::tile_queries - 1) / kernel::tile_queries;
  const std::size_t per_head = kernel::panel_bytes<A>(n_blocks, d, dv);
  // One thread packs each block when it first needs it; several meet once, when all blocks of some heads are packed.
  const Index at_once =
      executor.serial()
          ? 1
          : kernel::heads_at_once(kernel::panel_bytes<kernel::Exact<T>>(n_blocks, d, dv), task.heads.kv_heads);
  const auto memory = workspace.lease(per_head * static_cast<std::size_t>(at_once));
  for (Index first = 0; first < task.heads.kv_heads; first += at_once) {
    const Index count = std::min(at_once, task.heads.kv_heads - first);
    const auto panels_of = [&](Index kv_head) {
      Carver carver(memory.data() + per_head * static_cast<std::size_t>(kv_head - first));
      return Panels::carve(carver, n_blocks, d, dv);
    };
    for (Index kv_head = first; kv_head < first + count; ++kv_head)
      kernel::describe_blocks(panels_of(kv_head), source.runs, first_row);
    if (!executor.serial())
      executor(count * n_blocks, [&](Index item) {
        source.pack(panels_of(first + item / n_blocks), first + item / n_blocks, item % n_blocks);
      });
    executor(count * group * query_blocks, [&](Index item) {
      const Index head = first * group + item / query_blocks, query = item % query_blocks * kernel::tile_queries;
      const Index rows = std::min(kernel::tile_queries, n - query);
      const auto scratch = workspace.lease(kernel::TiledScratch<T>::bytes(d, dv));
      if (start == Start::empty) state.clear_sums(query, rows, head);  // then the kernel writes every row of weighted
      const Panels panels = panels_of(task.heads.kv_head(head));
      kernel::Tiled<A>(task, source, state, panels, n_blocks, head, query, scratch.data()).run(done);
    });
  }
}
/// The same for keys of storage S.
template <class A, class T, StorageType S>
void launch_tiled(const kernel::Task<T, S>& task, const kernel::StateView<T>& state, Workspace& workspace,
                  const AnyExecutor& executor, Done done, Start start) {
  const auto run_on = [&](kernel::RunShape* runs) {
    std::size_t n = 0;
    for (const auto& run : task.keys.runs) std::construct_at(runs + n++, kernel::RunShape{run.rows, run.position});
    launch_tiled(task, kernel::block_source<A>(task.keys, std::span<const kernel::RunShape>(runs, n)),
                 task.keys.first_row, state, workspace, executor, done, start);
  };
  kernel::RunShape few[8];  // contiguous caches and rings have no more
  if (task.keys.runs.size() <= std::size(few)) return run_on(few);
  const auto memory = workspace.lease(task.keys.runs.size() * sizeof(kernel::RunShape));
  run_on(reinterpret_cast<kernel::RunShape*>(memory.data()));
}

/// The decode kernel: an item is some kv heads, or one split of their keys where several threads may share them.
template <class D, class T, StorageType S>
void launch_decode(const kernel::Task<T, S>& task, const kernel::StateView<T>& state, Workspace& workspace,
                   const AnyExecutor& executor, Done done, Start start) {
  using Decode = kernel::Decode<D, T, S>;
  using State = kernel::DecodeState<T>;
  const Index n = task.n_queries(), kv_heads = task.heads.kv_heads, group = task.heads.group_size(),
              dv = task.v_head_dim;
  Index splits = 0, at_once = kernel::decode_heads_at_once<D>(task);
  if (!executor.serial()) splits = kernel::count_cells(task.keys.runs, kernel::decode_split);
  const bool parallel = splits > 1 || (splits == 1 && kernel::decode_in_parallel(task));
  if (parallel) at_once = std::clamp<Index>(splits * kv_heads / 16, 1, at_once);  // heads share an item past sixteen
  const auto heads_of = [&](Index item) { return std::min(at_once, kv_heads - item * at_once); };
  const auto scratch_bytes = [&](Index count) { return Decode::bytes(count, n * group, task.head_dim, dv); };
  const Index items = (kv_heads + at_once - 1) / at_once;
  const auto begin = [&](Index kv_head, Index count) {
    if (start == Start::empty) state.clear(0, n, kv_head * group, count * group, dv);
  };
  const auto all_keys = [&](Index item) {
    const Index first = item * at_once, count = heads_of(item);
    const auto scratch = workspace.lease(scratch_bytes(count));
    begin(first, count);
    Decode(task, first, count, scratch.data()).run(state);
    done(0, n, first * group, count * group);
  };
  if (splits <= 1) return kernel::decode_in_parallel(task) ? executor(items, all_keys) : serial(items, all_keys);

  const std::size_t state_bytes = State::bytes(n * group, dv);
  const auto states = static_cast<std::size_t>(splits * kv_heads);
  const auto memory =
      workspace.lease(states * state_bytes + static_cast<std::size_t>(splits) * sizeof(kernel::GridCell));
  auto* const split = reinterpret_cast<kernel::GridCell*>(memory.data() + states * state_bytes);
  Index count = 0;
  for (const kernel::GridCell& cell : kernel::GridCells(task.keys.runs, kernel::decode_split, task.keys.first_row))
    split[count++] = cell;
  const auto state_of = [&](Index kv_head, Index s) {
    Carver carver(memory.data() + static_cast<std::size_t>(kv_head * splits + s) * state_bytes);
    return State(carver, n * group, dv);
  };
  executor(splits * items, [&](Index i) {
    const Index item = i / splits, s = i % splits, heads = heads_of(item);
    const auto scratch = workspace.lease(scratch_bytes(heads));
    Decode(task, item * at_once, heads, scratch.data()).run_split(split[s], [&](Index kv_head) {
      return state_of(kv_head, s);
    });
  });
  executor(kv_heads, [&](Index kv_head) {
    begin(kv_head, 1);
    for (Index s = 0; s < splits; ++s) kernel::merge_split(task, kv_head, state_of(kv_head, s), state);
    done(0, n, kv_head * group, group);
  });
}

/// Leaves the softmax state, by the tiled or the decode kernel; `done` is called by the item that computed its part.
template <class T, StorageType S>
void launch_fast(Kernel kernel, const kernel::Task<T, S>& task, const kernel::StateView<T>& state, Workspace& workspace,
                 const AnyExecutor& executor, Done done, Start start) {
  if (kernel == Kernel::tiled) {
    using Narrow = kernel::NarrowArithmetic<T, S>;
    if constexpr (Narrow::int8_keys)
      if (task.arithmetic == Arithmetic::int8)
        return launch_tiled<kernel::Int8>(task, state, workspace, executor, done, start);
    if constexpr (!std::is_same_v<Narrow, kernel::Exact<T>>)
      if (task.arithmetic != Arithmetic::exact)
        return launch_tiled<Narrow>(task, state, workspace, executor, done, start);
    launch_tiled<kernel::Exact<T>>(task, state, workspace, executor, done, start);
  } else {
    kernel::with_decode_dot<T, S>(task.arithmetic, task.heads.group_size(), [&]<class D>(std::type_identity<D>) {
      launch_decode<D>(task, state, workspace, executor, done, start);
    });
  }
}

/// Leaves the softmax state of a task, whose rule is set here.
template <class T, StorageType S>
void launch(Kernel kernel, kernel::Task<T, S> task, const Rule<T, S>& rule, const kernel::StateView<T>& state,
            Workspace& workspace, const AnyExecutor& executor, Done done, Start start = Start::empty) {
  if (task.n_queries() == 0) return;
  task.rule = rule.pairs;
  if (kernel == Kernel::reference) return rule.reference(rule.pairs, task, state, workspace, executor, done, start);
  launch_fast(kernel, task, state, workspace, executor, done, start);
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
template <class T, StorageType S>
void attend(const kernel::Task<T, S>& task, const Rule<T, S>& rule, const View<T>& out, Index first_row,
            const Options<T>& options, Workspace& workspace, const AnyExecutor& executor) {
  const Index n = task.n_queries(), heads = task.heads.heads, dv = task.v_head_dim;
  if (n == 0) return;
  const auto memory = workspace.lease(static_cast<std::size_t>(2 * n * heads) * sizeof(T));
  T* maximum = reinterpret_cast<T*>(memory.data());
  const kernel::StateView<T> state{maximum, maximum + n * heads, out, heads};
  launch(choose_kernel<T>(options.kernel, n), task, rule, state, workspace, executor,
         [&](Index query, Index n_queries, Index head, Index n_heads) {
           finish_rows(state, query, n_queries, head, n_heads, dv, options, first_row);
         });
}

/// The task of one sequence, without its rule.
template <class T, StorageType S>
kernel::Task<T, S> make_task(const ConstView<T>& q, const KeyRows<S>& keys, Heads heads, const Rule<T, S>& rule,
                             const Options<T>& options, Index sequence) {
  kernel::Task<T, S> task(q, keys, heads, scale_of(options, keys.head_dim), sequence);
  task.first_position = first_position(rule, keys, sequence, q.rows(), options);
  task.arithmetic = options.arithmetic;
  return task;
}

}}}  // namespace qkv::QKV_ABI::detail

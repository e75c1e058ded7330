// call/dispatch.hpp — runs the kernel of a task, item by item, and finishes the output of each item.
//
// Before: call/checks.hpp   Next: call/latent_forms.hpp
#pragma once

#include <algorithm>
#include <iterator>
#include <memory>
#include <optional>
#include <span>

#include "../kernel/decode/decode.hpp"
#include "../kernel/tiled/pack_kv.hpp"
#include "../kernel/tiled/tiled.hpp"
#include "../parallel.hpp"
#include "checks.hpp"

namespace qkv { inline namespace QKV_ABI { namespace detail {

/// The tiled kernel: pack the keys of some kv heads, then attend to them, and so on.
template <class T>
void launch_tiled(const kernel::QueryTask<T>& task, const kernel::StepSource<T>& keys,
                  const kernel::StateView<T>& state, Workspace& workspace, const AnyExecutor& executor, Done done,
                  Start start) {
  const Index n = task.n_queries(), d = task.head_dim, dv = task.v_head_dim, group = task.heads.group_size();
  const Index n_blocks = kernel::count_cells(keys.rows.runs, kernel::tile_keys),
              query_blocks = (n + kernel::tile_queries - 1) / kernel::tile_queries;
  const std::size_t per_head = keys.bytes(n_blocks);
  // One thread packs each block when it first needs it; several wait for each other once all blocks of some heads are
  // packed.
  const Index at_once =
      executor.serial()
          ? 1
          : kernel::heads_at_once(kernel::packed_kv_bytes<kernel::Exact<T>>(n_blocks, d, dv), task.heads.kv_heads);
  const auto memory = workspace.lease(per_head * static_cast<std::size_t>(at_once));
  for (Index first = 0; first < task.heads.kv_heads; first += at_once) {
    const Index count = std::min(at_once, task.heads.kv_heads - first);
    const auto packed = [&](Index kv_head) {
      return memory.data() + per_head * static_cast<std::size_t>(kv_head - first);
    };
    const auto blocks = [&](Index kv_head) { return Carver(packed(kv_head)).take<kernel::KeyBlock>(n_blocks); };
    for (Index kv_head = first; kv_head < first + count; ++kv_head)
      kernel::describe_blocks(blocks(kv_head), keys.rows.runs, keys.rows.first_row);
    if (!executor.serial())
      executor(count * n_blocks, [&](Index item) {
        const Index kv_head = first + item / n_blocks;
        keys.pack(packed(kv_head), n_blocks, kv_head, item % n_blocks);
      });
    executor(count * group * query_blocks, [&](Index item) {
      const Index head = first * group + item / query_blocks, query = item % query_blocks * kernel::tile_queries;
      const Index rows = std::min(kernel::tile_queries, n - query), kv_head = task.heads.kv_head(head);
      const auto lease = workspace.lease(kernel::TiledScratch<T>::bytes(d, dv));
      Carver carver(lease.data());
      const kernel::TiledScratch<T> scratch(carver, d, dv);
      if (start == Start::empty) state.clear_sums(query, rows, head);  // then the kernel writes every row of weighted
      keys.with_step(packed(kv_head), n_blocks, head, scratch.s, scratch.hidden, [&](kernel::BlockStep<T>& step) {
        const std::span<const kernel::KeyBlock> of_head(blocks(kv_head), static_cast<std::size_t>(n_blocks));
        kernel::Tiled<T>(task, keys.rows, of_head, state, head, query, scratch, step).run(done);
      });
    });
  }
}

/// The decode kernel: an item is some kv heads, or one split of their keys where several threads may share them.
template <class T>
void launch_decode(const kernel::QueryTask<T>& task, const kernel::DecodeSource<T>& source,
                   const kernel::StateView<T>& state, Workspace& workspace, const AnyExecutor& executor, Done done,
                   Start start) {
  using Decode = kernel::Decode<T>;
  using State = kernel::DecodeState<T>;
  const kernel::ByteRows& rows = source.rows;
  const Index n = task.n_queries(), kv_heads = task.heads.kv_heads, group = task.heads.group_size(),
              dv = task.v_head_dim;
  const bool large = kernel::decode_in_parallel(task, rows.rows);
  Index splits = 0, at_once = kernel::decode_heads_at_once(rows.key.head_stride, kv_heads, source.head_bytes);
  if (!executor.serial()) splits = kernel::count_cells(rows.runs, kernel::decode_split);
  const bool parallel = splits > 1 || (splits == 1 && large);
  if (parallel) at_once = std::clamp<Index>(splits * kv_heads / 16, 1, at_once);  // enough items: heads share them
  const auto heads_of = [&](Index item) { return std::min(at_once, kv_heads - item * at_once); };
  const auto scratch_bytes = [&](Index count) { return Decode::bytes(count, source.head_bytes); };
  const Index items = (kv_heads + at_once - 1) / at_once;
  const auto begin = [&](Index kv_head, Index count) {
    if (start == Start::empty) state.clear(0, n, kv_head * group, count * group, dv);
  };
  const auto all_keys = [&](Index item) {
    const Index first = item * at_once, count = heads_of(item);
    const auto scratch = workspace.lease(scratch_bytes(count));
    begin(first, count);
    Decode(task, source, first, count, scratch.data()).run(state);
    done(0, n, first * group, count * group);
  };
  if (splits <= 1) return large ? executor(items, all_keys) : serial(items, all_keys);

  const std::size_t state_bytes = State::bytes(n * group, dv);
  const auto states = static_cast<std::size_t>(splits * kv_heads);
  const auto memory =
      workspace.lease(states * state_bytes + static_cast<std::size_t>(splits) * sizeof(kernel::GridCell));
  auto* const split = reinterpret_cast<kernel::GridCell*>(memory.data() + states * state_bytes);
  Index count = 0;
  for (const kernel::GridCell& cell : kernel::GridCells(rows.runs, kernel::decode_split, rows.first_row))
    split[count++] = cell;
  const auto state_of = [&](Index kv_head, Index s) {
    Carver carver(memory.data() + static_cast<std::size_t>(kv_head * splits + s) * state_bytes);
    return State(carver, n * group, dv);
  };
  executor(splits * items, [&](Index i) {
    const Index item = i / splits, s = i % splits, heads = heads_of(item);
    const auto scratch = workspace.lease(scratch_bytes(heads));
    Decode(task, source, item * at_once, heads, scratch.data()).run_split(split[s], [&](Index kv_head) {
      return state_of(kv_head, s);
    });
  });
  executor(kv_heads, [&](Index kv_head) {
    begin(kv_head, 1);
    for (Index s = 0; s < splits; ++s) kernel::merge_split(task, kv_head, state_of(kv_head, s), state);
    done(0, n, kv_head * group, group);
  });
}

/// Computes the softmax state, by the tiled or the decode kernel; `done` is called by the item that computed its part.
template <class T, StorageType S>
void launch_fast(Kernel kernel, const kernel::Task<T, S>& task, const kernel::StateView<T>& state, Workspace& workspace,
                 const AnyExecutor& executor, Done done, Start start) {
  kernel::with_byte_rows(task.keys, workspace, [&](const kernel::ByteRows& rows) {
    const auto tiled = [&]<class A>(A) {
      const kernel::StepSourceOf<A> keys(task, kernel::block_source<A>(task.keys, rows));
      launch_tiled(task, keys, state, workspace, executor, done, start);
    };
    const auto decode = [&](const kernel::DecodeSource<T>& source) {
      launch_decode(task, source, state, workspace, executor, done, start);
    };
    if (kernel == Kernel::tiled) {
      using Narrow = kernel::NarrowArithmetic<T, S>;
      if constexpr (Narrow::int8_keys)
        if (task.arithmetic == Arithmetic::int8) return tiled(kernel::Int8{});
      if constexpr (!std::is_same_v<Narrow, kernel::Exact<T>>)
        if (task.arithmetic != Arithmetic::exact) return tiled(Narrow{});
      tiled(kernel::Exact<T>{});
    } else {
      kernel::with_decode_dot<T, S>(task.arithmetic, task.heads.group_size(), [&]<class D>(std::type_identity<D>) {
        decode(kernel::decode_source<D>(task, rows));
      });
    }
  });
}

/// Computes the softmax state of a task, whose rule is set here.
template <class T, StorageType S>
void launch(Kernel kernel, kernel::Task<T, S> task, const Rule<T, S>& rule, const kernel::StateView<T>& state,
            Workspace& workspace, const AnyExecutor& executor, Done done, Start start = Start::empty) {
  if (task.n_queries() == 0) return;
  task.rule = rule.pairs;
  if (kernel == Kernel::reference) return rule.reference(rule.pairs, task, state, workspace, executor, done, start);
  launch_fast(kernel, task, state, workspace, executor, done, start);
}

/// Divides by the sums: the last step of every item. Sinks are included here; first_row is that of the log-sum-exp.
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

/// Raises where the outputs of a call share an element with an input.
template <class T, class X>
void check_disjoint(const View<T>& out, const Options<T>& options, const X& in, const char* name,
                    const char* name_log_sum_exp) {
  require_disjoint(out, in, name);
  if (options.log_sum_exp) require_disjoint(*options.log_sum_exp, in, name_log_sum_exp);
}

/// … with q, a sink, or each other.
template <class T>
void check_outputs(const View<T>& out, const Options<T>& options, const ConstView<T>& q) {
  check_sinks_unwritten(out, options);
  check_disjoint(out, options, q, "q", "q (log_sum_exp)");
  if (options.log_sum_exp) require_disjoint(*options.log_sum_exp, out, "out (log_sum_exp)");
}

struct KeySizes {
  Index rows, kv_heads, head_dim, v_head_dim;
};

/// Shapes of out and q beside the keys', the options, and that no output shares an element with q or another output.
template <class T>
EIGEN_DONT_INLINE void check_operands(const View<T>& out, const ConstView<T>& q, const KeySizes& keys, Heads heads,
                                      const Options<T>& options) {
  check_query(q.cols(), heads, keys.kv_heads, keys.head_dim);
  check_sizes(q.rows(), keys.rows, heads, keys.head_dim, keys.v_head_dim);
  check_out(out, q.rows(), checked_product(heads.heads, keys.v_head_dim));
  check_options(options, heads);
  check_outputs(out, options, q);
}

/// attention_into of matrices, for all masks, scores and executors. with_rule(s, n, use) calls use(rule of sequence s of n).
template <class T, StorageType S>
void attend_matrices(const View<T>& out, const ConstView<T>& q, const ConstView<S>& k, const ConstView<S>& v,
                     Heads heads, FunctionRef<void(Index, Index, FunctionRef<void(const Rule<T, S>&)>)> with_rule,
                     const Options<T>& options, const AnyExecutor& executor) {
  check_keys(k, v, heads);
  check_operands(out, q, {k.rows(), heads.kv_heads, k.cols() / heads.kv_heads, v.cols() / heads.kv_heads}, heads,
                 options);
  check_disjoint(out, options, k, "k", "k (log_sum_exp)");
  check_disjoint(out, options, v, "v", "v (log_sum_exp)");
  const Sequences sequences(options.query_offsets, options.key_offsets, q.rows(), k.rows());
  for (Index s = 0; s < sequences.count(); ++s) {
    const auto rows = sequences.at(s);
    const MatrixKeys<S> source(k, v, rows.key, rows.n_keys, heads.kv_heads, options.first_key_position);
    with_rule(s, sequences.count(), [&](const Rule<T, S>& rule) {
      check_call(rule, source.rows,
                 {.sequences = sequences.count(),
                  .heads = heads.heads,
                  .sequence = s,
                  .n_queries = rows.n_queries,
                  .first_position = first_position(rule, source.rows, s, rows.n_queries, options),
                  .output = footprint(out),
                  .log_sum_exp = log_sum_exp_footprint(options)});
    });
  }

  std::optional<Workspace> local;
  Workspace& workspace = options.workspace ? *options.workspace : local.emplace();
  if (options.log_sum_exp) options.log_sum_exp->resize(q.rows(), heads.heads);
  for (Index s = 0; s < sequences.count(); ++s) {
    const auto rows = sequences.at(s);
    const MatrixKeys<S> source(k, v, rows.key, rows.n_keys, heads.kv_heads, options.first_key_position);
    with_rule(s, sequences.count(), [&](const Rule<T, S>& rule) {
      attend(make_task(rows_of(q, rows.query, rows.n_queries), source.rows, heads, rule, options, s), rule,
             rows_of(out, rows.query, rows.n_queries), rows.query, options, workspace, executor);
    });
  }
}

/// attention_into against one sequence's rows, likewise. own: see owns_rows.
template <class T, StorageType S>
void attend_rows(const View<T>& out, const ConstView<T>& q, const KeyRows<S>& rows, Heads heads, const Rule<T, S>& rule,
                 const Options<T>& options, const AnyExecutor& executor, bool own) {
  if (!own) check_runs(rows.runs, rows.rows);
  check_operands(out, q, {rows.rows, rows.kv_heads, rows.head_dim, rows.v_head_dim}, heads, options);
  check_one_sequence(options, "a cache holds");
  check_own_positions(options);
  check_call(rule, rows,
             {.heads = heads.heads,
              .n_queries = q.rows(),
              .first_position = first_position(rule, rows, 0, q.rows(), options),
              .output = footprint(out),
              .log_sum_exp = log_sum_exp_footprint(options)},
             own);

  std::optional<Workspace> local;
  Workspace& workspace = options.workspace ? *options.workspace : local.emplace();
  if (options.log_sum_exp) options.log_sum_exp->resize(q.rows(), heads.heads);
  attend(make_task(q, rows, heads, rule, options, 0), rule, out, 0, options, workspace, executor);
}

}}}  // namespace qkv::QKV_ABI::detail

// call/latent_forms.hpp — attention over latent rows, in its two forms.
//
//     naive      k_h = [c·W_UK(h) | r],  v_h = c·W_UV(h)      restore every head's keys and values, then attend
//                q·k_h over nope_dim + rope_dim numbers       cost per (key, head): good for many queries
//
//     absorbed   q_h·k_h = (q_nope·W_UK(h)ᵀ)·c + q_rope·r     move W_UK to the query and W_UV behind the sum:
//                out_h   = (Σ p c)·W_UV(h)                    one key and value row for all heads; good for few queries
//
// with c [latent_dim] the cached latent of a key and r [rope_dim] its rotated key part, shared by all heads. Both are the
// same sum, in another order. The naive form restores a bounded number of rows at a time in scratch and merges the
// states: K and V never exist in whole. DeepSeek-V2, arXiv:2405.04434, section 2.1 and appendix C.
//
// Before: call/dispatch.hpp   Next: layer/common.hpp
#pragma once

#include <algorithm>
#include <cstddef>

#include "../cache/latent_memory.hpp"
#include "../kernel/absorbed/splits.hpp"
#include "../layer/common.hpp"
#include "../options.hpp"
#include "../projection.hpp"
#include "../softmax.hpp"
#include "../workspace.hpp"
#include "dispatch.hpp"

namespace qkv { inline namespace QKV_ABI { namespace kernel {

/// Rows converted to T (absorbed, by the general kernels) or restored (naive) at a time, at the least.
inline constexpr Index latent_chunk = 192;

/// Rows restored at a time: as many as fit 32 MB, up to 960. Every chunk merges its state into that of all queries, so
/// few large ones are better. By sizes of the layer only, so that bits do not depend on the call.
template <class T>
constexpr Index naive_chunk(Index numbers_per_row) {
  constexpr Index budget = Index(32) << 20;
  const Index rows = budget / (std::max<Index>(numbers_per_row, 1) * Index(sizeof(T)));
  return std::clamp<Index>(rows / latent_chunk, 1, 5) * latent_chunk;
}

/// Rows of one chunk of the position grid that lie at consecutive positions, in whatever runs: load(run, row, i) for each,
/// i counting them, then attend(first_row, position, count). Together with Start::merge they give the state of all rows.
template <StorageType S, class Load, class Attend>
void for_each_latent_chunk(const LatentRows<S>& rows, Index chunk, const Load& load, const Attend& attend) {
  Index base = 0, first_row = 0, position = 0, count = 0;
  for (const auto& run : rows.runs) {
    for (Index row = 0; row < run.rows; ++row) {
      const Index at = run.position + row;
      if (count > 0 && (at != position + count || at % chunk == 0)) {
        attend(first_row, position, count);
        count = 0;
      }
      if (count == 0) first_row = base + row, position = at;
      load(run, row, count++);
    }
    base += run.rows;
  }
  if (count > 0) attend(first_row, position, count);
}

/// One sequence of latent attention, as both forms see it. The rule is for keys in T: rows are widened or restored to that.
template <class T, StorageType S>
struct LatentTask {
  LatentRows<S> rows;
  Index heads;
  T scale;
  Index sequence, first_position;
  detail::Rule<T, T> rule;
  Kernel kernel = Kernel::automatic;  // automatic, or the one that the caller forces
  Arithmetic arithmetic = Arithmetic::automatic;
};

/// Whether absorbed rows have their own kernel. A forced kernel runs on rows converted to T.
template <class T>
constexpr bool has_absorbed_kernel(Kernel forced) {
  return absorbed::serves<T> && forced == Kernel::automatic;
}
/// The kernel on rows converted to T. With one lane it is the same for any number of queries.
template <class T>
constexpr Kernel general_absorbed_kernel(Kernel forced, Index n_queries) {
  constexpr bool fast = std::is_same_v<T, float> || std::is_same_v<T, double>;
  return fast && forced == Kernel::automatic ? Kernel::tiled : choose_kernel<T>(forced, n_queries);
}

/// Merges rows [first_row, first_row + n) at consecutive positions, given as plain keys and values, into the state.
template <class T, StorageType S>
void merge_rows(const LatentTask<T, S>& task, Kernel kernel, const ConstView<T>& q, const KeyRun<T>& run,
                KeyRows<T> keys, const StateView<T>& state, Workspace& workspace, const detail::AnyExecutor& executor) {
  keys.runs = {&run, 1};
  keys.rows = run.rows;
  const Task<T, T> part(q, keys, {task.heads, keys.kv_heads}, task.scale, task.sequence, task.first_position);
  detail::launch(kernel, part, task.rule, state, workspace, executor, detail::nothing_more, detail::Start::merge);
}

/// q [n_queries, heads·(latent_dim + rope_dim)], the absorbed queries; state.weighted [n_queries, heads·latent_dim].
template <class T, StorageType S>
void latent_absorbed(const LatentTask<T, S>& task, const ConstView<T>& q, const StateView<T>& state,
                     Workspace& workspace, const detail::AnyExecutor& executor) {
  const Index latent = task.rows.latent_dim, rope = task.rows.rope_dim, width = latent + rope;
  state.clear(0, q.rows(), 0, task.heads, latent);
  if constexpr (absorbed::serves<T>)
    if (has_absorbed_kernel<T>(task.kernel))
      return absorbed::run(absorbed::LaneTask<T>{q, latent, rope, task.heads, task.scale, task.sequence,
                                                 task.first_position, task.rule.pairs},
                           task.rows, task.arithmetic, state, workspace, executor);
  const Kernel kernel = general_absorbed_kernel<T>(task.kernel, q.rows());
  const auto scratch = workspace.lease(static_cast<std::size_t>(latent_chunk * width) * sizeof(T));
  T* rows = reinterpret_cast<T*>(scratch.data());
  for_each_latent_chunk(
      task.rows, latent_chunk,
      [&](const LatentRun<S>& run, Index row, Index i) {
        load_row(task.rows.latent(run, row), latent, task.rows.scale(run, row), rows + i * width);
        load_row(task.rows.rope(run, row), rope, 1.0F, rows + i * width + latent);
      },
      [&](Index first_row, Index position, Index count) {
        const KeyRun<T> keys{.rows = count, .position = position, .keys = rows, .values = rows};
        merge_rows(task, kernel, q, keys,
                   KeyRows<T>{.first_row = first_row,
                              .kv_heads = 1,
                              .head_dim = width,
                              .v_head_dim = latent,
                              .key_row_stride = width,
                              .value_row_stride = width},
                   state, workspace, executor);
      });
}

/// q [n_queries, heads·(nope_dim + rope_dim)]; state.weighted [n_queries, heads·v_head_dim]. key_up [latent_dim,
/// heads·nope_dim] and value_up [latent_dim, heads·v_head_dim] restore the heads.
template <class T, StorageType S>
void latent_naive(const LatentTask<T, S>& task, const ConstView<T>& q, const Projection<T>& key_up,
                  const Projection<T>& value_up, const StateView<T>& state, Workspace& workspace,
                  const detail::AnyExecutor& executor) {
  const Index latent = task.rows.latent_dim, rope = task.rows.rope_dim, heads = task.heads;
  const Index nope = key_up.out_dim() / heads, head_dim = nope + rope, v_head_dim = value_up.out_dim() / heads;
  const Index chunk = naive_chunk<T>(latent + rope + heads * (nope + head_dim + v_head_dim));
  const Kernel kernel = choose_kernel<T>(task.kernel, q.rows());
  state.clear(0, q.rows(), 0, heads, v_head_dim);

  View<T> c = detail::no_view<T>(), r = c, k_nope = c, k = c, v = c;
  const detail::Scratch scratch(workspace, [&](detail::Carver& carver) {
    detail::carve_matrix(carver, c, chunk, latent);
    detail::carve_matrix(carver, r, chunk, rope);
    detail::carve_matrix(carver, k_nope, chunk, heads * nope);
    detail::carve_matrix(carver, k, chunk, heads * head_dim);
    detail::carve_matrix(carver, v, chunk, heads * v_head_dim);
  });
  for_each_latent_chunk(
      task.rows, chunk,
      [&](const LatentRun<S>& run, Index row, Index i) {
        load_row(task.rows.latent(run, row), latent, task.rows.scale(run, row), &c.coeffRef(i, 0));
        load_row(task.rows.rope(run, row), rope, 1.0F, &r.coeffRef(i, 0));
      },
      [&](Index first_row, Index position, Index count) {
        const ConstView<T> latents(c.data(), count, latent, Eigen::OuterStride<>(latent));
        detail::run_together<T, 2>({{{&key_up, detail::rows_of(k_nope, 0, count), latents},
                                     {&value_up, detail::rows_of(v, 0, count), latents}}},
                                   executor);
        for (Index i = 0; i < count; ++i)
          for (Index h = 0; h < heads; ++h) {
            std::copy_n(&k_nope.coeffRef(i, h * nope), nope, &k.coeffRef(i, h * head_dim));
            std::copy_n(&r.coeffRef(i, 0), rope, &k.coeffRef(i, h * head_dim + nope));
          }
        const KeyRun<T> keys{.rows = count, .position = position, .keys = k.data(), .values = v.data()};
        merge_rows(task, kernel, q, keys,
                   KeyRows<T>{.first_row = first_row,
                              .kv_heads = heads,
                              .head_dim = head_dim,
                              .v_head_dim = v_head_dim,
                              .key_row_stride = k.outerStride(),
                              .key_head_stride = head_dim,
                              .value_row_stride = v.outerStride(),
                              .value_head_stride = v_head_dim},
                   state, workspace, executor);
      });
}

}}}  // namespace qkv::QKV_ABI::kernel

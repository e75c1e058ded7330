// kernel/latent.hpp — attention over latent rows, in its two forms.
//
//     naive      k_h = [c·W_UK(h) | r],  v_h = c·W_UV(h)      restore every head's keys and values, then attend
//                q·k_h over nope_dim + rope_dim numbers       pays per (key, head): good for many queries
//
//     absorbed   q_h·k_h = (q_nope·W_UK(h)ᵀ)·c + q_rope·r     move W_UK to the query and W_UV behind the sum:
//                out_h   = (Σ p c)·W_UV(h)                    one key and value row for all heads; good for few queries
//
// with c [latent_dim] the cached latent of a key and r [rope_dim] its rotated key part, shared by all heads. Both are the
// same sum, in another order. The naive form restores `latent_chunk` rows at a time in scratch and merges the states:
// the whole of K and V is never there. DeepSeek-V2, arXiv:2405.04434, section 2.1 and appendix C.
//
// Before: multi_head_attention.hpp   Next: latent_attention.hpp
#pragma once

#include "../detail/layer.hpp"
#include "../latent_cache.hpp"
#include "../projection.hpp"

namespace qkv::inline QKV_ABI::kernel {

/// Rows restored (naive) or converted to T (absorbed) at a time.
inline constexpr Index latent_chunk = 192;

/// Chunks of latent rows on the position grid: f(run, first_row, row, count), each inside one run. The pieces of a chunk
/// are handed out one by one; together with Start::merge they give the state of all rows.
template <StorageType S, class F>
void for_each_latent_piece(const LatentRows<S>& rows, F&& f) {
  Index base = 0;
  for (const auto& run : rows.runs) {
    for (Index row = 0; row < run.rows;) {
      const Index position = run.position + row;
      const Index count = std::min(run.rows - row, (position / latent_chunk + 1) * latent_chunk - position);
      f(run, base + row, row, count);
      row += count;
    }
    base += run.rows;
  }
}

/// One sequence of latent attention, as both forms see it.
template <class T, StorageType S, class M, class F>
struct LatentTask {
  LatentRows<S> rows;
  Index heads;
  T scale;
  Index sequence, first_position;
  const M* mask;
  const F* score;
  Kernel kernel;
};

/// Merges rows [first_row, first_row + n) at consecutive positions, given as plain keys and values, into the state.
template <class T, class Key, StorageType S, class M, class F, class E>
void merge_rows(const LatentTask<T, S, M, F>& task, const ConstView<T>& q, const KeyRun<Key>& run, KeyRows<Key> keys,
                const StateView<T>& state, Workspace& workspace, const E& executor) {
  keys.runs = {&run, 1};
  keys.rows = run.rows;
  const Task<T, Key, M, F> part{
      q, keys, {task.heads, keys.kv_heads}, task.scale, task.sequence, task.first_position, task.mask, task.score};
  detail::launch(
      task.kernel, part, state, workspace, executor, [](Index, Index, Index, Index) {}, detail::Start::merge);
}

/// q [n_queries, heads·(latent_dim + rope_dim)], the absorbed queries; state.weighted [n_queries, heads·latent_dim].
template <class T, StorageType S, class M, class F, class E>
void latent_absorbed(const LatentTask<T, S, M, F>& task, const ConstView<T>& q, const StateView<T>& state,
                     Workspace& workspace, const E& executor) {
  const Index latent = task.rows.latent_dim, rope = task.rows.rope_dim, width = latent + rope;
  state.clear(0, q.rows(), 0, task.heads, latent);
  const auto scratch = workspace.lease(static_cast<std::size_t>(latent_chunk * width) * sizeof(T));
  T* rows = reinterpret_cast<T*>(scratch.data());
  for_each_latent_piece(task.rows, [&](const LatentRun<S>& run, Index first_row, Index row, Index count) {
    for (Index i = 0; i < count; ++i) {
      load_row(task.rows.latent(run, row + i), latent, task.rows.scale(run, row + i), rows + i * width);
      load_row(task.rows.rope(run, row + i), rope, 1.0F, rows + i * width + latent);
    }
    const KeyRun<T> keys{.rows = count, .position = run.position + row, .keys = rows, .values = rows};
    merge_rows(task, q, keys,
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
template <class T, StorageType S, class M, class F, class E>
void latent_naive(const LatentTask<T, S, M, F>& task, const ConstView<T>& q, const Projection<T>& key_up,
                  const Projection<T>& value_up, const StateView<T>& state, Workspace& workspace, const E& executor) {
  const Index latent = task.rows.latent_dim, rope = task.rows.rope_dim, heads = task.heads;
  const Index nope = key_up.out_dim() / heads, head_dim = nope + rope, v_head_dim = value_up.out_dim() / heads;
  state.clear(0, q.rows(), 0, heads, v_head_dim);

  View<T> c(nullptr, 0, 0, Eigen::OuterStride<>(0)), k_nope(c), k(c), v(c);
  const auto carve = [&](std::byte* base) {
    detail::Carver carver(base);
    detail::carve_matrix(carver, c, latent_chunk, latent);
    detail::carve_matrix(carver, k_nope, latent_chunk, heads * nope);
    detail::carve_matrix(carver, k, latent_chunk, heads * head_dim);
    detail::carve_matrix(carver, v, latent_chunk, heads * v_head_dim);
    return carver.used();
  };
  const auto scratch = workspace.lease(carve(nullptr));
  carve(scratch.data());
  for_each_latent_piece(task.rows, [&](const LatentRun<S>& run, Index first_row, Index row, Index count) {
    for (Index i = 0; i < count; ++i)
      load_row(task.rows.latent(run, row + i), latent, task.rows.scale(run, row + i), &c.coeffRef(i, 0));
    const ConstView<T> latents(c.data(), count, latent, Eigen::OuterStride<>(latent));
    detail::run_together<T, 2>(
        {{{&key_up, detail::rows_of(k_nope, 0, count), latents}, {&value_up, detail::rows_of(v, 0, count), latents}}},
        executor);
    for (Index i = 0; i < count; ++i)
      for (Index h = 0; h < heads; ++h) {
        std::copy_n(&k_nope.coeffRef(i, h * nope), nope, &k.coeffRef(i, h * head_dim));
        load_row(task.rows.rope(run, row + i), rope, 1.0F, &k.coeffRef(i, h * head_dim + nope));
      }
    const KeyRun<T> keys{.rows = count, .position = run.position + row, .keys = k.data(), .values = v.data()};
    merge_rows(task, q, keys,
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

}  // namespace qkv::inline QKV_ABI::kernel

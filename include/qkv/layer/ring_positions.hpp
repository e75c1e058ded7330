// layer/ring_positions.hpp — attention over a ring whose pinned tokens count positions in the cache, not in the text.
//
//     in the text     0 1 2 3  … evicted …    t−w … t          pinned i is t − i before the query: ever further
//     in the cache    0 1 2 3  4 ……………………………… p+w             pinned i is p + w − i before it, however long the text
//
// RoPE's score depends on distance only, and inside the window distances are the same either way. So keys are
// unchanged: for the pinned keys alone the query is rotated back, from position t to p + w. The two sets of keys are
// disjoint, and their softmax states merge. Every query of a chunk is rotated on its own: a chunk gives what its tokens
// give one by one.
//
// Xiao et al. 2023, arXiv:2309.17453, section 3.2.
//
// Before: layer/shared_prefix.hpp   Next: cache/blocks.hpp
#pragma once

#include <algorithm>
#include <array>
#include <span>

#include "batch_rows.hpp"
#include "common.hpp"

namespace qkv { inline namespace QKV_ABI { namespace detail {

template <class C>
concept CanCountInCache = SlidingCache<C> && requires(const C& cache) {
  cache.positions_in_cache();
};

/// Whether a cache is a ring of this kind, with pinned tokens.
template <class C>
bool counts_in_cache(const C& cache) {
  if constexpr (CanCountInCache<C>)
    return cache.positions_in_cache() && cache.pinned() > 0;
  else
    return false;
}

/// The attention of sequence s of a batch over such a ring; its queries are rotated to their positions in the text.
template <class T, CanCountInCache C>
void attend_in_cache(const Batch<T, C>& batch, Index s, const Rule<T, typename C::Storage>& rule,
                     const AnyExecutor& executor) {
  using Run = KeyRun<typename C::Storage>;
  C& cache = *batch.caches[static_cast<std::size_t>(s)];
  const auto all = cache.key_rows();
  const Heads heads = batch.heads;
  const Index n = batch.n(s), first = batch.first_position(s), full = cache.pinned() + cache.window();
  const View<T> q = rows_of(batch.q, batch.first(s), n), out = rows_of(batch.context, batch.first(s), n);
  Options<T> options = batch.options;
  options.first_position = first;

  // The first run begins with the pinned rows; what follows them are the other keys.
  const Run& begin = all.runs.front();
  const Index n_pinned = std::min(begin.rows, cache.pinned());
  Run pinned = begin;
  pinned.rows = n_pinned;
  std::array<Run, 4> others;
  std::size_t n_others = 0;
  if (begin.rows > n_pinned) {
    Run& rest = others[n_others++] = begin;
    rest.rows -= n_pinned, rest.position += n_pinned;
    rest.keys = all.key(begin, 0, n_pinned), rest.values = all.value(begin, 0, n_pinned);
    if constexpr (has_row_scale<typename C::Storage>) {
      rest.key_scales += n_pinned * all.scale_row_stride;
      rest.value_scales += n_pinned * all.scale_row_stride;
    }
  }
  for (std::size_t r = 1; r < all.runs.size(); ++r) others[n_others++] = all.runs[r];

  Workspace& workspace = cache.workspace();
  View<T> rotated = no_view<T>();
  T* sums = nullptr;
  const Scratch scratch(workspace, [&](Carver& carver) {
    carve_matrix(carver, rotated, n, q.cols());
    sums = carver.take<T>(2 * n * heads.heads);
  });
  rotated = q;
  for (Index i = std::max<Index>(0, full - first); i < n; ++i)
    batch.rope->shift_in_place(rows_of(rotated, i, 1), heads.heads, full - (first + i));

  const kernel::StateView<T> state{sums, sums + n * heads.heads, out, heads.heads};
  const Kernel kernel = choose_kernel<T>(options.kernel, n);
  const auto attend_to = [&](const ConstView<T>& queries, std::span<const Run> runs, Index first_row, Index rows,
                             Start start) {
    auto part = all;
    part.runs = runs, part.first_row = first_row, part.rows = rows;
    launch(kernel, make_task(queries, part, heads, rule, options, 0), rule, state, workspace, executor, nothing_more,
           start);
  };
  attend_to(view(rotated), {&pinned, 1}, 0, n_pinned, Start::empty);
  if (all.rows > n_pinned)
    attend_to(view(q), std::span(others).first(n_others), n_pinned, all.rows - n_pinned, Start::merge);
  finish_rows(state, 0, n, 0, heads.heads, all.v_head_dim, options, 0);
}

}}}  // namespace qkv::QKV_ABI::detail

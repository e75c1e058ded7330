// kernel/tiled/query_state.hpp — the running softmax state of a panel of queries, one per lane, and its merge into the result.
//
//     m, l          [lanes]           running maximum and sum of weights
//     score_scale   [lanes]           score = score_scale · product of packed numbers. Plain scores: m is the maximum of the products
//     Oᵀ            [v_dim][lanes]    weighted values, v_dim padded to TileShape::tail_height
//
// merge_panel transposes Oᵀ and merges (m, l, o) into the state of the query rows.
//
// Before: kernel/tiled/pack_queries.hpp   Next: kernel/register_softmax.hpp
#pragma once

#include <algorithm>
#include <utility>

#include "../../softmax.hpp"
#include "../task.hpp"
#include "packed_kv.hpp"

#include "../../base/warnings_off.hpp"

namespace qkv { inline namespace QKV_ABI { namespace kernel {

template <class T>
struct PanelState {
  static constexpr Index lanes = TileShape<T>::columns;
  T *m, *l, *score_scale, *o;

  /// The state of no keys.
  EIGEN_DONT_INLINE void clear(Index v_head_dim) const {
    std::fill_n(m, lanes, detail::minus_infinity<T>);
    std::fill_n(l, lanes, T(0));
    std::fill_n(o, TileShape<T>::tail_height(v_head_dim) * lanes, T(0));
  }
};

/// The state of n <= lanes queries of one head, from row `query` on, merged with the panel's: merge_row (softmax.hpp),
/// transposed. `unscaled`: the panel's m is still to be multiplied by score_scale. Rows without keys so far (m = -inf) are written, not read; a lane without keys changes no
/// bit of a row that has some.
template <class T>
void merge_panel(const PanelState<T>& panel, bool unscaled, const StateView<T>& state, Index query, Index n, Index head,
                 Index v_head_dim) {
  using V = Simd<T>;
  constexpr Index lanes = PanelState<T>::lanes;
  const Index stride = state.weighted.outerStride();
  bool empty[std::size_t(lanes)], unseen[std::size_t(lanes)], all_empty = true;
  T old_factor[std::size_t(lanes)], new_factor[std::size_t(lanes)];
  for (Index i = 0; i < n; ++i) {
    T& m = state.m(query + i, head);
    T& l = state.l(query + i, head);
    const bool seen = panel.m[i] != detail::minus_infinity<T>;
    const T here = unscaled && seen ? panel.m[i] * panel.score_scale[i] : panel.m[i], top = detail::nan_max(m, here);
    empty[i] = m == detail::minus_infinity<T>;
    unseen[i] = !seen;
    all_empty = all_empty && empty[i];
    old_factor[i] = detail::weight_of(m, top), new_factor[i] = detail::weight_of(here, top);
    l = detail::multiply_add(new_factor[i], panel.l[i], old_factor[i] * l);
    m = top;
  }
  for (Index first = 0; first < n; first += V::width) {
    const Index rows = std::min(V::width, n - first);
    T* const to = state.o(query + first, head, v_head_dim);
    for (Index k = 0; k < v_head_dim; k += V::width) {
      const Index width = std::min(V::width, v_head_dim - k);
      const T* const from = panel.o + k * lanes + first;
      if (all_empty && rows == V::width && width == V::width) {
        transpose_block(from, lanes, width, to + k, stride);
        continue;
      }
      T block[V::lanes * V::lanes];
      transpose_block(from, lanes, width, block, V::width);
      for (Index i = 0; i < rows; ++i) {
        T* const row = to + i * stride + k;
        const Index lane = first + i;
        if (unseen[lane] && !empty[lane]) continue;
        const auto o = V::load(block + i * V::width);
        const auto old = empty[lane] ? V::zero() : V::mul(V::broadcast(old_factor[lane]), V::load_n(row, width));
        V::store_n(row, empty[lane] ? o : V::fma(V::broadcast(new_factor[lane]), o, old), width);
      }
    }
  }
}

}}}  // namespace qkv::QKV_ABI::kernel

#include "../../base/warnings_on.hpp"

// kernel/tiled/query_state.hpp — the running softmax state of a panel of queries, lanes side by side, and how it leaves.
//
//     m, l     [lanes]           the maximum so far, of s / unit where nothing but the scale is applied; the sum of weights
//     unit     [lanes]           what one of m is in natural units
//     Oᵀ       [v_dim][lanes]    weighted values, rows up to TileShape::tail_height(v_dim): turned back when it is merged into the state (m, l, o) of the rows
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
struct PanelSums {
  static constexpr Index lanes = TileShape<T>::columns;
  T *m, *l, *unit, *o;

  /// The state of no keys.
  EIGEN_DONT_INLINE void clear(Index v_head_dim) const {
    std::fill_n(m, lanes, detail::minus_infinity<T>);
    std::fill_n(l, lanes, T(0));
    std::fill_n(o, TileShape<T>::tail_height(v_head_dim) * lanes, T(0));
  }
};

/// The state of n <= lanes queries of one head, from row `query` on, merged with the panel's. Where in_units, m times unit
/// is the score. Rows that hold nothing yet (m = -inf) are written, not read; a lane that saw nothing changes no bit of a
/// row that holds something.
template <class T>
void merge_panel(const PanelSums<T>& panel, bool in_units, const StateView<T>& state, Index query, Index n, Index head,
                 Index v_head_dim) {
  using V = Simd<T>;
  constexpr Index lanes = PanelSums<T>::lanes;
  const Index stride = state.weighted.outerStride();
  bool empty[std::size_t(lanes)], unseen[std::size_t(lanes)], all_empty = true;
  T keep[std::size_t(lanes)], take[std::size_t(lanes)];
  for (Index i = 0; i < n; ++i) {
    T& m = state.m(query + i, head);
    T& l = state.l(query + i, head);
    const bool seen = panel.m[i] != detail::minus_infinity<T>;
    const T here = in_units && seen ? panel.m[i] * panel.unit[i] : panel.m[i], top = detail::nan_max(m, here);
    empty[i] = m == detail::minus_infinity<T>;
    unseen[i] = !seen;
    all_empty = all_empty && empty[i];
    keep[i] = detail::weight_of(m, top), take[i] = detail::weight_of(here, top);
    l = keep[i] * l + take[i] * panel.l[i];
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
        const auto old = empty[lane] ? V::zero() : V::mul(V::broadcast(keep[lane]), V::load_n(row, width));
        V::store_n(row, empty[lane] ? o : V::fma(V::broadcast(take[lane]), o, old), width);
      }
    }
  }
}

}}}  // namespace qkv::QKV_ABI::kernel

#include "../../base/warnings_on.hpp"

// kernel/decode/values.hpp — p·v of a few queries with rows of a cache as they lie in memory.
//
//     o_i[x …] += p_i(r) · v_r[x …]        Queries x Vectors registers of o, rows one after another
//
// An output is one chain over its rows in ascending order: the same bits in a tile of any shape.
//
// Before: kernel/decode/scores.hpp   Next: kernel/decode/dots.hpp
#pragma once

#include <algorithm>
#include <cstddef>
#include <utility>

#include "scores.hpp"

#include "../../base/warnings_off.hpp"

namespace qkv { inline namespace QKV_ABI { namespace kernel {

// One row.
template <Index Queries, Index Vectors, class T, class S, class Sums, std::size_t... Sum, std::size_t... Q,
          std::size_t... X>
EIGEN_ALWAYS_INLINE void add_row(const S* row, const T* p, Index p_row, Sums& sum, std::index_sequence<Sum...>,
                                 std::index_sequence<Q...>, std::index_sequence<X...>) {
  using V = Simd<T>;
  typename V::Vec value[sizeof...(X)];
  ((value[X] = Queries > 1 ? V::load_once(row + Index(X) * V::width) : V::load(row + Index(X) * V::width)), ...);
  if constexpr (Queries > 1) {
    typename V::Vec weight[sizeof...(Q)];
    ((weight[Q] = V::broadcast(p[Index(Q) * p_row])), ...);
    ((sum[Sum] = V::fma(weight[Sum / sizeof...(X)], value[Sum % sizeof...(X)], sum[Sum])), ...);
  } else {
    const auto weight = V::broadcast(*p);
    ((sum[Sum] = V::fma(weight, value[Sum % sizeof...(X)], sum[Sum])), ...);
  }
}

// Row: rows in which a line is read.
template <Index Queries, Index Vectors, class T, class S, std::size_t... Sum, std::size_t... Q, std::size_t... X,
          std::size_t... Row>
EIGEN_ALWAYS_INLINE void add_vectors(const Rows<S>& values, const T* p, Index p_row, NextLines& next, T* o, Index o_row,
                                     std::index_sequence<Sum...> sums, std::index_sequence<Q...> queries,
                                     std::index_sequence<X...> vectors, std::index_sequence<Row...>) {
  using V = Simd<T>;
  constexpr auto query = [](std::size_t s) { return Index(s) / Vectors; };
  constexpr auto lane = [](std::size_t s) { return Index(s) % Vectors * V::width; };
  constexpr Index steps = sizeof...(Row);
  typename V::Vec sum[sizeof...(Sum)];
  ((sum[Sum] = V::load(o + query(Sum) * o_row + lane(Sum))), ...);
  const S* row = values.first;
  Index r = 0;
  for (; r + steps <= values.count; r += steps, row += steps * values.stride) {
    next.template fetch<S, steps * Vectors * V::width * Index(sizeof(S))>();
    (add_row<Queries, Vectors>(row + Index(Row) * values.stride, p + r + Index(Row), p_row, sum, sums, queries,
                               vectors),
     ...);
  }
  if constexpr (steps > 1)
    for (; r < values.count; ++r, row += values.stride)
      add_row<Queries, Vectors>(row, p + r, p_row, sum, sums, queries, vectors);
  (V::store(o + query(Sum) * o_row + lane(Sum), sum[Sum]), ...);
}

template <Index Queries, Index Vectors, class T, class S>
EIGEN_ALWAYS_INLINE void add_stripes(const Rows<S>& values, Index& x, const T* p, Index p_row, NextLines& next, T* o,
                                     Index o_row) {
  constexpr Index steps = NextLines::steps(Vectors * Simd<T>::width * Index(sizeof(S)));
  for (; x + Vectors * Simd<T>::width <= values.width; x += Vectors * Simd<T>::width)
    add_vectors<Queries, Vectors>(
        Rows<S>{values.first + x, values.stride, values.count, 0}, p, p_row, next, o + x, o_row,
        std::make_index_sequence<std::size_t(Queries * Vectors)>{}, std::make_index_sequence<std::size_t(Queries)>{},
        std::make_index_sequence<std::size_t(Vectors)>{}, std::make_index_sequence<std::size_t(steps)>{});
}

template <Index Queries, class T, class S>
EIGEN_DONT_INLINE void add_tile(const Rows<S>& values, const T* p, Index p_row, NextLines ahead, T* o, Index o_row) {
  using V = Simd<T>;
  constexpr Index vectors = std::min<Index>(8, (V::registers >= 32 ? 16 : 8) / Queries);
  NextLines next = ahead;
  Index x = 0;
  add_stripes<Queries, vectors>(values, x, p, p_row, next, o, o_row);
  add_stripes<Queries, 1>(values, x, p, p_row, next, o, o_row);
  if (x == values.width) return;
  for (Index i = 0; i < Queries; ++i) {
    typename V::Vec sum = V::load(o + i * o_row + x);
    for (Index r = 0; r < values.count; ++r)
      sum = V::fma(V::broadcast(p[i * p_row + r]), V::load_n(values.row(r) + x, values.width - x), sum);
    V::store(o + i * o_row + x, sum);
  }
}

/// o_i += Σ_r p[i, r] · v_r for n queries, rows in ascending order; prefetches `next`. o [n, whole registers].
template <class T, class S>
void add_rows(const Rows<S>& values, const T* p, Index p_row, Index n, NextLines next, T* o) {
  const Index o_row = whole_registers<T>(values.width);
  for (Index i = 0, tile = 0; i < n; i += tile, next = NextLines::none(values.first)) {
    tile = n - i >= 4 ? 4 : n - i >= 2 ? 2 : 1;
    if (tile == 4)
      add_tile<4>(values, p + i * p_row, p_row, next, o + i * o_row, o_row);
    else if (tile == 2)
      add_tile<2>(values, p + i * p_row, p_row, next, o + i * o_row, o_row);
    else
      add_tile<1>(values, p + i * p_row, p_row, next, o + i * o_row, o_row);
  }
}

}}}  // namespace qkv::QKV_ABI::kernel

#include "../../base/warnings_on.hpp"

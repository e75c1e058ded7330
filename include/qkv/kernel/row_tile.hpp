// kernel/row_tile.hpp — rows of a cache, as they lie in memory, against a few queries: the inner loops of decoding.
//
//     lanes are features; a row is read and widened once for Queries queries
//
//     q·k    sum(i, r) += q_i[x …] · k_r[x …]     W sums in registers: Queries x W/Queries rows. In the end the lanes of
//                                                 all W registers are added up by one tree: lane i of it is sum i
//     p·v    o_i[x …] += p_i(r) · v_r[x …]        Queries x Vectors registers of o, rows one after another
//
// A score is one chain over its features and the tree, an output one chain over its rows in ascending order: the same
// bits in a tile of any shape.
//
// Before: kernel/lanes.hpp   Next: kernel/decode.hpp
#pragma once

#include <cstring>

#include "register_tile.hpp"

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wignored-attributes"
#endif

namespace qkv::inline QKV_ABI::kernel {

/// Memory that will be read next, asked for a few lines at a time, in order, while other rows are worked on. Measured from
/// memory: whole rows in order reach the bandwidth of a bare read; halves of rows, first all left ones, three quarters of
/// it, unless lines are asked for in order all the same.
struct NextLines {
  std::uintptr_t at = 0, end = 0;

  template <Index Bytes>
  EIGEN_ALWAYS_INLINE void fetch() {
    for (Index line = 0; line < Bytes; line += 64) {
      prefetch_near(reinterpret_cast<const void*>(at));
      at = std::min(at + 64, end);
    }
  }
};

/// Rows of a cache at equal distances.
template <class S>
struct Rows {
  const S* first;
  Index stride;  // elements
  Index count;
  Index width;  // elements that count

  EIGEN_ALWAYS_INLINE const S* row(Index r) const { return first + r * stride; }
  EIGEN_ALWAYS_INLINE Rows from(Index r, Index some) const { return {row(r), stride, some, width}; }
};

template <class T>
constexpr Index whole_registers(Index width) {
  return (std::max<Index>(width, 1) + Simd<T>::width - 1) / Simd<T>::width * Simd<T>::width;
}

// ---- q·k ----

/// Queries of one tile: [registers][Queries][W], zeros past head_dim. Tiles of 4, then 2, then 1 query, as dot_rows takes
/// them.
template <class T>
constexpr Index queries_at_once(Index n) {
  return n >= 4 && Simd<T>::width >= 4 ? 4 : n >= 2 && Simd<T>::width >= 2 ? 2 : 1;
}
template <class T>
void pack_query(const T* query, Index width, Index i, Index n, T* packed) {
  constexpr Index W = Simd<T>::width;
  const Index whole = whole_registers<T>(width);
  Index first = 0, tile = queries_at_once<T>(n);
  while (i >= first + tile) first += tile, tile = queries_at_once<T>(n - first);
  for (Index x = 0; x < whole; x += W) {
    T* const to = packed + first * whole + (x * tile) + (i - first) * W;
    const Index some = std::clamp<Index>(width - x, 0, W);
    std::copy_n(query + x, some, to);
    std::fill_n(to + some, W - some, T(0));
  }
}

// One register of each row times one of each query. By constant indices and without lambdas, as in register_tile.hpp.
template <Index Queries, class T, class S, std::size_t... Sum, std::size_t... Q, std::size_t... R>
EIGEN_ALWAYS_INLINE void dot_step(const Rows<S>& keys, Index x, Index left, const T* q,
                                  typename Simd<T>::Vec (&sum)[sizeof...(Sum)], std::index_sequence<Sum...>,
                                  std::index_sequence<Q...>, std::index_sequence<R...>) {
  using V = Simd<T>;
  typename V::Vec query[sizeof...(Q)], key[sizeof...(R)];
  ((query[Q] = V::load_once(q + x * Queries + Index(Q) * V::width)), ...);
  if (left >= V::width)
    ((key[R] = Queries > 1 ? V::load_once(keys.row(Index(R)) + x) : V::load(keys.row(Index(R)) + x)), ...);
  else
    ((key[R] = V::load_n(keys.row(Index(R)) + x, left)), ...);
  ((sum[Sum] = V::fma(query[Sum / sizeof...(R)], key[Sum % sizeof...(R)], sum[Sum])), ...);
}

// Queries x At rows; their sums go to query by query Step apart.
template <Index Queries, Index At, Index Step, class T, class S, std::size_t... Sum, std::size_t... R>
EIGEN_ALWAYS_INLINE void dot_some(const Rows<S>& keys, const T* q, NextLines& next, typename Simd<T>::Vec* to,
                                  std::index_sequence<Sum...> sums, std::index_sequence<R...> rows) {
  using V = Simd<T>;
  constexpr Index W = V::width;
  constexpr auto queries = std::make_index_sequence<std::size_t(Queries)>{};
  typename V::Vec sum[sizeof...(Sum)];
  ((sum[Sum] = V::zero()), ...);
  Index x = 0;
  for (; x + W <= keys.width; x += W) {
    next.template fetch<At * W * Index(sizeof(S))>();
    dot_step<Queries>(keys, x, W, q, sum, sums, queries, rows);
  }
  if (x < keys.width) dot_step<Queries>(keys, x, keys.width - x, q, sum, sums, queries, rows);
  ((to[Index(Sum) / At * Step + Index(Sum) % At] = sum[Sum]), ...);
}

// All of a tile's rows, At at a time: many rows side by side are many streams, which memory serves badly.
template <Index Queries, Index At, class T, class S, std::size_t... Group>
EIGEN_ALWAYS_INLINE void dot_groups(const Rows<S>& keys, const T* q, NextLines& next,
                                    typename Simd<T>::Vec (&sum)[Simd<T>::lanes], std::index_sequence<Group...>) {
  (dot_some<Queries, At, Simd<T>::width / Queries>(keys.from(Index(Group) * At, At), q, next, sum + Index(Group) * At,
                                                   std::make_index_sequence<std::size_t(Queries * At)>{},
                                                   std::make_index_sequence<std::size_t(At)>{}),
   ...);
}

/// to[i, r] = scale · q_i·k_r for one tile of Queries queries, W/Queries rows at a time.
template <Index Queries, class T, class S>
EIGEN_DONT_INLINE void dot_tile(const Rows<S>& keys, const T* q, T scale, NextLines ahead, T* to, Index to_row) {
  using V = Simd<T>;
  constexpr Index step = V::width / Queries, at = std::min<Index>(step, 4);
  NextLines next = ahead;
  typename V::Vec sum[V::lanes];
  T scores[V::lanes];
  Index r = 0;
  for (; r + step <= keys.count; r += step) {
    dot_groups<Queries, at>(keys.from(r, step), q, next, sum, std::make_index_sequence<std::size_t(step / at)>{});
    V::store(scores, V::mul(V::sum_each(sum), V::broadcast(scale)));
    for (Index i = 0; i < Queries; ++i)
      std::memcpy(to + i * to_row + r, scores + i * step, std::size_t(step) * sizeof(T));
  }
  for (; r < keys.count; ++r) {  // one by one, in the first slot of every query
    for (auto& s : sum) s = V::zero();
    dot_groups<Queries, 1>(keys.from(r, 1), q, next, sum, std::make_index_sequence<1>{});
    V::store(scores, V::mul(V::sum_each(sum), V::broadcast(scale)));
    for (Index i = 0; i < Queries; ++i) to[i * to_row + r] = scores[i * step];
  }
}

/// to[i, r] = scale · q_i·k_r for n queries (pack_query) and all rows; `next` is asked for meanwhile.
template <class T, class S>
void dot_rows(const Rows<S>& keys, const T* q, Index n, T scale, NextLines next, T* to, Index to_row) {
  const Index width = whole_registers<T>(keys.width);
  for (Index i = 0, tile = 0; i < n; i += tile, next = {}) {
    tile = queries_at_once<T>(n - i);
    if constexpr (Simd<T>::width >= 4)
      if (tile == 4) dot_tile<4>(keys, q + i * width, scale, next, to + i * to_row, to_row);
    if constexpr (Simd<T>::width >= 2)
      if (tile == 2) dot_tile<2>(keys, q + i * width, scale, next, to + i * to_row, to_row);
    if (tile == 1) dot_tile<1>(keys, q + i * width, scale, next, to + i * to_row, to_row);
  }
}

// ---- p·v ----

template <Index Queries, Index Vectors, class T, class S, std::size_t... Sum, std::size_t... Q, std::size_t... X>
EIGEN_ALWAYS_INLINE void add_vectors(const Rows<S>& values, const T* p, Index p_row, NextLines& next, T* o,
                                     Index o_row, std::index_sequence<Sum...>, std::index_sequence<Q...>,
                                     std::index_sequence<X...>) {
  using V = Simd<T>;
  constexpr auto query = [](std::size_t s) { return Index(s) / Vectors; };
  constexpr auto lane = [](std::size_t s) { return Index(s) % Vectors * V::width; };
  typename V::Vec sum[sizeof...(Sum)], value[sizeof...(X)];
  ((sum[Sum] = V::load(o + query(Sum) * o_row + lane(Sum))), ...);
  const S* row = values.first;
  for (Index r = 0; r < values.count; ++r, row += values.stride) {
    next.template fetch<Vectors * V::width * Index(sizeof(S))>();
    ((value[X] = Queries > 1 ? V::load_once(row + Index(X) * V::width) : V::load(row + Index(X) * V::width)), ...);
    if constexpr (Queries > 1) {
      typename V::Vec weight[sizeof...(Q)];
      ((weight[Q] = V::broadcast(p[Index(Q) * p_row + r])), ...);
      ((sum[Sum] = V::fma(weight[Sum / sizeof...(X)], value[Sum % sizeof...(X)], sum[Sum])), ...);
    } else {
      const auto weight = V::broadcast(p[r]);
      ((sum[Sum] = V::fma(weight, value[Sum % sizeof...(X)], sum[Sum])), ...);
    }
  }
  (V::store(o + query(Sum) * o_row + lane(Sum), sum[Sum]), ...);
}

template <Index Queries, Index Vectors, class T, class S>
EIGEN_ALWAYS_INLINE void add_stripes(const Rows<S>& values, Index& x, const T* p, Index p_row, NextLines& next, T* o,
                                     Index o_row) {
  for (; x + Vectors * Simd<T>::width <= values.width; x += Vectors * Simd<T>::width)
    add_vectors<Queries, Vectors>(Rows<S>{values.first + x, values.stride, values.count, 0}, p, p_row, next, o + x,
                                  o_row, std::make_index_sequence<std::size_t(Queries * Vectors)>{},
                                  std::make_index_sequence<std::size_t(Queries)>{},
                                  std::make_index_sequence<std::size_t(Vectors)>{});
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

/// o_i += Σ_r p[i, r] · v_r for n queries, rows in ascending order; `next` is asked for meanwhile. o [n, whole registers].
template <class T, class S>
void add_rows(const Rows<S>& values, const T* p, Index p_row, Index n, NextLines next, T* o) {
  const Index o_row = whole_registers<T>(values.width);
  for (Index i = 0, tile = 0; i < n; i += tile, next = {}) {
    tile = n - i >= 4 ? 4 : n - i >= 2 ? 2 : 1;
    if (tile == 4)
      add_tile<4>(values, p + i * p_row, p_row, next, o + i * o_row, o_row);
    else if (tile == 2)
      add_tile<2>(values, p + i * p_row, p_row, next, o + i * o_row, o_row);
    else
      add_tile<1>(values, p + i * p_row, p_row, next, o + i * o_row, o_row);
  }
}

}  // namespace qkv::inline QKV_ABI::kernel

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif

// kernel/decode/scores.hpp — q·k of a few queries with rows of a cache as they lie in memory.
//
//     lanes are features; a row is read and widened once for Queries queries
//
//     sum(i, r) += q_i[x …] · k_r[x …]     W accumulators: Queries x W/Queries rows. At the end one tree reduces all W
//                                          registers at once: its lane i is sum i
//
// A score is one chain over its features and the reduction: the same bits in a tile of any shape.
//
// Before: kernel/decode/state.hpp   Next: kernel/decode/values.hpp
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "../../workspace.hpp"
#include "dots.hpp"

#include "../../base/warnings_off.hpp"

namespace qkv { inline namespace QKV_ABI { namespace kernel {

inline constexpr bool few_registers = Simd<float>::registers < 32;  // AVX2, SSE2
/// Storage that is bound by memory rather than by arithmetic.
template <class S>
inline constexpr bool wide = sizeof(S) >= 4;

/// Prefetch into the second-level cache, `distance` bytes beyond the prefetch into the first (0: none). Past `stretch`, the end
/// of this run, it continues `jump` bytes further: in the next page.
struct FarPrefetch {
  std::uintptr_t distance = 0, stretch = ~std::uintptr_t{0}, jump = 0;

  EIGEN_ALWAYS_INLINE std::uintptr_t from(std::uintptr_t at) const {
    return at + distance + (at + distance < stretch ? 0 : jump);
  }
  void set_distance(std::uintptr_t bytes) { distance = bytes; }
  /// Rows at `then` follow the end of this run.
  void continue_at(std::uintptr_t end, std::uintptr_t then) { stretch = end, jump = then - end; }
};
struct NoFarPrefetch {
  static constexpr std::uintptr_t distance = 0;
  static std::uintptr_t from(std::uintptr_t at) { return at; }
  static void set_distance(std::uintptr_t) {}
  static void continue_at(std::uintptr_t, std::uintptr_t) {}
};

/// The memory that is read next, prefetched a few lines at a time, in order, while the current rows are multiplied. Measured
/// from memory: rows read in order reach the bandwidth of a bare read; reading all left halves first reaches three quarters,
/// and all of it if prefetches stay in address order. Narrow storage, bound by arithmetic, does not check `end`: its
/// prefetches may run past the rows, by a block at most.
struct NextLines : std::conditional_t<few_registers, FarPrefetch, NoFarPrefetch> {
  std::uintptr_t at = 0, end = 0;

  /// No rows follow: the address `there` is prefetched, which is harmless.
  static NextLines none(const void* there) {
    NextLines next;
    next.at = next.end = reinterpret_cast<std::uintptr_t>(there);
    return next;
  }

  /// The next lines of rows of storage S.
  template <class S, Index Bytes>
  EIGEN_ALWAYS_INLINE void fetch() {
    for (Index line = 0; line < Bytes; line += 64) {
      if (wide<S> && this->distance > 0) {
        prefetch_once(reinterpret_cast<const void*>(at));
        prefetch(reinterpret_cast<const void*>(this->from(at)));
      } else {
        prefetch_near(reinterpret_cast<const void*>(at));
      }
      at = wide<S> ? std::min(at + 64, end) : at + 64;
    }
  }

  /// Loop steps per cache line, where a step reads so many bytes: one prefetch per line is enough.
  static constexpr Index steps(Index bytes) { return few_registers ? std::max<Index>(1, 64 / bytes) : 1; }
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

/// How many queries the next tile has when n are left.
template <class D>
constexpr Index queries_at_once(Index n) {
  return n >= 4 && D::lanes >= 4 ? 4 : n >= 2 && D::lanes >= 2 ? 2 : 1;
}

/// n queries as tiles read them. A tile of Queries begins at its first query's place: [registers][Queries][width], zeros
/// past head_dim; `factor` and `shift` are of the W sums, Queries x W/Queries.
template <class D>
struct PackedQueries {
  using T = typename D::Scalar;
  typename D::Query* packed;   // [n, row]
  typename D::Query* rounded;  // [row], scratch
  T* factor;                   // [n, lanes]
  std::int32_t* shift;         // [n, lanes]
  Index n, row;

  PackedQueries(detail::Carver& carver, Index n_rows, Index head_dim)
      : n(n_rows), row((std::max<Index>(head_dim, 1) + D::width - 1) / D::width * D::width) {
    packed = carver.take<typename D::Query>(n * row);
    rounded = carver.take<typename D::Query>(row);
    factor = carver.take<T>(n * D::lanes);
    shift = carver.take<std::int32_t>(n * D::lanes);
  }

  void pack(Index i, const T* query, Index head_dim, T scale) const {
    Index first = 0, tile = queries_at_once<D>(n);
    while (i >= first + tile) first += tile, tile = queries_at_once<D>(n - first);
    std::fill_n(rounded, row, typename D::Query(0));
    std::int32_t offset = 0;
    const T scaled = scale * D::round(query, head_dim, rounded, offset);
    const Index slot = i - first, rows = D::lanes / tile;
    for (Index x = 0; x < row; x += D::width)
      std::copy_n(rounded + x, D::width, packed + first * row + x * tile + slot * D::width);
    std::fill_n(factor + first * D::lanes + slot * rows, rows, scaled);
    std::fill_n(shift + first * D::lanes + slot * rows, rows, offset);
  }
};

// One register of each row times one of each query, which lie `apart` queries to a register. By constant indices and without
// lambdas, as in register_tile.hpp.
template <class D, Index Part, std::size_t... Sum, std::size_t... Q, std::size_t... R>
EIGEN_ALWAYS_INLINE void dot_part(const Rows<typename D::Key>& keys, Index x, Index left, const typename D::Query* q,
                                  Index apart, typename D::Vec (&sum)[sizeof...(Sum)], std::index_sequence<Sum...>,
                                  std::index_sequence<Q...>, std::index_sequence<R...>) {
  typename D::Vec query[sizeof...(Q)], key[sizeof...(R)];
  ((query[Q] = D::template query<Part>(q + x * apart + Index(Q) * D::width)), ...);
  if (left >= D::width)
    ((key[R] = D::template key<Part>(keys.row(Index(R)) + x)), ...);
  else
    ((key[R] = D::template key_n<Part>(keys.row(Index(R)) + x, left)), ...);
  ((sum[Sum] = D::add_product(query[Sum / sizeof...(R)], key[Sum % sizeof...(R)], sum[Sum])), ...);
}

// The same, Step registers on.
template <class D, std::size_t... Step, class Sums, class Indices, class Q, class R>
EIGEN_ALWAYS_INLINE void dot_steps(const Rows<typename D::Key>& keys, Index x, Index left, const typename D::Query* q,
                                   Index apart, Sums& sum, std::index_sequence<Step...>, Indices sums, Q queries,
                                   R rows) {
  (dot_part<D, Index(Step) % D::parts>(keys, x + Index(Step) / D::parts * D::width, left, q, apart, sum, sums, queries,
                                       rows),
   ...);
}

// Queries x At rows; their sums go to query by query Step apart.
template <class D, Index Queries, Index At, Index Step, std::size_t... Sum, std::size_t... R>
EIGEN_ALWAYS_INLINE void dot_some(const Rows<typename D::Key>& keys, const typename D::Query* q, Index apart,
                                  NextLines& next, typename D::Vec* to, std::index_sequence<Sum...> sums,
                                  std::index_sequence<R...> rows) {
  constexpr auto queries = std::make_index_sequence<std::size_t(Queries)>{};
  constexpr Index bytes = At * D::width * Index(sizeof(typename D::Key)), steps = NextLines::steps(bytes);
  constexpr auto one = std::make_index_sequence<std::size_t(D::parts)>{};
  constexpr auto several = std::make_index_sequence<std::size_t(steps * D::parts)>{};
  typename D::Vec sum[sizeof...(Sum)];
  ((sum[Sum] = D::zero()), ...);
  Index x = 0;
  for (; x + steps * D::width <= keys.width; x += steps * D::width) {
    next.template fetch<typename D::Key, steps * bytes>();
    dot_steps<D>(keys, x, D::width, q, apart, sum, several, sums, queries, rows);
  }
  if constexpr (steps > 1)
    for (; x + D::width <= keys.width; x += D::width)
      dot_steps<D>(keys, x, D::width, q, apart, sum, one, sums, queries, rows);
  if (x < keys.width) dot_steps<D>(keys, x, keys.width - x, q, apart, sum, one, sums, queries, rows);
  ((to[Index(Sum) / At * Step + Index(Sum) % At] = sum[Sum]), ...);
}

/// The last rows of a tile, query by query and row by row: the same sums in the first slot of every query.
template <class D>
EIGEN_DONT_INLINE void dot_last_rows(const Rows<typename D::Key>& keys, const PackedQueries<D>& queries, Index first,
                                     Index n, NextLines next, typename D::Scalar* to, Index to_row) {
  const Index step = D::lanes / n;
  typename D::Vec sum[std::size_t(D::lanes)];
  typename D::Scalar scores[std::size_t(D::lanes)];
  for (Index r = 0; r < keys.count; ++r) {
    for (auto& s : sum) s = D::zero();
    for (Index i = 0; i < n; ++i)
      dot_some<D, 1, 1, 1>(keys.from(r, 1), queries.packed + first * queries.row + i * D::width, n, next,
                           sum + i * step, std::make_index_sequence<1>{}, std::make_index_sequence<1>{});
    D::finish(sum, queries.factor + first * D::lanes, queries.shift + first * D::lanes, scores);
    for (Index i = 0; i < n; ++i) to[i * to_row + r] = scores[i * step];
  }
}

/// to[i, r] = factor_i · q_i·k_r for the tile of Queries queries that begins at query `first`, lanes/Queries rows at a time.
template <class D, Index Queries>
EIGEN_DONT_INLINE void dot_tile(const Rows<typename D::Key>& keys, const PackedQueries<D>& queries, Index first,
                                NextLines ahead, typename D::Scalar* to, Index to_row) {
  using T = typename D::Scalar;
  constexpr Index step = D::lanes / Queries, at = std::min<Index>(step, 4);
  const typename D::Query* const q = queries.packed + first * queries.row;
  const T* const factor = queries.factor + first * D::lanes;
  const std::int32_t* const shift = queries.shift + first * D::lanes;
  NextLines next = ahead;
  typename D::Vec sum[std::size_t(D::lanes)];
  T scores[std::size_t(D::lanes)];
  Index r = 0;
  for (; r + step <= keys.count; r += step) {
    for (Index some = 0; some < step; some += at)  // few rows at once: many parallel streams read memory slowly
      dot_some<D, Queries, at, step>(keys.from(r + some, at), q, Queries, next, sum + some,
                                     std::make_index_sequence<std::size_t(Queries * at)>{},
                                     std::make_index_sequence<std::size_t(at)>{});
    D::finish(sum, factor, shift, scores);
    for (Index i = 0; i < Queries; ++i)
      std::memcpy(to + i * to_row + r, scores + i * step, std::size_t(step) * sizeof(T));
  }
  if (r < keys.count) dot_last_rows(keys.from(r, keys.count - r), queries, first, Queries, next, to + r, to_row);
}

/// to[i, r] = scale · q_i·k_r for all queries and rows; prefetches `next`.
template <class D>
void dot_rows(const Rows<typename D::Key>& keys, const PackedQueries<D>& q, NextLines next, typename D::Scalar* to,
              Index to_row) {
  for (Index i = 0, tile = 0; i < q.n; i += tile, next = NextLines::none(keys.first)) {
    tile = queries_at_once<D>(q.n - i);
    if constexpr (D::lanes >= 4)
      if (tile == 4) dot_tile<D, 4>(keys, q, i, next, to + i * to_row, to_row);
    if constexpr (D::lanes >= 2)
      if (tile == 2) dot_tile<D, 2>(keys, q, i, next, to + i * to_row, to_row);
    if (tile == 1) dot_tile<D, 1>(keys, q, i, next, to + i * to_row, to_row);
  }
}

}}}  // namespace qkv::QKV_ABI::kernel

#include "../../base/warnings_on.hpp"

// product/register_tile.hpp — the inner loop of every product: a is broadcast, b is a vector, sums stay in registers.
//
//     c(r, j) = start(r, j) + Σ_k a(r, k)·b(k, j)        r < Rows,  j < Vectors·width;  each sum one chain in ascending k
//
//     x·W:   a = rows of x      b = columns of W     c = out
//     Q·Kᵀ:  a = rows of K      b = queries, Qᵀ      c = scores, [keys, queries]
//     P·V:   a = columns of V   b = Pᵀ               c = outᵀ,   [v_head_dim, queries]: start is c itself
//
// Lanes never mix, and a sum is the same chain in a tile of any height: results do not depend on how rows are grouped.
//
// Before: product/narrow_tile.hpp   Next: simd/simd.hpp
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <utility>

#include "../simd/simd.hpp"

namespace qkv { inline namespace QKV_ABI { namespace kernel {

template <class F, Index... I>
EIGEN_ALWAYS_INLINE void unroll(F&& f, std::integer_sequence<Index, I...>) {
  (f(std::integral_constant<Index, I>{}), ...);
}

/// f(0), …, f(N-1) with each index a constant. For registers indexed in an inner loop write a fold, as `tile_of` does: a
/// compiler may call a lambda instead of inlining it, and what it refers to then lives in memory (four times slower).
template <Index N, class F>
EIGEN_ALWAYS_INLINE void unroll(F&& f) {
  unroll(f, std::make_integer_sequence<Index, N>{});
}

/// Rows and vectors of sums held in registers. With 32 registers 12 x 2 needs 14 loads for 24 multiply-adds.
template <class T>
struct TileShape {
  static constexpr bool wide = Simd<T>::registers >= 32;
  static constexpr Index rows = wide ? 12 : Simd<T>::fused ? 6 : 4;  // without FMA a product needs a register
  static constexpr Index vectors = 2;
  static constexpr Index columns = vectors * Simd<T>::width;
  // Where a last, lower tile may be computed with more rows than it has, its height is a multiple of this: every height is
  // compiled, and there are three of them instead of twelve.
  static constexpr Index tail_step = wide ? 4 : 2;
  static_assert(rows % tail_step == 0);
  static constexpr Index tail_height(Index n) { return (n + tail_step - 1) / tail_step * tail_step; }
};

/// A prefetch address that advances by `step` bytes; it may run past the end. Prefetches in a burst block the loads of the
/// products (measured at 64 rows: 0.82 to 0.91 of the peak); spread over a tile they cost nothing (0.98).
struct Fetch {
  std::uintptr_t at = 0, step = 0;

  EIGEN_ALWAYS_INLINE void line(std::uintptr_t offset = 0) const {
    prefetch_near(reinterpret_cast<const void*>(at + offset));
  }
  EIGEN_ALWAYS_INLINE void move() { at += step; }
};

/// Rows to prefetch, some cache lines at a time between tiles.
struct FetchRows {
  const char* row = nullptr;
  Index stride = 0, bytes = 0, rows = 0;  // from row to row, of a row, how many
  bool write = false;
  Index at = 0;

  template <class T>
  static FetchRows of(const T* first, Index stride, Index numbers, Index rows, bool write = false) {
    constexpr auto size = static_cast<Index>(sizeof(T));
    return {reinterpret_cast<const char*>(first), stride * size, numbers * size, rows, write};
  }
  /// Prefetches the next n lines; returns how many of the n were left when the rows ended.
  EIGEN_ALWAYS_INLINE Index lines(Index n) {
    for (; n > 0 && rows > 0; --n) {
      write ? prefetch_to_write(row + at) : prefetch(row + at);
      at += 64;
      if (at >= bytes) at = 0, row += stride, --rows;
    }
    return n;
  }
};

/// A few of them, one after another.
struct FetchList {
  static constexpr Index per_tile = 24;  // lines
  FetchRows list[4];
  Index count = 0;

  void clear() { count = 0; }
  void add(const FetchRows& rows) {
    if (rows.rows > 0 && count < 4) list[count++] = rows;
  }
  EIGEN_ALWAYS_INLINE void next() {
    for (Index n = per_tile; count > 0 && (n = list[count - 1].lines(n)) > 0;) --count;
  }
};

/// c(r, j) = start(r, j) + Σ_k a(r, k)·b(k, j): pointers and the distances, in elements, of their rows and steps.
template <class T, class S = T>
struct TileOperands {
  Index depth = 0;
  const T* a = nullptr;
  Index a_row = 1, a_step = 1;
  const S* b = nullptr;
  Index b_step = 0;
  const T* start = nullptr;  // null: zeros; c itself is allowed
  Index start_row = 0;       // 0: every row starts with the same vectors
  T* c = nullptr;
  Index c_row = 0;
  Fetch ahead = {}, next = {};  // only for tiles with AheadLines > 0
};

// The sums and the vectors of b by constant indices only, and no lambda: then they stay in registers, at -O2 too.
template <int AheadLines, class T, class S, std::size_t... Sum, std::size_t... Vector>
EIGEN_ALWAYS_INLINE void tile_of(const TileOperands<T, S>& op, Index a_row, Index a_step, std::index_sequence<Sum...>,
                                 std::index_sequence<Vector...>) {
  using V = Simd<T>;
  constexpr Index width = V::width, vectors = sizeof...(Vector);
  typename V::Vec sum[sizeof...(Sum)], row[sizeof...(Vector)];
  if (op.start != nullptr)
    ((sum[Sum] = V::load(op.start + Index(Sum) / vectors * op.start_row + Index(Sum) % vectors * width)), ...);
  else
    ((sum[Sum] = V::zero()), ...);
  const T* a = op.a;
  const S* b = op.b;
  [[maybe_unused]] Fetch ahead = op.ahead, next = op.next;
  for (Index k = op.depth; k > 0; --k) {
    ((row[Vector] = V::load(b + Index(Vector) * width)), ...);
    // Of `ahead` AheadLines cache lines with every step, of `next` one row now and then.
    if constexpr (AheadLines > 0) {
      ahead.line();
      if constexpr (AheadLines > 1) ahead.line(64);
      ahead.move();
      if (k % (128 / Index(sizeof(T))) == 0) {
        next.line();
        if constexpr (vectors * width * sizeof(T) > 64) next.line(64);
        next.move();
      }
    }
    ((sum[Sum] = V::fma(V::broadcast(a[Index(Sum) / vectors * a_row]), row[Sum % sizeof...(Vector)], sum[Sum])), ...);
    a += a_step;
    b += op.b_step;
  }
  (V::store(op.c + Index(Sum) / vectors * op.c_row + Index(Sum) % vectors * width, sum[Sum]), ...);
}

/// One tile of Rows x Vectors registers: b is read once per step, a is broadcast. Each sum is a chain in ascending k.
template <Index Rows, Index Vectors, int AheadLines = 0, class T, class S>
EIGEN_ALWAYS_INLINE void tile(const TileOperands<T, S>& op, Index a_row, Index a_step) {
  tile_of<AheadLines>(op, a_row, a_step, std::make_index_sequence<std::size_t(Rows * Vectors)>{},
                      std::make_index_sequence<std::size_t(Vectors)>{});
}

/// A tile with a in a panel [depth][Rows] (see `pack_rows`): what is known at compile time saves address registers.
template <Index Rows, Index Vectors, int AheadLines = 0, class T, class S>
void packed_tile(const TileOperands<T, S> op) {  // a copy, which no store can change
  tile<Rows, Vectors, AheadLines>(op, 1, Rows);
}

/// `tiles` full tiles one after another, a and c moving on by a_next and c_next: a call of its own for every tile would
/// cost about 200 cycles each, because the next tile's loads then wait for the last one's stores to be issued.
template <Index Rows, Index Vectors, class T, class S>
void packed_tiles(TileOperands<T, S> op, Index tiles, Index a_next, Index c_next, FetchList& fetch) {
  const bool continues = op.start != nullptr;
  for (; tiles > 0; --tiles) {
    tile<Rows, Vectors>(op, 1, Rows);
    fetch.next();
    op.a += a_next;
    op.c += c_next;
    if (continues) op.start += c_next;
  }
}

/// packed_tile for Step, 2·Step … TileShape<T>::rows rows, chosen at run time.
template <class T, class S = T, int AheadLines = 0, Index Step = 1>
void packed_tile_of(Index rows, const TileOperands<T, S>& op) {
  using Shape = TileShape<T>;
  constexpr auto tiles = []<Index... R>(std::integer_sequence<Index, R...>) {
    return std::array{&packed_tile<(R + 1) * Step, Shape::vectors, AheadLines, T, S>...};
  }
  (std::make_integer_sequence<Index, Shape::rows / Step>{});
  tiles[static_cast<std::size_t>(rows / Step - 1)](op);
}

/// pack_rows may write this many numbers past the end of its panel.
template <class T>
inline constexpr Index pack_slack = Simd<T>::width;

template <class T, class S, std::size_t... Lane>
EIGEN_ALWAYS_INLINE void transpose_block(const S* from, Index from_stride, Index rows, T* to, Index to_stride,
                                         std::index_sequence<Lane...>) {
  using V = Simd<T>;
  typename V::Vec block[] = {(Index(Lane) < rows ? V::load(from + Index(Lane) * from_stride) : V::zero())...};
  V::transpose(block);
  (V::store(to + Index(Lane) * to_stride, block[Lane]), ...);
}
/// to[j, i] = from[i, j] for i, j < width; zeros for i >= rows, which are not read.
template <class T, class S>
EIGEN_DONT_INLINE void transpose_block(const S* from, Index from_stride, Index rows, T* to, Index to_stride) {
  transpose_block(from, from_stride, rows, to, to_stride, std::make_index_sequence<Simd<T>::lanes>{});
}

/// x [rows, depth] in rows `stride` apart -> panel [depth][height], with room for `pack_slack` numbers more. Rows from
/// `rows` to `height` are left undefined.
template <class T, class S>
void pack_rows(const S* x, Index stride, Index rows, Index height, Index depth, T* panel) {
  constexpr Index width = Simd<T>::width;
  Index packed = 0;  // rows
  while (rows > 1 && (rows - packed >= width || (packed == 0 && rows > 0))) {
    const Index some = std::min(width, rows);
    const S* from = x + packed * stride;
    Index k = 0;
    for (; k + width <= depth; k += width)
      // With fewer rows than lanes a store runs into the next step's place, and that step's store follows.
      transpose_block(from + k, stride, some, panel + k * height + packed, height);
    for (; k < depth; ++k)
      for (Index r = 0; r < some; ++r) panel[k * height + packed + r] = static_cast<T>(from[r * stride + k]);
    packed += some;
  }
  for (; packed < rows; ++packed)
    for (Index k = 0; k < depth; ++k) panel[k * height + packed] = static_cast<T>(x[packed * stride + k]);
}

}}}  // namespace qkv::QKV_ABI::kernel

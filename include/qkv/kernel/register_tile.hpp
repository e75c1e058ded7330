// kernel/register_tile.hpp — the one inner loop of every product: a is broadcast, b is a vector, the sums stay in registers.
//
//     c(r, j) = start(r, j) + Σ_k a(r, k)·b(k, j)        r < Rows,  j < Vectors·width;  each sum one chain in ascending k
//
//     x·W:   a = rows of x      b = columns of W     c = out
//     Q·Kᵀ:  a = rows of K      b = queries, Qᵀ      c = scores, [keys, queries]
//     P·V:   a = columns of V   b = Pᵀ               c = outᵀ,   [v_head_dim, queries]: start is c itself
//
// Lanes never mix, and a sum is the same chain in a tile of any height: results do not depend on how rows are grouped.
//
// Before: kernel/simd.hpp   Next: kernel/gemm.hpp
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <type_traits>
#include <utility>

#include "simd.hpp"

namespace qkv::inline QKV_ABI::kernel {

/// f(0), …, f(N-1) with each index a constant: what is indexed by it stays in registers.
template <Index N, class F>
EIGEN_ALWAYS_INLINE void unroll(F&& f) {
  [&]<Index... I>(std::integer_sequence<Index, I...>) { (f(std::integral_constant<Index, I>{}), ...); }
  (std::make_integer_sequence<Index, N>{});
}

/// Rows and vectors of sums held in registers. With 32 registers 12 x 2 needs 14 loads for 24 multiply-adds.
template <class T>
struct TileShape {
  static constexpr bool wide = Simd<T>::registers >= 32;
  static constexpr Index rows = wide ? 12 : Simd<T>::fused ? 6 : 4;  // without FMA a product needs a register
  static constexpr Index vectors = 2;
  static constexpr Index columns = vectors * Simd<T>::width;
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
  const std::byte* ahead = nullptr;  // memory wanted soon: `AheadLines` cache lines are asked for with every k
  Index ahead_step = 0;              // bytes
};

/// One tile of Rows x Vectors registers: b is read once per step, a is broadcast. Each sum is a chain in ascending k.
template <Index Rows, Index Vectors, Index AheadLines = 0, class T, class S>
EIGEN_ALWAYS_INLINE void tile(const TileOperands<T, S>& op, Index a_row, Index a_step) {
  using V = Simd<T>;
  constexpr Index width = V::width;
  typename V::Vec sum[std::size_t(Rows)][std::size_t(Vectors)];
  if (op.start != nullptr)
    unroll<Rows>([&](auto r) {
      unroll<Vectors>([&](auto v) { sum[r][v] = V::load(op.start + r * op.start_row + v * width); });
    });
  else
    unroll<Rows>([&](auto r) { unroll<Vectors>([&](auto v) { sum[r][v] = V::zero(); }); });
  const T* a = op.a;
  const S* b = op.b;
  const std::byte* ahead = op.ahead;
  for (Index k = op.depth; k > 0; --k) {
    typename V::Vec row[std::size_t(Vectors)];
    unroll<Vectors>([&](auto v) { row[v] = V::load(b + v * width); });
    unroll<AheadLines>([&](auto i) { prefetch(ahead + i * 64); });
    ahead += op.ahead_step;
    unroll<Rows>([&](auto r) {
      const auto x = V::broadcast(a[r * a_row]);
      unroll<Vectors>([&](auto v) { sum[r][v] = V::fma(x, row[v], sum[r][v]); });
    });
    a += a_step;
    b += op.b_step;
  }
  unroll<Rows>([&](auto r) { unroll<Vectors>([&](auto v) { V::store(op.c + r * op.c_row + v * width, sum[r][v]); }); });
}

/// A tile with a in a panel [depth][Rows] (see `pack_rows`): what is known at compile time saves address registers.
template <Index Rows, Index Vectors, Index AheadLines = 0, class T, class S>
void packed_tile(const TileOperands<T, S> op) {  // a copy, which no store can change
  tile<Rows, Vectors, AheadLines>(op, 1, Rows);
}

/// packed_tile for 1 … TileShape<T>::rows rows, chosen at run time.
template <class T, class S = T, Index AheadLines = 0>
void packed_tile_of(Index rows, const TileOperands<T, S>& op) {
  using Shape = TileShape<T>;
  constexpr auto tiles = []<Index... R>(std::integer_sequence<Index, R...>) {
    return std::array{&packed_tile<R + 1, Shape::vectors, AheadLines, T, S>...};
  }
  (std::make_integer_sequence<Index, Shape::rows>{});
  tiles[static_cast<std::size_t>(rows - 1)](op);
}

/// x [rows, depth] in rows `stride` apart -> panel [depth][rows]. `panel` needs room for `pack_slack` numbers more.
template <class T>
inline constexpr Index pack_slack = Simd<T>::width;

template <class T, class S>
void pack_rows(const S* x, Index stride, Index rows, Index depth, T* panel) {
  using V = Simd<T>;
  constexpr Index width = V::width;
  Index done = 0;  // rows packed
  if (rows > 1)
    for (; rows - done >= width || (done == 0 && rows <= width); done += width) {
      // Fewer rows than lanes: a store runs into the next step's place, and that step's store follows.
      const Index some = std::min(width, rows);
      Index k = 0;
      for (; k + width <= depth; k += width) {
        typename V::Vec block[V::lanes];
        unroll<width>([&](auto i) { block[i] = i < some ? V::load(x + (done + i) * stride + k) : V::zero(); });
        V::transpose(block);
        unroll<width>([&](auto i) { V::store(panel + (k + i) * rows + done, block[i]); });
      }
      for (; k < depth; ++k)
        for (Index r = done; r < done + some; ++r) panel[k * rows + r] = static_cast<T>(x[r * stride + k]);
      if (rows < width) return;
    }
  for (Index r = done; r < rows; ++r)
    for (Index k = 0; k < depth; ++k) panel[k * rows + r] = static_cast<T>(x[r * stride + k]);
}

}  // namespace qkv::inline QKV_ABI::kernel

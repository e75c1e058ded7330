// product/narrow_tile.hpp — the tile of product/register_tile.hpp with words in place of numbers: scores of keys in panels.
//
//     c(r, j) = scale(r) · (offset(r) + Σ_k a(k, r)·b(k, j))        r < Rows,  j < Vectors·width
//
// A word of `a`, a row of keys, is broadcast; words of `b` are a vector, one per query. A Dot says how words are multiplied,
// where a sum begins and how it ends: Bf16Dot, Int8Dot or Int16Dot (simd/narrow.hpp).
//
// Before: product/tied_product.hpp   Next: product/register_tile.hpp
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <utility>

#include "../simd/narrow.hpp"
#include "register_tile.hpp"

#include "../base/warnings_off.hpp"

namespace qkv { inline namespace QKV_ABI { namespace kernel {

struct WordOperands {
  Index depth = 0;          // words
  const Word* a = nullptr;  // [depth][Rows]
  const Word* b = nullptr;  // [depth][b_step]
  Index b_step = 0;
  Index row = 0;                         // of offset and scale, where r = 0
  const std::int32_t* offset = nullptr;  // [rows]: Int8Dot
  const float* scale = nullptr;          // [rows]: sums of integers
  float* c = nullptr;
  Index c_row = 0;
};

// By constant indices and without lambdas, as in product/register_tile.hpp: the sums stay in registers.
template <class Dot, Index Rows, Index Vectors, std::size_t... I, std::size_t... Vector>
EIGEN_ALWAYS_INLINE void word_tile(const WordOperands& op, std::index_sequence<I...>, std::index_sequence<Vector...>) {
  constexpr auto row_of = [](std::size_t i) { return static_cast<Index>(i) / Vectors; };
  constexpr auto lane_of = [](std::size_t i) { return static_cast<Index>(i) % Vectors * Dot::width; };
  typename Dot::Sum sum[] = {Dot::begin(op.offset, op.row + row_of(I))...};
  const Word* a = op.a;
  const Word* b = op.b;
  for (Index k = op.depth; k > 0; --k, a += Rows, b += op.b_step) {
    const Isa::Words row[] = {Dot::load(b + Index(Vector) * Dot::width)...};
    ((sum[I] = Dot::dot(sum[I], Dot::broadcast(a[row_of(I)]), row[I % sizeof...(Vector)])), ...);
  }
  (Simd<float>::store(op.c + row_of(I) * op.c_row + lane_of(I), Dot::end(sum[I], op.scale, op.row + row_of(I))), ...);
}

/// `tiles` tiles of Rows rows one after another; a moves on with them, c by c_next.
template <class Dot, Index Rows, Index Vectors>
void word_tiles(WordOperands op, Index tiles, Index a_next, Index c_next, FetchList& fetch) {
  for (; tiles > 0; --tiles, op.a += a_next, op.c += c_next, op.row += Rows) {
    word_tile<Dot, Rows, Vectors>(op, std::make_index_sequence<std::size_t(Rows * Vectors)>{},
                                  std::make_index_sequence<std::size_t(Vectors)>{});
    fetch.next();
  }
}

/// One tile, of a multiple of TileShape<float>::tail_step rows.
template <class Dot>
void word_tile_of(Index rows, const WordOperands& op, FetchList& fetch) {
  using Shape = TileShape<float>;
  constexpr auto tiles = []<Index... R>(std::integer_sequence<Index, R...>) {
    return std::array{&word_tiles<Dot, (R + 1) * Shape::tail_step, Shape::vectors>...};
  }
  (std::make_integer_sequence<Index, Shape::rows / Shape::tail_step>{});
  tiles[static_cast<std::size_t>(rows / Shape::tail_step - 1)](op, 1, 0, 0, fetch);
}

}}}  // namespace qkv::QKV_ABI::kernel

#include "../base/warnings_on.hpp"

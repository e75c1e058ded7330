// kernel/tiled/packed_kv.hpp — one kv head's keys and values as the tiled kernel reads them, packed once.
//
//     block b: the keys at positions [first, first + tile_keys) of the grid, `count` columns up to the last one held
//
//       keys    [tile][head_dim][height]     tile t holds columns t·R … t·R + height-1;   height ≤ R rows of registers
//       values  [slice][count][height]       slice x holds features x·R … x·R + height-1
//
// The last tile and the last slice may be lower, but are a multiple of TileShape::tail_step high: rows past the keys held
// are undefined, features past v_head_dim are zeros.
//
// In narrow arithmetic (kernel/arithmetic.hpp) a number is a word: 2 (bfloat16, int16) or 4 (int8) features of a key; of a value
// two keys. Values of int8 are restored and rounded to bfloat16, or stay integers: four keys to a word of int8, two to one
// of int16.
//
// The broadcast operand of both products lies in memory in the order in which it is read. Columns that hold no row (gaps
// between runs) are zeros. A value row that is not finite is packed as zeros and listed, since 0·NaN is NaN.
//
// Before: kernel/tiled/block_mask.hpp   Next: kernel/tiled/pack_kv.hpp
#pragma once

#include <algorithm>
#include <cstdint>
#include <span>

#include "../../product/register_tile.hpp"
#include "../../workspace.hpp"
#include "../arithmetic.hpp"
#include "../task.hpp"

namespace qkv { inline namespace QKV_ABI { namespace kernel {

/// Keys of a block; a multiple of every tile height.
inline constexpr Index tile_keys = 192;

/// One block of the grid that holds at least one key.
struct KeyBlock {
  GridCell cell;
  Index begin = 0;       // first column held
  Index count = 0;       // one past the last column held
  Index not_finite = 0;  // value rows that are not
  bool gaps = false;     // a column in between holds no row
  bool packed = false;
};

/// Packed keys and values of one kv head.
template <class A>
struct PackedKv {
  using T = typename A::Scalar;
  using Number = typename A::Number;
  static constexpr Index rows = TileShape<T>::rows;
  static_assert(tile_keys % rows == 0 && tile_keys % 2 == 0);

  KeyBlock* blocks = nullptr;
  Number *keys = nullptr, *values = nullptr;
  Index* not_finite = nullptr;          // [blocks][tile_keys]: columns
  float* key_scales = nullptr;          // integer keys [blocks][tile_keys]
  std::int32_t* key_offsets = nullptr;  // int8 keys [blocks][tile_keys]: -128·Σ row
  float* value_scales = nullptr;        // integer weights [blocks][tile_keys]: zero where not finite
  Index head_dim = 0, v_head_dim = 0;

  /// Scratch for `n_blocks` blocks; a carver without memory only counts.
  static PackedKv carve(detail::Carver& carver, Index n_blocks, Index head_dim, Index v_head_dim) {
    PackedKv p;
    p.head_dim = head_dim, p.v_head_dim = v_head_dim;
    p.blocks = carver.take<KeyBlock>(n_blocks);  // first: where the blocks are does not depend on A
    p.keys = carver.take<Number>(n_blocks * p.key_stride());
    p.values = carver.take<Number>(n_blocks * p.value_stride());
    p.not_finite = carver.take<Index>(n_blocks * tile_keys);
    if constexpr (A::integer_keys) p.key_scales = carver.take<float>(n_blocks * tile_keys);
    if constexpr (A::int8_keys) p.key_offsets = carver.take<std::int32_t>(n_blocks * tile_keys);
    if constexpr (A::integer_weights) p.value_scales = carver.take<float>(n_blocks * tile_keys);
    return p;
  }

  Index key_depth() const { return (head_dim + A::features - 1) / A::features; }
  /// From one block to the next. Packing runs over the end of a block by up to pack_slack, and blocks are packed in any
  /// order.
  Index key_stride() const { return tile_keys * key_depth() + pack_slack<T>; }
  Number* block_keys(Index b) const { return keys + b * key_stride(); }
  /// Features of the slices together.
  Index value_rows() const { return TileShape<T>::tail_height(v_head_dim); }
  Index value_stride() const { return tile_keys / A::keys * value_rows() + pack_slack<T>; }
  Number* block_values(Index b) const { return values + b * value_stride(); }
};

/// How many kv heads are packed at a time: as many as fit 32 MB, so that threads meet seldom and memory stays bounded.
inline Index heads_at_once(std::size_t bytes_per_head, Index kv_heads) {
  constexpr std::size_t budget = std::size_t{32} << 20;
  return std::clamp<Index>(static_cast<Index>(budget / std::max<std::size_t>(bytes_per_head, 1)), 1, kv_heads);
}

/// Scratch of the packed keys and values of one kv head.
template <class A>
std::size_t packed_kv_bytes(Index n_blocks, Index head_dim, Index v_head_dim) {
  detail::Carver carver(nullptr);
  PackedKv<A>::carve(carver, n_blocks, head_dim, v_head_dim);
  return carver.used();
}

/// Fills the blocks' descriptions, in order; `first_row`: logical row of the first.
inline void describe_blocks(KeyBlock* block, std::span<const ByteRun> runs, Index first_row) {
  for (const GridCell& cell : GridCells(runs, tile_keys, first_row)) {
    *block = {.cell = cell, .begin = tile_keys};
    Index held = 0;
    for (const GridPiece& piece : GridPieces(runs, tile_keys, cell)) {
      block->begin = std::min(block->begin, piece.column);
      block->count = piece.column + piece.count;
      held += piece.count;
    }
    block->gaps = held < block->count;
    ++block;
  }
}

/// Where packed blocks come from: rows of whatever storage.
template <class A>
struct BlockSource {
  using T = typename A::Scalar;

  ByteRows rows;
  const void* keys = nullptr;  // KeyRows<S>
  void (*pack_block)(const void* keys, const PackedKv<A>&, Index kv_head, Index b) = nullptr;
  /// Feature x of a value row.
  T (*value)(const void* keys, Index kv_head, std::size_t run, Index row, Index x) = nullptr;

  void pack(const PackedKv<A>& panels, Index kv_head, Index b) const { pack_block(keys, panels, kv_head, b); }
};

}}}  // namespace qkv::QKV_ABI::kernel

// kernel/panels.hpp — one kv head's keys and values as the tiled kernel reads them: widened to T and packed once.
//
//     block b: the keys at positions [first, first + tile_keys) of the grid, `count` columns up to the last one held
//
//       keys    [tile][head_dim][height]     tile t holds columns t·R … t·R + height-1;   height ≤ R rows of registers
//       values  [slice][count][height]       slice x holds features x·R … x·R + height-1
//
// The broadcast operand of both products then lies in memory in the order in which it is read. Columns that hold no row
// (gaps between runs) are zeros. A value row that is not finite is packed as zeros and listed, because a weight of zero
// must not meet it: 0·NaN is NaN.
//
// Before: kernel/reference.hpp   Next: kernel/lanes.hpp
#pragma once

#include <algorithm>

#include "../workspace.hpp"
#include "register_tile.hpp"
#include "task.hpp"

namespace qkv::inline QKV_ABI::kernel {

/// Keys of a block; a multiple of every tile height.
inline constexpr Index tile_keys = 192;

/// One block of the grid that holds at least one key.
struct KeyBlock {
  Index first = 0;      // position of column 0
  Index begin = 0;      // first column held
  Index count = 0;      // one past the last column held
  std::size_t run = 0;  // where its rows begin: run, logical row of that run's first row, row in the run
  Index base = 0, row = 0;
  Index not_finite = 0;  // value rows that are not
  bool gaps = false;     // a column in between holds no row
};

/// Packed keys and values of one kv head.
template <class T>
struct Panels {
  static constexpr Index rows = TileShape<T>::rows;
  static_assert(tile_keys % rows == 0);

  KeyBlock* blocks = nullptr;
  T *keys = nullptr, *values = nullptr;
  Index* not_finite = nullptr;  // [blocks][tile_keys]: columns
  Index head_dim = 0, v_head_dim = 0;

  /// Numbers of scratch for `n_blocks` blocks; `base` null: only counts.
  static Panels carve(detail::Carver& carver, Index n_blocks, Index head_dim, Index v_head_dim) {
    Panels p;
    p.blocks = carver.take<KeyBlock>(n_blocks);
    p.keys = carver.take<T>(n_blocks * p.key_stride(head_dim));
    p.values = carver.take<T>(n_blocks * tile_keys * v_head_dim);
    p.not_finite = carver.take<Index>(n_blocks * tile_keys);
    p.head_dim = head_dim, p.v_head_dim = v_head_dim;
    return p;
  }

  /// From one block to the next. Packing runs over the end of a block by up to pack_slack, and blocks are packed in any
  /// order.
  static Index key_stride(Index head_dim) { return tile_keys * head_dim + pack_slack<T>; }
  T* block_keys(Index b) const { return keys + b * key_stride(head_dim); }
  T* block_values(Index b) const { return values + b * tile_keys * v_head_dim; }
};

/// How many kv heads are packed at a time: as many as fit 32 MB, so that threads meet seldom and memory stays bounded.
inline Index heads_at_once(std::size_t bytes_per_head, Index kv_heads) {
  constexpr std::size_t budget = std::size_t{32} << 20;
  return std::clamp<Index>(static_cast<Index>(budget / std::max<std::size_t>(bytes_per_head, 1)), 1, kv_heads);
}

/// Blocks of the grid that hold a key of `keys`.
template <StorageType S>
Index count_blocks(const KeyRows<S>& keys) {
  Index n = 0;
  for_each_chunk(keys, tile_keys, [&](Index, std::size_t, Index, Index) { ++n; });
  return n;
}

/// Fills block b's description, in order.
template <class T, StorageType S>
void describe_blocks(const Panels<T>& panels, const KeyRows<S>& keys) {
  KeyBlock* block = panels.blocks;
  for_each_chunk(keys, tile_keys, [&](Index first, std::size_t r, Index base, Index row) {
    *block = {.first = first, .begin = tile_keys, .run = r, .base = base, .row = row};
    Index held = 0;
    for_each_piece(keys, tile_keys, first, r, base, row,
                   [&](const KeyRun<S>&, Index, Index, Index count, Index column) {
                     block->begin = std::min(block->begin, column);
                     block->count = column + count;
                     held += count;
                   });
    block->gaps = held < block->count;
    ++block;
  });
}

/// Packs block b of kv head `kv_head`.
template <class T, StorageType S>
void pack_block(const Panels<T>& panels, const KeyRows<S>& keys, Index kv_head, Index b) {
  constexpr Index R = Panels<T>::rows;
  KeyBlock& block = panels.blocks[b];
  const Index d = panels.head_dim, dv = panels.v_head_dim, count = block.count;
  T* const k = panels.block_keys(b);
  T* const v = panels.block_values(b);
  block.not_finite = 0;
  if (block.gaps) {
    std::fill_n(k, count * d, T(0));
    std::fill_n(v, count * dv, T(0));
  }
  for_each_piece(keys, tile_keys, block.first, block.run, block.base, block.row,
                 [&](const KeyRun<S>& run, Index, Index run_row, Index n, Index column) {
                   for (Index i = 0; i < n;) {  // tile by tile
                     const Index c = column + i, tile = c / R, height = std::min(R, count - tile * R);
                     const Index some = std::min(n - i, tile * R + height - c);
                     T* const to = k + tile * R * d;
                     const S* const from = keys.key(run, kv_head, run_row + i);
                     if (some == height && !has_row_scale<S>) {
                       pack_rows(from, keys.key_row_stride, height, d, to);
                     } else {
                       for (Index j = 0; j < some; ++j) {
                         const T scale = static_cast<T>(keys.key_scale(run, kv_head, run_row + i + j));
                         for (Index x = 0; x < d; ++x)
                           to[x * height + c + j - tile * R] =
                               static_cast<T>(from[j * keys.key_row_stride + x]) * scale;
                       }
                     }
                     i += some;
                   }
                   for (Index i = 0; i < n; ++i) {
                     const S* const from = keys.value(run, kv_head, run_row + i);
                     const T scale = static_cast<T>(keys.value_scale(run, kv_head, run_row + i));
                     const Index c = column + i;
                     T zero = 0;  // 0·x is 0 for finite x and NaN otherwise
                     for (Index slice = 0; slice < dv; slice += R) {
                       const Index height = std::min(R, dv - slice);
                       T* const to = v + slice * count + c * height;
                       for (Index x = 0; x < height; ++x) {
                         T value = static_cast<T>(from[slice + x]);
                         if constexpr (has_row_scale<S>) value *= scale;
                         to[x] = value;
                         zero += 0 * value;
                       }
                     }
                     if (zero == 0) continue;
                     panels.not_finite[b * tile_keys + block.not_finite++] = c;
                     for (Index slice = 0; slice < dv; slice += R) {
                       const Index height = std::min(R, dv - slice);
                       std::fill_n(v + slice * count + c * height, height, T(0));
                     }
                   }
                 });
}

}  // namespace qkv::inline QKV_ABI::kernel

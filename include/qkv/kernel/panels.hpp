// kernel/panels.hpp — one kv head's keys and values as the tiled kernel reads them, packed once.
//
//     block b: the keys at positions [first, first + tile_keys) of the grid, `count` columns up to the last one held
//
//       keys    [tile][head_dim][height]     tile t holds columns t·R … t·R + height-1;   height ≤ R rows of registers
//       values  [slice][count][height]       slice x holds features x·R … x·R + height-1
//
// In narrow arithmetic (kernel/words.hpp) a word takes the place of a number: 2 (bfloat16) or 4 (int8) features of a key,
// two keys of a value. Values of int8 are restored and rounded to bfloat16, or stay as they are, four keys to a word.
//
// The broadcast operand of both products then lies in memory in the order in which it is read. Columns that hold no row
// (gaps between runs) are zeros. A value row that is not finite is packed as zeros and listed, because a weight of zero
// must not meet it: 0·NaN is NaN.
//
// Before: kernel/reference.hpp   Next: kernel/query_panels.hpp
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "../workspace.hpp"
#include "register_tile.hpp"
#include "task.hpp"
#include "words.hpp"

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
  bool packed = false;
};

/// In which numbers the tiled kernel multiplies.
template <class T>
struct Exact {  // everything widened to T
  static constexpr const char* name = "";
  using Scalar = T;
  using Number = T;
  static constexpr bool words = false, quads = false, bytes = false;
  static constexpr Index features = 1, keys = 1;  // in one number
};
struct Pairs {  // bfloat16 throughout, sums in float
  static constexpr const char* name = " multiplied in bf16";
  using Scalar = float;
  using Number = Word;
  static constexpr bool words = true, quads = false, bytes = false;
  static constexpr Index features = 2, keys = 2;
};
struct Quads {  // int8 queries and keys, bfloat16 weights and values
  static constexpr const char* name = " multiplied in int8, values in bf16";
  using Scalar = float;
  using Number = Word;
  static constexpr bool words = true, quads = true, bytes = false;
  static constexpr Index features = 4, keys = 2;
};
struct Bytes {  // int8 throughout; weights in 8 bits: kernel/panel_softmax.hpp
  static constexpr const char* name = " multiplied in int8";
  using Scalar = float;
  using Number = Word;
  static constexpr bool words = true, quads = true, bytes = true;
  static constexpr Index features = 4, keys = 4;
};

/// The arithmetic in which keys stored as S are multiplied unless exact is asked for.
template <class T, StorageType S>
using NarrowArithmetic = std::conditional_t<
    !words_available || !std::is_same_v<T, float>, Exact<T>,
    std::conditional_t<std::is_same_v<S, bfloat16>, Pairs, std::conditional_t<has_row_scale<S>, Quads, Exact<T>>>>;

/// Packed keys and values of one kv head.
template <class A>
struct Panels {
  using T = typename A::Scalar;
  using Number = typename A::Number;
  static constexpr Index rows = TileShape<T>::rows;
  static_assert(tile_keys % rows == 0 && tile_keys % 2 == 0);

  KeyBlock* blocks = nullptr;
  Number *keys = nullptr, *values = nullptr;
  Index* not_finite = nullptr;                             // [blocks][tile_keys]: columns
  float* key_scales = nullptr;                             // Quads [blocks][tile_keys]
  std::int32_t* key_offsets = nullptr;                     // Quads [blocks][tile_keys]: -128·Σ row
  float *value_logs = nullptr, *value_inverses = nullptr;  // Bytes [blocks][tile_keys]: log2 and inverse of the scale
  Index head_dim = 0, v_head_dim = 0;

  /// Scratch for `n_blocks` blocks; a carver without memory only counts.
  static Panels carve(detail::Carver& carver, Index n_blocks, Index head_dim, Index v_head_dim) {
    Panels p;
    p.head_dim = head_dim, p.v_head_dim = v_head_dim;
    p.blocks = carver.take<KeyBlock>(n_blocks);
    p.keys = carver.take<Number>(n_blocks * p.key_stride());
    p.values = carver.take<Number>(n_blocks * p.value_stride());
    p.not_finite = carver.take<Index>(n_blocks * tile_keys);
    if constexpr (A::quads) {
      p.key_scales = carver.take<float>(n_blocks * tile_keys);
      p.key_offsets = carver.take<std::int32_t>(n_blocks * tile_keys);
      if constexpr (A::bytes) {
        p.value_logs = carver.take<float>(n_blocks * tile_keys);
        p.value_inverses = carver.take<float>(n_blocks * tile_keys);
      }
    }
    return p;
  }

  Index key_depth() const { return (head_dim + A::features - 1) / A::features; }
  /// From one block to the next. Packing runs over the end of a block by up to pack_slack, and blocks are packed in any
  /// order.
  Index key_stride() const { return tile_keys * key_depth() + pack_slack<T>; }
  Number* block_keys(Index b) const { return keys + b * key_stride(); }
  Index value_stride() const { return tile_keys / A::keys * v_head_dim + pack_slack<T>; }
  Number* block_values(Index b) const { return values + b * value_stride(); }
};

/// Blocks of the grid that hold a key of `keys`.
template <StorageType S>
Index count_blocks(const KeyRows<S>& keys) {
  Index n = 0;
  for_each_chunk(keys, tile_keys, [&](Index, std::size_t, Index, Index) { ++n; });
  return n;
}

/// How many kv heads are packed at a time: as many as fit 32 MB, so that threads meet seldom and memory stays bounded.
inline Index heads_at_once(std::size_t bytes_per_head, Index kv_heads) {
  constexpr std::size_t budget = std::size_t{32} << 20;
  return std::clamp<Index>(static_cast<Index>(budget / std::max<std::size_t>(bytes_per_head, 1)), 1, kv_heads);
}

/// Scratch of the packed keys and values of one kv head.
template <class A>
std::size_t panel_bytes(Index n_blocks, Index head_dim, Index v_head_dim) {
  detail::Carver carver(nullptr);
  Panels<A>::carve(carver, n_blocks, head_dim, v_head_dim);
  return carver.used();
}

/// Fills the blocks' descriptions, in order.
template <class A, StorageType S>
void describe_blocks(const Panels<A>& panels, const KeyRows<S>& keys) {
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

/// Packs one block of one kv head.
template <class A, StorageType S>
class BlockPacker {
  using T = typename A::Scalar;
  using V = Simd<T>;
  static constexpr Index R = Panels<A>::rows;

 public:
  BlockPacker(const Panels<A>& panels, const KeyRows<S>& keys, Index kv_head, Index b)
      : panels_(panels), keys_(keys), kv_head_(kv_head), b_(b), block_(panels.blocks[b]) {}

  void run() {
    block_.not_finite = 0;
    if (block_.gaps) {
      std::fill_n(panels_.block_keys(b_), panels_.key_stride(), 0);
      if constexpr (A::quads) {
        std::fill_n(panels_.key_scales + b_ * tile_keys, tile_keys, 0.0F);
        std::fill_n(panels_.key_offsets + b_ * tile_keys, tile_keys, 0);
      }
    }
    Source sources[std::size_t(tile_keys)];
    for_each_piece(
        keys_, tile_keys, block_.first, block_.run, block_.base, block_.row,
        [&](const KeyRun<S>& run, Index, Index row, Index n, Index column) {
          for (Index i = 0; i < n;) i += pack_keys(run, row + i, n - i, column + i);
          for (Index i = 0; i < n; ++i)
            sources[column + i] = {keys_.value(run, kv_head_, row + i), keys_.value_scale(run, kv_head_, row + i)};
        });
    drop_not_finite(sources);
    if constexpr (A::bytes)
      for (Index c = 0; c < block_.count; ++c) {
        // Rows of zeros count for the sum of the weights alone: a scale so small that they never fill the 8 bits.
        const float scale = sources[c].row && sources[c].scale > 0x1p-90F ? sources[c].scale : 0x1p-90F;
        panels_.value_logs[b_ * tile_keys + c] = std::log2(scale);
        panels_.value_inverses[b_ * tile_keys + c] = 1 / scale;
      }
    pack_values(sources);
    block_.packed = true;
  }

 private:
  /// Up to n keys from column c on, inside one tile; returns how many.
  Index pack_keys(const KeyRun<S>& run, Index row, Index n, Index c) {
    const Index tile = c / R, height = std::min(R, block_.count - tile * R), some = std::min(n, tile * R + height - c);
    const Index d = panels_.head_dim, stride = keys_.key_row_stride;
    const S* const from = keys_.key(run, kv_head_, row);
    auto* const to = panels_.block_keys(b_) + tile * R * panels_.key_depth();
#ifdef QKV_DETAIL_WORDS
    if constexpr (A::words) {
      constexpr auto size = static_cast<Index>(sizeof(S));
      if (some == height) {
        pack_words(from, stride * size, height, d * size, to);
      } else {  // a tile whose rows lie in several runs
        for (Index j = 0; j < some; ++j)
          for (Index w = 0; w < panels_.key_depth(); ++w) {
            Word word = 0;
            std::memcpy(&word, from + j * stride + w * A::features,
                        static_cast<std::size_t>(std::min(A::features, d - w * A::features) * size));
            to[w * height + c + j - tile * R] = word;
          }
      }
      if constexpr (A::quads)
        for (Index j = 0; j < some; ++j) {
          std::int32_t sum = 0;
          for (Index x = 0; x < d; ++x) sum += from[j * stride + x];
          panels_.key_offsets[b_ * tile_keys + c + j] = -128 * sum;
          panels_.key_scales[b_ * tile_keys + c + j] = keys_.key_scale(run, kv_head_, row + j);
        }
      return some;
    }
#endif
    if constexpr (!A::words) {
      if (some == height && !has_row_scale<S>) {
        pack_rows(from, stride, height, d, to);
      } else {
        for (Index j = 0; j < some; ++j) {
          const T scale = static_cast<T>(keys_.key_scale(run, kv_head_, row + j));
          for (Index x = 0; x < d; ++x)
            to[x * height + c + j - tile * R] = static_cast<T>(from[j * stride + x]) * scale;
        }
      }
    }
    return some;
  }

  /// A value row; none: zeros.
  struct Source {
    const S* row = nullptr;
    float scale = 1;
  };

  typename V::Vec value(const Source& from, Index x) const {
    if (!from.row) return V::zero();
    const Index left = panels_.v_head_dim - x;
    const auto v = left >= V::width ? V::load(from.row + x) : V::load_n(from.row + x, left);
    return has_row_scale<S> ? V::mul(v, V::broadcast(static_cast<T>(from.scale))) : v;
  }

#ifdef QKV_DETAIL_WORDS
  __m128i bytes(const Source& from, Index x) const {
    const Index left = panels_.v_head_dim - x;
    if (!from.row || left <= 0) return _mm_setzero_si128();
    if (left >= 16) return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from.row + x));
    return _mm_maskz_loadu_epi8(static_cast<__mmask16>((1U << left) - 1U), from.row + x);
  }
#endif

  /// Rows with a number that is not finite are listed and become zeros: 0·x is 0 for finite x and NaN otherwise.
  void drop_not_finite(Source (&sources)[std::size_t(tile_keys)]) {
    const auto zeros = [&](const Source& from, typename V::Vec sum) {
      if constexpr (has_row_scale<S>)
        return V::fma(V::zero(), V::broadcast(static_cast<T>(from.row ? from.scale : 0)), sum);
      for (Index x = 0; x < panels_.v_head_dim; x += V::width) sum = V::fma(V::zero(), value(from, x), sum);
      return sum;
    };
    auto w = V::zero(), x = w, y = w, z = w;  // four chains, since one multiply-add waits for the one before
    Index row = 0;
    for (; row + 4 <= block_.count; row += 4) {
      w = zeros(sources[row], w);
      x = zeros(sources[row + 1], x);
      y = zeros(sources[row + 2], y);
      z = zeros(sources[row + 3], z);
    }
    for (; row < block_.count; ++row) w = zeros(sources[row], w);
    if (V::sum_lanes(V::add(V::add(w, x), V::add(y, z))) == 0) return;
    for (Index c = 0; c < block_.count; ++c) {
      if (V::sum_lanes(zeros(sources[c], V::zero())) == 0) continue;
      panels_.not_finite[b_ * tile_keys + block_.not_finite++] = c;
      sources[c] = {};
    }
  }

  /// Slice by slice in ascending order: a store of a whole register may run into the next column's place, which follows.
  void pack_values(const Source (&sources)[std::size_t(tile_keys)]) const {
    const Index dv = panels_.v_head_dim, depth = (block_.count + A::keys - 1) / A::keys;
    for (Index slice = 0; slice < dv; slice += R) {
      const Index height = std::min(R, dv - slice);
      auto* to = panels_.block_values(b_) + slice * depth;
      for (Index k = 0; k < depth; ++k, to += height)
        for (Index x = 0; x < height; x += V::width) {
          if constexpr (!A::words) V::store(to + x, value(sources[k], slice + x));
#ifdef QKV_DETAIL_WORDS
          if constexpr (A::bytes)  // columns 4k … 4k + 3 side by side
            store_words(to + x, to_quads(bytes(sources[4 * k], slice + x), bytes(sources[4 * k + 1], slice + x),
                                         bytes(sources[4 * k + 2], slice + x), bytes(sources[4 * k + 3], slice + x)));
          else if constexpr (A::words)  // columns 2k and 2k + 1
            store_words(to + x, to_pairs(value(sources[2 * k], slice + x), value(sources[2 * k + 1], slice + x)));
#endif
        }
    }
  }

  const Panels<A>& panels_;
  const KeyRows<S>& keys_;
  Index kv_head_, b_;
  KeyBlock& block_;
};

}  // namespace qkv::inline QKV_ABI::kernel

// kernel/tiled/pack_kv.hpp — packs a block of keys and values into the panels of kernel/tiled/packed_kv.hpp.
//
//     keys      a tile of rows at a time, transposed: [head_dim][height], column c of tile t is number c - t·R of every step
//     values    a slice of features at a time, rows one after another; narrow ones two or four rows to a word
//
// A block that one run holds is packed from where its rows lie; gaps and tiles whose rows lie in several runs go row by row.
//
// Before: kernel/tiled/packed_kv.hpp   Next: kernel/tiled/pack_queries.hpp
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "packed_kv.hpp"

namespace qkv { inline namespace QKV_ABI { namespace kernel {

/// Packs one block of one kv head.
template <class A, StorageType S>
class BlockPacker {
  using T = typename A::Scalar;
  using V = Simd<T>;
  using Shape = TileShape<T>;
  static constexpr Index R = PackedKv<A>::rows;

 public:
  BlockPacker(const PackedKv<A>& panels, const KeyRows<S>& keys, Index kv_head, Index b)
      : panels_(panels), keys_(keys), kv_head_(kv_head), b_(b), block_(panels.blocks[b]) {}

  void run() {
    block_.not_finite = 0;
    if (block_.gaps) {
      std::fill_n(panels_.block_keys(b_), panels_.key_stride(), 0);
      if constexpr (A::integer_keys) std::fill_n(panels_.key_scales + b_ * tile_keys, tile_keys, 0.0F);
      if constexpr (A::int8_keys) std::fill_n(panels_.key_offsets + b_ * tile_keys, tile_keys, 0);
    }
    Source sources[std::size_t(tile_keys)];
    for (const GridPiece& piece : GridPieces(keys_.runs, tile_keys, block_.cell)) {
      const KeyRun<S>& run = keys_.runs[piece.run];
      for (Index i = 0; i < piece.count;) i += pack_keys(run, piece.row + i, piece.count - i, piece.column + i);
      for (Index i = 0; i < piece.count; ++i)
        sources[piece.column + i] = {keys_.value(run, kv_head_, piece.row + i),
                                     keys_.value_scale(run, kv_head_, piece.row + i)};
    }
    drop_not_finite(sources);
    if constexpr (A::integer_weights)
      for (Index c = 0; c < block_.count; ++c)
        panels_.value_scales[b_ * tile_keys + c] = sources[c].row ? sources[c].scale : 0.0F;
    pack_values(sources);
    block_.packed = true;
  }

 private:
  /// Up to n keys from column c on, inside one tile; returns how many.
  Index pack_keys(const KeyRun<S>& run, Index row, Index n, Index c) {
    const Index tile = c / R, held = std::min(R, block_.count - tile * R), some = std::min(n, tile * R + held - c);
    const Index height = Shape::tail_height(held);
    const Index d = panels_.head_dim, stride = keys_.key_row_stride;
    const S* const from = keys_.key(run, kv_head_, row);
    auto* const to = panels_.block_keys(b_) + tile * R * panels_.key_depth();
    if constexpr (A::narrow && !A::int16_keys) {
      constexpr auto size = static_cast<Index>(sizeof(S));
      if (some == held) {
        pack_words(from, stride * size, held, height, d * size, to);
      } else {  // a tile whose rows lie in several runs
        for (Index j = 0; j < some; ++j)
          for (Index w = 0; w < panels_.key_depth(); ++w) {
            Word word = 0;
            std::memcpy(&word, from + j * stride + w * A::features,
                        static_cast<std::size_t>(std::min(A::features, d - w * A::features) * size));
            to[w * height + c + j - tile * R] = word;
          }
      }
      if constexpr (A::int8_keys)
        for (Index j = 0; j < some; ++j) {
          std::int32_t sum = 0;
          for (Index x = 0; x < d; ++x) sum += from[j * stride + x];
          panels_.key_offsets[b_ * tile_keys + c + j] = -128 * sum;
          panels_.key_scales[b_ * tile_keys + c + j] = keys_.key_scale(run, kv_head_, row + j) / A::headroom;
        }
      return some;
    }
    if constexpr (A::int16_keys) {
      if (some == held) {
        pack_int16(from, stride, held, height, d, to);
      } else {  // a tile whose rows lie in several runs
        for (Index j = 0; j < some; ++j)
          for (Index x = 0; x < d; x += 2) {
            const S* const two = from + j * stride + x;
            to[x / 2 * height + c + j - tile * R] = word_of_int16(two[0], x + 1 < d ? two[1] : S(0));
          }
      }
      for (Index j = 0; j < some; ++j)
        panels_.key_scales[b_ * tile_keys + c + j] = keys_.key_scale(run, kv_head_, row + j) / A::headroom;
    }
    if constexpr (!A::narrow) {
      if (some == held && !has_row_scale<S>) {
        pack_rows(from, stride, held, height, d, to);
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
    const Index left = std::max<Index>(panels_.v_head_dim - x, 0);
    const auto v = left >= V::width ? V::load(from.row + x) : V::load_n(from.row + x, left);
    return has_row_scale<S> ? V::mul(v, V::broadcast(static_cast<T>(from.scale))) : v;
  }

  /// Features [x, x + lanes) as they are stored.
  Isa::Bytes bytes(const Source& from, Index x) const {
    return Isa::load_int8_n(from.row ? from.row + x : nullptr, from.row ? panels_.v_head_dim - x : 0);
  }

  /// Rows with a number that is not finite as it is multiplied are listed and become zeros: 0·x is 0 for finite x and NaN
  /// otherwise.
  void drop_not_finite(Source (&sources)[std::size_t(tile_keys)]) {
    const auto zeros = [&](const Source& from, typename V::Vec sum) {
      if constexpr (has_row_scale<S>)
        return V::fma(V::zero(), V::broadcast(static_cast<T>(from.row ? from.scale : 0) * T(A::restored)), sum);
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
      const Index height = Shape::tail_height(std::min(R, dv - slice));
      auto* to = panels_.block_values(b_) + slice * depth;
      for (Index k = 0; k < depth; ++k, to += height)
        for (Index x = 0; x < height; x += V::width) {
          if constexpr (!A::narrow)
            V::store(to + x, value(sources[k], slice + x));
          else if constexpr (A::int8_values)  // columns 4k … 4k + 3 side by side
            Isa::store_words(
                to + x, Isa::quad_int8(bytes(sources[4 * k], slice + x), bytes(sources[4 * k + 1], slice + x),
                                       bytes(sources[4 * k + 2], slice + x), bytes(sources[4 * k + 3], slice + x)));
          else if constexpr (A::int16_values)  // columns 2k and 2k + 1
            Isa::store_words(to + x,
                             Isa::pair_int8(bytes(sources[2 * k], slice + x), bytes(sources[2 * k + 1], slice + x)));
          else
            Isa::store_words(to + x,
                             Isa::pair_bf16(value(sources[2 * k], slice + x), value(sources[2 * k + 1], slice + x)));
        }
    }
  }

  const PackedKv<A>& panels_;
  const KeyRows<S>& keys_;
  Index kv_head_, b_;
  KeyBlock& block_;
};

/// Blocks packed from rows of storage S; keys and runs outlive it.
template <class A, StorageType S>
BlockSource<A> block_source(const KeyRows<S>& keys, const ByteRows& rows) {
  using T = typename A::Scalar;
  BlockSource<A> source{rows, &keys};
  source.pack_block = [](const void* of, const PackedKv<A>& panels, Index kv_head, Index b) {
    BlockPacker<A, S>(panels, *static_cast<const KeyRows<S>*>(of), kv_head, b).run();
  };
  source.value = [](const void* of, Index kv_head, std::size_t run, Index row, Index x) {
    const auto& all = *static_cast<const KeyRows<S>*>(of);
    return static_cast<T>(all.value(all.runs[run], kv_head, row)[x]) *
           static_cast<T>(all.value_scale(all.runs[run], kv_head, row));
  };
  return source;
}

}}}  // namespace qkv::QKV_ABI::kernel

// kernel/absorbed/queries.hpp — queries of absorbed latent attention, transposed: lanes are heads.
//
//     lane i is head i mod heads of token i / heads; panels of Vectors registers of lanes, in numbers of the arithmetic
//
//     exact    [panel][latent | rope][lanes] of T
//     bf16     [panel][half of that][lanes] of words, two bfloat16 each
//     int8     [panel][latent_dim / 4][lanes] of words, four bytes each: q ≈ (byte - 128) · max|q| / 127 per lane, that
//     keys     scale beside them; and the rope part [panel][rope_dim / 2][lanes] in pairs, or [panel][rope_dim][lanes] of
//              float where bfloat16 has no products
//     int16    [register of lanes][latent_dim / width][lane][width] of int16, q ≈ int16 · max|q| / largest_int16(latent_dim)
//     keys     per lane, and the rope part [panel][rope_dim][lanes] of float
//
// In parts lanes are cut into registers of width / parts lanes, one or two of them side by side (kernel/absorbed/split_heads.hpp):
// [registers side by side][steps][register][lane][part].
//
// Of the softmax scale only the sign is applied to them: queries that are exact in a narrow type stay exact.
//
// Before: kernel/absorbed/pack_rows.hpp   Next: kernel/absorbed/split_heads.hpp
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "../../cache/latent_memory.hpp"
#include "../../workspace.hpp"
#include "../pair_rule.hpp"
#include "grid.hpp"
#include "split_heads.hpp"
#include "tiles.hpp"

#include "../../base/warnings_off.hpp"

namespace qkv { inline namespace QKV_ABI { namespace kernel::absorbed {

/// The queries of one sequence, q [n_queries, heads·(latent_dim + rope_dim)], and the rule for their pairs with keys.
template <class T>
struct LaneTask {
  ConstView<T> q;
  Index latent_dim, rope_dim, heads;
  T scale;
  Index sequence, first_position;
  PairRule<T> rule;

  Index lanes() const { return q.rows() * heads; }
  Index width() const { return latent_dim + rope_dim; }
  const T* lane(Index i) const { return q.data() + i / heads * q.outerStride() + i % heads * width(); }
};

/// Lanes [first, first + n) of a task.
template <class A, Index Vectors>
class Queries {
  using T = typename A::Scalar;
  using V = Simd<T>;
  using Vec = typename V::Vec;
  using Number = typename A::Number;
  using RopeNumber = RopeDot::Number;
  static constexpr Index W = V::width;

 public:
  static constexpr Index panel = Vectors * W;

  Queries(const LaneTask<T>& task, detail::Carver& carver, Index first, Index n)
      : task_(task), first_(first), n_(n), layout_(lane_layout<A, Vectors>(task.heads, n)) {
    const Index slots = round_up(n, panel) * layout_.parts;
    q_ = carver.take<Number>(steps() * slots);
    if constexpr (A::integer_keys) {
      rope_ = carver.take<RopeNumber>(rope_steps() * slots);
      query_scale_ = carver.take<float>(slots);
    }
  }

  void load() {
    for (Index i = 0; i < n_; i += W) {
      for (Index j = 0; j < W; ++j) from_[j] = i + j < n_ ? task_.lane(first_ + i + j) : nullptr;
      load_register(i);
    }
  }

  const LaneLayout& layout() const { return layout_; }
  /// Numbers of a part of a lane, without a rope part kept apart; where the registers that begin with a lane lie.
  Index steps() const { return (depth() + layout_.parts - 1) / layout_.parts; }
  const Number* at(Index lane) const { return q_ + lane * layout_.parts * steps(); }
  Index rope_steps() const { return (rope_depth() + layout_.parts - 1) / layout_.parts; }
  const RopeNumber* rope(Index lane) const { return rope_ + lane * layout_.parts * rope_steps(); }
  const float* query_scale(Index lane) const { return query_scale_ + lane * layout_.parts; }

 private:
  Index depth() const {
    const Index features = A::integer_keys ? task_.latent_dim : task_.width();
    return (A::int16_keys ? round_up(features, 2 * W) : features + A::features - 1) / A::features;
  }
  Index rope_depth() const { return (task_.rope_dim + rope_features - 1) / rope_features; }
  /// Features [k, k + W) of lane i of the register that is loaded, with the sign of the scale; zeros past the end.
  Vec part(Index i, Index k, Index end) const {
    const T* const from = from_[i];
    if (from == nullptr || k >= end) return V::zero();
    const Vec v = k + W <= end ? V::load(from + k) : V::load_n(from + k, end - k);
    return task_.scale < 0 ? V::mul(v, V::broadcast(T(-1))) : v;
  }
  /// The quantisation step of lane i of register `lane`, max|q| / most, goes to query_scale_; returns its inverse.
  float find_scale(Index lane, Index i, float most) {
    Vec largest = V::zero(), nothing = V::zero();  // the latter is NaN where the lane is not finite
    for (Index k = 0; k < task_.latent_dim; k += W) {
      const Vec x = part(i, k, task_.latent_dim);
      largest = V::max(largest, V::max(x, V::sub(V::zero(), x)));
      nothing = V::fma(V::zero(), x, nothing);
    }
    const float amax = V::max_lanes(largest), nan = V::sum_lanes(nothing);
    const bool zeros = amax < 1e-30F;  // as good as zeros; smaller ones would leave the range of float
    std::fill_n(query_scale_ + (lane + i) * layout_.parts, layout_.parts, (zeros ? 0 : amax / most) + nan);
    return zeros ? 0 : most / amax;
  }
  /// Lanes [lane, lane + W), transposed to [number][lane of the panel].
  void load_register(Index lane) {
    if constexpr (!A::narrow) {
      transpose(q_, lane, depth(), [&](Index i, Index k) { return part(i, k, task_.width()); });
    } else if constexpr (!A::integer_keys) {
      transpose(reinterpret_cast<float*>(q_), lane, depth(),
                [&](Index i, Index k) { return bf16_part(i, 2 * k, task_.width()); });
    } else {
      const Index latent = task_.latent_dim;
      if constexpr (A::int16_keys) {
        for (Index i = 0; i < W; ++i) {
          const Vec factor = V::broadcast(find_scale(lane, i, static_cast<float>(largest_int16(latent))));
          const auto whole = [&](Index x) { return Isa::round_to_int32(V::mul(part(i, x, latent), factor)); };
          Word* to = q_ + lane * steps() + i * W;
          for (Index x = 0; x < latent; x += 2 * W, to += W * W)
            Isa::store_words(to, Isa::pack_int16(whole(x), whole(x + W)));
        }
      } else {
        float inverse[V::lanes];
        for (Index i = 0; i < W; ++i) inverse[i] = find_scale(lane, i, 127);
        transpose(reinterpret_cast<float*>(q_), lane, depth(), [&](Index i, Index k) {
          const auto number = [&](Index j) { return V::mul(part(i, 4 * k + j * W, latent), V::broadcast(inverse[i])); };
          return Isa::as_float(Isa::round_plus_128(number(0), number(1), number(2), number(3)));
        });
      }
      transpose(reinterpret_cast<float*>(rope_), lane, rope_depth(), [&](Index i, Index k) {
        if constexpr (Isa::bf16_products)
          return bf16_part(i, latent + 2 * k, task_.width());
        else
          return part(i, latent + k, task_.width());
      });
    }
  }
  /// Features [k, k + 2·W) as pairs of bfloat16.
  Vec bf16_part(Index i, Index k, Index end) const {
    return Isa::as_float(Isa::round_to_finite_bf16(part(i, k, end), part(i, k + W, end)));
  }
  template <class F>
  void transpose(T* to, Index lane, Index depth, F&& row) const {
    if (layout_.parts > 1) return transpose_in_parts(to, lane, depth, row);
    to += lane / panel * panel * depth + lane % panel;
    for (Index k = 0; k < depth; k += W) {
      Vec block[V::lanes];
      for (Index i = 0; i < W; ++i) block[i] = row(i, k);
      V::transpose(block);
      for (Index i = 0; i < std::min(W, depth - k); ++i) V::store(to + (k + i) * panel, block[i]);
    }
  }

  /// The same in parts.
  template <class F>
  void transpose_in_parts(T* to, Index lane, Index depth, F&& row) const {
    const Index parts = layout_.parts, n_steps = (depth + parts - 1) / parts;
    alignas(detail::cache_line) T numbers[std::size_t(W)];
    for (Index i = 0; i < W; ++i) {
      const Index at = (lane + i) * parts, all = layout_.registers * W;
      T* const first = to + at / all * all * n_steps + at % all;
      for (Index k = 0; k < depth; k += W) {
        V::store(numbers, row(i, k));
        for (Index j = 0; j < W && k + j < n_steps * parts; j += parts)
          std::memcpy(first + (k + j) / parts * all, numbers + j, static_cast<std::size_t>(parts) * sizeof(T));
      }
    }
  }

  const LaneTask<T>& task_;
  Index first_, n_;
  LaneLayout layout_;
  const T* from_[std::size_t(W)] = {};  // lanes of the register that is loaded
  Number* q_ = nullptr;
  RopeNumber* rope_ = nullptr;
  float* query_scale_ = nullptr;
};

}}}  // namespace qkv::QKV_ABI::kernel::absorbed

#include "../../base/warnings_on.hpp"

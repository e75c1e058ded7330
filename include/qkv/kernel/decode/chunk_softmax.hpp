// kernel/decode/chunk_softmax.hpp — from the scores of a chunk of keys to weights, for all queries of a kv head.
//
//     m' = max(m, max s)     p = e^(s-m')     l ← e^(m-m') l + Σ p     o ← e^(m-m') o
//
// Scores [n, 256] of n = n_queries · group_size queries become weights in place, -inf where a query does not see a key. The
// running maximum and sum: Milakov and Gimelshein 2018, "Online normalizer calculation for softmax", algorithm 3.
//
// All maxima come before all weights, so that the reductions across lanes of different queries overlap. Quantised rows: s is
// multiplied by the scale of its key before, p by the scale of its value after. Where values are multiplied in integers, p is
// quantised (kernel/decode/int8_values.hpp).
//
// Before: kernel/decode/head.hpp   Next: kernel/decode/state.hpp
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <numbers>

#include "../../softmax.hpp"
#include "int8_values.hpp"
#include "state.hpp"

#include "../../base/warnings_off.hpp"

namespace qkv { inline namespace QKV_ABI { namespace kernel {

/// Scores, then weights, of n queries; D says how they are multiplied.
template <class D>
class ChunkWeights {
  using T = typename D::Scalar;
  using V = Simd<T>;
  using Vec = typename V::Vec;
  using Sums = ValueSums<D>;
  static constexpr Index W = V::width;
  static constexpr bool scaled = has_row_scale<typename D::Key>;

 public:
  ChunkWeights(detail::Carver& carver, Index n)
      : n_(n),
        scores_(carver.take<T>(n * decode_chunk)),
        seen_(carver.take<T>(decode_chunk)),
        scale_k_(carver.take<T>(scaled ? decode_chunk : 0)),
        scale_v_(carver.take<T>(scaled ? decode_chunk : 0)),
        top_(carver.take<T>(n)),
        steps_(carver.take<std::int16_t>(Sums::integers ? n * decode_chunk : 0)) {}

  void begin() { scored_ = 0, columns_ = 0; }

  /// The scores of columns column … column + count - 1 follow; in ascending order, and those between are of no keys.
  void begin_scores(Index column, Index count) {
    hide_until(column);
    scored_ += count, columns_ = column + count;
  }
  /// [n, decode_chunk]: scores, without the scales of the keys; after weigh() weights, -inf where a value is not read.
  T* scores(Index i, Index column) const { return scores_ + i * decode_chunk + column; }
  /// Scales of the keys in [0, decode_chunk), 1 where scores have theirs already, and of the values.
  T* key_scales(Index column) const { return scale_k_ + column; }
  T* value_scales(Index column) const { return scale_v_ + column; }

  bool empty() const { return scored_ == 0; }
  /// Whether every query sees all of the chunk.
  bool all_seen() const { return all_seen_; }
  /// Whether the value of this column may be added for all queries at once: every query sees it. With integers, where the
  /// weight of a hidden pair is 0: some query sees it.
  bool seen(Index column) const { return seen_[column] != T(0); }
  /// With integers: quantised weights [n, decode_chunk], and the largest weight of a query.
  const std::int16_t* steps(Index column) const { return steps_ + column; }
  T largest(Index i) const { return top_[i]; }

  /// All scores are there. state: m, l and o of the keys before, which have v_head_dim features.
  void weigh(const DecodeState<T>& state, Index v_head_dim) {
    hide_until(decode_chunk);
    all_seen_ = scored_ == decode_chunk;
    for (Index i = 0; i < n_; ++i) all_seen_ = find_top(i, state.m[i]) && all_seen_;
    for (Index i = 0; i < n_; ++i) weigh(i, state, v_head_dim);
    if (!all_seen_) find_seen();
    if constexpr (Sums::integers)
      for (Index i = 0; i < n_; ++i) Sums::round(scores(i, 0), decode_chunk, top_[i], steps_ + i * decode_chunk);
  }

 private:
  /// Columns up to `end` that are not scored.
  void hide_until(Index end) {
    if (columns_ >= end) return;
    for (Index i = 0; i < n_; ++i) std::fill(scores(i, columns_), scores(i, end), detail::minus_infinity<T>);
    if constexpr (scaled) std::fill(scale_k_ + columns_, scale_k_ + end, T(1));
  }

  /// The largest score of one query so far, beginning with m. False where it does not see all of the chunk.
  bool find_top(Index i, T m) {
    T* const s = scores(i, 0);
    const auto score = [&](Index j) {
      const Vec x = V::load(s + j);
      if constexpr (!scaled) return x;
      const Vec y = V::mul(x, V::load(scale_k_ + j));
      V::store(s + j, y);
      return y;
    };
    Vec high[2] = {V::broadcast(m), V::broadcast(m)};
    Vec low[2] = {V::broadcast(std::numeric_limits<T>::infinity()), V::broadcast(std::numeric_limits<T>::infinity())};
    for (Index j = 0; j < decode_chunk; j += 2 * W)
      for (Index u = 0; u < 2; ++u) {
        const Vec x = score(j + u * W);
        high[u] = V::max(high[u], x), low[u] = V::min(low[u], x);
      }
    // A NaN may be lost here: its own weight is NaN all the same, and a query with one NaN is NaN.
    T top = V::max_lanes(V::max(high[0], high[1]));
    if (!(top > detail::minus_infinity<T>))
      for (Index j = 0; j < decode_chunk; ++j) top = detail::nan_max(top, s[j]);
    top_[i] = top;
    return !V::any(V::less_equal(V::min(low[0], low[1]), V::broadcast(detail::minus_infinity<T>)));
  }

  /// The weights of one query, its sum and maximum.
  void weigh(Index i, const DecodeState<T>& state, Index v_head_dim) {
    const T top = top_[i];
    if (top == detail::minus_infinity<T>) {
      if constexpr (Sums::integers) top_[i] = 0;
      return;
    }
    const T rescale = detail::weight_of(state.m[i], top);
    const T added = weigh(scores(i, 0), scale_v_, all_seen_, top_[i]);
    state.m[i] = top;
    state.l[i] = detail::multiply_add(rescale, state.l[i], added);
    if (rescale == T(1)) return;
    T* const o = state.o + i * whole_registers<T>(v_head_dim);
    for (Index x = 0; x < v_head_dim; x += W) V::store(o + x, V::mul(V::broadcast(rescale), V::load(o + x)));
  }

  /// s ← e^(s - top), times the scales of the values; -inf where it was -inf. The sum without the scales. With integers
  /// `top` is the largest weight then. A function of its own: its constants stay in registers.
  static EIGEN_DONT_INLINE T weigh(T* s, const T* scale, bool all_seen, T& top) {
    const Vec to_log2 = V::broadcast(static_cast<T>(std::numbers::log2e_v<long double>)), base = V::broadcast(top);
    const Vec hidden = V::broadcast(detail::minus_infinity<T>);
    [[maybe_unused]] typename Sums::Largest largest;
    Vec sum[2] = {V::zero(), V::zero()};
    for (Index j = 0; j < decode_chunk; j += 2 * W)
      for (Index u = 0; u < 2; ++u) {
        const Vec score = V::load(s + j + u * W);
        Vec p = V::weight(V::sub(score, base), to_log2);
        sum[u] = V::add(sum[u], p);
        if constexpr (scaled) p = V::mul(p, V::load(scale + j + u * W));
        if (!all_seen) p = V::select(V::less_equal(score, hidden), hidden, p);
        if constexpr (Sums::integers) largest.add(p, u);
        V::store(s + j + u * W, p);
      }
    if constexpr (Sums::integers) top = largest.value();
    return V::sum_lanes(V::add(sum[0], sum[1]));
  }

  void find_seen() {
    std::fill_n(seen_, decode_chunk, Sums::integers ? T(0) : T(1));
    for (Index i = 0; i < n_; ++i)
      for (Index j = 0; j < decode_chunk; j += W) {
        const auto hidden = V::less_equal(V::load(scores(i, j)), V::broadcast(detail::minus_infinity<T>));
        const Vec seen = V::load(seen_ + j);
        V::store(seen_ + j,
                 Sums::integers ? V::select(hidden, seen, V::broadcast(T(1))) : V::select(hidden, V::zero(), seen));
      }
  }

  Index n_;
  T* scores_;            // [n, decode_chunk]
  T* seen_;              // [decode_chunk]
  T* scale_k_;           // [decode_chunk]: quantised rows
  T* scale_v_;           // [decode_chunk]
  T* top_;               // [n] largest score so far; with integers then the chunk's largest weight
  std::int16_t* steps_;  // [n, decode_chunk]: integers
  Index scored_ = 0;     // keys of the chunk that some query sees
  Index columns_ = 0;    // columns that are written
  bool all_seen_ = false;
};

}}}  // namespace qkv::QKV_ABI::kernel

#include "../../base/warnings_on.hpp"

// kernel/panel_softmax.hpp — scores of one register of queries become weights, lane by lane.
//
//     m = max_c s(c)      s(c) ← 2^((s(c) - base)·to_log2)      Σ_c of the new s(c)        s(c) at [column][lanes]
//
// Four partial sums, chosen by column modulo 4: where columns begin (a multiple of 12) does not change the bits.
// In bfloat16 the rounded weights are summed; in 8 bits they are steps of 1/255 of the largest of the block, times the scale
// of the value row, and the sum is that of the weights before rounding. NaN: a maximum may pass it over, the sum never does.
//
// Before: kernel/panel_mask.hpp   Next: kernel/tiled.hpp
#pragma once

#include "panels.hpp"
#include "simd.hpp"
#include "words.hpp"

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // of AVX-512 intrinsics, as in kernel/simd.hpp
#endif

namespace qkv::inline QKV_ABI::kernel {

/// The numbers that weights become in the arithmetic A: of T, or pairs of bfloat16.
template <class A>
class PanelSoftmax {
  using T = typename A::Scalar;
  using V = Simd<T>;
  using Vec = typename V::Vec;
  static constexpr Index lanes = TileShape<T>::columns;

 public:
  /// The largest score of each lane; four at a time, since one maximum after another would wait for each.
  static Vec largest(const T* s, Index begin, Index end) {
    Vec w = V::broadcast(detail::minus_infinity<T>), x = w, y = w, z = w;
    Index c = begin;
    for (; c + 4 <= end; c += 4) {
      w = V::max(w, V::load(s + c * lanes));
      x = V::max(x, V::load(s + (c + 1) * lanes));
      y = V::max(y, V::load(s + (c + 2) * lanes));
      z = V::max(z, V::load(s + (c + 3) * lanes));
    }
    for (; c < end; ++c) w = V::max(w, V::load(s + c * lanes));
    return V::max(V::max(w, x), V::max(y, z));
  }

  /// Weights in place of the scores, and their sum. Columns that share a word go to one row: c / 2 or c / 4. `steps` is for
  /// Bytes: value_steps of the block's columns.
  static Vec weigh(T* s, Index begin, Index end, Vec base, Vec to_log2, [[maybe_unused]] const float* steps) {
    Index c = begin;
#ifdef QKV_DETAIL_WORDS
    if constexpr (A::bytes) {
      Vec w = V::zero(), x = w;
      for (; c + 8 <= end; c += 8) {
        put_quad<4>(s, c, base, to_log2, steps, w);
        put_quad<4>(s, c + 4, base, to_log2, steps, x);
      }
      if (c + 4 <= end) put_quad<4>(s, c, base, to_log2, steps, w), c += 4;
      if (end - c == 3) put_quad<3>(s, c, base, to_log2, steps, x);
      if (end - c == 2) put_quad<2>(s, c, base, to_log2, steps, x);
      if (end - c == 1) put_quad<1>(s, c, base, to_log2, steps, x);
      return V::add(w, x);
    } else if constexpr (A::words) {
      const __m512i ones = _mm512_set1_epi32(0x3F803F80);
      Vec w = V::zero(), x = w;
      for (; c + 4 <= end; c += 4) {
        w = PairDot::dot(w, put_pair(s, c, true, base, to_log2), ones);
        x = PairDot::dot(x, put_pair(s, c + 2, true, base, to_log2), ones);
      }
      if (c < end) w = PairDot::dot(w, put_pair(s, c, c + 1 < end, base, to_log2), ones);
      if (c + 2 < end) x = PairDot::dot(x, put_pair(s, c + 2, false, base, to_log2), ones);
      return V::add(w, x);
    }
#endif
    Vec w = V::zero(), x = w, y = w, z = w;
    if constexpr (!A::words) {
      for (; c + 4 <= end; c += 4) {
        w = V::add(w, put(s, c, base, to_log2));
        x = V::add(x, put(s, c + 1, base, to_log2));
        y = V::add(y, put(s, c + 2, base, to_log2));
        z = V::add(z, put(s, c + 3, base, to_log2));
      }
      if (c < end) w = V::add(w, put(s, c, base, to_log2));
      if (c + 1 < end) x = V::add(x, put(s, c + 1, base, to_log2));
      if (c + 2 < end) y = V::add(y, put(s, c + 2, base, to_log2));
    }
    return V::add(V::add(w, x), V::add(y, z));
  }

 private:
  static EIGEN_ALWAYS_INLINE Vec put(T* s, Index c, Vec base, Vec to_log2) {
    const Vec weight = V::weight(V::sub(V::load(s + c * lanes), base), to_log2);
    V::store(s + c * lanes, weight);
    return weight;
  }
#ifdef QKV_DETAIL_WORDS
  static EIGEN_ALWAYS_INLINE __m512i put_pair(float* s, Index c, bool second, Vec base, Vec to_log2) {
    const Vec low = weight_short(V::sub(V::load(s + c * lanes), base), to_log2);
    const Vec high = second ? weight_short(V::sub(V::load(s + (c + 1) * lanes), base), to_log2) : V::zero();
    const __m512i pair = to_pairs(low, high);
    store_words(reinterpret_cast<Word*>(s) + c / 2 * lanes, pair);
    return pair;
  }
  template <int Byte>
  static EIGEN_ALWAYS_INLINE __m512i byte_of(const float* s, Index c, Vec base, Vec to_log2, const float* steps,
                                             Vec& sum) {
    const Vec weight = weight_short(V::sub(V::load(s + (c + Byte) * lanes), base), to_log2);
    sum = V::add(sum, weight);
    return _mm512_slli_epi32(_mm512_cvtps_epi32(V::mul(weight, V::broadcast(steps[c + Byte]))), 8 * Byte);
  }
  template <int Columns>
  static EIGEN_ALWAYS_INLINE void put_quad(float* s, Index c, Vec base, Vec to_log2, const float* steps, Vec& sum) {
    __m512i word = byte_of<0>(s, c, base, to_log2, steps, sum);
    if constexpr (Columns > 1) word = _mm512_or_si512(word, byte_of<1>(s, c, base, to_log2, steps, sum));
    if constexpr (Columns > 2) word = _mm512_or_si512(word, byte_of<2>(s, c, base, to_log2, steps, sum));
    if constexpr (Columns > 3) word = _mm512_or_si512(word, byte_of<3>(s, c, base, to_log2, steps, sum));
    store_words(reinterpret_cast<Word*>(s) + c / 4 * lanes, word);
  }
#endif
};

}  // namespace qkv::inline QKV_ABI::kernel

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif

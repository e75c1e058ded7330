// kernel/register_softmax.hpp — scores of one register of queries become weights, lane by lane.
//
//     m' = max(m, max_c s(c))     s(c) ← e^(σ·(s(c) - m'))     l ← e^(σ·(m - m'))·l + Σ_c s(c)        s(c) at [column][lanes]
//
// with σ = score_scale of the lane, or 1 where scores are scaled already; powers are taken in base 2.
//
// Four partial sums, chosen by column modulo 4: where columns begin (a multiple of 12) does not change the bits.
// In bfloat16 the rounded weights are summed. NaN: a maximum may pass it over, the sum never does.
//
// Integer weights, of 8 bits (int8 values) or 15 bits (int16 values): the weight times the scale of its value row is quantised,
// with a step of 1/255 or 1/32767 of the largest such product of the block and lane. So a sink with a small value costs no
// precision, and neither do large scores. With 15 bits: two partial sums, by column modulo 2.
//
// Before: kernel/tiled/query_state.hpp   Next: kernel/value_tile.hpp
#pragma once

#include <cstring>
#include <numbers>

#include "../simd/simd.hpp"
#include "arithmetic.hpp"
#include "tiled/packed_kv.hpp"

#include "../base/warnings_off.hpp"

namespace qkv { inline namespace QKV_ABI { namespace kernel {

template <class T>
inline constexpr T log2_e = static_cast<T>(std::numbers::log2e_v<long double>);

/// Scores of a panel become weights in the numbers of A: T, pairs of bfloat16 or int16, or four bytes. A column has `lanes`
/// scores.
template <class A, Index lanes = TileShape<typename A::Scalar>::columns>
class PanelSoftmax {
  using T = typename A::Scalar;
  using V = Simd<T>;
  using Vec = typename V::Vec;

 public:
  /// One step of the running softmax, for a register of lanes. Scores s of columns [begin, end) become weights; maximum m and
  /// sum l include them afterwards; `rescale` is the factor of earlier sums. With σ = score_scale:
  ///
  ///     m' = max(m, max_c s(c))     rescale = e^(σ·(m - m'))     s(c) ← e^(σ·(s(c) - m'))     l ← rescale·l + Σ_c s(c)
  ///
  /// Integer weights: products with `scales` of the value rows are quantised, and value_step is the quantisation step. Returns
  /// whether a maximum has moved, so that rescale is not 1. Milakov and Gimelshein 2018, arXiv:1805.02867, algorithm 3.
  static bool step(T* s, Index begin, Index end, Vec score_scale, [[maybe_unused]] const float* scales, T* m, T* l,
                   T* rescale, [[maybe_unused]] T* value_step) {
    const Vec old = V::load(m), now = V::max(old, largest(s, begin, end));
    const auto unseen = V::less_equal(now, V::broadcast(detail::minus_infinity<T>));  // the lane has seen no key yet
    const Vec base = V::select(unseen, V::zero(), now), log2_e = V::broadcast(kernel::log2_e<T>);
    const Vec to_log2 = V::select(unseen, log2_e, V::mul(log2_e, score_scale));  // unseen: not NaN, whatever the query
    const Vec factor = V::weight(V::sub(old, base), to_log2);
    Vec sum;
    if constexpr (A::integer_weights) {
      const Steps w = weigh_steps(s, begin, end, base, to_log2, scales);
      sum = w.sum;
      V::store(value_step, w.step);
    } else {
      sum = weigh(s, begin, end, base, to_log2);
    }
    V::store(l, V::fma(V::load(l), factor, sum));
    V::store(m, V::fma(V::zero(), sum, now));  // a score of NaN is in the sum, whatever the maximum made of it
    V::store(rescale, factor);
    return V::any(V::less(old, now));
  }

  /// The largest score of each lane; four independent maxima hide their latency.
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

  /// Weights in place of the scores, and their sum. In pairs, columns c and c + 1 go to row c / 2.
  static Vec weigh(T* s, Index begin, Index end, Vec base, Vec to_log2) {
    Index c = begin;
    if constexpr (A::narrow) {
      const Isa::Words ones = Isa::broadcast_word(0x3F803F80);
      Vec w = V::zero(), x = w;
      for (; c + 4 <= end; c += 4) {
        w = Bf16Dot::dot(w, put_pair(s, c, true, base, to_log2), ones);
        x = Bf16Dot::dot(x, put_pair(s, c + 2, true, base, to_log2), ones);
      }
      if (c < end) w = Bf16Dot::dot(w, put_pair(s, c, c + 1 < end, base, to_log2), ones);
      if (c + 2 < end) x = Bf16Dot::dot(x, put_pair(s, c + 2, false, base, to_log2), ones);
      return V::add(w, x);
    }
    Vec w = V::zero(), x = w, y = w, z = w;
    if constexpr (!A::narrow) {
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

  /// The weight of one pair, as it is multiplied: an integer where weights are.
  static T weight(const T* s, Index c, Index lane) {
    if constexpr (A::integer_weights) {
      constexpr Index bits = 32 / A::keys;
      Word several;
      std::memcpy(&several, s + c / A::keys * lanes + lane, sizeof several);
      return static_cast<T>(several >> (bits * (c % A::keys)) & ((Word{1} << bits) - 1));
    } else if constexpr (A::narrow) {
      const Word pair = reinterpret_cast<const Word*>(s)[c / 2 * lanes + lane];
      const Word bits = c % 2 == 0 ? pair << 16 : pair & 0xFFFF0000U;
      T value;
      std::memcpy(&value, &bits, sizeof bits);
      return value;
    } else {
      return s[c * lanes + lane];
    }
  }

 private:
  /// Weights 2^((s - base)·to_log2), times the scale of a row, as multiples of `step`; and their sum before rounding.
  struct Steps {
    Vec step, sum;
  };
  /// In 15 bits: columns c and c + 1 go to row c / 2. Scales are finite. Products with them replace the scores, then integers
  /// the products.
  static Steps weigh_int16(T* s, Index begin, Index end, Vec base, Vec to_log2, const float* scales) {
    Vec even = V::zero(), odd = even, even_top = even, odd_top = even;
    const auto put = [&](T* at, T scale, Vec& total, Vec& top) {
      const Vec weight = V::weight_short(V::sub(V::load(at), base), to_log2);
      const Vec product = V::mul(weight, V::broadcast(scale));
      V::store(at, product);
      total = V::add(total, weight), top = V::max(top, product);
    };
    const Index pairs = (end - begin) / 2;
    const bool rest = (end - begin) % 2 == 1;
    T* at = s + begin * lanes;
    const float* scale = scales + begin;
    for (Index i = pairs; i > 0; --i, at += 2 * lanes, scale += 2)
      put(at, scale[0], even, even_top), put(at + lanes, scale[1], odd, odd_top);
    if (rest) put(at, scale[0], even, even_top);
    const Vec sum = V::add(even, odd), top = V::max(even_top, odd_top);
    // Not less than 2⁻¹²⁶, so that its inverse is finite. A weight of NaN is in the sum, whatever the maximum made of it.
    Vec step = V::max(V::mul(top, V::broadcast(1.0F / 32767)), V::broadcast(0x1p-126F));
    const Vec inverse = V::div(V::broadcast(1), step);
    step = V::fma(V::zero(), sum, step);
    // Truncated after adding a half: no rounding mode gives 32768 for the largest.
    const auto rounded = [&](const T* product) {
      return Isa::truncate_to_int32(V::fma(V::load(product), inverse, V::broadcast(0.5F)));
    };
    at = s + begin * lanes;
    T* to = s + begin / 2 * lanes;
    for (Index i = pairs; i > 0; --i, at += 2 * lanes, to += lanes)
      Isa::store_words(to, Isa::pair_int16(rounded(at), rounded(at + lanes)));
    if (rest) Isa::store_words(to, Isa::pair_int16(rounded(at), Isa::broadcast_word(0)));
    return {step, sum};
  }
  /// In 8 bits: the same, columns c … c + 3 to row c / 4.
  static Steps weigh_int8(T* s, Index begin, Index end, Vec base, Vec to_log2, const float* scales) {
    Vec w = V::zero(), x = w, y = w, z = w, w_top = w, x_top = w, y_top = w, z_top = w;
    const auto put = [&](Index c, Vec& total, Vec& top) {
      const Vec weight = V::weight_short(V::sub(V::load(s + c * lanes), base), to_log2);
      const Vec product = V::mul(weight, V::broadcast(scales[c]));
      V::store(s + c * lanes, product);
      total = V::add(total, weight), top = V::max(top, product);
    };
    const Index whole = begin + (end - begin) / 4 * 4;  // columns before it fill rows
    for (Index c = begin; c < whole; c += 4)
      put(c, w, w_top), put(c + 1, x, x_top), put(c + 2, y, y_top), put(c + 3, z, z_top);
    if (whole < end) put(whole, w, w_top);
    if (whole + 1 < end) put(whole + 1, x, x_top);
    if (whole + 2 < end) put(whole + 2, y, y_top);
    const Vec sum = V::add(V::add(w, x), V::add(y, z));
    const Vec top = V::max(V::max(w_top, x_top), V::max(y_top, z_top));
    Vec step = V::max(V::mul(top, V::broadcast(1.0F / 255)), V::broadcast(0x1p-126F));
    const Vec inverse = V::div(V::broadcast(1), step);
    step = V::fma(V::zero(), sum, step);
    const auto rounded = [&](Index c) { return Isa::round_to_int32(V::mul(V::load(s + c * lanes), inverse)); };
    const auto rounded_if = [&](Index c) { return c < end ? rounded(c) : Isa::broadcast_word(0); };
    Word* const to = reinterpret_cast<Word*>(s);
    for (Index c = begin; c < whole; c += 4)
      Isa::store_words(to + c / 4 * lanes, Isa::to_uint8(rounded(c), rounded(c + 1), rounded(c + 2), rounded(c + 3)));
    if (whole < end)
      Isa::store_words(to + whole / 4 * lanes, Isa::to_uint8(rounded(whole), rounded_if(whole + 1),
                                                             rounded_if(whole + 2), rounded_if(whole + 3)));
    return {step, sum};
  }
  static Steps weigh_steps(T* s, Index begin, Index end, Vec base, Vec to_log2, const float* scales) {
    if constexpr (A::int8_values) return weigh_int8(s, begin, end, base, to_log2, scales);
    if constexpr (A::int16_values) return weigh_int16(s, begin, end, base, to_log2, scales);
  }

  static EIGEN_ALWAYS_INLINE Vec put(T* s, Index c, Vec base, Vec to_log2) {
    const Vec weight = V::weight(V::sub(V::load(s + c * lanes), base), to_log2);
    V::store(s + c * lanes, weight);
    return weight;
  }
  static EIGEN_ALWAYS_INLINE Isa::Words put_pair(float* s, Index c, bool second, Vec base, Vec to_log2) {
    const Vec low = V::weight_short(V::sub(V::load(s + c * lanes), base), to_log2);
    const Vec high = second ? V::weight_short(V::sub(V::load(s + (c + 1) * lanes), base), to_log2) : V::zero();
    const Isa::Words pair = Isa::pair_bf16(low, high);
    Isa::store_words(reinterpret_cast<Word*>(s) + c / 2 * lanes, pair);
    return pair;
  }
};

}}}  // namespace qkv::QKV_ABI::kernel

#include "../base/warnings_on.hpp"

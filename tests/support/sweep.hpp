// support/sweep.hpp — thousands of small cases of random sizes, each against the formula in double, within an error that
// follows from how its arithmetic rounds.
//
//     QKV_SWEEP_SEED=n QKV_SWEEP_CASES=1      runs the one case that a failure has named
//     QKV_SWEEP_SEED=n QKV_SWEEP_CASES=m      runs other ones, or more of them
#pragma once

#include <qkv/kernel/arithmetic.hpp>
#include <qkv/kernel/decode/dots.hpp>
#include <qkv/mask.hpp>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdlib>
#include <initializer_list>
#include <limits>
#include <sstream>
#include <string>
#include <vector>

#include "catch.hpp"
#include "numbers.hpp"

#if !defined(__x86_64__) || defined(__SANITIZE_ADDRESS__)
#define QKV_TEST_SLOW 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define QKV_TEST_SLOW 1
#endif
#endif

namespace support {

/// Draws of one case. The same on every platform.
class Draw {
 public:
  explicit Draw(std::uint64_t seed) : state_(seed * 0x9E3779B97F4A7C15u + 0x632BE59BD9B4E019u) { next(), next(); }

  std::uint64_t next() {
    state_ ^= state_ << 13, state_ ^= state_ >> 7, state_ ^= state_ << 17;
    return state_ * 0x2545F4914F6CDD1Du;
  }
  /// In [low, high].
  Index from(Index low, Index high) {
    return low + static_cast<Index>((next() >> 32) % static_cast<std::uint64_t>(high - low + 1));
  }
  bool one_in(Index n) { return from(1, n) == 1; }
  template <class X>
  X one_of(std::initializer_list<X> all) {
    return all.begin()[from(0, static_cast<Index>(all.size()) - 1)];
  }

 private:
  std::uint64_t state_;
};

inline std::uint64_t from_environment(const char* name, std::uint64_t otherwise) {
  const char* const text = std::getenv(name);
  return text != nullptr ? std::strtoull(text, nullptr, 10) : otherwise;
}

/// check(draw, seed, text) for one seed after another: returns how far the case was from its formula, as a part of what is allowed,
/// and describes itself in the text.
template <class Check>
void sweep(std::uint64_t cases, const Check& check) {
#ifdef QKV_TEST_SLOW
  const std::uint64_t step = 11;  // some of all the sizes that take turns
#else
  const std::uint64_t step = 1;
#endif
  const std::uint64_t first = from_environment("QKV_SWEEP_SEED", 1);
  cases = from_environment("QKV_SWEEP_CASES", (cases + step - 1) / step);
  double worst = 0;
  std::uint64_t failed = 0, at = first;
  for (std::uint64_t seed = first; seed < first + cases * step; seed += step) {
    Draw draw(seed);
    std::ostringstream text;
    const double part = check(draw, seed, text);
    if (!(part <= worst)) worst = part, at = seed;
    if (part <= 1) continue;
    if (++failed <= 8)
      FAIL_CHECK("QKV_SWEEP_SEED=" << seed << ": " << part << " times what is allowed: " << text.str());
  }
  CHECK(failed == 0);
  if (std::getenv("QKV_SWEEP_SEED") != nullptr)
    WARN("worst of " << cases << " cases: " << worst << " of what is allowed, seed " << at);
}

/// A window, a part of whose pairs may be hidden here and there, and which may be unsure about blocks.
struct SweepMask {
  qkv::Window window = {qkv::infinite, qkv::infinite};
  Index holes = 0;     // one in so many pairs is hidden; 0: none
  bool vague = false;  // some, where it could say all or none

  static SweepMask drawn(Draw& draw) {
    SweepMask mask;
    if (const Index kind = draw.from(0, 3); kind > 0)  // else full
      mask.window = {kind == 1 ? qkv::infinite : draw.from(0, 90), kind == 3 ? draw.from(0, 9) : 0};
    mask.holes = draw.one_in(3) ? draw.from(2, 5) : 0;
    mask.vague = draw.one_in(4);
    return mask;
  }
  bool sees(const qkv::At& at) const {
    return window.sees(at) &&
           (holes == 0 || (at.head * 7 + at.query_position * 13 + at.key_position * 31) % holes != 0);
  }
  qkv::Cover cover(const qkv::Block& block) const {
    const qkv::Cover c = window.cover(block);
    return vague || (holes > 0 && c == qkv::Cover::all) ? qkv::Cover::some : c;
  }
  qkv::SeenBy seen_by(const qkv::Block& block) const {
    qkv::SeenBy seen = window.seen_by(block);
    seen.exact = holes == 0;
    return seen;
  }
  qkv::SeenBy keys_seen(const qkv::Block& block) const {
    qkv::SeenBy seen = window.keys_seen(block);
    seen.exact = holes == 0;
    return seen;
  }
};

/// Scores for sweeps, drawn for slopes of one per head: none, or one of two parts.
template <class T>
qkv::Plain no_score(Draw&, const std::vector<T>&) {
  return qkv::plain;
}
using Capped = qkv::Then<qkv::SoftCap, qkv::Alibi<float>>;
inline Capped capped(Draw& draw, const std::vector<float>& slopes) {
  return qkv::then(qkv::soft_cap(static_cast<double>(draw.from(2, 30))), qkv::alibi(std::span<const float>(slopes)));
}

/// Rows at these positions: consecutive, or with gaps between the pieces.
struct Pieces {
  std::vector<Index> rows, position;
  std::vector<Index> positions;  // of every row

  Pieces(Draw& draw, Index n, bool far) {
    const Index pieces = draw.one_in(2) ? 1 : draw.from(2, 6);
    Index at = draw.one_in(3) ? draw.from(1, 300) : draw.one_in(6) ? (Index{1} << 24) + draw.from(-300, 300) : 0;
    const bool gaps = draw.one_in(2);
    for (Index left = n, i = 0; left > 0; ++i) {
      const Index some = i + 1 == pieces ? left : std::min(left, draw.from(1, std::max<Index>(2 * n / pieces, 1)));
      rows.push_back(some), position.push_back(at);
      for (Index r = 0; r < some; ++r) positions.push_back(at + r);
      at += some + (gaps ? far && draw.one_in(3) ? draw.from(500, 2000) : draw.from(0, 40) : 0);
      left -= some;
    }
  }
};

/// Powers of two that queries, keys and values are multiplied by, and the scale divided by those of q·k: inside the ranges
/// of docs/numerics.md nothing else changes.
struct Magnitudes {
  double q = 1, k = 1, v = 1;

  /// Latent rows are keys and values at once.
  static Magnitudes drawn(Draw& draw, bool half, bool latent) {
    if (!draw.one_in(3)) return {};
    const Index q = draw.from(-90, 118), far = half ? 8 : 110;
    const Index k = draw.from(std::max({-far, Index(-80), -90 - q}), std::min(far, 118 - q));
    const Index v = latent ? k : half ? draw.from(-8, 8) : draw.from(-80, 115);
    return {std::ldexp(1, static_cast<int>(q)), std::ldexp(1, static_cast<int>(k)), std::ldexp(1, static_cast<int>(v))};
  }
};

/// How an arithmetic rounds: relative to each number of q·k; relative to the largest of a query; relative to each weight;
/// relative to the largest weight; relative to each value.
struct Rounding {
  double product = 0, query_step = 0, weight = 0, weight_step = 0, value = 0;
};
inline constexpr double bf16_ulp = 1.0 / 256;  // half of one, at the most, relative to a number

/// Of the tiled and the absorbed kernel: sums of n products.
template <class T, class S>
Rounding tiled_rounding(qkv::Arithmetic arithmetic, Index n) {
  using qkv::kernel::Isa;
  if (sizeof(T) > 4 || arithmetic == qkv::Arithmetic::exact) return {};
  if (std::is_same_v<S, qkv::bfloat16> && Isa::bf16_products) return {.product = bf16_ulp, .weight = bf16_ulp};
  if (!qkv::has_row_scale<S>) return {};
  if (Isa::int8_products) {
    if (arithmetic == qkv::Arithmetic::int8) return {.query_step = 0.5 / 127, .weight = 1e-4, .weight_step = 0.5 / 255};
    if (!Isa::bf16_products) return {.query_step = 0.5 / 127, .weight_step = 0.5 / 32767};
    return {.query_step = 0.5 / 127, .weight = bf16_ulp, .value = bf16_ulp};
  }
  if (Isa::int16_products)
    return {.query_step = 0.5 / static_cast<double>(qkv::kernel::largest_int16(n)), .weight_step = 0.5 / 32767};
  return {};
}
template <class T, class S>
Rounding decode_rounding(qkv::Arithmetic arithmetic, Index group, Index n) {
  if (!qkv::kernel::decode_is_narrow<T, S>(arithmetic, group)) return {};
  const bool in_int8 = qkv::kernel::Isa::int8_products && group > 1;
  const double steps = in_int8 ? 127 : static_cast<double>(qkv::kernel::largest_int16(n));
  return {.query_step = 0.5 / steps, .weight_step = 0.5 / 32767};
}

/// One query of one head by the formula, and what rounding may do to it. Roundings of a sum are independent of each other:
/// they add up like a random walk, and stay within a few of its standard deviations.
struct OneQuery {
  const double* q;
  Index d;
  double scale;
  std::vector<double> weights = {};  // the probabilities
  double top = -std::numeric_limits<double>::infinity(), log_sum_exp = top;
  double spread = 0;   // the largest |scale|·√Σ(q·k)² of a key that is seen
  double lengths = 0;  // the largest |scale|·max|q|·√Σk²
  double largest = 0;  // the largest |score| on the way
  double most = 0;     // the largest weight
  double value = 0;    // the largest |value| that is seen
  Index seen = 0;

  /// k [keys, d], v [keys, dv], both strided by rows; score(s, key) and sees(key). Writes out [dv].
  template <class Score, class Sees>
  void run(const double* k, Index k_row, const double* v, Index v_row, Index dv, Index keys, double sink,
           const Score& score, const Sees& sees, double* out) {
    double most_q = 0;
    for (Index x = 0; x < d; ++x) most_q = std::max(most_q, std::abs(q[x]));
    weights.assign(static_cast<std::size_t>(keys), -std::numeric_limits<double>::infinity());
    top = sink;
    for (Index j = 0; j < keys; ++j) {
      if (!sees(j)) continue;
      const double* const key = k + j * k_row;
      double dot = 0, squares = 0, length = 0;
      for (Index x = 0; x < d; ++x) {
        const double product = q[x] * key[x];
        dot += product, squares += product * product, length += key[x] * key[x];
      }
      const double s = score(scale * dot, j);
      weights[static_cast<std::size_t>(j)] = s;
      top = std::max(top, s);
      spread = std::max(spread, std::abs(scale) * std::sqrt(squares));
      lengths = std::max(lengths, std::abs(scale) * most_q * std::sqrt(length));
      largest = std::max({largest, std::abs(s), std::abs(scale * dot), std::abs(s - scale * dot)});
      for (Index x = 0; x < dv; ++x) value = std::max(value, std::abs(v[j * v_row + x]));
      ++seen;
    }
    std::fill_n(out, dv, 0.0);
    if (top == -std::numeric_limits<double>::infinity()) return;
    double total = sink > -std::numeric_limits<double>::infinity() ? std::exp(sink - top) : 0;
    for (double& w : weights) total += w = std::exp(w - top);
    log_sum_exp = top + std::log(total);
    for (Index j = 0; j < keys; ++j) {
      const double w = weights[static_cast<std::size_t>(j)] / total;
      most = std::max(most, w);
      if (w > 0)
        for (Index x = 0; x < dv; ++x) out[x] += w * v[j * v_row + x];
    }
  }

  /// Of a score. `ulp`: half of one of the scalar, relative to a number.
  double score_error(const Rounding& r, double ulp) const {
    return 3 * (r.product * spread + r.query_step * lengths) +
           ulp * (3 * std::sqrt(static_cast<double>(d)) * spread + 6 * largest + 6);
  }
  /// Of the output's numbers, and of the log-sum-exp.
  double error(const Rounding& r, double ulp) const {
    const double n = std::sqrt(static_cast<double>(seen));
    return value * (score_error(r, ulp) + r.weight + r.value + 2 * r.weight_step * most * n + ulp * (4 + n));
  }
  double log_error(const Rounding& r, double ulp) const {
    const double n = std::sqrt(static_cast<double>(seen));
    return score_error(r, ulp) + r.weight + 2 * r.weight_step * n + ulp * (4 + n + std::abs(log_sum_exp));
  }
};

/// |a - b| as a part of what is allowed; NaN is infinitely far.
inline double part_of(double a, double b, double allowed) {
  if (a == b) return 0;
  const double part = std::abs(a - b) / allowed;
  return part >= 0 ? part : std::numeric_limits<double>::infinity();
}

template <class T>
inline constexpr double half_ulp = std::numeric_limits<T>::epsilon() / 2;

}  // namespace support

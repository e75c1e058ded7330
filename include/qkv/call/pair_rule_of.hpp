// call/pair_rule_of.hpp — any mask and any score as the PairRule that kernels call: kernel/pair_rule.hpp.
//
// All kernels but the reference call masks (mask_protocol.hpp) through this. Where the visible lanes or keys form one
// interval (causal, windows, prefixes, lengths, and what & and | make of them), `seen_by` and `keys_seen` return it,
// and one comparison per register masks the rest. For other masks sees(at) is called for every pair. The library's own
// scores work on whole registers; a user's score is called for every pair, inlined in the loop over the tile.
//
// Before: call/rule.hpp   Next: call/checks.hpp
#pragma once

#include <algorithm>
#include <limits>
#include <type_traits>

#include "../kernel/pair_rule.hpp"
#include "../mask.hpp"
#include "../score.hpp"
#include "../simd/simd.hpp"
#include "../softmax.hpp"

namespace qkv { inline namespace QKV_ABI { namespace detail {

template <class F>
inline constexpr bool is_alibi = false;
template <class U>
inline constexpr bool is_alibi<Alibi<U>> = true;
template <class F>
inline constexpr bool is_then = false;
template <class A, class B>
inline constexpr bool is_then<Then<A, B>> = true;

/// first, first + step, …, each rounded to T on its own. Out of line: such long distances are rare.
template <class T>
EIGEN_DONT_INLINE typename kernel::Simd<T>::Vec long_distances(Index first, Index step) {
  T one[kernel::Simd<T>::lanes];
  for (Index n = 0; n < kernel::Simd<T>::width; ++n) one[n] = static_cast<T>(first + step * n);
  return kernel::Simd<T>::load(one);
}

/// One register of a tile: pairs (i, j), (i + 1, j) … where it holds lanes, (i, j), (i, j + 1) … where it holds keys.
template <class T, kernel::Inner inner>
class PairRegister {
  using V = kernel::Simd<T>;
  static constexpr bool keys = inner == kernel::Inner::keys;

 public:
  PairRegister(const kernel::PairTile& tile, Index i, Index j)
      : tile_(tile), i_(i), first_(tile.at(i, j)), count_((keys ? tile.keys - j : tile.lanes - i)) {}

  /// All pairs are of one head, at consecutive positions of keys or queries.
  bool in_line() const { return keys || tile_.heads == 1; }
  const At& first() const { return first_; }
  /// key_position - query_position of every pair, where they are in line. Each is rounded to T on its own, as the
  /// scalar score rounds it: past 2²⁴ (double: 2⁵³) neighbours are not 1 apart.
  typename V::Vec distances() const {
    constexpr Index exact = Index{1} << std::min(std::numeric_limits<T>::digits, 62);
    const Index first = first_.key_position - first_.query_position, step = keys ? 1 : -1;
    if (std::min(first, first + step * V::width) <= -exact || std::max(first, first + step * V::width) > exact)
      return long_distances<T>(first, step);
    const auto from = V::broadcast(static_cast<T>(first));
    return keys ? V::add(from, V::iota()) : V::sub(from, V::iota());
  }
  /// f(n, at) for every pair inside the tile.
  template <class F>
  EIGEN_ALWAYS_INLINE void for_each(const F& f) const {
    if (!in_line()) {
      for (Index n = 0; n < std::min(count_, V::width); ++n)
        f(n, At{first_.sequence, tile_.head(i_ + n), tile_.query(i_ + n), first_.key,
                tile_.first_position + tile_.query(i_ + n), first_.key_position});
    } else if (count_ >= V::width) {
      for (Index n = 0; n < V::width; ++n) f(n, in_line_at(n));
    } else {
      for (Index n = 0; n < count_; ++n) f(n, in_line_at(n));
    }
  }

 private:
  At in_line_at(Index n) const {
    At at = first_;
    (keys ? at.key : at.query) += n;
    (keys ? at.key_position : at.query_position) += n;
    return at;
  }

  const kernel::PairTile& tile_;
  Index i_;
  At first_;
  Index count_;
};

/// f of a register of scores.
template <class T, kernel::Inner inner, class F>
EIGEN_ALWAYS_INLINE typename kernel::Simd<T>::Vec score_register(const F& f, typename kernel::Simd<T>::Vec s,
                                                                 const PairRegister<T, inner>& pairs) {
  using V = kernel::Simd<T>;
  if constexpr (std::is_same_v<F, Plain>) {
    return s;
  } else if constexpr (std::is_same_v<F, SoftCap>) {
    const auto cap = V::broadcast(f.template cap_as<T>());
    return V::mul(cap, V::tanh(V::div(s, cap)));
  } else if constexpr (is_then<F>) {
    return score_register<T>(f.b, score_register<T>(f.a, s, pairs), pairs);
  } else {
    if constexpr (is_alibi<F>)
      if (pairs.in_line()) {
        const T slope = static_cast<T>(f.slopes[static_cast<std::size_t>(pairs.first().head)]);
        return V::fma(V::broadcast(slope), pairs.distances(), s);
      }
    T one[V::lanes];
    V::store(one, s);
    pairs.for_each([&](Index n, const At& at) { one[n] = f(one[n], at); });
    return V::load(one);
  }
}

/// A mask M and a score F behind a PairRule.
template <class T, class M, class F>
class PairRuleOf {
  using V = kernel::Simd<T>;
  using Vec = typename V::Vec;
  using Tile = kernel::PairTile;
  using Rule = kernel::PairRule<T>;
  static constexpr bool plain = std::is_same_v<F, Plain>, sees_all = std::is_same_v<M, Full>;

 public:
  static Rule make(const M& mask, const F& score) {
    Rule rule{kernel::address_of(mask), kernel::address_of(score), plain, sees_all};
    if constexpr (!sees_all) rule.cover_of = &cover_of;
    if constexpr (!plain || !sees_all) rule.finish_lanes = &finish_lanes, rule.finish_keys = &finish_keys;
    return rule;
  }

 private:
  static const M& mask_of(const Rule& rule) { return kernel::object_at<M>(rule.mask); }
  static const F& score_of(const Rule& rule) { return kernel::object_at<F>(rule.score); }

  /// Queries [query, query + n) of one head × the tile's keys.
  static Block block(const Tile& tile, Index head, Index query, Index n) {
    return {tile.sequence, head, query, n, tile.first_position + query, tile.key, tile.keys, tile.key_position};
  }
  /// f(block of one head's queries × the keys, the lane of its first query), for all heads of the tile; the lanes of a head
  /// lie tile.heads apart.
  template <class G>
  static void for_each_head(const Tile& tile, G&& f) {
    for (Index i = 0; i < std::min(tile.lanes, tile.heads); ++i)
      f(block(tile, tile.head(i), tile.query(i), (tile.lanes - 1 - i) / tile.heads + 1), i);
  }

  static Cover cover_of(const Rule& rule, const Tile& tile) {
    const M& mask = mask_of(rule);
    if (tile.heads == 1 || ignores_heads<M>) {  // one rectangle for all heads
      const Index query = tile.query(0);
      return cover(mask, block(tile, tile.first_head, query, tile.query(tile.lanes - 1) - query + 1));
    }
    Cover least = Cover::all, most = Cover::none;
    for_each_head(tile, [&](const Block& b, Index) {
      const Cover c = cover(mask, b);
      least = std::min(least, c), most = std::max(most, c);
    });
    return least == most ? least : Cover::some;
  }

  static void finish_lanes(const Rule& rule, const Tile& tile, Cover cover, T* s, Index stride, const T* unit) {
    const M& mask = mask_of(rule);
    for (Index j = 0; j < tile.keys; ++j, s += stride) {
      if constexpr (!plain)
        for (Index i = 0; i < tile.lanes; i += V::width) {
          const Vec raw = V::load(s + i), x = unit ? V::mul(V::load(unit + i), raw) : raw;
          V::store(s + i, score_register(score_of(rule), x, PairRegister<T, kernel::Inner::lanes>(tile, i, j)));
        }
      if (cover == Cover::some) hide_lanes(mask, tile.part(j, 1), s);
    }
  }
  /// s [lanes] ← -inf where a lane does not see the one key of the tile.
  static void hide_lanes(const M& mask, const Tile& tile, T* s) {
    for_each_head(tile, [&](const Block& b, Index first) {
      const SeenBy seen = seen_by(mask, b);
      if (!seen.exact) {
        At at{b.sequence, b.head, b.query, b.key, b.query_position, b.key_position};
        for (Index n = 0; n < b.n_queries; ++n, ++at.query, ++at.query_position)
          if (!mask.sees(at)) s[first + n * tile.heads] = minus_infinity<T>;
      } else if (tile.heads == 1) {
        hide_outside(s, tile.lanes, seen.begin, seen.end);
      } else {
        for (Index n = 0; n < seen.begin; ++n) s[first + n * tile.heads] = minus_infinity<T>;
        for (Index n = seen.end; n < b.n_queries; ++n) s[first + n * tile.heads] = minus_infinity<T>;
      }
    });
  }
  /// s [n, up to whole registers] ← -inf outside [begin, end).
  static EIGEN_ALWAYS_INLINE void hide_outside(T* s, Index n, Index begin, Index end) {
    for (Index i = 0; i < n; i += V::width) {
      const auto low = V::broadcast(static_cast<T>(begin - i)), high = V::broadcast(static_cast<T>(end - i));
      const auto seen = V::both(V::less_equal(low, V::iota()), V::less(V::iota(), high));
      V::store(s + i, V::select(seen, V::load(s + i), V::broadcast(minus_infinity<T>)));
    }
  }

  static void finish_keys(const Rule& rule, const Tile& tile, Cover cover, T* s, Index stride, const T* unit) {
    const M& mask = mask_of(rule);
    for (Index i = 0; i < tile.lanes; ++i, s += stride) {
      if constexpr (!plain)
        for (Index j = 0; j < tile.keys; j += V::width) {
          const Index n = std::min(V::width, tile.keys - j);
          const Vec raw = V::load_n(s + j, n), x = unit ? V::mul(V::broadcast(unit[i]), raw) : raw;
          V::store_n(s + j, score_register(score_of(rule), x, PairRegister<T, kernel::Inner::keys>(tile, i, j)), n);
        }
      if (cover != Cover::some) continue;
      const SeenBy seen = keys_seen(mask, block(tile, tile.head(i), tile.query(i), 1));
      if (seen.exact) {
        std::fill(s, s + seen.begin, minus_infinity<T>);
        std::fill(s + seen.end, s + tile.keys, minus_infinity<T>);
      } else {
        At at = tile.at(i, 0);
        for (Index j = 0; j < tile.keys; ++j, ++at.key, ++at.key_position)
          if (!mask.sees(at)) s[j] = minus_infinity<T>;
      }
    }
  }
};

template <class T, class M, class F>
kernel::PairRule<T> pair_rule(const M& mask, const F& score) {
  return PairRuleOf<T, M, F>::make(mask, score);
}

}}}  // namespace qkv::QKV_ABI::detail

// mask.hpp — which query sees which key: a mask is a value with one predicate, sees(at).
//
//     causal                 key_position <= query_position
//     window(left, right)    query_position - left <= key_position <= query_position + right   (causal = window(infinite, 0))
//     prefix(n)              key_position < n
//     where(f)               any bool f(const At&); a lambda may also stand alone
//     lengths, documents, boolean: masks that read an operand, in data_masks.hpp
//
// Masks compose: `causal & documents(ids)`, `(prefix(16) | window(64, 0)) & causal` (use parentheses). A mask may also
// answer for a whole block of queries × keys at once: cover(block) says none, all or some, so that kernels skip blocks
// and never add minus infinity to everything. `some` is always a legal answer. A mask with `ignores_heads` answers
// once for all heads. All members: mask_protocol.hpp.
//
// Before: mask_protocol.hpp   Next: data_masks.hpp
#pragma once

#include <algorithm>
#include <concepts>
#include <limits>
#include <type_traits>
#include <utility>

#include "mask_protocol.hpp"

namespace qkv { inline namespace QKV_ABI {

/// Every query sees every key.
struct Full {
  static constexpr bool ignores_heads = true;
  constexpr bool sees(const At&) const { return true; }
  constexpr Cover cover(const Block&) const { return Cover::all; }
  constexpr SeenBy seen_by(const Block& b) const { return {0, b.n_queries}; }
  constexpr SeenBy keys_seen(const Block& b) const { return {0, b.n_keys}; }
};
inline constexpr Full full{};

inline constexpr Index infinite = std::numeric_limits<Index>::max();

namespace detail {

/// a + b and a - b, or the end of the range that they lie beyond.
constexpr Index clamped_sum(Index a, Index b) {
  constexpr Index least = std::numeric_limits<Index>::min(), most = std::numeric_limits<Index>::max();
  return b > 0 ? (a > most - b ? most : a + b) : a < least - b ? least : a + b;
}
constexpr Index clamped_difference(Index a, Index b) {
  constexpr Index least = std::numeric_limits<Index>::min(), most = std::numeric_limits<Index>::max();
  return b > 0 ? (a < least + b ? least : a - b) : a > most + b ? most : a - b;
}

}  // namespace detail

/// Sees left keys before its own position, its own, and right keys after: left + right + 1 in all. A call refuses a left
/// or a right below 0. Window{} is causal, and so is `{}` in the mask's place of a layer's forward.
struct Window {
  static constexpr bool ignores_heads = true;
  Index left = infinite, right = 0;

  constexpr bool sees(const At& at) const {
    return low(at.query_position) <= at.key_position && at.key_position <= high(at.query_position);
  }
  constexpr Cover cover(const Block& b) const {
    if (b.last_key_position() < low(b.query_position) || b.key_position > high(b.last_query_position()))
      return Cover::none;
    return low(b.last_query_position()) <= b.key_position && b.last_key_position() <= high(b.query_position)
               ? Cover::all
               : Cover::some;
  }
  /// A key at position k is seen from k - right to k + left.
  constexpr SeenBy seen_by(const Block& b) const {
    const Index from = right == infinite ? least : detail::clamped_difference(b.key_position, right);
    const Index to = left == infinite ? infinite : detail::clamped_sum(b.key_position, left);
    return part(from, to, b.query_position, b.n_queries);
  }
  /// A query at position q sees q - left to q + right.
  constexpr SeenBy keys_seen(const Block& b) const {
    return part(low(b.query_position), high(b.query_position), b.key_position, b.n_keys);
  }
  void check(const CallShape&) const {
    detail::require(left >= 0 && right >= 0,
                    "window(left, right) needs left >= 0 and right >= 0 (`infinite` for no bound); given ", left,
                    " and ", right);
  }

 private:
  static constexpr Index least = std::numeric_limits<Index>::min();
  /// Which of the n positions from `first` on lie in [from, to].
  static constexpr SeenBy part(Index from, Index to, Index first, Index n) {
    const Index last = first + n - 1;
    const Index begin = from <= first ? 0 : from > last ? n : from - first;
    const Index end = to >= last ? n : to < first ? 0 : to - first + 1;
    return {begin, std::max(begin, end)};
  }
  constexpr Index low(Index p) const { return left == infinite ? least : detail::clamped_difference(p, left); }
  constexpr Index high(Index p) const { return right == infinite ? infinite : detail::clamped_sum(p, right); }
};

/// window(left, right) with left, right >= 0; `infinite` means no bound on that side.
inline Window window(Index left, Index right) {
  const Window made{left, right};
  made.check({});
  return made;
}

inline constexpr Window causal{infinite, 0};

/// Keys at positions 0 … n-1 are seen by all: a prompt that is read in both directions is `(causal | prefix(n))`.
struct Prefix {
  static constexpr bool ignores_heads = true;
  Index n = 0;

  constexpr bool sees(const At& at) const { return at.key_position < n; }
  constexpr Cover cover(const Block& b) const {
    return b.last_key_position() < n ? Cover::all : b.key_position >= n ? Cover::none : Cover::some;
  }
  constexpr SeenBy seen_by(const Block& b) const { return {0, b.key_position < n ? b.n_queries : 0}; }
  constexpr SeenBy keys_seen(const Block& b) const { return {0, std::clamp<Index>(n - b.key_position, 0, b.n_keys)}; }
};
constexpr Prefix prefix(Index n) { return {n}; }

/// Any predicate; blocks are `some` unless a struct with sees and cover says more.
template <class F>
struct Where {
  F f;
  constexpr bool sees(const At& at) const { return f(at); }
};
template <MaskFunction F>
constexpr Where<F> where(F f) {
  return {std::move(f)};
}

namespace detail {

template <Mask M>
constexpr const M& as_mask(const M& mask) {
  return mask;
}
template <MaskFunction F>
constexpr Where<F> as_mask(const F& f) {
  return {f};
}

}  // namespace detail

/// Both must agree.
template <Mask A, Mask B>
struct And {
  static constexpr bool ignores_heads = detail::ignores_heads<A> && detail::ignores_heads<B>;
  A a;
  B b;

  constexpr bool sees(const At& at) const { return a.sees(at) && b.sees(at); }
  constexpr Cover cover(const Block& block) const {
    const Cover first = detail::cover(a, block);
    return first == Cover::none ? Cover::none : std::min(first, detail::cover(b, block));  // none < some < all
  }
  constexpr SeenBy seen_by(const Block& block) const {
    return detail::seen_by_both(detail::seen_by(a, block), detail::seen_by(b, block));
  }
  constexpr SeenBy keys_seen(const Block& block) const {
    return detail::seen_by_both(detail::keys_seen(a, block), detail::keys_seen(b, block));
  }
  void check(const CallShape& call) const { detail::check_operand(a, call), detail::check_operand(b, call); }
  constexpr Index valid_keys(Index sequence, Index n_keys) const {
    return std::min(detail::valid_keys(a, sequence, n_keys), detail::valid_keys(b, sequence, n_keys));
  }
};

/// One of them suffices.
template <Mask A, Mask B>
struct Or {
  static constexpr bool ignores_heads = detail::ignores_heads<A> && detail::ignores_heads<B>;
  A a;
  B b;

  constexpr bool sees(const At& at) const { return a.sees(at) || b.sees(at); }
  constexpr Cover cover(const Block& block) const {
    const Cover first = detail::cover(a, block);
    return first == Cover::all ? Cover::all : std::max(first, detail::cover(b, block));
  }
  constexpr SeenBy seen_by(const Block& block) const {
    return detail::seen_by_either(detail::seen_by(a, block), detail::seen_by(b, block));
  }
  constexpr SeenBy keys_seen(const Block& block) const {
    return detail::seen_by_either(detail::keys_seen(a, block), detail::keys_seen(b, block));
  }
  void check(const CallShape& call) const { detail::check_operand(a, call), detail::check_operand(b, call); }
  constexpr Index valid_keys(Index sequence, Index n_keys) const {
    return std::max(detail::valid_keys(a, sequence, n_keys), detail::valid_keys(b, sequence, n_keys));
  }
};

template <class A, class B>
requires(Mask<A> && (Mask<B> || MaskFunction<B>)) ||
    (MaskFunction<A> && Mask<B>)constexpr auto operator&(const A& a, const B& b) {
  return And<std::remove_cvref_t<decltype(detail::as_mask(a))>, std::remove_cvref_t<decltype(detail::as_mask(b))>>{
      detail::as_mask(a), detail::as_mask(b)};
}

template <class A, class B>
requires(Mask<A> && (Mask<B> || MaskFunction<B>)) ||
    (MaskFunction<A> && Mask<B>)constexpr auto operator|(const A& a, const B& b) {
  return Or<std::remove_cvref_t<decltype(detail::as_mask(a))>, std::remove_cvref_t<decltype(detail::as_mask(b))>>{
      detail::as_mask(a), detail::as_mask(b)};
}

}}  // namespace qkv::QKV_ABI

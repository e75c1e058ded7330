// mask.hpp — who may see whom: a mask is a value with one question, sees(at).
//
//     causal                 key_position <= query_position
//     window(left, right)    query_position - left <= key_position <= query_position + right   (causal = window(infinite, 0))
//     prefix(n)              key_position < n
//     where(f)               any bool f(const At&); a lambda may also stand alone
//     lengths, documents, boolean: masks that read an operand, in data_masks.hpp
//
// Masks compose: `causal & documents(ids)`, `(prefix(16) | window(64, 0)) & causal` (use parentheses). A mask may also
// answer for a whole block of queries × keys at once: cover(block) says none, all or some, so that kernels skip blocks
// and never add minus infinity to everything. `some` is always a legal answer. A mask that says so (`ignores_heads`) is asked
// once for all heads.
//
// Before: heads.hpp   Next: data_masks.hpp
#pragma once

#include <algorithm>
#include <concepts>
#include <limits>
#include <type_traits>
#include <utility>

#include "base/overlap.hpp"
#include "matrix.hpp"

namespace qkv { inline namespace QKV_ABI {

/// One (query, key) pair. `query` and `key` count rows inside the sequence; positions are absolute.
struct At {
  Index sequence = 0, head = 0;
  Index query = 0, key = 0;
  Index query_position = 0, key_position = 0;
};

/// A rectangle of pairs: queries first … and keys first … at consecutive positions; never empty.
struct Block {
  Index sequence = 0, head = 0;
  Index query = 0, n_queries = 1, query_position = 0;  // first row, how many, position of the first
  Index key = 0, n_keys = 1, key_position = 0;

  constexpr Index last_query_position() const { return query_position + n_queries - 1; }
  constexpr Index last_key_position() const { return key_position + n_keys - 1; }
};

enum class Cover { none, some, all };

/// What a call looks like to a mask or score that wants to check its operands against it before anything is written.
struct CallShape {
  Index sequences = 1, heads = 1;
  Index sequence = 0, n_queries = 0, n_keys = 0;  // of this sequence
  Index first_position = 0;                       // of its first query
  Index last_key_position = -1;                   // of its last key
  detail::Footprint output = {};                  // what the call writes: its output …
  detail::Footprint log_sum_exp = {};             // … and, where it was asked for, the log-sum-exp

  /// Raises where the call would write into an operand. x: a matrix, or a span of const.
  template <class X>
  void require_unwritten(const X& x, const char* name) const {
    const detail::Footprint operand = detail::footprint(x);
    detail::require(!detail::share_an_element(output, operand) && !detail::share_an_element(log_sum_exp, operand),
                    "the output (and the log-sum-exp) must not share elements with the operand of ", name);
  }
};

/// Of a block with one key: the queries [begin, end) that see it. Of a block with one query: the keys [begin, end) that it
/// sees. `exact` false: the mask cannot say it as one interval.
struct SeenBy {
  Index begin = 0, end = 0;
  bool exact = true;
};

template <class M>
concept Mask = requires(const M& mask, const At& at) {
  { mask.sees(at) } -> std::convertible_to<bool>;
};

/// A predicate that can stand where a mask is expected.
template <class F>
concept MaskFunction = !Mask<F> && std::is_invocable_r_v<bool, const F&, const At&> &&
                       std::same_as<std::remove_cvref_t<std::invoke_result_t<const F&, const At&>>, bool>;

namespace detail {

template <class M>
constexpr Cover cover(const M& mask, const Block& block) {
  if constexpr (requires {
                  { mask.cover(block) } -> std::same_as<Cover>;
                })
    return mask.cover(block);
  else
    return Cover::some;
}

/// Which queries of the block see its one key (block.n_keys == 1), as one interval where that is possible.
template <class M>
constexpr SeenBy seen_by(const M& mask, const Block& block) {
  if constexpr (requires {
                  { mask.seen_by(block) } -> std::same_as<SeenBy>;
                })
    return mask.seen_by(block);
  else
    return {0, 0, false};
}

/// Which keys of the block its one query sees (block.n_queries == 1), likewise.
template <class M>
constexpr SeenBy keys_seen(const M& mask, const Block& block) {
  if constexpr (requires {
                  { mask.keys_seen(block) } -> std::same_as<SeenBy>;
                })
    return mask.keys_seen(block);
  else
    return {0, 0, false};
}

/// Both, either.
constexpr SeenBy seen_by_both(const SeenBy& a, const SeenBy& b) {
  const Index begin = std::max(a.begin, b.begin);
  return {begin, std::max(begin, std::min(a.end, b.end)), a.exact && b.exact};
}
constexpr SeenBy seen_by_either(const SeenBy& a, const SeenBy& b) {
  const bool exact = a.exact && b.exact;
  if (a.begin == a.end) return {b.begin, b.end, exact};
  if (b.begin == b.end) return {a.begin, a.end, exact};
  const bool meet = a.begin <= b.end && b.begin <= a.end;
  return {std::min(a.begin, b.begin), std::max(a.end, b.end), exact && meet};
}

/// Whether the mask answers alike for every head: `static constexpr bool ignores_heads = true` in the mask says so.
template <class M>
inline constexpr bool ignores_heads = requires {
  requires M::ignores_heads;
};

template <class M>
void check_operand(const M& mask, const CallShape& call) {
  if constexpr (requires { mask.check(call); }) mask.check(call);
}

/// How many keys of the sequence are real; the rest is padding. n_keys unless the mask knows lengths.
template <class M>
constexpr Index valid_keys(const M& mask, Index sequence, Index n_keys) {
  if constexpr (requires {
                  { mask.valid_keys(sequence, n_keys) } -> std::same_as<Index>;
                })
    return mask.valid_keys(sequence, n_keys);
  else
    return n_keys;
}

}  // namespace detail

/// Everybody sees everything.
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

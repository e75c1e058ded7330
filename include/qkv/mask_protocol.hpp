// mask_protocol.hpp — the members of a mask: one is required, six more make it fast.
//
//     bool sees(const At&) const                            may this query see this key?                        required
//     Cover cover(const Block&) const                       of a block of pairs: none, all, or some             else: some
//     SeenBy seen_by(const Block&) const                    which queries see the block's one key               else: one by one
//     SeenBy keys_seen(const Block&) const                  which keys the block's one query sees               else: one by one
//     static constexpr bool ignores_heads = true            the answers are the same for every head             else: differ
//     Index valid_keys(Index sequence, Index n_keys) const  how many keys are not padding                       else: all
//     void check(const CallShape&) const                    raises where the mask does not fit the call         else: fits
//
// A member that is there with another type, or is spelt almost like one of these, is a compile error. `cover` and the
// intervals must agree with `sees`: laws in tests/laws/cover.cpp.
//
// Before: heads.hpp   Next: mask.hpp
#pragma once

#include <algorithm>
#include <concepts>
#include <limits>
#include <type_traits>

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

/// The sizes and outputs of a call, against which masks and scores check their operands before anything is written.
struct CallShape {
  Index sequences = 1, heads = 1;
  Index sequence = 0, n_queries = 0, n_keys = 0;  // of this sequence
  Index first_position = 0;                       // of its first query
  Index last_key_position = -1;                   // of its last key
  detail::Footprint output = {};                  // what the call writes: its output …
  detail::Footprint log_sum_exp = {};             // … and, where requested, the log-sum-exp

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

/// An optional member of a mask must have the name and type that kernels call: otherwise it would be ignored silently.
template <class M>
constexpr void check_members() {
  static_assert(
      !requires { &M::cover; } ||
          requires(const M& m, const Block& b) {
            { m.cover(b) } -> std::same_as<Cover>;
          },
      "qkv: a mask's cover must be `Cover cover(const Block&) const`");
  static_assert(
      !requires { &M::seen_by; } ||
          requires(const M& m, const Block& b) {
            { m.seen_by(b) } -> std::same_as<SeenBy>;
          },
      "qkv: a mask's seen_by must be `SeenBy seen_by(const Block&) const`");
  static_assert(
      !requires { &M::keys_seen; } ||
          requires(const M& m, const Block& b) {
            { m.keys_seen(b) } -> std::same_as<SeenBy>;
          },
      "qkv: a mask's keys_seen must be `SeenBy keys_seen(const Block&) const`");
  static_assert(
      !requires { &M::valid_keys; } ||
          requires(const M& m) {
            { m.valid_keys(Index{}, Index{}) } -> std::same_as<Index>;
          },
      "qkv: a mask's valid_keys must be `Index valid_keys(Index sequence, Index n_keys) const`");
  static_assert(
      !requires { &M::check; } || requires(const M& m, const CallShape& call) { m.check(call); },
      "qkv: a mask's check must be `void check(const CallShape&) const`");
  static_assert(
      !requires { &M::covers; } && !requires { &M::get_cover; } && !requires { &M::seenby; } &&
          !requires { &M::seen; } && !requires { &M::sees_keys; } && !requires { &M::key_seen; } &&
          !requires { &M::ignore_heads; } && !requires { &M::valid_key; } && !requires { &M::checks; },
      "qkv: a mask may have cover, seen_by, keys_seen, ignores_heads, valid_keys and check beside sees; a member is "
      "spelt almost like one of them");
}

}  // namespace detail

}}  // namespace qkv::QKV_ABI

// data_masks.hpp — masks that read an operand: lengths of sequences, documents in them, matrices of bool.
//
//     lengths(n)         key < n[sequence]: padding at the end of each sequence
//     documents(ids)     ids[query_position] == ids[key_position]: several documents packed into one sequence
//     boolean(matrix)    matrix(query, key), true = may see; boolean_per_head: one matrix per head
//     per_sequence(list) list[s] for sequence s of a batch: masks, or scores (score.hpp), of one type
//
// They compose with all others. They hold views of their operands, which must outlive the call; a temporary that would not
// is a compile error, and so is m.topRows(n) of a matrix that is not const, which could be one: write
// std::as_const(m).topRows(n). Operands that do not fit the call, or that it would overwrite, are refused before anything is
// written.
//
// Before: mask.hpp   Next: score.hpp
#pragma once

#include <algorithm>
#include <concepts>
#include <cstddef>
#include <span>
#include <type_traits>
#include <utility>

#include "mask.hpp"

namespace qkv { inline namespace QKV_ABI {

namespace detail {

/// What a span can be made of, and a temporary of that kind: a span of it would dangle.
template <class R>
concept List = requires(const std::remove_cvref_t<R>& list) {
  std::span(list);
};
template <class R>
concept DyingList = List<R> && !std::is_lvalue_reference_v<R> && !requires(const std::remove_cvref_t<R>& list) {
  detail::accept_span(list);
};

}  // namespace detail

/// Padding: in sequence s only the first lengths[s] key rows are real. They also define where the queries stand when
/// options.first_position is not given: the last query is at position lengths[s] - 1.
struct Lengths {
  static constexpr bool ignores_heads = true;
  std::span<const Index> n;

  bool sees(const At& at) const { return at.key < n[static_cast<std::size_t>(at.sequence)]; }
  Cover cover(const Block& b) const {
    const Index valid = n[static_cast<std::size_t>(b.sequence)];
    return b.key + b.n_keys <= valid ? Cover::all : b.key >= valid ? Cover::none : Cover::some;
  }
  SeenBy seen_by(const Block& b) const {
    return {0, b.key < n[static_cast<std::size_t>(b.sequence)] ? b.n_queries : 0};
  }
  SeenBy keys_seen(const Block& b) const {
    return {0, std::clamp<Index>(n[static_cast<std::size_t>(b.sequence)] - b.key, 0, b.n_keys)};
  }
  Index valid_keys(Index sequence, Index n_keys) const {
    const auto s = static_cast<std::size_t>(sequence);
    return s < n.size() ? std::clamp<Index>(n[s], 0, n_keys) : n_keys;  // check() refuses what is out of range
  }
  void check(const CallShape& call) const {
    detail::require(static_cast<Index>(n.size()) == call.sequences, "lengths needs one length per sequence; given ",
                    n.size(), " for ", call.sequences, " sequences");
    const Index valid = n[static_cast<std::size_t>(call.sequence)];
    detail::require(valid >= 0 && valid <= call.n_keys, "a length must satisfy 0 <= length <= n_keys; sequence ",
                    call.sequence, " has length ", valid, ", n_keys ", call.n_keys);
    call.require_unwritten(n, "lengths");
  }
};
inline Lengths lengths(std::span<const Index> n) { return {n}; }
template <detail::DyingRange<Index> R>
Lengths lengths(R&& n) = delete;  // the mask holds a view: the lengths must outlive it

/// Several documents packed into one sequence: ids[position] names the document a position belongs to.
struct Documents {
  static constexpr bool ignores_heads = true;
  std::span<const Index> ids;

  bool sees(const At& at) const { return id(at.query_position) == id(at.key_position); }
  /// One pass over the ids of the block's rows and columns: all of one id, or ranges that do not meet.
  Cover cover(const Block& b) const {
    const auto [q_low, q_high] = range(b.query_position, b.n_queries);
    const auto [k_low, k_high] = range(b.key_position, b.n_keys);
    if (q_high < k_low || k_high < q_low) return Cover::none;
    return q_low == q_high && k_low == k_high ? Cover::all : Cover::some;
  }
  /// Exact where the positions of one document follow one another.
  SeenBy seen_by(const Block& b) const { return part(id(b.key_position), b.query_position, b.n_queries); }
  SeenBy keys_seen(const Block& b) const { return part(id(b.query_position), b.key_position, b.n_keys); }
  void check(const CallShape& call) const {
    const Index last = std::max(call.first_position + call.n_queries - 1, call.last_key_position);
    detail::require(call.n_queries == 0 || call.first_position >= 0,
                    "documents needs positions >= 0; the first query is at ", call.first_position);
    detail::require(last < static_cast<Index>(ids.size()), "documents needs an id for every position; given ",
                    ids.size(), " ids, the last position is ", last);
    call.require_unwritten(ids, "documents");
  }

 private:
  Index id(Index position) const { return ids[static_cast<std::size_t>(position)]; }
  /// Which of the n positions from `first` on have this id.
  SeenBy part(Index of, Index first, Index n) const {
    const auto all = ids.subspan(static_cast<std::size_t>(first), static_cast<std::size_t>(n));
    const auto begin = std::find(all.begin(), all.end(), of);
    const auto end = std::find_if(begin, all.end(), [&](Index other) { return other != of; });
    return {begin - all.begin(), end - all.begin(), std::find(end, all.end(), of) == all.end()};
  }
  std::pair<Index, Index> range(Index position, Index count) const {
    Index low = id(position), high = low;
    for (Index i = 1; i < count; ++i) {
      low = std::min(low, id(position + i));
      high = std::max(high, id(position + i));
    }
    return {low, high};
  }
};
inline Documents documents(std::span<const Index> ids) { return {ids}; }
template <detail::DyingRange<Index> R>
Documents documents(R&& ids) = delete;

/// matrix(query, key) is true where the query may see the key; rows and columns of the call, not positions.
/// [n_queries, n_keys], or [heads·n_queries, n_keys] with one block of rows per head. In a batch it is a mask of every
/// sequence and must fit each: for sequences of unlike sizes write per_sequence(list of them).
struct Boolean {
  ConstView<bool> matrix;
  Index n_queries = 0;  // rows per head; 0: one matrix for all heads

  bool sees(const At& at) const { return matrix(at.head * n_queries + at.query, at.key); }
  void check(const CallShape& call) const {
    detail::require(
        matrix.cols() == call.n_keys &&
            matrix.rows() == (n_queries == 0 ? call.n_queries : call.heads * call.n_queries) &&
            (n_queries == 0 || n_queries == call.n_queries),
        "a boolean mask must be [n_queries, n_keys], or [heads*n_queries, n_keys] for boolean_per_head; given ",
        detail::Shape{matrix.rows(), matrix.cols()}, " for n_queries ", call.n_queries, ", n_keys ", call.n_keys,
        ", heads ", call.heads);
    call.require_unwritten(matrix, "a boolean mask");
  }
};

template <MatrixLike X>
Boolean boolean(const X& matrix) {
  static_assert(std::same_as<ScalarOf<X>, bool>,
                "qkv: boolean(matrix) needs a matrix of bool; scores to add go through bias(matrix)");
  return {view(matrix), 0};
}
template <detail::DyingOperand X>
Boolean boolean(X&&) = delete;  // a view: write boolean(m), boolean(std::as_const(m).topRows(n)); m outlives it

/// [heads·n_queries, n_keys]: head h uses rows h·n_queries …
template <MatrixLike X>
Boolean boolean_per_head(const X& matrix, Index heads) {
  static_assert(std::same_as<ScalarOf<X>, bool>, "qkv: boolean_per_head(matrix, heads) needs a matrix of bool");
  detail::require(heads >= 1 && matrix.rows() % heads == 0, "boolean_per_head needs heads*n_queries rows; given ",
                  matrix.rows(), " rows, heads ", heads);
  return {view(matrix), matrix.rows() / heads};
}
template <detail::DyingOperand X>
Boolean boolean_per_head(X&&, Index) = delete;  // a view: boolean_per_head(std::as_const(m).topRows(n), heads)

/// list[s] for sequence s of a batch: a mask where they are masks, a score where they are scores.
template <class M>
struct PerSequence {
  static constexpr bool ignores_heads = detail::ignores_heads<M>;
  std::span<const M> list;

  bool sees(const At& at) const requires Mask<M> { return of(at.sequence).sees(at); }
  Cover cover(const Block& b) const requires Mask<M> { return detail::cover(of(b.sequence), b); }
  SeenBy seen_by(const Block& b) const requires Mask<M> { return detail::seen_by(of(b.sequence), b); }
  SeenBy keys_seen(const Block& b) const requires Mask<M> { return detail::keys_seen(of(b.sequence), b); }
  template <class T>
  requires(!Mask<M>) T operator()(T score, const At& at) const { return of(at.sequence)(score, at); }

  Index valid_keys(Index sequence, Index n_keys) const {
    const bool known = static_cast<std::size_t>(sequence) < list.size();
    return known ? detail::valid_keys(of(sequence), sequence, n_keys) : n_keys;  // check() refuses what is not
  }
  void check(const CallShape& call) const {
    check(call.sequences);
    detail::check_operand(of(call.sequence), call);
  }
  void check(Index sequences) const {
    detail::require(static_cast<Index>(list.size()) == sequences,
                    "per_sequence needs one mask or score for each sequence; given ", list.size(), " for ", sequences,
                    " sequences");
  }
  const M& of(Index sequence) const { return list[static_cast<std::size_t>(sequence)]; }
};

/// masks: a vector, an array or a span, such as std::vector{boolean(a), boolean(b)}; it must outlive the call.
template <detail::List R>
auto per_sequence(const R& masks) {
  return PerSequence<std::remove_const_t<typename decltype(std::span(masks))::element_type>>{masks};
}
template <detail::DyingList R>
void per_sequence(R&&) = delete;  // a view: give the list a name, and let it outlive the call

namespace detail {

/// What a mask or score is to sequence s of n: itself, but for those of per_sequence, alone or in a composition.
template <class M>
struct OfSequence {
  static constexpr bool differs = false;
  static const M& get(const M& mask, Index, Index) { return mask; }
};
template <class M>
struct OfSequence<PerSequence<M>> {
  static constexpr bool differs = true;
  static const M& get(const PerSequence<M>& masks, Index s, Index n) { return masks.check(n), masks.of(s); }
};
template <template <class, class> class Pair, class A, class B>
struct OfPair {
  static constexpr bool differs = OfSequence<A>::differs || OfSequence<B>::differs;
  static decltype(auto) get(const Pair<A, B>& pair, Index s, Index n) {
    if constexpr (!differs) {
      return (pair);
    } else {
      decltype(auto) a = OfSequence<A>::get(pair.a, s, n);
      decltype(auto) b = OfSequence<B>::get(pair.b, s, n);
      return Pair<std::remove_cvref_t<decltype(a)>, std::remove_cvref_t<decltype(b)>>{a, b};
    }
  }
};
template <class A, class B>
struct OfSequence<And<A, B>> : OfPair<And, A, B> {};
template <class A, class B>
struct OfSequence<Or<A, B>> : OfPair<Or, A, B> {};

template <class M>
decltype(auto) of_sequence(const M& mask, Index s, Index n) {
  return OfSequence<M>::get(mask, s, n);
}

}  // namespace detail

}}  // namespace qkv::QKV_ABI

// score.hpp — what happens to q·k before the mask and the softmax: a function T(T score, const At&).
//
//     scale          score · 1/√head_dim      always first; options.scale
//     soft_cap(c)    c · tanh(score / c)      Gemma 2, arXiv:2408.00118
//     alibi(slopes)  score - slope[head] · (query_position - key_position)    Press et al. 2021, arXiv:2108.12409
//     bias(matrix)   score + matrix(query, key)
//     f              any T f(T score, const At&), inlined; then(a, b) applies a, then b
//
// The order is ONNX's (Attention, opset 25): scale, scores from left to right, mask, softmax. A score that is -inf in the end
// is masked: its value is not read. A bias of -inf makes it so whatever the score was, so that of a key behind it nothing is
// read into the result either, not even NaN, as behind a mask. That is bias's doing: a function of your own that adds -inf to
// NaN, or to +inf, gives NaN; let it return -inf. What comes after a bias acts on -inf: soft_cap would make -cap of it.
// A function may be called for pairs that the mask hides too (the result is dropped): it must be defined for them.
// Scores hold views of slopes and matrices: those must outlive the call. Of a part of a matrix that is not const write
// bias(std::as_const(m).topRows(n)): m.topRows(n) could be of a temporary as well, and does not compile.
//
// Before: data_masks.hpp   Next: softmax.hpp
#pragma once

#include <cmath>
#include <concepts>
#include <limits>
#include <span>
#include <type_traits>
#include <utility>

#include "data_masks.hpp"

namespace qkv { inline namespace QKV_ABI {

template <class S, class T>
concept Score = std::is_invocable_r_v<T, const S&, T, const At&>;

/// The score itself.
struct Plain {
  template <class T>
  constexpr T operator()(T score, const At&) const {
    return score;
  }
};
inline constexpr Plain plain{};

/// cap · tanh(score / cap): scores stay inside (-cap, cap).
struct SoftCap {
  double cap = 0;  // a call refuses what is not finite and above 0

  /// The cap as a finite T, not 0 where it is above.
  template <class T>
  T cap_as() const {
    if constexpr (std::numeric_limits<T>::is_specialized) {
      constexpr T most = std::numeric_limits<T>::max();
      if (cap > static_cast<double>(most)) return most;
      if (cap < -static_cast<double>(most)) return -most;
      constexpr T least = std::numeric_limits<T>::min();
      if (cap > 0 && cap < static_cast<double>(least)) return least;
    }
    return static_cast<T>(cap);
  }

  template <class T>
  T operator()(T score, const At&) const {
    using std::tanh;
    const T c = cap_as<T>();
    return c * tanh(score / c);
  }
  void check(const CallShape&) const {
    detail::require(cap > 0 && cap <= std::numeric_limits<double>::max(), "soft_cap needs a finite cap > 0; given ",
                    cap);
  }
};
inline SoftCap soft_cap(double cap) {
  const SoftCap made{cap};
  made.check({});
  return made;
}

/// A head-dependent penalty on distance; slopes from alibi_slopes(heads), one per head.
template <class T>
struct Alibi {
  std::span<const T> slopes;

  template <class U>
  U operator()(U score, const At& at) const {
    return score + static_cast<U>(slopes[static_cast<std::size_t>(at.head)]) *
                       static_cast<U>(at.key_position - at.query_position);
  }
  void check(const CallShape& call) const {
    detail::require(static_cast<Index>(slopes.size()) == call.heads, "alibi needs one slope per head; given ",
                    slopes.size(), " for ", call.heads, " heads");
    call.require_unwritten(slopes, "alibi");
  }
};
template <MatrixLike X>
Alibi<ScalarOf<X>> alibi(const X& slopes) {
  static_assert(
      is_viewable<X> && X::InnerStrideAtCompileTime == 1 && (X::RowsAtCompileTime == 1 || X::ColsAtCompileTime == 1),
      "qkv: alibi(slopes) needs a vector in memory, without gaps, such as alibi_slopes<float>(heads); copy a matrix's "
      "column first");
  return {{slopes.derived().data(), static_cast<std::size_t>(slopes.size())}};
}
template <class T>
Alibi<T> alibi(std::span<const T> slopes) {
  return {slopes};
}
template <detail::DyingOperand X>
Alibi<ScalarOf<X>> alibi(X&&) = delete;  // a view: write alibi(x), alibi(std::as_const(x).head(n)); x outlives it

/// Adds matrix(query, key), -inf to anything being -inf; rows and columns of the call. [n_queries, n_keys], or
/// [heads·n_queries, n_keys] per head. In a batch it is the bias of every sequence and must fit each: for sequences of
/// unlike sizes write per_sequence(list of them).
template <class T>
struct Bias {
  ConstView<T> matrix;
  Index n_queries = 0;  // rows per head; 0: one matrix for all heads

  template <class U>
  U operator()(U score, const At& at) const {
    const U added = static_cast<U>(matrix(at.head * n_queries + at.query, at.key));
    if constexpr (std::numeric_limits<U>::has_infinity)
      if (added == -std::numeric_limits<U>::infinity()) return added;  // NaN + -inf would be NaN
    return score + added;
  }
  void check(const CallShape& call) const {
    detail::require(matrix.cols() == call.n_keys &&
                        matrix.rows() == (n_queries == 0 ? call.n_queries : call.heads * call.n_queries) &&
                        (n_queries == 0 || n_queries == call.n_queries),
                    "a bias must be [n_queries, n_keys], or [heads*n_queries, n_keys] for bias_per_head; given ",
                    detail::Shape{matrix.rows(), matrix.cols()}, " for n_queries ", call.n_queries, ", n_keys ",
                    call.n_keys, ", heads ", call.heads);
    call.require_unwritten(matrix, "a bias");
  }
};

template <MatrixLike X>
Bias<ScalarOf<X>> bias(const X& matrix) {
  static_assert(!std::same_as<ScalarOf<X>, bool>,
                "qkv: bias(matrix) adds numbers; a matrix of bool is a mask: boolean(matrix)");
  return {view(matrix), 0};
}
template <detail::DyingOperand X>
Bias<ScalarOf<X>> bias(X&&) = delete;  // a view: write bias(m), bias(std::as_const(m).topRows(n)); m outlives it

/// [heads·n_queries, n_keys]: head h uses rows h·n_queries …
template <MatrixLike X>
Bias<ScalarOf<X>> bias_per_head(const X& matrix, Index heads) {
  detail::require(heads >= 1 && matrix.rows() % heads == 0, "bias_per_head needs heads*n_queries rows; given ",
                  matrix.rows(), " rows, heads ", heads);
  return {view(matrix), matrix.rows() / heads};
}
template <detail::DyingOperand X>
Bias<ScalarOf<X>> bias_per_head(X&&, Index) = delete;  // a view: bias_per_head(std::as_const(m).topRows(n), heads)

/// a, then b. ONNX Attention with both is then(soft_cap(c), bias(m)).
template <class A, class B>
struct Then {
  A a;
  B b;

  template <class T>
  constexpr T operator()(T score, const At& at) const {
    return b(a(score, at), at);
  }
  void check(const CallShape& call) const { detail::check_operand(a, call), detail::check_operand(b, call); }
};
namespace detail {
template <class A, class B>
struct OfSequence<Then<A, B>> : OfPair<Then, A, B> {};
}  // namespace detail

template <class A, class B>
constexpr Then<A, B> then(A a, B b) {
  return {std::move(a), std::move(b)};
}
template <class A, class B, class... More>
constexpr auto then(A a, B b, More... more) {
  return then(then(std::move(a), std::move(b)), std::move(more)...);
}

}}  // namespace qkv::QKV_ABI

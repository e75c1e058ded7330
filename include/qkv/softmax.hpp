// softmax.hpp — softmax of rows, and the running state (m, l, o), which merges: the design rests on it.
//
//     softmax(s)_j = exp(s_j - m) / l,     m = max_j s_j,     l = Σ_j exp(s_j - m)
//
// Over a set of keys, a query's running state is (m, l, o) with o = Σ_j exp(s_j - m) · v_j. States over disjoint key sets
// merge, in any order and any bracketing; the state of no keys, (-inf, 0, 0), is the identity:
//
//     m = max(m₁, m₂)     l = e^(m₁-m) l₁ + e^(m₂-m) l₂     o = e^(m₁-m) o₁ + e^(m₂-m) o₂     finish: o / l
//
// Tiles, splits of the keys, chunks, shared prefixes and attention sinks (a state with v = 0) are different bracketings
// of the same sum. Milakov & Gimelshein 2018, arXiv:1805.02867; Dao et al. 2022, arXiv:2205.14135, section 3.1.
//
// A query that sees no key gives zeros and log-sum-exp -inf, never NaN. NaN in a score or value that is seen propagates.
//
// Before: score.hpp   Next: options.hpp
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <span>

#include "base/multiply_add.hpp"
#include "matrix.hpp"

namespace qkv { inline namespace QKV_ABI {

namespace detail {

template <class T>
inline constexpr T minus_infinity = -std::numeric_limits<T>::infinity();

/// max that keeps a NaN from either side.
template <class T>
T nan_max(T a, T b) {
  return a > b || a != a ? a : b;
}

/// e^(m - top) for a maximum m <= top; 0 where there is nothing yet.
template <class T>
T weight_of(T m, T top) {
  using std::exp;
  return m == minus_infinity<T> ? T(0) : m == top ? T(1) : exp(m - top);
}

/// (m, l, o[0..n)) ← merge with (m2, l2, o2[0..n)): the one line that the library is built on (the
/// tiled kernel has it transposed: kernel/tiled/query_state.hpp).
template <class T>
void merge_row(T& m, T& l, T* o, T m2, T l2, const T* o2, Index n) {
  const T top = nan_max(m, m2);
  const T mine = weight_of(m, top), theirs = weight_of(m2, top);
  m = top;
  l = multiply_add(theirs, l2, mine * l);
  for (Index i = 0; i < n; ++i) o[i] = multiply_add(theirs, o2[i], mine * o[i]);
}

/// What remains at the end: out = o · factor, and the log-sum-exp, for one query and head. The sink joins here.
template <class T>
struct Finish {
  T factor, log_sum_exp;
};

template <class T>
Finish<T> finish(T m, T l, T sink) {
  using std::log;
  const T top = nan_max(m, sink);
  if (top == minus_infinity<T>) return {T(0), top};
  const T own = weight_of(m, top);
  const T total = l * own + weight_of(sink, top);
  return {own / total, top + log(total)};
}

}  // namespace detail

/// Softmax of each row; a row of -inf gives zeros. scores [n_queries, n_keys] -> [n_queries, n_keys].
template <MatrixLike X>
Matrix<ScalarOf<X>> softmax(const X& scores) {
  using T = ScalarOf<X>;
  using std::exp;
  Matrix<T> p = scores;
  for (Index i = 0; i < p.rows() && p.cols() > 0; ++i) {
    T m = detail::minus_infinity<T>, l = 0;
    for (Index j = 0; j < p.cols(); ++j) m = detail::nan_max(m, p(i, j));
    if (m == detail::minus_infinity<T>) {
      p.row(i).setZero();
      continue;
    }
    for (Index j = 0; j < p.cols(); ++j) l += p(i, j) = exp(p(i, j) - m);
    p.row(i) /= l;
  }
  return p;
}

/// The running softmax state of n_queries queries and all their heads over some set of keys. Sinks are not part of it:
/// they join once, in finish.
template <class T>
struct SoftmaxState {
  Matrix<T> maximum;   // m [n_queries, heads], natural units: scale and scores included
  Matrix<T> sum;       // l [n_queries, heads]
  Matrix<T> weighted;  // o [n_queries, heads·v_head_dim]

  /// The state of no keys.
  static SoftmaxState empty(Index n_queries, Index heads, Index v_head_dim) {
    detail::require(n_queries >= 0 && heads >= 1 && v_head_dim >= 0,
                    "a state needs n_queries >= 0, heads >= 1, v_head_dim >= 0; given ", n_queries, ", ", heads, ", ",
                    v_head_dim);
    return {Matrix<T>::Constant(n_queries, heads, detail::minus_infinity<T>), Matrix<T>::Zero(n_queries, heads),
            Matrix<T>::Zero(n_queries, detail::checked_product(heads, v_head_dim))};
  }

  Index n_queries() const { return maximum.rows(); }
  Index heads() const { return maximum.cols(); }
  Index v_head_dim() const { return weighted.cols() / std::max<Index>(heads(), 1); }

  /// Adds the keys of `other`, which must be disjoint from those already in this state.
  void merge(const SoftmaxState& other) {
    detail::require(
        other.n_queries() == n_queries() && other.heads() == heads() && other.weighted.cols() == weighted.cols(),
        "states that merge must be of equal shape; given ", detail::Shape{n_queries(), weighted.cols()}, " with ",
        heads(), " heads and ", detail::Shape{other.n_queries(), other.weighted.cols()}, " with ", other.heads(),
        " heads");
    const Index width = v_head_dim();
    for (Index i = 0; i < n_queries(); ++i)
      for (Index h = 0; h < heads(); ++h)
        detail::merge_row(maximum(i, h), sum(i, h), weighted.row(i).data() + h * width, other.maximum(i, h),
                          other.sum(i, h), other.weighted.row(i).data() + h * width, width);
  }

  /// o / l: [n_queries, heads·v_head_dim]. `sinks`: none, or one learned logit per head (arXiv:2309.17453).
  Matrix<T> finish(std::span<const T> sinks = {}) const {
    check_sinks(sinks);
    Matrix<T> out = weighted;
    const Index width = v_head_dim();
    for (Index i = 0; i < n_queries(); ++i)
      for (Index h = 0; h < heads(); ++h)
        out.row(i).segment(h * width, width) *= detail::finish(maximum(i, h), sum(i, h), sink(sinks, h)).factor;
    return out;
  }

  /// log Σ exp(score), natural: [n_queries, heads]. -inf where a query saw nothing and there is no sink.
  Matrix<T> log_sum_exp(std::span<const T> sinks = {}) const {
    check_sinks(sinks);
    Matrix<T> out(n_queries(), heads());
    for (Index i = 0; i < n_queries(); ++i)
      for (Index h = 0; h < heads(); ++h)
        out(i, h) = detail::finish(maximum(i, h), sum(i, h), sink(sinks, h)).log_sum_exp;
    return out;
  }

 private:
  static T sink(std::span<const T> sinks, Index h) {
    return sinks.empty() ? detail::minus_infinity<T> : sinks[static_cast<std::size_t>(h)];
  }
  void check_sinks(std::span<const T> sinks) const {
    detail::require(sinks.empty() || static_cast<Index>(sinks.size()) == heads(),
                    "sinks needs one logit per head; given ", sinks.size(), " for ", heads(), " heads");
  }
};

/// a and b over disjoint keys, merged.
template <class T>
SoftmaxState<T> merge(SoftmaxState<T> a, const SoftmaxState<T>& b) {
  a.merge(b);
  return a;
}

}}  // namespace qkv::QKV_ABI

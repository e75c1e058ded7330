// rope.hpp — rotary positions: each pair of features of a query or key is rotated by an angle proportional to its position.
//
//     (a, b) -> (a·cos φ − b·sin φ,  a·sin φ + b·cos φ)           φ = position · f_i,   f from rope_frequencies
//
//     x [n, heads·head_dim]: of each head the first `dim` features are rotated, the others stay (partial RoPE)
//
// The score of a rotated query and key depends on the distance of their positions only: ⟨R_m q, R_n k⟩ = ⟨q, R_(n−m) k⟩.
// Angles are computed in double, with a relative error of some 2⁻⁵², and their cosines rounded to T once: f32 results hold up
// to positions of 2²⁸, where an angle may be off by 2⁻²⁴. Positions may be negative: a rotation by −p undoes p.
// Cost: 3·dim flops per head and token. Su et al. 2021, arXiv:2104.09864, eq. 34.
//
// Before: rope_config.hpp   Next: norm.hpp
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <span>
#include <utility>

#include "base/in_place.hpp"
#include "base/multiply_add.hpp"
#include "rope_config.hpp"

namespace qkv { inline namespace QKV_ABI {

namespace detail {

/// Pairs whose cosines are held on the stack at a time: all of a head of 128 features.
inline constexpr Index rope_block = 64;

template <class T>
struct CosSin {
  const T *cos, *sin;
};

/// The one place where angles become numbers: n pairs at one position.
template <class T>
void cos_sin(Index position, const double* frequency, Index n, double factor, T* cos, T* sin) {
  for (Index i = 0; i < n; ++i) {
    const double angle = static_cast<double>(position) * frequency[i];
    cos[i] = static_cast<T>(factor * std::cos(angle));
    sin[i] = static_cast<T>(factor * std::sin(angle));
  }
}

/// y = x rotated; pair i is (x[i·Step], x[i·Step + gap]). y may be x: a group of pairs is read before it is written.
template <Index Step, class T>
void rotate_pairs(const T* x, T* y, Index gap, CosSin<T> at, Index n) {
  constexpr Index group = 16;
  for (Index first = 0; first < n; first += group) {
    T a[group] = {}, b[group] = {}, c[group] = {}, s[group] = {};
    const auto read = [&](Index i) {
      a[i] = x[(first + i) * Step], b[i] = x[(first + i) * Step + gap];
      c[i] = at.cos[first + i], s[i] = at.sin[first + i];
    };
    const auto write = [&](Index i) {
      y[(first + i) * Step] = multiply_add(a[i], c[i], -(b[i] * s[i]));
      y[(first + i) * Step + gap] = multiply_add(a[i], s[i], b[i] * c[i]);
    };
    if (n - first >= group) {  // a constant count becomes vectors
      for (Index i = 0; i < group; ++i) read(i);
      for (Index i = 0; i < group; ++i) write(i);
    } else {
      for (Index i = 0; i < n - first; ++i) read(i);
      for (Index i = 0; i < n - first; ++i) write(i);
    }
  }
}

/// Rotates features [begin, begin + dim) of each head and copies the others. `angles(row, pair, n)` gives the CosSin of n
/// pairs from `pair` on.
template <class T, class Angles>
void rotate_rows(View<T> out, const ConstView<T>& x, Index heads, Index begin, Index dim, Pairing pairing,
                 Angles&& angles) {
  const Index head_dim = x.cols() / heads, pairs = dim / 2, end = begin + dim;
  if (head_dim == 0) return;  // heads of nothing may be any number
  if (out.data() != x.data() && dim < head_dim)
    for (Index row = 0; row < x.rows(); ++row)
      for (Index head = 0; head < heads; ++head) {
        const T* from = &x.coeffRef(row, head * head_dim);
        T* to = &out.coeffRef(row, head * head_dim);
        std::copy(from, from + begin, to);
        std::copy(from + end, from + head_dim, to + end);
      }
  for (Index pair = 0; pair < pairs; pair += rope_block)
    for (Index row = 0; row < x.rows(); ++row) {
      const Index n = std::min(rope_block, pairs - pair);
      const CosSin<T> at = angles(row, pair, n);
      for (Index head = 0; head < heads; ++head) {
        const T* from = &x.coeffRef(row, head * head_dim + begin);
        T* to = &out.coeffRef(row, head * head_dim + begin);
        if (pairing == Pairing::interleaved)
          rotate_pairs<2>(from + 2 * pair, to + 2 * pair, 1, at, n);
        else
          rotate_pairs<1>(from + pair, to + pair, pairs, at, n);
      }
    }
}

template <MatrixLike Out, MatrixLike X>
void check_rope_shapes(const Out& out, const X& x, Index heads, Index nope_dim, Index head_dim) {
  require(heads >= 1 && nope_dim >= 0 && x.cols() % heads == 0 && x.cols() / heads - nope_dim == head_dim,
          "RoPE on heads of ", head_dim, " features takes x [n, heads·(nope_dim + head_dim)]; x is ",
          Shape{x.rows(), x.cols()}, ", heads ", heads, ", nope_dim ", nope_dim);
  require(out.rows() == x.rows() && out.cols() == x.cols(), "RoPE's output has the shape of x, ",
          Shape{x.rows(), x.cols()}, "; given ", Shape{out.rows(), out.cols()});
  require_same_or_disjoint(view(out), view(x));
}

inline void check_positions(std::span<const Index> positions, Index rows) {
  require(static_cast<Index>(positions.size()) == rows, "RoPE takes one position per row: ", positions.size(),
          " positions for ", rows, " rows");
}

}  // namespace detail

/// A model's rotation. A const Rope may be used from several threads at once.
///
/// Every function takes x [n, heads·(nope_dim + head_dim)], whose first nope_dim features of each head stay as they are
/// (MLA's queries; 0 elsewhere), and either the position of the first row or one position per row. `out` is x itself or
/// does not overlap it. Nothing is allocated except by `reserve` and by `apply`'s result.
template <class T>
class Rope {
 public:
  Rope(const RopeConfig& config, Index head_dim)
      : config_(config), head_dim_(head_dim), frequencies_(rope_frequencies(config, head_dim)) {}
  /// With frequencies of its own, [rotated(head_dim) / 2] radians per position: config gives pairing and attention factor.
  Rope(const RopeConfig& config, Index head_dim, RowVector<double> frequencies)
      : config_(config), head_dim_(head_dim), frequencies_(std::move(frequencies)) {
    check(config, head_dim);
    detail::require(frequencies_.size() == dim() / 2 && frequencies_.allFinite(),
                    "RoPE needs one finite frequency per pair, ", dim() / 2, "; given ", frequencies_.size());
  }

  const RopeConfig& config() const { return config_; }
  Index head_dim() const { return head_dim_; }
  Index dim() const { return config_.rotated(head_dim_); }               // features that are rotated
  const RowVector<double>& frequencies() const { return frequencies_; }  // [dim / 2]
  const Matrix<T>& cos() const { return cos_; }                          // [reserved positions, dim / 2]
  const Matrix<T>& sin() const { return sin_; }

  /// Keeps the cosines and sines of positions 0 … n_positions-1, which saves time and changes no bit. Others are
  /// computed when they are needed.
  void reserve(Index n_positions) {
    detail::require(n_positions >= 0, "RoPE's table needs n_positions >= 0; given ", n_positions);
    Matrix<T> cos(n_positions, dim() / 2), sin(n_positions, dim() / 2);  // both, or what was there stays
    for (Index p = 0; p < n_positions; ++p)
      detail::cos_sin(p, frequencies_.data(), dim() / 2, config_.scaling.attention_factor, cos.row(p).data(),
                      sin.row(p).data());
    cos_ = std::move(cos), sin_ = std::move(sin);
  }

  template <MatrixLike Out, MatrixLike X>
  void apply_into(Out&& out, const X& x, Index heads, Index first_position, Index nope_dim = 0) const {
    detail::check_rope_shapes(out, x, heads, nope_dim, head_dim_);
    detail::require(first_position <= std::numeric_limits<Index>::max() - x.rows(), "the positions of ", x.rows(),
                    " rows from ", first_position, " on do not fit an Index");
    rotate(writable_view(out), view(x), heads, nope_dim, [=](Index row) { return first_position + row; });
  }
  template <MatrixLike Out, MatrixLike X>
  void apply_into(Out&& out, const X& x, Index heads, std::span<const Index> positions, Index nope_dim = 0) const {
    detail::check_rope_shapes(out, x, heads, nope_dim, head_dim_);
    detail::check_positions(positions, x.rows());
    rotate(writable_view(out), view(x), heads, nope_dim,
           [=](Index row) { return positions[static_cast<std::size_t>(row)]; });
  }

  template <MatrixLike X>
  void apply_in_place(X&& x, Index heads, Index first_position, Index nope_dim = 0) const {
    apply_into(x, x, heads, first_position, nope_dim);
  }
  template <MatrixLike X>
  void apply_in_place(X&& x, Index heads, std::span<const Index> positions, Index nope_dim = 0) const {
    apply_into(x, x, heads, positions, nope_dim);
  }

  template <MatrixLike X>
  Matrix<T> apply(const X& x, Index heads, Index first_position, Index nope_dim = 0) const {
    Matrix<T> out(x);
    apply_into(out, out, heads, first_position, nope_dim);
    return out;
  }
  template <MatrixLike X>
  Matrix<T> apply(const X& x, Index heads, std::span<const Index> positions, Index nope_dim = 0) const {
    Matrix<T> out(x);
    apply_into(out, out, heads, positions, nope_dim);
    return out;
  }

  /// Moves rows that are rotated already by `delta` positions: R_p x -> R_(p+delta) x. The attention factor, which they
  /// carry already, is not applied again.
  template <MatrixLike X>
  void shift_in_place(X&& x, Index heads, Index delta, Index nope_dim = 0) const {
    detail::check_rope_shapes(x, x, heads, nope_dim, head_dim_);
    T cos[detail::rope_block], sin[detail::rope_block];
    Index held = -1;
    detail::rotate_rows<T>(writable_view(x), view(x), heads, nope_dim, dim(), config_.pairing,
                           [&](Index, Index pair, Index n) -> detail::CosSin<T> {
                             if (held != pair) detail::cos_sin(delta, frequencies_.data() + pair, n, 1.0, cos, sin);
                             held = pair;
                             return {cos, sin};
                           });
  }

 private:
  template <class PositionOf>
  void rotate(View<T> out, const ConstView<T>& x, Index heads, Index nope_dim, PositionOf&& position_of) const {
    T cos[detail::rope_block], sin[detail::rope_block];
    detail::rotate_rows<T>(
        out, x, heads, nope_dim, dim(), config_.pairing, [&](Index row, Index pair, Index n) -> detail::CosSin<T> {
          const Index p = position_of(row);
          if (p >= 0 && p < cos_.rows()) return {&cos_.coeffRef(p, pair), &sin_.coeffRef(p, pair)};
          detail::cos_sin(p, frequencies_.data() + pair, n, config_.scaling.attention_factor, cos, sin);
          return {cos, sin};
        });
  }

  RopeConfig config_;
  Index head_dim_;
  RowVector<double> frequencies_;
  Matrix<T> cos_, sin_;
};

namespace detail {

/// Rotates by the caller's tables: row i of x by row row_of(i), which is in range.
template <MatrixLike Out, MatrixLike X, MatrixLike Cos, MatrixLike Sin, class RowOf>
void rotate_by_tables(Out&& out, const X& x, Index heads, const Cos& cos, const Sin& sin, Pairing pairing,
                      RowOf&& row_of) {
  using T = ScalarOf<X>;
  const Index dim = 2 * cos.cols(), head_dim = heads >= 1 ? x.cols() / heads : 0;
  check_rope_shapes(out, x, heads, 0, head_dim);
  require(cos.rows() == sin.rows() && cos.cols() == sin.cols() && dim <= head_dim,
          "RoPE's tables must both be [positions, dim/2] with dim <= head_dim ", head_dim, "; cos is ",
          Shape{cos.rows(), cos.cols()}, ", sin is ", Shape{sin.rows(), sin.cols()});
  require_disjoint(out, cos, "cos");
  require_disjoint(out, sin, "sin");
  const auto c = view(cos), s = view(sin);
  rotate_rows<T>(writable_view(out), view(x), heads, 0, dim, pairing, [&](Index row, Index pair, Index) -> CosSin<T> {
    return {&c.coeffRef(row_of(row), pair), &s.coeffRef(row_of(row), pair)};
  });
}

}  // namespace detail

/// Rotation by the caller's own tables (ONNX RotaryEmbedding): row i of x [n, heads·head_dim] is rotated by row
/// positions[i] of cos and sin [max_positions, dim/2]; features past dim stay. Throws, before it writes, on a position outside the
/// tables. `out` is x itself or does not overlap it. Allocates nothing.
template <MatrixLike Out, MatrixLike X, MatrixLike Cos, MatrixLike Sin>
void apply_rope_into(Out&& out, const X& x, Index heads, const Cos& cos, const Sin& sin, Pairing pairing,
                     std::span<const Index> positions) {
  detail::check_positions(positions, x.rows());
  for (Index row = 0; row < x.rows(); ++row) {
    const Index p = positions[static_cast<std::size_t>(row)];
    detail::require(p >= 0 && p < cos.rows(), "position ", p, " of row ", row, " must lie in the tables' 0 … ",
                    cos.rows() - 1);
  }
  detail::rotate_by_tables(out, x, heads, cos, sin, pairing,
                           [=](Index row) { return positions[static_cast<std::size_t>(row)]; });
}

/// The same with a row of cos and sin [n, dim/2] for each row of x.
template <MatrixLike Out, MatrixLike X, MatrixLike Cos, MatrixLike Sin>
void apply_rope_into(Out&& out, const X& x, Index heads, const Cos& cos, const Sin& sin, Pairing pairing) {
  detail::require(cos.rows() == x.rows(), "without positions the tables need one row per row of x; x is ",
                  detail::Shape{x.rows(), x.cols()}, ", cos is ", detail::Shape{cos.rows(), cos.cols()});
  detail::rotate_by_tables(out, x, heads, cos, sin, pairing, [](Index row) { return row; });
}

/// Either as a new matrix: apply_rope(x, heads, cos, sin, pairing[, positions]).
template <MatrixLike X, MatrixLike Cos, MatrixLike Sin, class... Positions>
Matrix<ScalarOf<X>> apply_rope(const X& x, Index heads, const Cos& cos, const Sin& sin, Pairing pairing,
                               const Positions&... positions) {
  Matrix<ScalarOf<X>> out(x);
  apply_rope_into(out, out, heads, viewable(cos), viewable(sin), pairing, positions...);
  return out;
}

}}  // namespace qkv::QKV_ABI

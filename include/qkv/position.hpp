// position.hpp — positions without rotation: vectors that are added to embeddings, and ALiBi's slopes. (RoPE: rope.hpp.)
//
//     sinusoidal  PE(p, 2i) = sin(p / 10000^(2i/d))   PE(p, 2i+1) = cos(same)     Vaswani et al. 2017, §3.5
//     learned     x_i + P[p_i],  P [max_positions, model_dim]                     GPT-2, BERT
//     ALiBi       score − slope_h · (query_position − key_position)               Press et al. 2021, arXiv:2108.12409
//
// The first two are added to the embeddings once; ALiBi's slopes go into the scores of every layer (score.hpp).
//
// Before: embedding.hpp   Next: rope_config.hpp
#pragma once

#include <bit>
#include <cmath>
#include <numeric>
#include <span>
#include <utility>
#include <vector>

#include "base/in_place.hpp"
#include "matrix.hpp"

namespace qkv { inline namespace QKV_ABI {

/// The sinusoidal vectors of the given positions, [positions, model_dim]; any sign, odd model_dim too.
template <class T>
Matrix<T> sinusoidal_positions(std::span<const Index> positions, Index model_dim) {
  detail::require(model_dim >= 1, "sinusoidal positions need model_dim >= 1; given ", model_dim);
  Matrix<T> table(static_cast<Index>(positions.size()), model_dim);
  for (Index i = 0; i < model_dim && table.rows() > 0; ++i) {
    // Vaswani's exponent 2i/d is the even feature below this one, over d.
    const double frequency = std::pow(10000.0, -static_cast<double>(i - i % 2) / static_cast<double>(model_dim));
    for (Index row = 0; row < table.rows(); ++row) {
      const double angle = static_cast<double>(positions[static_cast<std::size_t>(row)]) * frequency;
      table(row, i) = static_cast<T>(i % 2 == 0 ? std::sin(angle) : std::cos(angle));
    }
  }
  return table;
}

/// The same for positions 0 … n_positions-1.
template <class T>
Matrix<T> sinusoidal_positions(Index n_positions, Index model_dim) {
  detail::require(n_positions >= 0, "sinusoidal positions need n_positions >= 0; given ", n_positions);
  std::vector<Index> positions(static_cast<std::size_t>(n_positions));
  std::iota(positions.begin(), positions.end(), Index{0});
  return sinusoidal_positions<T>(positions, model_dim);
}

/// A table of positions that is added to the tokens: learned, or sinusoidal_positions(n, model_dim).
template <class T>
class LearnedPositions {
 public:
  /// table [max_positions, model_dim].
  explicit LearnedPositions(Matrix<T> table) : table_(std::move(table)) {}

  Index max_positions() const { return table_.rows(); }
  Index model_dim() const { return table_.cols(); }
  const Matrix<T>& table() const { return table_; }

  /// x [n, model_dim] + the rows of positions first_position, first_position + 1, … Throws past the table's end.
  template <MatrixLike X>
  Matrix<T> forward(const X& x, Index first_position = 0) const {
    Matrix<T> out(x);
    forward_into(out, out, first_position);
    return out;
  }

  /// The same, row i at positions[i].
  template <MatrixLike X>
  Matrix<T> forward(const X& x, std::span<const Index> positions) const {
    Matrix<T> out(x);
    forward_into(out, out, positions);
    return out;
  }

  /// The same into out [n, model_dim], which is x itself or does not overlap it. Allocates nothing.
  template <MatrixLike Out, MatrixLike X>
  void forward_into(Out&& out, const X& x, Index first_position = 0) const {
    check_shapes(out, x);
    detail::require(first_position >= 0 && first_position <= max_positions() - x.rows(), x.rows(),
                    " rows from position ", first_position, " must lie in the table's positions 0 … ",
                    max_positions() - 1);
    if (out.cols() > 0)  // rows of nothing may be any number
      writable_view(out) = view(x) + table_.middleRows(first_position, x.rows());
  }
  template <MatrixLike Out, MatrixLike X>
  void forward_into(Out&& out, const X& x, std::span<const Index> positions) const {
    check_shapes(out, x);
    detail::require(static_cast<Index>(positions.size()) == x.rows(), "one position per row: ", positions.size(),
                    " positions for ", x.rows(), " rows");
    for (const Index p : positions)
      detail::require(p >= 0 && p < max_positions(), "position ", p, " must lie in the table's positions 0 … ",
                      max_positions() - 1);
    auto to = writable_view(out);
    const auto from = view(x);
    for (Index row = 0; row < x.rows(); ++row)
      to.row(row) = from.row(row) + table_.row(positions[static_cast<std::size_t>(row)]);
  }

 private:
  template <MatrixLike Out, MatrixLike X>
  void check_shapes(const Out& out, const X& x) const {
    detail::require(x.cols() == model_dim() && out.rows() == x.rows() && out.cols() == x.cols(),
                    "positions of model_dim ", model_dim(),
                    " are added to x [n, model_dim], giving out of the same shape; x is ",
                    detail::Shape{x.rows(), x.cols()}, ", out is ", detail::Shape{out.rows(), out.cols()});
    detail::require_same_or_disjoint(view(out), view(x));
  }

  Matrix<T> table_;  // [max_positions, model_dim]
};

/// ALiBi's slope of each head, [heads]. A power of two: slope_h = 2^(-8(h+1)/heads). Otherwise, as the authors' code
/// does: the slopes of the next smaller power of two, then every second slope of the next larger one.
template <class T>
RowVector<T> alibi_slopes(Index heads) {
  detail::require(heads >= 1, "ALiBi needs heads >= 1; given ", heads);
  const auto below = static_cast<Index>(std::bit_floor(static_cast<std::size_t>(heads)));
  RowVector<T> slopes(heads);
  for (Index h = 0; h < heads; ++h) {
    const double numerator =
        h < below ? 8.0 * static_cast<double>(h + 1) : 4.0 * static_cast<double>(2 * (h - below) + 1);
    slopes(h) = static_cast<T>(std::exp2(-numerator / static_cast<double>(below)));
  }
  return slopes;
}

}}  // namespace qkv::QKV_ABI

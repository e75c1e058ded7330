// layout.hpp — the tensors of frameworks as this library's matrices: tokens are rows, heads are column blocks.
//
//     [batch, tokens, features]             a sequence is a matrix as it is
//     [batch, heads, tokens, head_dim]      heads go side by side
//     [batch, tokens, heads, head_dim]      a sequence is a matrix as it is
#pragma once

#include "case.hpp"

namespace conformance {

using qkv::Matrix;
using qkv::RowVector;

/// A tensor [rows, cols], or [..., cols] with all other dimensions in one; a vector is one row.
template <class T>
Matrix<T> matrix(const Tensor& x) {
  expect(x.rank() >= 1 && x.dim(-1) > 0, "a matrix needs a shape without 0; given ", shape_text(x.shape));
  return Eigen::Map<const Matrix<double>>(x.values.data(), x.size() / x.dim(-1), x.dim(-1)).template cast<T>();
}
template <class T>
RowVector<T> row_vector(const Tensor& x) {
  return Eigen::Map<const RowVector<double>>(x.values.data(), x.size()).template cast<T>();
}

/// Sequence b of [batch, tokens, features…]: [tokens, features].
template <class T>
Matrix<T> sequence(const Tensor& x, Index b) {
  expect(x.rank() >= 3 && b < x.dim(0) && x.size() > 0, "no sequence ", b, " in a tensor of shape ",
         shape_text(x.shape));
  const Index rows = x.dim(1), cols = x.size() / x.dim(0) / rows;
  return Eigen::Map<const Matrix<double>>(x.values.data() + b * rows * cols, rows, cols).template cast<T>();
}
template <class T>
void set_sequence(Tensor& x, Index b, const Matrix<T>& rows) {
  expect(x.rank() >= 3 && rows.rows() == x.dim(1) && rows.size() * x.dim(0) == x.size(), "a sequence of ", rows.rows(),
         " tokens and ", rows.cols(), " features does not fit a tensor of shape ", shape_text(x.shape));
  Eigen::Map<Matrix<double>>(x.values.data() + b * rows.size(), rows.rows(), rows.cols()) =
      rows.template cast<double>();
}

/// Sequence b of [batch, heads, tokens, head_dim]: [tokens, heads·head_dim].
template <class T>
Matrix<T> heads_first(const Tensor& x, Index b) {
  expect(x.rank() == 4 && b < x.dim(0) && x.size() > 0, "no sequence ", b, " in a tensor of shape ",
         shape_text(x.shape));
  const Index heads = x.dim(1), rows = x.dim(2), cols = x.dim(3);
  Matrix<T> out(rows, heads * cols);
  for (Index h = 0; h < heads; ++h)
    out.middleCols(h * cols, cols) =
        Eigen::Map<const Matrix<double>>(x.values.data() + (b * heads + h) * rows * cols, rows, cols)
            .template cast<T>();
  return out;
}
template <class T>
void set_heads_first(Tensor& x, Index b, const Matrix<T>& rows) {
  expect(x.rank() == 4 && rows.rows() == x.dim(2) && rows.cols() == x.dim(1) * x.dim(3), "a sequence of ", rows.rows(),
         " tokens and ", rows.cols(), " features does not fit a tensor of shape ", shape_text(x.shape));
  const Index heads = x.dim(1), cols = x.dim(3);
  for (Index h = 0; h < heads; ++h)
    Eigen::Map<Matrix<double>>(x.values.data() + (b * heads + h) * rows.rows() * cols, rows.rows(), cols) =
        rows.middleCols(h * cols, cols).template cast<double>();
}

/// Either form of the ONNX operators: rank 3 or rank 4 with the heads first.
template <class T>
Matrix<T> onnx_sequence(const Tensor& x, Index b) {
  return x.rank() == 4 ? heads_first<T>(x, b) : sequence<T>(x, b);
}
template <class T>
void set_onnx_sequence(Tensor& x, Index b, const Matrix<T>& rows) {
  x.rank() == 4 ? set_heads_first(x, b, rows) : set_sequence(x, b, rows);
}

}  // namespace conformance

// projection.hpp — y = x·W + b: the linear maps around attention (queries, keys, values, output, MLA's up and down).
//
//     x [n, in_dim]   W [in_dim, out_dim]   b [out_dim]   y [n, out_dim]        2·n·in_dim·out_dim flops
//
// Each element of y is one chain of multiply-adds that starts at b and runs through the features of x in order, whatever
// n is. So the bits of a token's projection do not depend on the tokens beside it: prefill and decode agree exactly.
// Weight files in PyTorch's convention hold Wᵀ [out_dim, in_dim]: `from_torch`, `Projection::from_out_in`.
//
// Before: norm.hpp   Next: heads.hpp
#pragma once

#include <utility>

#include "detail/chain_product.hpp"
#include "detail/overlap.hpp"
#include "matrix.hpp"

namespace qkv::inline QKV_ABI {

/// [out_dim, in_dim] (torch.nn.Linear.weight, y = x·Wᵀ) -> [in_dim, out_dim], which everything here takes.
template <MatrixLike W>
Matrix<ScalarOf<W>> from_torch(const W& weight) {
  return weight.transpose();
}

/// A weight and an optional bias. Immutable, and safe to use from several threads at once.
template <class T>
class Projection {
 public:
  Projection() = default;  // 0 -> 0

  /// weight [in_dim, out_dim], bias [out_dim] or empty. Throws where the sizes differ.
  explicit Projection(Matrix<T> weight, RowVector<T> bias = {}) : weight_(std::move(weight)), bias_(std::move(bias)) {
    detail::require(bias_.size() == 0 || bias_.size() == weight_.cols(),
                    "a projection's bias must be empty or have one element per output; the weight [in, out] is ",
                    detail::Shape{weight_.rows(), weight_.cols()}, ", the bias has ", bias_.size());
  }

  /// weight [out_dim, in_dim], as PyTorch keeps it.
  template <MatrixLike W>
  static Projection from_out_in(const W& weight, RowVector<T> bias = {}) {
    return Projection(from_torch(weight), std::move(bias));
  }

  Index in_dim() const { return weight_.rows(); }
  Index out_dim() const { return weight_.cols(); }
  const Matrix<T>& weight() const { return weight_; }  // [in_dim, out_dim]
  const RowVector<T>& bias() const { return bias_; }   // [out_dim] or empty
  bool has_bias() const { return bias_.size() > 0; }

  /// x [n, in_dim] -> [n, out_dim].
  template <MatrixLike X>
  Matrix<T> forward(const X& x) const {
    Matrix<T> out(x.rows(), out_dim());
    forward_into(out, viewable(x));
    return out;
  }

  /// The same into out [n, out_dim], which must not overlap x. Allocates nothing.
  template <MatrixLike Out, MatrixLike X>
  void forward_into(Out&& out, const X& x) const {
    detail::require(x.cols() == in_dim() && out.rows() == x.rows() && out.cols() == out_dim(), "a projection ",
                    detail::Shape{in_dim(), out_dim()}, " takes x [n, in] to out [n, out]; x is ",
                    detail::Shape{x.rows(), x.cols()}, ", out is ", detail::Shape{out.rows(), out.cols()});
    detail::require_disjoint(out, x, "x");
    detail::chain_product<detail::WeightLayout::in_out, T>(writable_view(out), view(x), view(weight_),
                                                           has_bias() ? bias_.data() : nullptr);
  }

 private:
  Matrix<T> weight_;
  RowVector<T> bias_;
};

}  // namespace qkv::inline QKV_ABI

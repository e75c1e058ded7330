// projection.hpp — y = x·W + b: the linear maps around attention (queries, keys, values, output, MLA's up and down).
//
//     x [n, in_dim]   W [in_dim, out_dim]   b [out_dim]   y [n, out_dim]        2·n·in_dim·out_dim flops
//
// Each element of y is one chain of multiply-adds that starts at b and runs through the features of x in order, whatever
// n is. So the bits of a token's projection do not depend on the tokens beside it: prefill and decode agree exactly.
// Weight files in PyTorch's convention hold Wᵀ [out_dim, in_dim]: `from_torch`, `Projection::from_out_in`.
//
// Weights are packed once, when the projection is made (product/packed_product.hpp); copies share them. `stored_as<S>()` stores
// them narrower: for a few tokens a projection is bound by reading W, so half the bytes are half the time. x, sums and y stay
// in T. Largest error of a weight: half 2⁻¹¹ of it (below 6e-5: 3e-8), bfloat16 2⁻⁸ of it, int8 half a quantisation step,
// max|w|/127 of its output.
//
// Before: norm.hpp   Next: heads.hpp
#pragma once

#include <array>
#include <memory>
#include <utility>

#include "base/overlap.hpp"
#include "matrix.hpp"
#include "parallel.hpp"
#include "product/packed_product.hpp"
#include "storage.hpp"

namespace qkv { inline namespace QKV_ABI {

/// [out_dim, in_dim] (torch.nn.Linear.weight, y = x·Wᵀ) -> [in_dim, out_dim], the layout of every weight here.
template <MatrixLike W>
Matrix<ScalarOf<W>> from_torch(const W& weight) {
  return weight.transpose();
}

namespace detail {

/// Packed weights, whatever their storage. (Only storage types that a program uses are compiled.)
template <class T>
class AnyWeights {
 public:
  virtual ~AnyWeights() = default;
  virtual Index bytes() const = 0;
  virtual Matrix<T> unpacked() const = 0;
  virtual void run(View<T> out, const ConstView<T>& x, const T* bias, Index item) const = 0;
};

template <class T, StorageType S>
class WeightsIn final : public AnyWeights<T> {
 public:
  explicit WeightsIn(kernel::PackedWeights<T, S> weights) : weights_(std::move(weights)) {}
  Index bytes() const override { return weights_.bytes(); }
  Matrix<T> unpacked() const override { return weights_.unpacked(); }
  void run(View<T> out, const ConstView<T>& x, const T* bias, Index item) const override {
    kernel::packed_product_item(out, x, weights_, bias, item);
  }

 private:
  kernel::PackedWeights<T, S> weights_;
};

}  // namespace detail

/// A weight and an optional bias. Immutable, and safe to use from several threads at once; a copy shares the weight, and a
/// move is a copy: nothing is ever left without its weight.
template <class T>
class Projection {
 public:
  Projection() = default;  // 0 -> 0
  Projection(const Projection&) = default;
  Projection& operator=(const Projection&) = default;
  ~Projection() = default;

  /// weight [in_dim, out_dim], bias [out_dim] or empty. Throws where the sizes differ.
  template <MatrixLike W>
  explicit Projection(const W& weight, RowVector<T> bias = {})
      : Projection(kernel::PackedWeights<T>(weight), std::move(bias)) {}

  /// weight [out_dim, in_dim], as PyTorch keeps it.
  template <MatrixLike W>
  static Projection from_out_in(const W& weight, RowVector<T> bias = {}) {
    return Projection(weight.transpose(), std::move(bias));
  }

  /// The same with weights rounded to S: half, bfloat16, int8, or T itself.
  template <StorageType S>
  Projection stored_as() const {
    return Projection(kernel::PackedWeights<T, S>(weight()), bias_);
  }

  Index in_dim() const { return in_; }
  Index out_dim() const { return out_; }
  /// W [in_dim, out_dim], rounded as it is stored: unpacked by every call.
  Matrix<T> weight() const { return weights_ ? weights_->unpacked() : Matrix<T>(in_, out_); }
  const RowVector<T>& bias() const { return bias_; }  // [out_dim] or empty
  bool has_bias() const { return bias_.size() > 0; }
  /// Bytes of the packed weights, shared with all copies.
  Index bytes() const { return weights_ ? weights_->bytes() : 0; }

  /// x [n, in_dim] -> [n, out_dim].
  template <MatrixLike X, Executor E = Serial>
  Matrix<T> forward(const X& x, const E& executor = serial) const {
    Matrix<T> out(x.rows(), out_dim());
    forward_into(out, viewable(x), executor);
    return out;
  }

  /// The same into out [n, out_dim], which must not overlap x. Allocates nothing.
  template <MatrixLike Out, MatrixLike X, Executor E = Serial>
  void forward_into(Out&& out, const X& x, const E& executor = serial) const {
    detail::require(x.cols() == in_dim() && out.rows() == x.rows() && out.cols() == out_dim(), "a projection ",
                    detail::Shape{in_dim(), out_dim()}, " takes x [n, in] to out [n, out]; x is ",
                    detail::Shape{x.rows(), x.cols()}, ", out is ", detail::Shape{out.rows(), out.cols()});
    detail::require_disjoint(out, x, "x");
    const ConstView<T> from = view(x);
    const View<T> to = writable_view(out);
    executor(items(x.rows()), [&](Index item) { run(to, from, item); });
  }

  /// The work items of forward_into for n rows, for callers that mix them with others: none depends on another. `run`
  /// checks nothing.
  Index items(Index n) const { return kernel::ProductCut<T>{n, in_, kernel::panels_of<T>(out_)}.items(); }
  void run(View<T> out, const ConstView<T>& x, Index item) const {
    weights_->run(out, x, has_bias() ? bias_.data() : nullptr, item);
  }

 private:
  template <StorageType S>
  Projection(kernel::PackedWeights<T, S> weights, RowVector<T> bias)
      : in_(weights.in()), out_(weights.out()), bias_(std::move(bias)) {
    detail::require(bias_.size() == 0 || bias_.size() == out_,
                    "a projection's bias must be empty or have one element per output; the weight [in, out] is ",
                    detail::Shape{in_, out_}, ", the bias has ", bias_.size());
    weights_ = std::make_shared<const detail::WeightsIn<T, S>>(std::move(weights));
  }

  Index in_ = 0, out_ = 0;
  std::shared_ptr<const detail::AnyWeights<T>> weights_;
  RowVector<T> bias_;
};

namespace detail {

/// One product of several that run together.
template <class T>
struct ProjectionCall {
  const Projection<T>* projection;
  View<T> out;
  ConstView<T> x;
};

/// All products in one go of the executor. Everything has been checked.
template <class T, std::size_t N, class E>
void run_together(const std::array<ProjectionCall<T>, N>& calls, const E& executor) {
  Index items = 0;
  for (const auto& call : calls) items += call.projection->items(call.x.rows());
  executor(items, [&](Index item) {
    for (const auto& call : calls) {
      const Index own = call.projection->items(call.x.rows());
      if (item < own) return call.projection->run(call.out, call.x, item);
      item -= own;
    }
  });
}

}  // namespace detail

}}  // namespace qkv::QKV_ABI

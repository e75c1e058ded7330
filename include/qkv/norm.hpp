// norm.hpp — RMSNorm and LayerNorm: each token is normalised before a layer sees it.
//
//     RMSNorm    y = x / √(mean(x²) + eps) · gain                                  Zhang & Sennrich 2019, arXiv:1910.07467
//     LayerNorm  y = (x − mean(x)) / √(variance(x) + eps) · gain + bias            Ba et al. 2016, arXiv:1607.06450
//
//     x, y [n, model_dim]   gain, bias [model_dim]        with `heads`: x [n, heads·head_dim], gain [head_dim]
//
// The second form normalises each head on its own with one shared gain: the QK-norm of queries and keys.
// eps has no default, because models differ (Llama 1e-5, DeepSeek and Qwen 1e-6).
//
// Floats are summed in double: feature i goes to partial sum i mod 16, then the partial sums are added pairwise.
// The order depends on the number of features only, so a row's bits do not depend on the other rows.
//
// Before: rope.hpp   Next: projection.hpp
#pragma once

#include <cmath>
#include <concepts>
#include <type_traits>

#include "base/in_place.hpp"
#include "base/multiply_add.hpp"
#include "matrix.hpp"

namespace qkv { inline namespace QKV_ABI {

namespace detail {

template <class T>
using SumOf = std::conditional_t<std::same_as<T, float>, double, T>;

/// Adds the x_i up by sum ← f(sum, x_i), in the fixed order of the opening comment.
template <class T, class F>
SumOf<T> ordered_sum(const T* x, Index n, F&& f) {
  constexpr Index n_sums = 16;  // enough independent additions to fill vectors and hide their latency
  SumOf<T> sum[n_sums] = {};
  Index i = 0;
  for (; i + n_sums <= n; i += n_sums)
    for (Index s = 0; s < n_sums; ++s) sum[s] = f(sum[s], static_cast<SumOf<T>>(x[i + s]));
  for (Index s = 0; i + s < n; ++s) sum[s] = f(sum[s], static_cast<SumOf<T>>(x[i + s]));
  for (Index half = n_sums / 2; half > 0; half /= 2)
    for (Index s = 0; s < half; ++s) sum[s] += sum[s + half];
  return sum[0];
}

/// What both norms require of their operands.
template <MatrixLike Out, MatrixLike X, MatrixLike G>
void check_norm(const Out& out, const X& x, const G& gain, double eps, Index heads, const char* name) {
  require(heads >= 1 && x.cols() % heads == 0 && (heads == 1 || x.cols() > 0), name,
          ": heads must divide the columns of x, with a feature or more for each; x is ", Shape{x.rows(), x.cols()},
          ", heads ", heads);
  require(gain.rows() == 1 && gain.cols() == x.cols() / heads, name, ": gain and bias must be [1, ", x.cols() / heads,
          "] for x ", Shape{x.rows(), x.cols()}, " in ", heads, " head(s); given ", Shape{gain.rows(), gain.cols()});
  require(out.rows() == x.rows() && out.cols() == x.cols(), name, ": out must have the shape of x, ",
          Shape{x.rows(), x.cols()}, "; given ", Shape{out.rows(), out.cols()});
  require(eps >= 0, name, ": eps must be >= 0; given ", eps);
  require_same_or_disjoint(view(out), view(x));
  require_disjoint(out, gain, "gain or bias");
}

}  // namespace detail

/// RMSNorm of each head of each row of x [n, heads·width] with gain [width]. `out` is x itself or does not overlap it.
/// Allocates nothing.
template <MatrixLike Out, MatrixLike X, MatrixLike G>
void rms_norm_into(Out&& out, const X& x, const G& gain, double eps, Index heads = 1) {
  using T = ScalarOf<X>;
  using S = detail::SumOf<T>;
  detail::check_norm(out, x, gain, eps, heads, "rms_norm");
  const auto from = view(x);
  auto to = writable_view(out);
  const T* const g = view(gain).data();
  const Index width = x.cols() / heads, rows = width > 0 ? x.rows() : 0;  // rows of nothing may be any number
  for (Index row = 0; row < rows; ++row)
    for (Index head = 0; head < heads; ++head) {
      const T* const a = from.data() + row * from.outerStride() + head * width;
      T* const y = to.data() + row * to.outerStride() + head * width;
      const S squares = detail::ordered_sum(a, width, [](S sum, S v) { return detail::multiply_add(v, v, sum); });
      const T inverse = static_cast<T>(1 / std::sqrt(squares / static_cast<S>(width) + static_cast<S>(eps)));
      for (Index i = 0; i < width; ++i) y[i] = a[i] * inverse * g[i];
    }
}

/// The same as a new matrix: x [n, model_dim], or [n, heads·head_dim] with a gain [head_dim] shared by the heads.
template <MatrixLike X, MatrixLike G>
Matrix<ScalarOf<X>> rms_norm(const X& x, const G& gain, double eps, Index heads = 1) {
  Matrix<ScalarOf<X>> out(x);
  rms_norm_into(out, out, viewable(gain), eps, heads);
  return out;
}

/// LayerNorm of each row of x [n, width] with gain and bias [width]; the variance is the mean of squares around the mean
/// (no n − 1). `out` is x itself or does not overlap it. Allocates nothing.
template <MatrixLike Out, MatrixLike X, MatrixLike G, MatrixLike B>
void layer_norm_into(Out&& out, const X& x, const G& gain, const B& bias, double eps) {
  using T = ScalarOf<X>;
  using S = detail::SumOf<T>;
  detail::check_norm(out, x, gain, eps, 1, "layer_norm");
  detail::check_norm(out, x, bias, eps, 1, "layer_norm");
  const auto from = view(x);
  auto to = writable_view(out);
  const T *const g = view(gain).data(), *const b = view(bias).data();
  const Index width = x.cols(), rows = width > 0 ? x.rows() : 0;
  for (Index row = 0; row < rows; ++row) {
    const T* const a = from.data() + row * from.outerStride();
    T* const y = to.data() + row * to.outerStride();
    const S mean = detail::ordered_sum(a, width, [](S sum, S v) { return sum + v; }) / static_cast<S>(width);
    const S squares =
        detail::ordered_sum(a, width, [mean](S sum, S v) { return detail::multiply_add(v - mean, v - mean, sum); });
    const S inverse = 1 / std::sqrt(squares / static_cast<S>(width) + static_cast<S>(eps));
    for (Index i = 0; i < width; ++i)
      y[i] = detail::multiply_add(static_cast<T>((static_cast<S>(a[i]) - mean) * inverse), g[i], b[i]);
  }
}

/// The same as a new matrix.
template <MatrixLike X, MatrixLike G, MatrixLike B>
Matrix<ScalarOf<X>> layer_norm(const X& x, const G& gain, const B& bias, double eps) {
  Matrix<ScalarOf<X>> out(x);
  layer_norm_into(out, out, viewable(gain), viewable(bias), eps);
  return out;
}

}}  // namespace qkv::QKV_ABI

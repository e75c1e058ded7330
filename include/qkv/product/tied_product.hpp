// product/tied_product.hpp — x·Eᵀ for a matrix E [out, in] that stays as it is, each output one chain in ascending k:
//
//     s ← 0;   for k = 0 … depth-1:  s ← x_rk · e_ck + s;   out_rc = s
//
// the same chain, hence the same bits, as a Projection of Eᵀ, which is faster and has a packed copy of its own. Columns
// are vector lanes; a panel of Eᵀ is copied at a time, for all rows.
//
// Before: product/packed_weights.hpp   Next: product/narrow_tile.hpp
#pragma once

#include <algorithm>
#include <utility>

#include "../matrix.hpp"
#include "../simd/simd.hpp"

namespace qkv { inline namespace QKV_ABI { namespace detail {

/// A panel of Eᵀ: 128 steps of the chain for two vectors of columns, 16 KB with AVX-512: half a first-level cache.
/// Four rows of two vectors are eight accumulators, which hide the latency of a multiply-add.
inline constexpr Index panel_depth = 128, panel_rows = 4, panel_vectors = 2;
template <class T>
inline constexpr Index panel_columns = Index{panel_vectors} * kernel::Simd<T>::width;

/// f(0); f(1); … f(N-1), written out: an array indexed so stays in registers at -O2 too.
template <Index N, class F>
EIGEN_ALWAYS_INLINE void unrolled(F&& f) {
  const auto each = [&]<Index... I>(std::integer_sequence<Index, I...>) { (f(I), ...); };
  each(std::make_integer_sequence<Index, N>{});
}

/// Continues Rows x panel_columns chains by `depth` steps.
template <Index Rows, class T>
void continue_chains(const T* x, Index x_stride, const T* w, Index w_stride, Index depth, T* out, Index out_stride) {
  using S = kernel::Simd<T>;
  using Vec = typename S::Vec;
  constexpr Index sums = Rows * panel_vectors;
  const auto at = [&](Index i) { return out + (i / panel_vectors) * out_stride + (i % panel_vectors) * S::width; };
  Vec sum[std::size_t(sums)];
  unrolled<sums>([&](Index i) { sum[i] = S::load(at(i)); });
  for (Index k = 0; k < depth; ++k, ++x, w += w_stride) {
    Vec row[std::size_t(panel_vectors)];
    unrolled<panel_vectors>([&](Index v) { row[v] = S::load(w + v * S::width); });
    unrolled<Rows>([&](Index r) {
      const Vec a = S::broadcast(x[r * x_stride]);
      unrolled<panel_vectors>(
          [&](Index v) { sum[r * panel_vectors + v] = S::fma(a, row[v], sum[r * panel_vectors + v]); });
    });
  }
  unrolled<sums>([&](Index i) { S::store(at(i), sum[i]); });
}

/// Copies rows c … c+columns, k … k+depth of e as their transpose to [depth][panel_columns], zeros after the last one.
template <class T>
void copy_panel(const ConstView<T>& e, Index k, Index depth, Index c, Index columns, T* panel) {
  constexpr Index width = panel_columns<T>;
  if (columns < width) std::fill_n(panel, depth * width, T(0));
  for (Index j = 0; j < columns; ++j)
    for (Index i = 0; i < depth; ++i) panel[i * width + j] = e.coeffRef(c + j, k + i);
}

/// continue_chains for 1 … panel_rows rows.
template <class T>
void continue_rows(Index rows, const T* x, Index x_stride, const T* w, Index w_stride, Index depth, T* out,
                   Index out_stride) {
  switch (rows) {
    case 1:
      return continue_chains<1>(x, x_stride, w, w_stride, depth, out, out_stride);
    case 2:
      return continue_chains<2>(x, x_stride, w, w_stride, depth, out, out_stride);
    case 3:
      return continue_chains<3>(x, x_stride, w, w_stride, depth, out, out_stride);
    default:
      return continue_chains<4>(x, x_stride, w, w_stride, depth, out, out_stride);
  }
}

/// out [rows, out] = x [rows, in] · eᵀ, e [out, in]. Allocates nothing.
template <class T>
void chain_product(View<T> out, const ConstView<T>& x, const ConstView<T>& e) {
  constexpr Index width = panel_columns<T>;
  if (out.size() == 0) return;  // rows or columns of nothing may be any number
  alignas(64) T panel[std::size_t(panel_depth * width)];
  alignas(64) T edge[std::size_t(panel_rows * width)];  // chains of a last block of columns, which is not full
  for (Index r = 0; r < out.rows(); ++r)
    for (Index c = 0; c < out.cols(); ++c) out.coeffRef(r, c) = T(0);
  for (Index c = 0; c < out.cols(); c += width)
    for (Index k = 0; k < x.cols(); k += panel_depth) {
      const Index columns = std::min(width, out.cols() - c), depth = std::min(panel_depth, x.cols() - k);
      const bool full = columns == width;
      copy_panel(e, k, depth, c, columns, panel);
      for (Index r = 0; r < out.rows(); r += panel_rows) {
        const Index rows = std::min(panel_rows, out.rows() - r);
        T* const sums = &out.coeffRef(r, c);
        if (!full)
          for (Index i = 0; i < rows; ++i) std::copy_n(sums + i * out.outerStride(), columns, edge + i * width);
        continue_rows(rows, &x.coeffRef(r, k), x.outerStride(), panel, width, depth, full ? sums : edge,
                      full ? out.outerStride() : width);
        if (!full)
          for (Index i = 0; i < rows; ++i) std::copy_n(edge + i * width, columns, sums + i * out.outerStride());
      }
    }
}

}}}  // namespace qkv::QKV_ABI::detail

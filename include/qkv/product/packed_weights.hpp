// product/packed_weights.hpp — W of a product x·W, packed once: panels of columns that stream through the registers.
//
//     W [in, out] -> [⌈out/panel⌉][in][panel], panel = 128 bytes of T; zeros after the last column
//
// The layout is the same on every instruction set. Weights of another storage S keep T's panel and are converted in the
// register; quantised ones have one scale per output.
//
// Before: product/packed_product.hpp   Next: product/tied_product.hpp
#pragma once

#include <algorithm>
#include <vector>

#include "../base/huge_pages.hpp"
#include "../storage.hpp"
#include "register_tile.hpp"

namespace qkv { inline namespace QKV_ABI { namespace kernel {

/// Columns of a panel: 128 bytes of T, in whole tiles.
template <class T>
inline constexpr Index panel_columns =
    std::max<Index>(128 / static_cast<Index>(sizeof(T)) / TileShape<T>::columns, 1) * TileShape<T>::columns;

template <class T>
constexpr Index panels_of(Index out) {
  return (out + panel_columns<T> - 1) / panel_columns<T>;
}

/// W [in, out] in panels, for products in T. S may be narrower: half, bfloat16, or int8 with a scale per output.
template <class T, StorageType S = T>
class PackedWeights {
 public:
  static constexpr Index panel = panel_columns<T>;

  PackedWeights() = default;

  /// weight [in, out]: any Eigen expression (a transposed [out, in] matrix too). Rounds to S as in storage.hpp,
  /// one row per output.
  template <MatrixLike W>
  explicit PackedWeights(const W& weight) : in_(weight.rows()), out_(weight.cols()) {
    const Index size = detail::checked_product(panels() * panel, in_);
    numbers_.assign(static_cast<std::size_t>(size), static_cast<S>(0));
    // Panel by panel: in either storage order of W, a cache line is used whole while it is cached.
    const auto pack = [&](const auto& w) {
      if constexpr (has_row_scale<S>) scales_.assign(static_cast<std::size_t>(panels() * panel), T(0));
      if (size == 0) return;  // outputs of nothing, or inputs, may be any number
      std::vector<T> columns(has_row_scale<S> ? static_cast<std::size_t>(panel * in_) : 0);  // [panel, in]
      std::vector<S> quantized(has_row_scale<S> ? static_cast<std::size_t>(in_) : 0);
      for (Index p = 0; p < panels(); ++p) {
        S* const to = numbers_.data() + p * in_ * panel;
        const Index first = p * panel, width = std::min(panel, out_ - first);
        if constexpr (has_row_scale<S>) {
          for (Index k = 0; k < in_; ++k)
            for (Index j = 0; j < width; ++j)
              columns[static_cast<std::size_t>(j * in_ + k)] = static_cast<T>(w.coeff(k, first + j));
          for (Index j = 0; j < width; ++j) {
            scales_[static_cast<std::size_t>(first + j)] = static_cast<T>(
                quantize_row(columns.data() + j * in_, in_, quantized.data(), storage_traits<S>.largest));
            for (Index k = 0; k < in_; ++k) to[k * panel + j] = quantized[static_cast<std::size_t>(k)];
          }
        } else {
          for (Index k = 0; k < in_; ++k)
            for (Index j = 0; j < width; ++j) to[k * panel + j] = static_cast<S>(w.coeff(k, first + j));
        }
      }
    };
    if constexpr ((W::Flags & Eigen::DirectAccessBit) != 0)
      pack(weight.derived());
    else
      pack(viewable(weight));
  }

  Index in() const { return in_; }
  Index out() const { return out_; }
  Index panels() const { return panels_of<T>(out_); }
  /// W's rows from k on, columns [p·panel, (p+1)·panel): consecutive rows are `panel` apart.
  const S* rows(Index p, Index k) const { return numbers_.data() + (p * in_ + k) * panel; }
  /// Quantised only: w = number · scale, [panels · panel].
  const T* scales() const { return scales_.data(); }
  /// Bytes held: the numbers with their padding, and the scales.
  Index bytes() const { return static_cast<Index>(numbers_.size() * sizeof(S) + scales_.size() * sizeof(T)); }
  /// W [in, out] as these products see it: rounded to S.
  Matrix<T> unpacked() const {
    Matrix<T> w(in_, out_);
    for (Index p = 0; p < panels() && in_ > 0; ++p)
      for (Index k = 0; k < in_; ++k)
        for (Index c = p * panel; c < std::min(out_, (p + 1) * panel); ++c) {
          w(k, c) = static_cast<T>(rows(p, k)[c - p * panel]);
          if constexpr (has_row_scale<S>) w(k, c) *= scales_[static_cast<std::size_t>(c)];
        }
    return w;
  }

 private:
  Index in_ = 0, out_ = 0;
  std::vector<S, detail::HugePageAllocator<S>> numbers_;
  std::vector<T> scales_;
};

}}}  // namespace qkv::QKV_ABI::kernel

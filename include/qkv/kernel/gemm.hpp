// kernel/gemm.hpp — x·W + b with packed weights: projections of 1 … thousands of rows at the machine's limit.
//
//     x [n, in]   W [in, out]   b [out]   out [n, out]          2·n·in·out flops; W is read once from memory
//
// Every output element is one chain of multiply-adds in ascending k, starting at b (0 without a bias; with int8 weights
// the chain starts at 0, and scale and b come last),
//
//     s ← b_c;   for k = 0 … in-1:  s ← x_rk · w_kc + s;   out_rc = s
//
// whatever the number of rows, the executor, or the tile that computes it: a token's bits do not depend on the tokens
// beside it. Blocking stores a chain's value and takes it up again, which is exact.
//
// Packed: W in panels of 128 bytes of T, [⌈out/panel⌉][in][panel], zeros after the last column. The layout is the same on
// every instruction set. Weights of another storage S keep T's panel and are converted in the register.
//
// Before: kernel/register_tile.hpp   Next: kernel/words.hpp
#pragma once

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cstdint>
#include <span>
#include <vector>

#include "../detail/multiply_add.hpp"
#include "../detail/overlap.hpp"
#include "../parallel.hpp"
#include "../workspace.hpp"
#include "register_tile.hpp"

namespace qkv::inline QKV_ABI::kernel {

/// std::allocator on cache lines; from 4 MB on in huge pages, where Linux has them to give: fewer address translations
/// while weights stream (measured: 3 to 7 % at 16 to 64 rows of 4096 x 4096).
template <class S>
struct WeightAllocator {
  using value_type = S;
  WeightAllocator() = default;
  template <class Other>
  WeightAllocator(const WeightAllocator<Other>&) {}
  static std::align_val_t alignment(std::size_t bytes) {
    return std::align_val_t{bytes >= std::size_t{4} << 20 ? std::size_t{2} << 20 : detail::cache_line};
  }
  S* allocate(std::size_t n) {
    const std::size_t bytes = n * sizeof(S);
    void* const p = ::operator new(bytes, alignment(bytes));
#if defined(MADV_HUGEPAGE)
    if (alignment(bytes) != alignment(0)) madvise(p, bytes, MADV_HUGEPAGE);
#endif
    return static_cast<S*>(p);
  }
  void deallocate(S* p, std::size_t n) { ::operator delete(p, alignment(n * sizeof(S))); }
  friend bool operator==(const WeightAllocator&, const WeightAllocator&) { return true; }
};

/// W [in, out] in panels, for products in T. S may be narrower: half, bfloat16, or int8 with a scale per output.
template <class T, StorageType S = T>
class PackedWeights {
 public:
  static constexpr Index panel = 128 / static_cast<Index>(sizeof(T));  // columns
  static_assert(panel % TileShape<T>::columns == 0);

  PackedWeights() = default;

  /// weight [in, out]: any Eigen expression (a transposed [out, in] matrix too). Rounds to S; int8 as in storage.hpp.
  template <MatrixLike W>
  explicit PackedWeights(const W& weight) : in_(weight.rows()), out_(weight.cols()) {
    const Index size = detail::checked_product(panels() * panel, in_);
    numbers_.assign(static_cast<std::size_t>(size), static_cast<S>(0));
    const auto& w = viewable(weight);
    if constexpr (has_row_scale<S>) {
      scales_.assign(static_cast<std::size_t>(panels() * panel), T(0));
      std::vector<T> column(static_cast<std::size_t>(in_));
      std::vector<S> quantized(static_cast<std::size_t>(in_));
      for (Index c = 0; c < out_; ++c) {
        for (Index k = 0; k < in_; ++k) column[static_cast<std::size_t>(k)] = static_cast<T>(w(k, c));
        scales_[static_cast<std::size_t>(c)] = static_cast<T>(quantize_row(column.data(), in_, quantized.data()));
        for (Index k = 0; k < in_; ++k) at(k, c) = quantized[static_cast<std::size_t>(k)];
      }
    } else {
      for (Index k = 0; k < in_; ++k)
        for (Index c = 0; c < out_; ++c) at(k, c) = static_cast<S>(w(k, c));
    }
  }

  Index in() const { return in_; }
  Index out() const { return out_; }
  Index panels() const { return (out_ + panel - 1) / panel; }
  /// W's rows from k on, columns [p·panel, (p+1)·panel): consecutive rows are `panel` apart.
  const S* rows(Index p, Index k) const { return numbers_.data() + (p * in_ + k) * panel; }
  /// int8 only: w = number · scale, [panels · panel].
  const T* scales() const { return scales_.data(); }
  /// Bytes held: the numbers with their padding, and the scales.
  std::size_t bytes() const { return numbers_.size() * sizeof(S) + scales_.size() * sizeof(T); }

 private:
  S& at(Index k, Index c) { return numbers_[static_cast<std::size_t>(((c / panel) * in_ + k) * panel + c % panel)]; }

  Index in_ = 0, out_ = 0;
  std::vector<S, WeightAllocator<S>> numbers_;
  std::vector<T> scales_;
};

// ---- the product ----

/// How a product is cut up: from sizes only, so that an executor changes nothing.
template <class T>
struct ProductBlocks {
  static constexpr Index row_block = 64;                                      // rows of one work item
  static constexpr Index depth_block = 2048 / static_cast<Index>(sizeof(T));  // 64 KB of a panel, in the L2 cache
  static constexpr Index capacity = row_block * depth_block;                  // of packed x: 128 KB, on the stack

  /// Panels of one work item. Each item packs its rows of x again: that must stay small beside the products.
  static constexpr Index panels_per_item(Index rows) { return rows > TileShape<T>::rows ? 16 : 8; }
  /// Rows of x are packed to this depth at a time: the fewer rows, the longer W streams without a jump.
  static constexpr Index packed_depth(Index rows) { return capacity / rows / depth_block * depth_block; }
};

/// `rows` rows of the output (at most row_block), panels [first, last).
template <class T, StorageType S>
struct ProductItem {
  using Shape = TileShape<T>;
  using Blocks = ProductBlocks<T>;
  static constexpr Index panel = PackedWeights<T, S>::panel;
  static constexpr Index groups = panel / Shape::columns;  // a panel's columns in tiles

  const PackedWeights<T, S>& w;
  const T* x;
  Index x_stride, rows;
  const T* bias;  // null: none
  T* out;
  Index out_stride;

  // Tiles of nearly equal height: none is left with too few sums to hide the latency of a multiply-add.
  Index tiles() const { return (rows + Shape::rows - 1) / Shape::rows; }
  Index tile_row(Index t) const { return t * rows / tiles(); }

  /// `after`: the weights that are probably read next.
  void run(Index first, Index last, const S* after) const {
    alignas(detail::cache_line) T storage[std::size_t(Blocks::capacity + pack_slack<T>)];
    const Index in = w.in(), step = rows == 1 ? std::max<Index>(in, 1) : Blocks::packed_depth(rows);
    for (Index k = 0; k == 0 || k < in; k += step) {
      const Index depth = std::min(step, in - k);
      if (rows > 1)  // a single row is its own panel
        for (Index t = 0; t < tiles(); ++t)
          pack_rows(x + tile_row(t) * x_stride + k, x_stride, tile_row(t + 1) - tile_row(t), depth,
                    storage + tile_row(t) * depth);
      const T* packed = rows > 1 ? storage : x + k;
      for (Index p = first; p < last; ++p)
        for (Index d = 0; d == 0 || d < depth; d += Blocks::depth_block) {
          const Index some = std::min(Blocks::depth_block, depth - d);
          const S* next = d + some < depth ? w.rows(p, k + d + some)
                          : p + 1 < last   ? w.rows(p + 1, k)
                          : k + step < in  ? w.rows(first, k + step)
                                           : after;
          block(p, k + d, some, packed, depth, d, next);
        }
    }
  }

  /// Continues the chains of panel p by `some` steps from k on; x is packed to `depth`, from which the steps start at d.
  void block(Index p, Index k, Index some, const T* packed, Index depth, Index d, const S* next) const {
    const Index columns = std::min(panel, w.out() - p * panel);
    const Index used_groups = (columns + Shape::columns - 1) / Shape::columns;
    // `next` and the sums of the tile after each tile are fetched meanwhile, evenly.
    const auto share = static_cast<std::uintptr_t>(panel * Index(sizeof(S)) / (used_groups * tiles()));
    const auto row_bytes = static_cast<std::uintptr_t>(out_stride) * sizeof(T);
    auto ahead = reinterpret_cast<std::uintptr_t>(next);
    for (Index g = 0; g < used_groups; ++g) {
      const Index column = p * panel + g * Shape::columns;
      const Index width = std::min(Shape::columns, w.out() - column);
      const bool full = width == Shape::columns;
      for (Index t = 0; t < tiles(); ++t, ahead += share * std::uintptr_t(some)) {
        const Index row = tile_row(t), height = tile_row(t + 1) - row;
        T* c = out + row * out_stride + column;
        const T* following = t + 1 < tiles()                     ? c + height * out_stride
                             : column + Shape::columns < w.out() ? out + column + Shape::columns
                                                                 : c;
        TileOperands<T, S> op{.depth = some,
                              .a = packed + row * depth + d * height,
                              .b = w.rows(p, k) + g * Shape::columns,
                              .b_step = panel,
                              .start = k > 0 ? c : starting_bias(column),
                              .start_row = k > 0 ? out_stride : 0,
                              .c = c,
                              .c_row = out_stride,
                              .ahead = {ahead, share},
                              .next = {reinterpret_cast<std::uintptr_t>(following), row_bytes}};
        if (!full)
          edge_tile(height, width, op);
        else if (share > 64)
          packed_tile_of<T, S, 2>(height, op);
        else
          packed_tile_of<T, S, 1>(height, op);
        if (k + some == w.in()) finish(height, width, column, c);
      }
    }
  }

  /// The last columns: the tile is wider than the output.
  void edge_tile(Index height, Index width, TileOperands<T, S> op) const {
    T edge[std::size_t(Shape::rows * Shape::columns)] = {};
    T* const c = op.c;
    if (op.start != nullptr)
      for (Index r = 0; r < height; ++r) std::copy_n(op.start + r * op.start_row, width, edge + r * Shape::columns);
    op.start = op.c = edge;
    op.start_row = op.c_row = Shape::columns;
    packed_tile_of<T, S, 1>(height, op);
    for (Index r = 0; r < height; ++r) std::copy_n(edge + r * Shape::columns, width, c + r * out_stride);
  }

  /// int8 sums are of unscaled weights: s·scale + b comes last.
  const T* starting_bias(Index column) const { return bias == nullptr || has_row_scale<S> ? nullptr : bias + column; }
  void finish([[maybe_unused]] Index height, [[maybe_unused]] Index width, [[maybe_unused]] Index column,
              [[maybe_unused]] T* c) const {
    if constexpr (has_row_scale<S>)
      for (Index r = 0; r < height; ++r, c += out_stride)
        for (Index j = 0; j < width; ++j)
          c[j] = detail::multiply_add(c[j], w.scales()[column + j], bias == nullptr ? T(0) : bias[column + j]);
  }
};

/// out [n, out] = x [n, in] · W + bias. `bias` is empty or [out]. out must not overlap x. Allocates nothing (128 KB of
/// stack). Throws where shapes differ.
template <class T, StorageType S, MatrixLike Out, MatrixLike X, class E = Serial>
void packed_product_into(Out&& out, const X& x, const PackedWeights<T, S>& w, std::span<const T> bias = {},
                         const E& executor = serial) {
  const auto from = view(x);
  auto to = writable_view(out);
  detail::require(x.cols() == w.in() && out.rows() == x.rows() && out.cols() == w.out(), "weights ",
                  detail::Shape{w.in(), w.out()}, " take x [n, in] to out [n, out]; x is ",
                  detail::Shape{x.rows(), x.cols()}, ", out is ", detail::Shape{out.rows(), out.cols()});
  detail::require(bias.empty() || static_cast<Index>(bias.size()) == w.out(),
                  "a bias must be empty or have one element per output; there are ", w.out(), " outputs, the bias has ",
                  bias.size());
  detail::require_disjoint(out, x, "x");
  using Blocks = ProductBlocks<T>;
  const Index rows = x.rows(), per_item = Blocks::panels_per_item(rows);
  const Index row_items = (rows + Blocks::row_block - 1) / Blocks::row_block;
  const Index column_items = (w.panels() + per_item - 1) / per_item;
  executor(row_items * column_items, [&](Index item) {
    const Index row = (item % row_items) * rows / row_items, next_row = (item % row_items + 1) * rows / row_items;
    const Index first = item / row_items * per_item;
    const ProductItem<T, S> product{w,
                                    from.data() + row * from.outerStride(),
                                    from.outerStride(),
                                    next_row - row,
                                    bias.empty() ? nullptr : bias.data(),
                                    to.data() + row * to.outerStride(),
                                    to.outerStride()};
    const Index last = std::min(first + per_item, w.panels());
    product.run(first, last, w.rows(next_row < rows ? first : last, 0));
  });
}

}  // namespace qkv::inline QKV_ABI::kernel

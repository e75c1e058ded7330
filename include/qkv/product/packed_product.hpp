// product/packed_product.hpp — x·W + b with packed weights: projections of 1 … thousands of rows at the machine's limit.
//
//     x [n, in]   W [in, out]   b [out]   out [n, out]          2·n·in·out flops; W is read once from memory
//
// Every output element is one chain of multiply-adds in ascending k, starting at b (0 without a bias; with quantised weights
// the chain starts at 0, and scale and b come last),
//
//     s ← b_c;   for k = 0 … in-1:  s ← x_rk · w_kc + s;   out_rc = s
//
// whatever the number of rows, the executor, or the tile that computes it: a token's bits do not depend on the tokens
// beside it. Blocks store a chain's value and load it again, which is exact.
//
// Up to four rows are bound by reading W (StreamShape). More go through tiles of 12 rows x 32 columns (AVX-512), which
// prefetch the next part of W.
//
// Before: kernel/absorbed/scores.hpp   Next: product/packed_weights.hpp
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <type_traits>
#include <utility>

#include "../base/multiply_add.hpp"
#include "../base/overlap.hpp"
#include "../parallel.hpp"
#include "../workspace.hpp"
#include "packed_weights.hpp"

namespace qkv { inline namespace QKV_ABI { namespace kernel {

/// For the fewest rows, which are bound by reading W: a tile over whole panels from the first step to the last, with
/// enough accumulators to hide the latency of a multiply-add (one row of two vectors has two: int8 weights would stall).
/// With AVX2, 4 rows of float are 16 accumulators, some of them spilled to memory; reading W hides that (0.92 to 0.95 of the
/// bandwidth, instead of 0.79). Narrower W does not.
template <class T, class S>
struct StreamShape {
  static constexpr Index panel_vectors = panel_columns<T> / Simd<T>::width;
  static constexpr Index vectors = std::max<Index>(4, panel_vectors);
  static constexpr Index panels = vectors / panel_vectors;
  static constexpr bool many = TileShape<T>::wide || (Simd<T>::fused && std::is_same_v<T, S>);
  static constexpr Index rows = std::max<Index>((many ? 16 : 8) / vectors, 1);  // one lane: 16 or 32 a panel
  static constexpr std::uintptr_t ahead = 6144;                                 // bytes: prefetch distance
};

/// c(r, j) = start(r, j) + Σ_k a(r, k)·b(k, j) with b in panels that are `b_panel` elements apart, side by side in c.
template <class T, class S, std::size_t... Sum, std::size_t... Vector, std::size_t... Panel>
EIGEN_ALWAYS_INLINE void stream_of(const TileOperands<T, S>& op, Index b_panel, std::index_sequence<Sum...>,
                                   std::index_sequence<Vector...>, std::index_sequence<Panel...>) {
  using V = Simd<T>;
  using Shape = StreamShape<T, S>;
  constexpr Index width = V::width, vectors = sizeof...(Vector), rows = sizeof...(Sum) / sizeof...(Vector);
  typename V::Vec sum[sizeof...(Sum)], row[sizeof...(Vector)];
  if (op.start != nullptr)
    ((sum[Sum] = V::load(op.start + Index(Sum) / vectors * op.start_row + Index(Sum) % vectors * width)), ...);
  else
    ((sum[Sum] = V::zero()), ...);
  const T* a = op.a;
  const S* b = op.b;
  constexpr Index panel_bytes = panel_columns<T> * Index(sizeof(S));
  for (Index k = op.depth; k > 0; --k) {
    ((row[Vector] =
          V::load(b + Index(Vector) / Shape::panel_vectors * b_panel + Index(Vector) % Shape::panel_vectors * width)),
     ...);
    const Fetch ahead{reinterpret_cast<std::uintptr_t>(b) + Shape::ahead, 0};
    (ahead.line(Panel * static_cast<std::uintptr_t>(b_panel) * sizeof(S)), ...);
    if constexpr (panel_bytes > 64) (ahead.line(Panel * static_cast<std::uintptr_t>(b_panel) * sizeof(S) + 64), ...);
    ((sum[Sum] = V::fma(V::broadcast(a[Index(Sum) / vectors]), row[Sum % sizeof...(Vector)], sum[Sum])), ...);
    a += rows;
    b += panel_columns<T>;
  }
  (V::store(op.c + Index(Sum) / vectors * op.c_row + Index(Sum) % vectors * width, sum[Sum]), ...);
}

template <Index Rows, class T, class S>
void stream_tile(const TileOperands<T, S> op, Index b_panel) {
  using Shape = StreamShape<T, S>;
  stream_of(op, b_panel, std::make_index_sequence<std::size_t(Rows * Shape::vectors)>{},
            std::make_index_sequence<std::size_t(Shape::vectors)>{},
            std::make_index_sequence<std::size_t(Shape::panels)>{});
}

/// stream_tile for 1 … StreamShape<T, S>::rows rows, chosen at run time.
template <class T, class S>
void stream_tile_of(Index rows, const TileOperands<T, S>& op, Index b_panel) {
  constexpr auto tiles = []<Index... R>(std::integer_sequence<Index, R...>) {
    return std::array{&stream_tile<R + 1, T, S>...};
  }
  (std::make_integer_sequence<Index, StreamShape<T, S>::rows>{});
  tiles[static_cast<std::size_t>(rows - 1)](op, b_panel);
}

/// How a product is cut up: from sizes only, so that an executor changes nothing.
template <class T>
struct ProductBlocks {
  static constexpr Index row_block = 64;  // rows of one work item
  static constexpr Index depth_block =
      std::max<Index>(2048 / static_cast<Index>(sizeof(T)), 1);  // 64 KB of a panel, in the L2 cache
  static constexpr Index capacity = row_block * depth_block;     // of packed x: 128 KB, on the stack

  /// Rows of x are packed to this depth at a time: the fewer rows, the longer W streams without a jump.
  static constexpr Index packed_depth(Index rows) { return capacity / rows / depth_block * depth_block; }
};

/// The work items of a product: blocks of rows x some panels.
template <class T>
struct ProductCut {
  using Blocks = ProductBlocks<T>;
  Index rows, depth, panels;

  Index row_items() const { return (rows + Blocks::row_block - 1) / Blocks::row_block; }
  /// Panels of one work item. Each item packs its rows of x again, which must stay small beside the products; a single
  /// row is not packed, and 256 KB of W are enough. An even number: StreamShape streams two at a time.
  Index panels_per_item() const {
    if (rows == 1) {
      const Index bytes = std::max<Index>(depth, 1) * panel_columns<T> * static_cast<Index>(sizeof(T));
      return std::clamp<Index>((Index{256} << 10) / bytes / 2 * 2, 2, 16);
    }
    return std::clamp<Index>(panels * row_items() / 8 / 2 * 2, 8, 16);
  }
  Index items() const { return row_items() * ((panels + panels_per_item() - 1) / panels_per_item()); }

  Index row(Index item) const { return item % row_items() * rows / row_items(); }
  Index end_row(Index item) const { return (item % row_items() + 1) * rows / row_items(); }
  Index panel(Index item) const { return item / row_items() * panels_per_item(); }
  Index end_panel(Index item) const { return std::min(panels, panel(item) + panels_per_item()); }
};

/// `rows` rows of the output (at most row_block), panels [first, last).
template <class T, StorageType S>
struct ProductItem {
  using Shape = TileShape<T>;
  using Stream = StreamShape<T, S>;
  using Blocks = ProductBlocks<T>;
  static constexpr Index panel = PackedWeights<T, S>::panel;
  static constexpr Index groups = panel / Shape::columns;  // a panel's columns in tiles

  const PackedWeights<T, S>& w;
  const T* x;
  Index x_stride, rows;
  const T* bias;  // null: none
  T* out;
  Index out_stride;

  // Tiles of nearly equal height: none has too few accumulators to hide the latency of a multiply-add.
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
          pack_rows(x + tile_row(t) * x_stride + k, x_stride, tile_row(t + 1) - tile_row(t),
                    tile_row(t + 1) - tile_row(t), depth, storage + tile_row(t) * depth);
      const T* packed = rows > 1 ? storage : x + k;
      for (Index p = first; p < last;) {
        if (rows <= Stream::rows && p + Stream::panels <= last && (p + Stream::panels) * panel <= w.out()) {
          stream(p, k, depth, packed);
          p += Stream::panels;
          continue;
        }
        for (Index d = 0; d == 0 || d < depth; d += Blocks::depth_block) {
          const Index some = std::min(Blocks::depth_block, depth - d);
          const S* next = d + some < depth ? w.rows(p, k + d + some)
                          : p + 1 < last   ? w.rows(p + 1, k)
                          : k + step < in  ? w.rows(first, k + step)
                                           : after;
          block(p, k + d, some, packed, depth, d, next);
        }
        ++p;
      }
    }
  }

  /// Continues the chains of Stream::panels whole panels by `depth` steps.
  void stream(Index p, Index k, Index depth, const T* packed) const {
    const Index column = p * panel;
    T* const c = out + column;
    stream_tile_of<T, S>(rows,
                         {.depth = depth,
                          .a = packed,
                          .b = w.rows(p, k),
                          .start = k > 0 ? c : starting_bias(column),
                          .start_row = k > 0 ? out_stride : 0,
                          .c = c,
                          .c_row = out_stride},
                         w.in() * panel);
    if (k + depth == w.in()) finish(rows, Stream::panels * panel, column, c);
  }

  /// Continues the chains of panel p by `some` steps from k on; x is packed to `depth`, from which the steps start at d.
  void block(Index p, Index k, Index some, const T* packed, Index depth, Index d, const S* next) const {
    const Index columns = std::min(panel, w.out() - p * panel);
    const Index used_groups = (columns + Shape::columns - 1) / Shape::columns;
    // Each tile prefetches its share of `next` and the accumulators of the following tile.
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

  /// Quantised weights are summed unscaled: s·scale + b comes last.
  const T* starting_bias(Index column) const { return bias == nullptr || has_row_scale<S> ? nullptr : bias + column; }
  void finish([[maybe_unused]] Index height, [[maybe_unused]] Index width, [[maybe_unused]] Index column,
              [[maybe_unused]] T* c) const {
    if constexpr (has_row_scale<S>)
      for (Index r = 0; r < height; ++r, c += out_stride)
        for (Index j = 0; j < width; ++j)
          c[j] = detail::multiply_add(c[j], w.scales()[column + j], bias == nullptr ? T(0) : bias[column + j]);
  }
};

/// Item `item` of out = x·W + bias (null: none). Everything has been checked.
template <class T, StorageType S>
void packed_product_item(View<T> out, const ConstView<T>& x, const PackedWeights<T, S>& w, const T* bias, Index item) {
  const ProductCut<T> cut{x.rows(), w.in(), w.panels()};
  const Index row = cut.row(item), end = cut.end_row(item), first = cut.panel(item), last = cut.end_panel(item);
  const ProductItem<T, S> product{w,    x.data() + row * x.outerStride(),     x.outerStride(),  end - row,
                                  bias, out.data() + row * out.outerStride(), out.outerStride()};
  product.run(first, last, w.rows(end < x.rows() ? first : last, 0));
}

/// out [n, out] = x [n, in] · W + bias. `bias` is empty or [out]. out must not overlap x. Allocates nothing (128 KB of
/// stack). Throws where shapes differ.
template <class T, StorageType S, MatrixLike Out, MatrixLike X, class E = Serial>
void packed_product_into(Out&& out, const X& x, const PackedWeights<T, S>& w, std::span<const T> bias = {},
                         const E& executor = serial) {
  const ConstView<T> from = view(x);
  const View<T> to = writable_view(out);
  detail::require(x.cols() == w.in() && out.rows() == x.rows() && out.cols() == w.out(), "weights ",
                  detail::Shape{w.in(), w.out()}, " take x [n, in] to out [n, out]; x is ",
                  detail::Shape{x.rows(), x.cols()}, ", out is ", detail::Shape{out.rows(), out.cols()});
  detail::require(bias.empty() || static_cast<Index>(bias.size()) == w.out(),
                  "a bias must be empty or have one element per output; there are ", w.out(), " outputs, the bias has ",
                  bias.size());
  detail::require_disjoint(out, x, "x");
  detail::require(!detail::share_an_element(detail::footprint(out), detail::footprint(bias)),
                  "the output must not share elements with the bias");
  executor(ProductCut<T>{x.rows(), w.in(), w.panels()}.items(),
           [&](Index item) { packed_product_item(to, from, w, bias.empty() ? nullptr : bias.data(), item); });
}

}}}  // namespace qkv::QKV_ABI::kernel

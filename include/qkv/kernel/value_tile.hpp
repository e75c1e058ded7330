// kernel/value_tile.hpp — Oᵀ += Vᵀ Sᵀ for two registers of queries that need not see the same keys.
//
//                     keys →
//     register 0      ├── before ──┼─────── both ───────┤
//     register 1                   ├─────── both ───────┼── after ──┤
//
//     o(x, j) += Σ_c v(c, x)·s(c, j)     x < Rows features;  each sum one chain in ascending c
//
// Accumulators stay in registers from the first column to the last: the edge of a mask costs no pass of its own.
//
// Before: kernel/register_softmax.hpp   Next: kernel/absorbed/absorbed.hpp
#pragma once

#include <array>
#include <cstddef>
#include <type_traits>
#include <utility>

#include "../product/register_tile.hpp"
#include "../simd/simd.hpp"
#include "arithmetic.hpp"

#include "../base/warnings_off.hpp"

namespace qkv { inline namespace QKV_ABI { namespace kernel {

/// Columns [begin, end), in numbers: of Exact a key each, of words two or four.
struct Span {
  Index begin = 0, end = 0;
};

template <class Number>
struct ValueOperands {
  Span before, both, after;
  const Number* a = nullptr;  // [columns][Rows]
  const Number* b = nullptr;  // [columns][b_step], two registers each
  Index b_step = 0;
  typename std::conditional_t<std::is_same_v<Number, Word>, float, Number>* o = nullptr;  // [Rows][o_row]
  Index o_row = 0;
  const float* value_step = nullptr;  // [lanes], integer weights: their quantisation step
};

// Constant indices and folds, as in product/register_tile.hpp: the sums stay in registers.
template <class Dot, std::size_t... R>
EIGEN_ALWAYS_INLINE void value_tile(const ValueOperands<typename Dot::Number>& op, std::index_sequence<R...>) {
  using Number = typename Dot::Number;
  constexpr Index rows = sizeof...(R);
  typename Dot::Sum left[sizeof...(R)] = {Dot::start(op.o + Index(R) * op.o_row)...};
  typename Dot::Sum right[sizeof...(R)] = {Dot::start(op.o + Index(R) * op.o_row + Dot::width)...};
  const Number* a = op.a + op.before.begin * rows;
  const Number* b = op.b + op.before.begin * op.b_step;
  for (Index k = op.before.end - op.before.begin; k > 0; --k, a += rows, b += op.b_step) {
    const auto s = Dot::load(b);
    ((left[R] = Dot::dot(left[R], Dot::broadcast(a[R]), s)), ...);
  }
  a = op.a + op.both.begin * rows, b = op.b + op.both.begin * op.b_step;
  for (Index k = op.both.end - op.both.begin; k > 0; --k, a += rows, b += op.b_step) {
    const auto s = Dot::load(b), t = Dot::load(b + Dot::width);
    ((left[R] = Dot::dot(left[R], Dot::broadcast(a[R]), s), right[R] = Dot::dot(right[R], Dot::broadcast(a[R]), t)),
     ...);
  }
  a = op.a + op.after.begin * rows, b = op.b + op.after.begin * op.b_step;
  for (Index k = op.after.end - op.after.begin; k > 0; --k, a += rows, b += op.b_step) {
    const auto t = Dot::load(b + Dot::width);
    ((right[R] = Dot::dot(right[R], Dot::broadcast(a[R]), t)), ...);
  }
  (Dot::finish(op.o + Index(R) * op.o_row, left[R], op.value_step), ...);
  (Dot::finish(op.o + Index(R) * op.o_row + Dot::width, right[R],
               op.value_step == nullptr ? nullptr : op.value_step + Dot::width),
   ...);
}

/// `tiles` tiles of Rows features; a and o advance by a_next and Rows rows. One call per tile would cost about 200 cycles
/// each.
template <class Dot, Index Rows>
void value_tiles(ValueOperands<typename Dot::Number> op, Index tiles, Index a_next, FetchList& fetch) {
  for (; tiles > 0; --tiles) {
    value_tile<Dot>(op, std::make_index_sequence<std::size_t(Rows)>{});
    fetch.next();
    op.a += a_next;
    op.o += Rows * op.o_row;
  }
}

/// One tile of Step, 2·Step … Rows features, chosen at run time.
template <class Dot, Index Rows, Index Step>
void value_tile_of(Index features, const ValueOperands<typename Dot::Number>& op, FetchList& fetch) {
  constexpr auto tiles = []<Index... R>(std::integer_sequence<Index, R...>) {
    return std::array{&value_tiles<Dot, (R + 1) * Step>...};
  }
  (std::make_integer_sequence<Index, Rows / Step>{});
  tiles[static_cast<std::size_t>(features / Step - 1)](op, 1, 0, fetch);
}

}}}  // namespace qkv::QKV_ABI::kernel

#include "../base/warnings_on.hpp"

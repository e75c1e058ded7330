// kernel/decode/int8_values.hpp — p·v of a few queries with int8 rows, in integers.
//
//     top = max p     w = round(32767 · p / top)     Σ p·v ≈ top · (Σ w·v) / 32767     over the keys of one chunk
//
// |Σ w·v| <= 256 · 2¹⁵ · 2⁷ = 2³⁰: sums are exact, so the order of a chunk's rows does not matter: the same bits from any
// cache, in a tile of any shape. Sums are reordered and converted to float once, at the end of the chunk.
//
// A weight (times the scale of its row) is rounded to within 2⁻¹⁶ of the chunk's largest. Where a query does not see a key
// the weight is 0, and 0 times an int8 is 0 whatever it is. A weight that is not finite makes all of a query's sums NaN.
//
// Before: kernel/decode/dots.hpp   Next: kernel/decode/int8_row_pairs.hpp
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <utility>

#include "../../simd/narrow.hpp"
#include "dots.hpp"
#include "int8_row_pairs.hpp"
#include "scores.hpp"
#include "values.hpp"

#include "../../base/warnings_off.hpp"

namespace qkv { inline namespace QKV_ABI { namespace kernel {

/// How p·v is added up where q·k is multiplied as D says: widened (kernel/decode/values.hpp), or as here.
template <class D>
struct ValueSums {
  static constexpr bool integers = false;
  struct Largest {};
  static Index row(Index) { return 0; }
};

class PairSums {
  using V = Simd<float>;
  using Vec = Isa::Words;
  using Sum = Isa::Sums;
  static constexpr Index block = RowPairs::block, lanes = RowPairs::lanes;
  template <Index N>
  using Indices = std::make_index_sequence<std::size_t(N)>;

 public:
  static constexpr bool integers = true;
  /// Sums of a query.
  static constexpr Index row(Index width) { return (width + block - 1) / block * block; }

  /// The largest of weights, -inf where the value is not read.
  class Largest {
   public:
    EIGEN_ALWAYS_INLINE void add(V::Vec p, Index u) {
      const V::Vec x = Isa::positive(p);  // NaN stays NaN
      most_[u] = V::max(most_[u], x), bad_[u] = V::fma(x, V::zero(), bad_[u]);
    }
    /// NaN where one of them is not finite.
    float value() const {
      const bool finite = V::sum_lanes(V::add(bad_[0], bad_[1])) == 0;
      return finite ? V::max_lanes(V::max(most_[0], most_[1])) : std::numeric_limits<float>::quiet_NaN();
    }

   private:
    V::Vec most_[2] = {V::zero(), V::zero()}, bad_[2] = {V::zero(), V::zero()};
  };

  /// n weights as integers, where `top` is the largest. n: whole pairs of registers.
  static void round(const float* p, Index n, float top, std::int16_t* to) {
    if (!(top > 0)) {
      std::fill_n(to, n, std::int16_t(0));
      return;
    }
    const float up = top < 0x1p-60F ? 0x1p90F : 1.0F;  // or 32767 / top would overflow
    const V::Vec scale = V::broadcast(up), step = V::broadcast(32767 / (top * up));
    const auto rounded = [&](Index j) { return V::mul(V::mul(Isa::positive(V::load(p + j)), scale), step); };
    for (Index j = 0; j < n; j += 2 * V::width) Isa::store_int16(to + j, rounded(j), rounded(j + V::width));
  }

  /// sum_i += Σ_r w[i, r] · v_r for n queries; prefetches `next`. sum [n, row(width)].
  static void add(const Rows<std::int8_t>& values, const std::int16_t* w, Index w_row, Index n, NextLines next,
                  std::int32_t* sum) {
    const Index sum_row = row(values.width);
    for (Index i = 0, tile = 0; i < n; i += tile, next = NextLines::none(values.first)) {
      tile = n - i >= 4 ? 4 : n - i >= 2 ? 2 : 1;
      if (tile == 4)
        add_tile<4>(values, w + i * w_row, w_row, next, sum + i * sum_row, sum_row);
      else if (tile == 2)
        add_tile<2>(values, w + i * w_row, w_row, next, sum + i * sum_row, sum_row);
      else
        add_tile<1>(values, w + i * w_row, w_row, next, sum + i * sum_row, sum_row);
    }
  }

  /// o += top · sum / 32767 for one query. o [whole registers].
  static void finish(const std::int32_t* sum, float top, Index width, float* o) {
    float ordered[std::size_t(block + lanes)];
    V::store(ordered + block, V::zero());
    for (Index x = 0; x < width; x += block) {
      Vec v[4] = {Isa::load_words(sum + x), Isa::load_words(sum + x + lanes), Isa::load_words(sum + x + 2 * lanes),
                  Isa::load_words(sum + x + 3 * lanes)};
      Isa::order_unpacked(v);
      for (Index u = 0; u < 4; ++u)
        V::store(ordered + u * lanes, V::mul(Isa::int32_to_float(v[u]), V::broadcast(1.0F / 32767)));
      const float* const from = ordered + (x - first_feature(x, width));
      for (Index f = 0; f < std::min(block, width - x); f += lanes)
        V::store(o + x + f, V::fma(V::broadcast(top), V::load(from + f), V::load(o + x + f)));
    }
  }

 private:
  /// Of the block for features x …: the last one of a wide row begins earlier, so that it ends with the row.
  static constexpr Index first_feature(Index x, Index width) {
    return x + block > width && width >= block ? width - block : x;
  }

  static EIGEN_ALWAYS_INLINE Vec weights(const std::int16_t* w, bool both) {
    std::int32_t pair = static_cast<std::uint16_t>(*w);
    if (both) std::memcpy(&pair, w, sizeof pair);
    return RowPairs::broadcast(pair);
  }

  // Rows a and b of `some` <= block features; the parts First … of their block.
  template <std::size_t First, std::size_t... S, std::size_t... Q, std::size_t... Part>
  static EIGEN_ALWAYS_INLINE void add_pair(const std::int8_t* a, const std::int8_t* b, Index some,
                                           const std::int16_t* w, Index w_row, bool both, Sum (&sum)[sizeof...(S)],
                                           std::index_sequence<S...>, std::index_sequence<Q...>,
                                           std::index_sequence<Part...>) {
    const Vec first = some == block ? Isa::load_words(a) : Isa::load_words_n(a, some);
    const Vec second = some == block ? Isa::load_words(b) : Isa::load_words_n(b, some);
    const Vec value[] = {RowPairs::part<First + Part>(first, second)...};
    const Vec weight[] = {weights(w + Index(Q) * w_row, both)...};
    ((sum[S] = Isa::add_int16_products(sum[S], weight[S / sizeof...(Part)], value[S % sizeof...(Part)])), ...);
  }

  // Parts First … of one block, all rows. Step: pairs in which a line is read.
  template <Index Queries, std::size_t First, std::size_t... S, std::size_t... Part, std::size_t... Step>
  static EIGEN_ALWAYS_INLINE void add_parts(const Rows<std::int8_t>& values, Index some, const std::int16_t* w,
                                            Index w_row, NextLines& next, std::int32_t* sums, Index sum_row,
                                            std::index_sequence<S...> all, std::index_sequence<Part...> parts,
                                            std::index_sequence<Step...>) {
    constexpr auto queries = Indices<Queries>{};
    constexpr Index rows = 2 * sizeof...(Step), n_parts = sizeof...(Part);
    const auto at = [&](std::size_t s) {
      return sums + Index(s) / n_parts * sum_row + (Index(First) + Index(s) % n_parts) * lanes;
    };
    Sum sum[sizeof...(S)];
    ((sum[S] = Isa::load_sums(at(S))), ...);
    const std::int8_t* row = values.first;
    Index r = 0;
    for (; r + rows <= values.count; r += rows, row += rows * values.stride) {
      next.template fetch<std::int8_t, rows * n_parts * lanes>();
      (add_pair<First>(row + 2 * Index(Step) * values.stride, row + (2 * Index(Step) + 1) * values.stride, some,
                       w + r + 2 * Index(Step), w_row, true, sum, all, queries, parts),
       ...);
    }
    for (; r + 2 <= values.count; r += 2, row += 2 * values.stride)
      add_pair<First>(row, row + values.stride, some, w + r, w_row, true, sum, all, queries, parts);
    if (r < values.count) add_pair<First>(row, row, some, w + r, w_row, false, sum, all, queries, parts);
    (Isa::store_sums(at(S), sum[S]), ...);
  }

  template <Index Queries>
  static EIGEN_DONT_INLINE void add_tile(const Rows<std::int8_t>& values, const std::int16_t* w, Index w_row,
                                         NextLines ahead, std::int32_t* sum, Index sum_row) {
    // Four queries of a whole block are sixteen sums: too many for sixteen registers, so one half after the other.
    constexpr Index parts = Queries == 4 && few_registers ? 2 : 4;
    constexpr Index steps = few_registers ? std::max<Index>(2, NextLines::steps(2 * parts * lanes)) : 1;
    NextLines next = ahead;
    const Index width = values.width;
    for (Index x = 0; x < width; x += block) {
      const Index first = first_feature(x, width), some = std::min(block, width - first), whole = whole_rows(values);
      const Rows<std::int8_t> rows = {values.first + first, values.stride, values.count, 0};
      if (some == block || whole > 0)
        add_block<Queries, parts, steps>(some == block ? rows : rows.from(0, whole), block, w, w_row, next, sum + x,
                                         sum_row);
      if (some < block)
        add_block<Queries, parts, 1>(rows.from(whole, values.count - whole), some, w + whole, w_row, next, sum + x,
                                     sum_row);
    }
  }
  /// How many rows narrower than a block may be read as whole blocks, because other rows follow: an even number. The
  /// excess lands in lanes that are not used.
  static Index whole_rows(const Rows<std::int8_t>& rows) {
    if (rows.stride < 1) return 0;
    const Index last = (std::max<Index>(block - rows.width, 0) + rows.stride - 1) / rows.stride;
    return std::max<Index>(rows.count - last, 0) / 2 * 2;
  }
  template <Index Queries, Index Parts, Index Steps>
  static EIGEN_ALWAYS_INLINE void add_block(const Rows<std::int8_t>& values, Index some, const std::int16_t* w,
                                            Index w_row, NextLines& next, std::int32_t* sum, Index sum_row) {
    constexpr auto all = Indices<Queries * Parts>{};
    add_parts<Queries, 0>(values, some, w, w_row, next, sum, sum_row, all, Indices<Parts>{}, Indices<Steps>{});
    if constexpr (Parts == 2)
      add_parts<Queries, 2>(values, some, w, w_row, next, sum, sum_row, all, Indices<Parts>{}, Indices<Steps>{});
  }
};

template <>
struct ValueSums<Int8RowDot> : PairSums {};
template <>
struct ValueSums<Int16RowDot> : PairSums {};

}}}  // namespace qkv::QKV_ABI::kernel

#include "../../base/warnings_on.hpp"

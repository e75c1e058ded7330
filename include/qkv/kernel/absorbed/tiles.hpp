// kernel/absorbed/tiles.hpp — the two products of absorbed latent attention, in registers.
//
//     scores    s(j, lane) = Σ_k c(j, k)·q(k, lane)       lanes are heads (of one or more tokens); c is broadcast, from
//                                                       cache rows where they lie
//     values    o(lane, x) += Σ_j p(j, lane)·c(j, x)      lanes are features; the weight is broadcast
//
// Neither needs a transposed copy of the rows, and neither wastes lanes on few heads in the second. Each sum is one chain
// of multiply-adds in ascending k or j, whatever the height of the tile (few heads: kernel/absorbed/split_heads.hpp). A number stands for one
// feature, or is a word of two (bfloat16) or four (int8) features or, of values, of as many keys.
//
// Before: kernel/absorbed/split_heads.hpp   Next: kernel/absorbed/scores.hpp
#pragma once

#include <cstdint>
#include <type_traits>
#include <utility>

#include "../../simd/narrow.hpp"
#include "../value_tile.hpp"
#include "split_heads.hpp"

#include "../../base/warnings_off.hpp"

namespace qkv { inline namespace QKV_ABI { namespace kernel::absorbed {

/// How a rope part that is kept apart is multiplied: in pairs of bfloat16 where there are such products.
using RopeDot = std::conditional_t<Isa::bf16_products, Bf16Dot, NumberDot<float>>;
inline constexpr Index rope_features = Isa::bf16_products ? 2 : 1;  // in one number

/// Heights: one register of lanes needs more rows than two to keep as many sums.
template <class T>
struct Shape {
  static constexpr bool wide = Simd<T>::registers >= 32;
  static constexpr Index score_rows(Index vectors) {
    return vectors == 1 ? (wide ? 24 : 12) : wide ? 12 : Simd<T>::fused ? 6 : 4;
  }
  static constexpr Index value_lanes = wide && Simd<T>::width >= 4 ? 8 : 4;  // of a value tile: they divide a panel's
  static constexpr Index value_vectors = wide ? 3 : 2;
};

/// Hides a number from the optimiser, which would otherwise keep one address for each row, in memory.
EIGEN_ALWAYS_INLINE void opaque([[maybe_unused]] std::uintptr_t& x) {
#if defined(__GNUC__)
  asm("" : "+r"(x));
#endif
}

/// Rows 8i … 8i + 7 lie at multiples 0 … 7 of the stride behind base i: three bases and three multiples address 24 rows,
/// where an address in memory can be base + 1, 2 or 4 times a register.
struct RowAddress {
  std::uintptr_t base[3], once, three, five, seven;

  RowAddress(const void* rows, Index bytes)
      : base{}, once(static_cast<std::uintptr_t>(bytes)), three(3 * once), five(5 * once), seven(7 * once) {
    for (std::uintptr_t i = 0; i < 3; ++i) base[i] = reinterpret_cast<std::uintptr_t>(rows) + 8 * i * once;
    opaque(three), opaque(five), opaque(seven);
  }
  template <Index Row>
  EIGEN_ALWAYS_INLINE const void* row() const {
    const std::uintptr_t from = base[Row / 8];
    constexpr Index r = Row % 8;
    if constexpr (r == 0) return reinterpret_cast<const void*>(from);
    if constexpr (r == 1 || r == 2 || r == 4) return reinterpret_cast<const void*>(from + std::uintptr_t(r) * once);
    if constexpr (r == 3 || r == 6) return reinterpret_cast<const void*>(from + std::uintptr_t(r / 3) * three);
    if constexpr (r == 5) return reinterpret_cast<const void*>(from + five);
    return reinterpret_cast<const void*>(from + seven);
  }
  EIGEN_ALWAYS_INLINE void move(std::uintptr_t bytes) {
    base[0] += bytes, base[1] += bytes, base[2] += bytes;
    opaque(base[0]), opaque(base[1]), opaque(base[2]);
  }
};

/// Memory that is read next, prefetched step by step, in order, while tiles are multiplied: value tiles have free load slots.
/// With AVX2 a step does a quarter of the work and would stall on a burst: fewer bytes per step, and score tiles begin it.
struct Stream {
  static constexpr bool in_scores = !Shape<float>::wide;
  static constexpr std::uintptr_t step = Shape<float>::wide ? 128 : 32;  // bytes
  std::uintptr_t at = 0, end = 0, next = 0, next_end = 0;                // then [next, next_end)

  bool pending() {
    if (at >= end) at = next, end = next_end, next = next_end = 0;
    return at < end;
  }
  static EIGEN_ALWAYS_INLINE void fetch(std::uintptr_t& from) {
    prefetch(reinterpret_cast<const void*>(from));
    if constexpr (step > 64) prefetch(reinterpret_cast<const void*>(from + 64));
    from += step;
  }
};

/// sum(r, v) += Σ_k rows(r, k)·lanes(k, v), k ascending in steps of Parts numbers. By constant indices only, as in
/// product/register_tile.hpp. Ahead: every step prefetches some memory from `ahead` on.
template <class D, Index Vectors, Index Parts, bool Ahead = false, std::size_t... Sum, std::size_t... Vector>
EIGEN_ALWAYS_INLINE void multiply_rows(typename D::Sum (&sum)[sizeof...(Sum)], Index steps, RowAddress rows,
                                       const typename D::Number* lanes, std::index_sequence<Sum...>,
                                       std::index_sequence<Vector...>, [[maybe_unused]] std::uintptr_t ahead = 0) {
  using Vec = decltype(D::load(lanes));
  for (; steps > 0; --steps) {
    const Vec lane[] = {D::load(lanes + Index(Vector) * D::width)...};
    ((sum[Sum] = D::dot(sum[Sum], repeat<D, Parts>(rows.template row<Index(Sum) / Vectors>()), lane[Sum % Vectors])),
     ...);
    if constexpr (Ahead) Stream::fetch(ahead);
    rows.move(sizeof(typename D::Number) * Parts);
    lanes += Vectors * D::width;
  }
}

/// Scores of `Rows` rows for Vectors registers of lanes, or of parts of lanes: s [Rows][s_row], Vectors·width / Parts of a row.
/// Continued: s has begun.
template <class D, Index Rows, Index Vectors, Index Parts, bool Continued, bool Ahead, class T, std::size_t... I>
EIGEN_ALWAYS_INLINE void score_tile(Index steps, const RowAddress& rows, const typename D::Number* lanes, T* s,
                                    Index s_row, std::uintptr_t ahead, std::index_sequence<I...> all) {
  typename D::Sum sum[sizeof...(I)];
  if constexpr (Continued)
    ((sum[I] = Simd<T>::load(s + Index(I) / Vectors * s_row + Index(I) % Vectors * Simd<T>::width)), ...);
  else
    ((sum[I] = Simd<T>::zero()), ...);
  multiply_rows<D, Vectors, Parts, Ahead>(sum, steps, rows, lanes, all,
                                          std::make_index_sequence<std::size_t(Vectors)>{}, ahead);
  (store_sums<Parts>(s + Index(I) / Vectors * s_row + Index(I) % Vectors * (Simd<T>::width / Parts), sum[I]), ...);
}

/// `tiles` of them, one after another; rows lie `stride` bytes apart.
template <class D, Index Rows, Index Vectors, Index Parts, bool Continued = false, class T>
EIGEN_DONT_INLINE void score_tiles(Index tiles, Index steps, const void* rows, Index stride,
                                   const typename D::Number* lanes, T* s, Index s_row,
                                   [[maybe_unused]] Stream& stream) {
  const auto tile = [&](auto ahead, std::uintptr_t from) {
    score_tile<D, Rows, Vectors, Parts, Continued, decltype(ahead)::value>(
        steps, RowAddress(rows, stride), lanes, s, s_row, from,
        std::make_index_sequence<std::size_t(Rows * Vectors)>{});
  };
  for (; tiles > 0; --tiles) {
    if (Stream::in_scores && stream.pending())
      tile(std::bool_constant<Stream::in_scores>{}, stream.at),
          stream.at += static_cast<std::uintptr_t>(steps) * Stream::step;
    else
      tile(std::false_type{}, 0);
    rows = static_cast<const char*>(rows) + Rows * stride;
    s += Rows * s_row;
  }
}

/// Rows whose latent part is int8 and whose rope part is numbers of RopeDot.
struct Int8Rows {
  Index steps, rope_steps;
  const std::int8_t* latent;
  const RopeDot::Number* rope;
  Index latent_stride, rope_stride;  // bytes
  const float* scale;                // per row
  const std::int32_t* offset;        // per row: -128·Σ latent
};
/// Scores: the rope part continues the sum that the latent part, made float, has begun.
template <Index Rows, Index Vectors, Index Parts, std::size_t... I>
EIGEN_ALWAYS_INLINE void int8_score_tile(const Int8Rows& rows, const Word* lanes, const RopeDot::Number* rope_lanes,
                                         const float* query_scale, float* s, Index s_row,
                                         std::index_sequence<I...> all) {
  using V = Simd<float>;
  constexpr auto vectors = std::make_index_sequence<std::size_t(Vectors)>{};
  Int8Dot::Sum sum[sizeof...(I)];
  ((sum[I] = Isa::broadcast_first<Parts>(rows.offset[Index(I) / Vectors])), ...);
  multiply_rows<Int8Dot, Vectors, Parts>(sum, rows.steps, RowAddress(rows.latent, rows.latent_stride), lanes, all,
                                         vectors);
  V::Vec score[sizeof...(I)];
  ((score[I] = V::mul(Isa::sums_to_float(sum[I]), V::mul(V::broadcast(rows.scale[Index(I) / Vectors]),
                                                         V::load(query_scale + Index(I) % Vectors * V::width)))),
   ...);
  multiply_rows<RopeDot, Vectors, Parts>(score, rows.rope_steps, RowAddress(rows.rope, rows.rope_stride), rope_lanes,
                                         all, vectors);
  (store_sums<Parts>(s + Index(I) / Vectors * s_row + Index(I) % Vectors * (V::width / Parts), score[I]), ...);
}
template <Index Rows, Index Vectors, Index Parts>
EIGEN_DONT_INLINE void int8_score_tiles(Index tiles, Int8Rows rows, const Word* lanes,
                                        const RopeDot::Number* rope_lanes, const float* query_scale, float* s,
                                        Index s_row) {
  for (; tiles > 0; --tiles) {
    int8_score_tile<Rows, Vectors, Parts>(rows, lanes, rope_lanes, query_scale, s, s_row,
                                          std::make_index_sequence<std::size_t(Rows * Vectors)>{});
    rows.latent += Rows * rows.latent_stride;
    rows.rope += Rows * rows.rope_stride / Index(sizeof(RopeDot::Number));
    rows.scale += Rows, rows.offset += Rows;
    s += Rows * s_row;
  }
}

/// The score tiles of arithmetic A for a layout of lanes: of as many rows as fill the registers, of four and of one.
template <class A>
struct ScoreTiles {
  template <Index Rows, Index Registers, Index Parts>
  static constexpr auto function() {
    if constexpr (A::int8_keys)
      return &int8_score_tiles<Rows, Registers, Parts>;
    else if constexpr (A::int16_keys)  // the rope part
      return &score_tiles<RopeDot, Rows, Registers, Parts, true, float>;
    else
      return &score_tiles<KeyDot<A>, Rows, Registers, Parts, false, typename A::Scalar>;
  }
  using Function = decltype(function<1, 1, 1>());

  Index rows;  // of `whole`
  Function whole, four, one;

  /// With panels of Vectors registers.
  template <Index Vectors>
  static ScoreTiles of(const LaneLayout& layout) {
    ScoreTiles tiles{};
    with_layout<A, Vectors>(layout, [&](auto registers, auto parts) {
      constexpr Index n = decltype(registers)::value, p = decltype(parts)::value;
      constexpr Index most = Shape<typename A::Scalar>::score_rows(n);
      tiles = {most, function<most, n, p>(), function<4, n, p>(), function<1, n, p>()};
    });
    return tiles;
  }
};

/// o(lane, x) += Σ_j p(j, lane)·c(j, x)
template <class D, class T>
struct FeatureOperands {
  Index depth;                  // keys, or words of them
  const typename D::Number* p;  // [depth][p_step]
  Index p_step;
  const typename D::Row* c;  // rows c_step apart
  Index c_step;
  T* o;  // rows o_row apart
  Index o_row;
  const T* value_step;  // integer weights: quantisation step, per lane
};
template <class D, class T>
EIGEN_ALWAYS_INLINE void add_features(T* o, typename D::Sum sum, [[maybe_unused]] const T* value_step) {
  using V = Simd<T>;
  if constexpr (requires { D::to_float(sum); })
    V::store(o, V::fma(D::to_float(sum), V::broadcast(*value_step), V::load(o)));
  else
    D::finish(o, sum, nullptr);
}
template <class D, Index Vectors, bool Ahead, class T, std::size_t... Sum, std::size_t... Vector>
EIGEN_ALWAYS_INLINE void feature_tile(const FeatureOperands<D, T>& op, [[maybe_unused]] std::uintptr_t ahead,
                                      std::index_sequence<Sum...>, std::index_sequence<Vector...>) {
  typename D::Sum sum[] = {D::start(op.o + Index(Sum) / Vectors * op.o_row + Index(Sum) % Vectors * D::width)...};
  const typename D::Number* p = op.p;
  const typename D::Row* c = op.c;
  using Vec = decltype(D::load(c));
  for (Index k = op.depth; k > 0; --k) {
    Vec row[] = {D::load(c + Index(Vector) * D::width)...};
    if constexpr (!Shape<T>::wide) (Isa::hold(row[Vector]), ...);  // or g++ loads them again for every lane
    if constexpr (Ahead) Stream::fetch(ahead);
    ((sum[Sum] = D::dot(sum[Sum], row[Sum % Vectors], D::broadcast(p[Index(Sum) / Vectors]))), ...);
    p += op.p_step;
    c += op.c_step;
  }
  (add_features<D>(op.o + Index(Sum) / Vectors * op.o_row + Index(Sum) % Vectors * D::width, sum[Sum],
                   op.value_step + Index(Sum) / Vectors),
   ...);
}
/// One slice of features for `lanes` lanes, a multiple of the tile's.
template <class D, Index Vectors, class T>
EIGEN_DONT_INLINE void feature_tiles(Index lanes, FeatureOperands<D, T> op, Stream& stream) {
  constexpr Index rows = Shape<T>::value_lanes;
  constexpr auto sums = std::make_index_sequence<std::size_t(rows * Vectors)>{};
  constexpr auto vectors = std::make_index_sequence<std::size_t(Vectors)>{};
  for (; lanes > 0; lanes -= rows) {
    if (stream.pending())
      feature_tile<D, Vectors, true>(op, stream.at, sums, vectors),
          stream.at += static_cast<std::uintptr_t>(op.depth) * Stream::step;
    else
      feature_tile<D, Vectors, false>(op, 0, sums, vectors);
    op.p += rows;
    op.o += rows * op.o_row;
    op.value_step += rows;
  }
}

}}}  // namespace qkv::QKV_ABI::kernel::absorbed

#include "../../base/warnings_on.hpp"

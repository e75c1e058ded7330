// kernel/latent_tiles.hpp — the two products of absorbed latent attention, in registers.
//
//     scores    s(j, lane) = Σ_k c(j, k)·q(k, lane)       lanes are heads (of one or more tokens); c is broadcast, from
//                                                       cache rows where they lie
//     values    o(lane, x) += Σ_j p(j, lane)·c(j, x)      lanes are features; the weight is broadcast
//
// Neither needs a transposed copy of the rows, and neither wastes lanes on few heads in the second. Each sum is one chain
// of multiply-adds in ascending k or j, whatever the height of the tile. A number stands for one feature, or is a word of two
// (bfloat16) or four (int8) features or, of values, of two keys.
//
// Before: multi_head_attention.hpp   Next: kernel/latent_blocks.hpp
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#include "register_tile.hpp"
#include "words.hpp"

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // of AVX-512 intrinsics, as in kernel/simd.hpp
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wignored-attributes"
#endif

namespace qkv::inline QKV_ABI::kernel::absorbed {

/// How a register of numbers is multiplied with a broadcast one.
template <class T>
struct Plainly {
  using Number = T;
  using Vec = typename Simd<T>::Vec;
  using Sum = Vec;
  static EIGEN_ALWAYS_INLINE Vec load(const T* p) { return Simd<T>::load(p); }
  static EIGEN_ALWAYS_INLINE Vec broadcast(const void* p) {
    T x;
    std::memcpy(&x, p, sizeof x);
    return Simd<T>::broadcast(x);
  }
  static EIGEN_ALWAYS_INLINE Sum add(Sum c, Vec a, Vec b) { return Simd<T>::fma(a, b, c); }
};

#ifdef QKV_DETAIL_WORDS
EIGEN_ALWAYS_INLINE __m512i broadcast_word(const void* p) {
  int x;
  std::memcpy(&x, p, sizeof x);
  return _mm512_set1_epi32(x);
}
/// Pairs of bfloat16, sums in float.
struct InPairs {
  using Number = Word;
  using Vec = __m512i;
  using Sum = __m512;
  static EIGEN_ALWAYS_INLINE Vec load(const Word* p) { return _mm512_loadu_si512(p); }
  static EIGEN_ALWAYS_INLINE Vec broadcast(const void* p) { return broadcast_word(p); }
  static EIGEN_ALWAYS_INLINE Sum add(Sum c, Vec a, Vec b) {
    return _mm512_dpbf16_ps(c, reinterpret_cast<__m512bh>(b), reinterpret_cast<__m512bh>(a));
  }
};
/// Four int8, sums in int32; the broadcast ones are signed, the lanes hold q + 128. The sums are of the type that the
/// instruction's builtin takes: g++ keeps an array of __m512i in memory, at half the speed.
struct InQuads {
  using Number = Word;
  using Vec = __m512i;
  using Sum = __v16si;
  static EIGEN_ALWAYS_INLINE Vec load(const Word* p) { return _mm512_loadu_si512(p); }
  static EIGEN_ALWAYS_INLINE Vec broadcast(const void* p) { return broadcast_word(p); }
  static EIGEN_ALWAYS_INLINE Sum add(Sum c, Vec a, Vec b) {
    return reinterpret_cast<Sum>(_mm512_dpbusd_epi32(reinterpret_cast<__m512i>(c), b, a));
  }
};
#endif

/// Heights: one register of lanes needs more rows than two to keep as many sums.
template <class T>
struct Shape {
  static constexpr bool wide = Simd<T>::registers >= 32;
  static constexpr Index score_rows(Index vectors) {
    return vectors == 1 ? (wide ? 24 : 12) : wide ? 12 : Simd<T>::fused ? 6 : 4;
  }
  static constexpr Index value_lanes = wide && Simd<T>::width >= 4 ? 8 : 4;  // of a value tile: they divide a panel's
  static constexpr Index value_vectors = wide || Simd<T>::fused ? 3 : 2;
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

/// sum(r, v) += Σ_k rows(r, k)·lanes(k, v), k ascending. By constant indices only, as in kernel/register_tile.hpp.
template <class D, Index Vectors, std::size_t... Sum, std::size_t... Vector>
EIGEN_ALWAYS_INLINE void multiply_rows(typename D::Sum (&sum)[sizeof...(Sum)], Index depth, RowAddress rows,
                                       const typename D::Number* lanes, std::index_sequence<Sum...>,
                                       std::index_sequence<Vector...>) {
  constexpr Index width = Index(sizeof(typename D::Vec) / sizeof(typename D::Number));
  for (; depth > 0; --depth) {
    const typename D::Vec lane[] = {D::load(lanes + Index(Vector) * width)...};
    ((sum[Sum] = D::add(sum[Sum], D::broadcast(rows.template row<Index(Sum) / Vectors>()), lane[Sum % Vectors])), ...);
    rows.move(sizeof(typename D::Number));
    lanes += Vectors * width;
  }
}

/// Scores of `Rows` rows for Vectors registers of lanes: s [Rows][Vectors·width].
template <class D, Index Rows, Index Vectors, class T, std::size_t... I>
EIGEN_ALWAYS_INLINE void score_tile(Index depth, const RowAddress& rows, const typename D::Number* lanes, T* s,
                                    std::index_sequence<I...> all) {
  typename D::Sum sum[sizeof...(I)];
  ((sum[I] = Simd<T>::zero()), ...);
  multiply_rows<D, Vectors>(sum, depth, rows, lanes, all, std::make_index_sequence<std::size_t(Vectors)>{});
  (Simd<T>::store(s + Index(I) * Simd<T>::width, sum[I]), ...);
}

/// `tiles` of them, one after another; rows lie `stride` bytes apart.
template <class D, Index Rows, Index Vectors, class T>
void score_tiles(Index tiles, Index depth, const void* rows, Index stride, const typename D::Number* lanes, T* s) {
  for (; tiles > 0; --tiles) {
    score_tile<D, Rows, Vectors>(depth, RowAddress(rows, stride), lanes, s,
                                 std::make_index_sequence<std::size_t(Rows * Vectors)>{});
    rows = static_cast<const char*>(rows) + Rows * stride;
    s += Rows * Vectors * Simd<T>::width;
  }
}

#ifdef QKV_DETAIL_WORDS
/// Rows whose latent part is int8 and whose rope part is pairs of bfloat16.
struct QuadRows {
  Index depth, rope_depth;  // words
  const std::int8_t* latent;
  const Word* rope;
  Index latent_stride, rope_stride;  // bytes
  const float* scale;                // per row
  const std::int32_t* offset;        // per row: -128·Σ latent
};
/// Scores: the rope part continues the sum that the latent part, made float, has begun.
template <Index Rows, Index Vectors, std::size_t... I>
EIGEN_ALWAYS_INLINE void quad_score_tile(const QuadRows& rows, const Word* lanes, const Word* rope_lanes,
                                         const float* unit, float* s, std::index_sequence<I...> all) {
  constexpr auto vectors = std::make_index_sequence<std::size_t(Vectors)>{};
  InQuads::Sum sum[sizeof...(I)];
  ((sum[I] = reinterpret_cast<__v16si>(_mm512_set1_epi32(rows.offset[Index(I) / Vectors]))), ...);
  multiply_rows<InQuads, Vectors>(sum, rows.depth, RowAddress(rows.latent, rows.latent_stride), lanes, all, vectors);
  __m512 score[sizeof...(I)];
  ((score[I] = _mm512_mul_ps(_mm512_cvtepi32_ps(reinterpret_cast<__m512i>(sum[I])),
                             _mm512_mul_ps(_mm512_set1_ps(rows.scale[Index(I) / Vectors]),
                                           _mm512_loadu_ps(unit + Index(I) % Vectors * word_lanes)))),
   ...);
  multiply_rows<InPairs, Vectors>(score, rows.rope_depth, RowAddress(rows.rope, rows.rope_stride), rope_lanes, all,
                                  vectors);
  (_mm512_storeu_ps(s + Index(I) * word_lanes, score[I]), ...);
}
template <Index Rows, Index Vectors>
void quad_score_tiles(Index tiles, QuadRows rows, const Word* lanes, const Word* rope_lanes, const float* unit,
                      float* s) {
  for (; tiles > 0; --tiles) {
    quad_score_tile<Rows, Vectors>(rows, lanes, rope_lanes, unit, s,
                                   std::make_index_sequence<std::size_t(Rows * Vectors)>{});
    rows.latent += Rows * rows.latent_stride;
    rows.rope += Rows * rows.rope_stride / Index(sizeof(Word));
    rows.scale += Rows, rows.offset += Rows;
    s += Rows * Vectors * word_lanes;
  }
}
#endif

/// Memory that will be read next, asked for while values are multiplied: their tiles leave load slots free, and rows
/// read in order stream well.
struct Stream {
  std::uintptr_t at = 0, end = 0;
  bool pending() const { return at < end; }
};

/// o(lane, x) += Σ_j p(j, lane)·c(j, x)
template <class D, class T>
struct ValueOperands {
  Index depth;                  // keys or pairs of them
  const typename D::Number* p;  // [depth][p_step]
  Index p_step;
  const typename D::Number* c;  // rows c_step apart
  Index c_step;
  T* o;  // rows o_row apart
  Index o_row;
};
template <class D, Index Vectors, bool Ahead, class T, std::size_t... Sum, std::size_t... Vector>
EIGEN_ALWAYS_INLINE void value_tile(const ValueOperands<D, T>& op, [[maybe_unused]] Stream& stream,
                                    std::index_sequence<Sum...>, std::index_sequence<Vector...>) {
  using V = Simd<T>;
  typename V::Vec sum[] = {V::load(op.o + Index(Sum) / Vectors * op.o_row + Index(Sum) % Vectors * V::width)...};
  const typename D::Number *p = op.p, *c = op.c;
  for (Index k = op.depth; k > 0; --k) {
    const typename D::Vec row[] = {D::load(c + Index(Vector) * V::width)...};
    if constexpr (Ahead) {
      prefetch(reinterpret_cast<const void*>(stream.at));
      prefetch(reinterpret_cast<const void*>(stream.at + 64));
      stream.at += 128;
    }
    ((sum[Sum] = D::add(sum[Sum], D::broadcast(p + Index(Sum) / Vectors), row[Sum % Vectors])), ...);
    p += op.p_step;
    c += op.c_step;
  }
  (V::store(op.o + Index(Sum) / Vectors * op.o_row + Index(Sum) % Vectors * V::width, sum[Sum]), ...);
}
/// One slice of features for `lanes` lanes, a multiple of the tile's.
template <class D, Index Vectors, class T>
void value_tiles(Index lanes, ValueOperands<D, T> op, Stream& stream) {
  constexpr Index rows = Shape<T>::value_lanes;
  constexpr auto sums = std::make_index_sequence<std::size_t(rows * Vectors)>{};
  constexpr auto vectors = std::make_index_sequence<std::size_t(Vectors)>{};
  for (; lanes > 0; lanes -= rows) {
    if (stream.pending())
      value_tile<D, Vectors, true>(op, stream, sums, vectors);
    else
      value_tile<D, Vectors, false>(op, stream, sums, vectors);
    op.p += rows;
    op.o += rows * op.o_row;
  }
}

}  // namespace qkv::inline QKV_ABI::kernel::absorbed

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif

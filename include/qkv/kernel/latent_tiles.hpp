// kernel/latent_tiles.hpp — the two products of absorbed latent attention, in registers.
//
//     scores    s(j, lane) = Σ_k c(j, k)·q(k, lane)       lanes are heads (of one or more tokens); c is broadcast, from
//                                                       cache rows where they lie
//     values    o(lane, x) += Σ_j p(j, lane)·c(j, x)      lanes are features; the weight is broadcast
//
// Neither needs a transposed copy of the rows, and neither wastes lanes on few heads in the second. Each sum is one chain
// of multiply-adds in ascending k or j, whatever the height of the tile (few heads: see parts_of). A number stands for one
// feature, or is a word of two (bfloat16) or four (int8) features or, of values, of as many keys.
//
// Before: multi_head_attention.hpp   Next: kernel/latent_grid.hpp
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#include "arithmetic.hpp"
#include "value_tile.hpp"

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // of AVX-512 intrinsics, as in kernel/simd.hpp
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wignored-attributes"
#endif

namespace qkv::inline QKV_ABI::kernel::absorbed {

/// How the latent part of the rows is multiplied with queries (int8: the rope part is pairs of bfloat16).
template <class A>
using KeyDot =
#ifdef QKV_DETAIL_WORDS
    std::conditional_t<A::quads, QuadValueDot, ValueDot<A>>;
#else
    ValueDot<A>;
#endif

/// Few heads leave lanes over: then each of them takes every `parts`-th number of a row, and parts are added at the end.
///
///     parts 2, 8 heads, step k     lane 0: head 0, number 2k     lane 1: head 0, number 2k + 1     lane 2: head 1, …
///
/// One load repeats two or four numbers of a row in a register, as one repeats a single number. As many parts as fill two
/// registers, where four are enough: a tile of two loads little for what it multiplies. By heads only: the bits of a
/// token depend on no other.
template <class T>
constexpr Index parts_of([[maybe_unused]] Index heads) {
#if defined(EIGEN_VECTORIZE_AVX2)
  if (std::is_same_v<T, float>) return 2 * heads <= Simd<T>::width ? 4 : heads <= Simd<T>::width ? 2 : 1;
#endif
  return 1;
}

#if defined(EIGEN_VECTORIZE_AVX512)
EIGEN_ALWAYS_INLINE __m512 repeat_2(double two) { return _mm512_castpd_ps(_mm512_set1_pd(two)); }
EIGEN_ALWAYS_INLINE __m512 repeat_4(const float* four) { return _mm512_broadcast_f32x4(_mm_loadu_ps(four)); }
EIGEN_ALWAYS_INLINE __m512i as_words(__m512 v) { return _mm512_castps_si512(v); }
/// Sums of 2 or 4 neighbouring lanes, 8 or 4 of them.
EIGEN_ALWAYS_INLINE void store_sums_of_2(float* s, __m512 v) {
  const __m512 two = _mm512_add_ps(v, _mm512_permute_ps(v, 0xB1));
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 0, 2, 4, 6, 8, 10, 12, 14);
  _mm256_storeu_ps(s, _mm512_castps512_ps256(_mm512_permutexvar_ps(even, two)));
}
EIGEN_ALWAYS_INLINE void store_sums_of_4(float* s, __m512 v) {
  const __m512 two = _mm512_add_ps(v, _mm512_permute_ps(v, 0xB1)),
               four = _mm512_add_ps(two, _mm512_permute_ps(two, 0x4E));
  const __m512i fourth = _mm512_setr_epi32(0, 4, 8, 12, 0, 4, 8, 12, 0, 4, 8, 12, 0, 4, 8, 12);
  _mm_storeu_ps(s, _mm512_castps512_ps128(_mm512_permutexvar_ps(fourth, four)));
}
#elif defined(EIGEN_VECTORIZE_AVX2)
EIGEN_ALWAYS_INLINE __m256 repeat_2(double two) { return _mm256_castpd_ps(_mm256_set1_pd(two)); }
EIGEN_ALWAYS_INLINE __m256 repeat_4(const float* four) {
  const __m128 v = _mm_loadu_ps(four);
  return _mm256_set_m128(v, v);
}
EIGEN_ALWAYS_INLINE __m256i as_words(__m256 v) { return _mm256_castps_si256(v); }
/// Sums of 2 or 4 neighbouring lanes, 4 or 2 of them.
EIGEN_ALWAYS_INLINE void store_sums_of_2(float* s, __m256 v) {
  const __m256 two = _mm256_add_ps(v, _mm256_permute_ps(v, 0xB1));
  _mm_storeu_ps(s, _mm_shuffle_ps(_mm256_castps256_ps128(two), _mm256_extractf128_ps(two, 1), 0x88));
}
EIGEN_ALWAYS_INLINE void store_sums_of_4(float* s, __m256 v) {
  const __m256 two = _mm256_add_ps(v, _mm256_permute_ps(v, 0xB1)),
               four = _mm256_add_ps(two, _mm256_permute_ps(two, 0x4E));
  const __m128 both = _mm_unpacklo_ps(_mm256_castps256_ps128(four), _mm256_extractf128_ps(four, 1));
  std::memcpy(s, &both, 2 * sizeof(float));
}
#endif

/// `Parts` numbers from p on, repeated in all lanes.
template <class Dot, Index Parts>
EIGEN_ALWAYS_INLINE auto repeat(const void* p) {
  if constexpr (Parts == 1) {
    typename Dot::Number x;
    std::memcpy(&x, p, sizeof x);
    return Dot::broadcast(x);
  }
#if defined(EIGEN_VECTORIZE_AVX2)
  if constexpr (Parts > 1) {
    const auto v = [&] {
      if constexpr (Parts == 4) return repeat_4(static_cast<const float*>(p));
      double two;
      std::memcpy(&two, p, sizeof two);
      return repeat_2(two);
    }();
    if constexpr (std::is_same_v<typename Dot::Number, float>)
      return v;
    else
      return as_words(v);
  }
#endif
}

/// A register of scores in parts: their sums, width / Parts of them.
template <Index Parts, class T, class Vec>
EIGEN_ALWAYS_INLINE void store_sums(T* s, Vec v) {
  if constexpr (Parts == 1) Simd<T>::store(s, v);
#if defined(EIGEN_VECTORIZE_AVX2)
  if constexpr (Parts == 2) store_sums_of_2(s, v);
  if constexpr (Parts == 4) store_sums_of_4(s, v);
#endif
}

/// Heights: one register of lanes needs more rows than two to keep as many sums.
template <class T>
struct Shape {
  static constexpr bool wide = Simd<T>::registers >= 32;
  static constexpr Index score_rows(Index vectors) {
    return vectors == 1 ? (wide ? 24 : 12) : wide ? 12 : Simd<T>::fused ? 6 : 4;
  }
  static constexpr Index value_lanes = wide && Simd<T>::width >= 4 ? 8 : 4;  // of a value tile: they divide a panel's
  static constexpr Index value_vectors = wide || Simd<T>::fused ? 3 : 2;
  static constexpr bool even_end = !wide;  // values end in 2 + 2 vectors, not 3 + 1: 4 sums do not hide the latency
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

/// sum(r, v) += Σ_k rows(r, k)·lanes(k, v), k ascending in steps of Parts numbers. By constant indices only, as in
/// kernel/register_tile.hpp.
template <class D, Index Vectors, Index Parts, std::size_t... Sum, std::size_t... Vector>
EIGEN_ALWAYS_INLINE void multiply_rows(typename D::Sum (&sum)[sizeof...(Sum)], Index steps, RowAddress rows,
                                       const typename D::Number* lanes, std::index_sequence<Sum...>,
                                       std::index_sequence<Vector...>) {
  using Vec = decltype(D::load(lanes));
  for (; steps > 0; --steps) {
    const Vec lane[] = {D::load(lanes + Index(Vector) * D::width)...};
    ((sum[Sum] = D::dot(sum[Sum], repeat<D, Parts>(rows.template row<Index(Sum) / Vectors>()), lane[Sum % Vectors])),
     ...);
    rows.move(sizeof(typename D::Number) * Parts);
    lanes += Vectors * D::width;
  }
}

/// Scores of `Rows` rows for Vectors registers of lanes, or of parts of lanes: s [Rows][row], Vectors·width / Parts of a row.
template <class D, Index Rows, Index Vectors, Index Parts, Index Row, class T, std::size_t... I>
EIGEN_ALWAYS_INLINE void score_tile(Index steps, const RowAddress& rows, const typename D::Number* lanes, T* s,
                                    std::index_sequence<I...> all) {
  typename D::Sum sum[sizeof...(I)];
  ((sum[I] = Simd<T>::zero()), ...);
  multiply_rows<D, Vectors, Parts>(sum, steps, rows, lanes, all, std::make_index_sequence<std::size_t(Vectors)>{});
  (store_sums<Parts>(s + Index(I) / Vectors * Row + Index(I) % Vectors * (Simd<T>::width / Parts), sum[I]), ...);
}

/// `tiles` of them, one after another; rows lie `stride` bytes apart.
template <class D, Index Rows, Index Vectors, Index Parts, Index Row, class T>
void score_tiles(Index tiles, Index steps, const void* rows, Index stride, const typename D::Number* lanes, T* s) {
  for (; tiles > 0; --tiles) {
    score_tile<D, Rows, Vectors, Parts, Row>(steps, RowAddress(rows, stride), lanes, s,
                                             std::make_index_sequence<std::size_t(Rows * Vectors)>{});
    rows = static_cast<const char*>(rows) + Rows * stride;
    s += Rows * Row;
  }
}

#ifdef QKV_DETAIL_WORDS
/// Rows whose latent part is int8 and whose rope part is pairs of bfloat16.
struct QuadRows {
  Index steps, rope_steps;
  const std::int8_t* latent;
  const Word* rope;
  Index latent_stride, rope_stride;  // bytes
  const float* scale;                // per row
  const std::int32_t* offset;        // per row: -128·Σ latent
};
/// Scores: the rope part continues the sum that the latent part, made float, has begun.
template <Index Rows, Index Vectors, Index Parts, Index Row, std::size_t... I>
EIGEN_ALWAYS_INLINE void quad_score_tile(const QuadRows& rows, const Word* lanes, const Word* rope_lanes,
                                         const float* unit, float* s, std::index_sequence<I...> all) {
  using Quad = QuadValueDot;
  constexpr auto vectors = std::make_index_sequence<std::size_t(Vectors)>{};
  constexpr __mmask16 first_part = Parts == 1 ? 0xFFFF : Parts == 2 ? 0x5555 : 0x1111;
  Quad::Sum sum[sizeof...(I)];
  ((sum[I] = (Quad::Sum)_mm512_maskz_set1_epi32(first_part, rows.offset[Index(I) / Vectors])), ...);
  multiply_rows<Quad, Vectors, Parts>(sum, rows.steps, RowAddress(rows.latent, rows.latent_stride), lanes, all,
                                      vectors);
  __m512 score[sizeof...(I)];
  ((score[I] = _mm512_mul_ps(_mm512_cvtepi32_ps((__m512i)sum[I]),
                             _mm512_mul_ps(_mm512_set1_ps(rows.scale[Index(I) / Vectors]),
                                           _mm512_loadu_ps(unit + Index(I) % Vectors * word_lanes)))),
   ...);
  multiply_rows<PairValueDot, Vectors, Parts>(score, rows.rope_steps, RowAddress(rows.rope, rows.rope_stride),
                                              rope_lanes, all, vectors);
  (store_sums<Parts>(s + Index(I) / Vectors * Row + Index(I) % Vectors * (word_lanes / Parts), score[I]), ...);
}
template <Index Rows, Index Vectors, Index Parts, Index Row>
void quad_score_tiles(Index tiles, QuadRows rows, const Word* lanes, const Word* rope_lanes, const float* unit,
                      float* s) {
  for (; tiles > 0; --tiles) {
    quad_score_tile<Rows, Vectors, Parts, Row>(rows, lanes, rope_lanes, unit, s,
                                               std::make_index_sequence<std::size_t(Rows * Vectors)>{});
    rows.latent += Rows * rows.latent_stride;
    rows.rope += Rows * rows.rope_stride / Index(sizeof(Word));
    rows.scale += Rows, rows.offset += Rows;
    s += Rows * Row;
  }
}
#endif

/// Memory that will be read next, asked for while values are multiplied: their tiles leave load slots free, and rows
/// read in order stream well. `step` bytes with every step of a tile. Fewer with AVX2, where a step does a quarter of the
/// work, and would wait for what comes in a burst (16 heads: 0.81 of the peak for 0.72).
struct Stream {
  static constexpr std::uintptr_t step = Shape<float>::wide ? 128 : 32;
  std::uintptr_t at = 0, end = 0;
  bool pending() const { return at < end; }
};

/// o(lane, x) += Σ_j p(j, lane)·c(j, x)
template <class D, class T>
struct FeatureOperands {
  Index depth;                  // keys, or words of them
  const typename D::Number* p;  // [depth][p_step]
  Index p_step;
  const typename D::Number* c;  // rows c_step apart
  Index c_step;
  T* o;  // rows o_row apart
  Index o_row;
  const T* take;  // weights in 8 bits: what a step is worth, per lane
};
template <class D, class T>
EIGEN_ALWAYS_INLINE void add_features(T* o, typename D::Sum sum, [[maybe_unused]] const T* take) {
#ifdef QKV_DETAIL_WORDS
  if constexpr (std::is_same_v<D, QuadValueDot>)
    return _mm512_storeu_ps(
        o, _mm512_fmadd_ps(_mm512_cvtepi32_ps((__m512i)sum), _mm512_set1_ps(*take), _mm512_loadu_ps(o)));
#endif
  D::finish(o, sum, nullptr);
}
template <class D, Index Vectors, bool Ahead, class T, std::size_t... Sum, std::size_t... Vector>
EIGEN_ALWAYS_INLINE void feature_tile(const FeatureOperands<D, T>& op, [[maybe_unused]] Stream& stream,
                                      std::index_sequence<Sum...>, std::index_sequence<Vector...>) {
  typename D::Sum sum[] = {D::start(op.o + Index(Sum) / Vectors * op.o_row + Index(Sum) % Vectors * D::width)...};
  const typename D::Number *p = op.p, *c = op.c;
  using Vec = decltype(D::load(c));
  for (Index k = op.depth; k > 0; --k) {
    Vec row[] = {D::load(c + Index(Vector) * D::width)...};
    if constexpr (!Shape<T>::wide) (detail::hold(row[Vector]), ...);  // or g++ loads them again for every lane
    if constexpr (Ahead) {
      prefetch(reinterpret_cast<const void*>(stream.at));
      if constexpr (Stream::step > 64) prefetch(reinterpret_cast<const void*>(stream.at + 64));
      stream.at += Stream::step;
    }
    ((sum[Sum] = D::dot(sum[Sum], row[Sum % Vectors], D::broadcast(p[Index(Sum) / Vectors]))), ...);
    p += op.p_step;
    c += op.c_step;
  }
  (add_features<D>(op.o + Index(Sum) / Vectors * op.o_row + Index(Sum) % Vectors * D::width, sum[Sum],
                   op.take + Index(Sum) / Vectors),
   ...);
}
/// One slice of features for `lanes` lanes, a multiple of the tile's.
template <class D, Index Vectors, class T>
void feature_tiles(Index lanes, FeatureOperands<D, T> op, Stream& stream) {
  constexpr Index rows = Shape<T>::value_lanes;
  constexpr auto sums = std::make_index_sequence<std::size_t(rows * Vectors)>{};
  constexpr auto vectors = std::make_index_sequence<std::size_t(Vectors)>{};
  for (; lanes > 0; lanes -= rows) {
    if (stream.pending())
      feature_tile<D, Vectors, true>(op, stream, sums, vectors);
    else
      feature_tile<D, Vectors, false>(op, stream, sums, vectors);
    op.p += rows;
    op.o += rows * op.o_row;
    op.take += rows;
  }
}

}  // namespace qkv::inline QKV_ABI::kernel::absorbed

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif

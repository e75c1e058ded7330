// kernel/absorbed/split_heads.hpp — absorbed attention of few heads: several lanes for one head.
//
//     parts 2, 8 heads, step k     lane 0: head 0, number 2k     lane 1: head 0, number 2k + 1     lane 2: head 1, …
//
// Few heads leave lanes over: then each of them takes every `parts`-th number of a row, and parts are added at the end. One
// load repeats two or four numbers of a row in a register, as one repeats a single number.
//
// Before: kernel/absorbed/queries.hpp   Next: kernel/absorbed/tiles.hpp
#pragma once

#include <cstring>
#include <type_traits>

#include "../../simd/simd.hpp"
#include "../arithmetic.hpp"

namespace qkv { inline namespace QKV_ABI { namespace kernel::absorbed {

/// How many: as many as fill two registers of lanes, where four are enough, since a tile of two loads little for what it
/// multiplies. By heads only: the bits of a token depend on no other. In int16 a lane is a register anyway
/// (simd/shorts.hpp).
template <class A>
constexpr Index parts_of([[maybe_unused]] Index heads) {
#if defined(EIGEN_VECTORIZE_AVX2)
  constexpr Index width = Simd<typename A::Scalar>::width;
  if (std::is_same_v<typename A::Scalar, float> && !A::shorts) return 2 * heads <= width ? 4 : heads <= width ? 2 : 1;
#endif
  return 1;
}

/// How the queries of some lanes lie, and are multiplied: registers of width / parts lanes, `registers` side by side.
struct LaneLayout {
  Index parts, registers;

  friend constexpr bool operator==(const LaneLayout&, const LaneLayout&) = default;
};

/// The one rule for it: without parts a panel's registers, in parts two, but where one of four parts holds all lanes.
template <class A, Index Vectors>
constexpr LaneLayout lane_layout(Index heads, Index lanes) {
  const Index parts = parts_of<A>(heads);
  if (parts == 1) return {1, Vectors};
  return {parts, parts == 4 && lanes * parts <= Simd<typename A::Scalar>::width ? 1 : 2};
}

/// f(registers, parts) of a layout, as constants: of those that lane_layout gives.
template <class A, Index Vectors, class F>
void with_layout([[maybe_unused]] const LaneLayout& layout, F&& f) {
  using One = std::integral_constant<Index, 1>;
  using Two = std::integral_constant<Index, 2>;
  using Four = std::integral_constant<Index, 4>;
  if constexpr (parts_of<A>(1) > 1) {
    if (layout == LaneLayout{4, 1}) return f(One{}, Four{});
    if (layout == LaneLayout{4, 2}) return f(Two{}, Four{});
    if (layout == LaneLayout{2, 2}) return f(Two{}, Two{});
  }
  if constexpr (Vectors > 1 || parts_of<A>(Simd<typename A::Scalar>::width) == 1)  // one register: few heads
    f(std::integral_constant<Index, Vectors>{}, One{});
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
#if defined(EIGEN_VECTORIZE_AVX2)
  constexpr bool floats = std::is_same_v<typename Dot::Number, float>;
  if constexpr (Parts == 4) {
    const auto v = repeat_4(static_cast<const float*>(p));
    if constexpr (floats) return v;
    if constexpr (!floats) return as_words(v);
  }
  if constexpr (Parts == 2) {
    double two;
    std::memcpy(&two, p, sizeof two);
    if constexpr (floats) return repeat_2(two);
    if constexpr (!floats) return as_words(repeat_2(two));
  }
#endif
  if constexpr (Parts == 1) {
    typename Dot::Number x;
    std::memcpy(&x, p, sizeof x);
    return Dot::broadcast(x);
  }
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

}}}  // namespace qkv::QKV_ABI::kernel::absorbed

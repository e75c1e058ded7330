// detail/layer.hpp — what the two layers share: checks of weights and caches, pieces of a chunk, random weights.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <random>
#include <span>

#include "../attention.hpp"
#include "../projection.hpp"

namespace qkv::inline QKV_ABI::detail {

template <class T>
void check_projection(const char* name, const Projection<T>& p, Index in_dim, Index out_dim) {
  require(p.in_dim() == in_dim && p.out_dim() == out_dim, "weight `", name,
          "` must be [in, out] = ", Shape{in_dim, out_dim}, "; given ", Shape{p.in_dim(), p.out_dim()});
}

template <class T>
void check_gain(const char* name, const RowVector<T>& gain, Index size) {
  require(gain.size() == size, "weight `", name, "` must have ", size, " elements; given ", gain.size());
}

/// Rows [first, first + n) of a view, as a view.
template <class T>
View<T> rows_of(const View<T>& x, Index first, Index n) {
  return {const_cast<T*>(x.data()) + first * x.outerStride(), n, x.cols(), Eigen::OuterStride<>(x.outerStride())};
}
template <class T>
ConstView<T> rows_of(const ConstView<T>& x, Index first, Index n) {
  return {x.data() + first * x.outerStride(), n, x.cols(), Eigen::OuterStride<>(x.outerStride())};
}

/// Points x at fresh scratch of [rows, cols].
template <class T>
void carve_matrix(Carver& carver, View<T>& x, Index rows, Index cols) {
  new (&x) View<T>(carver.take<T>(checked_product(rows, cols)), rows, cols, Eigen::OuterStride<>(cols));
}

/// A mask's place in forward(x, mask), beside forward(x, cache) and forward(query, key, value).
template <class M>
concept NeitherCacheNorMatrix = !MatrixLike<M> && !requires(const M& cache) {
  cache.max_append();
};

/// A cache that forgets rows: it has a window and, perhaps, pinned first tokens.
template <class C>
concept SlidingCache = requires(const C& cache) {
  cache.window();
  cache.pinned();
};

/// What a query may see of a cache, whatever else it still holds.
template <class C>
auto visible(const C& cache) {
  if constexpr (SlidingCache<C>)
    return prefix(cache.pinned()) | Window{cache.window(), infinite};
  else
    return full;
}

/// How many of n new rows may be appended and attended at once.
template <class C>
Index piece(const C& cache, Index n) {
  return SlidingCache<C> ? std::min(n, cache.max_append()) : n;
}

template <class C>
void check_room(const C& cache, Index n) {
  require<std::length_error>(SlidingCache<C> || n <= cache.max_append(), "the cache is full: it takes at most ",
                             cache.max_append(), " more rows (position ", cache.position(), "); given ", n);
}

/// Asks mask and score whether they fit the call that appending n rows will make, before the cache is touched.
template <class M, class F, class C>
void check_growth(const M& mask, const F& score, const C& cache, Heads heads, Index n) {
  if (n == 0) return;
  const Index rows = cache.rows() + n, first = cache.position();
  const CallShape call{.heads = heads.heads,
                       .n_queries = n,
                       .n_keys = rows,
                       .first_position = first,
                       .last_key_position = first + n - 1};
  if constexpr (!SlidingCache<C>) {
    check_operand(mask, call);
    check_operand(score, call);
  }
}

template <class C>
void check_batch(std::span<const Index> row_offsets, std::span<C* const> caches, Index rows) {
  require(row_offsets.size() == caches.size() + (caches.empty() ? row_offsets.size() : 1),
          "row_offsets must have one entry more than there are caches; given ", row_offsets.size(), " for ",
          caches.size(), " caches");
  require(!caches.empty() || rows == 0, "rows need caches: given ", rows, " rows and no cache");
  if (caches.empty()) return;
  require(row_offsets.front() == 0 && row_offsets.back() == rows, "row_offsets must begin with 0 and end with n ", rows,
          "; given ", row_offsets.front(), " and ", row_offsets.back());
  for (std::size_t s = 0; s < caches.size(); ++s) {
    const Index n = row_offsets[s + 1] - row_offsets[s];
    require(n >= 0, "row_offsets must not decrease; entry ", s + 1, " is ", row_offsets[s + 1], " after ",
            row_offsets[s]);
    require(caches[s] != nullptr, "caches[", s, "] is null");
    require<std::length_error>(n <= caches[s]->max_append(), "caches[", s, "] takes at most ", caches[s]->max_append(),
                               " more rows (position ", caches[s]->position(), "); given ", n);
    for (std::size_t r = 0; r < s; ++r)
      require(caches[r] != caches[s], "caches[", r, "] and caches[", s, "] are the same cache");
  }
}

/// Appends each sequence's rows; where a shared pool runs dry on the way, takes all back and raises.
template <class C, class A, class B>
void append_all(std::span<const Index> row_offsets, std::span<C* const> caches, const A& a, const B& b) {
  for (std::size_t s = 0; s < caches.size(); ++s) {
    const Index first = row_offsets[s], n = row_offsets[s + 1] - first;
    if (caches[s]->try_append(a.middleRows(first, n), b.middleRows(first, n))) continue;
    for (std::size_t r = 0; r < s; ++r)
      caches[r]->truncate(caches[r]->position() - (row_offsets[r + 1] - row_offsets[r]));
    raise<std::length_error>("the pool ran out of room for caches[" + std::to_string(s) +
                             "]; all caches are as they were");
  }
}

/// Independent of the standard library's distributions, so that a seed gives the same weights everywhere.
template <class T>
class RandomWeights {
 public:
  explicit RandomWeights(std::uint32_t seed) : engine_(seed) {}

  Matrix<T> matrix(Index rows, Index cols, double deviation) {
    Matrix<T> m(rows, cols);
    for (Index i = 0; i < m.size(); ++i) m.data()[i] = static_cast<T>(deviation * normal());
    return m;
  }
  Projection<T> projection(Index in_dim, Index out_dim, bool with_bias) {
    Matrix<T> weight = matrix(in_dim, out_dim, 1 / std::sqrt(static_cast<double>(std::max<Index>(in_dim, 1))));
    RowVector<T> bias;
    if (with_bias) bias = matrix(1, out_dim, 0.1);
    return Projection<T>(std::move(weight), std::move(bias));
  }

 private:
  /// Box-Muller on 24-bit uniforms.
  double normal() {
    const double u = (static_cast<double>(engine_() >> 8) + 1) / 16777217.0,
                 v = static_cast<double>(engine_() >> 8) / 16777216.0;
    return std::sqrt(-2 * std::log(u)) * std::cos(6.283185307179586 * v);
  }
  std::mt19937 engine_;
};

}  // namespace qkv::inline QKV_ABI::detail

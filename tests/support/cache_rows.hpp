// support/cache_rows.hpp — rows that every storage keeps exactly, so that caches can be compared by equality.
#pragma once

#include <qkv/key_rows.hpp>

#include <vector>

#include "numbers.hpp"

namespace support {

/// Number `column` of the row with this id: whole numbers in [-127, 127], and 127 at the start of each head, so that
/// the scale of an int8 row is 1.
inline double cache_number(Index id, Index column, Index head_dim, bool value) {
  if (column % head_dim == 0) return 127;
  const auto mixed = static_cast<std::uint64_t>(id * 1009 + column * 31 + (value ? 7 : 0)) * 0x9E3779B97F4A7C15u;
  return static_cast<double>((mixed >> 40) % 255) - 127;
}

/// The rows with these ids, [ids, kv_heads·head_dim].
template <class T>
qkv::Matrix<T> cache_rows(const std::vector<Index>& ids, Index kv_heads, Index head_dim, bool value) {
  qkv::Matrix<T> m(static_cast<Index>(ids.size()), kv_heads * head_dim);
  for (Index i = 0; i < m.rows(); ++i)
    for (Index j = 0; j < m.cols(); ++j)
      m(i, j) = static_cast<T>(cache_number(ids[static_cast<std::size_t>(i)], j, head_dim, value));
  return m;
}

/// What a cache should hold: the row with this id at this position.
struct HeldRow {
  Index position, id;
};

/// Reads as kernels do: the runs hold exactly these rows, in this order.
template <qkv::StorageType S>
bool holds(const qkv::KeyRows<S>& all, const std::vector<HeldRow>& expected) {
  if (all.rows != static_cast<Index>(expected.size())) return false;
  std::size_t at = 0;
  for (const qkv::KeyRun<S>& run : all.runs) {
    if (run.rows < 1) return false;
    for (Index i = 0; i < run.rows; ++i, ++at) {
      if (at >= expected.size() || run.position + i != expected[at].position) return false;
      const Index id = expected[at].id;
      for (Index h = 0; h < all.kv_heads; ++h) {
        for (Index j = 0; j < all.head_dim; ++j)
          if (!(static_cast<double>(all.key(run, h, i)[j]) * static_cast<double>(all.key_scale(run, h, i)) ==
                cache_number(id, h * all.head_dim + j, all.head_dim, false)))
            return false;
        for (Index j = 0; j < all.v_head_dim; ++j)
          if (!(static_cast<double>(all.value(run, h, i)[j]) * static_cast<double>(all.value_scale(run, h, i)) ==
                cache_number(id, h * all.v_head_dim + j, all.v_head_dim, true)))
            return false;
      }
    }
  }
  return at == expected.size();
}

/// Positions 0 … n-1, the row at each being its own id.
inline std::vector<HeldRow> rows_until(Index n) {
  std::vector<HeldRow> rows;
  for (Index i = 0; i < n; ++i) rows.push_back({i, i});
  return rows;
}

/// first, first + 1, … last - 1.
inline std::vector<Index> ids(Index first, Index last) {
  std::vector<Index> all;
  for (Index i = first; i < last; ++i) all.push_back(i);
  return all;
}

/// Appends rows of these ids to any cache, as T.
template <class T = float, class Cache>
void append_ids(Cache& cache, const std::vector<Index>& ids) {
  cache.append(cache_rows<T>(ids, cache.kv_heads(), cache.head_dim(), false),
               cache_rows<T>(ids, cache.kv_heads(), cache.v_head_dim(), true));
}
template <class T = float, class Cache>
bool try_append_ids(Cache& cache, const std::vector<Index>& ids) {
  return cache.try_append(cache_rows<T>(ids, cache.kv_heads(), cache.head_dim(), false),
                          cache_rows<T>(ids, cache.kv_heads(), cache.v_head_dim(), true));
}
template <class Cache, class... Wrap>
void scatter_ids(Cache& cache, Index position, const std::vector<Index>& ids, Wrap... wrap) {
  cache.scatter_rows(position, cache_rows<float>(ids, cache.kv_heads(), cache.head_dim(), false),
                     cache_rows<float>(ids, cache.kv_heads(), cache.v_head_dim(), true), wrap...);
}

}  // namespace support

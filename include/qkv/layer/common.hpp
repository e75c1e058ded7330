// layer/common.hpp — what the two layers share: scratch, checks of weights and caches, pieces of a chunk, random weights.
//
// Before: call/latent_forms.hpp   Next: layer/forward.hpp
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <new>
#include <random>
#include <span>
#include <string>
#include <utility>

#include "../attention.hpp"
#include "../projection.hpp"

namespace qkv { inline namespace QKV_ABI { namespace detail {

template <class T>
void check_projection(const char* name, const Projection<T>& p, Index in_dim, Index out_dim) {
  require(p.in_dim() == in_dim && p.out_dim() == out_dim, "weight `", name,
          "` must be [in, out] = ", Shape{in_dim, out_dim}, "; given ", Shape{p.in_dim(), p.out_dim()});
}

template <class T>
void check_gain(const char* name, const RowVector<T>& gain, Index size) {
  require(gain.size() == size, "weight `", name, "` must have ", size, " elements; given ", gain.size());
}

/// f(sequence, first_row, n_rows) for each sequence's part of rows [row, row + n).
template <class F>
void for_each_sequence(std::span<const Index> row_offsets, Index row, Index n, F&& f) {
  const auto after = std::upper_bound(row_offsets.begin(), row_offsets.end(), row);
  for (auto s = static_cast<std::size_t>(after - row_offsets.begin()) - 1; n > 0; ++s) {
    const Index some = std::min(n, row_offsets[s + 1] - row);
    if (some > 0) f(s, row, some);
    row += some, n -= some;
  }
}

/// A view that carve_matrix will point at scratch.
template <class T>
View<T> no_view() {
  return {nullptr, 0, 0, Eigen::OuterStride<>(0)};
}
/// Points x at fresh scratch of [rows, cols].
template <class T>
void carve_matrix(Carver& carver, View<T>& x, Index rows, Index cols) {
  new (&x) View<T>(carver.take<T>(checked_product(rows, cols)), rows, cols, Eigen::OuterStride<>(cols));
}
/// Scratch laid out by layout(carver), which is called twice: to count the bytes, then to assign them.
class Scratch {
 public:
  template <class Layout>
  Scratch(Workspace& workspace, const Layout& layout) : lease_(workspace.lease(used(layout, nullptr))) {
    used(layout, lease_.data());
  }

 private:
  template <class Layout>
  static std::size_t used(const Layout& layout, std::byte* base) {
    Carver carver(base);
    layout(carver);
    return carver.used();
  }
  Workspace::Lease lease_;
};

/// What may be passed as a layer's mask. Caches, matrices, options and the offsets of a batch select other overloads.
template <class M>
concept InMaskPlace = !MatrixLike<M> && !std::same_as<M, LayerOptions> &&
                      !std::convertible_to<const M&, std::span<const Index>> && !requires(const M& cache) {
  cache.max_append();
};

/// A cache that evicts rows: it has a window and, perhaps, pinned first tokens; the rest of its capacity is slack.
template <class C>
concept SlidingCache = requires(const C& cache) {
  cache.window();
  cache.pinned();
  cache.capacity();
};

/// A cache that stores rows in a pool, which other sequences may share.
template <class C>
concept PooledCache = requires(const C& cache) {
  cache.pool()->free_pages();
  cache.pool()->make_room([] { return Index(0); });
  cache.pages_to_append(Index{}, Index{});
  cache.shares_last_page(cache);
};

/// The mask of a cache: which of the held rows a query may see.
template <class C>
auto visible(const C& cache) {
  if constexpr (SlidingCache<C>)
    return prefix(cache.pinned()) | Window{cache.window(), infinite};
  else
    return full;
}

/// How many of n new rows may be appended and attended to at once when the cache has reached `position`.
template <class C>
Index piece(const C& cache, Index position, Index n) {
  if constexpr (SlidingCache<C>) {
    const Index first_visible = std::max(cache.pinned(), position - cache.window());
    return std::min(n, cache.capacity() - cache.pinned() - (position - first_visible));
  } else {
    return n;
  }
}

/// Whether a sequence of the batch has more rows than its window lets it append at once.
template <class C>
bool needs_pieces(std::span<const Index> row_offsets, std::span<C* const> caches) {
  for (std::size_t s = 0; s < caches.size(); ++s)
    if (row_offsets[s + 1] - row_offsets[s] > caches[s]->max_append()) return true;
  return false;
}

/// The most rows that a cache could append after eviction of others from its pool: more are refused before that.
template <class C>
Index most_rows(const C& cache) {
  if constexpr (SlidingCache<C>)
    return infinite;
  else if constexpr (!PooledCache<C>)
    return cache.max_append();
  else if constexpr (requires { cache.capacity(); })
    return cache.capacity() - cache.rows();
  else
    return infinite;
}

/// Raises unless mask and score fit the calls that appending n rows will make, before the cache is touched; `output` is what
/// the layer writes.
template <class T, StorageType S, class C>
void check_growth(const Rule<T, S>& rule, const C& cache, Heads heads, Index n, const Footprint& output) {
  Index rows = cache.rows();
  for (Index first = cache.position(), end = first + n; first < end;) {
    const Index count = piece(cache, first, end - first);
    rows += count;
    if constexpr (SlidingCache<C>) rows = std::min(rows, cache.capacity());
    rule.check({.heads = heads.heads,
                .n_queries = count,
                .n_keys = rows,
                .first_position = first,
                .last_key_position = first + count - 1,
                .output = output});
    first += count;
  }
}

/// Raises unless a cache, the s-th of `count`, can append n more rows, of which it has room for `most`.
template <class C>
void require_room(const C& cache, Index n, Index most, std::size_t s = 0, std::size_t count = 1) {
  if (n <= most) return;
  raise<std::length_error>(
      message_of({count == 1 ? "the cache" : "caches[" + std::to_string(s) + "]", " takes at most ", cache.max_append(),
                  " more rows (position ", cache.position(), "); given ", n}));
}

/// All checks of a batch that do not need its pool to evict.
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
    require(row_offsets[s] <= row_offsets[s + 1], "row_offsets must not decrease; entry ", s + 1, " is ",
            row_offsets[s + 1], " after ", row_offsets[s]);
    require(caches[s] != nullptr, "caches[", s, "] is null");
    for (std::size_t r = 0; r < s; ++r)
      require(caches[r] != caches[s], "caches[", r, "] and caches[", s, "] are the same cache");
    const Index n = row_offsets[s + 1] - row_offsets[s];
    require_room(*caches[s], n, most_rows(*caches[s]), s, caches.size());
  }
}

/// Marks the caches of a call as busy while it lives: the pool's eviction callback may not change them.
template <class C>
class Busy {
 public:
  explicit Busy(std::span<C* const> caches) : caches_(caches) {
    if constexpr (requires(C & cache) { cache.require_idle(); })
      for (C* cache : caches_) cache->require_idle();  // for another call
    set(true);
  }
  Busy(const Busy&) = delete;
  Busy& operator=(const Busy&) = delete;
  ~Busy() { set(false); }

 private:
  void set([[maybe_unused]] bool on) const {
    if constexpr (requires(C & cache) { cache.set_busy(on); })
      for (C* cache : caches_) cache->set_busy(on);
  }
  std::span<C* const> caches_;
};

/// Raises unless a checked batch fits. Caches that share a pool must find room in it together: pages are counted as
/// appending in order will use them. More pages than the whole pool has are refused without calling the eviction
/// callback.
template <class C>
void find_room(std::span<const Index> row_offsets, std::span<C* const> caches) {
  if constexpr (PooledCache<C>) {
    const Busy<C> busy(caches);
    const auto rows = [&](std::size_t s) { return row_offsets[s + 1] - row_offsets[s]; };
    const auto needs = [&](std::size_t s) {
      Index copied = 0;  // earlier sequences that have copied its last page
      for (std::size_t r = 0; r < s; ++r) copied += rows(r) > 0 && caches[r]->shares_last_page(*caches[s]) ? 1 : 0;
      return caches[s]->pages_to_append(rows(s), copied);
    };
    const auto for_each_pool = [&](const auto& f) {
      for (std::size_t s = 0; s < caches.size(); ++s) {
        auto* const pool = caches[s]->pool();
        const auto same_pool = [&](const C* cache) { return cache->pool() == pool; };
        const auto begin = caches.begin(), self = begin + static_cast<std::ptrdiff_t>(s);
        if (pool == nullptr || std::any_of(begin, self, same_pool)) continue;  // counted already
        f(*pool, [&](const auto& pages_of) {
          Index sum = 0;
          for (std::size_t r = s; r < caches.size(); ++r) sum += same_pool(caches[r]) ? pages_of(r) : 0;
          return sum;
        });
      }
    };
    const auto require_pages = [&](bool ok, const auto& pool, const auto& sum_over) {
      if (!ok && caches.size() == 1) require_room(*caches[0], rows(0), caches[0]->max_append());
      require<std::length_error>(ok, "the pool has ", pool.free_pages(),
                                 " free pages; the rows of all its sequences need ", sum_over(needs));
    };
    if constexpr (requires { caches[0]->pages().size(), caches[0]->pool()->pages(); })
      for_each_pool([&](const auto& pool, const auto& sum_over) {
        Index held = 0;  // by the longest; then fresh pages, and copies of shared ones
        const Index fresh = sum_over([&](std::size_t s) {
          held = std::max(held, static_cast<Index>(caches[s]->pages().size()));
          return caches[s]->pages_to_append(rows(s), infinite);
        });
        require_pages(held + fresh <= pool.pages(), pool, sum_over);
      });
    for_each_pool([&](auto& pool, const auto& sum_over) {
      const auto missing = [&] { return std::max<Index>(sum_over(needs) - pool.free_pages(), 0); };
      require_pages(pool.make_room(missing), pool, sum_over);
    });
  }
}

/// Does not use the standard library's distributions: a seed gives the same weights everywhere.
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

}}}  // namespace qkv::QKV_ABI::detail

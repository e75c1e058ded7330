// kernel/decode.hpp — a few queries against a long cache: every key and value row is read once, in order.
//
//     for each chunk of keys on the position grid:   s = scale · K q for all queries of the kv group, row by row
//                                                    m, l, o ← merge with (max s, Σ e^(s-m), Σ e^(s-m) v)
//
//     lanes are features:   q·k    d/W products per row and query, kept as one register; W rows of them are transposed and
//                                  added, which gives W scores at once
//                           p·v    two value rows at a time, for every query of the group
//
// The work is bound by reading memory: 2 · n_keys · kv_heads · head_dim numbers. Queries of a group (and several new
// tokens) share each row while it is in registers; narrow storage is widened there. A score is the same chain of sums
// wherever its row lies, and rows are added in ascending order: paged, ring and contiguous caches give the same bits.
//
// Before: kernel/tiled.hpp   Next: attention.hpp
#pragma once

#include <algorithm>
#include <cstdint>
#include <numbers>

#include "../softmax.hpp"
#include "../workspace.hpp"
#include "simd.hpp"
#include "task.hpp"

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // of AVX-512 intrinsics, as in kernel/simd.hpp
#endif

namespace qkv::inline QKV_ABI::kernel {

inline constexpr Index decode_chunk = 256;

/// Scratch of one work item.
template <class T>
struct DecodeScratch {
  T* q;            // [n, d up to whole registers]: the queries of the group, zeros past head_dim
  T* sums;         // [n, W, W]: partial sums of up to W rows
  T* scores;       // [n, decode_chunk]
  T* rows;         // [2, dv up to whole registers]: value rows as T
  bool* all_seen;  // [decode_chunk]: every query of the group sees this column

  /// At least one register: heads without features have scores of zero.
  static Index whole(Index d) { return (std::max<Index>(d, 1) + Simd<T>::width - 1) / Simd<T>::width * Simd<T>::width; }

  DecodeScratch(detail::Carver& carver, Index n, Index head_dim, Index v_head_dim)
      : q(carver.take<T>(n * whole(head_dim))),
        sums(carver.take<T>(n * Simd<T>::width * Simd<T>::width)),
        scores(carver.take<T>(n * decode_chunk)),
        rows(carver.take<T>(2 * whole(v_head_dim))),
        all_seen(carver.take<bool>(decode_chunk)) {}
};

template <class T>
std::size_t decode_scratch_bytes(Index n_queries, Index group_size, Index head_dim, Index v_head_dim) {
  detail::Carver carver(nullptr);
  DecodeScratch<T>(carver, n_queries * group_size, head_dim, v_head_dim);
  return carver.used();
}

/// One kv head of a task, for all its query heads and all (few) queries: n = n_queries · group_size rows of q.
template <class T, StorageType S, class M, class F>
class Decode {
  using V = Simd<T>;
  using Vec = typename V::Vec;
  static constexpr Index W = V::width;

 public:
  Decode(const Task<T, S, M, F>& task, const StateView<T>& state, Index kv_head, std::byte* scratch)
      : task_(task),
        state_(state),
        kv_head_(kv_head),
        n_(task.n_queries() * task.heads.group_size()),
        carver_(scratch),
        s_(carver_, n_, task.head_dim(), task.v_head_dim()) {}

  /// Merges all keys of the task into the state of this kv head's queries.
  void run() {
    const Index d = task_.head_dim(), width = DecodeScratch<T>::whole(d);
    for (Index i = 0; i < n_; ++i) {
      std::copy_n(task_.query(query(i), head(i)), d, s_.q + i * width);
      std::fill_n(s_.q + i * width + d, width - d, T(0));
    }
    for_each_chunk(task_.keys, decode_chunk, [&](Index first, std::size_t r, Index base, Index row) {
      if (score_chunk(first, r, base, row)) weigh_chunk(first, r, base, row);
    });
  }

 private:
  Index query(Index i) const { return i / task_.heads.group_size(); }
  Index head(Index i) const { return kv_head_ * task_.heads.group_size() + i % task_.heads.group_size(); }

  /// Scores of the chunk; -inf where a query does not see a key. False: nobody sees anything.
  bool score_chunk(Index first, std::size_t r, Index base, Index row) {
    bool any = false;
    std::fill_n(s_.scores, n_ * decode_chunk, detail::minus_infinity<T>);
    std::fill_n(s_.all_seen, decode_chunk, false);
    for_each_piece(task_.keys, decode_chunk, first, r, base, row,
                   [&](const KeyRun<S>& run, Index run_base, Index run_row, Index count, Index column) {
                     Cover least = Cover::all, most = Cover::none;
                     for (Index h = head(0); h < head(0) + task_.heads.group_size(); ++h) {
                       const Cover c = detail::cover(
                           *task_.mask, task_.block(h, 0, task_.n_queries(), run, run_base, run_row, count));
                       least = std::min(least, c), most = std::max(most, c);
                     }
                     if (most == Cover::none) return;
                     any = true;
                     for (Index k = 0; k < count; k += W)
                       score_rows(run, run_base, run_row + k, std::min(W, count - k), column + k, least != Cover::all);
                   });
    return any;
  }

  /// Up to W rows of one run against all queries.
  void score_rows(const KeyRun<S>& run, Index base, Index row, Index some, Index column, bool mixed) {
    const Index d = task_.head_dim(), width = DecodeScratch<T>::whole(d);
    for (Index j = 0; j < some; ++j) {
      const S* const key = task_.keys.key(run, kv_head_, row + j);
      prefetch_ahead(key);
      // Registers of the row, a few at a time, against every query; four sums per query hide the latency.
      for (Index k = 0; k < width; k += 4 * W) {
        const Index parts = std::min<Index>(4, (width - k) / W);
        Vec part[4];
        for (Index x = 0; x < 4; ++x)
          part[x] = x >= parts             ? V::zero()
                    : k + (x + 1) * W <= d ? V::load(key + k + x * W)
                                           : V::load_n(key + k + x * W, d - k - x * W);
        for (Index i = 0; i < n_; ++i) {
          const T* const q = s_.q + i * width + k;
          T* const sum = s_.sums + (i * W + j) * W;
          Vec a = V::mul(V::load(q), part[0]);
          if (parts > 1) a = V::fma(V::load(q + W), part[1], a);
          Vec b = parts > 2 ? V::mul(V::load(q + 2 * W), part[2]) : V::zero();
          if (parts > 3) b = V::fma(V::load(q + 3 * W), part[3], b);
          a = V::add(a, b);
          V::store(sum, k == 0 ? a : V::add(V::load(sum), a));
        }
      }
    }
    for (Index i = 0; i < n_; ++i) {
      Vec block[V::lanes];
      for (Index j = 0; j < W; ++j) block[j] = j < some ? V::load(s_.sums + (i * W + j) * W) : V::zero();
      V::transpose(block);
      for (Index half = W / 2; half > 0; half /= 2)
        for (Index j = 0; j < half; ++j) block[j] = V::add(block[j], block[j + half]);
      V::store_n(s_.scores + i * decode_chunk + column, V::mul(block[0], V::broadcast(task_.scale)), some);
    }
    for (Index j = 0; j < some; ++j) {
      bool all = true;
      const T scale = static_cast<T>(task_.keys.key_scale(run, kv_head_, row + j));
      for (Index i = 0; i < n_; ++i) {
        T& score = s_.scores[i * decode_chunk + column + j];
        const At at = task_.at(head(i), query(i), base + row + j, run.position + row + j);
        if (mixed && !task_.mask->sees(at))
          score = detail::minus_infinity<T>;
        else if constexpr (has_row_scale<S>)
          score = (*task_.score)(score * scale, at);
        else
          score = (*task_.score)(score, at);
        all = all && score != detail::minus_infinity<T>;
      }
      s_.all_seen[column + j] = all;
    }
  }

  /// Rows are read in order; what lies this far ahead is asked for meanwhile. An address: nothing need be there.
  static void prefetch_ahead(const S* row) {
    prefetch(reinterpret_cast<const void*>(reinterpret_cast<std::uintptr_t>(row) + 8192));
  }

  void weigh_chunk(Index first, std::size_t r, Index base, Index row) {
    const Index dv = task_.v_head_dim();
    for (Index i = 0; i < n_; ++i) {
      T* const s = s_.scores + i * decode_chunk;
      T& m = state_.m(query(i), head(i));
      T& l = state_.l(query(i), head(i));
      Vec high = V::broadcast(m);
      for (Index j = 0; j < decode_chunk; j += W) high = V::max_nan(high, V::load(s + j));
      const T top = largest(high);
      if (top == detail::minus_infinity<T>) continue;
      const T keep = detail::weight_of(m, top);
      const Vec to_log2 = V::broadcast(static_cast<T>(std::numbers::log2e_v<long double>)), base_of = V::broadcast(top);
      const Vec hidden = V::broadcast(detail::minus_infinity<T>);
      Vec sum[2] = {V::zero(), V::zero()};
      for (Index j = 0; j < decode_chunk; j += W) {
        const Vec score = V::load(s + j);
        const Vec p = V::exp2(V::mul(V::sub(score, base_of), to_log2));
        sum[j / W % 2] = V::add(sum[j / W % 2], p);
        V::store(s + j, V::select(V::less_equal(score, hidden), hidden, p));  // -inf: the value is not read
      }
      m = top;
      l = keep * l + V::sum_lanes(V::add(sum[0], sum[1]));
      if (keep == T(1)) continue;
      T* const o = state_.o(query(i), head(i), dv);
      for (Index x = 0; x < dv; ++x) o[x] *= keep;
    }
    for_each_piece(task_.keys, decode_chunk, first, r, base, row,
                   [&](const KeyRun<S>& run, Index, Index run_row, Index count, Index column) {
                     for (Index k = 0; k < count;) {
                       const bool seen = s_.all_seen[column + k];
                       const bool pair = seen && k + 1 < count && s_.all_seen[column + k + 1];
                       if (pair)
                         add_rows<2>(run, run_row + k, column + k);
                       else if (seen)
                         add_rows<1>(run, run_row + k, column + k);
                       else
                         add_seen(run, run_row + k, column + k);
                       k += pair ? 2 : 1;
                     }
                   });
  }
  static T largest(Vec v) {
    T lane[V::lanes];
    V::store(lane, v);
    T top = lane[0];
    for (const T x : lane) top = detail::nan_max(top, x);
    return top;
  }

  /// o += p·v for one or two rows that every query sees.
  template <Index Rows>
  void add_rows(const KeyRun<S>& run, Index row, Index column) {
    const Index dv = task_.v_head_dim(), whole = DecodeScratch<T>::whole(dv);
    T* const values = s_.rows;
    for (Index j = 0; j < Rows; ++j) read(run, row + j, values + j * whole);
    for (Index i = 0; i < n_; ++i) {
      T* const o = state_.o(query(i), head(i), dv);
      const T* const p = s_.scores + i * decode_chunk + column;
      Vec weight[std::size_t(Rows)];
      for (Index j = 0; j < Rows; ++j) weight[j] = V::broadcast(p[j]);
      Index x = 0;
      for (; x + W <= dv; x += W) {
        Vec sum = V::load(o + x);
        for (Index j = 0; j < Rows; ++j) sum = V::fma(weight[j], V::load(values + j * whole + x), sum);
        V::store(o + x, sum);
      }
      if (x == dv) continue;
      Vec sum = V::load_n(o + x, dv - x);
      for (Index j = 0; j < Rows; ++j) sum = V::fma(weight[j], V::load(values + j * whole + x), sum);
      V::store_n(o + x, sum, dv - x);
    }
  }

  /// The same for one row that some of the queries see; nobody, and it is not read.
  void add_seen(const KeyRun<S>& run, Index row, Index column) {
    const Index dv = task_.v_head_dim();
    bool loaded = false;
    for (Index i = 0; i < n_; ++i) {
      const T p = s_.scores[i * decode_chunk + column];
      if (p == detail::minus_infinity<T>) continue;
      if (!loaded) read(run, row, s_.rows);
      loaded = true;
      T* const o = state_.o(query(i), head(i), dv);
      for (Index x = 0; x < dv; x += W) {
        const Index some = std::min(W, dv - x);
        V::store_n(o + x, V::fma(V::broadcast(p), V::load(s_.rows + x), V::load_n(o + x, some)), some);
      }
    }
  }

  /// A value row as T, zeros up to a whole register.
  void read(const KeyRun<S>& run, Index row, T* to) const {
    const Index dv = task_.v_head_dim();
    const S* const from = task_.keys.value(run, kv_head_, row);
    prefetch_ahead(from);
    const Vec scale = V::broadcast(static_cast<T>(task_.keys.value_scale(run, kv_head_, row)));
    for (Index x = 0; x < dv; x += W) {
      const Vec v = x + W <= dv ? V::load(from + x) : V::load_n(from + x, dv - x);
      V::store(to + x, has_row_scale<S> ? V::mul(v, scale) : v);
    }
  }

  const Task<T, S, M, F>& task_;
  const StateView<T>& state_;
  Index kv_head_, n_;
  detail::Carver carver_;
  DecodeScratch<T> s_;
};

}  // namespace qkv::inline QKV_ABI::kernel

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif

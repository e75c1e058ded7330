// kernel/decode.hpp — a few queries against a long cache: every key and value row is read once, in order.
//
//     for each chunk of keys on the position grid:   s = score(scale · K q) for all queries of the kv group
//                                                    m, l, o ← merge with (max s, Σ e^(s-m), Σ e^(s-m) v)
//
//     position   0          256         512                     2048
//     chunks     |-----------|-----------|-- …                   |-----------|-- …
//     splits     |--------------- one state (m, l, o) -----------|---------- another, merged in ascending order
//
// The work is bound by reading memory: 2 · n_keys · kv_heads · head_dim numbers. Queries of a group (and several new
// tokens) share each row while it is in registers (kernel/row_tile.hpp); narrow storage is widened there. Splits lie on a
// grid of absolute positions and merge in order, so paged, ring and contiguous caches, any number of threads and a prompt
// in pieces give the same bits. Dao et al. 2023, "Flash-Decoding for long-context inference".
//
// Before: kernel/row_tile.hpp   Next: attention.hpp
#pragma once

#include <algorithm>
#include <cstdint>
#include <numbers>

#include "../score.hpp"
#include "../softmax.hpp"
#include "../workspace.hpp"
#include "row_tile.hpp"
#include "task.hpp"

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // of AVX-512 intrinsics, as in kernel/simd.hpp
#endif

namespace qkv::inline QKV_ABI::kernel {

inline constexpr Index decode_chunk = 256;
inline constexpr Index decode_split = 8 * decode_chunk;

/// Keys at positions first … first + decode_split - 1: where they begin, as for_each_chunk tells it.
struct Split {
  Index first;
  std::size_t run;
  Index base, row;
};

/// f(split) for all that hold keys, in ascending order.
template <StorageType S, class F>
void for_each_split(const KeyRows<S>& keys, F&& f) {
  for_each_chunk(keys, decode_split, [&](Index first, std::size_t run, Index base, Index row) {
    f(Split{first, run, base, row});
  });
}

/// The states of n queries over the keys of one split.
template <class T>
struct DecodeState {
  T* m;  // [n]
  T* l;  // [n]
  T* o;  // [n, v_head_dim up to whole registers]

  DecodeState(detail::Carver& carver, Index n, Index v_head_dim)
      : m(carver.take<T>(n)), l(carver.take<T>(n)), o(carver.take<T>(n * whole_registers<T>(v_head_dim))) {}

  static std::size_t bytes(Index n, Index v_head_dim) {
    detail::Carver carver(nullptr);
    DecodeState(carver, n, v_head_dim);
    return carver.used();
  }
};

/// Scratch of one work item; D says how q·k is multiplied.
template <class D>
struct DecodeScratch {
  using T = typename D::Scalar;
  PackedQueries<D> q;
  T* scores;   // [n, decode_chunk], then weights; -inf: the value is not read
  T* seen;     // [decode_chunk] 1: every query of the group sees this column
  T* scale_k;  // [decode_chunk]: int8, of the rows
  T* scale_v;  // [decode_chunk]
  DecodeState<T> state;

  DecodeScratch(detail::Carver& carver, Index n, Index head_dim, Index v_head_dim)
      : q(carver, n, head_dim),
        scores(carver.take<T>(n * decode_chunk)),
        seen(carver.take<T>(decode_chunk)),
        scale_k(carver.take<T>(decode_chunk)),
        scale_v(carver.take<T>(decode_chunk)),
        state(carver, n, v_head_dim) {}
};

template <class D>
std::size_t decode_scratch_bytes(Index n, Index head_dim, Index v_head_dim) {
  detail::Carver carver(nullptr);
  DecodeScratch<D>(carver, n, head_dim, v_head_dim);
  return carver.used();
}

/// Whether the rows are worth waking other threads for: about twenty microseconds of reading.
template <class T, StorageType S, class M, class F>
bool decode_in_parallel(const Task<T, S, M, F>& task) {
  const Index numbers = task.heads.kv_heads * (task.head_dim() + task.v_head_dim());
  return task.keys.rows * numbers * static_cast<Index>(sizeof(S)) >= Index{1} << 20;
}

/// One kv head of a task, for all its query heads and all (few) queries: n = n_queries · group_size rows of q.
template <class D, class T, StorageType S, class M, class F>
class Decode {
  using V = Simd<T>;
  using Vec = typename V::Vec;
  static constexpr Index W = V::width;

 public:
  Decode(const Task<T, S, M, F>& task, Index kv_head, std::byte* scratch)
      : task_(task),
        kv_head_(kv_head),
        n_(task.n_queries() * task.heads.group_size()),
        carver_(scratch),
        s_(carver_, n_, task.head_dim(), task.v_head_dim()),
        state_(s_.state) {
    for (Index i = 0; i < n_; ++i) s_.q.pack(i, task_.query(query(i), head(i)), task_.head_dim(), task_.scale);
  }

  /// All keys, split by split, merged into `into`.
  void run(const StateView<T>& into) {
    for_each_split(task_.keys, [&](const Split& split) {
      run_split(split, s_.state);
      merge(task_, kv_head_, s_.state, into);
    });
  }

  /// The keys of one split; leaves their state in `state`.
  void run_split(const Split& split, const DecodeState<T>& state) {
    state_ = state;
    std::fill_n(state.m, n_, detail::minus_infinity<T>);
    std::fill_n(state.l, n_, T(0));
    std::fill_n(state.o, n_ * whole_registers<T>(task_.v_head_dim()), T(0));
    for_each_chunk(task_.keys, decode_chunk, split.run, split.base, split.row, split.first + decode_split,
                   [&](Index first, std::size_t r, Index base, Index row) {
                     if (score_chunk(first, r, base, row)) weigh_chunk(first, r, base, row);
                   });
  }

  /// Adds the keys of one split to what is in `into`. Splits are merged in ascending order.
  static void merge(const Task<T, S, M, F>& task, Index kv_head, const DecodeState<T>& state,
                    const StateView<T>& into) {
    const Index dv = task.v_head_dim(), width = whole_registers<T>(dv), group = task.heads.group_size();
    for (Index i = 0; i < task.n_queries() * group; ++i) {
      if (state.m[i] == detail::minus_infinity<T>) continue;
      const Index query = i / group, head = kv_head * group + i % group;
      T& m = into.m(query, head);
      T& l = into.l(query, head);
      T* const o = into.o(query, head, dv);
      const T top = detail::nan_max(m, state.m[i]);
      const T mine = detail::weight_of(m, top), theirs = detail::weight_of(state.m[i], top);
      m = top;
      l = V::sum_lanes(V::fma(first_lane(theirs), first_lane(state.l[i]), V::mul(first_lane(mine), first_lane(l))));
      for (Index x = 0; x < dv; x += W) {
        const Index some = std::min(W, dv - x);
        const Vec sum = V::mul(V::broadcast(mine), V::load_n(o + x, some));
        V::store_n(o + x, V::fma(V::broadcast(theirs), V::load(state.o + i * width + x), sum), some);
      }
    }
  }

 private:
  /// Rows row … row + count - 1 of a run, at columns column … of the chunk; the run's first row is logical row base.
  struct Piece {
    const KeyRun<S>* run;
    Index base, row, count, column;
  };
  template <class Do>
  void for_each_piece_of(Index first, std::size_t r, Index base, Index row, const Do& f) const {
    for_each_piece(task_.keys, decode_chunk, first, r, base, row,
                   [&](const KeyRun<S>& run, Index run_base, Index run_row, Index count, Index column) {
                     f(Piece{&run, run_base, run_row, count, column});
                   });
  }

  Index query(Index i) const { return i / task_.heads.group_size(); }
  Index head(Index i) const { return kv_head_ * task_.heads.group_size() + i % task_.heads.group_size(); }

  /// Scores of the chunk; -inf where a query does not see a key. False: nobody sees anything.
  bool score_chunk(Index first, std::size_t r, Index base, Index row) {
    std::fill_n(s_.scores, n_ * decode_chunk, detail::minus_infinity<T>);
    Index scored = 0;
    for_each_piece_of(first, r, base, row, [&](const Piece& piece) {
      Cover least = Cover::all, most = Cover::none;
      for (Index h = head(0); h < head(0) + task_.heads.group_size(); ++h) {
        const Cover c = detail::cover(
            *task_.mask, task_.block(h, 0, task_.n_queries(), *piece.run, piece.base, piece.row, piece.count));
        least = std::min(least, c), most = std::max(most, c);
      }
      if (most == Cover::none) return;
      scored += piece.count;
      const Rows<S> keys{task_.keys.key(*piece.run, kv_head_, piece.row), task_.keys.key_row_stride, piece.count,
                         task_.head_dim()};
      const Index block = block_rows(keys.width);
      for (Index k = 0; k < piece.count; k += block) {
        const Index some = std::min(block, piece.count - k);
        dot_rows<D>(keys.from(k, some), s_.q, next_rows<false>(piece.run, piece.row + k, some),
                    s_.scores + piece.column + k, decode_chunk);
      }
      if (has_row_scale<S> || !std::is_same_v<F, Plain> || least != Cover::all)
        finish_scores(piece, least != Cover::all);
    });
    complete_ = scored == decode_chunk;
    return scored > 0;
  }

  /// What is left to do to q·k: the scales of the rows, the score function, the mask.
  void finish_scores(const Piece& piece, bool mixed) {
    T* const scale_k = s_.scale_k + piece.column;
    if constexpr (has_row_scale<S>) {
      const Index stride = task_.keys.scale_row_stride, at = task_.keys.scale_at(kv_head_, piece.row);
      const float *const k = piece.run->key_scales + at, *const v = piece.run->value_scales + at;
      if (stride == 1) {
        std::copy_n(k, piece.count, scale_k);
        std::copy_n(v, piece.count, s_.scale_v + piece.column);
      } else {
        for (Index j = 0; j < piece.count; ++j)
          scale_k[j] = static_cast<T>(k[j * stride]), s_.scale_v[piece.column + j] = static_cast<T>(v[j * stride]);
      }
    }
    for (Index i = 0; i < n_; ++i) {
      T* const s = s_.scores + i * decode_chunk + piece.column;
      if constexpr (has_row_scale<S>) {
        Index j = 0;
        for (; j + W <= piece.count; j += W) V::store(s + j, V::mul(V::load(s + j), V::load(scale_k + j)));
        for (; j < piece.count; ++j) s[j] *= scale_k[j];
      }
      if constexpr (!std::is_same_v<F, Plain>)
        for (Index j = 0; j < piece.count; ++j) s[j] = (*task_.score)(s[j], at(i, piece, j));
      if (mixed)
        for (Index j = 0; j < piece.count; ++j)
          if (!task_.mask->sees(at(i, piece, j))) s[j] = detail::minus_infinity<T>;
    }
  }
  At at(Index i, const Piece& piece, Index j) const {
    return task_.at(head(i), query(i), piece.base + piece.row + j, piece.run->position + piece.row + j);
  }

  /// Rows worked on at a time; they stay in the first-level cache for all queries, with those that come next.
  static Index block_rows(Index width) {
    return std::clamp<Index>(8192 / static_cast<Index>(sizeof(S)) / std::max<Index>(width, 1) / 16 * 16, 16, 64);
  }
  /// The rows after row + some - 1, be it in another run: as many, to be asked for meanwhile. Rows with gaps between
  /// them, as in plain matrices, are asked for here and now.
  template <bool Values>
  NextLines next_rows(const KeyRun<S>* run, Index row, Index some) const {
    const auto& keys = task_.keys;
    const Index width = Values ? task_.v_head_dim() : task_.head_dim();
    const Index stride = Values ? keys.value_row_stride : keys.key_row_stride;
    row += some;
    const KeyRun<S>* const end = keys.runs.data() + keys.runs.size();
    while (row >= run->rows) {
      row -= run->rows;
      if (++run == end) return {};
    }
    const S* const p = Values ? keys.value(*run, kv_head_, row) : keys.key(*run, kv_head_, row);
    some = std::min(some, run->rows - row);
    const auto at = reinterpret_cast<std::uintptr_t>(p);
    if (stride == width) return {at, at + static_cast<std::uintptr_t>(some * width) * sizeof(S)};
    for (Index r = 0; r < some; ++r)
      for (Index x = 0; x < width; x += 64 / static_cast<Index>(sizeof(S))) prefetch_near(p + r * stride + x);
    return {};
  }

  /// From scores to weights, and the values that they are for.
  void weigh_chunk(Index first, std::size_t r, Index base, Index row) {
    bool all_seen = complete_;
    for (Index i = 0; i < n_; ++i) all_seen = weigh(i, all_seen) && all_seen;
    if (!all_seen) find_seen();
    for_each_piece_of(first, r, base, row, [&](const Piece& piece) {
      const Rows<S> values{task_.keys.value(*piece.run, kv_head_, piece.row), task_.keys.value_row_stride, piece.count,
                           task_.v_head_dim()};
      const Index block = block_rows(values.width);
      for (Index k = 0, some = 0; k < piece.count; k += std::max<Index>(some, 1)) {
        const Index most = std::min(block, piece.count - k);
        some = all_seen ? most : 0;
        while (some < most && s_.seen[piece.column + k + some] != T(0)) ++some;
        if (some > 0)
          add_rows(values.from(k, some), s_.scores + piece.column + k, decode_chunk, n_,
                   next_rows<true>(piece.run, piece.row + k, some), state_.o);
        else
          add_seen(values.from(k, 1), piece.column + k);
      }
    });
  }

  /// The weights of one query, its sum and maximum. False where it does not see all of the chunk.
  bool weigh(Index i, bool complete) {
    const Vec hidden = V::broadcast(detail::minus_infinity<T>);
    T* const s = s_.scores + i * decode_chunk;
    Vec high[2] = {V::broadcast(state_.m[i]), V::broadcast(state_.m[i])}, low = V::load(s);
    for (Index j = 0; j < decode_chunk; j += 2 * W) {
      const Vec a = V::load(s + j), b = V::load(s + j + W);
      high[0] = V::max(high[0], a), high[1] = V::max(high[1], b);
      low = V::min(low, V::min(a, b));
    }
    // A NaN may be lost here: its own weight is NaN all the same, and a query with one NaN is NaN.
    T top = V::max_lanes(V::max(high[0], high[1]));
    if (!(top > detail::minus_infinity<T>))
      for (Index j = 0; j < decode_chunk; ++j) top = detail::nan_max(top, s[j]);
    if (top == detail::minus_infinity<T>) return false;
    const bool all = complete && !V::any(V::less_equal(low, hidden));
    const T keep = detail::weight_of(state_.m[i], top);
    const Vec to_log2 = V::broadcast(static_cast<T>(std::numbers::log2e_v<long double>)), base = V::broadcast(top);
    Vec sum[2] = {V::zero(), V::zero()};
    for (Index j = 0; j < decode_chunk; j += 2 * W)
      for (Index u = 0; u < 2; ++u) {
        const Vec score = V::load(s + j + u * W);
        Vec p = V::weight(V::sub(score, base), to_log2);
        sum[u] = V::add(sum[u], p);
        if constexpr (has_row_scale<S>) p = V::mul(p, V::load(s_.scale_v + j + u * W));
        V::store(s + j + u * W, all ? p : V::select(V::less_equal(score, hidden), hidden, p));
      }
    state_.m[i] = top;
    const T added = V::sum_lanes(V::add(sum[0], sum[1]));
    state_.l[i] = V::sum_lanes(V::fma(first_lane(keep), first_lane(state_.l[i]), first_lane(added)));
    if (keep == T(1)) return all;
    T* const o = state_.o + i * whole_registers<T>(task_.v_head_dim());
    for (Index x = 0; x < task_.v_head_dim(); x += W) V::store(o + x, V::mul(V::broadcast(keep), V::load(o + x)));
    return all;
  }
  // What must round the same wherever it is compiled is done in registers.
  static Vec first_lane(T x) { return V::load_n(&x, 1); }

  /// 1 for the columns that all queries see, 0 for the others.
  void find_seen() {
    std::fill_n(s_.seen, decode_chunk, T(1));
    for (Index i = 0; i < n_; ++i)
      for (Index j = 0; j < decode_chunk; j += W) {
        const auto mask =
            V::less_equal(V::load(s_.scores + i * decode_chunk + j), V::broadcast(detail::minus_infinity<T>));
        V::store(s_.seen + j, V::select(mask, V::zero(), V::load(s_.seen + j)));
      }
  }

  /// One row that some of the queries see; nobody, and it is not read.
  void add_seen(const Rows<S>& value, Index column) {
    const Index width = whole_registers<T>(value.width);
    for (Index i = 0; i < n_; ++i) {
      const T* const p = s_.scores + i * decode_chunk + column;
      if (*p != detail::minus_infinity<T>) add_rows(value, p, decode_chunk, 1, {}, state_.o + i * width);
    }
  }

  const Task<T, S, M, F>& task_;
  Index kv_head_, n_;
  detail::Carver carver_;
  DecodeScratch<D> s_;
  DecodeState<T> state_;
  bool complete_ = false;  // every column of the chunk has a key
};

}  // namespace qkv::inline QKV_ABI::kernel

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif

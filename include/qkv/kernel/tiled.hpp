// kernel/tiled.hpp — many queries against many keys: blocks of both, with the running softmax state in between.
//
//                 keys, on a fixed grid of positions             for each block of queries, for each chunk of keys:
//               ┌──────┬──────┬──────┬──────┐                      cover = none?  skip it
//     queries   │ all  │ all  │ some │ none │                      S = scale · Q Kᵀ;  score;  mask only where `some`
//               └──────┴──────┴──────┴──────┘                      m, l, o ← merge with (max S, Σ e^S, e^S V)
//
// Nothing of size n_queries · n_keys is ever stored. Every element of S and o is one multiply-add chain in ascending
// order of features and keys, whatever block its query sits in: a prompt fed in pieces gives the same bits as at once.
// Dao et al. 2022, arXiv:2205.14135.
//
// Before: kernel/reference.hpp   Next: kernel/decode.hpp
#pragma once

#include <algorithm>
#include <cmath>

#include "../softmax.hpp"
#include "../workspace.hpp"
#include "task.hpp"

namespace qkv::inline QKV_ABI::kernel {

inline constexpr Index tile_queries = 64;
inline constexpr Index tile_keys = 128;

/// c[rows, cols] += a[rows, depth] · b[depth, cols]; each element of c is one chain over ascending depth.
template <class T>
void chain_product(const T* a, Index a_stride, const T* b, Index b_stride, T* c, Index c_stride, Index rows,
                   Index depth, Index cols) {
  constexpr Index width = 16;
  for (Index col = 0; col < cols; col += width) {
    const Index w = std::min(width, cols - col);
    for (Index row = 0; row < rows; ++row) {
      T acc[width] = {};
      for (Index i = 0; i < w; ++i) acc[i] = c[row * c_stride + col + i];
      for (Index k = 0; k < depth; ++k) {
        const T x = a[row * a_stride + k];
        const T* y = b + k * b_stride + col;  // b has room up to the next multiple of `width`
        for (Index i = 0; i < width; ++i) acc[i] += x * y[i];
      }
      for (Index i = 0; i < w; ++i) c[row * c_stride + col + i] = acc[i];
    }
  }
}

/// Scratch of one work item.
template <class T>
struct TiledScratch {
  T *keys, *values, *scores,
      *row;       // [head_dim, tile_keys], [tile_keys, v_width], [tile_queries, tile_keys], [head_dim]
  Index* key_of;  // [tile_keys]: logical row of a column, -1: not in play
  bool* mixed;    // [tile_keys]: the mask must be asked

  static constexpr Index v_width(Index v_head_dim) { return (v_head_dim + 15) / 16 * 16; }

  TiledScratch(detail::Carver& carver, Index head_dim, Index v_head_dim)
      : keys(carver.take<T>(head_dim * tile_keys)),
        values(carver.take<T>(tile_keys * v_width(v_head_dim))),
        scores(carver.take<T>(tile_queries * tile_keys)),
        row(carver.take<T>(head_dim)),
        key_of(carver.take<Index>(tile_keys)),
        mixed(carver.take<bool>(tile_keys)) {}

  static std::size_t bytes(Index head_dim, Index v_head_dim) {
    detail::Carver carver(nullptr);
    TiledScratch(carver, head_dim, v_head_dim);
    return carver.used();
  }
};

/// Work items of a task: (kv_head, block of queries).
inline Index tiled_items(Index n_queries, Index kv_heads) {
  return kv_heads * ((n_queries + tile_queries - 1) / tile_queries);
}

template <class T, StorageType S, class M, class F>
class Tiled {
 public:
  Tiled(const Task<T, S, M, F>& task, const StateView<T>& state, Index item, std::byte* scratch)
      : task_(task),
        state_(state),
        carver_(scratch),
        s_(carver_, task.head_dim(), task.v_head_dim()),
        kv_head_(item % task.heads.kv_heads),
        query_(item / task.heads.kv_heads * tile_queries),
        n_queries_(std::min(tile_queries, task.n_queries() - query_)) {}

  /// Merges all keys of the task into the state of this item's queries and heads.
  void run() {
    const Index group = task_.heads.group_size(), first_head = kv_head_ * group;
    for_each_chunk(task_.keys, tile_keys, [&](Index first, std::size_t r, Index base, Index row) {
      bool loaded = false;
      for (Index h = first_head; h < first_head + group; ++h) {
        if (!cover(h, first, r, base, row)) continue;
        if (!loaded) load(first, r, base, row);
        loaded = true;
        attend(h, first);
      }
    });
  }

 private:
  /// Marks the columns that head h may see. False: none at all.
  bool cover(Index h, Index first, std::size_t r, Index base, Index row) {
    bool any = false;
    std::fill_n(s_.key_of, tile_keys, Index(-1));
    for_each_piece(task_.keys, tile_keys, first, r, base, row,
                   [&](const KeyRun<S>& run, Index run_base, Index run_row, Index count, Index column) {
                     const Cover c =
                         detail::cover(*task_.mask, task_.block(h, query_, n_queries_, run, run_base, run_row, count));
                     if (c == Cover::none) return;
                     any = true;
                     for (Index i = 0; i < count; ++i) {
                       s_.key_of[column + i] = run_base + run_row + i;
                       s_.mixed[column + i] = c == Cover::some;
                     }
                   });
    return any;
  }

  /// Keys to [head_dim, tile_keys], values to [tile_keys, v_width], as T. Columns that hold no row are zero.
  void load(Index first, std::size_t r, Index base, Index row) {
    const Index d = task_.head_dim(), dv = task_.v_head_dim(), width = TiledScratch<T>::v_width(dv);
    std::fill_n(s_.keys, d * tile_keys, T(0));
    std::fill_n(s_.values, tile_keys * width, T(0));
    finite_ = true;
    for_each_piece(task_.keys, tile_keys, first, r, base, row,
                   [&](const KeyRun<S>& run, Index, Index run_row, Index count, Index column) {
                     for (Index i = 0; i < count; ++i) {
                       const Index at = run_row + i;
                       load_row(task_.keys.key(run, kv_head_, at), d, task_.keys.key_scale(run, kv_head_, at), s_.row);
                       for (Index x = 0; x < d; ++x) s_.keys[x * tile_keys + column + i] = s_.row[x];
                       T* v = s_.values + (column + i) * width;
                       load_row(task_.keys.value(run, kv_head_, at), dv, task_.keys.value_scale(run, kv_head_, at), v);
                       T zero = 0;  // 0·v is 0 for finite v and NaN otherwise
                       for (Index x = 0; x < dv; ++x) zero += 0 * v[x];
                       finite_ = finite_ && zero == 0;
                     }
                   });
  }

  /// Merges the loaded chunk into the state of head h.
  void attend(Index h, Index first) {
    using std::exp;
    const Index d = task_.head_dim(), dv = task_.v_head_dim(), width = TiledScratch<T>::v_width(dv);
    std::fill_n(s_.scores, n_queries_ * tile_keys, T(0));
    chain_product(task_.query(query_, h), task_.q.outerStride(), s_.keys, tile_keys, s_.scores, tile_keys, n_queries_,
                  d, tile_keys);
    for (Index i = 0; i < n_queries_; ++i) {
      T* s = s_.scores + i * tile_keys;
      T top = detail::minus_infinity<T>;
      for (Index j = 0; j < tile_keys; ++j) {
        const At at = task_.at(h, query_ + i, s_.key_of[j], first + j);
        if (s_.key_of[j] < 0 || (s_.mixed[j] && !task_.mask->sees(at)))
          s[j] = detail::minus_infinity<T>;
        else
          top = detail::nan_max(top, s[j] = (*task_.score)(task_.scale * s[j], at));
      }
      if (top == detail::minus_infinity<T>) continue;
      T& m = state_.m(query_ + i, h);
      T& l = state_.l(query_ + i, h);
      T* o = state_.o(query_ + i, h, dv);
      top = detail::nan_max(m, top);
      const T keep = detail::weight_of(m, top);
      m = top;
      l *= keep;
      if (keep != T(1))
        for (Index x = 0; x < dv; ++x) o[x] *= keep;
      for (Index j = 0; j < tile_keys; ++j) {
        const bool hidden = s[j] == detail::minus_infinity<T>;
        s[j] = hidden ? T(0) : exp(s[j] - top);
        l += s[j];
        if (hidden && !finite_) s[j] = T(-1);  // a value that is NaN or infinite must not meet a weight of zero
      }
      if (finite_) {
        chain_product(s, tile_keys, s_.values, width, o, 0, 1, tile_keys, dv);
      } else {
        for (Index j = 0; j < tile_keys; ++j)
          if (s[j] != T(-1)) chain_product(s + j, tile_keys, s_.values + j * width, width, o, 0, 1, 1, dv);
      }
    }
  }

  const Task<T, S, M, F>& task_;
  const StateView<T>& state_;
  detail::Carver carver_;
  TiledScratch<T> s_;
  Index kv_head_, query_, n_queries_;
  bool finite_ = true;
};

}  // namespace qkv::inline QKV_ABI::kernel

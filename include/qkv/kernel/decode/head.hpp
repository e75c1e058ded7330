// kernel/decode/head.hpp — one kv head of a decode call, a chunk of keys at a time: first the scores of all its queries, then
// the values.
//
//     s = score(scale · K q),  m' = max(m, max s),  o ← e^(m-m') o + Σ e^(s-m') v,  l ← e^(m-m') l + Σ e^(s-m')
//
// The two halves are separate so that whoever calls may let many heads have the first one before the second: rows are then
// read in the order in which they lie (kernel/decode/decode.hpp).
//
// Before: kernel/decode/decode.hpp   Next: kernel/decode/chunk_softmax.hpp
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "../task.hpp"
#include "chunk_softmax.hpp"
#include "int8_values.hpp"
#include "state.hpp"
#include "values.hpp"

#include "../../base/warnings_off.hpp"

namespace qkv { inline namespace QKV_ABI { namespace kernel {

/// Scratch of one kv head; D says how q·k is multiplied.
template <class D>
struct DecodeScratch {
  using T = typename D::Scalar;
  PackedQueries<D> q;
  ChunkWeights<D> chunk;
  std::int32_t*
      sums;  // [n, row(v_head_dim)] of the chunk, where values are multiplied in integers (kernel/decode/int8_values.hpp)
  DecodeState<T> state;

  DecodeScratch(detail::Carver& carver, Index n, Index head_dim, Index v_head_dim)
      : q(carver, n, head_dim),
        chunk(carver, n),
        sums(carver.take<std::int32_t>(n * ValueSums<D>::row(v_head_dim))),
        state(carver, n, v_head_dim) {}
};

template <class D>
std::size_t decode_scratch_bytes(Index n, Index head_dim, Index v_head_dim) {
  detail::Carver carver(nullptr);
  DecodeScratch<D>(carver, n, head_dim, v_head_dim);
  return carver.used();
}

/// One kv head of a task, for all its query heads and all (few) queries: n = n_queries · group_size rows of q.
template <class D, class T, StorageType S>
class DecodeHead {
  using V = Simd<T>;
  using Vec = typename V::Vec;
  static constexpr Index W = V::width;
  using Sums = ValueSums<D>;

 public:
  DecodeHead(const Task<T, S>& task, Index kv_head, std::byte* scratch)
      : task_(task),
        kv_head_(kv_head),
        n_(task.n_queries() * task.heads.group_size()),
        carver_(scratch),
        s_(carver_, n_, task.head_dim, task.v_head_dim),
        state_(s_.state) {
    for (Index i = 0; i < n_; ++i) s_.q.pack(i, task_.query(query(i), head(i)), task_.head_dim, task_.scale);
  }

  Index kv_head() const { return kv_head_; }
  const DecodeState<T>& own_state() const { return s_.state; }

  /// What follows is added to the state of no keys, in `state`.
  void begin(const DecodeState<T>& state) {
    state_ = state;
    std::fill_n(state.m, n_, detail::minus_infinity<T>);
    std::fill_n(state.l, n_, T(0));
    std::fill_n(state.o, n_ * whole_registers<T>(task_.v_head_dim), T(0));
  }

  /// A chunk begins: its pieces are scored, then it is weighed, then the values of its pieces are added.
  void begin_chunk() { s_.chunk.begin(); }

  /// Scores of a piece; -inf where a query does not see a key. Rows `then` will be read next.
  void score(const GridPiece& piece, const Rows<S>& then) {
    const PairTile pairs = task_.tile(head(0), task_.heads.group_size(), 0, n_, piece, 0, piece.count);
    const Cover cover = task_.rule.cover(pairs);
    if (cover == Cover::none) return;
    s_.chunk.begin_scores(piece.column, piece.count);
    if constexpr (has_row_scale<S>) fetch_scales(piece);
    const Rows<S> keys = rows<false>(piece.run, piece.row, piece.count);
    for (Index k = 0, block = block_rows(keys.width); k < piece.count; k += block)
      dot_rows<D>(keys.from(k, std::min(block, piece.count - k)), s_.q, fetch(keys, k + block, then),
                  s_.chunk.scores(0, piece.column + k), decode_chunk);
    if (has_row_scale<S> || !task_.rule.plain || cover != Cover::all) finish_scores(piece, pairs, cover);
  }

  /// From the scores of a chunk to weights.
  void weigh() {
    if (s_.chunk.empty()) return;
    s_.chunk.weigh(state_, task_.v_head_dim);
    if constexpr (Sums::integers) std::fill_n(s_.sums, n_ * Sums::row(task_.v_head_dim), 0);
  }

  /// The values of a piece. Rows `then` will be read next.
  void add_values(const GridPiece& piece, const Rows<S>& then) {
    if (s_.chunk.empty()) return;
    const Rows<S> values = rows<true>(piece.run, piece.row, piece.count);
    const Index block = block_rows(values.width);
    for (Index k = 0, some = 0; k < piece.count; k += std::max<Index>(some, 1)) {
      const Index most = std::min(block, piece.count - k), column = piece.column + k;
      some = s_.chunk.all_seen() ? most : 0;
      while (some < most && s_.chunk.seen(column + some)) ++some;
      if constexpr (Sums::integers) {
        if (some > 0)
          Sums::add(values.from(k, some), s_.chunk.steps(column), decode_chunk, n_, fetch(values, k + some, then),
                    s_.sums);
      } else if (some > 0)
        add_rows(values.from(k, some), s_.chunk.scores(0, column), decode_chunk, n_, fetch(values, k + some, then),
                 state_.o);
      else
        add_seen(values.from(k, 1), column);
    }
  }

  /// A chunk ends: all its values have been added.
  void end_chunk() {
    if constexpr (Sums::integers) {
      if (s_.chunk.empty()) return;
      const Index dv = task_.v_head_dim;
      for (Index i = 0; i < n_; ++i)
        if (const T largest = s_.chunk.largest(i); largest != T(0))
          Sums::finish(s_.sums + i * Sums::row(dv), largest, dv, state_.o + i * whole_registers<T>(dv));
    }
  }

  /// Keys or values of this head.
  template <bool Values>
  Rows<S> rows(std::size_t r, Index row, Index count) const {
    const auto& keys = task_.keys;
    const KeyRun<S>& run = keys.runs[r];
    if constexpr (Values) return {keys.value(run, kv_head_, row), keys.value_row_stride, count, task_.v_head_dim};
    return {keys.key(run, kv_head_, row), keys.key_row_stride, count, task_.head_dim};
  }

 private:
  Index query(Index i) const { return i / task_.heads.group_size(); }
  Index head(Index i) const { return kv_head_ * task_.heads.group_size() + i % task_.heads.group_size(); }

  /// What is left to do to q·k: the scales of the rows, the score function, the mask. Scales are multiplied with here only
  /// where something else follows.
  void finish_scores(const GridPiece& piece, const PairTile& pairs, Cover cover) {
    const bool all = cover != Cover::all || !task_.rule.plain;
    if constexpr (has_row_scale<S>) {
      T* const scale_k = s_.chunk.key_scales(piece.column);
      T* const scale_v = s_.chunk.value_scales(piece.column);
      const Index stride = task_.keys.scale_row_stride, at = task_.keys.scale_at(kv_head_, piece.row);
      const KeyRun<S>& run = task_.keys.runs[piece.run];
      const float *const k = run.key_scales + at, *const v = run.value_scales + at;
      constexpr auto room = static_cast<T>(headroom<S>);
      Index j = 0;
      if (stride == 1)
        for (; j + W <= piece.count; j += W) {
          V::store(scale_k + j, V::mul(V::load(k + j), V::broadcast(room)));
          V::store(scale_v + j, V::load(v + j));
        }
      for (; j < piece.count; ++j)
        scale_k[j] = static_cast<T>(k[j * stride]) * room, scale_v[j] = static_cast<T>(v[j * stride]);
      if (all) {
        for (Index i = 0; i < n_; ++i) {
          T* const s = s_.chunk.scores(i, piece.column);
          for (j = 0; j < piece.count; ++j) s[j] *= scale_k[j];
        }
        std::fill_n(scale_k, piece.count, T(1));
      }
    }
    task_.rule.template finish<Inner::keys>(pairs, cover, s_.chunk.scores(0, piece.column), decode_chunk);
  }
  /// Asked for before the rows are multiplied: in pages scales are too short for the processor to foresee them.
  void fetch_scales(const GridPiece& piece) const {
    const KeyRun<S>& run = task_.keys.runs[piece.run];
    const Index stride = task_.keys.scale_row_stride, at = task_.keys.scale_at(kv_head_, piece.row);
    for (Index j = 0; j < piece.count; j += 16) {
      prefetch_near(run.key_scales + at + j * stride);
      prefetch_near(run.value_scales + at + j * stride);
    }
  }

  /// Rows worked on at a time; they stay in the first-level cache for all queries, with those that come next.
  /// One query of 32 KB caches (Zen 3) is served better by 4 KB: bf16 .89 instead of .83 of the bandwidth, 4 queries worse.
  Index block_rows(Index width) const {
    const Index bytes = few_registers && n_ == 1 ? 4096 : 8192;
    return std::clamp<Index>(bytes / static_cast<Index>(sizeof(S)) / std::max<Index>(width, 1) / 16 * 16, 16, 64);
  }
  /// Zen 3 has too few first-level misses under way to reach the bandwidth: where wide rows come from memory, the second
  /// level is asked for them earlier (.78 of the bandwidth for .67), and does not keep them. In caches that costs 12 %. 12 KB
  /// are one and a half blocks: 9, 11, 14, 16 and 20 KB reach .70 to .76.
  std::uintptr_t further() const {
    constexpr Index from_memory = Index{32} << 20;
    const Index numbers = task_.keys.rows * task_.heads.kv_heads * (task_.head_dim + task_.v_head_dim);
    return wide<S> && numbers >= from_memory / static_cast<Index>(sizeof(S)) ? 12288 : 0;
  }
  /// What is read after the first `done` rows: the next block of them, or of `then`. Lines are asked for while other rows
  /// are worked on; rows with gaps between them, as in plain matrices, here and now.
  NextLines fetch(Rows<S> rows, Index done, const Rows<S>& then) const {
    const Rows<S> all = rows;
    rows = done < rows.count ? rows.from(done, rows.count - done) : then;
    rows.count = std::min(rows.count, block_rows(rows.width));
    const auto at = reinterpret_cast<std::uintptr_t>(rows.first);
    NextLines next = NextLines::none(all.first);
    if (rows.first == nullptr) return next;
    if (rows.stride == rows.width) {
      next.at = at, next.end = at + static_cast<std::uintptr_t>(rows.count * rows.width) * sizeof(S);
      if constexpr (few_registers) next.further = further();
      if (few_registers && done < all.count && then.first != nullptr)
        next.goes_on(reinterpret_cast<std::uintptr_t>(all.first + all.count * all.width),
                     reinterpret_cast<std::uintptr_t>(then.first));
      return next;
    }
    for (Index r = 0; r < rows.count; ++r)
      for (Index x = 0; x < rows.width; x += 64 / static_cast<Index>(sizeof(S))) prefetch_near(rows.row(r) + x);
    return next;
  }

  /// One row that some of the queries see; nobody, and it is not read.
  void add_seen(const Rows<S>& value, Index column) {
    const Index width = whole_registers<T>(value.width);
    for (Index i = 0; i < n_; ++i) {
      const T* const p = s_.chunk.scores(i, column);
      if (*p != detail::minus_infinity<T>)
        add_rows(value, p, decode_chunk, 1, NextLines::none(value.first), state_.o + i * width);
    }
  }
  const Task<T, S>& task_;
  Index kv_head_, n_;
  detail::Carver carver_;
  DecodeScratch<D> s_;
  DecodeState<T> state_;
};

}}}  // namespace qkv::QKV_ABI::kernel

#include "../../base/warnings_on.hpp"

// kernel/decode/head.hpp — one kv head of a decode call, a chunk of keys at a time: scores of all its queries, then values.
//
//     s = score(scale · K q),  m' = max(m, max s),  o ← e^(m-m') o + Σ e^(s-m') v,  l ← e^(m-m') l + Σ e^(s-m')
//
// Scores and values are separate calls, so that kernel/decode/decode.hpp can score all heads of a chunk before it reads values:
// rows are then read in the order in which they lie in memory.
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

/// One kv head of a task, for all its query heads and all (few) queries: n = n_queries · group_size rows of q. Called for
/// each chunk of keys: begin_chunk, score for each piece, weigh, add_values for each piece, end_chunk.
template <class T>
class DecodeHead {
 public:
  Index kv_head() const { return kv_head_; }
  /// Memory for the state of a split.
  const DecodeState<T>& own_state() const { return own_state_; }

  /// Starts from the state of no keys, in `state`.
  void begin(const DecodeState<T>& state) {
    state_ = state;
    std::fill_n(state.m, n_, detail::minus_infinity<T>);
    std::fill_n(state.l, n_, T(0));
    std::fill_n(state.o, n_ * whole_registers<T>(v_head_dim_), T(0));
  }
  virtual void begin_chunk() = 0;
  /// Scores of a piece; -inf where a query does not see a key. Rows `then` will be read next.
  virtual void score(const GridPiece& piece, const RowBytes& then) = 0;
  /// Scores of a chunk become weights.
  virtual void weigh() = 0;
  /// The values of a piece. Rows `then` will be read next.
  virtual void add_values(const GridPiece& piece, const RowBytes& then) = 0;
  virtual void end_chunk() = 0;

 protected:
  DecodeHead(const QueryTask<T>& task, Index kv_head, detail::Carver& carver)
      : kv_head_(kv_head),
        n_(task.n_queries() * task.heads.group_size()),
        v_head_dim_(task.v_head_dim),
        own_state_(carver, n_, task.v_head_dim),
        state_(own_state_) {}
  DecodeHead(const DecodeHead&) = default;
  DecodeHead& operator=(const DecodeHead&) = default;
  ~DecodeHead() = default;  // heads lie in scratch memory

  Index kv_head_, n_, v_head_dim_;
  DecodeState<T> own_state_, state_;
};

/// The heads of a task, whatever storage its keys have.
template <class T>
struct DecodeSource {
  ByteRows rows;
  const void* task = nullptr;  // Task<T, S>
  std::size_t head_bytes = 0;  // of one head and its scratch
  DecodeHead<T>* (*make)(const void* task, Index kv_head, std::byte* memory) = nullptr;
};

/// The rows read after the first `done` of these: the next block of them, or of `then`. Their lines are prefetched
/// while the current rows are multiplied; of rows with gaps, as in plain matrices, at once. `distance`: see
/// FarPrefetch.
EIGEN_DONT_INLINE inline NextLines next_lines(const RowBytes& all, Index done, const RowBytes& then, Index block_rows,
                                              std::uintptr_t distance) {
  RowBytes rows = done < all.count ? all.from(done, all.count - done) : then;
  rows.count = std::min(rows.count, block_rows);
  const auto at = reinterpret_cast<std::uintptr_t>(rows.first);
  NextLines next = NextLines::none(all.first);
  if (rows.first == nullptr) return next;
  if (rows.stride == rows.width) {
    next.at = at, next.end = at + static_cast<std::uintptr_t>(rows.count * rows.width);
    next.set_distance(distance);
    if (done < all.count && then.first != nullptr)
      next.continue_at(reinterpret_cast<std::uintptr_t>(all.end()), reinterpret_cast<std::uintptr_t>(then.first));
    return next;
  }
  for (Index r = 0; r < rows.count; ++r)
    for (Index x = 0; x < rows.width; x += 64) prefetch_near(rows.first + r * rows.stride + x);
  return next;
}

/// A head whose keys are multiplied by D (kernel/decode/dots.hpp).
template <class D>
class DecodeHeadOf final : public DecodeHead<typename D::Scalar> {
  using T = typename D::Scalar;
  using S = typename D::Key;
  using V = Simd<T>;
  using Vec = typename V::Vec;
  static constexpr Index W = V::width;
  using Sums = ValueSums<D>;
  using Base = DecodeHead<T>;
  using Base::kv_head_, Base::n_, Base::state_;

 public:
  DecodeHeadOf(const Task<T, S>& task, Index kv_head, detail::Carver& carver)
      : Base(task, kv_head, carver),
        task_(task),
        q_(carver, n_, task.head_dim),
        chunk_(carver, n_),
        sums_(carver.take<std::int32_t>(n_ * Sums::row(task.v_head_dim))) {
    for (Index i = 0; i < n_; ++i) q_.pack(i, task_.query(query(i), head(i)), task_.head_dim, task_.scale);
  }
  /// Bytes of a head of n rows of q and of its scratch.
  static std::size_t bytes(Index n, Index head_dim, Index v_head_dim) {
    detail::Carver carver(nullptr);
    carver.take<DecodeHeadOf>(1);
    DecodeState<T>(carver, n, v_head_dim);
    PackedQueries<D>(carver, n, head_dim);
    ChunkWeights<D>(carver, n);
    carver.take<std::int32_t>(n * Sums::row(v_head_dim));
    return carver.used();
  }

  void begin_chunk() override { chunk_.begin(); }

  void score(const GridPiece& piece, const RowBytes& then) override {
    const PairTile pairs = task_.tile(head(0), task_.heads.group_size(), 0, n_, piece, 0, piece.count);
    const Cover cover = task_.rule.cover(pairs);
    if (cover == Cover::none) return;
    chunk_.begin_scores(piece.column, piece.count);
    if constexpr (has_row_scale<S>) fetch_scales(piece);
    const Rows<S> keys{task_.keys.key(task_.keys.runs[piece.run], kv_head_, piece.row), task_.keys.key_row_stride,
                       piece.count, task_.head_dim};
    for (Index k = 0, block = block_rows(keys.width); k < piece.count; k += block)
      dot_rows<D>(keys.from(k, std::min(block, piece.count - k)), q_,
                  next_lines(bytes_of(keys), k + block, then, block, prefetch_distance()),
                  chunk_.scores(0, piece.column + k), decode_chunk);
    if (has_row_scale<S> || !task_.rule.plain || cover != Cover::all) finish_scores(piece, pairs, cover);
  }

  void weigh() override {
    if (chunk_.empty()) return;
    chunk_.weigh(state_, task_.v_head_dim);
    if constexpr (Sums::integers) std::fill_n(sums_, n_ * Sums::row(task_.v_head_dim), 0);
  }

  void add_values(const GridPiece& piece, const RowBytes& then) override {
    if (chunk_.empty()) return;
    const Rows<S> values{task_.keys.value(task_.keys.runs[piece.run], kv_head_, piece.row), task_.keys.value_row_stride,
                         piece.count, task_.v_head_dim};
    const Index block = block_rows(values.width);
    const auto next = [&](Index done) { return next_lines(bytes_of(values), done, then, block, prefetch_distance()); };
    for (Index k = 0, some = 0; k < piece.count; k += std::max<Index>(some, 1)) {
      const Index most = std::min(block, piece.count - k), column = piece.column + k;
      some = chunk_.all_seen() ? most : 0;
      while (some < most && chunk_.seen(column + some)) ++some;
      if constexpr (Sums::integers) {
        if (some > 0) Sums::add(values.from(k, some), chunk_.steps(column), decode_chunk, n_, next(k + some), sums_);
      } else if (some > 0)
        add_rows(values.from(k, some), chunk_.scores(0, column), decode_chunk, n_, next(k + some), state_.o);
      else
        add_seen(values.from(k, 1), column);
    }
  }

  void end_chunk() override {
    if constexpr (Sums::integers) {
      if (chunk_.empty()) return;
      const Index dv = task_.v_head_dim;
      for (Index i = 0; i < n_; ++i)
        if (const T largest = chunk_.largest(i); largest != T(0))
          Sums::finish(sums_ + i * Sums::row(dv), largest, dv, state_.o + i * whole_registers<T>(dv));
    }
  }

 private:
  Index query(Index i) const { return i / task_.heads.group_size(); }
  Index head(Index i) const { return kv_head_ * task_.heads.group_size() + i % task_.heads.group_size(); }

  /// From q·k to scores: scales of the rows, score function, mask. For plain scores without a mask ChunkWeights applies
  /// the scales.
  void finish_scores(const GridPiece& piece, const PairTile& pairs, Cover cover) {
    const bool apply_key_scales = cover != Cover::all || !task_.rule.plain;
    if constexpr (has_row_scale<S>) {
      T* const scale_k = chunk_.key_scales(piece.column);
      T* const scale_v = chunk_.value_scales(piece.column);
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
      if (apply_key_scales) {
        for (Index i = 0; i < n_; ++i) {
          T* const s = chunk_.scores(i, piece.column);
          for (j = 0; j < piece.count; ++j) s[j] *= scale_k[j];
        }
        std::fill_n(scale_k, piece.count, T(1));
      }
    }
    task_.rule.template finish<Inner::keys>(pairs, cover, chunk_.scores(0, piece.column), decode_chunk);
  }
  /// Prefetched before the rows are multiplied: in pages, scales are too short a stream for the hardware prefetcher.
  void fetch_scales(const GridPiece& piece) const {
    const KeyRun<S>& run = task_.keys.runs[piece.run];
    const Index stride = task_.keys.scale_row_stride, at = task_.keys.scale_at(kv_head_, piece.row);
    for (Index j = 0; j < piece.count; j += 16) {
      prefetch_near(run.key_scales + at + j * stride);
      prefetch_near(run.value_scales + at + j * stride);
    }
  }

  /// Rows of a block: 8 KB, so that a block and the next one stay in the first-level cache for all queries. With 32 KB
  /// caches (Zen 3) one query is faster with 4 KB: bf16 .89 instead of .83 of the bandwidth; four queries are slower.
  Index block_rows(Index width) const {
    const Index bytes = few_registers && n_ == 1 ? 4096 : 8192;
    return std::clamp<Index>(bytes / static_cast<Index>(sizeof(S)) / std::max<Index>(width, 1) / 16 * 16, 16, 64);
  }
  /// Bytes. Zen 3 has too few outstanding first-level misses to reach the bandwidth: wide rows from memory are
  /// prefetched earlier into the second level (.78 instead of .67 of the bandwidth); for rows in a cache that would
  /// cost 12 %. 12 KB are one and a half blocks: 9, 11, 14, 16 and 20 KB reach .70 to .76.
  std::uintptr_t prefetch_distance() const {
    constexpr Index from_memory = Index{32} << 20;
    const Index numbers = task_.keys.rows * task_.heads.kv_heads * (task_.head_dim + task_.v_head_dim);
    return wide<S> && numbers >= from_memory / static_cast<Index>(sizeof(S)) ? 12288 : 0;
  }
  static RowBytes bytes_of(const Rows<S>& rows) {
    constexpr auto size = static_cast<Index>(sizeof(S));
    return {reinterpret_cast<const std::byte*>(rows.first), rows.stride * size, rows.count, rows.width * size};
  }

  /// Adds one value row for the queries that see it; not read if none does.
  void add_seen(const Rows<S>& value, Index column) {
    const Index width = whole_registers<T>(value.width);
    for (Index i = 0; i < n_; ++i) {
      const T* const p = chunk_.scores(i, column);
      if (*p != detail::minus_infinity<T>)
        add_rows(value, p, decode_chunk, 1, NextLines::none(value.first), state_.o + i * width);
    }
  }
  const Task<T, S>& task_;
  PackedQueries<D> q_;
  ChunkWeights<D> chunk_;
  std::int32_t* sums_;  // [n, row(v_head_dim)] of the chunk, where values are multiplied in integers (int8_values.hpp)
};

/// The heads of a task whose keys are multiplied by D; task and rows outlive it.
template <class D>
DecodeSource<typename D::Scalar> decode_source(const Task<typename D::Scalar, typename D::Key>& task,
                                               const ByteRows& rows) {
  using T = typename D::Scalar;
  using Head = DecodeHeadOf<D>;
  static_assert(std::is_trivially_destructible_v<Head>);  // heads lie in scratch memory
  return {rows, &task, Head::bytes(task.n_queries() * task.heads.group_size(), task.head_dim, task.v_head_dim),
          [](const void* of, Index kv_head, std::byte* memory) -> DecodeHead<T>* {
            detail::Carver carver(memory);
            Head* const head = carver.take<Head>(1);
            return std::construct_at(head, *static_cast<const Task<T, typename D::Key>*>(of), kv_head, carver);
          }};
}

}}}  // namespace qkv::QKV_ABI::kernel

#include "../../base/warnings_on.hpp"

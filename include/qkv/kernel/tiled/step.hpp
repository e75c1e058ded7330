// kernel/tiled/step.hpp — one step of the tiled kernel: a panel of queries against a block of keys.
//
//     Sᵀ = K Qᵀ            [keys, lanes]      of the columns that a register of the panel sees: kernel/tiled/block_mask.hpp
//     m, l, Sᵀ ← e^(s-m)                      lane by lane: kernel/register_softmax.hpp
//     Oᵀ += Vᵀ Sᵀ          [v_dim, lanes]     kernel/value_tile.hpp
//
// Value rows that are not finite are packed as zeros, and added at the end, row by row, in the lanes that see them.
//
// Before: kernel/tiled/tiled.hpp   Next: kernel/tiled/block_mask.hpp
#pragma once

#include <cstddef>
#include <type_traits>

#include "../../parallel.hpp"
#include "../../product/narrow_tile.hpp"
#include "../../product/register_tile.hpp"
#include "../../softmax.hpp"
#include "../arithmetic.hpp"
#include "../register_softmax.hpp"
#include "../task.hpp"
#include "../value_tile.hpp"
#include "block_mask.hpp"
#include "pack_queries.hpp"
#include "packed_kv.hpp"
#include "query_state.hpp"

#include "../../base/warnings_off.hpp"

namespace qkv { inline namespace QKV_ABI { namespace kernel {

/// n <= lanes queries of one head from row `query` on, packed, and their state so far.
template <class T>
struct QueryPanel {
  Index query, n;
  T* q;  // [key_depth][lanes] numbers of the arithmetic, which are as large as T
  PanelState<T> sums;
};

/// One head's blocks and panels, whatever the arithmetic: pack a block, load a panel, multiply the two.
template <class T>
class BlockStep {
 public:
  virtual void pack(Index b) const = 0;
  /// `from` for a panel of queries, from its lane `lane` on.
  virtual void load(const QueryRows<T>& from, const QueryPanel<T>& panel, Index lane) const = 0;
  /// Merges block b into the state of the panel; the lines of `fetch` are prefetched meanwhile.
  virtual void run(Index b, const QueryPanel<T>& panel, FetchList& fetch) = 0;

 protected:
  BlockStep() = default;
  BlockStep(const BlockStep&) = default;
  BlockStep& operator=(const BlockStep&) = default;
  ~BlockStep() = default;
};

/// BlockStep in arithmetic A.
template <class A>
class PanelStep final : public BlockStep<typename A::Scalar> {
  using T = typename A::Scalar;
  using Number = typename A::Number;
  using V = Simd<T>;
  using Vec = typename V::Vec;
  using Softmax = PanelSoftmax<A>;
  using Mask = PanelMask<T>;
  using Panel = QueryPanel<T>;
  using Shape = TileShape<T>;
  static constexpr Index lanes = TileShape<T>::columns, vectors = TileShape<T>::vectors, rows = TileShape<T>::rows;

 public:
  /// Scratch: scores and hidden [tile_keys, lanes].
  PanelStep(const QueryTask<T>& task, const BlockSource<A>& source, const PackedKv<A>& panels, Index head, T* scores,
            bool* hidden)
      : task_(task), source_(source), panels_(panels), head_(head), s_(scores), hidden_(hidden) {}

  void pack(Index b) const override { source_.pack(panels_, task_.heads.kv_head(head_), b); }
  void load(const QueryRows<T>& from, const Panel& p, Index lane) const override {
    static_assert(sizeof(Number) == sizeof(T));
    pack_queries(A{}, from, reinterpret_cast<Number*>(p.q) + lane, lanes, p.sums.score_scale + lane);
  }
  void run(Index b, const Panel& p, FetchList& fetch) override {
    const KeyBlock& block = panels_.blocks[b];
    const Mask mask(task_, source_.rows.runs, block, head_, p.query, p.n);
    if (mask.all_empty()) return;
    static_assert(vectors == 2);
    const Columns &left = mask.columns(0), &right = mask.columns(1);
    Span before{left.begin, left.end}, both, after{right.begin, right.end};
    if (!left.empty() && !right.empty() && right.begin < left.end)
      both = {right.begin, left.end}, before.end = right.begin, after.begin = left.end;
    multiply_keys<1>(b, p, 0, before, fetch);
    multiply_keys<2>(b, p, 0, both, fetch);
    multiply_keys<1>(b, p, 1, after, fetch);
    for (Index v = 0; v < vectors; ++v) mask.finish(v, s_, p.sums.score_scale + v * V::width);
    mark_hidden(block, b, mask);
    update_softmax(mask, b, p.sums);
    multiply_values(b, p.sums.o, before, both, after, fetch);
    add_not_finite(block, b, p);
  }

 private:
  /// Sᵀ of some columns, of Vectors registers from v on. The last tile of a block may be lower than the others: it is
  /// always computed for both registers.
  template <Index Vectors>
  EIGEN_DONT_INLINE void multiply_keys(Index b, const Panel& p, Index v, const Span& columns, FetchList& fetch) const {
    const Index count = columns.end - columns.begin, depth = panels_.key_depth(), c = columns.begin;
    if (count <= 0) return;
    const Index full = count / rows, rest = count % rows, last = c + full * rows;
    const Number* const a = panels_.block_keys(b);
    if constexpr (!A::narrow) {
      TileOperands<T> op{.depth = depth, .b_step = lanes, .c_row = lanes};
      op.a = a + c * depth, op.b = p.q + v * V::width, op.c = s_ + c * lanes + v * V::width;
      packed_tiles<rows, Vectors>(op, full, depth * rows, lanes * rows, fetch);
      op.a = a + last * depth, op.b = p.q, op.c = s_ + last * lanes;
      if (rest > 0) packed_tile_of<T, T, 0, Shape::tail_step>(Shape::tail_height(rest), op);
    }
    if constexpr (A::narrow) {
      using Dot = KeyDot<A>;
      const auto at = [&](Index column, Index vector) {
        const auto* const q = reinterpret_cast<const Number*>(p.q);
        WordOperands op{.depth = depth, .a = a + column * depth, .b = q + vector * V::width, .b_step = lanes};
        op.row = b * tile_keys + column, op.offset = panels_.key_offsets, op.scale = panels_.key_scales;
        op.c = s_ + column * lanes + vector * V::width, op.c_row = lanes;
        return op;
      };
      word_tiles<Dot, rows, Vectors>(at(c, v), full, depth * rows, lanes * rows, fetch);
      if (rest > 0) word_tile_of<Dot>(Shape::tail_height(rest), at(last, 0), fetch);
    }
  }

  /// m and l of the panel ← merged with the scores, which become weights; Oᵀ ← rescaled.
  void update_softmax(const Mask& mask, [[maybe_unused]] Index b, const PanelState<T>& panel) {
    bool moved = false;
    alignas(detail::cache_line) T rescale[std::size_t(lanes)];
    for (Index v = 0; v < vectors; ++v) {
      const Columns& columns = mask.columns(v);
      if (columns.empty()) {
        V::store(rescale + v * V::width, V::broadcast(T(1)));
        if constexpr (A::integer_weights) V::store(value_step_ + v * V::width, V::zero());
        continue;
      }
      const Index lane = v * V::width;
      const Vec score_scale = task_.rule.plain ? V::load(panel.score_scale + lane) : V::broadcast(T(1));
      const bool here =
          Softmax::step(s_ + lane, columns.begin, columns.end, score_scale, value_scales(b), panel.m + lane,
                        panel.l + lane, rescale + lane, value_step_ + (A::integer_weights ? lane : 0));
      moved = moved || here;
    }
    if (!moved) return;
    T* at = panel.o;
    for (Index x = 0; x < task_.v_head_dim; ++x, at += lanes)
      for (Index v = 0; v < vectors; ++v)
        V::store(at + v * V::width, V::mul(V::load(at + v * V::width), V::load(rescale + v * V::width)));
  }

  const float* value_scales([[maybe_unused]] Index b) const {
    return A::integer_weights ? panels_.value_scales + b * tile_keys : nullptr;
  }

  /// Oᵀ += Vᵀ Sᵀ, `rows` features at a time.
  void multiply_values(Index b, T* o, Span before, Span both, Span after, FetchList& fetch) const {
    const Index features = panels_.value_rows(), full = features / rows, rest = features % rows;
    const Index count = (panels_.blocks[b].count + A::keys - 1) / A::keys;
    for (Span* span : {&before, &both, &after})
      *span = span->begin >= span->end ? Span{} : Span{span->begin / A::keys, (span->end + A::keys - 1) / A::keys};
    ValueOperands<Number> op{.before = before, .both = both, .after = after};
    op.a = panels_.block_values(b);
    op.b = reinterpret_cast<const Number*>(s_), op.b_step = lanes;
    op.o = o, op.o_row = lanes;
    if constexpr (A::integer_weights) op.value_step = value_step_;
    value_tiles<ValueDot<A>, rows>(op, full, count * rows, fetch);
    op.a += full * rows * count, op.o += full * rows * lanes;
    if (rest > 0) value_tile_of<ValueDot<A>, rows, Shape::tail_step>(rest, op, fetch);
  }

  /// Which lanes do not see the value rows that are not finite: before scores become weights.
  EIGEN_DONT_INLINE void mark_hidden(const KeyBlock& block, Index b, const Mask& mask) const {
    for (Index i = 0; i < block.not_finite; ++i) {
      const Index c = panels_.not_finite[b * tile_keys + i];
      for (Index lane = 0; lane < lanes; ++lane)
        hidden_[c * lanes + lane] =
            !mask.columns(lane / V::width).holds(c) || s_[c * lanes + lane] == detail::minus_infinity<T>;
    }
  }
  EIGEN_DONT_INLINE void add_not_finite(const KeyBlock& block, Index b, const Panel& p) const {
    const Index kv_head = task_.heads.kv_head(head_);
    for (Index i = 0; i < block.not_finite; ++i) {
      const Index c = panels_.not_finite[b * tile_keys + i];
      for (const GridPiece& piece : GridPieces(source_.rows.runs, tile_keys, block.cell)) {
        if (c < piece.column || c >= piece.column + piece.count) continue;
        for (Index x = 0; x < task_.v_head_dim; ++x) {
          const T value = source_.value(source_.keys, kv_head, piece.run, piece.row + c - piece.column, x);
          for (Index lane = 0; lane < p.n; ++lane)
            if (!hidden_[c * lanes + lane]) p.sums.o[x * lanes + lane] += Softmax::weight(s_, c, lane) * value;
        }
      }
    }
  }

  const QueryTask<T>& task_;
  const BlockSource<A>& source_;
  const PackedKv<A>& panels_;
  Index head_;
  T* s_;          // [tile_keys, lanes]: scores, then weights
  bool* hidden_;  // [tile_keys, lanes]: whether the lane does not see the key, for value rows that are not finite
  alignas(detail::cache_line) T
      value_step_[std::size_t(A::integer_weights ? lanes : 1)];  // [lanes], integer weights: quantisation step
};

/// Makes the steps of a task in one arithmetic, and packs the blocks of a kv head into `packed`, scratch of `bytes`.
template <class T>
class StepSource {
 public:
  ByteRows rows;

  virtual std::size_t bytes(Index n_blocks) const = 0;
  virtual void pack(std::byte* packed, Index n_blocks, Index kv_head, Index b) const = 0;
  /// Calls use(step) with the steps of one query head. Scratch: scores and hidden as of PanelStep.
  virtual void with_step(std::byte* packed, Index n_blocks, Index head, T* scores, bool* hidden,
                         detail::FunctionRef<void(BlockStep<T>&)> use) const = 0;

 protected:
  explicit StepSource(const ByteRows& of) : rows(of) {}
  StepSource(const StepSource&) = default;
  StepSource& operator=(const StepSource&) = default;
  ~StepSource() = default;
};

template <class A>
class StepSourceOf final : public StepSource<typename A::Scalar> {
  using T = typename A::Scalar;

 public:
  StepSourceOf(const QueryTask<T>& task, const BlockSource<A>& source)
      : StepSource<T>(source.rows), task_(task), source_(source) {}

  std::size_t bytes(Index n_blocks) const override {
    return packed_kv_bytes<A>(n_blocks, task_.head_dim, task_.v_head_dim);
  }
  void pack(std::byte* packed, Index n_blocks, Index kv_head, Index b) const override {
    source_.pack(panels(packed, n_blocks), kv_head, b);
  }
  void with_step(std::byte* packed, Index n_blocks, Index head, T* scores, bool* hidden,
                 detail::FunctionRef<void(BlockStep<T>&)> use) const override {
    const PackedKv<A> all = panels(packed, n_blocks);
    PanelStep<A> step(task_, source_, all, head, scores, hidden);
    use(step);
  }

 private:
  PackedKv<A> panels(std::byte* packed, Index n_blocks) const {
    detail::Carver carver(packed);
    return PackedKv<A>::carve(carver, n_blocks, task_.head_dim, task_.v_head_dim);
  }
  const QueryTask<T>& task_;
  BlockSource<A> source_;
};

}}}  // namespace qkv::QKV_ABI::kernel

#include "../../base/warnings_on.hpp"

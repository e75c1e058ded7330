// kernel/absorbed/absorbed.hpp — absorbed latent attention: all heads share one row per key, and read it once.
//
//     for each block of keys:   Sᵀ = C Qᵀ                       [keys, lanes]       lanes are heads; C [keys, latent | rope]
//                               m, l, Sᵀ ← softmax, lane by lane                    kernel/absorbed/scores.hpp
//                               O += S C[:, latent]             [lanes, latent]     lanes of registers are features
//
// 2·(2·latent_dim + rope_dim) flops per key and head, on latent_dim + rope_dim numbers per key: with many heads it is
// bound by multiply-adds. Lane i is head i mod heads of token i / heads, so several new tokens fill registers too.
//
// A sum is the same chain in every lane and panel: a prompt in pieces gives the same bits as at once.
// DeepSeek-V2, arXiv:2405.04434, appendix C; blocks of keys as in Dao et al. 2022, arXiv:2205.14135.
//
// Before: kernel/value_tile.hpp   Next: kernel/absorbed/splits.hpp
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <tuple>
#include <utility>

#include "../../softmax.hpp"
#include "../../workspace.hpp"
#include "../value_tile.hpp"
#include "blocks.hpp"
#include "grid.hpp"
#include "queries.hpp"
#include "scores.hpp"
#include "tiles.hpp"

#include "../../base/warnings_off.hpp"

namespace qkv { inline namespace QKV_ABI { namespace kernel::absorbed {

/// Numbers of an output row in whole registers.
template <class T>
Index features(const LaneTask<T>& task) {
  return round_up(task.latent_dim, Simd<T>::width);
}

/// Some lanes, in panels of Vectors registers, against the blocks of one split after another.
template <class A, Index Vectors>
class Absorbed final : public LaneGroup<typename A::Scalar> {
  using T = typename A::Scalar;
  using V = Simd<T>;
  using Vec = typename V::Vec;
  using Value = ValueDot<A>;
  using Tiles = ScoreTiles<A>;
  static constexpr Index W = V::width;
  static constexpr bool narrow = A::narrow;
  static constexpr Index n_rows = block_rows<narrow>;
  static_assert(n_rows % Shape<T>::score_rows(1) == 0 && n_rows % Shape<T>::score_rows(2) == 0);

 public:
  static constexpr Index panel = Queries<A, Vectors>::panel;
  static_assert(panel % Shape<T>::value_lanes == 0);

  Absorbed(const LaneTask<T>& task, const ByteRows& rows, BlockRows<A>* block, detail::Carver& carver, Index first_lane,
           Index n_lanes)
      : task_(task),
        rows_(rows),
        block_(block),
        q_(task, carver, first_lane, n_lanes),
        scores_(carver),
        tiles_(ScoreTiles<A>::template of<Vectors>(q_.layout())),
        row_(carver.take<T>(features(task))),
        first_(first_lane),
        n_(n_lanes) {}

  void load_queries() override { q_.load(); }

  void attend(const Place* places, Index n_places, const Place* next, const LaneState<T>& state) override {
    state_ = state;
    const Index lanes = round_up(n_, panel);
    std::fill_n(state.m, lanes, detail::minus_infinity<T>);
    std::fill_n(state.l, lanes, T(0));
    std::fill_n(state.o, lanes * state.o_step, T(0));
    for (Index b = 0; b < n_places; ++b) {
      block_->prepare(places[b]);
      prefetch_next(b + 1 < n_places ? places + b + 1 : next);
      for (Index p = 0; p < n_; p += panel) attend(p);
    }
    const T kept = kept_scale();
    for (Index i = 0; i < n_; ++i)
      if (state.m[i] != detail::minus_infinity<T>) state.m[i] *= kept;
  }

 private:
  using Scores = LaneScores<A, panel>;

  /// Plain scores are kept as ±q·c: differences from the maximum are formed before they are scaled.
  T score_scale() const { return std::max(std::abs(task_.scale), std::numeric_limits<T>::min()); }
  /// Score = kept_scale · kept number. Score functions get scaled ones, so then it is 1.
  T kept_scale() const { return task_.rule.plain ? score_scale() : T(1); }

  PairTile tile(Index p, const GridPiece& piece) const {
    return {task_.sequence,       0,         task_.heads,    first_ + p, std::min(n_ - p, panel),
            task_.first_position, piece.key, piece.position, piece.count};
  }
  /// f(part of a piece, its cover) for the pieces of the block as panel p sees them: whole ones, or cut into 16 columns where
  /// some pairs are hidden.
  template <class F>
  void for_each_cover(Index p, F&& f) const {
    for (const GridPiece& piece : GridPieces(rows_.runs, n_rows, block_->place().cell)) {
      const Cover all = task_.rule.cover(tile(p, piece));
      if (all != Cover::some) {
        f(piece, all);
        continue;
      }
      for (Index i = 0; i < piece.count;) {
        const Index some = std::min(piece.count - i, 16 - (piece.column + i) % 16);
        const GridPiece part = piece.part(i, some);
        f(part, task_.rule.cover(tile(p, part)));
        i += some;
      }
    }
  }

  // ---- one block, one panel ----
  void attend(Index p) {
    const Place& place = block_->place();
    Index begin = n_rows, end = 0, held = 0;
    bool mixed = false;
    for_each_cover(p, [&](const GridPiece& piece, Cover c) {
      held += piece.count;
      mixed = mixed || c != Cover::all;
      if (c == Cover::none) return;
      begin = std::min(begin, piece.column);
      end = std::max(end, piece.column + piece.count);
    });
    if (end <= begin) return;
    // Rounded outwards to whole words (2 or 4 keys) and partial sums. Hidden rows that join by this are multiplied by a weight
    // of zero: their scores are computed too, so that finite() finds those that are not finite.
    constexpr Index partial_sums = Scores::partial_sums;
    begin = std::max(place.begin, begin / partial_sums * partial_sums);
    end = std::min(place.count, round_up(end, partial_sums));
    multiply_rows(p, begin, end);
    const bool finite = scores_.finite(begin, end) && block_->values_finite();
    if (!task_.rule.plain || mixed || held < place.count - place.begin) finish(p, begin, end);
    const Index from = begin / partial_sums * partial_sums;
    scores_.hide(from, begin);
    if (!finite) scores_.note_hidden(from, end);
    if (scores_.update_softmax(from, end, kept_scale(), block_->value_scales(), state_.m + p, state_.l + p)) rescale(p);
    if (finite)
      multiply_values(p, from, end);
    else
      multiply_values_carefully(p, from, end);
  }

  void multiply_rows(Index p, Index begin, Index end) {
    const Index rows = tiles_.rows, tiles = (end - begin) / rows;
    multiply_tiles(tiles_.whole, rows, p, begin, tiles);
    begin += tiles * rows;
    if (begin == end) return;
    if (tiles > 0) return multiply_tiles(tiles_.whole, rows, p, end - rows, 1);  // some rows again: the same bits
    multiply_tiles(tiles_.four, 4, p, begin, (end - begin) / 4);
    begin += (end - begin) / 4 * 4;
    multiply_tiles(tiles_.one, 1, p, begin, end - begin);
  }
  /// `tiles` tiles of `rows` rows from column c on.
  EIGEN_DONT_INLINE void multiply_tiles(typename Tiles::Function multiply, Index rows, Index p, Index c, Index tiles) {
    const Index step = q_.layout().registers * W / q_.layout().parts;
    const Index live = round_up(std::min(panel, n_ - p), step);
    for (Index lane = p; lane < p + live && tiles > 0; lane += step) {
      T* const to = scores_.row(c) + lane - p;
      if constexpr (!A::integer_keys)
        multiply(tiles, q_.steps(), block_->row(c), block_->stride(), q_.at(lane), to, panel, stream_);
      if constexpr (A::int8_keys) {
        const Int8Rows at{q_.steps(),       q_.rope_steps(),       block_->row(c),    block_->rope(c),
                          block_->stride(), block_->rope_stride(), block_->scales(c), block_->offsets(c)};
        multiply(tiles, at, q_.at(lane), q_.rope(lane), q_.query_scale(lane), to, panel);
      }
      if constexpr (A::int16_keys) {
        const Int16Rows at{q_.steps() / W, block_->row(c), block_->stride(), block_->scales(c)};
        int16_scores<Vectors>(at, tiles * rows, q_.at(lane), q_.query_scale(lane), to);
        multiply(tiles, q_.rope_steps(), block_->rope(c), block_->rope_stride(), q_.rope(lane), to, panel, stream_);
      }
    }
    if (live < panel)  // later steps read whole registers
      for (Index r = c; r < c + tiles * rows; ++r) std::fill_n(scores_.row(r) + live, panel - live, T(0));
  }

  /// Applies the rule to the scores of columns [begin, end); columns without a row are hidden.
  void finish(Index p, Index begin, Index end) {
    Index next = begin;  // columns before it are done
    T scale[std::size_t(panel)];
    std::fill_n(scale, panel, score_scale());
    for_each_cover(p, [&](const GridPiece& piece, Cover c) {
      const Index from = std::max(piece.column, begin), to = std::min(piece.column + piece.count, end);
      if (from >= to) return;
      scores_.hide(next, from);
      next = to;
      if (c == Cover::none) return scores_.hide(from, to);
      task_.rule.template finish<Inner::lanes>(tile(p, piece.part(from - piece.column, to - from)), c,
                                               scores_.row(from), panel, scale);
    });
    scores_.hide(next, end);
  }

  /// o ← rescale·o for the panel, after a maximum has moved.
  void rescale(Index p) {
    const T* const rescale = scores_.rescale();
    const Index width = features(task_);
    for (Index lane = 0; lane < std::min(panel, n_ - p); ++lane) {
      if (rescale[lane] == T(1)) continue;
      T* const o = state_.o + (p + lane) * state_.o_step;
      const Vec factor = V::broadcast(rescale[lane]);
      for (Index x = 0; x < width; x += W) V::store(o + x, V::mul(V::load(o + x), factor));
    }
  }

  void multiply_values(Index p, Index begin, Index end) {
    constexpr Index keys = A::keys, vectors = Shape<T>::value_vectors;
    if (begin >= end) return;
    begin = std::max(begin, block_->place().begin / keys * keys);  // before it are only hidden columns, without rows
    const Index lanes = round_up(std::min(panel, n_ - p), Shape<T>::value_lanes), width = features(task_);
    FeatureOperands<Value, T> op{.depth = (end + keys - 1) / keys - begin / keys,
                                 .p = scores_.weights(begin),
                                 .p_step = panel,
                                 .c = block_->values(begin),
                                 .c_step = block_->value_stride(),
                                 .o = state_.o + p * state_.o_step,
                                 .o_row = state_.o_step,
                                 .value_step = scores_.value_step()};
    for (Index x = 0; x < width;) {
      const Index some = std::min(vectors, (width - x) / W);
      if (some == vectors)
        feature_tiles<Value, vectors>(lanes, op, stream_);
      else if (some == 2)
        feature_tiles<Value, 2>(lanes, op, stream_);
      else
        feature_tiles<Value, 1>(lanes, op, stream_);
      x += some * W, op.c += some * W, op.o += some * W;
    }
  }

  // ---- rows that are not finite: a weight of zero must not meet them ----
  void multiply_values_carefully(Index p, Index begin, Index end) {
    const auto [dropped, n] = block_->dropped();
    if constexpr (narrow) {
      multiply_values(p, begin, end);  // they are packed as zeros
    } else {
      Index from = begin;
      for (Index i = 0; i < n; ++i) {
        if (dropped[i] < begin || dropped[i] >= end) continue;
        multiply_values(p, from, dropped[i]);
        from = dropped[i] + 1;
      }
      multiply_values(p, from, end);
    }
    for (Index i = 0; i < n; ++i) {
      const Index c = dropped[i];
      if (c < begin || c >= end) continue;
      block_->load_latent(c, row_);
      for (Index lane = 0; lane < std::min(panel, n_ - p); ++lane) {
        if (scores_.hidden(c, lane)) continue;
        T* const o = state_.o + (p + lane) * state_.o_step;
        const T weight =
            scores_.weight(c, lane);  // its quantisation step is left off: what it multiplies is not finite
        for (Index x = 0; x < task_.latent_dim; ++x) o[x] += weight * row_[x];
      }
    }
  }

  /// Lists the rows of the next block for prefetching into the second-level cache.
  void prefetch_next(const Place* next) {
    stream_ = {};
    if (next == nullptr) return;
    const Index row = next->cell.row,
                count = std::min(next->count - next->begin, rows_.runs[next->cell.run].rows - row);
    const auto range = [](const RowBytes& rows) {
      return std::pair{reinterpret_cast<std::uintptr_t>(rows.first), reinterpret_cast<std::uintptr_t>(rows.end())};
    };
    std::tie(stream_.at, stream_.end) = range(rows_.keys(next->cell.run, 0, row, count));
    if (rows_.value.row_stride > 0)
      std::tie(stream_.next, stream_.next_end) = range(rows_.values(next->cell.run, 0, row, count));
  }

  const LaneTask<T>& task_;
  const ByteRows& rows_;
  BlockRows<A>* block_;
  Queries<A, Vectors> q_;
  Scores scores_;
  Tiles tiles_;
  T* row_;  // a latent, widened
  Index first_, n_;
  LaneState<T> state_{};
  Stream stream_;
};

}}}  // namespace qkv::QKV_ABI::kernel::absorbed

#include "../../base/warnings_on.hpp"

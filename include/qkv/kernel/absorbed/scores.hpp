// kernel/absorbed/scores.hpp — the scores of a panel of lanes with a block of latent rows, and how they become weights.
//
//     s(c)      of column c, lane by lane: ±q·c, -inf where a lane does not see it
//
// One step of the running softmax, in each arithmetic: kernel/register_softmax.hpp.
//
// Before: kernel/absorbed/tiles.hpp   Next: product/packed_product.hpp
#pragma once

#include <algorithm>
#include <cstddef>

#include "../../softmax.hpp"
#include "../../workspace.hpp"
#include "../register_softmax.hpp"
#include "grid.hpp"
#include "pack_rows.hpp"

#include "../../base/warnings_off.hpp"

namespace qkv { inline namespace QKV_ABI { namespace kernel::absorbed {

/// Scores, then weights, of a block in arithmetic A for Panel lanes.
template <class A, Index Panel>
class LaneScores {
  using T = typename A::Scalar;
  using Number = typename A::Number;
  using V = Simd<T>;
  using Vec = typename V::Vec;
  using Softmax = PanelSoftmax<A, Panel>;
  static constexpr Index W = V::width, n_rows = block_rows<A::narrow>;

 public:
  /// Weights are added up in partial sums that repeat after so many columns.
  static constexpr Index partial_sums = 4;
  static_assert(n_rows % partial_sums == 0);

  explicit LaneScores(detail::Carver& carver)
      : s_(carver.take<T>(n_rows * Panel)), hidden_(carver.take<bool>(n_rows * Panel)) {}

  T* row(Index column) { return s_ + column * Panel; }
  void hide(Index begin, Index end) {
    if (begin < end) std::fill_n(row(begin), (end - begin) * Panel, detail::minus_infinity<T>);
  }
  /// A non-finite latent row makes the score of every lane non-finite: the first register suffices.
  bool finite(Index begin, Index end) const {
    Vec a = V::zero(), b = a;
    for (Index c = begin; c + 2 <= end; c += 2) {
      a = V::fma(V::zero(), V::load(s_ + c * Panel), a);
      b = V::fma(V::zero(), V::load(s_ + (c + 1) * Panel), b);
    }
    if ((end - begin) % 2 == 1) a = V::fma(V::zero(), V::load(s_ + (end - 1) * Panel), a);
    return V::sum_lanes(V::add(a, b)) == 0;
  }
  /// Stores which pairs are hidden: a weight of zero may be one that underflowed.
  void note_hidden(Index begin, Index end) {
    for (Index i = begin * Panel; i < end * Panel; ++i) hidden_[i] = s_[i] == detail::minus_infinity<T>;
  }
  bool hidden(Index column, Index lane) const { return hidden_[column * Panel + lane]; }

  /// One softmax step of all lanes: scores of columns [begin, end) become weights, m and l include them. `begin` is a multiple
  /// of partial_sums. True where an m has moved: earlier sums must then be multiplied by rescale().
  bool update_softmax(Index begin, Index end, T score_scale, const float* scales, T* m, T* l) {
    bool moved = false;
    for (Index v = 0; v < Panel; v += W) {
      const bool here = Softmax::step(s_ + v, begin, end, V::broadcast(score_scale), scales, m + v, l + v, rescale_ + v,
                                      value_step_ + v);
      moved = moved || here;
    }
    return moved;
  }
  const T* rescale() const { return rescale_; }

  /// Weights from a column on, in numbers of A::keys columns; of integer weights the quantisation step of each lane.
  const Number* weights(Index column) const { return reinterpret_cast<const Number*>(s_) + column / A::keys * Panel; }
  const T* value_step() const { return value_step_; }
  /// The weight of one pair; an integer where weights are.
  T weight(Index column, Index lane) const { return Softmax::weight(s_, column, lane); }

 private:
  T* s_;          // [n_rows, Panel]
  bool* hidden_;  // [n_rows, Panel]; written where a score is not finite
  alignas(detail::cache_line) T value_step_[std::size_t(Panel)] = {};
  alignas(detail::cache_line) T rescale_[std::size_t(Panel)] = {};
};

}}}  // namespace qkv::QKV_ABI::kernel::absorbed

#include "../../base/warnings_on.hpp"

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
  /// A latent row that is not finite has no finite score, in any lane: one register tells.
  bool finite(Index begin, Index end) const {
    Vec a = V::zero(), b = a;
    for (Index c = begin; c + 2 <= end; c += 2) {
      a = V::fma(V::zero(), V::load(s_ + c * Panel), a);
      b = V::fma(V::zero(), V::load(s_ + (c + 1) * Panel), b);
    }
    if ((end - begin) % 2 == 1) a = V::fma(V::zero(), V::load(s_ + (end - 1) * Panel), a);
    return V::sum_lanes(V::add(a, b)) == 0;
  }
  /// Remembers which pairs are hidden: weights do not tell.
  void note_hidden(Index begin, Index end) {
    for (Index i = begin * Panel; i < end * Panel; ++i) hidden_[i] = s_[i] == detail::minus_infinity<T>;
  }
  bool hidden(Index column, Index lane) const { return hidden_[column * Panel + lane]; }

  /// m and l of the lanes ← with the scores of columns [begin, end), which become weights. `begin` lies on a partial sum.
  /// True where m has moved: what was summed up to here is then to be multiplied by keep().
  bool soften(Index begin, Index end, T unit, const float* scales, T* m, T* l) {
    bool moved = false;
    for (Index v = 0; v < Panel; v += W) {
      const bool here =
          Softmax::step(s_ + v, begin, end, V::broadcast(unit), scales, m + v, l + v, keep_ + v, take_ + v);
      moved = moved || here;
    }
    return moved;
  }
  const T* keep() const { return keep_; }

  /// Weights from a column on, in numbers of A::keys columns; in steps, what one is worth for each lane.
  const Number* weights(Index column) const { return reinterpret_cast<const Number*>(s_) + column / A::keys * Panel; }
  const T* take() const { return take_; }
  /// The weight of one pair; in steps, where weights are.
  T weight(Index column, Index lane) const { return Softmax::weight(s_, column, lane); }

 private:
  T* s_;          // [n_rows, Panel]
  bool* hidden_;  // [n_rows, Panel]; written where a score is not finite
  alignas(detail::cache_line) T take_[std::size_t(Panel)] = {};
  alignas(detail::cache_line) T keep_[std::size_t(Panel)] = {};
};

}}}  // namespace qkv::QKV_ABI::kernel::absorbed

#include "../../base/warnings_on.hpp"

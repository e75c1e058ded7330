// kernel/lane_masks.hpp — what the lanes of absorbed attention see: lanes are heads, and a mask knows queries and keys.
//
//     lane i: head i mod heads of token i / heads      a panel: for each head of it some tokens, `heads` lanes apart
//
// A block of keys that all lanes of a panel see, or none, costs one question a head; only the rest is cut into 16 columns, and
// asked key by key where a mask's edge runs through those.
//
// Before: kernel/latent_queries.hpp   Next: kernel/lane_scores.hpp
#pragma once

#include <algorithm>

#include "../detail/latent_rows.hpp"
#include "latent_grid.hpp"
#include "latent_queries.hpp"

namespace qkv::inline QKV_ABI::kernel::absorbed {

/// The masks of lanes [first, first + n) of a task, in panels of Panel lanes.
template <Index Panel, class T, StorageType S>
class LaneMasks {
 public:
  LaneMasks(const Task<T, S>& task, Index first, Index n) : task_(task), first_(first), n_(n) {}

  /// Calls f(run, base, row, count, column, cover) for the pieces of the block, mixed ones cut into 16 columns.
  template <Index Rows, class F>
  void for_each_cover(const Place& place, Index p, F&& f) const {
    for_each_piece<Rows>(task_.rows, place,
                         [&](const LatentRun<S>& run, Index base, Index row, Index count, Index column) {
                           const Cover all = cover(p, run, base, row, count);
                           if (all != Cover::some) return f(run, base, row, count, column, all);
                           for (Index i = 0; i < count;) {
                             const Index some = std::min(count - i, 16 - (column + i) % 16);
                             f(run, base, row + i, some, column + i, cover(p, run, base, row + i, some));
                             i += some;
                           }
                         });
  }
  /// Scores s [count][Panel] of panel p and the keys [row, row + count) of the run become what the rule makes of them.
  /// `unit` [Panel]: of each lane.
  void finish(Index p, const LatentRun<S>& run, Index base, Index row, Index count, Cover cover, T* s,
              const T* unit) const {
    task_.rule.template finish<Inner::lanes>(tile(p, run, base, row, count), cover, s, Panel, unit);
  }

 private:
  PairTile tile(Index p, const LatentRun<S>& run, Index base, Index row, Index count) const {
    return {task_.sequence,        0,          task_.heads,        first_ + p, std::min(n_ - p, Panel),
            task_.first_position,  base + row, run.position + row, count};
  }
  Cover cover(Index p, const LatentRun<S>& run, Index base, Index row, Index count) const {
    return task_.rule.cover(tile(p, run, base, row, count));
  }

  const Task<T, S>& task_;
  Index first_, n_;
};

}  // namespace qkv::inline QKV_ABI::kernel::absorbed

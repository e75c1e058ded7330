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
#include "../mask.hpp"
#include "../softmax.hpp"
#include "latent_grid.hpp"
#include "latent_queries.hpp"

namespace qkv::inline QKV_ABI::kernel::absorbed {

/// The masks of lanes [first, first + n) of a task, in panels of Panel lanes.
template <Index Panel, class T, StorageType S, class M>
class LaneMasks {
 public:
  LaneMasks(const Task<T, S, M>& task, Index first, Index n) : task_(task), first_(first), n_(n) {}

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
  /// s [lanes of panel p] ← -inf where a lane does not see row `row` of the run.
  void hide_key(Index p, const LatentRun<S>& run, Index base, Index row, T* s) const {
    for_each_head(p, run, base, row, 1, [&](const Block& block, Index lane) {
      const SeenBy seen = detail::seen_by(*task_.mask, block);
      At at{block.sequence, block.head, block.query, block.key, block.query_position, block.key_position};
      for (Index i = 0; i < block.n_queries; ++i, ++at.query, ++at.query_position, lane += task_.heads)
        if (seen.exact ? i < seen.begin || i >= seen.end : !task_.mask->sees(at)) s[lane] = detail::minus_infinity<T>;
    });
  }

 private:
  /// f(block of one head's queries × the keys, first lane of them) for all heads of the panel; lanes lie `heads` apart.
  template <class F>
  void for_each_head(Index p, const LatentRun<S>& run, Index base, Index row, Index count, F&& f) const {
    const Index end = std::min(n_, p + Panel);
    for (Index i = p; i < std::min(end, p + task_.heads); ++i) {
      const Index lane = first_ + i, query = lane / task_.heads, n = (end - 1 - i) / task_.heads + 1;
      f(Block{task_.sequence, lane % task_.heads, query, n, task_.first_position + query, base + row, count,
              run.position + row},
        i - p);
    }
  }
  Cover cover(Index p, const LatentRun<S>& run, Index base, Index row, Index count) const {
    if constexpr (detail::ignores_heads<M>) {  // one rectangle for all of them
      const Index query = (first_ + p) / task_.heads, last = (first_ + std::min(n_, p + Panel) - 1) / task_.heads;
      return detail::cover(*task_.mask, Block{task_.sequence, 0, query, last - query + 1, task_.first_position + query,
                                              base + row, count, run.position + row});
    }
    Cover least = Cover::all, most = Cover::none;
    for_each_head(p, run, base, row, count, [&](const Block& block, Index) {
      const Cover c = detail::cover(*task_.mask, block);
      least = std::min(least, c), most = std::max(most, c);
    });
    return least == most ? least : Cover::some;
  }

  const Task<T, S, M>& task_;
  Index first_, n_;
};

}  // namespace qkv::inline QKV_ABI::kernel::absorbed

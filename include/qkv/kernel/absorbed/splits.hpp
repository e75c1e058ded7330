// kernel/absorbed/splits.hpp — absorbed latent attention of a whole sequence: its keys in splits, its lanes in groups.
//
//     splits    `split_rows` positions each, on a fixed grid; their states are merged in ascending order
//     groups    lanes that share a prepared block; a state has the same bits in any
//
// A work item is a group and, for several threads, a split: enough items for one token and many keys. Bits depend on neither
// threads nor groups. FlashDecoding (Dao et al. 2023) splits the keys of a decode step likewise.
//
// Before: kernel/absorbed/absorbed.hpp   Next: kernel/absorbed/grid.hpp
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <memory>
#include <span>
#include <type_traits>

#include "../../parallel.hpp"
#include "../../softmax.hpp"
#include "../../workspace.hpp"
#include "../task.hpp"
#include "absorbed.hpp"
#include "grid.hpp"

namespace qkv { inline namespace QKV_ABI { namespace kernel::absorbed {

/// Merges the state of lanes [first, first + n) of one split.
template <class T>
void merge_lanes(const LaneTask<T>& task, const LaneState<T>& from, Index first, Index n, const StateView<T>& state) {
  const Index latent = task.latent_dim;
  for (Index i = 0; i < n; ++i) {
    const Index query = (first + i) / task.heads, head = (first + i) % task.heads;
    detail::merge_row(state.m(query, head), state.l(query, head), state.o(query, head, latent), from.m[i], from.l[i],
                      from.o + i * from.o_step, latent);
  }
}

/// Makes the groups of lanes of a task, whatever the arithmetic.
template <class T>
class GroupSource {
 public:
  Index block_rows, panel;
  bool prepares;  // rows are packed or widened: preparing a block costs more than where they are multiplied in place

  /// Bytes of scratch of a group of n lanes.
  virtual std::size_t bytes(Index n) const = 0;
  /// Lanes [first, first + n), in such scratch.
  virtual LaneGroup<T>& make(std::byte* scratch, Index first, Index n) const = 0;

 protected:
  GroupSource(Index rows_of_block, Index lanes_of_panel, bool prepared)
      : block_rows(rows_of_block), panel(lanes_of_panel), prepares(prepared) {}
  GroupSource(const GroupSource&) = default;
  GroupSource& operator=(const GroupSource&) = default;
  ~GroupSource() = default;
};

template <class A, Index Vectors>
class GroupSourceOf final : public GroupSource<typename A::Scalar> {
  using T = typename A::Scalar;
  using Group = Absorbed<A, Vectors>;
  static_assert(std::is_trivially_destructible_v<Group>);

 public:
  GroupSourceOf(const LaneTask<T>& task, const ByteRows& rows, const BlockMaker<A>& blocks, bool prepared)
      : GroupSource<T>(absorbed::block_rows<A::narrow>, Group::panel, prepared),
        task_(task),
        rows_(rows),
        blocks_(blocks) {}

  std::size_t bytes(Index n) const override {
    detail::Carver count(nullptr);
    carve(count, 0, n);
    return count.used();
  }
  LaneGroup<T>& make(std::byte* scratch, Index first, Index n) const override {
    detail::Carver carver(scratch);
    return *carve(carver, first, n);
  }

 private:
  Group* carve(detail::Carver& carver, Index first, Index n) const {
    Group* const at = carver.take<Group>(1);
    BlockRows<A>* const block = blocks_.make(blocks_.rows, carver, parts_of<A>(task_.heads));
    const Group group(task_, rows_, block, carver, first, n);
    return at == nullptr ? nullptr : std::construct_at(at, group);
  }
  const LaneTask<T>& task_;
  const ByteRows& rows_;
  BlockMaker<A> blocks_;
};

/// Lanes of one work item, which share a prepared block: 128 where preparing packs or widens rows and there are at least four
/// work items (several threads: splits; one thread: blocks), else 64. (A state has the same bits in any group.)
constexpr Index group_lanes(bool prepares, Index items) { return prepares && items >= 4 ? 128 : 64; }
/// One thread attends to each split with up to so many groups before the next split.
inline constexpr Index most_groups_at_once = 4;
/// States of all splits are stored, to be computed by different threads, up to this many bytes.
inline constexpr Index most_partial_bytes = Index(64) << 20;

template <class T>
void run(const LaneTask<T>& task, const ByteRows& all, const GroupSource<T>& source, const StateView<T>& state,
         Workspace& workspace, const detail::AnyExecutor& executor) {
  using Group = LaneGroup<T>;
  const Index rows = source.block_rows;
  const Index n_blocks = count_cells(all.runs, rows);
  if (n_blocks == 0) return;
  detail::Carver count(nullptr);
  const Index room = round_up(n_blocks + 1, 64);  // rounded up, so that a growing cache seldom reallocates
  count.take<Place>(room), count.take<Index>(room);
  const auto tables = workspace.lease(count.used());
  detail::Carver carver(tables.data());
  Place* const places = carver.take<Place>(room);
  Index* const splits = carver.take<Index>(room);  // first block of each
  Index n_splits = 0, b = 0;
  for (const GridCell& cell : GridCells(all.runs, rows)) {
    if (b == 0 || cell.first / split_rows != places[b - 1].cell.first / split_rows) splits[n_splits++] = b;
    places[b++] = place_of(all.runs, rows, cell);
  }
  splits[n_splits] = n_blocks;

  const Index lanes = task.lanes();
  const Index group =
      std::min(group_lanes(source.prepares, executor.serial() ? n_blocks : n_splits), round_up(lanes, source.panel));
  const Index groups = (lanes + group - 1) / group, width = features(task) + Simd<T>::width;
  const auto lanes_of = [&](Index g) { return std::min(group, lanes - g * group); };
  const auto state_bytes = [&](Index n) {
    detail::Carver c(nullptr);
    c.take<T>(n), c.take<T>(n), c.take<T>(n * width);
    return c.used();
  };
  const auto state_at = [&](std::byte* base, Index n) {
    detail::Carver c(base);
    T* const m = c.take<T>(n);
    T* const l = c.take<T>(n);
    return LaneState<T>{m, l, c.take<T>(n * width), width};
  };
  const std::size_t own = source.bytes(group), part = state_bytes(group);
  const auto attend = [&](Group& lanes_at, Index s, const LaneState<T>& to) {
    lanes_at.attend(places + splits[s], splits[s + 1] - splits[s], s + 1 < n_splits ? places + splits[s + 1] : nullptr,
                    to);
  };
  // In any order of the groups, the splits of a lane are merged in ascending order: the same bits.
  if (executor.serial() && groups > 1 && groups <= most_groups_at_once && n_splits > 1) {
    // Split by split: the rows that one group has read are still in the cache for the next.
    const auto scratch = workspace.lease((own + part) * static_cast<std::size_t>(groups));
    std::array<Group*, std::size_t(most_groups_at_once)> all_groups{};
    const auto memory_of = [&](Index g) { return scratch.data() + (own + part) * static_cast<std::size_t>(g); };
    for (Index g = 0; g < groups; ++g) {
      Group& one = source.make(memory_of(g), g * group, lanes_of(g));
      one.load_queries();
      all_groups[static_cast<std::size_t>(g)] = &one;
    }
    for (Index s = 0; s < n_splits; ++s)
      for (Index g = 0; g < groups; ++g) {
        const LaneState<T> to = state_at(memory_of(g) + own, group);
        attend(*all_groups[static_cast<std::size_t>(g)], s, to);
        merge_lanes(task, to, g * group, lanes_of(g), state);
      }
    return;
  }
  if (executor.serial() || n_splits == 1 || groups >= n_splits * 4 ||
      static_cast<Index>(part) > most_partial_bytes / (groups * n_splits)) {
    executor(groups, [&](Index g) {
      const auto scratch = workspace.lease(own + part);
      Group& one = source.make(scratch.data(), g * group, lanes_of(g));
      one.load_queries();
      const LaneState<T> to = state_at(scratch.data() + own, group);
      for (Index s = 0; s < n_splits; ++s) {
        attend(one, s, to);
        merge_lanes(task, to, g * group, lanes_of(g), state);
      }
    });
    return;
  }
  const auto parts = workspace.lease(part * static_cast<std::size_t>(groups * n_splits));
  const auto part_of = [&](Index g, Index s) {
    return state_at(parts.data() + part * static_cast<std::size_t>(s * groups + g), group);
  };
  executor(groups * n_splits, [&](Index item) {
    const Index g = item % groups;
    const auto scratch = workspace.lease(own);
    Group& one = source.make(scratch.data(), g * group, lanes_of(g));
    one.load_queries();
    attend(one, item / groups, part_of(g, item / groups));
  });
  executor(groups, [&](Index g) {
    for (Index s = 0; s < n_splits; ++s) merge_lanes(task, part_of(g, s), g * group, lanes_of(g), state);
  });
}

/// Whether T has an absorbed kernel: float and double, unless a register is a single number.
template <class T>
inline constexpr bool serves = (std::is_same_v<T, float> || std::is_same_v<T, double>)&&Simd<T>::width >= 2;

/// Merges all rows into the state, in the arithmetic of the storage or exactly.
template <class T, StorageType S>
void run(const LaneTask<T>& task, const LatentRows<S>& rows, Arithmetic arithmetic, const StateView<T>& state,
         Workspace& workspace, const detail::AnyExecutor& executor) {
  const auto bytes_of = [](const LatentRun<S>& run) {
    return ByteRun{run.rows, run.position, reinterpret_cast<const std::byte*>(run.latent),
                   reinterpret_cast<const std::byte*>(run.rope)};
  };
  constexpr Index size = sizeof(S), rope_size = has_row_scale<S> ? sizeof(WideStorage<S>) : 0;  // else in the same row
  with_byte_runs(rows.runs, workspace, bytes_of, [&](std::span<const ByteRun> runs) {
    const ByteRows bytes{runs,
                         rows.rows,
                         0,
                         {rows.latent_row_stride * size, 0, rows.latent_dim * size},
                         {rows.rope_row_stride * rope_size, 0, rows.rope_dim * rope_size}};
    const auto in = [&]<class A>(std::type_identity<A>) {
      constexpr bool prepares = A::narrow || (!Shape<float>::wide && !std::is_same_v<T, S>);
      const BlockMaker<A> blocks = block_maker<A>(rows);
      const auto with = [&](const GroupSource<T>& source) { run(task, bytes, source, state, workspace, executor); };
      if constexpr (Simd<T>::width % Shape<T>::value_lanes == 0)
        if (task.lanes() <= Simd<T>::width) return with(GroupSourceOf<A, 1>(task, bytes, blocks, prepares));
      with(GroupSourceOf<A, 2>(task, bytes, blocks, prepares));
    };
    using Narrow = NarrowArithmetic<T, S>;
    if constexpr (Narrow::int8_keys)
      if (arithmetic == Arithmetic::int8) return in(std::type_identity<Int8>{});
    if constexpr (Narrow::narrow)
      if (arithmetic != Arithmetic::exact) return in(std::type_identity<Narrow>{});
    in(std::type_identity<Exact<T>>{});
  });
}

}}}  // namespace qkv::QKV_ABI::kernel::absorbed

// kernel/byte_rows.hpp — the rows of one sequence without their storage type.
//
// Loops over keys (grid, splits, prefetches) need addresses and strides, not the type of a number: they are compiled
// once for all storages. Only the code that multiplies rows is compiled for their type.
//
// Before: kernel/position_grid.hpp   Next: kernel/task.hpp
#pragma once

#include <cstddef>
#include <memory>
#include <span>

#include "../key_rows.hpp"
#include "../workspace.hpp"

namespace qkv { inline namespace QKV_ABI { namespace kernel {

/// Rows of one kv head at equal distances; all in bytes.
struct RowBytes {
  const std::byte* first = nullptr;
  Index stride = 0, count = 0, width = 0;

  RowBytes from(Index row, Index some) const { return {first + row * stride, stride, some, width}; }
  const std::byte* end() const { return first + count * stride; }
};

/// A KeyRun; keys and values of kv head 0.
struct ByteRun {
  Index rows = 0, position = 0;
  const std::byte *keys = nullptr, *values = nullptr;
};

/// A KeyRows, with strides and widths in bytes.
struct ByteRows {
  struct Layout {
    Index row_stride = 0, head_stride = 0, width = 0;
  };
  std::span<const ByteRun> runs;
  Index rows = 0, first_row = 0;
  Layout key, value;

  RowBytes keys(std::size_t run, Index kv_head, Index row, Index count) const {
    return {runs[run].keys + kv_head * key.head_stride + row * key.row_stride, key.row_stride, count, key.width};
  }
  RowBytes values(std::size_t run, Index kv_head, Index row, Index count) const {
    return {runs[run].values + kv_head * value.head_stride + row * value.row_stride, value.row_stride, count,
            value.width};
  }
};

/// Calls use(list) with bytes_of(run) of every run. The list exists during the call: on the stack where it is short.
template <class Run, class BytesOf, class Use>
void with_byte_runs(std::span<const Run> runs, Workspace& workspace, const BytesOf& bytes_of, const Use& use) {
  const auto list = [&](ByteRun* to) {
    std::size_t n = 0;
    for (const Run& run : runs) std::construct_at(to + n++, bytes_of(run));
    use(std::span<const ByteRun>(to, n));
  };
  ByteRun few[8];  // contiguous caches and rings have no more
  if (runs.size() <= std::size(few)) return list(few);
  const auto memory = workspace.lease(runs.size() * sizeof(ByteRun));
  list(reinterpret_cast<ByteRun*>(memory.data()));
}

/// Calls use(ByteRows) with these rows.
template <StorageType S, class Use>
void with_byte_rows(const KeyRows<S>& keys, Workspace& workspace, const Use& use) {
  constexpr auto size = static_cast<Index>(sizeof(S));
  const auto address = [&](const S* first, Index head_stride) {
    return reinterpret_cast<const std::byte*>(first == nullptr ? first : first + keys.first_kv_head * head_stride);
  };
  const auto bytes_of = [&](const KeyRun<S>& run) {
    return ByteRun{run.rows, run.position, address(run.keys, keys.key_head_stride),
                   address(run.values, keys.value_head_stride)};
  };
  with_byte_runs(keys.runs, workspace, bytes_of, [&](std::span<const ByteRun> runs) {
    use(ByteRows{runs,
                 keys.rows,
                 keys.first_row,
                 {keys.key_row_stride * size, keys.key_head_stride * size, keys.head_dim * size},
                 {keys.value_row_stride * size, keys.value_head_stride * size, keys.v_head_dim * size}});
  });
}

}}}  // namespace qkv::QKV_ABI::kernel

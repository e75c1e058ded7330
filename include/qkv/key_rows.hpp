// key_rows.hpp — a cache as kernels see it: runs of rows, and the position at which each run begins.
//
//     run 0: rows at positions 0 … 3         (pinned first tokens)      logical rows 0 … 3
//     run 1: rows at positions 96 … 127      (a page, a ring's tail)    logical rows 4 … 35
//     run 2: rows at positions 128 … 140                                logical rows 36 … 48
//
// Inside a run, row i of key/value head h begins at  keys + h·key_head_stride + i·key_row_stride  (elements), and its
// position is  position + i. Plain matrices, contiguous, ring and paged caches all have this form; no rows are copied.
// Positions ascend from 0 on, none twice; a call refuses other rows (checked for all but the library's own caches).
// Scales (int8 only) follow the same pattern with their own strides.
//
// Before: explain.hpp   Next: model_config.hpp
#pragma once

#include <span>

#include "heads.hpp"
#include "storage.hpp"

namespace qkv { inline namespace QKV_ABI {

/// Contiguous positions in equally strided rows.
template <StorageType S>
struct KeyRun {
  Index rows = 0;
  Index position = 0;  // of the first row
  const S* keys = nullptr;
  const S* values = nullptr;
  const float* key_scales = nullptr;  // int8 only
  const float* value_scales = nullptr;
};

/// All rows of one sequence: runs one after another.
template <StorageType S>
struct KeyRows {
  std::span<const KeyRun<S>> runs = {};
  Index rows = 0;       // sum over the runs
  Index first_row = 0;  // logical row of the first of them: not 0 where these are a part of a sequence's rows
  Index kv_heads = 1, head_dim = 0, v_head_dim = 0;
  Index first_kv_head = 0;                            // of the runs' heads: not 0 where these are only some of them
  Index key_row_stride = 0, key_head_stride = 0;      // elements
  Index value_row_stride = 0, value_head_stride = 0;  // elements
  Index scale_row_stride = 0, scale_head_stride = 0;  // floats

  const S* key(const KeyRun<S>& run, Index kv_head, Index row) const {
    return run.keys + (first_kv_head + kv_head) * key_head_stride + row * key_row_stride;
  }
  const S* value(const KeyRun<S>& run, Index kv_head, Index row) const {
    return run.values + (first_kv_head + kv_head) * value_head_stride + row * value_row_stride;
  }
  float key_scale(const KeyRun<S>& run, Index kv_head, Index row) const {
    return has_row_scale<S> ? run.key_scales[scale_at(kv_head, row)] : 1.0F;
  }
  float value_scale(const KeyRun<S>& run, Index kv_head, Index row) const {
    return has_row_scale<S> ? run.value_scales[scale_at(kv_head, row)] : 1.0F;
  }
  /// Index of a row's scales in key_scales and value_scales.
  Index scale_at(Index kv_head, Index row) const {
    return (first_kv_head + kv_head) * scale_head_stride + row * scale_row_stride;
  }
};

namespace detail {

/// Caches whose runs are known to be in order, and in memory that no output can share. Runs of all other types, derived
/// ones included, are checked once per call: 6 µs for 2,048 pages.
template <class C>
inline constexpr bool owns_rows = false;

}  // namespace detail

/// The one run of a plain k [n_keys, kv_heads·head_dim] and v [n_keys, kv_heads·v_head_dim], positions 0 … n_keys-1.
template <StorageType S>
KeyRun<S> key_run(const ConstView<S>& k, const ConstView<S>& v) {
  return {.rows = k.rows(), .position = 0, .keys = k.data(), .values = v.data()};
}

/// The rows of plain matrices; `run` must outlive the result.
template <StorageType S>
KeyRows<S> key_rows(const KeyRun<S>& run, const ConstView<S>& k, const ConstView<S>& v, Index kv_heads) {
  const Index head_dim = k.cols() / kv_heads, v_head_dim = v.cols() / kv_heads;
  return {.runs = {&run, 1},
          .rows = k.rows(),
          .kv_heads = kv_heads,
          .head_dim = head_dim,
          .v_head_dim = v_head_dim,
          .key_row_stride = k.outerStride(),
          .key_head_stride = head_dim,
          .value_row_stride = v.outerStride(),
          .value_head_stride = v_head_dim};
}

}}  // namespace qkv::QKV_ABI

// cache/blocks.hpp — the memory under the caches: blocks of rows, [kv_head][token][head_dim] in each.
//
//     block 0                                    block 1 …
//     head 0: row 0, row 1, … row block_rows-1   head 0: …
//     head 1: row 0, …                           head 1: …
//
// The rows of one head are contiguous, so a kernel reads memory in order. Keys, values and (int8) their scales are four
// arrays without padding.
//
// Before: layer/ring_positions.hpp   Next: cache/context_shift.hpp
#pragma once

#include <algorithm>
#include <memory>
#include <span>
#include <type_traits>

#include "../base/huge_pages.hpp"
#include "../key_rows.hpp"
#include "../workspace.hpp"

namespace qkv { inline namespace QKV_ABI { namespace detail {

struct CacheFile;  // cache/file.hpp

/// Heads and features of a row.
struct CacheShape {
  Index kv_heads = 1, head_dim = 0, v_head_dim = 0;
};

/// Refuses rows whose numbers or bytes, of 16 a number and with scales, do not fit an Index: products of them are
/// unchecked.
inline void check(const CacheShape& shape) {
  require(shape.kv_heads >= 1 && shape.head_dim >= 1 && shape.v_head_dim >= 1,
          "a cache needs kv_heads, head_dim and v_head_dim >= 1; given ", shape.kv_heads, ", ", shape.head_dim, ", ",
          shape.v_head_dim);
  checked_product(32, checked_product(shape.kv_heads, checked_sum(shape.head_dim, shape.v_head_dim)));
}

/// The scalar to which numbers of storage S are converted by default.
template <StorageType S>
using ReadAs = std::conditional_t<std::is_floating_point_v<S>, S, float>;

/// n numbers, uninitialised: a row is written before it is read. In huge pages where they are many.
template <class T>
class Numbers {
  using Allocator = HugePageAllocator<T>;
  struct Delete {
    std::size_t n = 0;
    void operator()(T* p) const { Allocator().deallocate(p, n); }
  };

 public:
  Numbers() = default;
  explicit Numbers(Index n) {
    checked_product(n, static_cast<Index>(sizeof(T)));
    const auto count = static_cast<std::size_t>(n);
    if (n > 0) memory_ = std::unique_ptr<T, Delete>(Allocator().allocate(count), Delete{count});
  }
  T* data() const { return memory_.get(); }
  Index bytes() const { return memory_ ? static_cast<Index>(memory_.get_deleter().n * sizeof(T)) : 0; }

 private:
  std::unique_ptr<T, Delete> memory_;
};

/// The keys of rows as appended, [row][head][width], and by how many positions context shifts have rotated each row
/// since. A row rotated by 0 is its own original, and has no copy here.
template <StorageType S>
class UnrotatedKeys {
 public:
  UnrotatedKeys() = default;
  UnrotatedKeys(Index heads, Index width, Index rows)
      : heads_(heads),
        width_(width),
        rows_(rows),
        keys_(checked_product(rows, checked_product(heads, width))),
        scales_(has_row_scale<S> ? rows * heads : 0),
        rotated_by_(rows) {
    forget(0, rows);
  }

  explicit operator bool() const { return rotated_by_.data() != nullptr; }
  Index bytes() const { return keys_.bytes() + scales_.bytes() + rotated_by_.bytes(); }

  Index rotated_by(Index row) const { return *this ? rotated_by_.data()[row] : 0; }
  const S* key(Index row, Index head) const { return keys_.data() + (row * heads_ + head) * width_; }
  float scale(Index row, Index head) const { return has_row_scale<S> ? scales_.data()[row * heads_ + head] : 1.0F; }

  /// These rows have been overwritten.
  void forget(Index row, Index rows) const {
    if (*this) std::fill_n(rotated_by_.data() + row, rows, 0);
  }
  /// Keeps one head of a key as appended, for row `row`, which is now rotated by `rotated_by` positions.
  void keep(Index row, Index head, const S* key, [[maybe_unused]] float scale, Index rotated_by) const {
    std::copy_n(key, width_, keys_.data() + (row * heads_ + head) * width_);
    if constexpr (has_row_scale<S>) scales_.data()[row * heads_ + head] = scale;
    rotated_by_.data()[row] = rotated_by;
  }
  /// The same from a copy in `other`, which may be *this.
  void copy_row(const UnrotatedKeys& other, Index from, Index to, Index rotated_by) const {
    for (Index head = 0; rotated_by > 0 && head < heads_; ++head)
      keep(to, head, other.key(from, head), other.scale(from, head), rotated_by);
    rotated_by_.data()[to] = rotated_by;
  }
  /// Copies rows of `other`, which may be *this. Allocates where `other` has copies and this has no memory yet.
  void copy_rows(const UnrotatedKeys& other, Index from, Index to, Index rows) {
    if (!other) return forget(to, rows);
    if (!*this) *this = UnrotatedKeys(other.heads_, other.width_, other.rows_);
    for (Index i = 0; i < rows; ++i) copy_row(other, from + i, to + i, other.rotated_by(from + i));
  }

 private:
  Index heads_ = 0, width_ = 0, rows_ = 0;
  Numbers<S> keys_;
  Numbers<float> scales_;
  Numbers<Index> rotated_by_;
};

/// `blocks` blocks of `block_rows` rows.
template <StorageType S>
class CacheBlocks {
 public:
  CacheBlocks() = default;
  CacheBlocks(const CacheShape& shape, Index block_rows, Index blocks)
      : shape_(shape), block_rows_(block_rows), blocks_(blocks) {
    const Index rows = checked_product(shape.kv_heads, checked_product(block_rows, blocks));  // of one head
    keys_ = Numbers<S>(checked_product(rows, shape.head_dim));
    values_ = Numbers<S>(checked_product(rows, shape.v_head_dim));
    key_scales_ = Numbers<float>(has_row_scale<S> ? rows : 0);
    value_scales_ = Numbers<float>(has_row_scale<S> ? rows : 0);
  }

  Index bytes() const { return keys_.bytes() + values_.bytes() + key_scales_.bytes() + value_scales_.bytes(); }

  const CacheShape& shape() const { return shape_; }
  const S* key(Index block, Index row, Index head) const {
    return keys_.data() + (head_row(block, head) + row) * shape_.head_dim;
  }
  float key_scale(Index block, Index row, Index head) const {
    return has_row_scale<S> ? key_scales_.data()[head_row(block, head) + row] : 1.0F;
  }

  /// Keys as appended, once memory for them is allocated; the index of a row in them.
  const UnrotatedKeys<S>& unrotated() const { return unrotated_; }
  Index unrotated_row(Index block, Index row) const { return block * block_rows_ + row; }
  void keep_unrotated() {
    if (!unrotated_) unrotated_ = UnrotatedKeys<S>(shape_.kv_heads, shape_.head_dim, blocks_ * block_rows_);
  }

  /// Writes row `row` of block `block` from k [kv_heads·head_dim] and v [kv_heads·v_head_dim].
  template <class K, class V>
  void store(Index block, Index row, const K* k, const V* v) {
    unrotated_.forget(unrotated_row(block, row), 1);
    for (Index head = 0; head < shape_.kv_heads; ++head) {
      const Index at = head_row(block, head) + row;
      store_row(k + head * shape_.head_dim, shape_.head_dim, keys_.data() + at * shape_.head_dim,
                scale(key_scales_, at));
      store_row(v + head * shape_.v_head_dim, shape_.v_head_dim, values_.data() + at * shape_.v_head_dim,
                scale(value_scales_, at));
    }
  }

  /// Stores keys k [kv_heads·head_dim] in row `row` of a block, with the values of row `from` of a block of `other`,
  /// which may be *this: same bytes.
  template <class K>
  void store_keys(Index block, Index row, const K* k, const CacheBlocks& other, Index from_block, Index from) {
    for (Index head = 0; head < shape_.kv_heads; ++head) {
      const Index to = head_row(block, head) + row, source = other.head_row(from_block, head) + from;
      store_row(k + head * shape_.head_dim, shape_.head_dim, keys_.data() + to * shape_.head_dim,
                scale(key_scales_, to));
      std::copy_n(other.values_.data() + source * shape_.v_head_dim, shape_.v_head_dim,
                  values_.data() + to * shape_.v_head_dim);
      if constexpr (has_row_scale<S>) value_scales_.data()[to] = other.value_scales_.data()[source];
    }
  }

  /// Copies `rows` rows of a block of `other`, which may be *this, from row from_row on to a block of this one, from
  /// row to_row on: same bytes.
  void copy_rows(const CacheBlocks& other, Index from_block, Index from_row, Index to_block, Index to_row, Index rows) {
    unrotated_.copy_rows(other.unrotated_, other.unrotated_row(from_block, from_row), unrotated_row(to_block, to_row),
                         rows);
    for (Index head = 0; head < shape_.kv_heads; ++head) {
      const Index from = other.head_row(from_block, head) + from_row, to = head_row(to_block, head) + to_row;
      const auto copy = [&](auto* out, const auto* in, Index width) {
        std::copy_n(in + from * width, rows * width, out + to * width);
      };
      copy(keys_.data(), other.keys_.data(), shape_.head_dim);
      copy(values_.data(), other.values_.data(), shape_.v_head_dim);
      if constexpr (has_row_scale<S>) {
        copy(key_scales_.data(), other.key_scales_.data(), 1);
        copy(value_scales_.data(), other.value_scales_.data(), 1);
      }
    }
  }

  /// Calls f(array, n) for the numbers of rows `row` … row+rows-1 of a block, array by array.
  template <class F>
  void for_each_array(Index block, Index row, Index rows, F&& f) const {
    for (Index head = 0; head < shape_.kv_heads; ++head) {
      const Index at = head_row(block, head) + row;
      f(keys_.data() + at * shape_.head_dim, rows * shape_.head_dim);
      f(values_.data() + at * shape_.v_head_dim, rows * shape_.v_head_dim);
      if constexpr (has_row_scale<S>) f(key_scales_.data() + at, rows), f(value_scales_.data() + at, rows);
    }
  }

  /// Rows `row` … row+rows-1 of a block, as a run.
  KeyRun<S> run(Index block, Index row, Index rows, Index position) const {
    const Index at = head_row(block, 0) + row;
    KeyRun<S> run{.rows = rows,
                  .position = position,
                  .keys = keys_.data() + at * shape_.head_dim,
                  .values = values_.data() + at * shape_.v_head_dim};
    if constexpr (has_row_scale<S>) {
      run.key_scales = key_scales_.data() + at;
      run.value_scales = value_scales_.data() + at;
    }
    return run;
  }

 private:
  static float* scale(const Numbers<float>& scales, Index at) {
    return has_row_scale<S> ? scales.data() + at : nullptr;
  }
  Index head_row(Index block, Index head) const { return (block * shape_.kv_heads + head) * block_rows_; }

  CacheShape shape_;
  Index block_rows_ = 0, blocks_ = 0;
  Numbers<S> keys_, values_;
  Numbers<float> key_scales_, value_scales_;
  UnrotatedKeys<S> unrotated_;
};

/// The rows of a cache whose blocks have `block_rows` rows: its runs, and the strides that follow from it.
template <StorageType S>
KeyRows<S> key_rows_of(const CacheShape& shape, Index block_rows, std::span<const KeyRun<S>> runs, Index rows) {
  return {.runs = runs,
          .rows = rows,
          .kv_heads = shape.kv_heads,
          .head_dim = shape.head_dim,
          .v_head_dim = shape.v_head_dim,
          .key_row_stride = shape.head_dim,
          .key_head_stride = block_rows * shape.head_dim,
          .value_row_stride = shape.v_head_dim,
          .value_head_stride = block_rows * shape.v_head_dim,
          .scale_row_stride = 1,
          .scale_head_stride = block_rows};
}

/// Shapes of an append; raises unless k and v are n rows of `shape`.
template <MatrixLike K, MatrixLike V>
void check_rows(const CacheShape& shape, const K& k, const V& v) {
  require(k.rows() == v.rows() && k.cols() == shape.kv_heads * shape.head_dim &&
              v.cols() == shape.kv_heads * shape.v_head_dim,
          "a cache takes k [n, kv_heads*head_dim] and v [n, kv_heads*v_head_dim]; given k ", Shape{k.rows(), k.cols()},
          ", v ", Shape{v.rows(), v.cols()}, " for kv_heads ", shape.kv_heads, ", head_dim ", shape.head_dim,
          ", v_head_dim ", shape.v_head_dim);
}

/// All keys (or values) as one matrix, [rows, kv_heads·width], in ascending position.
template <class T, bool Values, StorageType S>
Matrix<T> load_all(const KeyRows<S>& all) {
  const Index width = Values ? all.v_head_dim : all.head_dim;
  Matrix<T> out(all.rows, all.kv_heads * width);
  Index first = 0;
  for (const KeyRun<S>& run : all.runs) {
    for (Index row = 0; row < run.rows; ++row)
      for (Index head = 0; head < all.kv_heads; ++head) {
        T* to = out.data() + (first + row) * out.cols() + head * width;
        if constexpr (Values)
          load_row(all.value(run, head, row), width, all.value_scale(run, head, row), to);
        else
          load_row(all.key(run, head, row), width, all.key_scale(run, head, row), to);
      }
    first += run.rows;
  }
  return out;
}

}}}  // namespace qkv::QKV_ABI::detail

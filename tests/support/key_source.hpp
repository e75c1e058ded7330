// support/key_source.hpp — keys and values as a cache might hold them: pages anywhere in a buffer, gaps between them.
#pragma once

#include <qkv/key_rows.hpp>

#include <algorithm>
#include <limits>
#include <numeric>
#include <random>
#include <vector>

#include "numbers.hpp"

namespace support {

/// Rows [first, first + rows) of the logical keys, which stand at positions position, position + 1, …
struct Page {
  Index rows, position;
};

/// Pages lie in a permuted order in one [kv_head][slot][dim] buffer with room between rows, heads and pages; what is not
/// a row is NaN (int8: 127 with a scale of NaN).
template <qkv::StorageType S>
class PagedKeys {
 public:
  template <class T>
  PagedKeys(const qkv::Matrix<T>& k, const qkv::Matrix<T>& v, Index kv_heads, const std::vector<Page>& pages,
            std::uint64_t seed = 5)
      : kv_heads_(kv_heads), head_dim_(k.cols() / kv_heads), v_head_dim_(v.cols() / kv_heads), rows_(k.rows()) {
    const Index gap = 3;  // rows of poison before each page
    Index slots = gap;
    for (const Page& page : pages) slots += page.rows + gap;
    key_row_ = head_dim_ + 2, value_row_ = v_head_dim_ + 5;
    slots_ = slots;
    keys_.assign(static_cast<std::size_t>(kv_heads * slots * key_row_), poison());
    values_.assign(static_cast<std::size_t>(kv_heads * slots * value_row_), poison());
    scales_.assign(static_cast<std::size_t>(2 * kv_heads * slots), std::numeric_limits<float>::quiet_NaN());

    std::vector<std::size_t> order(pages.size());
    std::iota(order.begin(), order.end(), std::size_t{0});
    std::shuffle(order.begin(), order.end(), std::mt19937_64(seed));
    std::vector<Index> logical(pages.size());
    for (std::size_t p = 1; p < pages.size(); ++p) logical[p] = logical[p - 1] + pages[p - 1].rows;
    runs_.resize(pages.size());
    Index slot = gap;
    for (const std::size_t p : order) {
      for (Index i = 0; i < pages[p].rows; ++i)
        for (Index h = 0; h < kv_heads; ++h) {
          const Index row = logical[p] + i, at = h * slots_ + slot + i;
          qkv::store_row(k.data() + row * k.cols() + h * head_dim_, head_dim_, keys_.data() + at * key_row_,
                         scales_.data() + at);
          qkv::store_row(v.data() + row * v.cols() + h * v_head_dim_, v_head_dim_, values_.data() + at * value_row_,
                         scales_.data() + kv_heads * slots_ + at);
        }
      runs_[p] = {.rows = pages[p].rows,
                  .position = pages[p].position,
                  .keys = keys_.data() + slot * key_row_,
                  .values = values_.data() + slot * value_row_,
                  .key_scales = scales_.data() + slot,
                  .value_scales = scales_.data() + kv_heads * slots_ + slot};
      slot += pages[p].rows + gap;
    }
  }
  PagedKeys(const PagedKeys&) = delete;  // the runs point into the buffers
  PagedKeys& operator=(const PagedKeys&) = delete;

  qkv::KeyRows<S> key_rows() const {
    return {.runs = runs_,
            .rows = rows_,
            .kv_heads = kv_heads_,
            .head_dim = head_dim_,
            .v_head_dim = v_head_dim_,
            .key_row_stride = key_row_,
            .key_head_stride = slots_ * key_row_,
            .value_row_stride = value_row_,
            .value_head_stride = slots_ * value_row_,
            .scale_row_stride = 1,
            .scale_head_stride = slots_};
  }

 private:
  static S poison() {
    if constexpr (qkv::has_row_scale<S>)
      return static_cast<S>(qkv::storage_traits<S>.largest);
    else
      return static_cast<S>(std::numeric_limits<float>::quiet_NaN());
  }

  Index kv_heads_, head_dim_, v_head_dim_, rows_;
  Index key_row_ = 0, value_row_ = 0, slots_ = 0;
  std::vector<S> keys_, values_;
  std::vector<float> scales_;
  std::vector<qkv::KeyRun<S>> runs_;
};

/// Pages of these sizes, again and again, until n rows stand one after another from position 0.
inline std::vector<Page> consecutive_pages(Index n, const std::vector<Index>& sizes) {
  std::vector<Page> pages;
  for (Index at = 0, i = 0; at < n; ++i) {
    const Index rows = std::min(sizes[static_cast<std::size_t>(i) % sizes.size()], n - at);
    pages.push_back({rows, at});
    at += rows;
  }
  return pages;
}

}  // namespace support

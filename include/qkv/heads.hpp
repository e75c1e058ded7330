// heads.hpp — many heads in one matrix: head h of q is the column block [h·head_dim, (h+1)·head_dim).
//
// MHA, GQA and MQA differ in one number: how many key/value heads the query heads share,
//
//     kv_head(h) = h / (heads / kv_heads)          MHA: kv_heads = heads   GQA: 1 < kv_heads < heads   MQA: kv_heads = 1
//
// Keys and values are never expanded; `repeat_kv_heads` does it for teaching and for tests.
// GQA: Ainslie et al. 2023, arXiv:2305.13245. MQA: Shazeer 2019, arXiv:1911.02150.
//
// Before: projection.hpp   Next: mask_protocol.hpp
#pragma once

#include "matrix.hpp"

namespace qkv { inline namespace QKV_ABI {

struct Heads {
  Index heads = 1;
  Index kv_heads = heads;

  constexpr Index group_size() const { return heads / kv_heads; }            // query heads per key/value head
  constexpr Index kv_head(Index head) const { return head / group_size(); }  // whose keys this head reads
  friend constexpr bool operator==(const Heads&, const Heads&) = default;
};

/// Throws unless heads >= 1, kv_heads >= 1 and kv_heads divides heads.
inline void check(Heads h) {
  detail::require(h.heads >= 1 && h.kv_heads >= 1 && h.heads % h.kv_heads == 0,
                  "heads must be a positive multiple of kv_heads; given heads ", h.heads, ", kv_heads ", h.kv_heads);
}

/// Columns of head `head` out of `heads` equal column blocks: a view, [rows, cols / heads].
template <MatrixLike X>
auto head_columns(X&& x, Index head, Index heads) {
  detail::require(heads >= 1 && x.cols() % heads == 0 && head >= 0 && head < heads, "head ", head, " of ", heads,
                  " needs 0 <= head < heads and a number of columns that heads divides; the matrix is ",
                  detail::Shape{x.rows(), x.cols()});
  const Index width = x.cols() / heads;
  return x.middleCols(head * width, width);
}

template <detail::DyingMatrix X>
void head_columns(X&& x, Index head, Index heads) = delete;  // a view: the matrix must outlive it

/// [n_keys, kv_heads·d] -> [n_keys, heads·d]: every key/value head repeated group_size() times in place
/// (repeat-interleave). What GQA never has to do; MHA on the result equals GQA on x.
template <MatrixLike X>
Matrix<ScalarOf<X>> repeat_kv_heads(const X& x, Heads h) {
  check(h);
  detail::require(x.cols() % h.kv_heads == 0, "kv_heads ", h.kv_heads, " must divide the columns of ",
                  detail::Shape{x.rows(), x.cols()});
  const Index width = x.cols() / h.kv_heads;
  Matrix<ScalarOf<X>> out(x.rows(), detail::checked_product(h.heads, width));
  for (Index head = 0; head < h.heads && out.size() > 0; ++head)
    out.middleCols(head * width, width) = x.middleCols(h.kv_head(head) * width, width);
  return out;
}

}}  // namespace qkv::QKV_ABI

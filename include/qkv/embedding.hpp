// embedding.hpp — text enters as token ids; row id of a table is the token's vector.
//
//     x_i = E[id_i]              E [vocabulary, model_dim]   ids [n]   ->   x [n, model_dim]
//     logits = x·Eᵀ              the same table as output head ("tied"): [n, model_dim] -> [n, vocabulary]
//
// The vector of a word is the same in every sentence; telling two meanings of it apart is what attention is for.
// Tied heads: Press & Wolf 2017, arXiv:1608.05859.
//
// Before: storage.hpp   Next: position.hpp
#pragma once

#include <cstdint>
#include <span>
#include <utility>

#include "base/overlap.hpp"
#include "matrix.hpp"
#include "product/tied_product.hpp"

namespace qkv { inline namespace QKV_ABI {

namespace detail {

template <class Id, MatrixLike Out, MatrixLike Table>
void embed_rows(Out&& out, const Table& table, std::span<const Id> ids) {
  const auto n = static_cast<Index>(ids.size());
  require(out.rows() == n && out.cols() == table.cols(), "embedding ", n, " ids in a table ",
          Shape{table.rows(), table.cols()}, " gives [ids, model_dim]; out is ", Shape{out.rows(), out.cols()});
  for (std::size_t i = 0; i < ids.size(); ++i)
    require(ids[i] >= 0 && ids[i] < table.rows(), "a token id must satisfy 0 <= id < vocabulary; id ", ids[i],
            " stands at place ", i, ", the vocabulary is ", table.rows());
  require_disjoint(out, table, "table");
  auto rows = writable_view(out);
  for (Index i = 0; i < n; ++i) rows.row(i) = table.row(static_cast<Index>(ids[static_cast<std::size_t>(i)]));
}

}  // namespace detail

/// Rows of table [vocabulary, model_dim] by token id: [ids, model_dim]. Throws, before it writes, on an id outside the
/// vocabulary. `out` must not overlap the table. Allocates nothing.
template <MatrixLike Out, MatrixLike Table>
void embed_into(Out&& out, const Table& table, std::span<const std::int32_t> ids) {
  detail::embed_rows(out, table, ids);
}
template <MatrixLike Out, MatrixLike Table>
void embed_into(Out&& out, const Table& table, std::span<const std::int64_t> ids) {
  detail::embed_rows(out, table, ids);
}

/// The same as a new matrix.
template <MatrixLike Table>
Matrix<ScalarOf<Table>> embed(const Table& table, std::span<const std::int32_t> ids) {
  Matrix<ScalarOf<Table>> out(static_cast<Index>(ids.size()), table.cols());
  embed_into(out, table, ids);
  return out;
}
template <MatrixLike Table>
Matrix<ScalarOf<Table>> embed(const Table& table, std::span<const std::int64_t> ids) {
  Matrix<ScalarOf<Table>> out(static_cast<Index>(ids.size()), table.cols());
  embed_into(out, table, ids);
  return out;
}

/// A token table, used at both ends of a model.
template <class T>
class Embedding {
 public:
  /// table [vocabulary, model_dim].
  explicit Embedding(Matrix<T> table) : table_(std::move(table)) {}

  Index vocabulary() const { return table_.rows(); }
  Index model_dim() const { return table_.cols(); }
  const Matrix<T>& table() const { return table_; }

  /// ids [n], 32 or 64 bits -> [n, model_dim].
  Matrix<T> forward(std::span<const std::int32_t> ids) const { return embed(table_, ids); }
  Matrix<T> forward(std::span<const std::int64_t> ids) const { return embed(table_, ids); }
  template <MatrixLike Out>
  void forward_into(Out&& out, std::span<const std::int32_t> ids) const {
    embed_into(out, table_, ids);
  }
  template <MatrixLike Out>
  void forward_into(Out&& out, std::span<const std::int64_t> ids) const {
    embed_into(out, table_, ids);
  }

  /// x [n, model_dim] -> x·Eᵀ [n, vocabulary]: one score per token of the vocabulary. The bits of a row do not depend on
  /// the number of rows. Projection<T>::from_out_in(table()) gives the same bits, faster, for a packed copy of the table.
  template <MatrixLike X>
  Matrix<T> logits(const X& x) const {
    Matrix<T> out(x.rows(), vocabulary());
    logits_into(out, viewable(x));
    return out;
  }

  /// The same into out [n, vocabulary], which must not overlap x. Allocates nothing.
  template <MatrixLike Out, MatrixLike X>
  void logits_into(Out&& out, const X& x) const {
    detail::require(x.cols() == model_dim() && out.rows() == x.rows() && out.cols() == vocabulary(),
                    "logits take x [n, model_dim] to out [n, vocabulary] with a table ",
                    detail::Shape{vocabulary(), model_dim()}, "; x is ", detail::Shape{x.rows(), x.cols()}, ", out is ",
                    detail::Shape{out.rows(), out.cols()});
    detail::require_disjoint(out, x, "x");
    detail::chain_product<T>(writable_view(out), view(x), view(table_));
  }

 private:
  Matrix<T> table_;  // [vocabulary, model_dim]
};

}}  // namespace qkv::QKV_ABI

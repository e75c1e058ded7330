// matrix.hpp — what a matrix is in this library: tokens are rows, features are columns, row-major.
//
// Heads are column blocks, exactly what x·W gives, so two dimensions suffice:
//
//     q    [n_queries, heads·head_dim]            k  [n_keys, kv_heads·head_dim]
//     out  [n_queries, heads·v_head_dim]          v  [n_keys, kv_heads·v_head_dim]
//
// Vocabulary, used everywhere and nothing else:
//
//     n_queries, n_keys   query tokens, key tokens                        position   where a token stands in its sequence
//     model_dim           features of a token between layers              heads      query heads
//     kv_heads            key/value heads (GQA: fewer than heads)         head_dim   features of one query or key head
//     v_head_dim          features of one value head                      latent_dim     MLA's cached latent (kv_lora_rank)
//     q_latent_dim        MLA's query latent (q_lora_rank)                nope_dim, rope_dim   MLA's two parts of a key
//
// Value-returning functions take any Eigen expression (another storage order is copied). `*_into` functions take strict
// views: any row stride, unit inner stride; any other order is a compile error, never a silent copy.
//
// Before: version.hpp   Next: storage.hpp
#pragma once

#include <concepts>
#include <cstddef>
#include <cstdint>
#include <span>
#include <type_traits>

#include "base/require.hpp"
#include "version.hpp"

namespace qkv { inline namespace QKV_ABI {

using Index = Eigen::Index;

template <class T>
using Matrix = Eigen::Matrix<T, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;  // [tokens, features]

template <class T>
using RowVector = Eigen::Matrix<T, 1, Eigen::Dynamic>;  // [features]: a bias, a gain

/// A view of someone else's rows: any distance between rows, unit distance inside a row.
template <class T>
using View = Eigen::Map<Matrix<T>, Eigen::Unaligned, Eigen::OuterStride<>>;
template <class T>
using ConstView = Eigen::Map<const Matrix<T>, Eigen::Unaligned, Eigen::OuterStride<>>;

namespace detail {
template <class Derived>
void accept_dense(const Eigen::DenseBase<Derived>&);  // never called
}  // namespace detail

/// Any dense Eigen matrix, array, block, map, reference or expression. (Tested by a call and not by is_base_of: the base
/// of a segment names the block that it derives from.)
template <class X>
concept MatrixLike = requires(const std::remove_cvref_t<X>& x) {
  detail::accept_dense(x);
};

template <MatrixLike X>
using ScalarOf = typename std::remove_cvref_t<X>::Scalar;

/// True where an Eigen type is row-major memory with unit inner stride: it can be viewed without a copy.
template <MatrixLike X>
inline constexpr bool is_viewable = [] {
  using Plain = std::remove_cvref_t<X>;
  if constexpr ((Plain::Flags & Eigen::DirectAccessBit) == 0)
    return false;
  else
    return Plain::ColsAtCompileTime == 1 || (bool(Plain::IsRowMajor) && Plain::InnerStrideAtCompileTime == 1);
}();

/// … and where it may be written too: neither const nor a view of something const.
template <class X>
inline constexpr bool is_writable = [] {
  if constexpr (!MatrixLike<X> || std::is_const_v<std::remove_reference_t<X>>)
    return false;
  else
    return is_viewable<X> && (std::remove_cvref_t<X>::Flags & Eigen::LvalueBit) != 0;
}();

namespace detail {

template <class Derived>
void accept_owner(const Eigen::PlainObjectBase<Derived>&);  // never called

/// A temporary that owns its elements: a view of it would dangle.
template <class X>
concept DyingMatrix = MatrixLike<X> && !std::is_lvalue_reference_v<X> && requires(const std::remove_cvref_t<X>& x) {
  detail::accept_owner(x);
};
/// A map, or a part of one: it looks at memory that is someone else's, even where it is a temporary itself.
template <class X>
inline constexpr bool looks_elsewhere = false;
template <class X, int Options, class Stride>
inline constexpr bool looks_elsewhere<Eigen::Map<X, Options, Stride>> = true;
template <class X, int Rows, int Columns, bool Inner>
inline constexpr bool looks_elsewhere<Eigen::Block<X, Rows, Columns, Inner>> = looks_elsewhere<std::remove_const_t<X>>;
template <class X, int Size>
inline constexpr bool looks_elsewhere<Eigen::VectorBlock<X, Size>> = looks_elsewhere<std::remove_const_t<X>>;

/// A temporary that owns its elements, or may (an expression, a Ref): an operand that would dangle. m.topRows(2) and
/// f().topRows(2) have one type, so both are rejected; write std::as_const(m).topRows(2), a const temporary. Not caught: parts
/// of a const temporary, such as eval() returns, which have that type too.
template <class X>
concept DyingOperand = DyingMatrix<X> ||
    (MatrixLike<X> && !std::is_lvalue_reference_v<X> && !std::is_const_v<X> && !looks_elsewhere<X>);

template <class X, std::size_t N>
void accept_span(const std::span<X, N>&);  // never called

/// A temporary vector or array of X: a span of it would dangle. (A span that is a temporary itself only looks.)
template <class R, class X>
concept DyingRange = !std::is_lvalue_reference_v<R> && std::convertible_to<R, std::span<const X>> &&
                     !requires(const std::remove_cvref_t<R>& range) {
  detail::accept_span(range);
};
template <class R, class X>
concept LastingRange = std::convertible_to<R, std::span<const X>> && !DyingRange<R, X>;

/// Elements from one row to the next.
template <MatrixLike X>
Index row_stride(const X& x) {
  return std::remove_cvref_t<X>::IsRowMajor ? x.outerStride() : x.innerStride();
}

/// Raises where one row of an output would overwrite another: a Map may have any stride, 0 and negative ones too.
template <MatrixLike X>
void require_rows_apart(const X& out) {
  const Index stride = row_stride(out.derived()), cols = out.cols();
  require(out.rows() <= 1 || stride >= cols || stride <= -cols, "the rows of an output must not share elements; it is ",
          Shape{out.rows(), cols}, " with ", stride, " elements from row to row");
}

}  // namespace detail

/// Views x without copying. Compile error where x is not row-major with unit inner stride.
template <MatrixLike X>
ConstView<ScalarOf<X>> view(const X& x) {
  static_assert(is_viewable<X>,
                "qkv: *_into functions and views need row-major memory with unit inner stride (qkv::Matrix<T>, its row "
                "and column blocks, an Eigen::Map of either); copy a column-major matrix or an expression into a "
                "qkv::Matrix<T> first");
  return {x.derived().data(), x.rows(), x.cols(), Eigen::OuterStride<>(detail::row_stride(x.derived()))};
}
template <detail::DyingMatrix X>
ConstView<ScalarOf<X>> view(X&&) = delete;  // the matrix must outlive its view

/// The same for something to be written. Throws where its rows share elements.
template <MatrixLike X>
View<ScalarOf<X>> writable_view(X&& x) {
  static_assert(is_viewable<X>,
                "qkv: an output must be row-major memory with unit inner stride (qkv::Matrix<T>, its row and column "
                "blocks, an Eigen::Map of either)");
  static_assert(!is_viewable<X> || is_writable<X>, "qkv: an output must be writable, not const");
  detail::require_rows_apart(x);
  return {const_cast<ScalarOf<X>*>(x.derived().data()), x.rows(), x.cols(),
          Eigen::OuterStride<>(detail::row_stride(x.derived()))};
}

/// x itself where it can be viewed, otherwise a row-major copy. Keep the result alive while viewing it.
template <MatrixLike X>
decltype(auto) viewable(const X& x) {
  if constexpr (is_viewable<X>)
    return (x);
  else
    return Matrix<ScalarOf<X>>(x);
}

}}  // namespace qkv::QKV_ABI

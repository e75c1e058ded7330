// kernel/task.hpp — the input of every kernel, the attention of one sequence; and its output, the softmax state.
//
// What kernels call what they work on:
//
//     run        rows of the cache at one stride              block     keys that are packed or prepared together
//     cell       one step of the position grid                chunk     decode's cell: its scores lie in scratch
//     piece      the part of a cell that lies in one run      split     keys of one partial state, merged in order;
//     key        the count of a row from the sequence's         section   the tiled kernel's
//                first, whatever run holds it                 panel     registers of queries side by side
//     lane       one number of a register: a query, or a      tile      the accumulators of one inner loop
//                head, whose scores never mix with others'    word      32 bits of narrow numbers
//
// Before: kernel/byte_rows.hpp   Next: kernel/reference.hpp
#pragma once

#include <algorithm>

#include "../heads.hpp"
#include "../key_rows.hpp"
#include "../options.hpp"
#include "../softmax.hpp"
#include "byte_rows.hpp"
#include "pair_rule.hpp"
#include "position_grid.hpp"

namespace qkv { inline namespace QKV_ABI { namespace kernel {

/// The queries of a task, and how they attend. Everything has been checked; nothing here is written.
template <class T>
struct QueryTask {
  ConstView<T> q;  // [n_queries, heads·head_dim]
  Heads heads;
  Index head_dim, v_head_dim;
  T scale;
  Index sequence = 0, first_position = 0;
  PairRule<T> rule = {};
  Arithmetic arithmetic = Arithmetic::automatic;
  Index first_head = 0;  // as masks and scores count heads: not 0 where this is a part of them

  Index n_queries() const { return q.rows(); }
  const T* query(Index row, Index head) const { return q.data() + row * q.outerStride() + head * head_dim; }

  /// `lanes` lanes from lane `lane` on, queries of `n_heads` heads from `head` on side by side, × `count` keys of a piece from
  /// its i-th on.
  PairTile tile(Index head, Index n_heads, Index lane, Index lanes, const GridPiece& piece, Index i,
                Index count) const {
    return {sequence,      first_head + head,  n_heads, lane, lanes, first_position,
            piece.key + i, piece.position + i, count};
  }
};

/// … and the keys.
template <class T, StorageType S>
struct Task : QueryTask<T> {
  KeyRows<S> keys;

  Task(const ConstView<T>& queries, const KeyRows<S>& rows, Heads all_heads, T by, Index of_sequence = 0,
       Index position = 0)
      : QueryTask<T>{queries, all_heads, rows.head_dim, rows.v_head_dim, by, of_sequence, position}, keys(rows) {}
};

/// Output: the softmax state of every query and head. A kernel merges its keys into what is there, so that keys may come
/// in several parts; clear() makes the state of no keys.
template <class T>
struct StateView {
  T* maximum;        // [n_queries, heads]
  T* sum;            // [n_queries, heads]
  View<T> weighted;  // [n_queries, heads·v_head_dim]
  Index heads;

  T& m(Index query, Index head) const { return maximum[query * heads + head]; }
  T& l(Index query, Index head) const { return sum[query * heads + head]; }
  T* o(Index query, Index head, Index v_head_dim) const {
    return const_cast<T*>(weighted.data()) + query * weighted.outerStride() + head * v_head_dim;
  }
  /// Without `weighted`: for a kernel that writes a row where its maximum is -inf.
  void clear_sums(Index query, Index n_queries, Index head) const {
    for (Index i = query; i < query + n_queries; ++i) m(i, head) = detail::minus_infinity<T>, l(i, head) = 0;
  }
  void clear(Index query, Index n_queries, Index head, Index n_heads, Index v_head_dim) const {
    for (Index i = query; i < query + n_queries; ++i)
      for (Index h = head; h < head + n_heads; ++h) {
        m(i, h) = detail::minus_infinity<T>;
        l(i, h) = 0;
        std::fill_n(o(i, h, v_head_dim), v_head_dim, T(0));
      }
  }
};

}}}  // namespace qkv::QKV_ABI::kernel

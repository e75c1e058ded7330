// kernel/pair_rule.hpp — all that a kernel knows of masks and scores: the cover of a tile of pairs, and how its scores end.
//
//     cover(tile)      none, some or all of the tile's pairs are seen: what is hidden in whole is never computed
//     finish(tile)     s ← score(score_scale · s), then -inf where the pair is hidden         in place
//
// A kernel is a template over numbers only. The caller's mask and score, of whatever types, stand behind two pointers to
// functions (call/pair_rule_of.hpp), called once per block or tile and never per pair; `plain` scores under `full` call nothing.
//
//     tiled       lanes are queries of one head           scores [key][lane]
//     absorbed    lanes are heads of one query after another         [key][lane]
//     decode      lanes are the heads of a group, query after query  [lane][key]
//
// Before: compress/key_directions.hpp   Next: kernel/position_grid.hpp
#pragma once

#include <memory>
#include <type_traits>

#include "../mask.hpp"

namespace qkv { inline namespace QKV_ABI { namespace kernel {

/// Lanes × keys at consecutive positions. Lane i is head first_head + (lane + i) mod heads of query (lane + i) / heads.
struct PairTile {
  Index sequence = 0;
  Index first_head = 0, heads = 1;            // as masks and scores count heads
  Index lane = 0, lanes = 0;                  // the first, and how many
  Index first_position = 0;                   // of query 0
  Index key = 0, key_position = 0, keys = 0;  // logical row and position of the first; how many

  Index query(Index i) const { return (lane + i) / heads; }
  Index head(Index i) const { return first_head + (lane + i) % heads; }
  At at(Index i, Index j) const {
    return {sequence, head(i), query(i), key + j, first_position + query(i), key_position + j};
  }
  /// The same lanes, keys [first, first + count).
  PairTile part(Index first, Index count) const {
    PairTile t = *this;
    t.key += first, t.key_position += first, t.keys = count;
    return t;
  }
};

/// How the scores of a tile lie in memory.
enum class Inner {
  lanes,  // s[key · stride + lane]; rows are readable and writable up to whole registers of lanes
  keys,   // s[lane · stride + key]
};

/// An object, or a function, as a pointer to nothing in particular, and back.
template <class X>
const void* address_of(const X& x) {
  if constexpr (std::is_function_v<X>)
    return reinterpret_cast<const void*>(&x);
  else
    return std::addressof(x);
}
template <class X>
const X& object_at(const void* address) {
  if constexpr (std::is_function_v<X>)
    return *reinterpret_cast<X*>(const_cast<void*>(address));
  else
    return *static_cast<const X*>(address);
}

/// The mask and the score of a call. Both outlive it.
template <class T>
struct PairRule {
  using Finish = void (*)(const PairRule&, const PairTile&, Cover, T* s, Index stride, const T* score_scale);

  const void *mask = nullptr, *score = nullptr;
  bool plain = true;     // scores stay as they are
  bool sees_all = true;  // no pair is hidden
  Cover (*cover_of)(const PairRule&, const PairTile&) = nullptr;
  Finish finish_lanes = nullptr, finish_keys = nullptr;

  /// Of a tile with lanes and keys. `some` may stand for the other two, never the reverse.
  Cover cover(const PairTile& tile) const { return sees_all ? Cover::all : cover_of(*this, tile); }

  /// Scores of a tile whose cover is `all` or `some`. score_scale [lanes] (null: 1) multiplies them first, unless the score is
  /// plain. What the rule hides becomes -inf. May throw what mask and score throw.
  template <Inner inner>
  void finish(const PairTile& tile, Cover cover, T* s, Index stride, const T* score_scale = nullptr) const {
    if (plain && cover == Cover::all) return;
    (inner == Inner::lanes ? finish_lanes : finish_keys)(*this, tile, cover, s, stride, score_scale);
  }
};

}}}  // namespace qkv::QKV_ABI::kernel

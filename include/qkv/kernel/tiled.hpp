// kernel/tiled.hpp — many queries against many keys: lanes are queries, and one inner loop serves both products.
//
//                 blocks of keys, on a fixed grid of positions
//               ┌──────┬──────┬──────┬──────┐        for a block of queries, in panels of one register row each:
//     panels of │ all  │ all  │ some │ none │          Sᵀ = K Qᵀ      [keys, lanes]   broadcast K, vector Q
//     queries   │ all  │ some │ none │ none │          m, Sᵀ ← e^(s - m), l             lane by lane: no sums across lanes
//               └──────┴──────┴──────┴──────┘          Oᵀ += Vᵀ Sᵀ     [v_dim, lanes]  broadcast V, vector Sᵀ
//
//     Q is packed [panel][head_dim][lanes] with its scale's sign; K and V as in kernel/panels.hpp, once per kv head for all
//     query blocks and the whole group. Oᵀ is turned back once at the end. Nothing of size n_queries·n_keys exists.
//
// The mask is asked for blocks, then for tiles of a mixed block, then for lanes of a mixed tile: what it hides in whole is
// never computed. Every element of S and O is one multiply-add chain in ascending order of features and keys, whatever
// panel its query sits in: a prompt fed in pieces gives the same bits as at once.
// Dao et al. 2022, arXiv:2205.14135; lanes as queries is our own choice: no sums across lanes.
//
// Before: kernel/lanes.hpp   Next: kernel/decode.hpp
#pragma once

#include <algorithm>
#include <cstring>
#include <limits>
#include <numbers>

#include "../softmax.hpp"
#include "../workspace.hpp"
#include "lanes.hpp"
#include "panels.hpp"
#include "query_panels.hpp"
#include "register_tile.hpp"
#include "task.hpp"

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // of AVX-512 intrinsics, as in kernel/simd.hpp
#endif

namespace qkv::inline QKV_ABI::kernel {

/// Queries of one work item: a few panels, so that a block of keys is used while it is in the cache.
inline constexpr Index tile_queries = 192;

template <class T>
inline constexpr T log2_e = static_cast<T>(std::numbers::log2e_v<long double>);

/// Scratch of one work item.
template <class T>
struct TiledScratch {
  static constexpr Index lanes = TileShape<T>::columns;
  static constexpr Index panels = (tile_queries + lanes - 1) / lanes;

  T *q, *s, *o, *m, *l, *unit;
  bool* hidden;  // [tile_keys, lanes]: pairs of the rows that are not finite

  TiledScratch(detail::Carver& carver, Index head_dim, Index v_head_dim)
      : q(carver.take<T>(panels * head_dim * lanes)),
        s(carver.take<T>(tile_keys * lanes)),
        o(carver.take<T>(panels * v_head_dim * lanes)),
        m(carver.take<T>(panels * lanes)),
        l(carver.take<T>(panels * lanes)),
        unit(carver.take<T>(panels * lanes)),
        hidden(carver.take<bool>(tile_keys * lanes)) {}

  static std::size_t bytes(Index head_dim, Index v_head_dim) {
    detail::Carver carver(nullptr);
    TiledScratch(carver, head_dim, v_head_dim);
    return carver.used();
  }
};

/// One head and one block of queries against all packed keys of its kv head.
template <class A, class T, StorageType S, class M, class F>
class Tiled {
  using Number = typename A::Number;
  using V = Simd<T>;
  using Vec = typename V::Vec;
  static constexpr Index lanes = TileShape<T>::columns;
  static constexpr Index vectors = TileShape<T>::vectors;
  static constexpr Index rows = TileShape<T>::rows;
  // Where a panel's columns may begin: on a tile, and on a partial sum of `soften`.
  static constexpr bool plain = std::is_same_v<F, Plain>;
  static constexpr Index partial_sums = 4, aligned = 12;
  static_assert(aligned % rows == 0 && aligned % partial_sums == 0);

 public:
  Tiled(const Task<T, S, M, F>& task, const StateView<T>& state, const Panels<A>& panels, Index n_blocks, Index head,
        Index query, std::byte* scratch)
      : task_(task),
        state_(state),
        panels_(panels),
        n_blocks_(n_blocks),
        head_(head),
        query_(query),
        n_queries_(std::min(tile_queries, task.n_queries() - query)),
        carver_(scratch),
        scratch_(carver_, task.head_dim(), task.v_head_dim()) {}

  /// Merges all keys of the task into the state of these queries; done(query, n_queries, head, 1) for some at a time.
  template <class Done>
  void run(const Done& done) {
    const Index n_panels = (n_queries_ + lanes - 1) / lanes;
    // The blocks that these queries see anything of lie in [first, last].
    Index first = 0, last = n_blocks_ - 1;
    while (first <= last && !seen(first)) ++first;
    while (first < last && !seen(last)) --last;
    if (first > last)
      for (Index p = 0; p < n_panels; ++p) load_panel(p);
    for (Index b = first; b <= last; ++b) {
      if (b != first && b != last && !seen(b)) continue;
      if (!panels_.blocks[b].packed) BlockPacker<A, S>(panels_, task_.keys, task_.heads.kv_head(head_), b).run();
      for (Index p = 0; p < n_panels; ++p) {
        if (b == first) load_panel(p);
        fetch_.clear();
        if (b == last)
          fetch_.add(FetchRows::of(state_.o(query_ + p * lanes, head_, task_.v_head_dim()), state_.weighted.outerStride(),
                                   task_.v_head_dim(), panel_queries(p), true));
        fetch_block(b + 1, p, n_panels);
        if (b == first && p + 1 < n_panels)
          fetch_.add(FetchRows::of(task_.query(query_ + (p + 1) * lanes, head_), task_.q.outerStride(),
                                   task_.head_dim(), panel_queries(p + 1)));
        attend(b, p);
      }
    }
    for (Index p = 0; p < n_panels; ++p) {
      store_panel(p);
      done(query_ + p * lanes, panel_queries(p), head_, Index(1));
    }
  }

 private:
  /// What is kept of a score: ±q·k itself where nothing but the scale is applied, so that what enters the exponent is a
  /// difference before it is rounded; otherwise the score. In natural units one of it is `unit`, lane by lane.
  T natural(Index lane) const {
    const T m = scratch_.m[lane];
    return plain && m != detail::minus_infinity<T> ? m * scratch_.unit[lane] : m;
  }
  Index panel_queries(Index p) const { return std::min(lanes, n_queries_ - p * lanes); }
  Number* q(Index p) const { return reinterpret_cast<Number*>(scratch_.q) + p * panels_.key_depth() * lanes; }
  T* o(Index p) const { return scratch_.o + p * task_.v_head_dim() * lanes; }

  /// ±Qᵀ [head_dim, lanes], with the sign of the scale; the state of no keys. Lanes without a query are zeros.
  void load_panel(Index p) {
    const Index n = panel_queries(p);
    const T scale = std::max(task_.scale < 0 ? -task_.scale : task_.scale, std::numeric_limits<T>::min());
    std::fill_n(scratch_.unit + p * lanes, lanes, scale);
    for (Index v = 0; v < vectors; ++v) {
      const Index first = p * lanes + v * V::width, some = std::clamp<Index>(n - v * V::width, 0, V::width);
      const QueryRows<T> from{task_.query(query_ + first, head_), task_.q.outerStride(), some, task_.head_dim(),
                              task_.scale < 0 ? T(-1) : T(1)};
      pack_queries(A{}, from, q(p) + v * V::width, lanes, scratch_.unit + first);
    }
    std::fill_n(scratch_.m + p * lanes, lanes, detail::minus_infinity<T>);
    std::fill_n(scratch_.l + p * lanes, lanes, T(0));
    std::fill_n(o(p), task_.v_head_dim() * lanes, T(0));
  }
  /// The state of the panel, in natural units, merged into that of the task.
  void store_panel(Index p) {
    const Index n = panel_queries(p), dv = task_.v_head_dim(), stride = state_.weighted.outerStride();
    bool empty[std::size_t(lanes)], all_empty = true;  // rows that hold nothing yet: not even zeros
    T keep[std::size_t(lanes)], take[std::size_t(lanes)];
    for (Index i = 0; i < n; ++i) {
      T& m = state_.m(query_ + p * lanes + i, head_);
      T& l = state_.l(query_ + p * lanes + i, head_);
      const T here = natural(p * lanes + i), top = detail::nan_max(m, here);
      empty[i] = m == detail::minus_infinity<T>;
      all_empty = all_empty && empty[i];
      keep[i] = detail::weight_of(m, top), take[i] = detail::weight_of(here, top);
      l = keep[i] * l + take[i] * scratch_.l[p * lanes + i];
      m = top;
    }
    for (Index first = 0; first < n; first += V::width) {
      const Index rows_here = std::min(V::width, n - first);
      T* const to = state_.o(query_ + p * lanes + first, head_, dv);
      for (Index k = 0; k < dv; k += V::width) {
        const Index width = std::min(V::width, dv - k);
        const T* const from = o(p) + k * lanes + first;
        if (all_empty && rows_here == V::width && width == V::width) {
          store_block(from, to + k, stride, std::make_index_sequence<V::lanes>{});
          continue;
        }
        Vec block[V::lanes];
        for (Index i = 0; i < V::width; ++i) block[i] = i < width ? V::load(from + i * lanes) : V::zero();
        V::transpose(block);
        for (Index i = 0; i < rows_here; ++i) {
          T* const row = to + i * stride + k;
          const Index lane = first + i;
          const Vec old = empty[lane] ? V::zero() : V::mul(V::broadcast(keep[lane]), V::load_n(row, width));
          V::store_n(row, empty[lane] ? block[i] : V::fma(V::broadcast(take[lane]), block[i], old), width);
        }
      }
    }
  }
  template <std::size_t... I>
  static EIGEN_ALWAYS_INLINE void store_block(const T* from, T* to, Index stride, std::index_sequence<I...>) {
    Vec block[] = {V::load(from + Index(I) * lanes)...};
    V::transpose(block);
    (V::store(to + Index(I) * stride, block[I]), ...);
  }

  Block block_of(Index p, const KeyRun<S>& run, Index base, Index row, Index count) const {
    return task_.block(head_, query_ + p * lanes, panel_queries(p), run, base, row, count);
  }

  /// Whether a query of this item may see a key of block b.
  bool seen(Index b) const {
    const KeyBlock& block = panels_.blocks[b];
    bool any = false;
    for_each_piece(task_.keys, tile_keys, block.first, block.run, block.base, block.row,
                   [&](const KeyRun<S>& run, Index base, Index row, Index count, Index) {
                     any = any || detail::cover(*task_.mask, task_.block(head_, query_, n_queries_, run, base, row,
                                                                         count)) != Cover::none;
                   });
    return any;
  }
  /// Asks for the p-th part of the rows of block b, if it is to be packed: of its first run only.
  void fetch_block(Index b, Index p, Index n_panels) {
    if (b >= n_blocks_ || panels_.blocks[b].packed) return;
    const KeyBlock& block = panels_.blocks[b];
    const KeyRun<S>& run = task_.keys.runs[block.run];
    const Index count = std::min(run.rows - block.row, block.count), kv_head = task_.heads.kv_head(head_);
    const Index begin = count * p / n_panels, rows = count * (p + 1) / n_panels - begin;
    if (rows <= 0) return;
    fetch_.add(FetchRows::of(task_.keys.key(run, kv_head, block.row + begin), task_.keys.key_row_stride,
                             task_.head_dim(), rows));
    fetch_.add(FetchRows::of(task_.keys.value(run, kv_head, block.row + begin), task_.keys.value_row_stride,
                             task_.v_head_dim(), rows));
  }

  /// Merges block b into the state of panel p.
  void attend(Index b, Index p) {
    const KeyBlock& block = panels_.blocks[b];
    // The tiles that the panel sees anything of, from the first to the last of them; those in between that it does not
    // see, and columns that hold no key, get scores of -inf.
    Index begin = block.count, end = 0;
    bool mixed = block.gaps;
    const auto note = [&](Cover c, Index column, Index count) {
      if (c == Cover::none) {
        mixed = true;
        return;
      }
      begin = std::min(begin, column / aligned * aligned);
      end = std::max(end, column + count);
      mixed = mixed || c == Cover::some;
    };
    for_each_piece(task_.keys, tile_keys, block.first, block.run, block.base, block.row,
                   [&](const KeyRun<S>& run, Index base, Index row, Index count, Index column) {
                     const Cover c = detail::cover(*task_.mask, block_of(p, run, base, row, count));
                     if (c != Cover::some) return note(c, column, count);
                     for (Index i = 0; i < count;) {
                       const Index some = std::min(count - i, rows - (column + i) % rows);
                       note(detail::cover(*task_.mask, block_of(p, run, base, row + i, some)), column + i, some);
                       i += some;
                     }
                   });
    if (end <= begin) return;
    end = std::min(block.count, (end + rows - 1) / rows * rows);

    const Index full = (std::min(end, block.count) - begin) / rows;
    multiply_keys(b, p, begin, rows, full);
    if (const Index c = begin + full * rows; c < end) multiply_keys(b, p, c, block.count - c, 1);
    end = std::min(end, block.count);
    if (mixed || !plain) rescore(block, p, begin, end, mixed);
    soften(block, b, p, begin, end);
  }

  /// `tiles` tiles of `height` columns, from column c on.
  void multiply_keys(Index b, Index p, Index c, Index height, Index tiles) {
    const Index depth = panels_.key_depth();
    const Number* const a = panels_.block_keys(b) + c * depth;
    T* const to = scratch_.s + c * lanes;
    if constexpr (!A::words) {
      const TileOperands<T> op{.depth = depth, .a = a, .b = q(p), .b_step = lanes, .c = to, .c_row = lanes};
      if (height == rows)
        packed_tiles<rows, vectors>(op, tiles, depth * rows, lanes * rows, fetch_);
      else
        packed_tile_of<T>(height, op);
    }
#ifdef QKV_DETAIL_WORDS
    if constexpr (A::words) {
      using Dot = std::conditional_t<A::quads, QuadDot, PairDot>;
      WordOperands op{.depth = depth, .a = a, .b = q(p), .b_step = lanes, .c = to, .c_row = lanes};
      if constexpr (A::quads) {
        op.offset = panels_.key_offsets + b * tile_keys + c;
        op.scale = panels_.key_scales + b * tile_keys + c;
      }
      if (height == rows)
        word_tiles<Dot, rows>(op, tiles, depth * rows, lanes * rows, fetch_);
      else
        word_tile_of<Dot>(height, op, fetch_);
    }
#endif
  }

  /// Scores and masks of columns [begin, end).
  void rescore(const KeyBlock& block, Index p, Index begin, Index end, bool mixed) {
    Index next = begin;  // columns before it are done
    const auto hide = [&](Index from, Index to) {
      if (from < to) std::fill_n(scratch_.s + from * lanes, (to - from) * lanes, detail::minus_infinity<T>);
    };
    for_each_piece(
        task_.keys, tile_keys, block.first, block.run, block.base, block.row,
        [&](const KeyRun<S>& run, Index base, Index row, Index count, Index column) {
          if (column + count <= begin || column >= end) return;
          hide(next, column);
          next = std::min(column + count, end);
          for (Index i = std::max<Index>(begin - column, 0); column + i < next;) {
            const Index some = std::min(next - column - i, rows - (column + i) % rows);
            const Cover c = mixed ? detail::cover(*task_.mask, block_of(p, run, base, row + i, some)) : Cover::all;
            if (c == Cover::none)
              hide(column + i, column + i + some);
            else if (!plain || c == Cover::some)
              for (Index j = i; j < i + some; ++j)
                rescore_key(block_of(p, run, base, row + j, 1), p, scratch_.s + (column + j) * lanes, c == Cover::some);
            i += some;
          }
        });
    hide(next, end);
  }

  void rescore_key(const Block& one, Index p, T* s, bool mixed) {
    const Index n = panel_queries(p);
    const At first = task_.at(head_, one.query, one.key, one.key_position);
    if constexpr (!plain) {
      for (Index v = 0; v < vectors; ++v) {
        T* const at = s + v * V::width;
        const LaneAt lane{advance(first, v * V::width), n - v * V::width};
        V::store(at, score_lanes<T>(*task_.score,
                                    V::mul(V::load(scratch_.unit + p * lanes + v * V::width), V::load(at)), lane));
      }
    }
    if (!mixed) return;
    const SeenBy seen = detail::seen_by(*task_.mask, one);
    if (seen.exact) {
      const Vec low = V::broadcast(static_cast<T>(seen.begin)), high = V::broadcast(static_cast<T>(seen.end));
      const Vec hidden = V::broadcast(detail::minus_infinity<T>);
      for (Index v = 0; v < vectors; ++v) {
        const Vec lane = V::add(V::iota(), V::broadcast(static_cast<T>(v * V::width)));
        T* const at = s + v * V::width;
        V::store(at, V::select(V::both(V::less_equal(low, lane), V::less(lane, high)), V::load(at), hidden));
      }
    } else {
      for (Index i = 0; i < n; ++i)
        if (!task_.mask->sees(advance(first, i))) s[i] = detail::minus_infinity<T>;
    }
  }
  static At advance(At at, Index lane) {
    at.query += lane, at.query_position += lane;
    return at;
  }

  /// m, l and Oᵀ of the panel ← merged with the scores of columns [begin, end).
  void soften(const KeyBlock& block, Index b, Index p, Index begin, Index end) {
    const Index dv = task_.v_head_dim();
    T* const s = scratch_.s;
    mark_hidden(block, b, begin, end);
    bool moved = false;
    alignas(detail::cache_line) T keep[std::size_t(lanes)];
    unroll<vectors>([&](auto v) {
      T* const at = s + v * V::width;
      const Vec here = largest(at, begin, end);
      const Vec low = V::broadcast(detail::minus_infinity<T>), one = V::broadcast(T(1));
      T* const m = scratch_.m + p * lanes + v * V::width;
      T* const l = scratch_.l + p * lanes + v * V::width;
      const Vec old = V::load(m);
      const Vec now = V::max(old, here);
      const auto nothing = V::less_equal(now, low);  // -inf: the lane has seen no key yet
      const Vec base = V::select(nothing, V::zero(), now);
      const Vec unit = plain ? V::load(scratch_.unit + p * lanes + v * V::width) : one;
      const Vec to_log2 = V::mul(V::broadcast(log2_e<T>), V::select(nothing, one, unit));  // a query of NaN has no unit
      const Vec factor = V::weight(V::sub(old, base), to_log2);
      const Vec sum = weigh(at, begin, end, base, to_log2);
      V::store(m, V::fma(V::zero(), sum, now));  // a score of NaN is in the sum, whatever the maximum made of it
      V::store(l, V::fma(V::load(l), factor, sum));
      V::store(keep + v * V::width, factor);
      moved = moved || V::any(V::less(old, now));
    });
    if (moved)
      for (Index x = 0; x < dv; ++x)
        unroll<vectors>([&](auto v) {
          T* const at = o(p) + x * lanes + v * V::width;
          V::store(at, V::mul(V::load(at), V::load(keep + v * V::width)));
        });
    const Index full = dv / rows;
    multiply_values(block, b, p, begin, end, 0, rows, full);
    if (const Index x = full * rows; x < dv) multiply_values(block, b, p, begin, end, x, dv - x, 1);
    add_not_finite(block, b, p, begin, end);
  }

  /// The largest score of each lane; four at a time, since one maximum after another would wait for each.
  static Vec largest(const T* at, Index begin, Index end) {
    Vec a = V::broadcast(detail::minus_infinity<T>), b = a, c = a, d = a;
    Index i = begin;
    for (; i + 4 <= end; i += 4) {
      a = V::max(a, V::load(at + i * lanes));
      b = V::max(b, V::load(at + (i + 1) * lanes));
      c = V::max(c, V::load(at + (i + 2) * lanes));
      d = V::max(d, V::load(at + (i + 3) * lanes));
    }
    for (; i < end; ++i) a = V::max(a, V::load(at + i * lanes));
    return V::max(V::max(a, b), V::max(c, d));
  }

  /// One register of queries: scores of columns [begin, end) become weights e^(score - base); returns their sum. The
  /// partial sums are fixed by position, so that bits do not depend on where columns begin.
  static Vec weigh(T* at, Index begin, Index end, Vec base, Vec to_log2) {
    Index c = begin;
#ifdef QKV_DETAIL_WORDS
    if constexpr (A::words) {  // in place: the pair of columns c, c + 1 goes to row c / 2; sums of the rounded weights
      const __m512i ones = _mm512_set1_epi32(0x3F803F80);
      Vec a = V::zero(), b = a;
      for (; c + 4 <= end; c += 4) {
        a = PairDot::dot(a, put_pair(at, c, end, base, to_log2), ones);
        b = PairDot::dot(b, put_pair(at, c + 2, end, base, to_log2), ones);
      }
      if (c < end) a = PairDot::dot(a, put_pair(at, c, end, base, to_log2), ones);
      if (c + 2 < end) b = PairDot::dot(b, put_pair(at, c + 2, end, base, to_log2), ones);
      return V::add(a, b);
    }
#endif
    Vec w = V::zero(), x = w, y = w, z = w;
    if constexpr (!A::words) {
      for (; c + 4 <= end; c += 4) {
        w = V::add(w, put(at, c, base, to_log2));
        x = V::add(x, put(at, c + 1, base, to_log2));
        y = V::add(y, put(at, c + 2, base, to_log2));
        z = V::add(z, put(at, c + 3, base, to_log2));
      }
      if (c < end) w = V::add(w, put(at, c, base, to_log2));
      if (c + 1 < end) x = V::add(x, put(at, c + 1, base, to_log2));
      if (c + 2 < end) y = V::add(y, put(at, c + 2, base, to_log2));
    }
    return V::add(V::add(w, x), V::add(y, z));
  }
  static EIGEN_ALWAYS_INLINE Vec below(const T* at, Index c, Vec base) { return V::sub(V::load(at + c * lanes), base); }
  static EIGEN_ALWAYS_INLINE Vec put(T* at, Index c, Vec base, Vec to_log2) {
    const Vec weight = V::weight(below(at, c, base), to_log2);
    V::store(at + c * lanes, weight);
    return weight;
  }
#ifdef QKV_DETAIL_WORDS
  static EIGEN_ALWAYS_INLINE __m512i put_pair(float* at, Index c, Index end, Vec base, Vec to_log2) {
    const Vec low = weight_short(below(at, c, base), to_log2);
    const Vec high = c + 1 < end ? weight_short(below(at, c + 1, base), to_log2) : V::zero();
    const __m512i pair = to_pairs(low, high);
    store_words(reinterpret_cast<Word*>(at) + c / 2 * lanes, pair);
    return pair;
  }
#endif

  /// `tiles` slices of `height` features, from feature x on.
  void multiply_values(const KeyBlock& block, Index b, Index p, Index begin, Index end, Index x, Index height,
                       Index tiles) {
    T* const to = o(p) + x * lanes;
    const Index count = (block.count + A::keys - 1) / A::keys, first = begin / A::keys;
    const Number* const a = panels_.block_values(b) + x * count + first * height;
    const Number* const weights = reinterpret_cast<const Number*>(scratch_.s) + first * lanes;
    const Index depth = (end + A::keys - 1) / A::keys - first;
    if constexpr (!A::words) {
      const TileOperands<T> op{.depth = depth,
                               .a = a,
                               .b = weights,
                               .b_step = lanes,
                               .start = to,
                               .start_row = lanes,
                               .c = to,
                               .c_row = lanes};
      if (height == rows)
        packed_tiles<rows, vectors>(op, tiles, count * rows, lanes * rows, fetch_);
      else
        packed_tile_of<T>(height, op);
    }
#ifdef QKV_DETAIL_WORDS
    if constexpr (A::words) {
      const WordOperands op{
          .depth = depth, .a = a, .b = weights, .b_step = lanes, .carry_on = true, .c = to, .c_row = lanes};
      if (height == rows)
        word_tiles<PairDot, rows>(op, tiles, count * rows, lanes * rows, fetch_);
      else
        word_tile_of<PairDot>(height, op, fetch_);
    }
#endif
  }
  /// The weight of one pair, as it was multiplied.
  T weight(Index c, Index lane) const {
    if constexpr (A::words) {
      const Word pair = reinterpret_cast<const Word*>(scratch_.s)[c / 2 * lanes + lane];
      const Word bits = c % 2 == 0 ? pair << 16 : pair & 0xFFFF0000U;
      T value;
      std::memcpy(&value, &bits, sizeof bits);
      return value;
    } else {
      return scratch_.s[c * lanes + lane];
    }
  }

  /// Value rows that are not finite are packed as zeros; they reach the lanes that see them here, one by one.
  void mark_hidden(const KeyBlock& block, Index b, Index begin, Index end) {
    for (Index i = 0; i < block.not_finite; ++i) {
      const Index c = panels_.not_finite[b * tile_keys + i];
      if (c < begin || c >= end) continue;
      for (Index lane = 0; lane < lanes; ++lane)
        scratch_.hidden[c * lanes + lane] = scratch_.s[c * lanes + lane] == detail::minus_infinity<T>;
    }
  }
  void add_not_finite(const KeyBlock& block, Index b, Index p, Index begin, Index end) {
    const Index dv = task_.v_head_dim();
    for (Index i = 0; i < block.not_finite; ++i) {
      const Index c = panels_.not_finite[b * tile_keys + i];
      if (c < begin || c >= end) continue;
      for_each_piece(task_.keys, tile_keys, block.first, block.run, block.base, block.row,
                     [&](const KeyRun<S>& run, Index, Index row, Index count, Index column) {
                       if (c < column || c >= column + count) return;
                       const Index kv_head = task_.heads.kv_head(head_), at = row + c - column;
                       const S* const value = task_.keys.value(run, kv_head, at);
                       const T scale = static_cast<T>(task_.keys.value_scale(run, kv_head, at));
                       for (Index lane = 0; lane < panel_queries(p); ++lane)
                         if (!scratch_.hidden[c * lanes + lane])
                           for (Index x = 0; x < dv; ++x)
                             o(p)[x * lanes + lane] += weight(c, lane) * (static_cast<T>(value[x]) * scale);
                     });
    }
  }

  const Task<T, S, M, F>& task_;
  const StateView<T>& state_;
  const Panels<A>& panels_;
  Index n_blocks_, head_, query_, n_queries_;
  detail::Carver carver_;
  TiledScratch<T> scratch_;
  FetchList fetch_;
};

}  // namespace qkv::inline QKV_ABI::kernel

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif

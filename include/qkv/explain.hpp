// explain.hpp — what a call of attention() will do, in one printable line: kernel and reason, blocks skipped, cost.
//
//     std::puts(explain(q, k, v, {8, 2}, causal).text().c_str());
//
//     tiled kernel (2048 queries > 8), avx512; 2048 queries x 2048 keys, 8/2 heads of 128/128, f32 keys; blocks of
//     192x192: 440 all, 88 some, 440 none (45% skipped); 9.38 Gflop, 21 MB, 4.72e+03 kB scratch
//
// The rule it reports is choose_kernel in options.hpp: the same function that the call itself uses.
//
// Before: attention.hpp   Next: key_rows.hpp
#pragma once

#include <algorithm>
#include <cstdio>
#include <string>

#include "attention.hpp"

namespace qkv { inline namespace QKV_ABI {

struct Explanation {
  Kernel kernel = Kernel::automatic;
  std::string why;
  Heads heads;
  Index n_queries = 0, n_keys = 0, head_dim = 0, v_head_dim = 0;
  const char* storage = "";
  const char* arithmetic = "";  // " multiplied in …" where that is narrower than the scalar of q
  Index blocks_all = 0, blocks_some = 0, blocks_none = 0;  // of tile_queries × tile_keys, over all heads
  double flops = 0;                                        // of the blocks that are not skipped
  double bytes = 0;                                        // of q, k, v and out, each once
  Index workspace_bytes = 0;                               // scratch with the serial executor

  std::string text() const {
    const double blocks = static_cast<double>(blocks_all + blocks_some + blocks_none);
    char line[512];
    std::snprintf(
        line, sizeof line,
        "%s kernel (%s), %s; %td queries x %td keys, %td/%td heads of %td/%td, %s keys%s; blocks of %tdx%td: %td "
        "all, %td some, %td none (%.0f%% skipped); %.3g Gflop, %.3g MB, %.3g kB scratch%s",
        name(kernel), why.c_str(), isa_name, n_queries, n_keys, heads.heads, heads.kv_heads, head_dim, v_head_dim,
        storage, arithmetic, kernel::tile_queries, kernel::tile_keys, blocks_all, blocks_some, blocks_none,
        blocks > 0 ? 100 * static_cast<double>(blocks_none) / blocks : 0.0, flops / 1e9, bytes / 1e6,
        static_cast<double>(workspace_bytes) / 1e3, warning());
    return line;
  }

  /// Why this build is slower than the machine, or "".
  static const char* warning() { return kernel::Isa::warning; }
};

namespace detail {

/// How the tiled and the absorbed kernel multiply keys stored as S.
template <class T, StorageType S>
constexpr const char* arithmetic_name(Arithmetic arithmetic) {
  using Narrow = kernel::NarrowArithmetic<T, S>;
  if (arithmetic == Arithmetic::exact) return "";
  return Narrow::int8_keys && arithmetic == Arithmetic::int8 ? kernel::Int8::name : Narrow::name;
}

/// The kernel of a sequence, why, and how it multiplies keys stored as S.
struct KernelChoice {
  Kernel kernel;
  std::string why;
  const char* arithmetic;
};
template <class T, StorageType S>
KernelChoice explain_kernel(Kernel forced, Arithmetic arithmetic, Index n_queries, Heads heads) {
  const Kernel kernel = choose_kernel<T>(forced, n_queries);
  const std::string most = std::to_string(decode_max_queries);
  return {kernel,
          forced != Kernel::automatic   ? "forced by options.kernel"
          : kernel == Kernel::reference ? "the scalar is neither float nor double"
          : kernel == Kernel::decode    ? std::to_string(n_queries) + " queries <= " + most
                                        : std::to_string(n_queries) + " queries > " + most,
          kernel == Kernel::tiled ? arithmetic_name<T, S>(arithmetic)
          : kernel == Kernel::decode
              ? kernel::with_decode_dot<T, S>(arithmetic, heads.group_size(),
                                              []<class D>(std::type_identity<D>) { return D::name; })
              : ""};
}

template <class T, StorageType S, class M, class F>
Explanation explain_rows(Index n_queries, Index q_cols, const KeyRows<S>& keys, Heads heads, const M& mask,
                         const F& score, const Options<T>& options) {
  check_runs(keys.runs, keys.rows);
  check_query(q_cols, heads, keys.kv_heads, keys.head_dim);
  check_sizes(n_queries, keys.rows, heads, keys.head_dim, keys.v_head_dim);
  check_options(options, heads);
  check_one_sequence(options, "explain takes");
  const auto rule = rule_of<T, S>(mask, score);
  const Index first = first_position(rule, keys, 0, n_queries, options);
  check_call(rule, keys, {.heads = heads.heads, .n_queries = n_queries, .first_position = first});
  Explanation e;
  const auto [chosen, why, arithmetic] = explain_kernel<T, S>(options.kernel, options.arithmetic, n_queries, heads);
  e.kernel = chosen, e.why = why, e.arithmetic = arithmetic;
  e.heads = heads, e.n_queries = n_queries, e.n_keys = keys.rows;
  e.head_dim = keys.head_dim, e.v_head_dim = keys.v_head_dim, e.storage = storage_name<S>;

  kernel::Task<T, S> task(ConstView<T>(nullptr, n_queries, q_cols, Eigen::OuterStride<>(q_cols)), keys, heads, T(1));
  task.first_position = first;
  task.rule = rule.pairs;
  double pairs = 0;
  for (Index h = 0; h < heads.heads && n_queries > 0; ++h)
    for (Index q = 0; q < n_queries; q += kernel::tile_queries) {
      const Index n = std::min(kernel::tile_queries, n_queries - q);
      for (const kernel::GridCell& cell : kernel::GridCells(keys.runs, kernel::tile_keys, keys.first_row)) {
        Cover least = Cover::all, most = Cover::none;
        Index count = 0;
        for (const kernel::GridPiece& piece : kernel::GridPieces(keys.runs, kernel::tile_keys, cell)) {
          const Cover c = task.rule.cover(task.tile(h, 1, q, n, piece, 0, piece.count));
          least = std::min(least, c), most = std::max(most, c);
          count += c == Cover::none ? 0 : piece.count;
        }
        ++(most == Cover::none ? e.blocks_none : least == Cover::all ? e.blocks_all : e.blocks_some);
        pairs += static_cast<double>(n * count);
      }
    }
  e.flops = 2 * pairs * static_cast<double>(keys.head_dim + keys.v_head_dim);
  e.bytes =
      static_cast<double>(keys.rows * keys.kv_heads * (row_bytes<S>(keys.head_dim) + row_bytes<S>(keys.v_head_dim))) +
      static_cast<double>(n_queries * (q_cols + heads.heads * keys.v_head_dim)) * sizeof(T);
  e.workspace_bytes = required_bytes<T>(options.kernel, n_queries, keys.rows, heads, keys.head_dim, keys.v_head_dim);
  return e;
}

}  // namespace detail

/// What attention(q, k, v, heads, mask, score, options) will do. Only the shapes of q, k, v are read; errors are those
/// of the call.
template <MatrixLike Q, MatrixLike K, MatrixLike V, class M = Full, class F = Plain>
Explanation explain(const Q& q, const K& k, const V& v, Heads heads = {}, const M& mask = full, const F& score = plain,
                    const Options<ScalarOf<Q>>& options = {}) {
  using S = ScalarOf<K>;
  detail::check_functions<M, F, ScalarOf<Q>>();
  detail::check_scalars<ScalarOf<Q>, S, ScalarOf<V>>();
  detail::check_keys(k, v, heads);
  const KeyRun<S> run{.rows = k.rows(), .position = options.first_key_position};
  const KeyRows<S> rows{.runs = {&run, 1},
                        .rows = k.rows(),
                        .kv_heads = heads.kv_heads,
                        .head_dim = k.cols() / heads.kv_heads,
                        .v_head_dim = v.cols() / heads.kv_heads};
  return detail::explain_rows<ScalarOf<Q>>(q.rows(), q.cols(), rows, heads, detail::as_mask(mask), score, options);
}

/// What attention(q, cache, heads, mask, score, options) will do.
template <MatrixLike Q, KeySource C, class M = Full, class F = Plain>
Explanation explain(const Q& q, const C& cache, Heads heads = {}, const M& mask = full, const F& score = plain,
                    const Options<ScalarOf<Q>>& options = {}) {
  detail::check_functions<M, F, ScalarOf<Q>>();
  detail::check_own_positions(options);
  return detail::explain_rows<ScalarOf<Q>>(q.rows(), q.cols(), cache.key_rows(), heads, detail::as_mask(mask), score,
                                           options);
}

}}  // namespace qkv::QKV_ABI

// call/checks.hpp — everything about a call that must be checked before the first write.
//
// Before: call/pair_rule_of.hpp   Next: call/dispatch.hpp
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <span>
#include <type_traits>

#include "../base/overlap.hpp"
#include "../heads.hpp"
#include "../kernel/task.hpp"
#include "../options.hpp"
#include "../score.hpp"
#include "rule.hpp"

namespace qkv { inline namespace QKV_ABI { namespace detail {

/// Readable compiler errors for misplaced or unusable operands.
template <class GivenMask, class GivenScore, class T>
constexpr void check_functions() {
  using M = std::conditional_t<std::is_same_v<GivenMask, Omitted>, Full, GivenMask>;
  using F = std::conditional_t<std::is_same_v<GivenScore, Omitted>, Plain, GivenScore>;
  static_assert(Mask<M> || MaskFunction<M> || !Score<M, T>,
                "qkv: a score stands where the mask is expected: attention(q, k, v, heads, mask, score, options); use "
                "`full` for no mask");
  static_assert(Mask<M> || MaskFunction<M>, "qkv: a mask needs bool sees(const At&) const, or be a bool f(const At&)");
  static_assert(!Mask<F> && !MaskFunction<F>,
                "qkv: a mask stands where the score is expected: attention(q, k, v, heads, mask, score, options)");
  check_members<M>();
  static_assert(Score<F, T>, "qkv: a score needs T operator()(T score, const At&) const for the scalar T of q");
}

template <class T, class K, class V>
constexpr void check_scalars() {
  static_assert(std::is_same_v<K, V>, "qkv: k and v must have the same scalar");
  static_assert(
      std::is_same_v<K, T> || std::is_same_v<K, half> || std::is_same_v<K, bfloat16> || std::is_same_v<K, float>,
      "qkv: k and v must have the scalar of q, or be half, bfloat16 or float; int8 rows live in a cache");
  static_assert(!std::is_same_v<T, half> && !std::is_same_v<T, bfloat16> && !std::is_integral_v<T>,
                "qkv: queries are float, double or wider (sums need it); use q.template cast<float>()");
}

/// Rows [first, first + n) of a view, as a view.
template <class T>
View<T> rows_of(const View<T>& x, Index first, Index n) {
  return {const_cast<T*>(x.data()) + first * x.outerStride(), n, x.cols(), Eigen::OuterStride<>(x.outerStride())};
}
template <class T>
ConstView<T> rows_of(const ConstView<T>& x, Index first, Index n) {
  return {x.data() + first * x.outerStride(), n, x.cols(), Eigen::OuterStride<>(x.outerStride())};
}

/// One sequence of a batch: its rows of q and of k, v.
struct SequenceRows {
  Index sequence = 0;
  Index query = 0, n_queries = 0;
  Index key = 0, n_keys = 0;
};

/// The batch of a call: one sequence, or as many as the offsets name.
class Sequences {
 public:
  Sequences(std::span<const Index> query_offsets, std::span<const Index> key_offsets, Index n_queries, Index n_keys)
      : q_(query_offsets), k_(key_offsets), n_queries_(n_queries), n_keys_(n_keys) {
    require(q_.size() == k_.size(), "query_offsets and key_offsets must be of equal length; given ", q_.size(), " and ",
            k_.size());
    check_offsets(q_, n_queries, "query_offsets", "n_queries");
    check_offsets(k_, n_keys, "key_offsets", "n_keys");
  }

  Index count() const { return q_.empty() ? 1 : static_cast<Index>(q_.size()) - 1; }
  SequenceRows at(Index s) const {
    if (q_.empty()) return {0, 0, n_queries_, 0, n_keys_};
    const auto i = static_cast<std::size_t>(s);
    return {s, q_[i], q_[i + 1] - q_[i], k_[i], k_[i + 1] - k_[i]};
  }

 private:
  static void check_offsets(std::span<const Index> offsets, Index rows, const char* what, const char* of) {
    if (offsets.empty()) return;
    require(offsets.front() == 0 && offsets.back() == rows, what, " must begin with 0 and end with ", of, "; given ",
            offsets.front(), " … ", offsets.back(), ", ", of, " is ", rows);
    for (std::size_t i = 1; i < offsets.size(); ++i)
      require(offsets[i - 1] <= offsets[i], what, " must not decrease; entry ", i, " is ", offsets[i], " after ",
              offsets[i - 1]);
  }

  std::span<const Index> q_, k_;
  Index n_queries_, n_keys_;
};

/// Kernels multiply by the scale and by log2(e) times it: both must be normal numbers of T.
template <class T>
void check_scale(std::optional<double> given_scale) {
  const double scale = given_scale.value_or(0);
  require(scale == scale, "scale must be a number; given NaN");
  require(std::abs(scale) <= std::numeric_limits<double>::max(), "scale must be finite; given ", scale);
  if constexpr (std::is_floating_point_v<T>) {
    constexpr auto least = static_cast<long double>(std::numeric_limits<T>::min()),
                   most = static_cast<long double>(std::numeric_limits<T>::max() / 2);
    const auto given = std::abs(static_cast<long double>(scale));
    require(scale == 0 || (least <= given && given <= most), "scale must be 0 (1/sqrt(head_dim)) or lie between ",
            least, " and ", most, ", or their negatives, in the scalar of q; given ", scale);
  }
}

template <class T>
void check_options(const Options<T>& options, Heads heads) {
  require(options.sinks.empty() || static_cast<Index>(options.sinks.size()) == heads.heads,
          "sinks needs one logit per head; given ", options.sinks.size(), " for ", heads.heads, " heads");
  check_scale<T>(options.scale);
  constexpr Index far = std::numeric_limits<Index>::max() / 4;  // positions are added up without overflow
  require(!options.first_position || (*options.first_position >= -far && *options.first_position <= far),
          "first_position must lie within ", -far, " ... ", far, "; given ", options.first_position.value_or(0));
  require(options.first_key_position >= 0 && options.first_key_position <= far,
          "first_key_position must lie within 0 ... ", far, "; given ", options.first_key_position);
}

template <class T>
Footprint log_sum_exp_footprint(const Options<T>& options) {
  return options.log_sum_exp ? footprint(*options.log_sum_exp) : Footprint{};
}

template <class Out, class T>
void check_sinks_unwritten(const Out& out, const Options<T>& options) {
  const CallShape call{.output = footprint(out), .log_sum_exp = log_sum_exp_footprint(options)};
  call.require_unwritten(options.sinks, "sinks");
}

/// q [n_queries, heads·head_dim] against keys of head_dim and kv_heads.
inline void check_query(Index q_cols, Heads heads, Index kv_heads, Index head_dim) {
  check(heads);
  require(kv_heads == heads.kv_heads, "the keys must have kv_heads = ", heads.kv_heads, " heads; they have ", kv_heads);
  require(q_cols % heads.heads == 0 && q_cols / heads.heads == head_dim,  // their product may not fit
          "q must have heads*head_dim columns; given ", q_cols, " for heads ", heads.heads, ", head_dim ", head_dim);
}

/// Bounds sizes so that unchecked products of them in kernels, with small constants, do not overflow. (Matrices without
/// columns need no memory, so nothing else bounds their rows, nor the number of heads without features.)
inline void check_sizes(Index n_queries, Index n_keys, Heads heads, Index head_dim, Index v_head_dim) {
  const double rows = static_cast<double>(n_queries) + static_cast<double>(n_keys),
               numbers = static_cast<double>(head_dim) + static_cast<double>(v_head_dim) + 2;
  require<std::length_error>(rows * static_cast<double>(heads.heads) * numbers <= 0x1p48,
                             "(n_queries + n_keys)*heads*(head_dim + v_head_dim + 2) must be at most 2^48; given "
                             "n_queries ",
                             n_queries, ", n_keys ", n_keys, ", heads ", heads.heads, ", head_dim ", head_dim,
                             ", v_head_dim ", v_head_dim);
}

/// A cache has its own positions: first_key_position must not be set.
template <class T>
void check_own_positions(const Options<T>& options) {
  require(options.first_key_position == 0,
          "the rows of a cache stand at positions of their own: first_key_position must "
          "be 0; given ",
          options.first_key_position);
}

/// A call on one sequence has no offsets.
template <class T>
void check_one_sequence(const Options<T>& options, const char* what) {
  require(options.query_offsets.empty() && options.key_offsets.empty(), what,
          " one sequence: query_offsets and key_offsets must be empty; given ", options.query_offsets.size(), " and ",
          options.key_offsets.size());
}

/// k [n_keys, kv_heads·head_dim], v [n_keys, kv_heads·v_head_dim].
template <class K, class V>
void check_keys(const K& k, const V& v, Heads heads) {
  check(heads);
  require(k.cols() % heads.kv_heads == 0 && v.cols() % heads.kv_heads == 0, "kv_heads ", heads.kv_heads,
          " must divide the columns of k ", Shape{k.rows(), k.cols()}, " and v ", Shape{v.rows(), v.cols()});
  require(k.rows() == v.rows(), "k and v must have the same number of rows; given ", Shape{k.rows(), k.cols()}, " and ",
          Shape{v.rows(), v.cols()});
}

template <class Out>
void check_out(const Out& out, Index rows, Index cols) {
  require(out.rows() == rows && out.cols() == cols, "out must be ", Shape{rows, cols}, "; given ",
          Shape{out.rows(), out.cols()});
  require_rows_apart(out);
}

/// Whether a call that writes `output` would write into keys or values: those of a user's own type may lie anywhere.
template <StorageType S>
bool lies_in(const Footprint& output, const KeyRows<S>& keys) {
  if (output.empty()) return false;
  const auto meets = [&](const S* first, Index rows, Index dim, Index row_stride, Index head_stride) {
    first += keys.first_kv_head * head_stride;
    const Footprint head = footprint(first, rows, dim, row_stride),
                    last = footprint(first + (keys.kv_heads - 1) * head_stride, rows, dim, row_stride);
    if (head.empty() || output.end() <= std::min(head.begin, last.begin) ||
        std::max(head.end(), last.end()) <= output.begin)
      return false;
    for (Index h = 0; h < keys.kv_heads; ++h)
      if (share_an_element(output, footprint(first + h * head_stride, rows, dim, row_stride))) return true;
    return false;
  };
  for (const auto& run : keys.runs)
    if (meets(run.keys, run.rows, keys.head_dim, keys.key_row_stride, keys.key_head_stride) ||
        meets(run.values, run.rows, keys.v_head_dim, keys.value_row_stride, keys.value_head_stride))
      return true;
  return false;
}

/// Kernels iterate over a grid of positions and index scratch by the positions of runs; runs of a user's cache are
/// therefore checked once per call (owns_rows: the library's are not). Runs [runs] of key rows or of latent rows.
template <class Run>
void check_runs(std::span<const Run> runs, Index rows) {
  constexpr Index far = std::numeric_limits<Index>::max() / 4;
  Index held = 0, next = 0;
  for (const Run& run : runs) {
    if (run.rows == 0) continue;
    require(run.rows <= rows - held, "key rows must be as many as their runs hold; given ", rows, " for runs of ", held,
            " and ", run.rows);
    require(run.rows > 0 && run.position >= next && run.position <= far, "runs of rows must stand at positions 0 ... ",
            far, ", in ascending order and none twice; given ", run.rows, " rows at position ", run.position, " where ",
            next, " is the first that is free");
    next = run.position + run.rows;
    held += run.rows;
  }
  require(held == rows, "key rows must be as many as their runs hold; given ", rows, " for runs of ", held);
}

/// Position one past logical row `rows - 1`: that of the next token. Of key rows or of latent rows.
template <class Rows>
Index end_position(const Rows& keys, Index rows) {
  for (const auto& run : keys.runs) {
    if (rows <= run.rows && rows > 0) return run.position + rows;
    rows -= run.rows;
  }
  return 0;
}

template <class T, StorageType S, class Rows>
Index first_position(const Rule<T, S>& rule, const Rows& keys, Index sequence, Index n_queries,
                     const Options<T>& options) {
  if (options.first_position) return *options.first_position;
  const Index valid = rule.valid_keys(sequence, keys.rows);
  return (valid > 0 ? end_position(keys, valid) : options.first_key_position) - n_queries;
}

/// own: see owns_rows.
template <class T, StorageType S>
void check_call(const Rule<T, S>& rule, const KeyRows<S>& keys, const CallShape& shape, bool own = false) {
  CallShape call = shape;
  call.n_keys = keys.rows;
  call.last_key_position = end_position(keys, keys.rows) - 1;
  require(own || (!lies_in(call.output, keys) && !lies_in(call.log_sum_exp, keys)),
          "the output (and the log-sum-exp) must not share elements with the keys and values of the cache");
  rule.check(call);
}

template <class T>
T scale_of(const Options<T>& options, Index head_dim) {
  using std::sqrt;
  const double scale = options.scale.value_or(0);
  return scale != 0 ? static_cast<T>(scale) : head_dim > 0 ? T(1) / sqrt(static_cast<T>(head_dim)) : T(1);
}

/// k and v as one run; a sequence's rows of them, the first at `position`.
template <StorageType S>
struct MatrixKeys {
  KeyRun<S> run;
  KeyRows<S> rows;

  MatrixKeys(const ConstView<S>& k, const ConstView<S>& v, Index first, Index count, Index kv_heads, Index position)
      : run{count, position, k.data() + first * k.outerStride(), v.data() + first * v.outerStride(), nullptr, nullptr},
        rows(key_rows(run, k, v, kv_heads)) {
    rows.rows = count;
  }
  MatrixKeys(const MatrixKeys&) = delete;  // rows points at run
  MatrixKeys& operator=(const MatrixKeys&) = delete;
};

}}}  // namespace qkv::QKV_ABI::detail

// support/narrow_errors.hpp — how far attention in narrow numbers may be from exact attention on the same stored rows: what
// docs/numerics.md derives, for one query and head.
#pragma once

#include <qkv/kernel/decode/scores.hpp>
#include <qkv/kernel/tiled/packed_kv.hpp>

#include <algorithm>
#include <cmath>
#include <vector>

#include "numbers.hpp"

namespace support {

/// What is rounded, and how coarsely.
struct NarrowErrors {
  double query_step = 0;      // a number of the query, in max|q|
  double query_relative = 0;  // ... in its own size
  double rope_relative = 0;   // likewise, of the last rope_dim of them, and of the key
  qkv::Index rope_dim = 0;
  double weight_relative = 0;
  double value_relative = 0;
  double steps = 0;        // weight times scale: so many steps of the largest of a block; 0: not rounded
  qkv::Index block = 256;  // positions
};

inline constexpr double of_bfloat16 = 0x1p-8, of_short_power = 6.2e-5;

/// Of the tiled kernel and of the absorbed one, and of the decode kernel, for rows stored as S and queries of float.
template <class S>
NarrowErrors narrow_errors(qkv::Arithmetic arithmetic, qkv::Index head_dim, qkv::Index block) {
  using qkv::kernel::Isa;
  const double query_int16 = 0.5 / static_cast<double>(qkv::kernel::largest_int16(head_dim));
  if (arithmetic == qkv::Arithmetic::exact) return {};
  if (Isa::bf16_products && std::is_same_v<S, qkv::bfloat16>)
    return {.query_relative = of_bfloat16, .weight_relative = of_bfloat16 + of_short_power};
  if (!qkv::has_row_scale<S>) return {};
  if (!Isa::int16_products) return {};
  if (!Isa::int8_products) return {.query_step = query_int16, .steps = 32767, .block = block};
  if (arithmetic == qkv::Arithmetic::int8)
    return {.query_step = 0.5 / 127, .weight_relative = of_short_power, .steps = 255, .block = block};
  if (!Isa::bf16_products) return {.query_step = 0.5 / 127, .steps = 32767, .block = block};
  return {.query_step = 0.5 / 127, .weight_relative = of_bfloat16 + of_short_power, .value_relative = of_bfloat16};
}
template <class S>
NarrowErrors decode_errors(qkv::Arithmetic arithmetic, qkv::Index head_dim, qkv::Index group) {
  if (!qkv::kernel::decode_is_narrow<float, S>(arithmetic, group)) return {};
  using qkv::kernel::Isa;
  const bool in_int16 = Isa::int16_products && !Isa::bf16_products;  // a single query head too
  if (in_int16 && (group == 1 || !Isa::int8_products))
    return {.query_step = 0.5 / static_cast<double>(qkv::kernel::largest_int16(head_dim)), .steps = 32767};
  return {.query_step = 0.5 / 127, .steps = 32767, .block = 256};
}

/// One query of one head, as exact attention sees it: rows stored, probabilities 0 where a key is hidden.
struct ExactRow {
  std::vector<double> q;
  qkv::Matrix<double> keys, values;   // [n_keys, head_dim], [n_keys, v_head_dim]
  std::vector<double> probabilities;  // [n_keys]
  std::vector<bool> seen;             // [n_keys]
  std::vector<double> value_scales;   // [n_keys], where weights are counted in steps
  std::vector<qkv::Index> positions;  // [n_keys]
  double scale = 1;
};

struct ErrorBound {
  std::vector<double> worst, typical;  // [v_head_dim]: never more, and what the root mean square is below
};

inline ErrorBound error_bound(const NarrowErrors& e, const ExactRow& row) {
  const auto n = static_cast<qkv::Index>(row.probabilities.size()), d = static_cast<qkv::Index>(row.q.size());
  const auto at = [](qkv::Index i) { return static_cast<std::size_t>(i); };
  double most = 0, furthest = 0;
  const qkv::Index rope = d - e.rope_dim;  // where it begins
  for (qkv::Index x = 0; x < rope; ++x) most = std::max(most, std::abs(row.q[at(x)]));
  std::vector<double> typical_score(at(n));
  std::vector<double> tops;  // of blocks
  for (qkv::Index c = 0; c < n; ++c) {
    if (!row.seen[at(c)]) continue;
    double products = 0, errors = 0, squares = 0;  // of q·k: sizes; at most and typically, of one after another
    for (qkv::Index x = 0; x < d; ++x) {
      const double k = std::abs(row.keys(c, x)), product = std::abs(row.q[at(x)]) * k;
      const double error = x < rope ? e.query_step * most * k + e.query_relative * product : e.rope_relative * product;
      products += product, errors += error, squares += error * error;
    }
    const double scale = std::abs(row.scale), in_float = (static_cast<double>(d) + 16) * 0x1p-24 * products * scale;
    furthest = std::max(furthest, scale * errors + in_float);
    typical_score[at(c)] =  // uniform between two halves of a step: the root mean square is a half over √3
        (scale * std::sqrt(squares) + e.weight_relative) / std::sqrt(3.0) + in_float + 4e-7;
    if (e.steps == 0) continue;
    const auto block = at(row.positions[at(c)] / e.block);
    if (block >= tops.size()) tops.resize(block + 1, 0.0);
    tops[block] = std::max(tops[block], row.probabilities[at(c)] * row.value_scales[at(c)]);
  }
  const double share = std::tanh((furthest + e.weight_relative + 4e-7) / 2);  // of the weight that may move
  ErrorBound bound;
  for (qkv::Index x = 0; x < row.values.cols(); ++x) {
    double out = 0, high = -INFINITY, low = INFINITY, size = 0, squares = 0;
    for (qkv::Index c = 0; c < n; ++c) {
      if (!row.seen[at(c)]) continue;
      const double p = row.probabilities[at(c)], v = row.values(c, x);
      out += p * v, size += p * std::abs(v), squares += p * p * v * v, high = std::max(high, v), low = std::min(low, v);
    }
    double moved = 0;
    std::vector<double> lost(tops.size()), lost_squares(tops.size());
    for (qkv::Index c = 0; c < n; ++c) {
      if (!row.seen[at(c)]) continue;
      moved += row.probabilities[at(c)] * typical_score[at(c)] * std::abs(row.values(c, x) - out);
      if (e.steps == 0 || row.value_scales[at(c)] == 0) continue;
      const auto block = at(row.positions[at(c)] / e.block);
      const double error = tops[block] / (2 * e.steps) * std::abs(row.values(c, x)) / row.value_scales[at(c)];
      lost[block] += error, lost_squares[block] += error * error;
    }
    const double in_float = (static_cast<double>(n) + 16) * 0x1p-24 * size;
    double worst = share * std::max(high - low, 0.0) + 1.01 * e.value_relative * size + in_float;
    double typical = moved * moved + e.value_relative * e.value_relative * squares / 3 + in_float * in_float;
    for (std::size_t b = 0; b < lost.size(); ++b) worst += 1.01 * lost[b], typical += lost_squares[b];
    bound.worst.push_back(worst), bound.typical.push_back(std::sqrt(typical));
  }
  return bound;
}

}  // namespace support

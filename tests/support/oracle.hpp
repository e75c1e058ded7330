// support/oracle.hpp — attention by its definition, in long double. Shares nothing with the kernels: visibility is a
// plain function that each test states beside the mask it tests.
#pragma once

#include <qkv/heads.hpp>
#include <qkv/mask.hpp>

#include <cmath>
#include <limits>
#include <vector>

#include "numbers.hpp"

namespace support {

using qkv::At;
using qkv::Heads;
using qkv::Matrix;

inline constexpr long double nothing = -std::numeric_limits<long double>::infinity();

/// Unit normal (twelve uniforms), rounded to float, so that inputs of every scalar are equal.
template <class T>
Matrix<T> normals(Index rows, Index cols, std::uint64_t seed) {
  const Matrix<double> uniform = numbers<double>(rows, cols * 12, seed);
  Matrix<T> m(rows, cols);
  for (Index i = 0; i < rows; ++i)
    for (Index j = 0; j < cols; ++j)
      m(i, j) = static_cast<T>(static_cast<float>(uniform.row(i).segment(j * 12, 12).sum() / 2));
  return m;
}

/// What is left of unit-normal inputs after a kernel in T.
template <class T>
inline constexpr double tolerance = sizeof(T) == 4 ? 2e-6 : 1e-14;

/// Everything that the definition needs beside q, k, v.
struct Setting {
  Heads heads = {};
  double scale = 0;                       // 0: 1/√head_dim
  Index first_position = 0;               // of the first query
  Index sequence = 0;                     //
  std::vector<long double> sinks = {};    // none, or one per head
  std::vector<Index> key_positions = {};  // none: 0, 1, 2 …
};

struct Expected {
  Matrix<long double> out;                                    // [n_queries, heads·v_head_dim]
  Matrix<long double> log_sum_exp;                            // [n_queries, heads]
  Matrix<long double> scaled, scored, masked, probabilities;  // [heads·n_queries, n_keys]
};

inline bool everyone(const At&) { return true; }
inline long double unchanged(long double score, const At&) { return score; }

template <class Q, class K, class V, class Sees, class Score>
Expected attention_by_formula(const Q& q, const K& k, const V& v, const Setting& setting, const Sees& sees,
                              const Score& score) {
  const Index n = q.rows(), keys = k.rows(), heads = setting.heads.heads;
  const Index shared_by = heads / setting.heads.kv_heads;
  const Index d = q.cols() / heads, dv = v.cols() / setting.heads.kv_heads;
  const long double scale =
      setting.scale != 0 ? static_cast<long double>(setting.scale) : 1 / std::sqrt(static_cast<long double>(d));
  const auto wide = [](auto x) { return static_cast<long double>(x); };

  Expected e;
  e.out = Matrix<long double>::Zero(n, heads * dv);
  e.log_sum_exp.resize(n, heads);
  for (auto* stage : {&e.scaled, &e.scored, &e.masked, &e.probabilities}) stage->setZero(heads * n, keys);
  for (Index h = 0; h < heads; ++h)
    for (Index i = 0; i < n; ++i) {
      const Index kv = h / shared_by, row = h * n + i;
      const long double sink = setting.sinks.empty() ? nothing : setting.sinks[static_cast<std::size_t>(h)];
      long double top = sink;
      for (Index j = 0; j < keys; ++j) {
        const Index key_position =
            setting.key_positions.empty() ? j : setting.key_positions[static_cast<std::size_t>(j)];
        const At at{setting.sequence, h, i, j, setting.first_position + i, key_position};
        long double dot = 0;
        for (Index x = 0; x < d; ++x) dot += wide(q(i, h * d + x)) * wide(k(j, kv * d + x));
        e.scaled(row, j) = scale * dot;
        e.scored(row, j) = score(e.scaled(row, j), at);
        e.masked(row, j) = sees(at) ? e.scored(row, j) : nothing;
        if (e.masked(row, j) > top) top = e.masked(row, j);
      }
      long double total = sink == nothing ? 0 : std::exp(sink - top);
      for (Index j = 0; j < keys; ++j)
        if (e.masked(row, j) != nothing) total += std::exp(e.masked(row, j) - top);
      e.log_sum_exp(i, h) = top == nothing ? nothing : top + std::log(total);
      for (Index j = 0; j < keys; ++j) {
        if (e.masked(row, j) == nothing) continue;
        e.probabilities(row, j) = std::exp(e.masked(row, j) - top) / total;
        for (Index x = 0; x < dv; ++x) e.out(i, h * dv + x) += e.probabilities(row, j) * wide(v(j, kv * dv + x));
      }
    }
  return e;
}

/// max |a − b| where infinities must match exactly and NaN counts as a failure.
template <class A, class B>
double max_error_with_infinities(const A& a, const B& b) {
  if (a.rows() != b.rows() || a.cols() != b.cols()) return std::numeric_limits<double>::infinity();
  double worst = 0;
  for (Index i = 0; i < a.rows(); ++i)
    for (Index j = 0; j < a.cols(); ++j) {
      const auto x = static_cast<long double>(a(i, j)), y = static_cast<long double>(b(i, j));
      if (x == y) continue;
      const auto error = static_cast<double>(std::abs(x - y));
      if (!(error <= worst)) worst = std::isnan(error) ? std::numeric_limits<double>::infinity() : error;
    }
  return worst;
}

}  // namespace support

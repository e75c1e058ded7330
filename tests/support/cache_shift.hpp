// support/cache_shift.hpp — context shifts for every cache that has them: rotations, rows to drop, what may be rounded away.
#pragma once

#include <qkv/rope.hpp>
#include <qkv/storage.hpp>

#include <cmath>
#include <cstdint>
#include <limits>
#include <utility>
#include <vector>

#include "numbers.hpp"
#include "storages.hpp"

namespace support {

/// Both pairings; YaRN, whose attention factor a shift must not apply again; partial rotation.
inline const qkv::RopeConfig shifted_ropes[] = {
    {.pairing = qkv::Pairing::interleaved, .theta = 30},
    {.pairing = qkv::Pairing::half_split,
     .theta = 50,
     .scaling = qkv::yarn_scaling({.factor = 4, .original_context = 40, .attention_factor = 1.2})},
    {.pairing = qkv::Pairing::half_split, .dim = 4, .theta = 20}};

/// First row and number of rows, of 131: from the front, behind pinned rows, none, across a block of 64, the end, all.
inline const std::pair<Index, Index> drops[] = {{0, 37}, {5, 1}, {9, 0}, {3, 66}, {130, 1}, {0, 131}};

/// x without its rows first … first+n-1.
template <class T>
qkv::Matrix<T> without(const qkv::Matrix<T>& x, Index first, Index n) {
  qkv::Matrix<T> rest(x.rows() - n, x.cols());
  rest << x.topRows(first), x.bottomRows(x.rows() - first - n);
  return rest;
}

/// Keys below 2 in size, rounded to S, turned, rounded again, against keys that were rounded once: 2 + √2 half steps.
template <class S>
inline const double shift_tolerance = std::is_same_v<S, double>  ? 1e-13
                                      : std::is_same_v<S, float> ? 5e-7
                                                                 : 3.5 * rounding<S>;

/// What a cache's keys should be after any number of shifts: each row as it came, turned once.
class ShiftedRows {
 public:
  ShiftedRows(qkv::RopeConfig config, Index heads, Index head_dim)
      : config_(config), heads_(heads), dim_(head_dim), frequencies_(qkv::rope_frequencies(config, head_dim)) {}

  Index rows() const { return static_cast<Index>(rows_.size()); }
  void truncate(Index rows) { rows_.resize(static_cast<std::size_t>(rows)); }
  /// Rows `first` … of what a cache holds now are originals: they have come, were written anew, or read from a file.
  void came(const qkv::Matrix<double>& held, Index first, Index n) {
    rows_.resize(static_cast<std::size_t>(held.rows()));
    for (Index i = first; i < first + n; ++i) rows_[static_cast<std::size_t>(i)] = {held.row(i), 0};
  }
  void drop(Index first, Index n) {
    const auto begin = rows_.begin() + first;
    for (auto row = begin + n; row != rows_.end(); ++row) row->turned += n;
    rows_.erase(begin, begin + n);
  }
  /// The largest error of these keys, in roundings to S (and what double leaves of a pair and of its angle): at most 1 after one rounding.
  template <class S>
  double roundings(const qkv::Matrix<double>& held) const {
    if (held.rows() != rows()) return std::numeric_limits<double>::infinity();
    double worst = 0;
    for (Index i = 0; i < rows(); ++i)
      for (Index h = 0; h < heads_; ++h) {
        const auto& row = rows_[static_cast<std::size_t>(i)];
        const auto expected = turned(row.key.middleCols(h * dim_, dim_), row.turned);
        const double size = expected.cwiseAbs().maxCoeff(), slack = 5e-16 + 2e-16 * static_cast<double>(row.turned);
        for (Index j = 0; j < dim_; ++j) {
          const double error = std::abs(held(i, h * dim_ + j) - expected(j)) /
                               (row.turned > 0 ? rounding_of<S>(expected(j), size) + slack * size : 1e-300);
          if (!(error <= worst)) worst = error;
        }
      }
    return worst;
  }

 private:
  struct Row {
    qkv::RowVector<double> key;
    Index turned = 0;
  };
  template <class S>
  static double rounding_of(double x, double size) {
    if (qkv::has_row_scale<S>) return 1.001 * size * rounding<S>;
    return std::max(std::abs(x), static_cast<double>(std::numeric_limits<S>::min())) * rounding<S> * 1.001;
  }
  qkv::RowVector<double> turned(qkv::RowVector<double> x, Index by) const {
    const bool interleaved = config_.pairing == qkv::Pairing::interleaved;
    const Index pairs = frequencies_.size();
    for (Index i = 0; i < pairs; ++i) {
      const auto angle = -static_cast<long double>(by) * static_cast<long double>(frequencies_(i));
      const Index a = interleaved ? 2 * i : i, b = interleaved ? a + 1 : i + pairs;
      const long double p = x(a), q = x(b);
      x(a) = static_cast<double>(p * std::cos(angle) - q * std::sin(angle));
      x(b) = static_cast<double>(p * std::sin(angle) + q * std::cos(angle));
    }
    return x;
  }

  qkv::RopeConfig config_;
  Index heads_, dim_;
  qkv::RowVector<double> frequencies_;
  std::vector<Row> rows_;
};

/// Drops n of the rows at first, k times near the end of 2k + 60 rows, and says how many roundings the keys are off.
/// held(cache) are its keys in double, come(cache, n) appends n rows.
template <class S, class Cache, class Rope, class Held, class Come, class... How>
double roundings_after(Index k, Cache& cache, ShiftedRows expected, const Rope& rope, const Held& held,
                       const Come& come, How... how) {
  come(cache, 2 * k + 60);
  expected.came(held(cache), 0, cache.rows());
  std::uint64_t state = 88172645463325252u;
  const auto roll = [&](Index sides) {
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    return static_cast<Index>(state % static_cast<std::uint64_t>(sides));
  };
  for (Index i = 0; i < k; ++i) {
    const Index first = cache.rows() - 25 - roll(20), n = k == 1 ? 2 : roll(3);
    cache.drop_rows(first, n, rope, how...);
    expected.drop(first, n);
  }
  return expected.roundings<S>(held(cache));
}

}  // namespace support

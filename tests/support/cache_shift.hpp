// support/cache_shift.hpp — context shifts for every cache that has them: rotations, rows to drop, what may be rounded away.
#pragma once

#include <qkv/rope.hpp>
#include <qkv/storage.hpp>

#include <utility>

#include "numbers.hpp"

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
inline constexpr double shift_tolerance = std::is_same_v<S, double>          ? 1e-13
                                          : std::is_same_v<S, float>         ? 5e-7
                                          : std::is_same_v<S, qkv::half>     ? 3.5 / 2048
                                          : std::is_same_v<S, qkv::bfloat16> ? 3.5 / 256
                                                                             : 0;

}  // namespace support

// support/numbers.hpp — reproducible inputs, and comparisons in which NaN counts as a failure.
#pragma once

#include <qkv/matrix.hpp>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>

namespace support {

using qkv::Index;

/// Uniform in [-1, 1), the same on every platform; 24 bits, so that float and double inputs are equal.
template <class T>
qkv::Matrix<T> numbers(Index rows, Index cols, std::uint64_t seed) {
  qkv::Matrix<T> m(rows, cols);
  std::uint64_t state = seed * 0x9E3779B97F4A7C15u + 1;
  for (Index i = 0; i < m.size(); ++i) {
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    m.data()[i] = static_cast<T>(static_cast<double>(state >> 40) / 8388608.0 - 1.0);
  }
  return m;
}

/// max |a − b|; infinite where the shapes differ or either has a NaN.
template <class A, class B>
double max_error(const A& a, const B& b) {
  if (a.rows() != b.rows() || a.cols() != b.cols()) return std::numeric_limits<double>::infinity();
  double worst = 0;
  for (Index i = 0; i < a.rows(); ++i)
    for (Index j = 0; j < a.cols(); ++j) {
      const auto error =
          std::abs(static_cast<double>(static_cast<long double>(a(i, j)) - static_cast<long double>(b(i, j))));
      if (!(error <= worst)) worst = std::isnan(error) ? std::numeric_limits<double>::infinity() : error;
    }
  return worst;
}

/// Same shape, same bits (-0 differs from 0, a NaN equals itself). Not for long double, which has padding.
template <class A, class B>
bool same_bits(const A& a, const B& b) {
  if (a.rows() != b.rows() || a.cols() != b.cols()) return false;
  for (Index i = 0; i < a.rows(); ++i)
    for (Index j = 0; j < a.cols(); ++j) {
      const auto x = a(i, j), y = b(i, j);
      static_assert(sizeof(x) == sizeof(y) && sizeof(x) <= 8);
      if (std::memcmp(&x, &y, sizeof(x)) != 0) return false;
    }
  return true;
}

/// The text of the error that f raises, or "".
template <class Error = std::invalid_argument, class F>
std::string message_of(F&& f) {
  try {
    f();
  } catch (const Error& error) {
    return error.what();
  }
  return "";
}

inline bool contains(const std::string& text, const std::string& part) { return text.find(part) != std::string::npos; }

}  // namespace support

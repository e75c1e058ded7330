// terminal.hpp — what the examples print with: heat maps, bars, and claims that a program checks about itself.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <string>
#include <vector>

#include <qkv/matrix.hpp>

namespace terminal {

/// Two columns of ink for a number between 0 and 1.
inline const char* shade(double x) {
  return x < 0.05 ? "  " : x < 0.25 ? "░░" : x < 0.5 ? "▒▒" : x < 0.75 ? "▓▓" : "██";
}

/// A matrix of numbers between 0 and 1 in per cent, with a word before each row and above each column.
template <class T>
void heat_map(const qkv::Matrix<T>& m, const std::vector<std::string>& rows, const std::vector<std::string>& columns) {
  std::printf("%10s", "");
  for (const std::string& word : columns) std::printf(" %6s", word.c_str());
  std::printf("\n");
  for (qkv::Index i = 0; i < m.rows(); ++i) {
    std::printf("%10s", rows[static_cast<std::size_t>(i)].c_str());
    for (qkv::Index j = 0; j < m.cols(); ++j)
      std::printf(" %s%4.0f", shade(static_cast<double>(m(i, j))), 100 * static_cast<double>(m(i, j)));
    std::printf("\n");
  }
}

/// A bar of `fraction` of `width` columns, to an eighth of a column.
inline std::string bar(double fraction, int width) {
  constexpr const char* parts[] = {"", "▏", "▎", "▍", "▌", "▋", "▊", "▉"};
  const int eighths = static_cast<int>(std::lround(8 * width * std::clamp(fraction, 0.0, 1.0)));
  std::string text;
  for (int i = 0; i < eighths / 8; ++i) text += "█";
  return text + parts[eighths % 8];
}

/// The largest difference of two matrices of one shape. NaN if there is one.
template <class A, class B>
double difference(const A& a, const B& b) {
  double worst = 0;
  for (qkv::Index i = 0; i < a.rows(); ++i)
    for (qkv::Index j = 0; j < a.cols(); ++j) {
      const double d = std::abs(static_cast<double>(a(i, j)) - static_cast<double>(b(i, j)));
      if (!(d <= worst)) worst = d;
    }
  return worst;
}

/// What a program says about its own numbers. `return claims.status();` ends it with an error where one of them fails.
class Claims {
 public:
  void operator()(bool holds, const std::string& text) {
    std::printf("  %s: %s\n", holds ? "holds" : "FAILS", text.c_str());
    all_hold_ = all_hold_ && holds;
  }
  int status() const { return all_hold_ ? 0 : 1; }

 private:
  bool all_hold_ = true;
};

}  // namespace terminal

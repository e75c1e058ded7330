// support/machine.hpp — what the machine can do, measured in this process: the FMA peak, and normal random numbers.
#pragma once

#include <qkv/kernel/register_tile.hpp>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <vector>

namespace machine {

using qkv::Index;

inline double seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

/// Multiply-adds of T per second times two, in registers, for about 50 microseconds: enough independent sums to hide
/// their latency, few enough for the registers.
template <class T>
double fma_peak() {
  using V = qkv::kernel::Simd<T>;
  constexpr Index sums = V::registers >= 32 ? 20 : 10;
  constexpr std::int64_t steps = 10000;
  typename V::Vec sum[std::size_t(sums)];
  T one = 1;
  asm volatile("" : "+m"(one));  // not a constant to the compiler
  const auto x = V::broadcast(one), y = V::sub(x, x);
  for (auto& s : sum) s = x;
  double best = 0;
  for (int repeat = 0; repeat < 5; ++repeat) {
    const double start = seconds();
    for (std::int64_t i = 0; i < steps; ++i) qkv::kernel::unroll<sums>([&](auto j) { sum[j] = V::fma(sum[j], x, y); });
    const double time = seconds() - start;
    best = std::max(best, 2.0 * static_cast<double>(steps * sums * V::width) / time);
  }
  auto total = sum[0];
  for (const auto& s : sum) total = V::add(total, s);
  T sink = V::sum_lanes(total);
  asm volatile("" : "+m"(sink));
  return best;
}

inline double median(std::vector<double> values) {
  if (values.empty()) return 0;
  const auto middle = values.begin() + static_cast<std::ptrdiff_t>(values.size() / 2);
  std::nth_element(values.begin(), middle, values.end());
  return *middle;
}

/// Normal numbers, the same on every machine.
inline qkv::Matrix<float> normal(Index rows, Index cols, std::uint64_t seed) {
  qkv::Matrix<float> m(rows, cols);
  std::uint64_t state = seed * 0x9E3779B97F4A7C15U + 1;
  const auto uniform = [&] {
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    return (static_cast<double>(state >> 40) + 0.5) / 16777216.0;
  };
  for (Index i = 0; i < m.size(); ++i)
    m.data()[i] = static_cast<float>(std::sqrt(-2 * std::log(uniform())) * std::cos(6.283185307179586 * uniform()));
  return m;
}

}  // namespace machine

// support/machine.hpp — what the machine can do, measured in this process: the FMA peak, the read bandwidth; and normal
// random numbers.
#pragma once

#include <qkv/cache/blocks.hpp>
#include <qkv/product/packed_product.hpp>
#include <qkv/workspace.hpp>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <thread>
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

/// Bytes per second of reading `bytes` bytes once, in order, from memory in huge pages where there are any; several
/// threads read a part each. What was in the caches before is not there afterwards.
inline double read_bandwidth(Index bytes, Index threads = 1) {
  using V = qkv::kernel::Simd<float>;
  constexpr Index sums = 8, step = sums * V::width;
  static std::vector<float, qkv::detail::HugePageAllocator<float>> memory;
  const Index steps = bytes / static_cast<Index>(sizeof(float)) / step;
  if (static_cast<Index>(memory.size()) < steps * step) memory.assign(static_cast<std::size_t>(steps * step), 1.0F);
  const auto read = [&](Index first, Index last) {
    typename V::Vec top[std::size_t(sums)];
    for (auto& t : top) t = V::zero();
    for (const float *p = memory.data() + first * step, *end = memory.data() + last * step; p < end; p += step)
      qkv::kernel::unroll<sums>([&](auto j) {
        qkv::kernel::prefetch_near(reinterpret_cast<const char*>(p + j * V::width) + 6144);
        top[j] = V::max(top[j], V::load(p + j * V::width));
      });
    for (const auto& t : top) top[0] = V::max(top[0], t);
    float sink = V::max_lanes(top[0]);
    asm volatile("" : "+m"(sink));
  };
  const double start = seconds();
  std::vector<std::thread> others;
  for (Index t = 1; t < threads; ++t)
    others.emplace_back([&, t] { read(steps * t / threads, steps * (t + 1) / threads); });
  read(0, steps / threads);
  for (auto& t : others) t.join();
  return static_cast<double>(steps * step) * sizeof(float) / (seconds() - start);
}

/// Memory to be read as a cache is: from the same allocator, on the same kind of pages, as many bytes.
class ReadProbe {
 public:
  explicit ReadProbe(Index bytes)
      : floats_(std::max<Index>(bytes / static_cast<Index>(sizeof(float)) / step * step, step)), memory_(floats_) {
    std::fill_n(data(), floats_, 1.0F);
  }

  /// Bytes per second of reading all of it once, in order; with `threads` > 1 each reads one stretch.
  template <class E>
  double bandwidth(const E& executor, Index threads) const {
    const double start = seconds();
    executor(threads, [&](Index i) { read(floats_ / step * i / threads, floats_ / step * (i + 1) / threads); });
    return static_cast<double>(floats_) * sizeof(float) / (seconds() - start);
  }

 private:
  using V = qkv::kernel::Simd<float>;
  static constexpr Index sums = 8, step = sums * V::width;

  float* data() const { return memory_.data(); }
  void read(Index first, Index end) const {
    typename V::Vec top[std::size_t(sums)];
    for (auto& t : top) t = V::zero();
    for (Index i = first; i < end; ++i)
      qkv::kernel::unroll<sums>([&](auto j) { top[j] = V::max(top[j], V::load(data() + i * step + j * V::width)); });
    for (const auto& t : top) top[0] = V::max(top[0], t);
    float sink = V::max_lanes(top[0]);
    asm volatile("" : "+m"(sink));
  }

  Index floats_;
  qkv::detail::Numbers<float> memory_;
};

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

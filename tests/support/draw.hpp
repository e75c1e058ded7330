// support/draw.hpp — what a sweep draws, from a seed, the same on every platform.
#pragma once

#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <random>

#include <qkv/matrix.hpp>

namespace support {

/// Rounds of a sweep: fewer where an instruction costs ten, as under sanitizers and, with long double in software, emulators.
constexpr int rounds(int n) {
#if defined(__SANITIZE_ADDRESS__) || defined(__aarch64__)
  return (n + 3) / 4;
#else
  return n;
#endif
}

class Draw {
 public:
  explicit Draw(std::uint64_t seed) : bits_(seed) {}
  qkv::Index whole(qkv::Index low, qkv::Index high) {
    return low + static_cast<qkv::Index>(bits_() % static_cast<std::uint64_t>(high - low + 1));
  }
  float uniform(double low, double high) {
    return static_cast<float>(low + (high - low) * static_cast<double>(bits_() >> 11) * 0x1p-53);
  }
  /// 10^x, x uniform.
  float power(double low, double high) { return std::pow(10.0F, uniform(low, high)); }
  float sign() { return bits_() % 2 == 0 ? 1.0F : -1.0F; }
  template <class X>
  X one_of(std::initializer_list<X> from) {
    return from.begin()[whole(0, static_cast<qkv::Index>(from.size()) - 1)];
  }

 private:
  std::mt19937_64 bits_;
};

}  // namespace support

// base/multiply_add.hpp — a·b + c with the same bits in vectorised loops, their tails and scalar code. (A compiler is free to
// contract some of them to fused operations and others not.)
//
// Before: base/in_place.hpp   Next: base/huge_pages.hpp
#pragma once

#include <cmath>
#include <concepts>

#include "../version.hpp"

namespace qkv { inline namespace QKV_ABI { namespace detail {

/// Fused (rounded once) where the target has the instruction, rounded twice everywhere else; never a mixture.
template <class T>
T multiply_add(T a, T b, T c) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA) || defined(__FP_FAST_FMAF)
  if constexpr (std::same_as<T, float> || std::same_as<T, double>) return std::fma(a, b, c);
#endif
  return a * b + c;
}

}}}  // namespace qkv::QKV_ABI::detail

// compare.hpp — is a result what the third party's program computed? |got - expected| <= atol + rtol·|expected|.
#pragma once

#include <cmath>
#include <cstdio>

#include "case.hpp"

namespace conformance {

struct Verdict {
  double worst = 0;          // largest error as a fraction of what is tolerated
  std::string failure = {};  // empty: right

  void include(const Verdict& other) {
    worst = std::max(worst, other.worst);
    if (failure.empty()) failure = other.failure;
  }
};

/// NaN on either side is a failure; infinities must match exactly. An expected half is compared with the result in half.
inline Verdict compare(const std::string& name, const Tensor& got, const Tensor& expected, double rtol, double atol) {
  if (got.shape != expected.shape)
    return {0, name + " has shape " + shape_text(got.shape) + ", expected " + shape_text(expected.shape)};
  Verdict verdict;
  for (Index i = 0; i < expected.size(); ++i) {
    const double a = expected.dtype == "<f2" ? static_cast<float>(static_cast<qkv::half>(static_cast<float>(got[i])))
                                             : got[i],
                 b = expected[i];
    double error = 0;
    if (std::isnan(a) || std::isnan(b) || std::isinf(a) || std::isinf(b))
      error = a == b ? 0 : INFINITY;
    else if (a != b)
      error = std::abs(a - b) / (atol + rtol * std::abs(b));
    verdict.worst = std::max(verdict.worst, error);
    if (error > 1 && verdict.failure.empty()) {
      char text[96];
      std::snprintf(text, sizeof text, " element %td is %.9g, expected %.9g", i, a, b);
      verdict.failure = name + text;
    }
  }
  return verdict;
}

/// Every expected tensor against every result of its name.
inline Verdict compare(const std::string& group, const Results& results, const Tensors& expected, double rtol,
                       double atol) {
  Verdict verdict;
  for (const auto& [name, tensor] : expected) {
    const auto [first, last] = results.equal_range(name);
    if (first == last) verdict.include({0, group + name + " is not an output of this operator"});
    for (auto it = first; it != last; ++it) verdict.include(compare(group + name, it->second, tensor, rtol, atol));
  }
  return verdict;
}

}  // namespace conformance

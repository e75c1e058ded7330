// detail/overlap.hpp — do two strided matrices share an element? Interleaved column blocks of one buffer do not.
#pragma once

#include <algorithm>
#include <cstdint>
#include <span>

#include "../matrix.hpp"

namespace qkv::inline QKV_ABI::detail {

/// Rows of `row_bytes` bytes, `stride_bytes` apart, from `begin`.
struct Footprint {
  std::intptr_t begin = 0;
  std::intptr_t rows = 0, row_bytes = 0, stride_bytes = 0;
  std::intptr_t end() const { return begin + (rows - 1) * stride_bytes + row_bytes; }
  bool empty() const { return rows == 0 || row_bytes == 0; }
};

template <MatrixLike X>
Footprint footprint(const X& x) {
  constexpr auto size = static_cast<std::intptr_t>(sizeof(ScalarOf<X>));
  return {reinterpret_cast<std::intptr_t>(x.derived().data()), x.rows(), x.cols() * size,
          row_stride(x.derived()) * size};
}

template <class T>
Footprint footprint(std::span<const T> x) {
  const auto bytes = static_cast<std::intptr_t>(x.size_bytes());
  return {reinterpret_cast<std::intptr_t>(x.data()), 1, bytes, bytes};
}

/// Exact; costs one division per row of `a`, and only where the two ranges of addresses meet at all.
EIGEN_DONT_INLINE inline bool share_an_element(const Footprint& a, const Footprint& b) {
  if (a.empty() || b.empty() || a.end() <= b.begin || b.end() <= a.begin) return false;
  for (std::intptr_t i = 0; i < a.rows; ++i) {
    const std::intptr_t begin = a.begin + i * a.stride_bytes, end = begin + a.row_bytes;
    if (end <= b.begin || begin >= b.end()) continue;
    // The last row of b that begins before `end`: the only candidate that can reach furthest into [begin, end).
    const std::intptr_t last =
        b.stride_bytes > 0 ? std::min(b.rows - 1, (end - 1 - b.begin) / b.stride_bytes) : b.rows - 1;
    if (b.begin + last * b.stride_bytes + b.row_bytes > begin) return true;
  }
  return false;
}

/// Raises where an output would overwrite an element that is still to be read.
template <MatrixLike Out, MatrixLike In>
void require_disjoint(const Out& out, const In& in, const char* name) {
  if constexpr (is_viewable<In>)
    require(!share_an_element(footprint(out), footprint(in)), "the output must not share elements with the input ",
            name);
}

}  // namespace qkv::inline QKV_ABI::detail

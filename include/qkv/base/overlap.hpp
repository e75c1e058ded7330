// base/overlap.hpp — whether two strided matrices share an element. (Interleaved column blocks of one buffer do not.)
//
// Before: base/require.hpp   Next: base/in_place.hpp
#pragma once

#include <algorithm>
#include <cstdint>
#include <span>

#include "../matrix.hpp"

namespace qkv { inline namespace QKV_ABI { namespace detail {

/// Rows of `row_bytes` bytes, `stride_bytes` apart, upwards from `begin`.
struct Footprint {
  std::intptr_t begin = 0;
  std::intptr_t rows = 0, row_bytes = 0, stride_bytes = 0;  // stride_bytes >= 0
  std::intptr_t end() const { return begin + (rows - 1) * stride_bytes + row_bytes; }
  bool empty() const { return rows == 0 || row_bytes == 0; }
};

/// Of rows `stride` elements apart, upwards or downwards from the one at `first`: the same bytes, listed from the lowest.
template <class T>
Footprint footprint(const T* first, Index rows, Index cols, Index stride) {
  constexpr auto size = static_cast<std::intptr_t>(sizeof(T));
  if (rows == 0 || cols == 0) return {};  // the other may be any number, too large to multiply
  const std::intptr_t begin = reinterpret_cast<std::intptr_t>(first), step = stride * size;
  return {step < 0 ? begin + (rows - 1) * step : begin, rows, cols * size, step < 0 ? -step : step};
}

template <MatrixLike X>
Footprint footprint(const X& x) {
  return footprint(x.derived().data(), x.rows(), x.cols(), row_stride(x.derived()));
}

template <class T>
Footprint footprint(std::span<const T> x) {
  return footprint(x.data(), 1, static_cast<Index>(x.size()), 0);
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
  bool shared = false;
  if constexpr (is_viewable<In>) {
    shared = share_an_element(footprint(out), footprint(in));
  } else if constexpr ((In::Flags & Eigen::DirectAccessBit) != 0) {  // another order: element by element
    const auto& x = in.derived();
    for (Index i = 0; i < x.outerSize() && !shared; ++i)
      shared = share_an_element(footprint(out),
                                footprint(x.data() + i * x.outerStride(), x.innerSize(), 1, x.innerStride()));
  }
  require(!shared, "the output must not share elements with the input ", name);
}

}}}  // namespace qkv::QKV_ABI::detail

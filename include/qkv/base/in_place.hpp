// base/in_place.hpp — the rule for outputs of row-wise functions: `out` is x itself, or shares no element with it.
//
// Before: base/overlap.hpp   Next: base/multiply_add.hpp
#pragma once

#include "overlap.hpp"

namespace qkv { inline namespace QKV_ABI { namespace detail {

/// Raises where `out` shares elements with x without being x, row for row.
template <class T>
void require_same_or_disjoint(const ConstView<T>& out, const ConstView<T>& x) {
  const bool same = out.data() == x.data() && (out.outerStride() == x.outerStride() || out.rows() <= 1);
  require(same || !share_an_element(footprint(out), footprint(x)),
          "the output must be the input itself or share no element with it");
}

}}}  // namespace qkv::QKV_ABI::detail

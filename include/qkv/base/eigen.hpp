// base/eigen.hpp — Eigen/Core, without the spurious warnings of g++ 12.
//
// Before: base/huge_pages.hpp   Next: base/warnings_off.hpp
#pragma once

// g++ 12 reports -Wmaybe-uninitialized from its own intrinsics of 512 bits, inlined through Eigen.
#include "./warnings_off.hpp"

#include <Eigen/Core>

#include "./warnings_on.hpp"

static_assert(EIGEN_VERSION_AT_LEAST(3, 4, 0), "qkv needs Eigen 3.4 or later");

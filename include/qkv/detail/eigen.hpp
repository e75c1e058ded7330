// detail/eigen.hpp — Eigen, without the false alarms of g++ 12.
#pragma once

// g++ 12 with AVX-512 reports -Wmaybe-uninitialized from its own intrinsics (_mm512_undefined_*) inlined through Eigen.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

#include <Eigen/Core>

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif

static_assert(EIGEN_VERSION_AT_LEAST(3, 4, 0), "qkv needs Eigen 3.4 or later");

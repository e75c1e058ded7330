// base/warnings_off.hpp — g++ from here to base/warnings_on.hpp without the warnings that intrinsics give.
//
// g++ 12 warns of the undefined starting values inside AVX-512 intrinsics, of registers as template arguments and, without
// optimisation, of sign conversions in intrinsics that are macros. Included more than once.
//
// Before: base/eigen.hpp   Next: base/warnings_on.hpp
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wignored-attributes"
#pragma GCC diagnostic ignored "-Wsign-conversion"
#endif

// base/warnings_off.hpp — g++ from here to base/warnings_on.hpp without the warnings that intrinsics give.
//
// g++ 12 takes the undefined starting values of AVX-512 intrinsics for bugs of their users, minds registers as template
// arguments, and without optimisation some intrinsics are macros that convert signs. Included more than once.
//
// Before: base/eigen.hpp   Next: base/warnings_on.hpp
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wignored-attributes"
#pragma GCC diagnostic ignored "-Wsign-conversion"
#endif

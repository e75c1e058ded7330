// base/warnings_on.hpp — the end of base/warnings_off.hpp.
//
// Before: base/warnings_off.hpp
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif

// version.hpp — the version, the build this translation unit belongs to, and the one compiler mode that is refused.
//
// The whole library lives in `namespace qkv::inline QKV_ABI`. QKV_ABI names all that our code is compiled by: instruction
// set, FMA, conversions of half, narrow products, whether Eigen may vectorise, exceptions. So two units compiled differently
// never share an instantiation: passing one of our types between them is a link error, not undefined behaviour. (Eigen's
// own symbols stay mixed: one program, one -march.)
//
// Next: matrix.hpp
#pragma once

#define QKV_VERSION_MAJOR 0
#define QKV_VERSION_MINOR 1
#define QKV_VERSION_PATCH 0

// Scores of -inf mean "masked" and NaN must reach the output: with finite-math compilers may remove both.
// gcc and clang always define __FINITE_MATH_ONLY__ (0 or 1); clang 14 does not show -fassociative-math: do not use it.
#if (defined(__FINITE_MATH_ONLY__) && __FINITE_MATH_ONLY__) || defined(__ASSOCIATIVE_MATH__) || defined(_M_FP_FAST)
#error \
    "qkv needs infinities, NaN and the written order of additions: compile without -ffast-math, -ffinite-math-only, -fassociative-math, /fp:fast"
#endif

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#define QKV_DETAIL_ISA avx512
#elif defined(__AVX512F__)
#define QKV_DETAIL_ISA avx512f
#elif defined(__AVX2__)
#define QKV_DETAIL_ISA avx2
#elif defined(__AVX__)
#define QKV_DETAIL_ISA avx
#elif defined(__SSE2__) || defined(_M_X64)
#define QKV_DETAIL_ISA sse2
#elif defined(__ARM_NEON)
#define QKV_DETAIL_ISA neon
#else
#define QKV_DETAIL_ISA scalar
#endif

#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
#define QKV_DETAIL_FMA _fma
#else
#define QKV_DETAIL_FMA
#endif

#if defined(__F16C__)
#define QKV_DETAIL_HALF _f16c
#else
#define QKV_DETAIL_HALF
#endif

#if defined(__AVX512BF16__) && defined(__AVX512VNNI__)
#define QKV_DETAIL_DOT _bf16_vnni
#elif defined(__AVX512BF16__)
#define QKV_DETAIL_DOT _bf16
#elif defined(__AVX512VNNI__)
#define QKV_DETAIL_DOT _vnni
#else
#define QKV_DETAIL_DOT
#endif

#if defined(EIGEN_DONT_VECTORIZE)
#define QKV_DETAIL_LANES _novector
#else
#define QKV_DETAIL_LANES
#endif

#if defined(__cpp_exceptions) || defined(_CPPUNWIND)
#define QKV_DETAIL_EXCEPTIONS
#else
#define QKV_DETAIL_EXCEPTIONS _noexcept
#endif

// QKV_ABI is put together anew wherever it stands: these and the parts above must stay defined.
#define QKV_DETAIL_JOIN2(a, b, c, d, e, f) abi_##a##b##c##d##e##f
#define QKV_DETAIL_JOIN(a, b, c, d, e, f) QKV_DETAIL_JOIN2(a, b, c, d, e, f)
#define QKV_ABI                                                                                      \
  QKV_DETAIL_JOIN(QKV_DETAIL_ISA, QKV_DETAIL_FMA, QKV_DETAIL_HALF, QKV_DETAIL_DOT, QKV_DETAIL_LANES, \
                  QKV_DETAIL_EXCEPTIONS)

#define QKV_DETAIL_TEXT2(a) #a
#define QKV_DETAIL_TEXT(a) QKV_DETAIL_TEXT2(a)

namespace qkv::inline QKV_ABI {

struct Version {
  int major = 0, minor = 0, patch = 0;
};

inline constexpr Version version{QKV_VERSION_MAJOR, QKV_VERSION_MINOR, QKV_VERSION_PATCH};

/// The build this translation unit belongs to: "abi_<isa>[_fma][_f16c][_bf16][_vnni][_novector][_noexcept]".
inline constexpr const char* build_name = QKV_DETAIL_TEXT(QKV_ABI);

/// The instruction set the compiler was told to use: "avx512" (with BW, DQ and VL), "avx512f" (not all of these), "avx2",
/// "avx", "sse2", "neon" or "scalar".
inline constexpr const char* isa_name = QKV_DETAIL_TEXT(QKV_DETAIL_ISA);

}  // namespace qkv::inline QKV_ABI

#undef QKV_DETAIL_TEXT
#undef QKV_DETAIL_TEXT2

// version.hpp — the version, the build this translation unit belongs to, and the compiler modes that are refused.
//
// The whole library lives in `namespace qkv { inline namespace QKV_ABI {`. QKV_ABI names all that our code or the layout of our types
// depends on: instruction set, FMA, conversions of half, narrow products, whether Eigen may vectorise, how it aligns and
// allocates, the standard library's mode, exceptions. What is usual is not spelt out: "abi_avx2_fma_f16c". So two units
// compiled differently never share an instantiation: passing one of our types between them is a link error, not undefined
// behaviour. (Eigen's own symbols stay mixed: one program, one -march.)
//
// Next: matrix.hpp
#pragma once

#define QKV_VERSION_MAJOR 0
#define QKV_VERSION_MINOR 1
#define QKV_VERSION_PATCH 0

// g++ 10 calls its C++20 201709. The include of a header that does not exist stops the compiler behind the error, which
// thousands of others would hide.
#if __cplusplus < 201709L && !(defined(_MSVC_LANG) && _MSVC_LANG >= 201709L)
#error "qkv needs C++20: compile with -std=c++20 (MSVC: /std:c++20; CMake: cxx_std_20)"
#include <qkv_needs_cpp20>
#endif

// Scores of -inf mean "masked" and NaN must reach the output: with finite-math compilers may remove both.
// gcc and clang always define __FINITE_MATH_ONLY__ (0 or 1). clang shows neither half of it alone nor -fassociative-math:
// detail::keeps_numbers below finds them.
#if (defined(__FINITE_MATH_ONLY__) && __FINITE_MATH_ONLY__) || defined(__ASSOCIATIVE_MATH__) || defined(_M_FP_FAST)
#error \
    "qkv needs infinities, NaN and the written order of additions: compile without -ffast-math, -ffinite-math-only, -fassociative-math, /fp:fast"
#endif

#include <cstddef>
#include <type_traits>

#include "base/eigen.hpp"  // decides whether there are vectors, and how memory is aligned

static_assert(std::is_same_v<Eigen::Index, std::ptrdiff_t> && sizeof(Eigen::Index) == 8,
              "qkv counts in std::ptrdiff_t of 64 bits: compile for a 64-bit target, without "
              "EIGEN_DEFAULT_DENSE_INDEX_TYPE");

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

// Steps between two of these. Of "avx512f": which parts of AVX-512 the compiler has beside it.
#if !defined(__AVX512F__) && (defined(__AVX__) || !defined(__SSE3__))
#define QKV_DETAIL_STEP
#elif !defined(__AVX512F__) && defined(__SSE4_2__)
#define QKV_DETAIL_STEP _sse42
#elif !defined(__AVX512F__) && defined(__SSE4_1__)
#define QKV_DETAIL_STEP _sse41
#elif !defined(__AVX512F__) && defined(__SSSE3__)
#define QKV_DETAIL_STEP _ssse3
#elif !defined(__AVX512F__)
#define QKV_DETAIL_STEP _sse3
#elif defined(__AVX512BW__) && defined(__AVX512DQ__) && !defined(__AVX512VL__)
#define QKV_DETAIL_STEP _bw_dq
#elif defined(__AVX512BW__) && !defined(__AVX512DQ__) && defined(__AVX512VL__)
#define QKV_DETAIL_STEP _bw_vl
#elif !defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#define QKV_DETAIL_STEP _dq_vl
#elif defined(__AVX512BW__) && !defined(__AVX512DQ__)
#define QKV_DETAIL_STEP _bw
#elif !defined(__AVX512BW__) && defined(__AVX512DQ__)
#define QKV_DETAIL_STEP _dq
#elif !defined(__AVX512BW__) && defined(__AVX512VL__)
#define QKV_DETAIL_STEP _vl
#else
#define QKV_DETAIL_STEP
#endif

#if defined(__FMA__) || defined(__ARM_FEATURE_FMA) || defined(__FP_FAST_FMAF) || defined(EIGEN_VECTORIZE_FMA)
#define QKV_DETAIL_FMA _fma
#else
#define QKV_DETAIL_FMA
#endif

#if defined(EIGEN_HAS_ARM64_FP16_SCALAR_ARITHMETIC) || defined(EIGEN_VECTORIZE_AVX512FP16)
#define QKV_DETAIL_HALF _fp16
#elif defined(__F16C__)
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
#elif !defined(__AVX512F__) && defined(__AVX2__) && defined(QKV_TEST_EMULATED_VNNI)
#define QKV_DETAIL_DOT _emulated_vnni
#elif !defined(__AVX512F__) && defined(__AVXVNNI__)
#define QKV_DETAIL_DOT _vnni
#else
#define QKV_DETAIL_DOT
#endif

// By -DEIGEN_DONT_VECTORIZE, or by Eigen where it may not align.
#if defined(EIGEN_DONT_VECTORIZE)
#define QKV_DETAIL_LANES _novector
#else
#define QKV_DETAIL_LANES
#endif

// Alignment in bytes: of arrays inside objects (the layout of fixed-size matrices), as assumed of matrices on the heap, and
// of the heap's blocks.
#if EIGEN_MAX_STATIC_ALIGN_BYTES == EIGEN_IDEAL_MAX_ALIGN_BYTES && \
    EIGEN_MAX_ALIGN_BYTES == EIGEN_IDEAL_MAX_ALIGN_BYTES && EIGEN_DEFAULT_ALIGN_BYTES == EIGEN_IDEAL_MAX_ALIGN_BYTES
#define QKV_DETAIL_ALIGN
#else
#define QKV_DETAIL_ALIGN2(a, b, c) _align_##a##_##b##_##c
#define QKV_DETAIL_ALIGN1(a, b, c) QKV_DETAIL_ALIGN2(a, b, c)
#define QKV_DETAIL_ALIGN \
  QKV_DETAIL_ALIGN1(EIGEN_MAX_STATIC_ALIGN_BYTES, EIGEN_MAX_ALIGN_BYTES, EIGEN_DEFAULT_ALIGN_BYTES)
#endif

// Who frees a matrix must know whether it came from malloc as it is: up to 16 bytes usually, but not under ASan or musl.
#if EIGEN_DEFAULT_ALIGN_BYTES == 0 || (EIGEN_DEFAULT_ALIGN_BYTES > 16) == !EIGEN_MALLOC_ALREADY_ALIGNED
#define QKV_DETAIL_HEAP
#elif EIGEN_MALLOC_ALREADY_ALIGNED
#define QKV_DETAIL_HEAP _malloc
#else
#define QKV_DETAIL_HEAP _handmade
#endif

#if defined(_LIBCPP_VERSION)
#define QKV_DETAIL_LIBRARY _libcxx
#elif defined(_GLIBCXX_DEBUG)
#define QKV_DETAIL_LIBRARY _debug
#elif defined(_GLIBCXX_USE_CXX11_ABI) && !_GLIBCXX_USE_CXX11_ABI
#define QKV_DETAIL_LIBRARY _oldstring
#else
#define QKV_DETAIL_LIBRARY
#endif

#if defined(__cpp_exceptions) || defined(_CPPUNWIND)
#define QKV_DETAIL_EXCEPTIONS
#else
#define QKV_DETAIL_EXCEPTIONS _noexcept
#endif

// QKV_ABI is expanded at each use: these macros and the parts above must stay defined.
#define QKV_DETAIL_JOIN2(a, b, c, d, e, f, g, h, i, j) abi_##a##b##c##d##e##f##g##h##i##j
#define QKV_DETAIL_JOIN(a, b, c, d, e, f, g, h, i, j) QKV_DETAIL_JOIN2(a, b, c, d, e, f, g, h, i, j)
#define QKV_ABI                                                                                                       \
  QKV_DETAIL_JOIN(QKV_DETAIL_ISA, QKV_DETAIL_STEP, QKV_DETAIL_FMA, QKV_DETAIL_HALF, QKV_DETAIL_DOT, QKV_DETAIL_LANES, \
                  QKV_DETAIL_ALIGN, QKV_DETAIL_HEAP, QKV_DETAIL_LIBRARY, QKV_DETAIL_EXCEPTIONS)

#define QKV_DETAIL_TEXT2(a) #a
#define QKV_DETAIL_TEXT(a) QKV_DETAIL_TEXT2(a)

namespace qkv { inline namespace QKV_ABI {

struct Version {
  int major = 0, minor = 0, patch = 0;
};

inline constexpr Version version{QKV_VERSION_MAJOR, QKV_VERSION_MINOR, QKV_VERSION_PATCH};

/// The build this translation unit belongs to: "abi_<isa>[_fma][_f16c][_bf16][_vnni]" (beside AVX2, AVX-VNNI), and what is
/// unusual about it, such as "_novector", "_align_16_16_32" or "_noexcept".
inline constexpr const char* build_name = QKV_DETAIL_TEXT(QKV_ABI);

/// The instruction set the compiler was told to use: "avx512" (with BW, DQ and VL), "avx512f" (not all of these), "avx2",
/// "avx", "sse2", "neon" or "scalar".
inline constexpr const char* isa_name = QKV_DETAIL_TEXT(QKV_DETAIL_ISA);

#if defined(__clang__) && defined(__OPTIMIZE__) && defined(__has_attribute)
#if __has_attribute(error)
namespace detail {

[[gnu::error("qkv needs NaN: compile without -fno-honor-nans")]] void without_nan();
[[gnu::error("qkv needs infinities: compile without -fno-honor-infinities")]] void without_infinity();
[[gnu::error("qkv needs the written order of additions: compile without -fassociative-math")]] void without_order();

/// Of a number that is not known, each of these is known only to a compiler that leaves NaN, infinities or the order of
/// additions out of account. No instruction is left of it.
[[gnu::used]] inline void keeps_numbers() {
  float x;
  asm("" : "=m"(x));
  if (__builtin_constant_p(x != x)) without_nan();
  if (__builtin_constant_p(__builtin_isinf(x))) without_infinity();
  if (__builtin_constant_p((x + 1.0F) - x)) without_order();
}

}  // namespace detail
#endif
#endif

}}  // namespace qkv::QKV_ABI

#undef QKV_DETAIL_TEXT
#undef QKV_DETAIL_TEXT2

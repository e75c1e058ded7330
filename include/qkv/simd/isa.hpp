// simd/isa.hpp — Isa, the instruction set of this build; and prefetches.
//
// `Isa` is the struct of simd/isa/ whose instructions the compiler may use: the one place that knows. Its interface is in
// simd/isa/general.hpp. A new instruction set is a file there, derived from the one that it extends, a branch here, and a
// part of the name in version.hpp.
//
// Before: simd/narrow.hpp   Next: simd/isa/general.hpp
#pragma once

#include "isa/avx2.hpp"
#include "isa/avx512.hpp"
#include "isa/avx512_narrow.hpp"
#include "isa/avx_vnni.hpp"
#include "isa/general.hpp"
#include "isa/neon.hpp"
#include "isa/sse2.hpp"

#if defined(EIGEN_VECTORIZE_AVX512) && defined(__AVX512BF16__) && defined(__AVX512VNNI__) && defined(__AVX512BW__)
#define QKV_DETAIL_CHOSEN_ISA isa::Avx512Narrow
#elif defined(EIGEN_VECTORIZE_AVX512)
#define QKV_DETAIL_CHOSEN_ISA isa::Avx512
#elif defined(EIGEN_VECTORIZE_AVX2) && (defined(__AVXVNNI__) || defined(QKV_TEST_EMULATED_VNNI))
#define QKV_DETAIL_CHOSEN_ISA isa::AvxVnni
#elif defined(EIGEN_VECTORIZE_AVX2)
#define QKV_DETAIL_CHOSEN_ISA isa::Avx2
#elif defined(EIGEN_VECTORIZE_SSE2) && !defined(EIGEN_VECTORIZE_AVX)
#define QKV_DETAIL_CHOSEN_ISA isa::Sse2
#elif defined(EIGEN_VECTORIZE_NEON)
#define QKV_DETAIL_CHOSEN_ISA isa::Neon
#else
#define QKV_DETAIL_CHOSEN_ISA isa::None
#endif

namespace qkv { inline namespace QKV_ABI { namespace kernel {

using Isa = QKV_DETAIL_CHOSEN_ISA;
#undef QKV_DETAIL_CHOSEN_ISA

using isa::Word;

/// Prefetches the cache line at p, for reading, into the second-level cache. Never faults. (Always inline: g++ drops
/// calls of a function that only prefetches, as without effect.)
EIGEN_ALWAYS_INLINE void prefetch([[maybe_unused]] const void* p) {
#if defined(__GNUC__)
  __builtin_prefetch(p, 0, 2);
#endif
}
/// The same, for writing.
EIGEN_ALWAYS_INLINE void prefetch_to_write([[maybe_unused]] const void* p) {
#if defined(__GNUC__)
  __builtin_prefetch(p, 1, 2);
#endif
}
/// For reading, once: into the first-level cache, and from there not into the others.
EIGEN_ALWAYS_INLINE void prefetch_once([[maybe_unused]] const void* p) {
#if defined(__GNUC__)
  __builtin_prefetch(p, 0, 0);
#endif
}
/// For reading, into the first-level cache.
EIGEN_ALWAYS_INLINE void prefetch_near([[maybe_unused]] const void* p) {
#if defined(__GNUC__)
  __builtin_prefetch(p, 0, 3);
#endif
}

}}}  // namespace qkv::QKV_ABI::kernel

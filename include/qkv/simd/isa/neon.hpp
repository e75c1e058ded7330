// simd/isa/neon.hpp — NEON: storage types to float in the register.
//
// Before: simd/isa/avx512_narrow.hpp   Next: base/require.hpp
#pragma once

#include <cstring>

#include "general.hpp"

#if defined(EIGEN_VECTORIZE_NEON)

#include <arm_neon.h>

namespace qkv { inline namespace QKV_ABI { namespace isa {

struct Neon : None {
  using None::low_bits_to_exponent;
  using None::widen;
#if EIGEN_ARCH_ARM64
  static EIGEN_ALWAYS_INLINE float64x2_t low_bits_to_exponent(float64x2_t biased) {
    return vreinterpretq_f64_s64(vshlq_n_s64(vreinterpretq_s64_f64(biased), 52));
  }
  static EIGEN_ALWAYS_INLINE void widen(const Eigen::half* p, float32x4_t& v) {
    v = vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(reinterpret_cast<const std::uint16_t*>(p))));
  }
#endif
  static EIGEN_ALWAYS_INLINE void widen(const Eigen::bfloat16* p, float32x4_t& v) {
    v = vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(reinterpret_cast<const std::uint16_t*>(p)), 16));
  }
  static EIGEN_ALWAYS_INLINE void widen(const std::int8_t* p, float32x4_t& v) {
    std::uint32_t four = 0;
    std::memcpy(&four, p, sizeof four);
    const int16x8_t wide = vmovl_s8(vreinterpret_s8_u32(vdup_n_u32(four)));
    v = vcvtq_f32_s32(vmovl_s16(vget_low_s16(wide)));
  }
};

}}}  // namespace qkv::QKV_ABI::isa

#endif

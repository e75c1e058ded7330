// simd/isa/general.hpp — what kernels use of an instruction set beyond Eigen's packets: the interface, and its general forms.
//
//     P        a packet of Eigen's: of float or double          Float    that of float: `lanes` numbers
//     Words    a register of `lanes` words of 32 bits: each an int32, two int16 or bfloat16, or four int8
//     Sums     the same as a register of sums in int32; a type of its own where a compiler needs that
//     Bytes    `lanes` bytes
//
// What is declared without a body is defined by instruction sets whose constant says so: code under `if constexpr` of that
// constant compiles everywhere, and a definition that is missing is an error of the linker. An instruction set is a struct
// that derives from General, or from one that it extends, in a file of its own; simd/isa.hpp chooses. An overload for its
// registers takes precedence over a general form.
//
// Before: simd/isa.hpp   Next: simd/isa/sse2.hpp
#pragma once

#include <concepts>
#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "../../storage.hpp"

#include "../../base/warnings_off.hpp"

namespace qkv { inline namespace QKV_ABI {

namespace detail {

namespace packets = Eigen::internal;

/// Whether a·b + c is rounded once.
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA) || defined(EIGEN_VECTORIZE_FMA)
inline constexpr bool fused = true;
#else
inline constexpr bool fused = false;
#endif

template <class T>
inline constexpr bool has_packets = [] {
  using Traits = packets::packet_traits<T>;
  return (std::same_as<T, float> || std::same_as<T, double>)&&bool(Traits::Vectorizable) &&
         packets::unpacket_traits<typename Traits::type>::size > 1;
}();

}  // namespace detail

namespace isa {

namespace packets = detail::packets;

/// 32 bits of a row.
using Word = std::uint32_t;

/// For registers of these types.
template <class FloatRegister, class WordRegister, class SumRegister, class ByteRegister>
struct General {
  using Float = FloatRegister;
  using Words = WordRegister;
  using Sums = SumRegister;
  using Bytes = ByteRegister;
  static constexpr Index lanes = static_cast<Index>(packets::unpacket_traits<Float>::size);

  /// Why a build for this instruction set is slower than most machines, or "".
  static constexpr const char* warning = "";

  // ---- masks: lanes of all ones or all zeros, or a mask register ----
  template <class P>
  static EIGEN_ALWAYS_INLINE P less(const P& a, const P& b) {
    return packets::pcmp_lt(a, b);
  }
  template <class P>
  static EIGEN_ALWAYS_INLINE P less_equal(const P& a, const P& b) {
    return packets::pcmp_le(a, b);
  }
  template <class P>
  static EIGEN_ALWAYS_INLINE P both(const P& a, const P& b) {
    return packets::pand(a, b);
  }
  template <class P>
  static EIGEN_ALWAYS_INLINE bool any(const P& mask) {
    return packets::predux_any(mask);
  }
  template <class P>
  static EIGEN_ALWAYS_INLINE P select(const P& mask, const P& yes, const P& no) {
    return packets::pselect(mask, yes, no);
  }

  // ---- memory ----
  /// One number after the other, as many as v has lanes, from any storage type. Exact, hence the same everywhere.
  template <class S, class P>
  static EIGEN_ALWAYS_INLINE void widen(const S* p, P& v) {
    using T = typename packets::unpacket_traits<P>::type;
    T copy[packets::unpacket_traits<P>::size];
    for (T& x : copy) x = static_cast<T>(*p++);
    v = packets::ploadu<P>(copy);
  }
  /// The first n lanes of memory, zeros after them, and no access past them.
  template <class T, class P>
  static EIGEN_ALWAYS_INLINE void load_first(const T* p, Index n, P& v) {
    constexpr std::size_t size = packets::unpacket_traits<P>::size;
    T copy[size];
    for (std::size_t i = 0; i < size; ++i) copy[i] = static_cast<Index>(i) < n ? p[i] : T(0);
    v = packets::ploadu<P>(copy);
  }
  template <class T, class P>
  static EIGEN_ALWAYS_INLINE void store_first(T* p, const P& v, Index n) {
    if (n >= Index(packets::unpacket_traits<P>::size)) return packets::pstoreu(p, v);
    T copy[packets::unpacket_traits<P>::size];
    packets::pstoreu(copy, v);
    for (Index i = 0; i < n; ++i) p[i] = copy[i];
  }
  /// In a register from here on: g++ otherwise reads memory again for every use of what was loaded.
  template <class P>
  static EIGEN_ALWAYS_INLINE void hold(P&) {}

  // ---- across lanes ----
  /// Lane i: the sum of the lanes of row i.
  template <class P, std::size_t Lanes>
  static EIGEN_ALWAYS_INLINE P sum_each(P (&rows)[Lanes]) {
    packets::PacketBlock<P, int(Lanes)> block;
    for (std::size_t i = 0; i < Lanes; ++i) block.packet[i] = rows[i];
    packets::ptranspose(block);
    for (std::size_t half = Lanes / 2; half > 0; half /= 2)
      for (std::size_t i = 0; i < half; ++i) block.packet[i] = packets::padd(block.packet[i], block.packet[i + half]);
    return block.packet[0];
  }

  // ---- powers of two: simd/exp2.hpp ----
  /// The low bits of a lane moved up into the exponent: from 1.5·2²³ + 127 + n (double: 1.5·2⁵² + 1023 + n) to 2ⁿ.
  template <class P>
  static EIGEN_ALWAYS_INLINE P low_bits_to_exponent(P biased) {
    if constexpr (std::same_as<typename packets::unpacket_traits<P>::type, float>) {
      using Integers = typename packets::unpacket_traits<P>::integer_packet;
      return packets::preinterpret<P>(packets::plogical_shift_left<23>(packets::preinterpret<Integers>(biased)));
    } else {
      const P n = packets::psub(biased, packets::pset1<P>(0x1.8p52 + 1023));
      return packets::pldexp(packets::pset1<P>(1.0), n);
    }
  }
  /// Instructions that split a number from its integer part, and multiply by a power of two.
  static constexpr bool scales_by_powers = false;
  template <class P>
  static P fraction(P x);  // x - round(x); 0 at ±inf
  template <class P>
  static P scale_by_power(P y, P n);  // y·2ⁿ, of every n
  /// weight and weight_short of float in ways of its own.
  static constexpr bool has_weights = false;
  template <class P>
  static P weight(P d, P c);
  template <class P>
  static P weight_short(P d, P c);

  // ---- registers of float ----
  /// Two or four numbers repeated in all lanes, and sums of as many neighbours.
  static constexpr bool repeats = false;
  template <Index Parts>
  static Float repeat(const void* p);
  template <Index Parts>
  static void store_part_sums(float* to, Float v);  // lanes / Parts of them
  /// 2·lanes bfloat16 as they lie in memory, in halves: even ones and odd ones.
  static constexpr bool splits_bf16 = false;
  static Float even_bf16(const bfloat16* p);
  static Float odd_bf16(const bfloat16* p);

  // ---- products of narrow numbers: which of them are faster than float ----
  static constexpr bool bf16_products = false, int8_products = false, int16_products = false;
  static Float add_bf16_products(Float sum, Words a, Words b);  // + a₀b₀ + a₁b₁ of bfloat16
  static Sums add_int8_products(Sums sum, Words a, Words b);  // + Σ₄ aᵢ·bᵢ; a signed, b unsigned: exact in 32 bits
  static Sums add_int16_products(Sums sum, Words a, Words b);  // + a₀b₀ + a₁b₁ of int16, exact in 32 bits

  // Where there is one of them:
  static Words load_words(const void* p);
  static Words load_words_n(const void* p, Index n);  // the first n bytes, zeros after them, and no access past them
  static void store_words(void* p, Words v);
  static Words broadcast_word(Word x);
  static Float as_float(Words v);  // the same bits
  static Words as_words(Float v);
  static Words words_of(Sums v);
  static Sums as_sums(Words v);
  static Words round_to_int32(Float v);  // to nearest even
  static Float int32_to_float(Words v);
  static Float sums_to_float(Sums v);

  // Where there is one of whole numbers:
  static Sums load_sums(const std::int32_t* p);
  static void store_sums(std::int32_t* p, Sums v);
  static Sums broadcast_sum(std::int32_t x);
  static Sums subtract(Sums a, Sums b);
  static Sums sum_each(Sums (&rows)[static_cast<std::size_t>(lanes)]);  // as of float; rows are lost
  static Bytes load_int8(const std::int8_t* p);                         // `lanes` of them
  static Bytes load_int8_n(const std::int8_t* p, Index n);  // the first n, zeros after them; n may be past `lanes`
  // ---- decode's sums of rows in int16: kernel/decode/int8_row_pairs.hpp ----
  /// The low (high) halves of each 128 bits of a and b, interleaved by 16 bits.
  static Words unpack_low_int16(Words a, Words b);
  static Words unpack_high_int16(Words a, Words b);
  static Words low_int8(Words v);  // of every 16 bits the low byte, as int16
  static Words high_int8(Words v);
  static void order_unpacked(Words (&v)[4]);  // int32 of 4·lanes features, from the order of these vectors to ascending
  static void store_int16(std::int16_t* to, Float a, Float b);  // rounded, saturated
  static Float positive(Float x);                               // max(0, x); NaN stays NaN

  // Where int16 is what panels are multiplied in, keys (without int8_products) or values (without bf16_products):
  static Words truncate_to_int32(Float v);
  static Words widen_int8(const std::int8_t* p);             // 2·lanes of them, to int16
  static Words widen_int8_n(const std::int8_t* p, Index n);  // the first n, zeros after them
  static Words pack_int16(Words a, Words b);                 // int32 to int16, those of a first, saturated
  static Words pair_int16(Words low, Words high);            // lane by lane, of int32 from 0 to 32767
  static Words pair_int8(Bytes a, Bytes b);                  // lane i: aᵢ and bᵢ as int16
  /// Bytes of two rows side by side; n is a multiple of 16.
  static void interleave_rows(const std::int8_t* a, const std::int8_t* b, Index n, std::uint16_t* to);

  // Where int8_products:
  template <Index Parts>
  static Sums broadcast_first(std::int32_t x);  // in every Parts-th lane from 0 on, zeros elsewhere
  static Words plus_128(Words int8);            // of 4·lanes int8, as unsigned
  /// 4·lanes numbers in order as bytes of round(x) + 128.
  static Words round_plus_128(Float a, Float b, Float c, Float d);
  static Words to_uint8(Words a, Words b, Words c, Words d);   // lane i: aᵢ, bᵢ, cᵢ, dᵢ; above 255 it is 255
  static Words quad_int8(Bytes a, Bytes b, Bytes c, Bytes d);  // lane i: aᵢ, bᵢ, cᵢ, dᵢ

  // Where bf16_products, rounded to nearest even:
  static Words pair_bf16(Float low, Float high);        // lane by lane
  static Words round_to_bf16(Float a, Float b);         // 2·lanes numbers in order
  static Words round_to_finite_bf16(Float a, Float b);  // what is finite stays finite: at most the largest
  static void interleave_bf16(Words a, Words b, Words& low, Words& high);  // 2·lanes pairs (aᵢ, bᵢ) in order
};

/// No more than Eigen's packets.
struct None : General<typename packets::packet_traits<float>::type, std::integral_constant<int, 4>,
                      std::integral_constant<int, 4>, std::integral_constant<int, 1>> {};

}  // namespace isa
}}  // namespace qkv::QKV_ABI

#include "../../base/warnings_on.hpp"

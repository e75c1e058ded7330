// rope_config.hpp — the rotary positions of a model: which features pair up, and the frequency of each pair.
//
//     f_i = theta^(−2i/dim),  i = 0 … dim/2−1           radians per position, then scaled to the model's longer context
//
// Which features pair up is a convention of the weights, and a wrong guess runs without an error: `Pairing` has no
// default. Everything here is constexpr except the frequencies, so that a model's settings are constants.
// Su et al. 2021, arXiv:2104.09864; sources of the scalings stand beside them.
//
// Before: position.hpp   Next: rope.hpp
#pragma once

#include <algorithm>
#include <cmath>
#include <numbers>

#include "matrix.hpp"

namespace qkv { inline namespace QKV_ABI {

/// Which features form pair i of dim/2.
class Pairing {
 public:
  static const Pairing interleaved;  // 2i and 2i+1: the paper, DeepSeek, llama2.c, GPT-J
  static const Pairing half_split;   // i and i + dim/2: Hugging Face's Llama and Qwen, GPT-NeoX

  friend constexpr bool operator==(Pairing, Pairing) = default;

 private:
  constexpr explicit Pairing(bool is_interleaved) : is_interleaved_(is_interleaved) {}
  bool is_interleaved_;
};
inline constexpr Pairing Pairing::interleaved{true};
inline constexpr Pairing Pairing::half_split{false};

/// How the frequencies of a model trained on a short context are stretched to a longer one. Made by the functions below.
struct RopeScaling {
  enum class Kind { none, linear, ntk, yarn, llama3 };

  Kind kind = Kind::none;
  double factor = 1;                                 // longer context / original context
  double original_context = 0;                       // positions (yarn, llama3)
  double beta_fast = 32, beta_slow = 1;              // yarn: turns within the original context, see yarn_scaling
  double low_freq_factor = 1, high_freq_factor = 4;  // llama3
  double mscale = 1;  // yarn: a model's mscale_all_dim, for the *softmax scale* of MLA; does not enter the rotation
  double attention_factor = 1;  // multiplies cos and sin

  friend constexpr bool operator==(const RopeScaling&, const RopeScaling&) = default;
};

/// f_i / factor: position interpolation. Chen et al. 2023, arXiv:2306.15595.
constexpr RopeScaling linear_scaling(double factor) { return {.kind = RopeScaling::Kind::linear, .factor = factor}; }

/// theta · factor^(dim/(dim−2)): high frequencies stay, the lowest is divided by factor ("NTK-aware", needs dim > 2).
constexpr RopeScaling ntk_scaling(double factor) { return {.kind = RopeScaling::Kind::ntk, .factor = factor}; }

/// A model's `rope_scaling` may name mscale and mscale_all_dim. What belongs here is
///
///     mscale            its mscale_all_dim: MLA's softmax scale is multiplied by yarn_mscale(factor, mscale_all_dim)²
///     attention_factor  yarn_mscale(factor, its mscale) / yarn_mscale(factor, its mscale_all_dim)
///
/// DeepSeek-V2 and V3 give both the same value, so attention_factor is 1. A model without mscale_all_dim has mscale 0 here,
/// which leaves the scale as it is; one that names neither has the paper's attention_factor, yarn_mscale(factor).
struct YarnSettings {
  double factor = 0, original_context = 0;
  double beta_fast = 32, beta_slow = 1;
  double mscale = 1;
  double attention_factor = 1;
};

/// YaRN: pairs that turn more than beta_fast times within the original context stay, those that turn less than beta_slow
/// times are divided by factor, with a ramp over the pair's index between. Peng et al. 2023, arXiv:2309.00071, §3.2.
constexpr RopeScaling yarn_scaling(YarnSettings s) {
  return {.kind = RopeScaling::Kind::yarn,
          .factor = s.factor,
          .original_context = s.original_context,
          .beta_fast = s.beta_fast,
          .beta_slow = s.beta_slow,
          .mscale = s.mscale,
          .attention_factor = s.attention_factor};
}

/// 0.1·mscale·ln(factor) + 1, or 1 where factor <= 1. MLA multiplies its softmax scale by the square (DeepSeek-V2, V3).
inline double yarn_mscale(double factor, double mscale = 1) {
  return factor <= 1 ? 1.0 : 0.1 * mscale * std::log(factor) + 1;
}

struct Llama3Settings {
  double factor = 8, low_freq_factor = 1, high_freq_factor = 4, original_context = 8192;
};

/// Llama 3.1: waves longer than original_context/low_freq_factor are divided by factor, those shorter than
/// original_context/high_freq_factor stay, with a ramp over 1/wavelength between.
constexpr RopeScaling llama3_scaling(Llama3Settings s = {}) {
  return {.kind = RopeScaling::Kind::llama3,
          .factor = s.factor,
          .original_context = s.original_context,
          .low_freq_factor = s.low_freq_factor,
          .high_freq_factor = s.high_freq_factor};
}

/// Does not compile without a pairing: RopeConfig{.pairing = Pairing::half_split, .theta = 5e5}. A model's mscale_all_dim
/// goes into the scaling's mscale, and its mscale into attention_factor: see YarnSettings.
struct RopeConfig {
  Pairing pairing;
  Index dim = 0;  // features of a head that are rotated, the first ones; 0: all
  double theta = 10000;
  RopeScaling scaling = {};

  /// Features that are rotated in a head of head_dim.
  constexpr Index rotated(Index head_dim) const { return dim == 0 ? head_dim : dim; }
  friend constexpr bool operator==(const RopeConfig&, const RopeConfig&) = default;
};

/// Throws unless the settings make sense for heads of head_dim features.
inline void check(const RopeConfig& config, Index head_dim) {
  using Kind = RopeScaling::Kind;
  const Index dim = config.rotated(head_dim);
  const RopeScaling& s = config.scaling;
  detail::require(dim >= 2 && dim % 2 == 0 && dim <= head_dim,
                  "RoPE turns an even number of features, 2 <= dim <= ", "head_dim; given dim ", dim, ", head_dim ",
                  head_dim);
  detail::require(config.theta > 1, "RoPE needs theta > 1; given ", config.theta);
  detail::require(s.factor > 0 && s.attention_factor > 0,
                  "RoPE scaling needs factor > 0 and attention_factor > 0; given ", s.factor, " and ",
                  s.attention_factor);
  detail::require(s.kind != Kind::ntk || dim > 2, "NTK scaling needs dim > 2; given ", dim);
  detail::require(s.kind != Kind::yarn || (s.original_context > 0 && s.beta_fast > s.beta_slow && s.beta_slow > 0),
                  "YaRN needs original_context > 0 and beta_fast > beta_slow > 0; given ", s.original_context, ", ",
                  s.beta_fast, ", ", s.beta_slow);
  detail::require(s.kind != Kind::llama3 ||
                      (s.original_context > 0 && s.high_freq_factor > s.low_freq_factor && s.low_freq_factor > 0),
                  "Llama 3 scaling needs original_context > 0 and high_freq_factor > low_freq_factor > 0; given ",
                  s.original_context, ", ", s.high_freq_factor, ", ", s.low_freq_factor);
}

/// Radians per position of each pair, [rotated(head_dim) / 2].
inline RowVector<double> rope_frequencies(const RopeConfig& config, Index head_dim) {
  check(config, head_dim);
  using Kind = RopeScaling::Kind;
  const RopeScaling& s = config.scaling;
  const Index pairs = config.rotated(head_dim) / 2;
  const double dim = static_cast<double>(2 * pairs), turn = 2 * std::numbers::pi;
  const double theta = s.kind == Kind::ntk ? config.theta * std::pow(s.factor, dim / (dim - 2)) : config.theta;

  // YaRN's ramp: the index of the pair that turns `turns` times within the original context, rounded outwards.
  const auto pair_that_turns = [&](double turns) {
    return dim * std::log(s.original_context / (turns * turn)) / (2 * std::log(theta));
  };
  double ramp_begin = 0, ramp_end = 1;
  if (s.kind == Kind::yarn) {
    ramp_begin = std::max(std::floor(pair_that_turns(s.beta_fast)), 0.0);
    ramp_end = std::min(std::ceil(pair_that_turns(s.beta_slow)), dim - 1);
    if (ramp_begin == ramp_end) ramp_end += 0.001;  // as in DeepSeek's code: no division by zero
  }

  RowVector<double> frequencies(pairs);
  for (Index i = 0; i < pairs; ++i) {
    const double f = std::pow(theta, -2.0 * static_cast<double>(i) / dim);
    double stretched = 0;  // share of f / factor; the rest is f as it was trained
    if (s.kind == Kind::linear) stretched = 1;
    if (s.kind == Kind::yarn)
      stretched = std::clamp((static_cast<double>(i) - ramp_begin) / (ramp_end - ramp_begin), 0.0, 1.0);
    if (s.kind == Kind::llama3) {
      const double turns = s.original_context * f / turn;
      stretched = std::clamp((s.high_freq_factor - turns) / (s.high_freq_factor - s.low_freq_factor), 0.0, 1.0);
    }
    frequencies(i) = f / s.factor * stretched + f * (1 - stretched);
  }
  return frequencies;
}

}}  // namespace qkv::QKV_ABI

// model_config.hpp — the sizes of an attention layer, and those of well-known models.
//
//     MultiHeadAttentionConfig   MHA, GQA and MQA: one setting, kv_heads          Vaswani 2017, Ainslie 2023, Shazeer 2019
//     LatentAttentionConfig      multi-head latent attention (MLA)                DeepSeek-V2, arXiv:2405.04434
//
// Aggregates of plain numbers, usable in constant expressions:
//
//     constexpr MultiHeadAttentionConfig config{.model_dim = 512, .heads = 8, .kv_heads = 2};      // head_dim is 64
//
// The presets are the sizes of one layer as published with the weights; the comments count the layers.
//
// Before: key_rows.hpp   Next: memory.hpp
#pragma once

#include <cmath>
#include <optional>

#include "heads.hpp"
#include "rope_config.hpp"

namespace qkv { inline namespace QKV_ABI {

/// q [n, heads·head_dim], k [n, kv_heads·head_dim], v [n, kv_heads·v_head_dim], out [n, model_dim].
struct MultiHeadAttentionConfig {
  Index model_dim = 0;
  Index heads = 1;
  Index kv_heads = heads;
  Index head_dim = heads > 0 && model_dim % heads == 0 ? model_dim / heads : 0;  // 0: must be given
  Index v_head_dim = head_dim;
  bool qkv_bias = false, out_bias = false;
  bool qk_norm = false;                              // RMSNorm of every query and key head before RoPE
  double norm_eps = 1e-6;                            // of qk_norm
  std::optional<RopeConfig> rope = {};               // none: no rotation
  std::optional<double> scale = {};                  // none, or 0: 1/√head_dim
  Index key_dim = model_dim, value_dim = model_dim;  // features of the inputs of W_k and W_v: cross-attention

  friend constexpr bool operator==(const MultiHeadAttentionConfig&, const MultiHeadAttentionConfig&) = default;
};

/// Keys and values of all heads come from one latent per token [latent_dim]; beside it one rope key [rope_dim] that all
/// heads share. A head's query and key have nope_dim + rope_dim features.
struct LatentAttentionConfig {
  Index model_dim = 0;
  Index heads = 1;
  Index q_latent_dim = 0;  // 0: queries are projected from x directly
  Index latent_dim = 0;
  Index nope_dim = 0, rope_dim = 0;
  Index v_head_dim = nope_dim;
  double norm_eps = 1e-6;            // of the latents' RMSNorm
  bool latent_norm = true;           // false: the latent is cached as projected (models converted by compress.hpp)
  RopeConfig rope;                   // of the rope_dim features; DeepSeek's own weights pair them interleaved
  std::optional<double> scale = {};  // none, or 0: 1/√(nope_dim + rope_dim), times yarn_mscale² under YaRN

  constexpr Index head_dim() const { return nope_dim + rope_dim; }
  friend constexpr bool operator==(const LatentAttentionConfig&, const LatentAttentionConfig&) = default;
};

/// Throws std::invalid_argument naming the rule that the settings break; std::length_error where the columns of all heads
/// do not fit an Index.
inline void check(const MultiHeadAttentionConfig& c) {
  check(Heads{c.heads, c.kv_heads});
  detail::require(c.model_dim >= 1 && c.head_dim >= 1 && c.v_head_dim >= 1 && c.key_dim >= 1 && c.value_dim >= 1,
                  "an attention layer needs model_dim, head_dim, v_head_dim, key_dim and value_dim >= 1; given ",
                  c.model_dim, ", ", c.head_dim, ", ", c.v_head_dim, ", ", c.key_dim, ", ", c.value_dim,
                  " (head_dim has no default where heads ", c.heads, " do not divide model_dim)");
  detail::checked_product(c.heads, detail::checked_sum(c.head_dim, c.v_head_dim));
  detail::require(std::isfinite(c.scale.value_or(0)), "scale must be finite (0: 1/sqrt(head_dim)); given ",
                  c.scale.value_or(0));
  detail::require(c.norm_eps >= 0 && std::isfinite(c.norm_eps), "norm_eps must be finite and >= 0; given ", c.norm_eps);
  if (c.rope) check(*c.rope, c.head_dim);
}

inline void check(const LatentAttentionConfig& c) {
  detail::require(c.model_dim >= 1 && c.heads >= 1 && c.q_latent_dim >= 0 && c.latent_dim >= 1 && c.nope_dim >= 1 &&
                      c.rope_dim >= 2 && c.v_head_dim >= 1,
                  "latent attention needs model_dim, heads, latent_dim, nope_dim, v_head_dim >= 1, rope_dim >= 2 and "
                  "q_latent_dim >= 0; given ",
                  c.model_dim, ", ", c.heads, ", ", c.latent_dim, ", ", c.nope_dim, ", ", c.v_head_dim, ", ",
                  c.rope_dim, ", ", c.q_latent_dim);
  detail::require(std::isfinite(c.scale.value_or(0)), "scale must be finite (0: 1/sqrt(nope_dim + rope_dim)); given ",
                  c.scale.value_or(0));
  detail::require(c.norm_eps >= 0 && std::isfinite(c.norm_eps), "norm_eps must be finite and >= 0; given ", c.norm_eps);
  check(c.rope, c.rope_dim);
  const Index head = detail::checked_sum(detail::checked_sum(c.nope_dim, c.rope_dim), c.v_head_dim);
  detail::checked_product(c.heads, detail::checked_sum(head, c.latent_dim));
}

/// What q·k is multiplied with.
inline double softmax_scale(const MultiHeadAttentionConfig& c) {
  const double scale = c.scale.value_or(0);
  return scale != 0 ? scale : 1 / std::sqrt(static_cast<double>(c.head_dim));
}
/// YaRN sharpens the softmax by m², m = 0.1·mscale·ln(factor) + 1: DeepSeek-V2's and V3's code, not in the papers.
inline double softmax_scale(const LatentAttentionConfig& c) {
  if (const double scale = c.scale.value_or(0); scale != 0) return scale;
  const RopeScaling& s = c.rope.scaling;
  const double m = s.kind == RopeScaling::Kind::yarn ? yarn_mscale(s.factor, s.mscale) : 1;
  return m * m / std::sqrt(static_cast<double>(c.head_dim()));
}

// Sizes from the config.json published with each model. Pairing is that of the Hugging Face weights for the MHA family
// (Meta's own Llama files pair interleaved), and that of DeepSeek's own code for MLA.

inline constexpr MultiHeadAttentionConfig gpt2_small{
    .model_dim = 768, .heads = 12, .qkv_bias = true, .out_bias = true};  // MHA, 12 layers, learned positions

inline constexpr MultiHeadAttentionConfig llama_2_7b{
    .model_dim = 4096, .heads = 32, .rope = RopeConfig{.pairing = Pairing::half_split}};  // MHA, 32 layers

inline constexpr MultiHeadAttentionConfig llama_3_8b{
    .model_dim = 4096,
    .heads = 32,
    .kv_heads = 8,
    .rope = RopeConfig{.pairing = Pairing::half_split, .theta = 500000}};  // GQA, 32 layers

inline constexpr MultiHeadAttentionConfig llama_3_70b{
    .model_dim = 8192,
    .heads = 64,
    .kv_heads = 8,
    .rope = RopeConfig{.pairing = Pairing::half_split, .theta = 500000}};  // GQA, 80 layers

inline constexpr MultiHeadAttentionConfig mistral_7b{
    .model_dim = 4096,
    .heads = 32,
    .kv_heads = 8,
    .rope = RopeConfig{.pairing = Pairing::half_split}};  // GQA, 32 layers, v0.1: window of 4096 tokens

inline constexpr MultiHeadAttentionConfig falcon_7b{
    .model_dim = 4544,
    .heads = 71,
    .kv_heads = 1,
    .rope = RopeConfig{.pairing = Pairing::half_split}};  // MQA, 32 layers

/// From a context of 4,096 tokens to 163,840.
constexpr RopeConfig deepseek_rope(double mscale) {
  return {.pairing = Pairing::interleaved,
          .theta = 10000,
          .scaling = yarn_scaling(
              {.factor = 40, .original_context = 4096, .beta_fast = 32, .beta_slow = 1, .mscale = mscale})};
}

inline constexpr LatentAttentionConfig deepseek_v2_lite{.model_dim = 2048,
                                                        .heads = 16,
                                                        .latent_dim = 512,
                                                        .nope_dim = 128,
                                                        .rope_dim = 64,
                                                        .v_head_dim = 128,
                                                        .rope = deepseek_rope(0.707)};  // 27 layers

inline constexpr LatentAttentionConfig deepseek_v2{.model_dim = 5120,
                                                   .heads = 128,
                                                   .q_latent_dim = 1536,
                                                   .latent_dim = 512,
                                                   .nope_dim = 128,
                                                   .rope_dim = 64,
                                                   .v_head_dim = 128,
                                                   .rope = deepseek_rope(0.707)};  // 60 layers

inline constexpr LatentAttentionConfig deepseek_v3{.model_dim = 7168,
                                                   .heads = 128,
                                                   .q_latent_dim = 1536,
                                                   .latent_dim = 512,
                                                   .nope_dim = 128,
                                                   .rope_dim = 64,
                                                   .v_head_dim = 128,
                                                   .rope = deepseek_rope(1.0)};  // 61 layers; also DeepSeek-R1

}}  // namespace qkv::QKV_ABI

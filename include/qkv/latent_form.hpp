// latent_form.hpp — which of the two forms of latent attention needs less time.
//
//     absorbed    attends to the latents themselves: few queries
//     naive       restores keys and values first: many queries
//
// Chosen by sizes and arithmetic of the call, never by timing: every run of a program on a machine picks the same form
// and gives the same bits. LayerOptions force a form where it must not depend on the chunks of a prompt.
//
// Before: latent_weights.hpp   Next: latent_cache.hpp
#pragma once

#include <algorithm>

#include "model_config.hpp"
#include "options.hpp"

#include "kernel/arithmetic.hpp"  // last: in C++17 the shortest chain of includes is to stop

namespace qkv { inline namespace QKV_ABI {

/// Cost of a multiply-add relative to one of the absorbed kernel in float: in the attention of the naive form, in
/// projections, and in the absorbed kernel on rows (bfloat16, int8) multiplied as stored. Measured once at DeepSeek's
/// sizes, never at run time: benchmarks/results/latent.md, `break_even`. In int16 (AVX2): 0.87 over 1.24 of the peak.
inline constexpr double naive_attention_cost = 1.05, projection_cost = 1.15, narrow_absorbed_cost = 0.5,
                        int16_absorbed_cost = 0.7;

/// The form that needs less time. The n_keys rows are c = n_keys - s old ones and the s = n_queries new ones, each of
/// which attends to the old ones and, causally, to those up to itself: pairs = s·c + s(s + 1)/2. For each head, in
/// multiply-adds
///   absorbed  pairs·(2·latent_dim + rope_dim)·absorbed_cost         + s·latent_dim·(nope_dim + v_head_dim)·1.15
///   naive     pairs·(nope_dim + rope_dim + v_head_dim)·1.05  + (c + s)·latent_dim·(nope_dim + v_head_dim)·1.15
/// At DeepSeek's sizes and in float naive is faster from about √(c² + 400.9·c) - c new tokens on: 132 at c = 128, at
/// most 201. By flops alone it would be √(c² + 341.3·c) - c: 117 and 171.
constexpr LatentForm choose_latent_form(LatentForm forced, const LatentAttentionConfig& c, Index n_queries,
                                        Index n_keys, double absorbed_cost = 1) {
  if (forced != LatentForm::automatic) return forced;
  const double s = static_cast<double>(n_queries), old = static_cast<double>(std::max<Index>(n_keys - n_queries, 0));
  const double pairs = s * old + s * (s + 1) / 2;
  const double up =
      projection_cost * static_cast<double>(c.latent_dim) * static_cast<double>(c.nope_dim + c.v_head_dim);
  const double absorbed = absorbed_cost * pairs * static_cast<double>(2 * c.latent_dim + c.rope_dim) + s * up;
  const double naive =
      naive_attention_cost * pairs * static_cast<double>(c.nope_dim + c.rope_dim + c.v_head_dim) + (old + s) * up;
  return naive < absorbed ? LatentForm::naive : LatentForm::absorbed;
}

/// The form of a call of a layer in T over rows stored as S.
template <class T, StorageType S>
constexpr LatentForm choose_latent_form(const LayerOptions& options, const LatentAttentionConfig& c, Index n_queries,
                                        Index n_keys) {
  using Narrow = kernel::NarrowArithmetic<T, S>;
  constexpr double narrow = Narrow::int16_keys ? int16_absorbed_cost : Narrow::narrow ? narrow_absorbed_cost : 1.0;
  return choose_latent_form(options.form, c, n_queries, n_keys, options.arithmetic != Arithmetic::exact ? narrow : 1.0);
}

}}  // namespace qkv::QKV_ABI

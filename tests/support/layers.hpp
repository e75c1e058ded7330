// support/layers.hpp — the two layers by their definitions, in long double, and weights to try them with.
#pragma once

#include <qkv/latent_attention.hpp>
#include <qkv/multi_head_attention.hpp>

#include <cmath>
#include <numbers>
#include <vector>

#include "oracle.hpp"

namespace support {

using qkv::LatentAttention, qkv::LatentAttentionConfig, qkv::LatentAttentionWeights;
using qkv::MultiHeadAttention, qkv::MultiHeadAttentionConfig, qkv::MultiHeadAttentionWeights;
using qkv::Projection, qkv::RopeConfig, qkv::RopeScaling, qkv::RowVector;

using Wide = Matrix<long double>;

template <class X>
Wide wide(const X& x) {
  return x.template cast<long double>();
}

/// What is left of outputs of size 1 after a layer of some dozen features in T.
template <class T>
inline constexpr double layer_tolerance = sizeof(T) == 4 ? 1e-5 : 2e-14;

inline bool causally(const At& at) { return at.key_position <= at.query_position; }

// --- the steps ---

/// x·W + b.
template <class T>
Wide project(const Wide& x, const Projection<T>& p) {
  Wide y(x.rows(), p.out_dim());
  for (Index i = 0; i < y.rows(); ++i)
    for (Index j = 0; j < y.cols(); ++j) {
      y(i, j) = p.has_bias() ? p.bias()(j) : T(0);
      for (Index k = 0; k < x.cols(); ++k) y(i, j) += x(i, k) * static_cast<long double>(p.weight()(k, j));
    }
  return y;
}

/// Each head of each row divided by the root of its mean square.
template <class T>
Wide rms_norm_by_formula(const Wide& x, const RowVector<T>& gain, double eps, Index heads = 1) {
  const Index width = x.cols() / heads;
  Wide y = x;
  for (Index i = 0; i < x.rows(); ++i)
    for (Index h = 0; h < heads; ++h) {
      long double squares = 0;
      for (Index j = 0; j < width; ++j) squares += x(i, h * width + j) * x(i, h * width + j);
      const long double root = std::sqrt(squares / static_cast<long double>(width) + static_cast<long double>(eps));
      for (Index j = 0; j < width; ++j) y(i, h * width + j) *= static_cast<long double>(gain(j)) / root;
    }
  return y;
}

/// Radians per position of pair i: theta^(-2i/dim), under YaRN as DeepSeek-V3's published code has it.
inline long double turn_per_position(const RopeConfig& config, Index dim, Index i) {
  const long double theta = config.theta, d = static_cast<long double>(dim), pair = static_cast<long double>(i);
  const long double plain = std::pow(theta, -2 * pair / d);
  const RopeScaling& s = config.scaling;
  if (s.kind != RopeScaling::Kind::yarn) return plain;
  const auto pair_of = [&](long double turns) {
    return d * std::log(s.original_context / (turns * 2 * std::numbers::pi_v<long double>)) / (2 * std::log(theta));
  };
  const long double low = std::max(std::floor(pair_of(s.beta_fast)), 0.0L);
  const long double high = std::min(std::ceil(pair_of(s.beta_slow)), d - 1);
  const long double ramp = std::min(std::max((pair - low) / (high - low), 0.0L), 1.0L);
  return plain / s.factor * ramp + plain * (1 - ramp);
}

/// Turns the features [begin, begin + dim) of each head; row i stands at position i.
inline Wide turn(const Wide& x, Index heads, Index begin, Index dim, const RopeConfig& config) {
  const Index head_dim = x.cols() / heads;
  const bool interleaved = config.pairing == qkv::Pairing::interleaved;
  Wide y = x;
  for (Index row = 0; row < x.rows(); ++row)
    for (Index h = 0; h < heads; ++h)
      for (Index i = 0; i < dim / 2; ++i) {
        const long double angle = static_cast<long double>(row) * turn_per_position(config, dim, i);
        const Index a = h * head_dim + begin + (interleaved ? 2 * i : i), b = interleaved ? a + 1 : a + dim / 2;
        y(row, a) = x(row, a) * std::cos(angle) - x(row, b) * std::sin(angle);
        y(row, b) = x(row, a) * std::sin(angle) + x(row, b) * std::cos(angle);
      }
  return y;
}

// --- the layers ---

/// A whole text, or cross-attention; both sides count positions from 0.
template <class T, class Sees, class Score>
Wide multi_head_by_formula(const MultiHeadAttention<T>& layer, const Wide& query, const Wide& key, const Wide& value,
                           const Sees& sees, const Score& score) {
  const MultiHeadAttentionConfig& c = layer.config();
  const MultiHeadAttentionWeights<T>& w = layer.weights();
  Wide q = project(query, w.query), k = project(key, w.key), v = project(value, w.value);
  if (c.qk_norm) {
    q = rms_norm_by_formula(q, w.query_norm, c.norm_eps, c.heads);
    k = rms_norm_by_formula(k, w.key_norm, c.norm_eps, c.kv_heads);
  }
  if (c.rope) {
    const Index dim = c.rope->dim == 0 ? c.head_dim : c.rope->dim;
    q = turn(q, c.heads, 0, dim, *c.rope);
    k = turn(k, c.kv_heads, 0, dim, *c.rope);
  }
  const Setting setting{.heads = {c.heads, c.kv_heads},
                        .scale = c.scale.value_or(0),
                        .sinks = {w.sinks.data(), w.sinks.data() + w.sinks.size()}};
  return project(attention_by_formula(q, k, v, setting, sees, score).out, w.output);
}
template <class T, class X, class Sees = bool (*)(const At&), class Score = long double (*)(long double, const At&)>
Wide multi_head_by_formula(const MultiHeadAttention<T>& layer, const X& x, const Sees& sees = causally,
                           const Score& score = unchanged) {
  return multi_head_by_formula(layer, wide(x), wide(x), wide(x), sees, score);
}

/// A whole text: DeepSeek-V2, section 2.1, with every head's keys and values restored.
template <class T, class X, class Sees = bool (*)(const At&), class Score = long double (*)(long double, const At&)>
Wide latent_by_formula(const LatentAttention<T>& layer, const X& x, const Sees& sees = causally,
                       const Score& score = unchanged) {
  const LatentAttentionConfig& c = layer.config();
  const LatentAttentionWeights<T>& w = layer.weights();
  const Index n = x.rows(), head_dim = c.nope_dim + c.rope_dim;
  Wide q = c.q_latent_dim == 0
               ? project(wide(x), w.query)
               : project(rms_norm_by_formula(project(wide(x), w.query_down), w.query_norm, c.norm_eps), w.query_up);
  q = turn(q, c.heads, c.nope_dim, c.rope_dim, c.rope);
  const Wide down = project(wide(x), w.latent_down);
  const Wide latent = rms_norm_by_formula<T>(down.leftCols(c.latent_dim), w.latent_norm, c.norm_eps);
  const Wide rope = turn(down.rightCols(c.rope_dim), 1, 0, c.rope_dim, c.rope);
  const Wide nope = project(latent, w.key_up), v = project(latent, w.value_up);
  Wide k(n, c.heads * head_dim);
  for (Index h = 0; h < c.heads; ++h) {
    k.middleCols(h * head_dim, c.nope_dim) = nope.middleCols(h * c.nope_dim, c.nope_dim);
    k.middleCols(h * head_dim + c.nope_dim, c.rope_dim) = rope;
  }
  double scale = 1 / std::sqrt(static_cast<double>(head_dim));
  if (const RopeScaling& s = c.rope.scaling; s.kind == RopeScaling::Kind::yarn && s.factor > 1) {
    const double m = 0.1 * s.mscale * std::log(s.factor) + 1;
    scale *= m * m;
  }
  if (c.scale.value_or(0) != 0) scale = *c.scale;
  return project(attention_by_formula(q, k, v, {.heads = {c.heads, c.heads}, .scale = scale}, sees, score).out,
                 w.output);
}

// --- weights that leave nothing at its neutral value ---

template <class T>
RowVector<T> random_gain(Index n, std::uint64_t seed) {
  return RowVector<T>::Ones(n) + normals<T>(1, n, seed) * T(0.25);
}
template <class T>
Projection<T> random_projection(Index in, Index out, bool with_bias, std::uint64_t seed) {
  const T deviation = static_cast<T>(1 / std::sqrt(static_cast<double>(in)));
  return Projection<T>(normals<T>(in, out, seed) * deviation,
                       with_bias ? RowVector<T>(normals<T>(1, out, seed + 500)) : RowVector<T>());
}

template <class T>
MultiHeadAttention<T> multi_head_layer(const MultiHeadAttentionConfig& c, bool with_sinks = false) {
  MultiHeadAttentionWeights<T> w{random_projection<T>(c.model_dim, c.heads * c.head_dim, c.qkv_bias, 11),
                                 random_projection<T>(c.key_dim, c.kv_heads * c.head_dim, c.qkv_bias, 12),
                                 random_projection<T>(c.value_dim, c.kv_heads * c.v_head_dim, c.qkv_bias, 13),
                                 random_projection<T>(c.heads * c.v_head_dim, c.model_dim, c.out_bias, 14)};
  if (c.qk_norm) w.query_norm = random_gain<T>(c.head_dim, 15), w.key_norm = random_gain<T>(c.head_dim, 16);
  if (with_sinks) w.sinks = normals<T>(1, c.heads, 17);
  return {c, std::move(w)};
}

template <class T>
LatentAttention<T> latent_layer(const LatentAttentionConfig& c) {
  LatentAttentionWeights<T> w;
  const Index q_dim = c.heads * (c.nope_dim + c.rope_dim);
  if (c.q_latent_dim == 0) {
    w.query = random_projection<T>(c.model_dim, q_dim, false, 21);
  } else {
    w.query_down = random_projection<T>(c.model_dim, c.q_latent_dim, false, 22);
    w.query_norm = random_gain<T>(c.q_latent_dim, 23);
    w.query_up = random_projection<T>(c.q_latent_dim, q_dim, false, 24);
  }
  w.latent_down = random_projection<T>(c.model_dim, c.latent_dim + c.rope_dim, false, 25);
  w.latent_norm = random_gain<T>(c.latent_dim, 26);
  w.key_up = random_projection<T>(c.latent_dim, c.heads * c.nope_dim, false, 27);
  w.value_up = random_projection<T>(c.latent_dim, c.heads * c.v_head_dim, false, 28);
  w.output = random_projection<T>(c.heads * c.v_head_dim, c.model_dim, false, 29);
  return {c, std::move(w)};
}

inline constexpr RopeConfig half_split{.pairing = qkv::Pairing::half_split};
inline constexpr RopeConfig interleaved{.pairing = qkv::Pairing::interleaved};

/// GQA with all that a layer may have, in odd sizes.
inline constexpr MultiHeadAttentionConfig small_gqa{.model_dim = 23,
                                                    .heads = 6,
                                                    .kv_heads = 2,
                                                    .head_dim = 10,
                                                    .v_head_dim = 7,
                                                    .qkv_bias = true,
                                                    .out_bias = true,
                                                    .qk_norm = true,
                                                    .rope = half_split};

inline constexpr LatentAttentionConfig small_mla{
    .model_dim = 29, .heads = 3, .latent_dim = 19, .nope_dim = 11, .rope_dim = 6, .v_head_dim = 9, .rope = interleaved};

// --- feeding a cache ---

/// The outputs of x given to a cache in pieces of these sizes, the last one again and again.
template <class Layer, class T, class Cache, class... More>
Matrix<T> feed(const Layer& layer, Cache& cache, const Matrix<T>& x, const std::vector<Index>& sizes,
               const More&... more) {
  Matrix<T> out = Matrix<T>::Constant(x.rows(), layer.config().model_dim, std::numeric_limits<T>::quiet_NaN());
  std::size_t piece = 0;
  for (Index first = 0; first < x.rows();) {
    const Index n = std::min(sizes[piece], x.rows() - first);
    layer.forward_into(out.middleRows(first, n), x.middleRows(first, n), cache, more...);
    first += n;
    if (piece + 1 < sizes.size()) ++piece;
  }
  return out;
}

}  // namespace support

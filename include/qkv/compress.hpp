// compress.hpp — converts a trained MHA, GQA or MQA layer to latent attention (MLA), so that its cache becomes small.
//
//     1. keys = rotated part + rest      of each RoPE pair, over the kv heads: principal directions keep RoPE
//     2. [rest | values] ≈ x·W_DKV·[W_UK | W_UV]            the best factors of rank latent_dim, by SVD
//
//     Compression<float> c(layer, {.rope_dim = 64}, x);     // x [n, model_dim]: inputs of the layer, for calibration
//     LatentAttention<float> small = c.layer(c.latent_dim_for(0.05));
//
// 1. A pair of features (a, b) of kv head g is a complex number z_g, rotated with position. The rotation is the same for all kv
// heads, so a unitary matrix over them commutes with it: keys go to z·V, queries to q·V, scores stay. V are the right
// singular vectors of z [n, kv_heads]; its columns with the largest σ²·mean|e^(jφ) − 1|² (φ the rotation over a distance) are
// the shared rope key, rope_dim features. The rest loses RoPE and becomes linear in x. Nothing of this is an approximation
// where rope_dim = kv_heads·dim. The rotation over heads is TransMLA's (RoRoPE: Meng et al. 2025, arXiv:2502.07864), here
// with complex V instead of real; to choose by size and frequency is MHA2MLA's (Ji et al. 2025, arXiv:2502.14837).
//
// 2. With x, errors are those of activations, which is much better than those of weights: ‖x·(W − W·V_r·V_rᵀ)‖ is the least
// possible for V_r the first r right singular vectors of x·W. Of keys, errors are those of the scores that the layer's own
// queries make with them, and both halves are scaled to equal size first (the balance is TransMLA's). latent_dim = rank of
// [rest | values] is exact. Biases are one more row of W, for an input that is always 1.
//
// A tool, all in double: for w = kv_heads·(head_dim + v_head_dim) about model_dim²·(n + w) + 10·w³ multiply-adds.
//
// Before: checkpoint.hpp   Next: parallel.hpp
#pragma once

#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "compress/key_directions.hpp"
#include "latent_attention.hpp"
#include "multi_head_attention.hpp"

namespace qkv { inline namespace QKV_ABI {

struct CompressionSettings {
  Index rope_dim = 0;    // features that keep RoPE, over all kv heads; 0: all, kv_heads·dim
  Index context = 2048;  // distances 0 … context-1 over which the rotation of a pair is averaged
};

namespace detail {

/// [W; b], in double: the bias is the row of an input that is always 1.
template <class T>
Eigen::MatrixXd with_bias_row(const Projection<T>& p) {
  Eigen::MatrixXd m = Eigen::MatrixXd::Zero(p.in_dim() + 1, p.out_dim());
  m.topRows(p.in_dim()) = p.weight().template cast<double>();
  if (p.has_bias()) m.bottomRows(1) = p.bias().template cast<double>();
  return m;
}
template <class T>
Projection<T> from_bias_row(const Eigen::MatrixXd& m, bool has_bias) {
  Matrix<T> weight = m.topRows(m.rows() - 1).template cast<T>();
  return Projection<T>(std::move(weight), has_bias ? RowVector<T>(m.bottomRows(1).template cast<T>()) : RowVector<T>());
}

}  // namespace detail

/// What a layer becomes for every latent_dim: the decompositions are done once, by the constructor.
template <class T>
class Compression {
 public:
  /// Without calibration: errors of weights count, as if all inputs were of equal size and independent.
  explicit Compression(const MultiHeadAttention<T>& layer, const CompressionSettings& settings = {})
      : Compression(layer, settings, Matrix<double>(0, layer.config().model_dim)) {}

  /// calibration [n, model_dim]: inputs of this very layer, some hundred tokens or more of typical text. Throws
  /// std::invalid_argument for a layer with QK-norm, sinks or cross-attention, which latent attention does not have;
  /// for a rope_dim that is odd or above kv_heads·dim, or not 0 in a layer without RoPE.
  template <MatrixLike X>
  Compression(const MultiHeadAttention<T>& layer, const CompressionSettings& settings, const X& calibration)
      : source_(layer.config()), output_(layer.weights().output) {
    const auto& c = source_;
    const auto& w = layer.weights();
    const Index dim = c.rope ? c.rope->rotated(c.head_dim) : 0;
    check_source(w, settings, dim, calibration);
    rope_dim_ = std::max<Index>(settings.rope_dim > 0 ? settings.rope_dim : c.kv_heads * dim, 2);

    // Second moments of the inputs: ‖x·W‖² = trace(Wᵀ·moments·W).
    Eigen::MatrixXd moments = Eigen::MatrixXd::Identity(c.model_dim + 1, c.model_dim + 1);
    if (calibration.rows() > 0) {
      Eigen::MatrixXd x = Eigen::MatrixXd::Ones(calibration.rows(), c.model_dim + 1);
      x.leftCols(c.model_dim) = calibration.template cast<double>();
      moments = detail::product(x.transpose(), x) / static_cast<double>(x.rows());
    }

    Eigen::MatrixXd keys = detail::with_bias_row(w.key), values = detail::with_bias_row(w.value);
    const auto energy = [&](const Eigen::MatrixXd& m) { return m.cwiseProduct(detail::product(moments, m)).sum(); };
    const double key_energy = energy(keys);
    split_keys(keys, detail::with_bias_row(w.query), moments, settings.context, dim, key_energy);
    if (energy(keys) <= 1e-20 * key_energy) keys.setZero();  // all of it has RoPE: this is rounding
    query_bias_ = w.query.has_bias();
    latent_bias_ = w.key.has_bias() || w.value.has_bias();

    // The rest of the keys counts by the scores it makes: mean (q·k)² = ‖k·F‖², F·Fᵀ = mean Σ qᵀq over a group's queries.
    const Index d = c.head_dim, width = d + rope_dim_;
    for (Index g = 0; g < c.kv_heads; ++g) {
      Eigen::MatrixXd seen = Eigen::MatrixXd::Zero(d, d);
      for (Index h = 0; h < c.heads; ++h) {
        if (Heads{c.heads, c.kv_heads}.kv_head(h) != g) continue;
        seen += detail::moments_of(query_.middleCols(h * width, d), moments);
      }
      const auto [root, inverse] = detail::root_and_inverse(seen);
      keys.middleCols(g * d, d) = detail::product(keys.middleCols(g * d, d), root);
      unscaled_.push_back(inverse);
    }
    // Scores and values, one beside the other and of equal size.
    const double rest = energy(keys), value_energy = energy(values);
    const double key_scale = rest > 0 && value_energy > 0 ? std::sqrt(value_energy / rest) : 1;
    for (auto& inverse : unscaled_) inverse /= key_scale;
    joint_.resize(c.model_dim + 1, keys.cols() + values.cols());
    joint_ << key_scale * keys, values;
    const Eigen::SelfAdjointEigenSolver<Eigen::MatrixXd> solver(detail::moments_of(joint_, moments));
    directions_ = solver.eigenvectors().rowwise().reverse();
    singular_values_ = solver.eigenvalues().reverse().cwiseMax(0.0).cwiseSqrt().transpose();
  }

  Index rope_dim() const { return rope_dim_; }
  /// [kv_heads·(head_dim + v_head_dim)], descending, of what the latent stands for: scores of the rest and values, root
  /// mean square over tokens. Below 1e-8 of the first they are rounding.
  const RowVector<double>& singular_values() const { return singular_values_; }

  /// √((lost scores / scores + lost values / values) / 2), each as sums of squares over tokens or pairs of tokens, scores
  /// of the part without RoPE: the first latent_dim directions lose least. 0 is exact.
  double relative_error(Index latent_dim) const {
    check_latent_dim(latent_dim);
    const Index n = singular_values_.size();
    const double all = singular_values_.squaredNorm();
    return all == 0 ? 0 : std::sqrt(singular_values_.tail(n - latent_dim).squaredNorm() / all);
  }
  /// The smallest latent_dim of at most this relative_error; 1e-7: exact.
  Index latent_dim_for(double error) const {
    Index latent_dim = 1;
    while (latent_dim < singular_values_.size() && !(relative_error(latent_dim) <= error)) ++latent_dim;
    return latent_dim;
  }
  /// The error of keys that lost RoPE: ‖rotated keys − keys‖ / ‖keys‖ over the features that lost it, mean over the distances
  /// of the context. 0 is exact.
  double rope_error() const { return rope_error_; }

  LatentAttentionConfig config(Index latent_dim) const {
    check_latent_dim(latent_dim);
    const auto& c = source_;
    RopeConfig rope{.pairing = c.rope ? c.rope->pairing : Pairing::interleaved};  // frequencies are in the weights
    if (c.rope) rope.scaling.attention_factor = c.rope->scaling.attention_factor;
    return {.model_dim = c.model_dim,
            .heads = c.heads,
            .latent_dim = latent_dim,
            .nope_dim = c.head_dim,
            .rope_dim = rope_dim_,
            .v_head_dim = c.v_head_dim,
            .latent_norm = false,
            .rope = rope,
            .scale = softmax_scale(c)};
  }

  LatentAttentionWeights<T> weights(Index latent_dim) const {
    check_latent_dim(latent_dim);
    const auto& c = source_;
    const Heads heads{c.heads, c.kv_heads};
    const Index d = c.head_dim, key_dim = c.kv_heads * d, value_dim = c.kv_heads * c.v_head_dim;
    const Eigen::MatrixXd up = directions_.leftCols(latent_dim).transpose();
    Matrix<double> key_up(latent_dim, key_dim);
    for (Index g = 0; g < c.kv_heads; ++g)
      key_up.middleCols(g * d, d) = detail::product(up.middleCols(g * d, d), unscaled_[static_cast<std::size_t>(g)]);
    Eigen::MatrixXd down(c.model_dim + 1, latent_dim + rope_dim_);
    down << detail::product(joint_, directions_.leftCols(latent_dim)), rope_key_;
    LatentAttentionWeights<T> w;
    w.query = detail::from_bias_row<T>(query_, query_bias_);
    w.latent_down = detail::from_bias_row<T>(down, latent_bias_);
    w.key_up = Projection<T>(repeat_kv_heads(key_up, heads).template cast<T>());
    w.value_up = Projection<T>(repeat_kv_heads(up.rightCols(value_dim), heads).template cast<T>());
    w.output = output_;
    w.rope_frequencies = frequencies_;
    return w;
  }

  LatentAttention<T> layer(Index latent_dim) const { return {config(latent_dim), weights(latent_dim)}; }

 private:
  template <class X>
  void check_source(const MultiHeadAttentionWeights<T>& w, const CompressionSettings& s, Index dim,
                    const X& calibration) const {
    const auto& c = source_;
    detail::require(!c.qk_norm && w.sinks.size() == 0 && c.key_dim == c.model_dim && c.value_dim == c.model_dim,
                    "latent attention has no QK-norm, no sinks and no cross-attention: such a layer cannot be "
                    "converted to it");
    detail::require(s.rope_dim >= 0 && s.rope_dim % 2 == 0 && s.rope_dim <= c.kv_heads * dim && s.context >= 1,
                    "a compression needs an even rope_dim from 0 to kv_heads*dim = ", c.kv_heads * dim,
                    " and context >= 1; given ", s.rope_dim, " and ", s.context);
    detail::require(calibration.cols() == c.model_dim && calibration.allFinite(),
                    "calibration must be finite and [n, model_dim ", c.model_dim, "]; given ",
                    detail::Shape{calibration.rows(), calibration.cols()});
    for (const Projection<T>* p : {&w.query, &w.key, &w.value})
      detail::require(p->weight().allFinite() && p->bias().allFinite(), "weights must be finite");
  }

  /// Moves the directions that keep RoPE out of `keys`, and builds the queries for both parts.
  void split_keys(Eigen::MatrixXd& keys, const Eigen::MatrixXd& q, const Eigen::MatrixXd& moments, Index context,
                  Index dim, double key_energy) {
    const auto& c = source_;
    const Index d = c.head_dim, width = d + rope_dim_;
    const RowVector<double> frequency = c.rope ? rope_frequencies(*c.rope, d) : RowVector<double>();
    const double attention_factor = c.rope ? c.rope->scaling.attention_factor : 1;
    const Pairing pairing = c.rope ? c.rope->pairing : Pairing::interleaved;

    const Eigen::MatrixXd gram = detail::moments_of(keys, moments);  // [kv_heads·d, kv_heads·d]
    const auto candidates = detail::key_directions(gram, c.kv_heads, frequency, pairing, context);
    const auto kept = static_cast<Index>(std::min(candidates.size(), static_cast<std::size_t>(rope_dim_ / 2)));
    frequencies_ = RowVector<double>::Zero(rope_dim_ / 2);
    rope_key_ = Eigen::MatrixXd::Zero(keys.rows(), rope_dim_);
    query_ = Eigen::MatrixXd::Zero(q.rows(), c.heads * width);
    for (Index h = 0; h < c.heads; ++h) query_.middleCols(h * width, d) = q.middleCols(h * d, d);
    // Scores with RoPE contain the attention factor twice; of features that lose RoPE the query gets both.
    for (Index h = 0; h < c.heads; ++h) query_.middleCols(h * width, dim) *= attention_factor * attention_factor;

    for (Index n = 0; n < kept; ++n) {
      const detail::KeyDirection& direction = candidates[static_cast<std::size_t>(n)];
      const auto [a, b] = detail::pair_features(pairing, dim, direction.pair);
      const auto [to_a, to_b] = detail::pair_features(pairing, rope_dim_, n);
      frequencies_(n) = frequency(direction.pair);
      auto re = rope_key_.col(to_a), im = rope_key_.col(to_b);
      for (Index g = 0; g < c.kv_heads; ++g) {  // c = z·v
        const double x = direction.x(g), y = direction.y(g);
        re += x * keys.col(g * d + a) - y * keys.col(g * d + b);
        im += y * keys.col(g * d + a) + x * keys.col(g * d + b);
      }
      for (Index g = 0; g < c.kv_heads; ++g) {  // z −= c·vᴴ
        const double x = direction.x(g), y = direction.y(g);
        keys.col(g * d + a) -= x * re + y * im;
        keys.col(g * d + b) -= x * im - y * re;
      }
      for (Index h = 0; h < c.heads; ++h) {  // a query knows one kv head: u·v_g
        const Index g = Heads{c.heads, c.kv_heads}.kv_head(h), at = h * width + d;
        const double x = direction.x(g), y = direction.y(g);
        query_.col(at + to_a) = x * q.col(h * d + a) - y * q.col(h * d + b);
        query_.col(at + to_b) = y * q.col(h * d + a) + x * q.col(h * d + b);
      }
    }
    double lost = 0;
    for (std::size_t n = static_cast<std::size_t>(kept); n < candidates.size(); ++n) lost += candidates[n].loss;
    rope_error_ = key_energy > 0 ? std::sqrt(lost / key_energy) : 0;
  }

  void check_latent_dim(Index latent_dim) const {
    detail::require(latent_dim >= 1 && latent_dim <= singular_values_.size(),
                    "latent_dim must satisfy 1 <= latent_dim <= kv_heads*(head_dim + v_head_dim) = ",
                    singular_values_.size(), "; given ", latent_dim);
  }

  MultiHeadAttentionConfig source_;
  Projection<T> output_;
  Index rope_dim_ = 0;
  bool query_bias_ = false, latent_bias_ = false;
  double rope_error_ = 0;
  Eigen::MatrixXd query_, rope_key_;       // [model_dim + 1, …], the last row a bias
  Eigen::MatrixXd joint_, directions_;     // [rest·F | values], and the right singular vectors of x·joint
  std::vector<Eigen::MatrixXd> unscaled_;  // F⁻¹ of each kv head
  RowVector<double> singular_values_, frequencies_;
};

}}  // namespace qkv::QKV_ABI

// story_model.hpp — a whole language model of the Llama family on top of qkv: what stands around attention in practice.
//
//     x = E[tokens]                                                         token vectors
//     of each layer    x ← x + attention(rms_norm(x))                       GQA with RoPE; one KvCache per layer
//                      x ← x + W₂·(silu(W₁·h) ⊙ W₃·h), h = rms_norm(x)      SwiGLU: Shazeer 2020, arXiv:2002.05202
//     logits = rms_norm(x)·Eᵀ                                               or a matrix of its own instead of E
//
//     StoryModel model(read_checkpoint("stories260K.bin"));
//     auto caches = model.make_caches(256);
//     Matrix<float> logits = model.forward(prompt, caches);                 // [n, vocabulary]; then a token at a time
//
// Touvron et al. 2023, arXiv:2302.13971.
//
// Before: llama2c_files.hpp   Next: 08_story_model.cpp
#pragma once

#include <qkv/qkv.hpp>

#include <cmath>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include "llama2c_files.hpp"

namespace story {

using qkv::Matrix;
using qkv::RowVector;

/// Const, and usable from several threads at once; what changes while a text grows are its caches, one per layer.
template <class T = float>
class StoryModel {
  using Projection = qkv::Projection<T>;

 public:
  explicit StoryModel(const Checkpoint& checkpoint) : config_(checkpoint.config) {
    const auto& c = config_;
    const float* at = checkpoint.weights.data();
    const auto take = [&](Index rows, Index cols) {
      const float* first = std::exchange(at, at + rows * cols);
      return qkv::ConstView<float>(first, rows, cols, Eigen::OuterStride<>(cols));
    };
    const Index kv_dim = c.kv_heads * c.head_dim();
    const auto table = take(c.vocabulary, c.model_dim), attention_norm = take(c.layers, c.model_dim),
               query = take(c.layers * c.model_dim, c.model_dim), key = take(c.layers * kv_dim, c.model_dim),
               value = take(c.layers * kv_dim, c.model_dim), output = take(c.layers * c.model_dim, c.model_dim),
               ffn_norm = take(c.layers, c.model_dim), gate = take(c.layers * c.hidden_dim, c.model_dim),
               down = take(c.layers * c.model_dim, c.hidden_dim), up = take(c.layers * c.hidden_dim, c.model_dim),
               final_norm = take(1, c.model_dim);
    take(c.max_positions, c.head_dim());  // RoPE's cosines and sines: qkv has its own
    if (!c.tied) classifier_ = Projection::from_out_in(take(c.vocabulary, c.model_dim).template cast<T>());

    embedding_ = qkv::Embedding<T>(table.template cast<T>());
    final_norm_ = final_norm.template cast<T>();
    const qkv::MultiHeadAttentionConfig attention{.model_dim = c.model_dim,
                                                  .heads = c.heads,
                                                  .kv_heads = c.kv_heads,
                                                  .rope = qkv::RopeConfig{.pairing = qkv::Pairing::interleaved}};
    for (Index i = 0; i < c.layers; ++i) {
      const auto of_layer = [i, n = c.layers](const auto& all) {  // [out, in]
        const Index rows = all.rows() / n;
        return Projection::from_out_in(all.middleRows(i * rows, rows).template cast<T>());
      };
      layers_.push_back({attention_norm.row(i).template cast<T>(),
                         {attention, {of_layer(query), of_layer(key), of_layer(value), of_layer(output)}},
                         ffn_norm.row(i).template cast<T>(),
                         of_layer(gate),
                         of_layer(up),
                         of_layer(down)});
    }
  }

  const ModelConfig& config() const { return config_; }

  /// Empty caches, one per layer, for texts of up to `capacity` tokens.
  template <qkv::StorageType S = T>
  std::vector<qkv::KvCache<S>> make_caches(Index capacity) const {
    std::vector<qkv::KvCache<S>> caches;
    for (const Layer& layer : layers_) caches.push_back(layer.attention.template make_cache<S>(capacity));
    return caches;
  }

  /// A whole text without a cache -> logits [n, vocabulary]; row i scores what may follow token i.
  Matrix<T> forward(std::span<const Token> tokens) const {
    return forward_with(tokens, [&](std::size_t i, const Matrix<T>& x) { return layers_[i].attention.forward(x); });
  }
  /// The next tokens of a text: a prompt, or the one that was chosen last.
  template <qkv::StorageType S>
  Matrix<T> forward(std::span<const Token> tokens, std::vector<qkv::KvCache<S>>& caches) const {
    return forward_with(tokens,
                        [&](std::size_t i, const Matrix<T>& x) { return layers_[i].attention.forward(x, caches[i]); });
  }
  /// With something else in the place of attention: attend(layer, x [n, model_dim]) -> [n, model_dim].
  template <class Attend>
  Matrix<T> forward_with(std::span<const Token> tokens, Attend&& attend) const {
    Matrix<T> x = embedding_.forward(tokens);  // [n, model_dim]
    for (std::size_t i = 0; i < layers_.size(); ++i) {
      x += attend(i, qkv::rms_norm(x, layers_[i].attention_norm, norm_eps));
      x += layers_[i].feed_forward(qkv::rms_norm(x, layers_[i].ffn_norm, norm_eps));
    }
    x = qkv::rms_norm(x, final_norm_, norm_eps);
    return classifier_ ? classifier_->forward(x) : embedding_.logits(x);
  }

  const qkv::MultiHeadAttention<T>& attention(std::size_t layer) const { return layers_.at(layer).attention; }

 private:
  static constexpr double norm_eps = 1e-5;

  struct Layer {
    RowVector<T> attention_norm;
    qkv::MultiHeadAttention<T> attention;
    RowVector<T> ffn_norm;
    Projection gate, up, down;  // W₁, W₃, W₂

    Matrix<T> feed_forward(const Matrix<T>& x) const {
      const auto silu = [](T z) { return z / (1 + std::exp(-z)); };
      return down.forward(gate.forward(x).unaryExpr(silu).cwiseProduct(up.forward(x)));
    }
  };

  ModelConfig config_;
  qkv::Embedding<T> embedding_{Matrix<T>()};
  std::vector<Layer> layers_;
  RowVector<T> final_norm_;
  std::optional<Projection> classifier_;  // none: tied
};

}  // namespace story

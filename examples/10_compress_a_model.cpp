// 10_compress_a_model — a trained GQA model is turned into MLA: how small can its cache get, and what does that cost?
//
//   * MLA can do all that GQA does: where all of RoPE is kept and the rank suffices, the model is the same
//   * with a smaller cache the loss on the model's own text grows, slowly at first; nothing is trained again
//   * directions chosen by activations lose much less than directions chosen by weights alone
//   * int8 latents halve what is left at no further cost
//
//     10_compress_a_model stories260K.bin tok512.bin
//
// Headers: compress.hpp, latent_attention.hpp.   Before: 08_story_model

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <random>
#include <span>
#include <string>
#include <vector>

#include <qkv/compress.hpp>
#include <qkv/qkv.hpp>

#include "story_model.hpp"
#include "terminal.hpp"

using qkv::Index;
using qkv::Matrix;
using story::Token;
using Model = story::StoryModel<float>;
using Text = std::vector<Token>;

namespace {

/// A story as the model tells it: every token drawn with the probability that the model gives it.
Text tell(const Model& model, Index tokens, std::uint64_t seed) {
  std::mt19937_64 random(seed);
  auto caches = model.make_caches(tokens);
  Text text{story::begin_of_text};
  while (static_cast<Index>(text.size()) < tokens) {
    const Matrix<float> p = qkv::softmax(model.forward(std::span(text).last(1), caches));  // [1, vocabulary]
    double draw = static_cast<double>(random() >> 11) * 0x1p-53;
    Index token = 0;
    while (token + 1 < p.cols() && (draw -= static_cast<double>(p(0, token))) >= 0) ++token;
    if (token == story::begin_of_text) break;  // the story has ended
    text.push_back(static_cast<Token>(token));
  }
  return text;
}

/// -log p of each next token, mean over texts, in nats. `attend` stands in the place of the model's attention.
template <class Attend>
double loss(const Model& model, const std::vector<Text>& texts, Attend&& attend) {
  double sum = 0, count = 0;
  for (const Text& text : texts) {
    const Matrix<float> logits = model.forward_with(std::span(text).first(text.size() - 1), attend);
    for (Index i = 0; i < logits.rows(); ++i) {
      const auto row = logits.row(i).cast<double>();
      sum += std::log((row.array() - row.maxCoeff()).exp().sum()) + row.maxCoeff() -
             row(text[static_cast<std::size_t>(i) + 1]);
    }
    count += static_cast<double>(logits.rows());
  }
  return sum / count;
}

/// What each attention layer gets to see over these texts: [tokens, model_dim] of every layer.
std::vector<Matrix<float>> layer_inputs(const Model& model, const std::vector<Text>& texts) {
  std::vector<Matrix<float>> inputs(static_cast<std::size_t>(model.config().layers));
  for (const Text& text : texts)
    (void)model.forward_with(text, [&](std::size_t layer, const Matrix<float>& x) {
      Matrix<float>& all = inputs[layer];
      all.conservativeResize(all.rows() + x.rows(), x.cols());
      all.bottomRows(x.rows()) = x;
      return model.attention(layer).forward(x);
    });
  return inputs;
}

/// The model's attention layers as MLA of one size, and what their caches cost.
struct Compressed {
  std::vector<qkv::LatentAttention<float>> layers;
  double rope_error = 0, latent_error = 0;  // means over the layers

  Compressed(const Model& model, Index rope_dim, Index latent_dim, const std::vector<Matrix<float>>& inputs) {
    const auto n = static_cast<double>(model.config().layers);
    for (std::size_t i = 0; i < inputs.size(); ++i) {
      const qkv::Compression<float> c(model.attention(i), {.rope_dim = rope_dim, .context = 256}, inputs[i]);
      layers.push_back(c.layer(latent_dim));
      rope_error += c.rope_error() / n;
      latent_error += c.relative_error(latent_dim) / n;
    }
  }

  template <qkv::StorageType S>
  double loss_in(const Model& model, const std::vector<Text>& texts) const {
    return loss(model, texts, [&](std::size_t i, const Matrix<float>& x) {
      auto cache = layers[i].make_cache<S>(x.rows());
      return layers[i].forward(x, cache);
    });
  }
  /// Of all layers, as allocated.
  template <qkv::StorageType S>
  Index bytes_per_token() const {
    Index sum = 0;
    for (const auto& layer : layers) sum += layer.make_cache<S>(64).bytes() / 64;
    return sum;
  }
};

/// Blocks, three bytes each, filled up with spaces.
std::string column(const std::string& bar, std::size_t width) {
  return bar + std::string(width - std::min(width, bar.size() / 3), ' ');
}

int run(const char* model_file, const char* tokenizer_file) {
  terminal::Claims claims;
  const Model model(story::read_checkpoint(model_file));
  const story::Tokenizer tokenizer = story::read_tokenizer(tokenizer_file, model.config().vocabulary);

  std::vector<Text> calibration, texts;  // other texts to measure on than to learn from
  for (std::uint64_t seed = 1; seed <= 6; ++seed) calibration.push_back(tell(model, 256, seed));
  for (std::uint64_t seed = 7; seed <= 12; ++seed) texts.push_back(tell(model, 256, seed));
  std::string begin;
  for (std::size_t i = 1; i < 24; ++i) begin += tokenizer.decode(texts[0][i - 1], texts[0][i]);
  std::printf("The model tells twelve stories, six to learn from and six to measure on: \"%s ...\"\n\n", begin.c_str());

  const auto inputs = layer_inputs(model, calibration);
  const double original =
      loss(model, texts, [&](std::size_t i, const Matrix<float>& x) { return model.attention(i).forward(x); });
  Index original_bytes = 0;
  for (const auto& cache : model.make_caches(64)) original_bytes += cache.bytes() / 64;

  std::printf("  cache, bytes per token, all layers         rope  latent     nats per token\n");
  const auto row = [&](const std::string& name, Index bytes, double rope, double latent, double nats) {
    std::printf("  %-16s %5td %s %6.3f %7.3f %9.3f %+.3f %s\n", name.c_str(), bytes,
                column(terminal::bar(qkv::ratio(bytes, original_bytes), 20), 20).c_str(), rope, latent, nats,
                nats - original, terminal::bar((nats - original) / 2, 40).c_str());
  };
  row("GQA", original_bytes, 0, 0, original);
  struct Size {
    Index rope_dim, latent_dim;
  };
  std::vector<double> cost;
  for (const auto& [rope_dim, latent_dim] :
       {Size{32, 32}, {24, 32}, {20, 28}, {12, 28}, {8, 24}, {8, 16}, {8, 8}, {4, 4}}) {
    const Compressed mla(model, rope_dim, latent_dim, inputs);
    cost.push_back(mla.loss_in<float>(model, texts) - original);
    row("MLA " + std::to_string(latent_dim) + " + " + std::to_string(rope_dim), mla.bytes_per_token<float>(),
        mla.rope_error, mla.latent_error, original + cost.back());
  }

  std::vector<Matrix<float>> no_inputs;
  for (const auto& x : inputs) no_inputs.push_back(x.topRows(0));
  const Compressed half(model, 8, 24, inputs), by_weights(model, 8, 24, no_inputs);
  const double in_int8 = half.loss_in<std::int8_t>(model, texts) - original,
               uncalibrated = by_weights.loss_in<float>(model, texts) - original;
  std::printf("\n");
  row("MLA 24 + 8, int8", half.bytes_per_token<std::int8_t>(), half.rope_error, half.latent_error, original + in_int8);
  row("  by weights", by_weights.bytes_per_token<float>(), by_weights.rope_error, by_weights.latent_error,
      original + uncalibrated);

  std::printf(
      "\n  MLA latent_dim + rope_dim. Relative errors: rope, of keys that no longer turn; latent, of what the latent\n"
      "  cannot hold. By weights: the same sizes, chosen without looking at a text.\n\n");
  claims(std::abs(cost[0]) < 1e-4, "with all of RoPE and the full rank the model is the same");
  claims(cost[1] < 0.1, "an eighth of the cache costs less than a tenth of a nat");
  claims(half.bytes_per_token<float>() * 2 == original_bytes && cost[4] < 0.5,
         "half of the cache costs less than half a nat");
  claims(uncalibrated > 1.3 * cost[4], "choosing by weights instead of activations costs more");
  claims(std::abs(in_int8 - cost[4]) < 0.05, "int8 latents change next to nothing");
  claims(std::is_sorted(cost.begin(), cost.end()), "every number less costs something: this small model has no slack");
  return claims.status();
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) {
    std::puts("usage: 10_compress_a_model MODEL TOKENIZER, in the formats of llama2.c: see 08_story_model");
    return argc == 1 ? 0 : 1;
  }
  try {
    return run(argv[1], argv[2]);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "10_compress_a_model: %s\n", error.what());
    return 1;
  }
}

// 08_story_model — a real model: a small Llama writes a story, one token at a time.
//
// All that the examples before this one showed, where it is at home: token vectors, grouped-query attention with RoPE,
// a cache per layer. The rest of the model is two norms and a feed-forward network: see story_model.hpp.
//
//     08_story_model --model stories260K.bin --tokenizer tok512.bin --prompt "Once upon a time" --temperature 0
//
// --check recomputes the whole text without a cache and compares: the cache changes the cost, not the numbers.
//
// Headers: story_model.hpp, qkv.hpp.   Before: 07_latent_attention   Next: 09_streaming

#include <CLI/CLI.hpp>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <numeric>
#include <optional>
#include <random>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

#include "story_model.hpp"

namespace {

using story::Index;
using story::Matrix;
using story::Token;

struct Settings {
  std::string model, tokenizer, prompt, storage = "f32";
  std::optional<Index> steps;
  double temperature = 1.0, top_p = 0.9;
  std::uint64_t seed = 1;
  bool check = false;
};

void require(bool ok, const std::string& what) {
  if (!ok) throw std::runtime_error(what);
}

/// Temperature 0 takes the likeliest token; else a token is drawn from the likeliest that together have probability top_p
/// (nucleus sampling: Holtzman et al. 2020, arXiv:1904.09751).
Token choose(const qkv::RowVector<float>& logits, const Settings& settings, std::mt19937_64& random) {
  Index best = 0;
  const double maximum = logits.maxCoeff(&best);
  if (settings.temperature == 0) return static_cast<Token>(best);
  const qkv::RowVector<double> cooled = (logits.cast<double>().array() - maximum) / settings.temperature;
  const auto p = qkv::softmax(cooled);  // [1, vocabulary]
  std::vector<Token> order(static_cast<std::size_t>(p.size()));
  std::iota(order.begin(), order.end(), Token{0});
  std::stable_sort(order.begin(), order.end(), [&](Token a, Token b) { return p(0, a) > p(0, b); });
  std::size_t kept = 0;
  double mass = 0;
  while (kept < order.size() && (kept == 0 || mass < settings.top_p)) mass += p(0, order[kept++]);
  double draw = static_cast<double>(random() >> 11) * 0x1p-53 * mass;
  for (std::size_t i = 0; i + 1 < kept; ++i)
    if ((draw -= p(0, order[i])) < 0) return order[i];
  return order[kept - 1];
}

template <qkv::StorageType S>
int write_story(const Settings& settings) {
  const story::StoryModel<float> model(story::read_checkpoint(settings.model));
  const auto& config = model.config();
  const story::Tokenizer tokenizer = story::read_tokenizer(settings.tokenizer, config.vocabulary);
  const Index steps = settings.steps.value_or(std::min<Index>(256, config.max_positions));
  require(steps <= config.max_positions,
          "--steps must be at most " + std::to_string(config.max_positions) + ", the positions of this model");
  std::vector<Token> tokens = tokenizer.encode(settings.prompt);
  const auto n_prompt = static_cast<Index>(tokens.size());
  require(n_prompt <= steps,
          "the prompt has " + std::to_string(n_prompt) + " tokens: --steps must be at least as many");

  const auto start = std::chrono::steady_clock::now();
  std::mt19937_64 random(settings.seed);
  auto caches = model.make_caches<S>(steps);
  Matrix<float> seen(settings.check ? steps : 0, config.vocabulary);  // logits, kept for the check
  const auto print = [&](std::size_t i) {
    const std::string text = tokenizer.decode(tokens[i - 1], tokens[i]);
    std::fwrite(text.data(), 1, text.size(), stdout);
    std::fflush(stdout);
  };
  for (std::size_t i = 1; i < tokens.size(); ++i) print(i);
  Index position = 0;
  while (position < steps) {
    const std::span<const Token> next = std::span(tokens).subspan(static_cast<std::size_t>(position));
    const Matrix<float> logits = model.forward(next, caches);  // the whole prompt first, then one token at a time
    if (settings.check) seen.middleRows(position, logits.rows()) = logits;
    position += logits.rows();
    tokens.push_back(choose(logits.bottomRows(1), settings, random));
    if (tokens.back() == story::begin_of_text) break;  // the end of this story and the beginning of another
    print(tokens.size() - 1);
  }
  std::puts("");
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
  std::fprintf(stderr, "%td tokens, %.0f tokens/s; cache %td bytes in %s\n", position,
               static_cast<double>(position) / seconds.count(), static_cast<Index>(caches.size()) * caches[0].bytes(),
               qkv::storage_name<S>);
  if (!settings.check) return 0;

  const Matrix<float> whole = model.forward(std::span(tokens).first(static_cast<std::size_t>(position)));
  const float difference = (whole - seen.topRows(position)).cwiseAbs().maxCoeff<Eigen::PropagateNaN>();
  const bool equal = difference <= 1e-3F;
  std::printf("cache in %s against recomputation of %td positions without it: largest difference of logits %.1e%s\n",
              qkv::storage_name<S>, position, static_cast<double>(difference),
              equal                      ? ", equal"
              : std::is_same_v<S, float> ? ", NOT EQUAL"
                                         : ", the rounding of the cache");
  return equal || !std::is_same_v<S, float> ? 0 : 1;
}

int run(const Settings& settings) {
  if (settings.model.empty()) {
    std::puts(
        "Needs --model and --tokenizer: checkpoints such as stories15M.bin are published at "
        "https://huggingface.co/karpathy/tinyllamas, tokenizer.bin at https://github.com/karpathy/llama2.c.");
    return 0;
  }
  require(!settings.tokenizer.empty(), "--model needs --tokenizer");
  require(std::isfinite(settings.temperature) && settings.temperature >= 0, "--temperature must be finite and >= 0");
  require(settings.top_p > 0 && settings.top_p <= 1, "--top-p must satisfy 0 < p <= 1");
  if (settings.storage == "f16") return write_story<qkv::half>(settings);
  if (settings.storage == "bf16") return write_story<qkv::bfloat16>(settings);
  if (settings.storage == "int8") return write_story<std::int8_t>(settings);
  return write_story<float>(settings);
}

}  // namespace

int main(int argc, char** argv) {
  Settings settings;
  CLI::App app("Writes a story with a model of the Llama family, in the formats of llama2.c.");
  app.add_option("--model", settings.model, "Checkpoint, for instance stories15M.bin");
  app.add_option("--tokenizer", settings.tokenizer, "The model's tokenizer, for instance tokenizer.bin");
  app.add_option("--prompt", settings.prompt, "How the story begins");
  app.add_option("--steps", settings.steps, "Tokens to read and write; default 256")
      ->check(CLI::Range(Index{1}, Index{1} << 20));
  app.add_option("--temperature", settings.temperature, "0: always the likeliest token")->capture_default_str();
  app.add_option("--top-p", settings.top_p, "Draw from the likeliest tokens of this probability")
      ->capture_default_str();
  app.add_option("--seed", settings.seed, "Same seed, same story")
      ->check(CLI::Range(Index{0}, qkv::infinite))
      ->capture_default_str();
  app.add_option("--storage", settings.storage, "Numbers of the cache")
      ->check(CLI::IsMember({"f32", "f16", "bf16", "int8"}))
      ->capture_default_str();
  app.add_flag("--check", settings.check, "Compare with recomputation without a cache");
  CLI11_PARSE(app, argc, argv);
  try {
    return run(settings);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "08_story_model: %s\n", error.what());
    return 1;
  }
}

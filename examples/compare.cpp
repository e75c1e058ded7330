// compare — one text through five attention layers of equal width: what does each keep per token, and what does it cost?
//
//     MHA, GQA, MQA     keys and values of 32, 8 and 1 heads
//     MLA naive-cache   keys and values of all heads, restored from their latent once and cached
//     MLA               the latent and one rope key
//
// The text's bytes are its tokens and their vectors are random, as are the weights: memory, time and the agreement of
// cached decode with recomputation do not depend on what a model has learned.
#include <CLI/CLI.hpp>
#include <nlohmann/json.hpp>
#include <qkv/qkv.hpp>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <random>
#include <span>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#if __has_include(<unistd.h>)
#include <unistd.h>
#endif

#include "naive_latent_attention.hpp"

namespace {

using qkv::Index;
using qkv::Matrix;

struct Settings {
  std::string text, json, storage = "f32";
  Index tokens = 512, decode_tokens = 64;
  Index model_dim = 1024, heads = 32, kv_heads = 8, head_dim = 64;
  Index latent_dim = 256, nope_dim = 64, rope_dim = 32;
  double memory_limit = 8;
  bool deepseek_v3 = false;

  qkv::MultiHeadAttentionConfig multi_head(Index n_kv_heads) const {
    return {.model_dim = model_dim,
            .heads = heads,
            .kv_heads = n_kv_heads,
            .head_dim = head_dim,
            .rope = qkv::RopeConfig{.pairing = qkv::Pairing::interleaved}};
  }
  qkv::LatentAttentionConfig latent() const {
    return {.model_dim = model_dim,
            .heads = heads,
            .latent_dim = latent_dim,
            .nope_dim = nope_dim,
            .rope_dim = rope_dim,
            .v_head_dim = head_dim,
            .rope = deepseek_v3 ? qkv::deepseek_v3.rope : qkv::RopeConfig{.pairing = qkv::Pairing::interleaved}};
  }
};

struct Row {
  std::string name, holds;             // "32 x (64 + 64)" numbers per token
  double bytes_per_token = 0;          // of the cache as allocated
  double prefill = 0, decode = 0;      // tokens per second
  double difference = 0, largest = 0;  // of decoded outputs from recomputed ones; largest recomputed output
};

void require(bool ok, const std::string& what) {
  if (!ok) throw std::runtime_error(what);
}

// --- text -------------------------------------------------------------------------------------------------------------

std::filesystem::path default_text() {
  const auto of_checkout = std::filesystem::path(__FILE__).parent_path().parent_path() / "README.md";
  return std::filesystem::exists(of_checkout) ? of_checkout : "README.md";
}

/// The first `most` bytes of a file, as tokens 0 … 255.
std::vector<std::int32_t> read_tokens(const std::filesystem::path& path, Index most) {
  std::ifstream file(path, std::ios::binary);
  require(std::filesystem::is_regular_file(path) && file.good(), "cannot read the text " + path.string());
  std::string text(static_cast<std::size_t>(most), '\0');
  file.read(text.data(), most);
  text.resize(static_cast<std::size_t>(file.gcount()));
  require(text.size() >= 2, "the text " + path.string() + " must have at least 2 bytes: one to read and one to decode");
  std::vector<std::int32_t> tokens;
  for (const char c : text) tokens.push_back(static_cast<unsigned char>(c));
  return tokens;
}

Matrix<float> random_table(Index model_dim) {
  std::mt19937 engine(7);
  std::normal_distribution<float> normal;
  return Matrix<float>::NullaryExpr(256, model_dim, [&] { return normal(engine); });
}

// --- measuring --------------------------------------------------------------------------------------------------------

/// A line that overwrites itself, for people only.
class Progress {
 public:
  void operator()(const std::string& text) const {
    if (visible_) std::fprintf(stderr, "\r\033[K%s", text.c_str());
  }
  ~Progress() { (*this)(""); }

 private:
#if __has_include(<unistd.h>)
  bool visible_ = isatty(2) != 0;
#else
  bool visible_ = false;
#endif
};

template <class F>
double seconds(F&& f) {
  const auto start = std::chrono::steady_clock::now();
  f();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

/// `recompute` gives the layer's outputs for the whole text without a cache; `layer` then reads all but the last
/// `n_decode` tokens at once and those one by one.
template <class Layer, class Cache, class Recompute>
Row measure(Row row, const Layer& layer, Cache cache, const Recompute& recompute, const Matrix<float>& x,
            Index n_decode, const Progress& progress) {
  progress(row.name + ": recomputation without a cache");
  const Matrix<float> expected = recompute(x);
  row.largest = expected.cwiseAbs().maxCoeff<Eigen::PropagateNaN>();
  row.bytes_per_token = static_cast<double>(cache.bytes()) / static_cast<double>(cache.capacity());

  const Index n_prefill = x.rows() - n_decode;
  progress(row.name + ": prefill of " + std::to_string(n_prefill) + " tokens");
  row.prefill = static_cast<double>(n_prefill) / seconds([&] { layer.forward(x.topRows(n_prefill), cache); });
  Matrix<float> decoded(n_decode, x.cols());
  double in_decode = 0;
  for (Index i = 0; i < n_decode; ++i) {
    if (i % 8 == 0) progress(row.name + ": decode, token " + std::to_string(i + 1) + " of " + std::to_string(n_decode));
    in_decode += seconds([&] { decoded.row(i) = layer.forward(x.middleRows(n_prefill + i, 1), cache); });
  }
  row.decode = static_cast<double>(n_decode) / in_decode;
  row.difference = (decoded - expected.bottomRows(n_decode)).cwiseAbs().maxCoeff<Eigen::PropagateNaN>();
  return row;
}

template <qkv::StorageType S>
std::vector<Row> measure_all(const Settings& s, const Matrix<float>& x, Index n_decode) {
  const Progress progress;
  std::vector<Row> rows;
  const auto times = [](Index heads, Index key, Index value) {
    return std::to_string(heads) + " x (" + std::to_string(key) + " + " + std::to_string(value) + ")";
  };
  for (const auto& [name, kv_heads] : {std::pair{"MHA", s.heads}, {"GQA", s.kv_heads}, {"MQA", Index{1}}}) {
    const auto config = s.multi_head(kv_heads);
    qkv::MultiHeadAttention<float> layer(config, qkv::MultiHeadAttentionWeights<float>::random(config));
    layer.reserve_positions(x.rows());
    rows.push_back(measure(
        {name, times(kv_heads, s.head_dim, s.head_dim)}, layer, layer.template make_cache<S>(x.rows()),
        [&](const auto& all) { return layer.forward(all); }, x, n_decode, progress));
  }
  const auto config = s.latent();
  qkv::LatentAttention<float> latent(config, qkv::LatentAttentionWeights<float>::random(config));
  latent.reserve_positions(x.rows());
  const NaiveLatentAttention<float> naive(latent);
  const auto recompute = [&](const auto& all) { return naive.forward(all); };
  rows.push_back(measure({"MLA naive-cache", times(s.heads, config.head_dim(), s.head_dim)}, naive,
                         naive.template make_cache<S>(x.rows()), recompute, x, n_decode, progress));
  rows.push_back(measure({"MLA", std::to_string(s.latent_dim) + " + " + std::to_string(s.rope_dim)}, latent,
                         latent.template make_cache<S>(x.rows()), recompute, x, n_decode, progress));
  return rows;
}

/// About what the largest of the layers needs, with room for copies: in double, so that nothing wraps around.
double needed_bytes(const Settings& s, Index n) {
  const double m = static_cast<double>(s.model_dim), h = static_cast<double>(s.heads),
               d = static_cast<double>(s.head_dim), key = static_cast<double>(s.nope_dim + s.rope_dim),
               c = static_cast<double>(s.latent_dim);
  const double multi_head = 4 * m * h * d, latent = m * h * key + m * c + 2 * c * h * (key + d) + h * d * m;
  const double per_token = 4 * m + 3 * h * (2 * std::max(d, key) + 2 * d);
  return sizeof(float) * (2 * std::max(multi_head, latent) + static_cast<double>(n) * per_token + 256 * m);
}

// --- output -----------------------------------------------------------------------------------------------------------

void print(const Settings& s, const std::string& text, Index n_prefill, Index n_decode, const std::vector<Row>& rows) {
  std::printf("%s: %td bytes as tokens, %td at once and %td one by one\n", text.c_str(), n_prefill + n_decode,
              n_prefill, n_decode);
  std::printf("One layer of each kind: model_dim %td, %td heads of %td, caches in %s, one core (%s)\n", s.model_dim,
              s.heads, s.head_dim, s.storage.c_str(), qkv::isa_name);
  if (s.deepseek_v3)
    std::printf(
        "Head sizes of DeepSeek-V3. Scaled down to fit: model_dim %td instead of %td, queries without their latent of\n"
        "%td, one layer instead of 61. No figure in a cache column depends on these.\n",
        s.model_dim, qkv::deepseek_v3.model_dim, qkv::deepseek_v3.q_latent_dim);
  std::printf("\n%-16s %18s %12s %9s %14s %13s %20s\n", "", "numbers cached", "bytes", "smaller", "prefill", "decode",
              "largest |decoded");
  std::printf("%-16s %18s %12s %9s %14s %13s %20s\n", "variant", "per token", "per token", "than MHA", "tokens/s",
              "tokens/s", "- recomputed|");
  for (const Row& row : rows)
    std::printf("%-16s %18s %12.0f %8.2fx %14.0f %13.0f %20.1e\n", row.name.c_str(), row.holds.c_str(),
                row.bytes_per_token, rows[0].bytes_per_token / row.bytes_per_token, row.prefill, row.decode,
                row.difference);

  const Row &naive = rows[3], &latent = rows[4];
  const double to_mqa = latent.bytes_per_token / rows[2].bytes_per_token;
  std::printf(
      "\nGQA and MQA cache less because query heads share keys and values; MLA because it caches a latent from which "
      "every\n"
      "head's are restored: %.1fx less than MHA, %.1fx less than its own naive form, and %.2fx what MQA takes.\n",
      rows[0].bytes_per_token / latent.bytes_per_token, naive.bytes_per_token / latent.bytes_per_token, to_mqa);
  std::printf(
      "The last column compares tokens decoded with a cache with the whole text computed without one: %s.\n"
      "Tokens/s are of one layer, projections included.\n",
      s.storage == "f32" ? "the same but for rounding" : "the rounding of the cache shows");
}

nlohmann::json report(const Settings& s, const std::string& text, Index n_prefill, Index n_decode,
                      const std::vector<Row>& rows) {
  nlohmann::json variants = nlohmann::json::array();
  for (const Row& row : rows)
    variants.push_back({{"name", row.name},
                        {"cache_bytes_per_token", row.bytes_per_token},
                        {"mha_over_this", rows[0].bytes_per_token / row.bytes_per_token},
                        {"prefill_tokens_per_second", row.prefill},
                        {"decode_tokens_per_second", row.decode},
                        {"max_abs_difference", row.difference},
                        {"max_abs_output", row.largest}});
  return {{"text", text},
          {"prefill_tokens", n_prefill},
          {"decode_tokens", n_decode},
          {"model_dim", s.model_dim},
          {"heads", s.heads},
          {"kv_heads", s.kv_heads},
          {"head_dim", s.head_dim},
          {"latent_dim", s.latent_dim},
          {"nope_dim", s.nope_dim},
          {"rope_dim", s.rope_dim},
          {"deepseek_v3_head_sizes", s.deepseek_v3},
          {"storage", s.storage},
          {"build", qkv::build_name},
          {"variants", variants}};
}

int run(Settings s) {
  if (s.deepseek_v3) {
    const auto& v3 = qkv::deepseek_v3;
    s.heads = v3.heads, s.head_dim = v3.v_head_dim, s.latent_dim = v3.latent_dim;
    s.nope_dim = v3.nope_dim, s.rope_dim = v3.rope_dim;
  }
  for (const Index kv_heads : {s.heads, s.kv_heads, Index{1}}) check(s.multi_head(kv_heads));
  check(s.latent());
  const double needed = needed_bytes(s, s.tokens + s.decode_tokens);
  char memory[160];
  std::snprintf(memory, sizeof memory, "these sizes need about %.3g GB; --memory-limit is %.3g GB", needed / 1e9,
                s.memory_limit);
  require(needed <= s.memory_limit * 1e9, memory);

  const std::string text = s.text.empty() ? default_text().string() : s.text;
  const auto tokens = read_tokens(text, s.tokens + s.decode_tokens);
  std::ofstream json;
  if (!s.json.empty()) {
    json.open(s.json);
    require(json.good(), "cannot write " + s.json);
  }

  const auto n = static_cast<Index>(tokens.size());
  const Index n_decode = std::min(s.decode_tokens, n - 1), n_prefill = n - n_decode;
  if (n < s.tokens + s.decode_tokens)
    std::fprintf(stderr, "The text has only %td bytes: %td are read at once, %td one by one.\n", n, n_prefill,
                 n_decode);
  const Matrix<float> x = qkv::embed(random_table(s.model_dim), std::span<const std::int32_t>(tokens));
  const auto rows = s.storage == "f16"    ? measure_all<qkv::half>(s, x, n_decode)
                    : s.storage == "bf16" ? measure_all<qkv::bfloat16>(s, x, n_decode)
                    : s.storage == "int8" ? measure_all<std::int8_t>(s, x, n_decode)
                                          : measure_all<float>(s, x, n_decode);
  print(s, text, n_prefill, n_decode, rows);
  if (!s.json.empty()) {
    json << report(s, text, n_prefill, n_decode, rows).dump(2) << "\n";
    json.close();
    require(!json.fail(), "cannot write " + s.json);
  }
  for (const Row& row : rows)
    require(s.storage != "f32" || row.difference <= 1e-4 * std::max(1.0, row.largest),
            row.name + ": cached decode differs from recomputation by more than rounding");
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  Settings s;
  CLI::App app(
      "One text through one layer each of MHA, GQA, MQA, MLA that caches keys and values, and MLA that caches "
      "latents:\n"
      "cache per token, speed, and decode with a cache against recomputation without one.");
  const auto size = [&](const char* flag, Index& value, Index least, Index most, const char* help) {
    return app.add_option(flag, value, help)->check(CLI::Range(least, most))->capture_default_str();
  };
  app.add_option("--text", s.text, "A file whose bytes are the tokens; default: the project's README.md");
  size("--tokens", s.tokens, 1, 1 << 20, "Tokens read at once (prefill)");
  size("--decode-tokens", s.decode_tokens, 1, 1 << 20, "Tokens read one by one after them");
  size("--model-dim", s.model_dim, 1, 1 << 16, "Features of a token, of all layers");
  CLI::Option* head_sizes[] = {
      size("--heads", s.heads, 1, 1024, "Query heads of all layers"),
      size("--head-dim", s.head_dim, 2, 4096, "Features of a head, and of MLA's values"),
      size("--latent-dim", s.latent_dim, 1, 1 << 16, "MLA: features of the cached latent"),
      size("--nope-dim", s.nope_dim, 1, 4096, "MLA: features of a head without position"),
      size("--rope-dim", s.rope_dim, 2, 4096, "MLA: features of the rope key"),
  };
  size("--kv-heads", s.kv_heads, 1, 1024, "GQA: key and value heads");
  CLI::Option* preset =
      app.add_flag("--deepseek-v3", s.deepseek_v3,
                   "Head sizes of DeepSeek-V3: 128 heads of 128, latent 512, rope 64; see also --model-dim");
  for (CLI::Option* option : head_sizes) preset->excludes(option);
  app.add_option("--storage", s.storage, "Numbers of the caches")
      ->check(CLI::IsMember({"f32", "f16", "bf16", "int8"}))
      ->capture_default_str();
  app.add_option("--memory-limit", s.memory_limit, "GB that may be used")
      ->check(CLI::Range(0.001, 1e6))
      ->capture_default_str();
  app.add_option("--json", s.json, "Write the table to this file too");
  CLI11_PARSE(app, argc, argv);
  try {
    return run(s);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "compare: %s\n", error.what());
    return 1;
  }
}

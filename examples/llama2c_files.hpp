// llama2c_files.hpp — reads the checkpoints and tokenizers of github.com/karpathy/llama2.c ("version 0").
//
//     checkpoint   int32 model_dim, hidden_dim, layers, heads, kv_heads, ±vocabulary, max_positions; then float arrays
//     tokenizer    int32 longest piece; then of each token: float score, int32 length, bytes
//
// Numbers in a file are compared with what is left of the file before anything of their size is allocated.
//
// Next: story_model.hpp
#pragma once

#include <qkv/matrix.hpp>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <functional>
#include <map>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace story {

using qkv::Index;
using Token = std::int32_t;

inline constexpr Token begin_of_text = 1;

static_assert(std::endian::native == std::endian::little, "the files hold little-endian numbers");

/// A binary file that knows how much of it is left.
class File {
 public:
  explicit File(std::filesystem::path path) : path_(std::move(path)) {
    std::error_code error;
    require(std::filesystem::is_regular_file(path_, error), "is not a file that can be read");
    left_ = std::filesystem::file_size(path_, error);
    stream_.open(path_, std::ios::binary);
    require(!error && stream_.good(), "cannot be opened");
  }

  std::uintmax_t left() const { return left_; }  // bytes

  template <class Number>
  void read(Number* to, std::size_t count) {
    require(count <= left_ / sizeof(Number), "ends too early: it is truncated, or made for something else");
    stream_.read(reinterpret_cast<char*>(to), static_cast<std::streamsize>(count * sizeof(Number)));
    require(!stream_.fail(), "cannot be read");
    left_ -= count * sizeof(Number);
  }

  void require(bool ok, const std::string& why) const {
    if (!ok) throw std::runtime_error(path_.string() + " " + why);
  }

 private:
  std::filesystem::path path_;
  std::ifstream stream_;
  std::uintmax_t left_ = 0;
};

struct ModelConfig {
  Index model_dim = 0, hidden_dim = 0, layers = 0, heads = 0, kv_heads = 0, vocabulary = 0, max_positions = 0;
  bool tied = true;  // logits come from the table of token vectors

  Index head_dim() const { return model_dim / heads; }
};

struct Checkpoint {
  ModelConfig config;
  std::vector<float> weights;  // all arrays in the order of the file, which is that of StoryModel's constructor
};

inline Checkpoint read_checkpoint(const std::filesystem::path& path) {
  File file(path);
  std::int32_t header[7];
  file.read(header, 7);
  const auto [dim, hidden, layers, heads, kv_heads, vocabulary, positions] = header;
  const bool tied = vocabulary > 0;  // a negative size announces a classifier of its own
  Checkpoint checkpoint;
  ModelConfig& c = checkpoint.config;
  c = {dim, hidden, layers, heads, kv_heads, std::abs(Index{vocabulary}), positions, tied};
  file.require(dim > 0 && hidden > 0 && layers > 0 && heads > 0 && kv_heads > 0 && positions > 0 &&
                   c.vocabulary > begin_of_text && dim % heads == 0 && heads % kv_heads == 0 && c.head_dim() % 2 == 0,
               "is not a llama2.c checkpoint: its header must hold positive sizes, a model_dim that heads divide into "
               "even head_dim, and heads that kv_heads divide");

  // In double, which neither wraps around nor misses a difference: files are smaller than 2^53 bytes.
  const double d = dim, kv_dim = static_cast<double>(kv_heads * c.head_dim()), v = static_cast<double>(c.vocabulary);
  const double per_layer = 2 * d + 2 * d * d + 2 * kv_dim * d + 3.0 * hidden * d;
  const double numbers =
      (tied ? v : 2 * v) * d + layers * per_layer + d + positions * static_cast<double>(c.head_dim());
  file.require(numbers * sizeof(float) == static_cast<double>(file.left()),
               "does not have the size that its header asks for: it is truncated, or of another format");
  checkpoint.weights.resize(static_cast<std::size_t>(numbers));
  file.read(checkpoint.weights.data(), checkpoint.weights.size());
  file.require(
      std::all_of(checkpoint.weights.begin(), checkpoint.weights.end(), [](float w) { return std::isfinite(w); }),
      "holds weights that are not finite: it is damaged");
  return checkpoint;
}

/// Byte-pair encoding: neighbours are merged for as long as their concatenation is a piece of the vocabulary, the pair
/// with the best score first (Sennrich et al. 2016, arXiv:1508.07909). Bytes 0 … 255 are tokens 3 … 258.
class Tokenizer {
 public:
  Tokenizer(std::vector<std::string> pieces, std::vector<float> scores)
      : pieces_(std::move(pieces)), scores_(std::move(scores)) {
    for (std::size_t i = 0; i < pieces_.size(); ++i) ids_.emplace(pieces_[i], static_cast<Token>(i));
  }

  std::size_t vocabulary() const { return pieces_.size(); }

  /// Begins with begin_of_text; a text that is not empty gets a space in front, as in the training of the models.
  std::vector<Token> encode(std::string_view text) const {
    std::vector<Token> tokens{begin_of_text};
    if (text.empty()) return tokens;
    const std::string spaced = ' ' + std::string(text);
    for (std::size_t i = 0, next = 1; i < spaced.size(); i = next++) {  // one character of UTF-8 after the other
      while (i > 0 && next < spaced.size() && next < i + 4 && (spaced[next] & 0xC0) == 0x80) ++next;
      if (const auto id = find(spaced.substr(i, next - i)))
        tokens.push_back(*id);
      else
        for (std::size_t b = i; b < next; ++b) tokens.push_back(byte_token(spaced[b]));
    }
    std::vector<std::optional<Token>> merged;  // what tokens i and i+1 would become
    const auto merge = [&](std::size_t i) {
      return i + 1 < tokens.size() ? find(piece(tokens[i]) + piece(tokens[i + 1])) : std::nullopt;
    };
    for (std::size_t i = 0; i < tokens.size(); ++i) merged.push_back(merge(i));
    for (;;) {
      std::size_t best = 0;  // token 0 is begin_of_text
      for (std::size_t i = 1; i < tokens.size(); ++i)
        if (merged[i] && (best == 0 || score(*merged[i]) > score(*merged[best]))) best = i;
      if (best == 0) return tokens;
      tokens[best] = *merged[best];
      tokens.erase(tokens.begin() + static_cast<std::ptrdiff_t>(best) + 1);
      merged.erase(merged.begin() + static_cast<std::ptrdiff_t>(best) + 1);
      merged[best] = merge(best);
      if (best > 1) merged[best - 1] = merge(best - 1);
    }
  }

  /// The text of `token` after `previous`. The space that encode put in front is taken off again; single bytes that
  /// are not printable ASCII are dropped, as llama2.c does.
  std::string decode(Token previous, Token token) const {
    std::string text = piece(token);
    if (previous == begin_of_text && text.starts_with(' ')) text.erase(0, 1);
    const auto is_hex = [](char c) {
      return (c >= '0' && c <= '9') || (c >= 'A' && c <= 'F') || (c >= 'a' && c <= 'f');
    };
    if (text.size() == 6 && text.starts_with("<0x") && is_hex(text[3]) && is_hex(text[4]) && text[5] == '>')
      text = static_cast<char>(std::stoi(text.substr(3, 2), nullptr, 16));
    const auto printable = [](char c) { return (c >= ' ' && c <= '~') || (c >= '\t' && c <= '\r'); };
    return text.size() == 1 && !printable(text[0]) ? "" : text;
  }

 private:
  const std::string& piece(Token token) const { return pieces_.at(static_cast<std::size_t>(token)); }
  float score(Token token) const { return scores_.at(static_cast<std::size_t>(token)); }
  std::optional<Token> find(const std::string& text) const {
    const auto it = ids_.find(text);
    return it == ids_.end() ? std::nullopt : std::optional(it->second);
  }
  Token byte_token(char byte) const {
    const auto token = static_cast<std::size_t>(static_cast<unsigned char>(byte)) + 3;
    if (token >= pieces_.size())
      throw std::runtime_error("the text holds a byte for which the vocabulary has no token");
    return static_cast<Token>(token);
  }

  std::vector<std::string> pieces_;
  std::vector<float> scores_;
  std::map<std::string, Token, std::less<>> ids_;
};

/// As many pieces as the model has tokens, and no more.
inline Tokenizer read_tokenizer(const std::filesystem::path& path, Index vocabulary) {
  File file(path);
  std::int32_t longest = 0;
  file.read(&longest, 1);
  std::vector<std::string> pieces;
  std::vector<float> scores;
  for (Index i = 0; i < vocabulary; ++i) {
    float score = 0;
    std::int32_t length = 0;
    file.read(&score, 1);
    file.read(&length, 1);
    file.require(length >= 0 && length <= longest && static_cast<std::uintmax_t>(length) <= file.left(),
                 "is not a llama2.c tokenizer, or is damaged: the length of piece " + std::to_string(i) + " is wrong");
    std::string piece(static_cast<std::size_t>(length), '\0');
    file.read(piece.data(), piece.size());
    pieces.push_back(std::move(piece));
    scores.push_back(score);
  }
  file.require(file.left() == 0, "holds more pieces than the model has tokens: " + std::to_string(vocabulary));
  return {std::move(pieces), std::move(scores)};
}

}  // namespace story

// 03_causal_mask — who may see whom: a mask is a value with one question, sees(at).
//
//   * a language model must not see the word it has to guess: causal
//   * other masks are other values, composed with & and |; your own is a lambda
//   * what a mask hides is never read: later tokens change no bit of earlier outputs, and whole blocks are skipped
//
// Headers: mask.hpp, data_masks.hpp, attention.hpp.   Before: 02_self_attention   Next: 04_heads

#include <algorithm>
#include <cstdio>
#include <string>
#include <vector>

#include <qkv/attention.hpp>
#include <qkv/data_masks.hpp>
#include <qkv/embedding.hpp>

#include "terminal.hpp"
#include "toy_text.hpp"

using qkv::Index;
using qkv::Matrix;

namespace {

constexpr Index n_tokens = 10;

/// Row = query, column = key, both by position.
template <qkv::Mask M>
std::vector<std::string> picture(const std::string& title, const M& mask) {
  std::vector<std::string> lines{title + std::string(22 - title.size(), ' ')};
  for (Index q = 0; q < n_tokens; ++q) {
    lines.emplace_back();
    for (Index k = 0; k < n_tokens; ++k)
      lines.back() += mask.sees({.query = q, .key = k, .query_position = q, .key_position = k}) ? "██" : "· ";
    lines.back() += "  ";
  }
  return lines;
}

void side_by_side(const std::vector<std::vector<std::string>>& pictures) {
  for (std::size_t line = 0; line < pictures[0].size(); ++line) {
    std::printf("  ");
    for (const auto& p : pictures) std::printf("%s", p[line].c_str());
    std::printf("\n");
  }
  std::printf("\n");
}

/// What a kernel asks about whole blocks before it computes anything. Counts those it skips.
template <qkv::Mask M>
std::vector<std::string> cover_picture(const std::string& title, const M& mask, int& skipped) {
  constexpr Index blocks = 8;
  std::vector<std::string> lines{title + std::string(18 - title.size(), ' ')};
  for (Index q = 0; q < blocks; ++q) {
    lines.emplace_back();
    for (Index k = 0; k < blocks; ++k) {
      const qkv::Cover cover = mask.cover(
          {.n_queries = n_tokens, .query_position = q * n_tokens, .n_keys = n_tokens, .key_position = k * n_tokens});
      skipped += cover == qkv::Cover::none;
      lines.back() += cover == qkv::Cover::all ? "██" : cover == qkv::Cover::some ? "▒▒" : "· ";
    }
    lines.back() += "  ";
  }
  return lines;
}

}  // namespace

int main() {
  terminal::Claims claims;
  const Index ids[n_tokens] = {0, 0, 0, 0, 1, 1, 1, 2, 2, 2};  // three documents in one sequence
  const auto documents = qkv::documents(ids);

  std::printf("Rows are queries, columns are keys; filled: may see\n\n");
  side_by_side({picture("causal", qkv::causal), picture("window(3, 0)", qkv::window(3, 0)),
                picture("window(2, 2)", qkv::window(2, 2)), picture("documents(ids)", documents)});
  side_by_side({picture("causal | prefix(4)", qkv::causal | qkv::prefix(4)),
                picture("causal & documents", qkv::causal & documents),
                picture("sinks and a window", (qkv::prefix(2) | qkv::window(2, 0)) & qkv::causal),
                picture(
                    "causal & a lambda", qkv::causal & [](const qkv::At& at) -> bool {
                      return (at.query_position - at.key_position) % 3 == 0;
                    })});

  // A sentence, and the same with another ending. Here q = k = v = x; projections change nothing of what follows.
  const qkv::Embedding<float> embedding(toy::embedding_table());
  const std::string sentence = "she sat on the river bank", other = "she sat on the river boat";
  const auto words = toy::words(sentence);
  const Matrix<float> x = embedding.forward(toy::token_ids(sentence)), y = embedding.forward(toy::token_ids(other));
  const Index n = x.rows(), before = n - 1;
  std::printf("Weights of \"%s\" under causal: a row sees itself and those before (per cent)\n\n", sentence.c_str());
  const Matrix<float> weights = qkv::attention_weights(x, x, {}, qkv::causal);
  terminal::heat_map(weights, words, words);

  const auto change = [&](const auto& mask) {  // of the outputs before the last, when only the last word changes
    return terminal::difference(qkv::attention(x, x, x, {}, mask).topRows(before),
                                qkv::attention(y, y, y, {}, mask).topRows(before));
  };
  std::printf("\n\"bank\" becomes \"boat\": the five outputs before it change by %.2g (causal), %.2g (full)\n\n",
              change(qkv::causal), change(qkv::full));
  bool future_is_hidden = true;
  for (Index i = 0; i < n; ++i)
    for (Index j = i + 1; j < n; ++j) future_is_hidden = future_is_hidden && weights(i, j) == 0;
  claims(future_is_hidden, "no weight lies above the diagonal");
  claims(change(qkv::causal) == 0, "later tokens never change earlier outputs: not one bit");
  claims(change(qkv::full) > 0, "without a mask they do");

  // Positions belong to the call, and queries are the last tokens: one query over six keys is the sixth. A cache (05)
  // needs nothing more.
  const Matrix<float> all = qkv::attention(x, x, x, {}, qkv::causal);
  const Matrix<float> last = qkv::attention(x.bottomRows(1), x, x, {}, qkv::causal);
  claims(terminal::difference(last, all.bottomRows(1)) < 1e-6, "the last query alone gives the last row");

  // Several texts in one sequence: each gives what it gives alone.
  Matrix<float> packed(x.rows() + y.rows(), x.cols());
  packed << x, y;
  std::vector<Index> text_of(static_cast<std::size_t>(packed.rows()), 0);
  std::fill(text_of.begin() + n, text_of.end(), 1);
  const Matrix<float> together = qkv::attention(packed, packed, packed, {}, qkv::causal & qkv::documents(text_of));
  claims(terminal::difference(together.bottomRows(y.rows()), qkv::attention(y, y, y, {}, qkv::causal)) < 1e-6,
         "two documents packed into one sequence do not see each other");

  std::printf("\n80 tokens in blocks of 10: ██ all see all, ▒▒ some do (asks each pair), · skipped\n\n");
  int causal_skips = 0, window_skips = 0, document_skips = 0;
  std::vector<Index> forty(80, 0);
  std::fill(forty.begin() + 40, forty.end(), 1);
  side_by_side({cover_picture("causal", qkv::causal, causal_skips),
                cover_picture("window(12, 0)", qkv::window(12, 0), window_skips),
                cover_picture("causal & documents", qkv::causal & qkv::documents(forty), document_skips)});
  claims(causal_skips == 28 && window_skips > causal_skips && document_skips > causal_skips,
         "blocks skipped of 64: causal " + std::to_string(causal_skips) + ", window " + std::to_string(window_skips) +
             ", documents " + std::to_string(document_skips));
  return claims.status();
}

// 01_embeddings — text becomes numbers: a word is a row of a table.
//
//   * a tokenizer turns words into ids, and id i is row i of an embedding table: nothing is computed
//   * a word has the same row in every sentence: "bank" by the river is "bank" full of money, so far
//   * the rows do not know their order either; positions are added to tell the first "the" from the second
//
// Headers: embedding.hpp, position.hpp.   Next: 02_self_attention, where the word looks around for what it means.

#include <cstdio>
#include <string>

#include <qkv/embedding.hpp>
#include <qkv/position.hpp>

#include "terminal.hpp"
#include "toy_text.hpp"

using qkv::Index;
using qkv::Matrix;

namespace {

/// 1 for the same direction, 0 for nothing in common.
double cosine(const Matrix<float>& a, const Matrix<float>& b) {
  return static_cast<double>(a.row(0).dot(b.row(0)) / (a.norm() * b.norm()));
}

}  // namespace

int main() {
  terminal::Claims claims;
  const qkv::Embedding<float> embedding(toy::embedding_table());  // [vocabulary, model_dim]

  std::printf("The table: %td words, %td features each (per cent)\n\n", embedding.vocabulary(), embedding.model_dim());
  terminal::heat_map(embedding.table(), toy::vocabulary, toy::features);

  // A sentence is a list of ids; its matrix has one row per token. Tokens are rows, everywhere in this library.
  const std::string sentences[] = {"she sat on the river bank", "she took cash to the bank"};
  Matrix<float> x[2];  // [n, model_dim]
  std::printf("\nTwo sentences\n\n");
  for (int s = 0; s < 2; ++s) {
    const auto ids = toy::token_ids(sentences[s]);
    x[s] = embedding.forward(ids);
    std::printf("  %-28s ids", sentences[s].c_str());
    for (const auto id : ids) std::printf(" %2d", id);
    std::printf("   matrix [%td, %td]\n", x[s].rows(), x[s].cols());
  }

  // The last word of both is "bank". Its vector was looked up, so it cannot depend on the words around it.
  const Matrix<float> bank[] = {x[0].bottomRows(1), x[1].bottomRows(1)};
  const double bank_difference = terminal::difference(bank[0], bank[1]);
  std::printf("\nThe last row of each: one word, one vector\n\n");
  for (int s = 0; s < 2; ++s) {
    std::printf("  %-28s (", sentences[s].c_str());
    for (Index i = 0; i < bank[s].cols(); ++i) std::printf("%s%.1f", i ? ", " : "", static_cast<double>(bank[s](0, i)));
    std::printf(")\n");
  }
  std::printf("\n");
  claims(bank_difference == 0, "\"bank\" has the same embedding in both sentences; largest difference 0");

  // Similar words point in similar directions, and an ambiguous word lies between its meanings.
  const auto vector_of = [&](const char* word) { return embedding.forward(toy::token_ids(word)); };
  const auto similar = [&](const char* a, const char* b) { return cosine(vector_of(a), vector_of(b)); };
  std::printf("\nCosine of two words\n\n");
  const char* const pairs[][2] = {{"river", "boat"}, {"river", "bank"}, {"cash", "bank"}, {"river", "cash"}};
  for (const auto& [a, b] : pairs)
    std::printf("  %5s  %-5s %5.2f %s\n", a, b, similar(a, b), terminal::bar(similar(a, b), 40).c_str());
  std::printf("\n");
  claims(similar("river", "bank") == similar("cash", "bank"), "\"bank\" is as close to \"river\" as to \"cash\"");

  // Textbooks write the lookup as a product with one-hot rows. It is the same, and much more work.
  const auto ids = toy::token_ids(sentences[0]);
  Matrix<float> one_hot = Matrix<float>::Zero(x[0].rows(), embedding.vocabulary());  // [n, vocabulary]
  for (Index i = 0; i < one_hot.rows(); ++i) one_hot(i, ids[static_cast<std::size_t>(i)]) = 1;
  claims(terminal::difference(one_hot * embedding.table(), x[0]) == 0, "a lookup is one_hot * table");

  // Order. "the" stands twice in this one, with equal rows; a sum over rows could not say which came first. (Most of
  // today's models leave the rows alone and turn queries and keys by their positions instead: rope.hpp.)
  const std::string twice = "the bank on the river";
  const Matrix<float> rows = embedding.forward(toy::token_ids(twice));
  const Matrix<float> positions = qkv::sinusoidal_positions<float>(rows.rows(), rows.cols());  // [n, model_dim]
  const Matrix<float> placed = rows + positions;
  std::printf("\nPositions, added: features of \"%s\" before and after\n\n", twice.c_str());
  for (const Index i : {Index{0}, Index{3}}) {
    std::printf("  the at %td ", i);
    for (Index j = 0; j < rows.cols(); ++j) std::printf(" %5.2f", static_cast<double>(rows(i, j)));
    std::printf("   ->  ");
    for (Index j = 0; j < rows.cols(); ++j) std::printf(" %5.2f", static_cast<double>(placed(i, j)));
    std::printf("\n");
  }
  std::printf("\n");
  claims(rows.row(0) == rows.row(3), "without positions both \"the\" are equal");
  claims(terminal::difference(placed.row(0), placed.row(3)) > 0.1, "with positions they differ");
  return claims.status();
}

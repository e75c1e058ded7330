// toy_text.hpp — what the examples read: eleven words whose features have names, and tokens of random features.
//
// Trained models find their features by themselves, thousands of them and without names. These are made by hand, so that
// every number that comes out of attention can be explained.
#pragma once

#include <cstdint>
#include <random>
#include <sstream>
#include <string>
#include <vector>

#include <qkv/matrix.hpp>

namespace toy {

enum Feature : qkv::Index { person, act, glue, water, money, vague, n_features };
inline const std::vector<std::string> features{"person", "act", "glue", "water", "money", "vague"};

inline const std::vector<std::string> vocabulary{"she", "sat",   "took", "on",   "to",  "the",
                                                 "a",   "river", "boat", "cash", "bank"};

/// [vocabulary, n_features]. A bank is by the water or full of money; the word alone is vague.
inline qkv::Matrix<float> embedding_table() {
  qkv::Matrix<float> table(static_cast<qkv::Index>(vocabulary.size()), n_features);
  // clang-format off
  //       person  act   glue  water money vague
  table << 1.0F,  0.0F, 0.0F, 0.0F, 0.0F, 0.0F,  // she
           0.0F,  1.0F, 0.0F, 0.0F, 0.0F, 0.0F,  // sat
           0.0F,  0.9F, 0.0F, 0.0F, 0.0F, 0.0F,  // took
           0.0F,  0.0F, 0.8F, 0.0F, 0.0F, 0.0F,  // on
           0.0F,  0.0F, 0.7F, 0.0F, 0.0F, 0.0F,  // to
           0.0F,  0.0F, 1.0F, 0.0F, 0.0F, 0.0F,  // the
           0.0F,  0.0F, 0.9F, 0.0F, 0.0F, 0.0F,  // a
           0.0F,  0.0F, 0.0F, 1.0F, 0.0F, 0.0F,  // river
           0.0F,  0.3F, 0.0F, 0.9F, 0.0F, 0.0F,  // boat
           0.0F,  0.0F, 0.0F, 0.0F, 1.0F, 0.0F,  // cash
           0.0F,  0.0F, 0.0F, 0.5F, 0.5F, 1.0F;  // bank
  // clang-format on
  return table;
}

inline std::vector<std::string> words(const std::string& sentence) {
  std::istringstream in(sentence);
  std::vector<std::string> out;
  for (std::string word; in >> word;) out.push_back(word);
  return out;
}

/// A tokenizer: the row of each word in the table. -1, which embed() refuses, for a word that is not in it.
inline std::vector<std::int32_t> token_ids(const std::string& sentence) {
  std::vector<std::int32_t> ids;
  for (const std::string& word : words(sentence)) {
    std::int32_t id = -1;
    for (std::size_t i = 0; i < vocabulary.size(); ++i)
      if (vocabulary[i] == word) id = static_cast<std::int32_t>(i);
    ids.push_back(id);
  }
  return ids;
}

/// n tokens of random features in [-1, 1), [n, model_dim], for when only the sizes matter. The same on every machine.
inline qkv::Matrix<float> random_tokens(qkv::Index n, qkv::Index model_dim, std::uint32_t seed = 1) {
  std::mt19937 engine(seed);
  qkv::Matrix<float> x(n, model_dim);
  for (qkv::Index i = 0; i < x.size(); ++i) x.data()[i] = static_cast<float>(engine() >> 8) / 8388608.0F - 1;
  return x;
}

}  // namespace toy

// 02_self_attention — a word asks, the others answer: softmax(q·kᵀ/√d)·v.
//
//   * three projections of the same words: q what I look for, k what I can be found by, v what I tell
//   * "bank" enters with one embedding in both sentences and leaves with two context vectors
//   * without the projections a word finds mostly itself
//
// Headers: projection.hpp, softmax.hpp, attention.hpp.   Before: 01_embeddings   Next: 03_causal_mask

#include <cmath>
#include <cstdio>
#include <string>

#include <qkv/attention.hpp>
#include <qkv/embedding.hpp>
#include <qkv/projection.hpp>

#include "terminal.hpp"
#include "toy_text.hpp"

using qkv::Index;
using qkv::Matrix;
using qkv::Projection;

namespace {

/// Questions: an act asks for the one who acts, a vague word asks for a topic. [model_dim, head_dim]
Projection<float> query_weights() {
  Matrix<float> w = Matrix<float>::Zero(toy::n_features, 2);
  w(toy::act, 0) = 6;    // column 0: "who?"
  w(toy::vague, 1) = 6;  // column 1: "about what?"
  return Projection<float>(w);
}

/// Labels, in the same columns: who can answer which question. A vague word is no good as a topic.
Projection<float> key_weights() {
  Matrix<float> w = Matrix<float>::Zero(toy::n_features, 2);
  w(toy::person, 0) = 1;
  w(toy::water, 1) = w(toy::money, 1) = 1;
  w(toy::vague, 1) = -1;
  return Projection<float>(w);
}

/// Answers. The label says only "I have a topic"; the answer says which. [model_dim, v_head_dim]
Projection<float> value_weights() {
  Matrix<float> w = Matrix<float>::Zero(toy::n_features, 3);
  w(toy::water, 0) = w(toy::money, 1) = w(toy::person, 2) = 1;
  return Projection<float>(w);
}

}  // namespace

int main() {
  terminal::Claims claims;
  const std::string sentences[] = {"she sat on the river bank", "she took cash to the bank"};
  const Index source[] = {4, 2};  // "river", "cash": what the word "bank" should look at

  const qkv::Embedding<float> embedding(toy::embedding_table());
  Matrix<float> embedded[2], context[2];  // of the word "bank": [1, model_dim], [1, v_head_dim]
  for (int s = 0; s < 2; ++s) {
    const auto words = toy::words(sentences[s]);
    const Matrix<float> x = embedding.forward(toy::token_ids(sentences[s]));
    const Index bank = x.rows() - 1;

    const Matrix<float> q = query_weights().forward(x);  // [n, head_dim]
    const Matrix<float> k = key_weights().forward(x);    // [n, head_dim]
    const Matrix<float> v = value_weights().forward(x);  // [n, v_head_dim]
    const Matrix<float> out = qkv::attention(q, k, v);   // [n, v_head_dim]

    // The matrix that attention() never builds: who looks at whom. A word without a question looks at all alike.
    const Matrix<float> weights = qkv::attention_weights(q, k);  // [n, n]
    std::printf("\"%s\": each row looks at the columns (per cent)\n\n", sentences[s].c_str());
    terminal::heat_map(weights, words, words);
    std::printf("\n");
    Index most = 0;
    weights.row(bank).maxCoeff(&most);
    claims(most == source[s], "\"bank\" looks at \"" + words[static_cast<std::size_t>(source[s])] + "\"");

    // The same from the formula, step by step.
    const Matrix<float> scores = q * k.transpose() / std::sqrt(2.0F);  // [n, n], head_dim is 2
    const Matrix<float> by_hand = qkv::softmax(scores) * v;
    claims(terminal::difference(out, by_hand) < 1e-6, "attention(q, k, v) is softmax(q*k^T / sqrt(head_dim)) * v");

    // Why project at all: a word's embedding resembles itself more than anything else.
    const Matrix<float> raw = qkv::attention_weights(x, x);
    raw.row(bank).maxCoeff(&most);
    claims(most == bank, "without projections \"bank\" looks mostly at itself");
    std::printf("\n");

    embedded[s] = x.row(bank);
    context[s] = out.row(bank);
  }

  std::printf("The word \"bank\"\n\n%30s   embedding      context vector\n", "");
  std::printf("%30s  water  money    water  money  person\n", "");
  for (int s = 0; s < 2; ++s)
    std::printf("  %-28s  %5.2f  %5.2f    %5.2f  %5.2f  %6.2f\n", sentences[s].c_str(),
                static_cast<double>(embedded[s](0, toy::water)), static_cast<double>(embedded[s](0, toy::money)),
                static_cast<double>(context[s](0, 0)), static_cast<double>(context[s](0, 1)),
                static_cast<double>(context[s](0, 2)));
  std::printf("\n");
  claims(embedded[0] == embedded[1], "before attention: one vector");
  claims(terminal::difference(context[0], context[1]) > 0.5, "after attention: two context vectors");
  claims(context[0](0, 0) > 0.8F && context[0](0, 1) < 0.2F, "by the river it is about water");
  claims(context[1](0, 1) > 0.8F && context[1](0, 0) < 0.2F, "with cash it is about money");
  return claims.status();
}

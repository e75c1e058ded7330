// 04_heads — many heads: several questions at once, from one matrix.
//
//   * a softmax gives one answer: a word with two questions needs two heads, two column blocks of the same q, k, v
//   * the small matrices of the heads, side by side, *are* one large matrix; both ways give the same numbers
//   * queries may share keys and values: kv_heads = heads is MHA, fewer is GQA, one is MQA
//
// Headers: heads.hpp, multi_head_attention.hpp.   Before: 03_causal_mask   Next: 05_kv_cache

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <string>
#include <vector>

#include <qkv/embedding.hpp>
#include <qkv/multi_head_attention.hpp>

#include "terminal.hpp"
#include "toy_text.hpp"

using qkv::Index;
using qkv::Matrix;

namespace {

using Weights = qkv::MultiHeadAttentionWeights<float>;

/// Weights of one-head layers -> those of one layer with all heads: columns side by side, output rows below each other.
Weights side_by_side(const std::vector<Weights>& heads) {
  const auto n = static_cast<Index>(heads.size());
  const Index model_dim = heads[0].query.in_dim(), head_dim = heads[0].query.out_dim();
  Matrix<float> q(model_dim, n * head_dim), k = q, v = q, o(n * head_dim, model_dim);
  for (Index h = 0; h < n; ++h) {
    const Weights& head = heads[static_cast<std::size_t>(h)];
    qkv::head_columns(q, h, n) = head.query.weight();
    qkv::head_columns(k, h, n) = head.key.weight();
    qkv::head_columns(v, h, n) = head.value.weight();
    o.middleRows(h * head_dim, head_dim) = head.output.weight();
  }
  using qkv::Projection;
  return {Projection<float>(q), Projection<float>(k), Projection<float>(v), Projection<float>(o)};
}

}  // namespace

int main() {
  terminal::Claims claims;

  // An act asks two things now: who? (column 0) and about what? (column 1). The projections are those of 02.
  const std::string sentence = "she sat on the river bank";
  const auto words = toy::words(sentence);
  const Matrix<float> x = qkv::Embedding<float>(toy::embedding_table()).forward(toy::token_ids(sentence));
  Matrix<float> questions = Matrix<float>::Zero(toy::n_features, 2), labels = questions;
  questions(toy::act, 0) = questions(toy::act, 1) = questions(toy::vague, 1) = 6;
  labels(toy::person, 0) = labels(toy::water, 1) = labels(toy::money, 1) = 1;
  labels(toy::vague, 1) = -1;
  const Matrix<float> q = x * questions, k = x * labels;  // [6, 2]: one head of 2 features, or two heads of 1

  const Index sat = 1, she = 0, river = 4;
  const Matrix<float> one = qkv::attention_weights(q, k, {.heads = 1});  // [6, 6]
  const Matrix<float> two = qkv::attention_weights(q, k, {.heads = 2});  // [2*6, 6]: head h in rows h*6 ...
  Matrix<float> rows(3, x.rows());
  rows << one.row(sat), two.row(sat), two.row(x.rows() + sat);
  std::printf("Whom \"sat\" looks at in \"%s\" (per cent)\n\n", sentence.c_str());
  terminal::heat_map(rows, {"one head", "head 0", "head 1"}, words);
  std::printf("\n");
  claims(rows(0, she) < 0.6F && rows(0, river) < 0.6F, "one head blends both answers");
  claims(rows(1, she) > 0.9F && rows(2, river) > 0.9F, "two heads, from the same q and k, answer both questions");

  // Eight layers of one head each, and one layer of eight heads from the same matrices.
  constexpr Index n_heads = 8, model_dim = 48, head_dim = 6, n = 21;
  const Matrix<float> text = toy::random_tokens(n, model_dim);  // [n, model_dim]
  std::vector<Weights> small;
  std::vector<qkv::MultiHeadAttention<float>> layers;
  for (Index h = 0; h < n_heads; ++h) {
    const qkv::MultiHeadAttentionConfig config{.model_dim = model_dim, .heads = 1, .head_dim = head_dim};
    small.push_back(Weights::random(config, static_cast<std::uint32_t>(h + 1)));
    layers.emplace_back(config, small.back());
  }
  const qkv::MultiHeadAttention<float> layer({.model_dim = model_dim, .heads = n_heads}, side_by_side(small));

  Matrix<float> queries(n, n_heads * head_dim), contexts = queries, sum = Matrix<float>::Zero(n, model_dim);
  for (Index h = 0; h < n_heads; ++h) {
    const auto& one_head = layers[static_cast<std::size_t>(h)];
    qkv::head_columns(queries, h, n_heads) = one_head.queries(text);
    qkv::head_columns(contexts, h, n_heads) =
        qkv::attention(one_head.queries(text), one_head.keys(text), one_head.values(text), {}, qkv::causal);
    sum += one_head.forward(text);
  }
  const Matrix<float> all_queries = layer.queries(text), all_keys = layer.keys(text), all_values = layer.values(text);
  const Matrix<float> all_contexts = qkv::attention(all_queries, all_keys, all_values, layer.heads(), qkv::causal);
  const double of_queries = terminal::difference(queries, all_queries),
               of_contexts = terminal::difference(contexts, all_contexts),
               of_outputs = terminal::difference(sum, layer.forward(text));
  std::printf("\n%td matrices [%td, %td] against one [%td, %td]: largest difference\n\n", n_heads, model_dim, head_dim,
              model_dim, n_heads * head_dim);
  std::printf("  queries    x*W_q of each head, side by side            %.1e\n", of_queries);
  std::printf("  contexts   attention of each head, side by side        %.1e\n", of_contexts);
  std::printf("  outputs    sum of the heads' context*W_o               %.1e\n\n", of_outputs);
  claims(of_queries == 0, "the projections are the same bit for bit");
  claims(of_contexts < 1e-6 && of_outputs < 1e-5, "heads are independent layers whose outputs are summed");

  // Fewer key/value heads: head h reads kv head h / (heads / kv_heads). Nothing is copied for it.
  std::printf("\n  heads 0 ... %td read kv head         numbers cached per token\n", n_heads - 1);
  double worst = 0;
  for (const Index kv_heads : {n_heads, Index{2}, Index{1}}) {
    const qkv::Heads heads{.heads = n_heads, .kv_heads = kv_heads};
    const Matrix<float> keys = all_keys.leftCols(kv_heads * head_dim),
                        values = all_values.leftCols(kv_heads * head_dim);
    std::printf("  %-17s", kv_heads == n_heads ? "MHA" : kv_heads > 1 ? "GQA" : "MQA");
    for (Index h = 0; h < n_heads; ++h) std::printf(" %td", heads.kv_head(h));
    std::printf("    %3td %s\n", keys.cols() + values.cols(),
                terminal::bar(static_cast<double>(kv_heads) / static_cast<double>(n_heads), 32).c_str());
    const Matrix<float> repeated = qkv::attention(all_queries, qkv::repeat_kv_heads(keys, heads),
                                                  qkv::repeat_kv_heads(values, heads), {.heads = n_heads}, qkv::causal);
    worst =
        std::max(worst, terminal::difference(qkv::attention(all_queries, keys, values, heads, qkv::causal), repeated));
  }
  std::printf("\n");
  claims(worst < 1e-6, "GQA is MHA with repeated keys and values");
  return claims.status();
}

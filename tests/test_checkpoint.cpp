#include <qkv/checkpoint.hpp>

#include "support/catch.hpp"
#include "support/layers.hpp"

using namespace support;
using qkv::Tensors;

namespace {

/// A tensor that differs from every other one of these tests.
Matrix<float> tensor(Index rows, Index cols) {
  static std::uint64_t seed = 100;
  return numbers<float>(rows, cols, seed++);
}

/// y = x·Wᵀ + b of PyTorch's Linear is the projection.
bool is_linear(const Projection<float>& p, const Matrix<float>& w, const Matrix<float>& b = Matrix<float>(0, 0)) {
  return p.weight() == w.transpose() && (b.size() == 0 ? !p.has_bias() : p.bias() == b);
}

/// What remains when one tensor is left out, or replaced by one of 1 x 2.
template <class Convert>
std::string without(Tensors<float> tensors, const std::string& name, const Convert& convert) {
  REQUIRE(tensors.erase(name) == 1);
  return message_of([&] { convert(tensors); });
}
template <class Convert>
std::string spoiled(Tensors<float> tensors, const std::string& name, const Convert& convert) {
  REQUIRE(tensors.count(name) == 1);
  tensors[name] = tensor(1, 2);
  return message_of([&] { convert(tensors); });
}

constexpr auto torch = [](const Tensors<float>& t) { return qkv::torch_mha_weights(t); };
constexpr auto gpt2 = [](const Tensors<float>& t) { return qkv::gpt2_weights(t); };
constexpr auto llama = [](const Tensors<float>& t) { return qkv::llama_weights(t); };

}  // namespace

TEST_CASE("torch.nn.MultiheadAttention: one in_proj_weight holds queries, keys and values", "[checkpoint]") {
  Tensors<float> t{{"in_proj_weight", tensor(18, 6)}, {"out_proj.weight", tensor(6, 6)}};
  auto w = qkv::torch_mha_weights(t);
  CHECK(is_linear(w.query, t["in_proj_weight"].topRows(6)));
  CHECK(is_linear(w.key, t["in_proj_weight"].middleRows(6, 6)));
  CHECK(is_linear(w.value, t["in_proj_weight"].bottomRows(6)));
  CHECK(is_linear(w.output, t["out_proj.weight"]));

  t["in_proj_bias"] = tensor(1, 18), t["out_proj.bias"] = tensor(1, 6);
  w = qkv::torch_mha_weights(t);
  CHECK(is_linear(w.query, t["in_proj_weight"].topRows(6), t["in_proj_bias"].leftCols(6)));
  CHECK(is_linear(w.key, t["in_proj_weight"].middleRows(6, 6), t["in_proj_bias"].middleCols(6, 6)));
  CHECK(is_linear(w.value, t["in_proj_weight"].bottomRows(6), t["in_proj_bias"].rightCols(6)));
  CHECK(is_linear(w.output, t["out_proj.weight"], t["out_proj.bias"]));
  CHECK(qkv::MultiHeadAttention<float>({.model_dim = 6, .heads = 2, .qkv_bias = true, .out_bias = true}, w)
            .forward(tensor(3, 6))
            .cols() == 6);

  CHECK(qkv::torch_mha_weights({.model_dim = 6, .heads = 2}, t).output.weight() == w.output.weight());
  CHECK(contains(message_of([&] { qkv::torch_mha_weights({.model_dim = 6, .heads = 3, .kv_heads = 1}, t); }),
                 "weight `key` must be [in, out] = [6, 2]"));
  CHECK(contains(without(t, "out_proj.weight", torch), "out_proj"));
  CHECK(contains(without(t, "in_proj_weight", torch), "q_proj_weight"));
  CHECK(contains(spoiled(t, "in_proj_weight", torch), "`in_proj_weight` must be [18, 6]"));
  CHECK(contains(spoiled(t, "in_proj_bias", torch), "`in_proj_bias` must be [1, 18]"));
  CHECK(contains(spoiled(t, "out_proj.weight", torch), "`out_proj.weight` must be [1, 1]"));
  CHECK(contains(spoiled(t, "out_proj.bias", torch), "`out_proj.bias` must be [1, 6]"));
}

TEST_CASE("torch.nn.MultiheadAttention with kdim and vdim has three weights", "[checkpoint]") {
  const Tensors<float> t{{"q_proj_weight", tensor(6, 6)},
                         {"k_proj_weight", tensor(6, 4)},
                         {"v_proj_weight", tensor(6, 9)},
                         {"out_proj.weight", tensor(6, 6)}};
  const auto w = qkv::torch_mha_weights(t);
  CHECK(is_linear(w.query, t.at("q_proj_weight")));
  CHECK(is_linear(w.key, t.at("k_proj_weight")));
  CHECK(is_linear(w.value, t.at("v_proj_weight")));
  CHECK(contains(without(t, "v_proj_weight", torch), "v_proj_weight"));
  CHECK(contains(spoiled(t, "k_proj_weight", torch), "`k_proj_weight` must be [6, -1]"));
}

TEST_CASE("GPT-2's Conv1D holds x W with queries, keys and values side by side", "[checkpoint]") {
  const Tensors<float> t{{"c_attn.weight", tensor(4, 12)},
                         {"c_attn.bias", tensor(1, 12)},
                         {"c_proj.weight", tensor(4, 4)},
                         {"c_proj.bias", tensor(1, 4)}};
  const auto w = qkv::gpt2_weights(t);
  CHECK(w.query.weight() == t.at("c_attn.weight").leftCols(4));
  CHECK(w.key.weight() == t.at("c_attn.weight").middleCols(4, 4));
  CHECK(w.value.weight() == t.at("c_attn.weight").rightCols(4));
  CHECK(w.key.bias() == t.at("c_attn.bias").middleCols(4, 4));
  CHECK(w.output.weight() == t.at("c_proj.weight"));
  CHECK(w.output.bias() == t.at("c_proj.bias"));
  CHECK_FALSE(qkv::gpt2_weights(Tensors<float>{{"c_attn", tensor(4, 12)}, {"c_proj", tensor(4, 4)}}).value.has_bias());
  CHECK(qkv::gpt2_weights({.model_dim = 4, .heads = 2}, t).value.weight() == w.value.weight());
  CHECK(contains(message_of([&] { qkv::gpt2_weights({.model_dim = 6, .heads = 2}, t); }), "weight `query` must be"));
  CHECK(contains(without(t, "c_attn.weight", gpt2), "c_attn"));
  CHECK(contains(without(t, "c_proj.weight", gpt2), "c_proj"));
  CHECK(contains(spoiled(t, "c_attn.weight", gpt2), "`c_attn.weight` must be [1, 3]; given [1, 2]"));
  CHECK(contains(spoiled(t, "c_attn.bias", gpt2), "`c_attn.bias` must be [1, 12]"));
  CHECK(contains(spoiled(t, "c_proj.weight", gpt2), "`c_proj.weight` must be [4, 4]"));
  CHECK(contains(spoiled(t, "c_proj.bias", gpt2), "`c_proj.bias` must be [1, 4]"));
}

TEST_CASE("Llama's weights, by Meta's names and by Hugging Face's", "[checkpoint]") {
  const Matrix<float> q = tensor(12, 7), k = tensor(6, 7), v = tensor(10, 7), o = tensor(7, 20);
  const Tensors<float> meta{{"wq.weight", q}, {"wk.weight", k}, {"wv.weight", v}, {"wo.weight", o}};
  Tensors<float> hugging_face{{"q_proj.weight", q}, {"k_proj.weight", k}, {"v_proj.weight", v}, {"o_proj.weight", o}};
  for (const auto& t : {meta, hugging_face, Tensors<float>{{"wq", q}, {"wk", k}, {"wv", v}, {"wo", o}}}) {
    const auto w = qkv::llama_weights(t);
    CHECK(is_linear(w.query, q));
    CHECK(is_linear(w.key, k));
    CHECK(is_linear(w.value, v));
    CHECK(is_linear(w.output, o));
    CHECK(w.query_norm.size() == 0);
  }
  const Matrix<float> bq = tensor(1, 12), bk = tensor(1, 6), nq = tensor(1, 3), nk = tensor(1, 3);
  hugging_face.insert({{"q_proj.bias", bq}, {"k_proj.bias", bk}, {"q_norm.weight", nq}, {"k_norm.weight", nk}});
  const auto w = qkv::llama_weights(hugging_face);  // Qwen2 has biases, Qwen3 norms
  CHECK(is_linear(w.query, q, bq));
  CHECK(is_linear(w.key, k, bk));
  CHECK(is_linear(w.value, v));
  CHECK(w.query_norm == nq);
  CHECK(w.key_norm == nk);
  CHECK(contains(without(meta, "wk.weight", llama), "wk, k_proj"));
  CHECK(contains(without(hugging_face, "o_proj.weight", llama), "wo, o_proj"));
  CHECK(contains(spoiled(hugging_face, "v_proj.weight", llama), "`v_proj.weight` must be [-1, 7]"));
  CHECK(contains(spoiled(meta, "wo.weight", llama), "`wo.weight` must be [7, -1]"));
  CHECK(contains(spoiled(hugging_face, "q_proj.bias", llama), "`q_proj.bias` must be [1, 12]"));
  // What only the settings know, the layer names.
  CHECK(contains(message_of([&] {
                   qkv::MultiHeadAttention<float>({.model_dim = 7, .heads = 4, .kv_heads = 1, .head_dim = 3},
                                                  qkv::llama_weights(meta));
                 }),
                 "weight `key` must be [in, out] = [7, 3]; given [7, 6]"));
  constexpr MultiHeadAttentionConfig fits{.model_dim = 7, .heads = 4, .kv_heads = 2, .head_dim = 3, .v_head_dim = 5};
  CHECK(is_linear(qkv::llama_weights(fits, meta).value, v));
  constexpr MultiHeadAttentionConfig other{.model_dim = 7, .heads = 4, .kv_heads = 1, .head_dim = 3, .v_head_dim = 5};
  CHECK(contains(message_of([&] { qkv::llama_weights(other, meta); }), "weight `key` must be [in, out] = [7, 3]"));
}

TEST_CASE("DeepSeek's weights, by its own names and by Hugging Face's", "[checkpoint]") {
  LatentAttentionConfig c{
      .model_dim = 11, .heads = 3, .latent_dim = 8, .nope_dim = 5, .rope_dim = 4, .v_head_dim = 2, .rope = interleaved};
  const Matrix<float> q = tensor(27, 11), kv_a = tensor(12, 11), kv_norm = tensor(1, 8), kv_b = tensor(21, 8),
                      o = tensor(11, 6);
  const Tensors<float> own{
      {"wq.weight", q}, {"wkv_a.weight", kv_a}, {"kv_norm.weight", kv_norm}, {"wkv_b.weight", kv_b}, {"wo.weight", o}};
  const Tensors<float> hugging_face{{"q_proj.weight", q},
                                    {"kv_a_proj_with_mqa.weight", kv_a},
                                    {"kv_a_layernorm.weight", kv_norm},
                                    {"kv_b_proj.weight", kv_b},
                                    {"o_proj.weight", o}};
  const auto convert = [&](const Tensors<float>& t) { return qkv::deepseek_weights(c, t); };
  for (const auto& t : {own, hugging_face}) {
    const auto w = convert(t);
    CHECK(is_linear(w.query, q));
    CHECK(is_linear(w.latent_down, kv_a));
    CHECK(w.latent_norm == kv_norm);
    CHECK(is_linear(w.output, o));
    CHECK(w.query_down.out_dim() == 0);
    for (Index h = 0; h < 3; ++h) {  // rows of a head in wkv_b: its keys, then its values
      CHECK(w.key_up.weight().middleCols(h * 5, 5) == kv_b.middleRows(h * 7, 5).transpose());
      CHECK(w.value_up.weight().middleCols(h * 2, 2) == kv_b.middleRows(h * 7 + 5, 2).transpose());
    }
    CHECK(LatentAttention<float>(c, w).forward(tensor(3, 11)).cols() == 11);
  }
  CHECK(contains(without(own, "wkv_b.weight", convert), "wkv_b, kv_b_proj"));
  CHECK(contains(without(hugging_face, "q_proj.weight", convert), "wq, q_proj"));
  for (const auto& t : {own, hugging_face})
    for (const auto& [name, matrix] : t) CHECK(contains(spoiled(t, name, convert), "`" + name + "` must be"));

  c.q_latent_dim = 9;
  const Matrix<float> q_a = tensor(9, 11), q_norm = tensor(1, 9), q_b = tensor(27, 9);
  CHECK(contains(message_of([&] { convert(own); }), "wq_a, q_a_proj"));
  Tensors<float> own_q = own, hugging_face_q = hugging_face;
  own_q.insert({{"wq_a.weight", q_a}, {"q_norm.weight", q_norm}, {"wq_b.weight", q_b}});
  hugging_face_q.insert({{"q_a_proj.weight", q_a}, {"q_a_layernorm.weight", q_norm}, {"q_b_proj.weight", q_b}});
  for (const auto& t : {own_q, hugging_face_q}) {
    const auto w = convert(t);
    CHECK(is_linear(w.query_down, q_a));
    CHECK(w.query_norm == q_norm);
    CHECK(is_linear(w.query_up, q_b));
    CHECK(LatentAttention<float>(c, w).forward(tensor(3, 11)).cols() == 11);
  }
  CHECK(contains(spoiled(own_q, "wq_b.weight", convert), "`wq_b.weight` must be [27, 9]"));
  CHECK(contains(spoiled(hugging_face_q, "q_a_layernorm.weight", convert), "`q_a_layernorm.weight` must be [1, 9]"));
}

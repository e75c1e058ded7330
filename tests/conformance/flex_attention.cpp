// flex_attention.cpp — FlexAttention: attention with the caller's own functions of scores and probabilities.
//
//     score_mod   bias: + value   soft_cap: value·tanh(s/value)   causal_mask   relative_positional: + query - key
//     prob_mod    scale: · value, which a linear map of the output
#include <qkv/attention.hpp>

#include "layout.hpp"
#include "operators.hpp"

namespace conformance {

template <class T>
Results flex_attention(const Case& c) {
  const Tensor &q = c.in("Q"), &k = c.in("K"), &v = c.in("V");
  expect(q.rank() == 4 && k.rank() == 4 && v.rank() == 4 && k.dim(0) == q.dim(0) && v.dim(0) == q.dim(0) &&
             k.dim(1) == v.dim(1),
         "Q, K and V must be [batch, heads, tokens, head_dim]; given ", shape_text(q.shape), ", ", shape_text(k.shape),
         ", ", shape_text(v.shape));
  const qkv::Heads heads{.heads = q.dim(1), .kv_heads = k.dim(1)};
  const std::string score_mod = c.word("score_mod", "none"), prob_mod = c.word("prob_mod", "none");
  const bool has_value = score_mod == "bias" || score_mod == "soft_cap";
  const double value = has_value ? c.number("score_mod_value") : 0;
  expect(prob_mod == "none" || prob_mod == "scale", "unknown prob_mod ", prob_mod);
  const T factor = prob_mod == "scale" ? static_cast<T>(c.number("prob_mod_value")) : T(1);

  qkv::Options<T> options;
  options.scale = static_cast<double>(static_cast<float>(c.number("scale", 0)));  // an ONNX attribute is a float
  options.first_position = 0;
  options.kernel = c.kernel;
  Tensor y = tensor_of({q.dim(0), q.dim(1), q.dim(2), v.dim(3)});
  for (Index b = 0; b < q.dim(0); ++b) {
    const Matrix<T> queries = heads_first<T>(q, b), keys = heads_first<T>(k, b), values = heads_first<T>(v, b);
    const auto attend = [&](const auto& mask, const auto& score) {
      set_heads_first<T>(y, b, factor * qkv::attention(queries, keys, values, heads, mask, score, options));
    };
    if (score_mod == "none")
      attend(qkv::full, qkv::plain);
    else if (score_mod == "bias")
      attend(qkv::full, [=](T s, const qkv::At&) { return s + static_cast<T>(value); });
    else if (score_mod == "soft_cap")
      attend(qkv::full, qkv::soft_cap(value));
    else if (score_mod == "relative_positional")
      attend(qkv::full, [](T s, const qkv::At& at) { return s + static_cast<T>(at.query_position - at.key_position); });
    else if (score_mod == "causal_mask")
      attend(qkv::causal, qkv::plain);
    else
      expect(false, "unknown score_mod ", score_mod);
  }
  return {{"Y", std::move(y)}};
}

template Results flex_attention<float>(const Case&);
template Results flex_attention<double>(const Case&);

}  // namespace conformance

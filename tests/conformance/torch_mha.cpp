// torch_mha.cpp — TorchMHA: torch.nn.MultiheadAttention, batch first, self- or cross-attention.
//
//     attn_mask           [L, S] or [batch·heads, L, S]; bool: true = *not* allowed; numbers are added to the scores
//     key_padding_mask    [batch, S], likewise
//     bias_k, bias_v      a learned key and value behind the projected ones        add_zero_attn   a row of zeros behind
//
// y [batch, L, E] and attn_weights [batch, heads, L, S + 1 for each row behind].
#include <qkv/multi_head_attention.hpp>

#include "layers.hpp"
#include "operators.hpp"

namespace conformance {
namespace {

/// Both masks of sequence b put together as [heads·L, S + n_behind]: what may be seen and what is added.
template <class T>
struct Masks {
  Matrix<bool> allowed;
  Matrix<T> added;
  bool has_allowed = false, has_added = false;

  Masks(const Case& c, Index b, Index heads, Index n_queries, Index n_keys, Index n_behind)
      : allowed(Matrix<bool>::Constant(heads * n_queries, n_keys + n_behind, true)),
        added(Matrix<T>::Zero(heads * n_queries, n_keys + n_behind)) {
    if (const Tensor* mask = c.find_in("attn_mask")) {
      const Index batch = c.in("query").dim(0);
      const bool per_head = mask->rank() == 3;
      expect(mask->shape == (per_head ? std::vector{batch * heads, n_queries, n_keys} : std::vector{n_queries, n_keys}),
             "attn_mask must be [L, S] or [batch*heads, L, S]; given ", shape_text(mask->shape));
      include(*mask, n_keys, [&](Index row, Index j) {
        return per_head ? (b * heads * n_queries + row) * n_keys + j : row % n_queries * n_keys + j;
      });
    }
    if (const Tensor* mask = c.find_in("key_padding_mask")) {
      expect(mask->shape == std::vector{c.in("query").dim(0), n_keys}, "key_padding_mask must be [batch, S]; given ",
             shape_text(mask->shape));
      include(*mask, n_keys, [&](Index, Index j) { return b * n_keys + j; });
    }
  }

 private:
  template <class Where>
  void include(const Tensor& mask, Index n_keys, const Where& where) {
    (mask.is_bool() ? has_allowed : has_added) = true;
    for (Index row = 0; row < allowed.rows(); ++row)
      for (Index j = 0; j < n_keys; ++j) {
        const double value = mask[where(row, j)];
        if (!mask.is_bool())
          added(row, j) += static_cast<T>(value);
        else if (value != 0)
          allowed(row, j) = false;
      }
  }
};

/// The rows that torch puts behind the projected keys (or values), [n, E].
template <class T>
Matrix<T> rows_behind(const Case& c, const std::string& bias) {
  const Index e = c.integer("embed_dim");
  const Tensor* learned = c.find_in(bias);
  const bool zero = c.integer("add_zero_attn", 0) != 0;
  expect(!learned || learned->size() == e, bias, " must have embed_dim elements");
  Matrix<T> rows = Matrix<T>::Zero((learned ? 1 : 0) + (zero ? 1 : 0), e);
  if (learned) rows.row(0) = row_vector<T>(*learned);
  return rows;
}

}  // namespace

template <class T>
Results torch_mha(const Case& c) {
  const Tensor &query = c.in("query"), &key = c.in("key"), &value = c.in("value");
  expect(c.integer("batch_first", 1) != 0, "batch_first must be 1");
  expect(query.rank() == 3 && key.rank() == 3 && value.rank() == 3 && key.dim(0) == query.dim(0) &&
             value.dim(0) == query.dim(0) && key.dim(1) == value.dim(1),
         "query, key and value must be [batch, tokens, features]; given ", shape_text(query.shape), ", ",
         shape_text(key.shape), ", ", shape_text(value.shape));
  const qkv::MultiHeadAttentionConfig config{.model_dim = c.integer("embed_dim"),
                                             .heads = c.integer("num_heads"),
                                             .qkv_bias = c.find_in("in_proj_bias") != nullptr,
                                             .out_bias = c.find_in("out_proj.bias") != nullptr,
                                             .key_dim = key.dim(2),
                                             .value_dim = value.dim(2)};
  const qkv::MultiHeadAttention<T> layer(config, qkv::torch_mha_weights(weights_of<T>(c)));
  const Matrix<T> keys_behind = rows_behind<T>(c, "bias_k"), values_behind = rows_behind<T>(c, "bias_v");
  expect(keys_behind.rows() == values_behind.rows(), "bias_k and bias_v must both be there or not");

  const Index batch = query.dim(0), n_queries = query.dim(1), n_keys = key.dim(1), n_behind = keys_behind.rows();
  qkv::Options<T> options;
  options.first_position = 0;
  options.kernel = c.kernel;
  qkv::LayerOptions layer_options;
  layer_options.kernel = c.kernel;
  Tensor y = tensor_of({batch, n_queries, config.model_dim}),
         weights = tensor_of({batch, config.heads * n_queries, n_keys + n_behind});
  for (Index b = 0; b < batch; ++b) {
    const Matrix<T> q = sequence<T>(query, b), k = sequence<T>(key, b), v = sequence<T>(value, b);
    const auto run = [&](const auto& mask, const auto& score) {
      Matrix<T> keys(n_keys + n_behind, config.model_dim), values = keys;
      keys << layer.keys(k), keys_behind;
      values << layer.values(v), values_behind;
      const Matrix<T> queries = layer.queries(q);
      set_sequence<T>(
          weights, b,
          qkv::attention_weights(queries, keys, layer.heads(), mask, score, qkv::Stage::probabilities, options));
      if (n_behind == 0)
        set_sequence<T>(y, b, layer.forward(q, k, v, mask, score, layer_options));
      else
        set_sequence<T>(y, b, layer.output(qkv::attention(queries, keys, values, layer.heads(), mask, score, options)));
    };
    const Masks<T> masks(c, b, config.heads, n_queries, n_keys, n_behind);
    const auto with_score = [&](const auto& score) {
      if (masks.has_allowed)
        run(qkv::boolean_per_head(masks.allowed, config.heads), score);
      else
        run(qkv::full, score);
    };
    if (masks.has_added)
      with_score(qkv::bias_per_head(masks.added, config.heads));
    else
      with_score(qkv::plain);
  }
  weights.shape = {batch, config.heads, n_queries, n_keys + n_behind};
  return {{"y", std::move(y)}, {"attn_weights", std::move(weights)}};
}

template Results torch_mha<float>(const Case&);
template Results torch_mha<double>(const Case&);

}  // namespace conformance

// checkpoint.hpp — attention weights from the tensors of other programs, by their names.
//
//     Tensors<float> tensors = …;                       // from a file, by a reader of your choice
//     MultiHeadAttention layer(config, llama_weights(config, tensors));
//
//     torch_mha_weights    torch.nn.MultiheadAttention   in_proj_weight, in_proj_bias, out_proj.weight …
//     gpt2_weights         GPT-2's Conv1D                c_attn.weight [dim, 3·dim], c_proj.weight …
//     llama_weights        Llama, Mistral, Qwen3         wq wk wv wo, or q_proj.weight …; q_norm, k_norm
//     deepseek_weights     DeepSeek-V2, V3               wq | wq_a q_norm wq_b, wkv_a kv_norm wkv_b wo, or q_a_proj …
//
// Arguments are (config, tensors); a tensor that does not fit the config is an error that names it. Where tensors
// determine all sizes, the config may be omitted.
//
// PyTorch stores Wᵀ [out, in], Conv1D W [in, out]; both become W of x·W. A vector is a matrix [1, n]. A missing tensor
// or one of the wrong shape throws std::invalid_argument that names it.
//
// Before: explain_layer.hpp   Next: compress.hpp
#pragma once

#include <functional>
#include <initializer_list>
#include <map>
#include <string>
#include <string_view>

#include "latent_attention.hpp"
#include "multi_head_attention.hpp"

namespace qkv { inline namespace QKV_ABI {

/// A state dictionary: name -> matrix; vectors as [1, n].
template <class T>
using Tensors = std::map<std::string, Matrix<T>, std::less<>>;

namespace detail {

/// The name and tensor of the first of these names that exists, or null. A name may be followed by ".weight".
template <class T>
const typename Tensors<T>::value_type* find_tensor(const Tensors<T>& tensors,
                                                   std::initializer_list<std::string_view> names) {
  for (const std::string_view name : names)
    for (const char* suffix : {"", ".weight"})
      if (const auto it = tensors.find(std::string(name) + suffix); it != tensors.end()) return &*it;
  return nullptr;
}

/// The tensor, which must be [rows, cols] (-1: any number).
template <class T>
const Matrix<T>& get_tensor(const Tensors<T>& tensors, std::initializer_list<std::string_view> names, Index rows = -1,
                            Index cols = -1) {
  const auto* found = find_tensor(tensors, names);
  if (!found) {
    std::string tried;
    for (const std::string_view name : names) tried.append(tried.empty() ? "" : ", ").append(name);
    raise<std::invalid_argument>("the tensor is missing; tried " + tried + " (each with and without .weight)");
  }
  const auto& [name, m] = *found;
  require((rows < 0 || m.rows() == rows) && (cols < 0 || m.cols() == cols), "tensor `", name, "` must be ",
          Shape{rows, cols}, rows < 0 || cols < 0 ? " (-1: any)" : "", "; given ", Shape{m.rows(), m.cols()});
  return m;
}

template <class T>
RowVector<T> get_vector(const Tensors<T>& tensors, std::initializer_list<std::string_view> names, Index size) {
  return get_tensor(tensors, names, 1, size).row(0);
}

template <class T>
RowVector<T> find_vector(const Tensors<T>& tensors, std::initializer_list<std::string_view> names, Index size) {
  return find_tensor(tensors, names) ? get_vector(tensors, names, size) : RowVector<T>();
}

/// Elements [first, first + n) of a vector that may be absent.
template <class T>
RowVector<T> part(const RowVector<T>& v, Index first, Index n) {
  return v.size() == 0 ? RowVector<T>() : RowVector<T>(v.segment(first, n));
}

/// Throws std::invalid_argument naming the first weight that does not fit.
template <class T>
MultiHeadAttentionWeights<T> fitting(const MultiHeadAttentionConfig& config, MultiHeadAttentionWeights<T> weights) {
  check(config, weights);
  return weights;
}

}  // namespace detail

/// torch.nn.MultiheadAttention: in_proj_weight [3·E, E], or q_proj_weight [E, E], k_proj_weight [E, kdim], v_proj_weight
/// [E, vdim]; in_proj_bias [3·E] and out_proj.bias [E] may be absent; out_proj.weight [E, E]. bias_k and bias_v are not
/// weights of a projection: append them to the projected keys and values.
template <class T>
MultiHeadAttentionWeights<T> torch_mha_weights(const Tensors<T>& tensors) {
  const Index e = detail::get_tensor(tensors, {"out_proj"}).rows();
  const Matrix<T>& out = detail::get_tensor(tensors, {"out_proj"}, e, e);
  const RowVector<T> bias = detail::find_vector(tensors, {"in_proj_bias"}, 3 * e);
  const auto projection = [&](Index i, std::string_view name) {
    const Matrix<T> own =
        detail::find_tensor(tensors, {"in_proj_weight"})
            ? Matrix<T>(detail::get_tensor(tensors, {"in_proj_weight"}, 3 * e, e).middleRows(i * e, e))
            : detail::get_tensor(tensors, {name}, e, -1);
    return Projection<T>::from_out_in(own, detail::part(bias, i * e, e));
  };
  return {projection(0, "q_proj_weight"), projection(1, "k_proj_weight"), projection(2, "v_proj_weight"),
          Projection<T>::from_out_in(out, detail::find_vector(tensors, {"out_proj.bias"}, e))};
}
template <class T>
MultiHeadAttentionWeights<T> torch_mha_weights(const MultiHeadAttentionConfig& config, const Tensors<T>& tensors) {
  return detail::fitting(config, torch_mha_weights(tensors));
}

/// GPT-2: c_attn.weight [dim, 3·dim] = [q | k | v], c_proj.weight [dim, dim]; biases may be absent.
template <class T>
MultiHeadAttentionWeights<T> gpt2_weights(const Tensors<T>& tensors) {
  const Matrix<T>& fused = detail::get_tensor(tensors, {"c_attn"});
  const Index dim = fused.rows();
  detail::get_tensor(tensors, {"c_attn"}, dim, 3 * dim);
  const RowVector<T> bias = detail::find_vector(tensors, {"c_attn.bias"}, 3 * dim);
  const auto projection = [&](Index i) {
    return Projection<T>(fused.middleCols(i * dim, dim), detail::part(bias, i * dim, dim));
  };
  return {projection(0), projection(1), projection(2),
          Projection<T>(detail::get_tensor(tensors, {"c_proj"}, dim, dim),
                        detail::find_vector(tensors, {"c_proj.bias"}, dim))};
}
template <class T>
MultiHeadAttentionWeights<T> gpt2_weights(const MultiHeadAttentionConfig& config, const Tensors<T>& tensors) {
  return detail::fitting(config, gpt2_weights(tensors));
}

/// Llama and its relatives: wq, wk, wv, wo (or q_proj, k_proj, v_proj, o_proj), all [out, in], biases and per-head norms
/// where the model has them. Meta's files pair RoPE's features interleaved, Hugging Face's half_split: the config says.
template <class T>
MultiHeadAttentionWeights<T> llama_weights(const Tensors<T>& tensors) {
  const Index model_dim = detail::get_tensor(tensors, {"wq", "q_proj"}).cols();
  const auto projection = [&](std::string_view a, std::string_view b, Index rows = -1, Index cols = -1) {
    const Matrix<T>& w = detail::get_tensor(tensors, {a, b}, rows, cols);
    return Projection<T>::from_out_in(
        w, detail::find_vector(tensors, {std::string(a) + ".bias", std::string(b) + ".bias"}, w.rows()));
  };
  MultiHeadAttentionWeights<T> w{projection("wq", "q_proj"), projection("wk", "k_proj", -1, model_dim),
                                 projection("wv", "v_proj", -1, model_dim), projection("wo", "o_proj", model_dim)};
  w.query_norm = detail::find_vector(tensors, {"q_norm"}, -1);
  w.key_norm = detail::find_vector(tensors, {"k_norm"}, -1);
  return w;
}
template <class T>
MultiHeadAttentionWeights<T> llama_weights(const MultiHeadAttentionConfig& config, const Tensors<T>& tensors) {
  return detail::fitting(config, llama_weights(tensors));
}

/// DeepSeek-V2 and V3: wq, or wq_a, q_norm, wq_b; wkv_a, kv_norm, wkv_b, wo; or Hugging Face's q_proj, q_a_proj,
/// q_a_layernorm, q_b_proj, kv_a_proj_with_mqa, kv_a_layernorm, kv_b_proj, o_proj. All [out, in].
template <class T>
LatentAttentionWeights<T> deepseek_weights(const LatentAttentionConfig& c, const Tensors<T>& tensors) {
  check(c);
  using detail::get_tensor, detail::get_vector;
  const auto from = [](const auto& w) { return Projection<T>::from_out_in(w); };
  const Index q_dim = c.heads * (c.nope_dim + c.rope_dim), kv_dim = c.nope_dim + c.v_head_dim;
  LatentAttentionWeights<T> w;
  if (c.q_latent_dim == 0) {
    w.query = from(get_tensor(tensors, {"wq", "q_proj"}, q_dim, c.model_dim));
  } else {
    w.query_down = from(get_tensor(tensors, {"wq_a", "q_a_proj"}, c.q_latent_dim, c.model_dim));
    w.query_norm = get_vector(tensors, {"q_norm", "q_a_layernorm"}, c.q_latent_dim);
    w.query_up = from(get_tensor(tensors, {"wq_b", "q_b_proj"}, q_dim, c.q_latent_dim));
  }
  w.latent_down = from(get_tensor(tensors, {"wkv_a", "kv_a_proj_with_mqa"}, c.latent_dim + c.rope_dim, c.model_dim));
  if (c.latent_norm) w.latent_norm = get_vector(tensors, {"kv_norm", "kv_a_layernorm"}, c.latent_dim);
  const Matrix<T>& up = get_tensor(tensors, {"wkv_b", "kv_b_proj"}, c.heads * kv_dim, c.latent_dim);
  Matrix<T> key_up(c.heads * c.nope_dim, c.latent_dim), value_up(c.heads * c.v_head_dim, c.latent_dim);
  for (Index h = 0; h < c.heads; ++h) {
    key_up.middleRows(h * c.nope_dim, c.nope_dim) = up.middleRows(h * kv_dim, c.nope_dim);
    value_up.middleRows(h * c.v_head_dim, c.v_head_dim) = up.middleRows(h * kv_dim + c.nope_dim, c.v_head_dim);
  }
  w.key_up = from(key_up);
  w.value_up = from(value_up);
  w.output = from(get_tensor(tensors, {"wo", "o_proj"}, c.model_dim, c.heads * c.v_head_dim));
  return w;
}

}}  // namespace qkv::QKV_ABI

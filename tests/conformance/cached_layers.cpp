// cached_layers.cpp — GPT2Attention and LlamaAttention: causal layers fed in steps, a KvCache for each sequence.
//
//     k_cache, v_cache [batch, kv_heads, tokens, head_dim] after the last step; keys are cached rotated
#include <qkv/multi_head_attention.hpp>

#include "layers.hpp"
#include "operators.hpp"

namespace conformance {
namespace {

template <class T>
Results run_steps(const Case& c, const qkv::MultiHeadAttention<T>& layer) {
  const auto& config = layer.config();
  const Index batch = c.integer("batch");
  const std::vector<Step> steps = steps_of(c, batch, config.model_dim);
  std::vector<qkv::KvCache<T>> caches;
  for (Index b = 0; b < batch; ++b) caches.push_back(layer.template make_cache<T>(positions_of(steps)));
  qkv::LayerOptions options;
  options.kernel = c.kernel;

  Results results;
  for (const Step& step : steps)
    results.emplace(step.name + ".y", forward_step<T>(layer, caches, step, qkv::causal, qkv::plain, options));
  Tensor k = tensor_of({batch, config.kv_heads, caches[0].rows(), config.head_dim}), v = k;
  for (Index b = 0; b < batch; ++b) {
    set_heads_first<T>(k, b, caches[static_cast<std::size_t>(b)].keys());
    set_heads_first<T>(v, b, caches[static_cast<std::size_t>(b)].values());
  }
  results.emplace("k_cache", std::move(k));
  results.emplace("v_cache", std::move(v));
  if (config.rope) add_tables<T>(results, *config.rope, config.head_dim, positions_of(steps));
  return results;
}

qkv::RopeConfig rope_of(const Case& c) {
  const std::string &pairs = c.word("rope"), scaling = c.word("rope_scaling", "none");
  expect(pairs == "interleaved" || pairs == "half", "rope must be interleaved or half; given ", pairs);
  expect(scaling == "none" || scaling == "llama3", "rope_scaling must be llama3 or absent; given ", scaling);
  qkv::RopeConfig rope{.pairing = pairs == "half" ? qkv::Pairing::half_split : qkv::Pairing::interleaved,
                       .theta = c.number("rope_theta")};
  if (scaling == "llama3")
    rope.scaling = qkv::llama3_scaling({.factor = c.number("rope_scaling_factor"),
                                        .low_freq_factor = c.number("rope_scaling_low_freq_factor"),
                                        .high_freq_factor = c.number("rope_scaling_high_freq_factor"),
                                        .original_context = c.number("rope_scaling_original_context_length")});
  return rope;
}

}  // namespace

template <class T>
Results gpt2_attention(const Case& c) {
  const qkv::MultiHeadAttentionConfig config{.model_dim = c.integer("dim"),
                                             .heads = c.integer("n_heads"),
                                             .qkv_bias = c.find_in("c_attn.bias") != nullptr,
                                             .out_bias = c.find_in("c_proj.bias") != nullptr};
  return run_steps(c, qkv::MultiHeadAttention<T>(config, qkv::gpt2_weights(weights_of<T>(c))));
}

template <class T>
Results llama_attention(const Case& c) {
  qkv::MultiHeadAttentionConfig config{.model_dim = c.integer("dim"),
                                       .heads = c.integer("n_heads"),
                                       .kv_heads = c.integer("n_kv_heads"),
                                       .head_dim = c.integer("head_dim"),
                                       .qk_norm = c.integer("qk_norm", 0) != 0,
                                       .rope = rope_of(c)};
  if (config.qk_norm) config.norm_eps = c.number("qk_norm_eps");
  return run_steps(c, qkv::MultiHeadAttention<T>(config, qkv::llama_weights(weights_of<T>(c))));
}

template Results gpt2_attention<float>(const Case&);
template Results gpt2_attention<double>(const Case&);
template Results llama_attention<float>(const Case&);
template Results llama_attention<double>(const Case&);

}  // namespace conformance

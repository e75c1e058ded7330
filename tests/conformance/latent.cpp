// latent.cpp — DeepSeekMLA: DeepSeek-V3's layer in both forms, in steps that fill a latent cache.
//
//     kv_cache [batch, tokens, latent_dim], pe_cache [batch, tokens, rope_dim]        what the latent cache holds
//     k_cache [batch, tokens, heads, nope_dim + rope_dim], v_cache [batch, tokens, heads, v_head_dim]   restored from it
#include <qkv/latent_attention.hpp>

#include "layers.hpp"
#include "operators.hpp"

namespace conformance {
namespace {

qkv::RopeConfig rope_of(const Case& c) {
  qkv::RopeConfig rope{.pairing = qkv::Pairing::interleaved, .theta = c.number("rope_theta")};
  if (c.integer("yarn") != 0)
    rope.scaling = qkv::yarn_scaling({.factor = c.number("rope_factor"),
                                      .original_context = c.number("original_seq_len"),
                                      .beta_fast = c.number("beta_fast"),
                                      .beta_slow = c.number("beta_slow"),
                                      .mscale = c.number("mscale")});
  return rope;
}

/// The caches of all sequences as one tensor [batch, tokens, …]: of(cache) gives [tokens, features].
template <class T, class Cache, class Of>
Tensor gather(const std::vector<Cache>& caches, std::vector<Index> features, const Of& of) {
  std::vector<Index> shape{static_cast<Index>(caches.size()), caches[0].rows()};
  shape.insert(shape.end(), features.begin(), features.end());
  Tensor tensor = tensor_of(shape);
  for (std::size_t b = 0; b < caches.size(); ++b) set_sequence<T>(tensor, static_cast<Index>(b), of(caches[b]));
  return tensor;
}

/// Every head's keys as a naive cache would hold them: [restored | rope key].
template <class T>
Matrix<T> whole_keys(const qkv::LatentAttention<T>& layer, const qkv::LatentCache<T>& cache) {
  const auto& config = layer.config();
  const Matrix<T> restored = layer.restored_keys(cache.latent()), rope = cache.rope_keys();
  Matrix<T> keys(cache.rows(), config.heads * config.head_dim());
  for (Index h = 0; h < config.heads; ++h) {
    auto head = qkv::head_columns(keys, h, config.heads);
    head.leftCols(config.nope_dim) = qkv::head_columns(restored, h, config.heads);
    head.rightCols(config.rope_dim) = rope;
  }
  return keys;
}

}  // namespace

template <class T>
Results deepseek_mla(const Case& c) {
  const qkv::LatentAttentionConfig config{.model_dim = c.integer("dim"),
                                          .heads = c.integer("n_heads"),
                                          .q_latent_dim = c.integer("q_lora_rank"),
                                          .latent_dim = c.integer("kv_lora_rank"),
                                          .nope_dim = c.integer("qk_nope_head_dim"),
                                          .rope_dim = c.integer("qk_rope_head_dim"),
                                          .v_head_dim = c.integer("v_head_dim"),
                                          .norm_eps = c.number("norm_eps"),
                                          .rope = rope_of(c)};
  const qkv::LatentAttention<T> layer(config, qkv::deepseek_weights(config, weights_of<T>(c)));
  const double scale = c.number("softmax_scale", layer.scale());
  expect(std::abs(scale - layer.scale()) <= 1e-9, "the softmax scale is ", layer.scale(), ", expected ", scale);
  const Index batch = c.integer("batch");
  const std::vector<Step> steps = steps_of(c, batch, config.model_dim);

  Results results;
  add_tables<T>(results, config.rope, config.rope_dim, positions_of(steps));
  for (const qkv::LatentForm form : {qkv::LatentForm::naive, qkv::LatentForm::absorbed}) {
    std::vector<qkv::LatentCache<T>> caches;
    for (Index b = 0; b < batch; ++b) caches.push_back(layer.template make_cache<T>(positions_of(steps)));
    qkv::LayerOptions options;
    options.form = form;
    options.kernel = c.kernel;
    for (const Step& step : steps) {
      Tensor y = forward_step<T>(layer, caches, step, qkv::causal, qkv::plain, options);
      results.emplace(step.name + (form == qkv::LatentForm::naive ? ".y_naive" : ".y_absorb"), y);
      results.emplace(step.name + ".y", std::move(y));
      const auto add = [&](const std::string& cache, std::vector<Index> features, const auto& of) {
        if (const std::string name = step.name + cache; c.asks(name))
          results.emplace(name, gather<T>(caches, std::move(features), of));
      };
      add(".kv_cache", {config.latent_dim}, [](const auto& cache) { return cache.latent(); });
      add(".pe_cache", {config.rope_dim}, [](const auto& cache) { return cache.rope_keys(); });
      add(".k_cache", {config.heads, config.head_dim()}, [&](const auto& cache) { return whole_keys(layer, cache); });
      add(".v_cache", {config.heads, config.v_head_dim},
          [&](const auto& cache) { return layer.restored_values(cache.latent()); });
    }
  }
  return results;
}

template Results deepseek_mla<float>(const Case&);
template Results deepseek_mla<double>(const Case&);

}  // namespace conformance

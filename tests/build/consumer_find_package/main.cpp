// A user's program: the umbrella header, attention, a layer of each kind with its cache, results that are known.
#include <cstdio>
#include <qkv/qkv.hpp>

// Constant values come back exactly, whatever the weights.
static bool attention_works() {
  const Eigen::MatrixXf q = Eigen::MatrixXf::Random(5, 2 * 7), k = Eigen::MatrixXf::Random(9, 7);
  const Eigen::MatrixXf v = Eigen::MatrixXf::Constant(9, 3, 0.5f);
  const auto out = qkv::attention(q, k, v, {.heads = 2, .kv_heads = 1}, qkv::causal);
  return out.rows() == 5 && out.cols() == 6 && (out.array() - 0.5f).abs().maxCoeff() < 1e-6f;
}

// A text whole, and its first tokens and its last through a cache (in half precision, for one of the two).
template <class Layer, class Cache>
static bool layer_works(const Layer& layer, Cache cache) {
  const qkv::Matrix<float> x = Eigen::MatrixXf::Random(11, 24);
  const qkv::Matrix<float> whole = layer.forward(x), prompt = layer.forward(x.topRows(10), cache);
  const qkv::Matrix<float> last = layer.forward(x.bottomRows(1), cache);
  return (whole.topRows(10) - prompt).cwiseAbs().maxCoeff() < 5e-3f &&
         (whole.bottomRows(1) - last).cwiseAbs().maxCoeff() < 5e-3f;
}

int main() {
  const qkv::MultiHeadAttentionConfig grouped{.model_dim = 24,
                                              .heads = 3,
                                              .kv_heads = 1,
                                              .head_dim = 8,
                                              .rope = qkv::RopeConfig{.pairing = qkv::Pairing::half_split}};
  const qkv::LatentAttentionConfig latent{.model_dim = 24,
                                          .heads = 3,
                                          .latent_dim = 16,
                                          .nope_dim = 8,
                                          .rope_dim = 4,
                                          .v_head_dim = 8,
                                          .rope = qkv::RopeConfig{.pairing = qkv::Pairing::interleaved}};
  const qkv::MultiHeadAttention<float> mha(grouped, qkv::MultiHeadAttentionWeights<float>::random(grouped));
  const qkv::LatentAttention<float> mla(latent, qkv::LatentAttentionWeights<float>::random(latent));
  std::printf("qkv %d.%d.%d, %s\n", qkv::version.major, qkv::version.minor, qkv::version.patch, qkv::build_name);
  return attention_works() && layer_works(mha, mha.make_cache<qkv::half>(16)) && layer_works(mla, mla.make_cache(16))
             ? 0
             : 1;
}

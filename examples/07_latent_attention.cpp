// 07_latent_attention — MLA: cache one small latent per token, from which every head's keys and values come.
//
//   * caches of MHA, GQA, MQA and MLA side by side: MLA's is much smaller than MHA's, and not the smallest
//   * two forms give the same output: naive restores keys and values, absorbed works on the latents themselves
//   * RoPE cannot pass through the restoring matrix; that is why MLA has a rope key of its own
//
// Headers: latent_attention.hpp, latent_cache.hpp, memory.hpp.   Before: 06_cache_memory   Next: 08_story_model

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <string>

#include <qkv/kv_cache.hpp>
#include <qkv/latent_attention.hpp>
#include <qkv/memory.hpp>

#include "terminal.hpp"
#include "toy_text.hpp"

using qkv::bfloat16;
using qkv::Index;
using qkv::Matrix;

namespace {

/// Bytes per token of one layer, as allocated by caches of 64 tokens in 16 bits.
struct Caches {
  Index mla_naive, mha, gqa_8, mla, mqa;
};

Index key_value_bytes(Index kv_heads, Index head_dim, Index v_head_dim) {
  constexpr Index tokens = 64;
  return qkv::KvCache<bfloat16>(
             {.kv_heads = kv_heads, .head_dim = head_dim, .v_head_dim = v_head_dim, .capacity = tokens})
             .bytes() /
         tokens;
}

Caches allocate(const qkv::LatentAttentionConfig& c) {
  constexpr Index tokens = 64;
  const qkv::LatentCache<bfloat16> latent({.latent_dim = c.latent_dim, .rope_dim = c.rope_dim, .capacity = tokens});
  return {.mla_naive = key_value_bytes(c.heads, c.head_dim(), c.v_head_dim),
          .mha = key_value_bytes(c.heads, c.nope_dim, c.v_head_dim),
          .gqa_8 = key_value_bytes(8, c.nope_dim, c.v_head_dim),
          .mla = latent.bytes() / tokens,
          .mqa = key_value_bytes(1, c.nope_dim, c.v_head_dim)};
}

bool about(double x, double expected) { return std::abs(x - expected) < 0.05; }

}  // namespace

int main() {
  terminal::Claims claims;

  constexpr qkv::LatentAttentionConfig deepseek = qkv::deepseek_v3;
  const Caches bytes = allocate(deepseek);
  const auto row = [&](const char* name, Index b) {
    std::printf("  %-36s %6td %7.1fx  %s\n", name, b, qkv::ratio(b, bytes.mla),
                terminal::bar(qkv::ratio(b, bytes.mla_naive), 40).c_str());
  };
  std::printf("Cache bytes per token and layer as allocated, 16 bits, %td heads of %td (DeepSeek-V3)\n\n",
              deepseek.heads, deepseek.nope_dim);
  std::printf("  %-36s  bytes   to MLA\n", "");
  row("MLA naive: all restored keys, values", bytes.mla_naive);
  row("MHA: keys and values of 128 heads", bytes.mha);
  row("GQA: of 8 heads", bytes.gqa_8);
  row("MLA: latent 512 + rope key 64", bytes.mla);
  row("MQA: of 1 head", bytes.mqa);

  auto fewer = deepseek;
  fewer.heads = 32;
  const double at_128 = qkv::ratio(bytes.mha, bytes.mla), at_32 = qkv::ratio(allocate(fewer).mha, allocate(fewer).mla),
               to_mqa = qkv::ratio(bytes.mla, bytes.mqa);
  std::printf("\n  MHA to MLA: 128 heads %.1fx, 32 heads %.1fx. The latent does not grow with the heads.\n", at_128,
              at_32);
  std::printf("  MLA to MQA: %.2fx. MLA buys quality for each byte, not the smallest cache.\n\n", to_mqa);
  claims(about(at_128, 56.9) && about(at_32, 14.2), "the saving depends on the heads one compares with");
  claims(about(qkv::ratio(bytes.mla_naive, bytes.mla), 71.1) && about(qkv::ratio(bytes.gqa_8, bytes.mla), 3.6),
         "caching what the naive form restores would cost even more than MHA");
  claims(to_mqa == 2.25, "MQA's cache is smaller still");

  // One layer, twice the same text: a prompt at once, then token by token.
  constexpr qkv::LatentAttentionConfig config{.model_dim = 96,
                                              .heads = 6,
                                              .q_latent_dim = 40,
                                              .latent_dim = 16,
                                              .nope_dim = 16,
                                              .rope_dim = 8,
                                              .rope = {.pairing = qkv::Pairing::interleaved}};
  const qkv::LatentAttention<float> layer(config, qkv::LatentAttentionWeights<float>::random(config));
  const Matrix<float> x = toy::random_tokens(60, config.model_dim);  // [n, model_dim]
  const auto run = [&](qkv::LatentForm form) {
    auto cache = layer.make_cache(x.rows());
    Matrix<float> out(x.rows(), x.cols());
    out.topRows(50) = layer.forward(x.topRows(50), cache, {.form = form});
    for (Index i = 50; i < x.rows(); ++i) out.row(i) = layer.forward(x.row(i), cache, {.form = form});
    return out;
  };
  const double forms = terminal::difference(run(qkv::LatentForm::naive), run(qkv::LatentForm::absorbed));
  std::printf("\nNaive and absorbed, 50 tokens at once and 10 one by one: largest difference %.1e\n\n", forms);
  claims(forms < 1e-5, "both forms give the same output");

  // Restoring pays, as measured, from so many new tokens on: a prompt takes the naive form, a single token never does.
  std::string cached_tokens, new_tokens;
  bool turns = true;
  for (const Index old : {128, 1024, 4096, 16384}) {
    const auto form = [&](Index n) {
      return qkv::choose_latent_form(qkv::LatentForm::automatic, deepseek, n, old + n);
    };
    Index n = 1;
    while (n < 1000 && form(n) == qkv::LatentForm::absorbed) ++n;
    turns = turns && 1 < n && n < 300;
    cached_tokens += std::string(7 - std::to_string(old).size(), ' ') + std::to_string(old);
    new_tokens += std::string(7 - std::to_string(n).size(), ' ') + std::to_string(n);
  }
  std::printf("\n  DeepSeek-V3, tokens in the cache   %s\n", cached_tokens.c_str());
  std::printf("  naive is cheaper from new tokens   %s\n\n", new_tokens.c_str());
  claims(turns, "one new token is absorbed, however many are cached; a long prompt is naive");

  // How absorbing works, for head 0 and without RoPE: q·(c·W)ᵀ = (q·Wᵀ)·cᵀ. W moves to the query, once, and the keys of
  // this head are never made.
  const Matrix<float> c = layer.latents(x).leftCols(config.latent_dim);               // [n, latent_dim]
  const Matrix<float> w = layer.weights().key_up.weight().leftCols(config.nope_dim);  // [latent_dim, nope_dim]
  const Matrix<float> q = layer.queries(x).leftCols(config.nope_dim);                 // [n, nope_dim]
  const Matrix<float> keys = c * w;                                                   // [n, nope_dim]
  claims(terminal::difference(q * keys.transpose(), (q * w.transpose()) * c.transpose()) < 1e-4,
         "q*(c*W)^T is (q*W^T)*c^T: the latent is a key that all heads share");

  // And with RoPE: a key turns by its position, so what should move to the query differs from key to key. Turning the
  // latents before they are cached would save it, if turning and W could change places. They cannot. (latent_dim is
  // nope_dim here, so that both turn by the same angles.)
  const qkv::Rope<float> rotate({.pairing = qkv::Pairing::interleaved}, config.nope_dim);
  const Matrix<float> turned_keys = rotate.apply(keys, 1, 0), keys_of_turned = rotate.apply(c, 1, 0) * w;
  std::printf("\nrotate(c*W) against rotate(c)*W: relative difference of the key at each position\n\n");
  double least = 1;
  for (const Index p : {0, 1, 2, 3, 4, 6, 10, 20}) {
    const auto d = static_cast<double>((turned_keys.row(p) - keys_of_turned.row(p)).norm() / turned_keys.row(p).norm());
    std::printf("  position %2td  %5.2f %s\n", p, d, terminal::bar(d / 2, 40).c_str());
    if (p > 0) least = std::min(least, d);
  }
  std::printf("\n");
  claims(least > 0.1, "a rotated key is not the up-projection of a rotated latent");
  std::printf(
      "  So MLA splits the key: %td features from the latent that never turn, and %td more that do,\n"
      "  cached beside it, already turned, one for all heads.\n",
      config.nope_dim, config.rope_dim);
  return claims.status();
}

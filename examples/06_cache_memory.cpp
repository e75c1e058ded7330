// 06_cache_memory — what a cache costs: the memory that decides how long a text and how many users fit a machine.
//
//   * a token costs 2*kv_heads*head_dim numbers per layer: sharing keys and values (GQA, MQA) divides that
//   * a number costs 4 bytes, 2, or 1 and a scale per row; the price in precision is printed beside it
//   * other caches: a ring keeps a window in fixed memory, pages share a common prompt
//
// Headers: memory.hpp, storage.hpp, ring_cache.hpp, paged_cache.hpp.   Before: 05_kv_cache   Next: 07_latent_attention

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <vector>

#include <qkv/memory.hpp>
#include <qkv/multi_head_attention.hpp>
#include <qkv/paged_cache.hpp>
#include <qkv/ring_cache.hpp>

#include "terminal.hpp"
#include "toy_text.hpp"

using qkv::Index;
using qkv::Matrix;
using Config = qkv::MultiHeadAttentionConfig;

namespace {

/// As allocated: what a cache of one layer says about itself.
template <qkv::StorageType S>
Index allocated(const Config& c, Index tokens) {
  return qkv::KvCache<S>(
             {.kv_heads = c.kv_heads, .head_dim = c.head_dim, .v_head_dim = c.v_head_dim, .capacity = tokens})
      .bytes();
}

/// Largest error of a decode whose cache is stored as S, against f32.
template <qkv::StorageType S>
double storage_error(const qkv::MultiHeadAttention<float>& layer, const Matrix<float>& x, const Matrix<float>& exact) {
  auto cache = layer.make_cache<S>(x.rows());
  return terminal::difference(layer.forward(x, cache), exact);
}

double gigabytes(Index bytes) { return static_cast<double>(bytes) / 1e9; }

}  // namespace

int main() {
  terminal::Claims claims;
  constexpr Index layers = 32, tokens = 8192;

  // 32 heads of 128, and 32, 8 or 1 heads of keys and values.
  struct Variant {
    const char* name;
    Config config;
  };
  constexpr Variant variants[] = {{"MHA", {.model_dim = 4096, .heads = 32}},
                                  {"GQA-8", {.model_dim = 4096, .heads = 32, .kv_heads = 8}},
                                  {"MQA", {.model_dim = 4096, .heads = 32, .kv_heads = 1}}};
  const Config mha = variants[0].config;

  std::printf("Bytes of one token in one layer, 32 heads of 128, as allocated\n\n");
  std::printf("  variant  numbers     f32     f16    int8\n");
  bool known_before = true;
  for (const auto& [name, config] : variants) {
    const Index f32 = allocated<float>(config, 64), f16 = allocated<qkv::half>(config, 64),
                int8 = allocated<std::int8_t>(config, 64);
    std::printf("  %-7s  %7td %7td %7td %7td\n", name, qkv::elements_per_token(config), f32 / 64, f16 / 64, int8 / 64);
    known_before = known_before && f32 == qkv::cache_bytes<float>(config, 64) &&
                   f16 == qkv::cache_bytes<qkv::half>(config, 64) && int8 == qkv::cache_bytes<std::int8_t>(config, 64);
  }
  std::printf("\n");
  claims(known_before, "memory.hpp says so before anything is allocated");

  std::printf("\nA model of %td layers at %td tokens\n\n", layers, tokens);
  std::printf("  variant          one layer     all layers\n");
  const double whole = gigabytes(layers * allocated<qkv::half>(mha, tokens));
  const auto print_row = [&](const char* name, const char* storage, Index layer_bytes) {
    const double all = gigabytes(layers * layer_bytes);
    std::printf("  %-7s %-4s %10.1f MB %11.2f GB  %s\n", name, storage, 1e3 * gigabytes(layer_bytes), all,
                terminal::bar(all / whole, 40).c_str());
  };
  for (const auto& [name, config] : variants) {
    print_row(name, "f16", allocated<qkv::half>(config, tokens));
    print_row(name, "int8", allocated<std::int8_t>(config, tokens));
  }
  const Index one_layer = qkv::elements_per_token(mha) * tokens;
  std::printf(
      "\n  One layer of MHA holds %.0f million numbers, the model %.1f billion.\n"
      "  The often quoted 134 MB is one layer.\n\n",
      static_cast<double>(one_layer) / 1e6, static_cast<double>(layers * one_layer) / 1e9);
  claims(std::abs(whole - 4.3) < 0.05, "32 layers of MHA at 8192 tokens take 4.3 GB in 16 bits");
  claims(allocated<qkv::half>(mha, tokens) == 4 * allocated<qkv::half>(variants[1].config, tokens) &&
             allocated<qkv::half>(mha, tokens) == 32 * allocated<qkv::half>(variants[2].config, tokens),
         "GQA-8 takes a quarter of it, MQA a thirty-second");

  // What the smaller numbers cost: the same layer and text, another storage. Outputs are of size 1.
  constexpr Config small{.model_dim = 96, .heads = 8, .kv_heads = 2};
  const qkv::MultiHeadAttention<float> layer(small, qkv::MultiHeadAttentionWeights<float>::random(small));
  const Matrix<float> x = 2 * toy::random_tokens(150, small.model_dim);
  auto f32 = layer.make_cache(x.rows());
  const Matrix<float> exact = layer.forward(x, f32);
  const double errors[] = {storage_error<qkv::half>(layer, x, exact), storage_error<qkv::bfloat16>(layer, x, exact),
                           storage_error<std::int8_t>(layer, x, exact)};
  std::printf("\nLargest error of an output (up to %.1f) against an f32 cache\n\n",
              static_cast<double>(exact.cwiseAbs().maxCoeff()));
  std::printf("  f16 %.1e   bf16 %.1e   int8 %.1e\n\n", errors[0], errors[1], errors[2]);
  claims(errors[0] < errors[1] && errors[1] < 0.05 && errors[2] < 0.05, "all within five hundredths, f16 closest");

  // A sliding window: the text goes on, the memory does not.
  auto ring = layer.make_ring_cache({.window = 31, .pinned = 4});
  const Index at_first = ring.bytes();
  for (int round = 0; round < 10; ++round) layer.forward(x, ring);
  std::printf("\nA ring of 4 pinned tokens and a window of 31, after %td tokens: %td rows held, %td bytes\n\n",
              ring.position(), ring.rows(), ring.bytes());
  claims(ring.bytes() == at_first && ring.rows() <= ring.capacity(), "its memory does not grow");

  // Many conversations with one system prompt: its pages are kept once.
  constexpr Index users = 8, page_tokens = 16, prompt = 128;
  auto pool = layer.make_page_pool({.page_tokens = page_tokens, .pages = 64});
  auto shared = layer.make_paged_cache(pool);
  layer.forward(x.topRows(prompt), shared);
  std::vector<qkv::PagedCache<float>> conversations;
  double worst = 0;
  for (Index user = 0; user < users; ++user) {
    conversations.push_back(shared.fork());
    const Matrix<float> own = toy::random_tokens(5, small.model_dim, 100 + static_cast<std::uint32_t>(user));
    auto alone = layer.make_cache(prompt + own.rows());
    layer.forward(x.topRows(prompt), alone);
    worst = std::max(worst, terminal::difference(layer.forward(own, conversations.back()), layer.forward(own, alone)));
  }
  Index apart = 0;
  for (const auto& conversation : conversations) apart += conversation.bytes();
  std::printf(
      "\n%td conversations over one prompt of %td tokens: %td kB in shared pages, %td kB if each had its own\n\n",
      users, prompt, pool.used_bytes() / 1000, apart / 1000);
  claims(pool.used_bytes() * 4 < apart && worst < 1e-6, "shared pages take less than a quarter, and change no answer");
  return claims.status();
}

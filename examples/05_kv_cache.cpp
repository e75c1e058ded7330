// 05_kv_cache — a text grows by one token at a time; keys and values of the old tokens need not be made again.
//
//   * without a cache, n steps project O(n^2) tokens and score O(n^3) pairs; with one, O(n) and O(n^2): counted here
//   * the outputs are the same: cached decode, recomputation, and a prompt in chunks
//   * a cache can go back: truncate(position) forgets what came after
//
// Headers: kv_cache.hpp, multi_head_attention.hpp.   Before: 04_heads   Next: 06_cache_memory

#include <chrono>
#include <cstdio>
#include <string>

#include <qkv/multi_head_attention.hpp>

#include "terminal.hpp"
#include "toy_text.hpp"

using qkv::Index;
using qkv::Matrix;
using Layer = qkv::MultiHeadAttention<float>;

namespace {

/// A score function that changes nothing and counts the pairs it is asked about (those that are hidden do not count).
struct Counting {
  Index* pairs;

  template <class T>
  T operator()(T score, const qkv::At& at) const {
    *pairs += qkv::causal.sees(at);
    return score;
  }
};

struct Run {
  Matrix<float> out;          // [n, model_dim]
  Index rows = 0, pairs = 0;  // tokens projected; query-key pairs scored, over all heads
  double milliseconds = 0;

  /// Of the four projections, and of q·k and p·v.
  Index multiplications(const qkv::MultiHeadAttentionConfig& c) const {
    const Index q = c.model_dim * c.heads * c.head_dim, kv = c.model_dim * c.kv_heads * (c.head_dim + c.v_head_dim),
                o = c.heads * c.v_head_dim * c.model_dim;
    return rows * (q + kv + o) + pairs * (c.head_dim + c.v_head_dim);
  }
};

/// Step i gives row i. Without a cache a step runs all tokens so far and keeps its last row.
Run decode(const Layer& layer, const Matrix<float>& x, bool with_cache) {
  Run run{.out = Matrix<float>(x.rows(), x.cols())};
  const Counting counting{&run.pairs};
  auto cache = layer.make_cache(x.rows());
  const auto start = std::chrono::steady_clock::now();
  for (Index i = 0; i < x.rows(); ++i) {
    if (with_cache) {
      run.out.row(i) = layer.forward(x.middleRows(i, 1), cache, qkv::causal, counting);
      run.rows += 1;
    } else {
      run.out.row(i) = layer.forward(x.topRows(i + 1), qkv::causal, counting).bottomRows(1);
      run.rows += i + 1;
    }
  }
  run.milliseconds = std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count();
  return run;
}

double ratio(Index a, Index b) { return static_cast<double>(a) / static_cast<double>(b); }

}  // namespace

int main() {
  terminal::Claims claims;
  constexpr qkv::MultiHeadAttentionConfig config{
      .model_dim = 64, .heads = 4, .rope = qkv::RopeConfig{.pairing = qkv::Pairing::half_split}};
  const Layer layer(config, qkv::MultiHeadAttentionWeights<float>::random(config));

  std::printf("Tokens that a step projects (filled) and finds in the cache (dots)\n\n  step   without%20swith\n", "");
  for (int step = 1; step <= 8; ++step) {
    std::string without, with;
    for (int token = 1; token <= 8; ++token) {
      without += token <= step ? "██ " : "   ";
      with += token == step ? "██ " : token < step ? "·· " : "   ";
    }
    std::printf("  %4d   %s   %s\n", step, without.c_str(), with.c_str());
  }

  std::printf("\n             tokens projected        pairs scored            multiplications, millions\n");
  std::printf("  steps     without     with      without     with         without      with   ratio\n");
  const Matrix<float> text = toy::random_tokens(160, config.model_dim);  // [n, model_dim]
  Run recomputed, cached, before[2];
  bool counts_are_right = true;
  for (const Index n : {20, 40, 80, 160}) {
    before[0] = recomputed, before[1] = cached;
    recomputed = decode(layer, text.topRows(n), false);
    cached = decode(layer, text.topRows(n), true);
    const Index without = recomputed.multiplications(config), with = cached.multiplications(config);
    std::printf("  %5td     %8td %8td     %8td %8td        %8.2f  %8.2f  %5.1fx\n", n, recomputed.rows, cached.rows,
                recomputed.pairs, cached.pairs, static_cast<double>(without) / 1e6, static_cast<double>(with) / 1e6,
                ratio(without, with));
    counts_are_right = counts_are_right && cached.rows == n && recomputed.rows == n * (n + 1) / 2 &&
                       cached.pairs == config.heads * n * (n + 1) / 2 &&
                       recomputed.pairs == config.heads * n * (n + 1) * (n + 2) / 6;
  }
  const double rows[] = {ratio(recomputed.rows, before[0].rows), ratio(cached.rows, before[1].rows)};
  const double pairs[] = {ratio(recomputed.pairs, before[0].pairs), ratio(cached.pairs, before[1].pairs)};
  std::printf("  doubled   %7.1fx %7.1fx     %7.1fx %7.1fx\n\n", rows[0], rows[1], pairs[0], pairs[1]);
  claims(counts_are_right, "n steps score heads*n(n+1)(n+2)/6 pairs without a cache, heads*n(n+1)/2 with it");
  claims(pairs[0] > 7.5 && pairs[1] < 4.1, "twice the text: 8 times the pairs without a cache, 4 times with it");
  claims(rows[0] > 3.9 && rows[1] == 2, "twice the text: 4 times the projections without a cache, twice with it");

  const double error = terminal::difference(recomputed.out, cached.out);
  std::printf("\n  160 steps took %.1f ms without and %.1f ms with the cache (this machine, now)\n",
              recomputed.milliseconds, cached.milliseconds);
  std::printf("  largest difference of the outputs %.1e\n\n", error);
  claims(error < 1e-5, "cached decode gives what recomputation gives");

  // A prompt need not come token by token. Here it comes in two chunks, and the rest one by one.
  auto cache = layer.make_cache(text.rows());
  Matrix<float> out(text.rows(), config.model_dim);
  out.topRows(100) = layer.forward(text.topRows(100), cache);
  out.middleRows(100, 37) = layer.forward(text.middleRows(100, 37), cache);
  for (Index i = 137; i < text.rows(); ++i) out.row(i) = layer.forward(text.row(i), cache);
  claims(terminal::difference(out, cached.out) < 1e-5, "a prompt in chunks of 100 and 37 gives the same");

  // Take the last 23 tokens back and write them again: the same bits.
  cache.truncate(137);
  bool same = true;
  for (Index i = 137; i < text.rows(); ++i) same = same && layer.forward(text.row(i), cache) == out.row(i);
  claims(same, "truncate(137) and the same tokens again: the same bits");

  std::printf("\n  The price: %td bytes for %td tokens of one small layer. What that comes to: 06_cache_memory.\n",
              cache.bytes(), cache.rows());
  return claims.status();
}

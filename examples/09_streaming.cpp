// 09_streaming — endless input in fixed memory, inside a callback that may neither allocate nor wait.
//
//   * a ring cache keeps the first tokens (models lean on them) and a sliding window; bytes never change
//   * the callback works on memory that is there: 0 allocations once the ring is full, counted here, and no locks
//   * what comes out is attention with the mask `prefix(4) | window(60, 0)` over the whole input, which nobody stores
//
// Pinned first tokens ("attention sinks"): Xiao et al. 2023, arXiv:2309.17453. There they also keep their distance to the
// window: `.positions_in_cache = true`, for models with RoPE that were not trained on long texts.
//
// Headers: ring_cache.hpp, multi_head_attention.hpp, saved_cache.hpp.   Before: 08_story_model   Next: 10_compress_a_model

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <sstream>
#include <string>

#include <qkv/multi_head_attention.hpp>
#include <qkv/ring_cache.hpp>
#include <qkv/saved_cache.hpp>

#include "../tests/support/allocations.hpp"  // replaces operator new and malloc by ones that count
#include "terminal.hpp"

using qkv::Index;
using qkv::Matrix;
using Layer = qkv::MultiHeadAttention<float>;

namespace {

constexpr Index frame = 4;  // tokens that a callback brings
constexpr Index pinned = 4, window = 60;
constexpr qkv::MultiHeadAttentionConfig config{
    .model_dim = 48, .heads = 6, .kv_heads = 2, .rope = qkv::RopeConfig{.pairing = qkv::Pairing::half_split}};

/// Feature j of token t of an input that never ends and never repeats: nobody stores it.
float signal(Index t, Index j) {
  const double phase = static_cast<double>(t) * (0.05 + 0.013 * static_cast<double>(j));
  return static_cast<float>(std::sin(phase) + 0.5 * std::sin(1.618 * phase + static_cast<double>(j)));
}

/// What a sound card or a sensor would call, on a thread that must be back in time.
class Stream {
 public:
  explicit Stream(const Layer& layer)
      : layer_(layer), cache_(layer.make_ring_cache({.window = window, .pinned = pinned, .slack = frame})) {}

  /// in and out: [frame, model_dim], in memory of the caller's.
  void operator()(const float* in, float* out) {
    const Eigen::OuterStride<> stride(config.model_dim);
    const qkv::ConstView<float> x(in, frame, config.model_dim, stride);
    layer_.forward_into(qkv::View<float>(out, frame, config.model_dim, stride), x, cache_);
  }

  qkv::RingCache<float>& cache() { return cache_; }
  Index bytes() const { return cache_.bytes() + cache_.overhead_bytes(); }

 private:
  const Layer& layer_;
  qkv::RingCache<float> cache_;
};

}  // namespace

int main() {
  terminal::Claims claims;
  const Layer layer(config, qkv::MultiHeadAttentionWeights<float>::random(config));
  Stream stream(layer);

  constexpr Index kept = 600;  // of the output, to look at afterwards
  Matrix<float> in(frame, config.model_dim), out(frame, config.model_dim), first(kept, config.model_dim);
  const auto callback = [&](Index t) {
    for (Index i = 0; i < frame; ++i)
      for (Index j = 0; j < config.model_dim; ++j) in(i, j) = signal(t + i, j);
    stream(in.data(), out.data());
    if (t < kept) first.middleRows(t, frame) = out;
  };

  // Warm-up: the first calls size the workspace; once the ring is full nothing grows any more.
  Index t = 0;
  std::int64_t warm_up = 0;
  for (; stream.cache().rows() < stream.cache().capacity(); t += frame)
    warm_up += support::allocations_of([&] { callback(t); }).count;
  const Index bytes = stream.bytes();

  std::printf("      tokens    rows held    bytes    allocations    longest callback\n");
  bool same_memory = true;
  std::int64_t allocations = 0;
  for (const Index until : {1000, 2000, 4000, 8000, 16000}) {
    double longest = 0;
    for (; t < until; t += frame) {
      const auto start = std::chrono::steady_clock::now();
      allocations += support::allocations_of([&] { callback(t); }).count;
      const std::chrono::duration<double, std::milli> took = std::chrono::steady_clock::now() - start;
      longest = std::max(longest, took.count());
    }
    same_memory = same_memory && stream.bytes() == bytes;
    std::printf("  %10td  %11td  %7td  %13td  %13.3f ms\n", t, stream.cache().rows(), stream.bytes(),
                static_cast<std::ptrdiff_t>(allocations), longest);
  }
  std::printf("\n  After warm-up: %td allocations in %td callbacks (operator new and malloc)\n\n",
              static_cast<std::ptrdiff_t>(allocations), t / frame);
  claims(warm_up > 0 && allocations == 0, "the callback allocates while it warms up, and never again");
  claims(same_memory && stream.cache().rows() == pinned + window + frame, "16,000 tokens in the memory of 68");

  // The same over a stored input, without a cache: the mask says what the ring holds.
  Matrix<float> stored(kept, config.model_dim);
  for (Index i = 0; i < kept; ++i)
    for (Index j = 0; j < config.model_dim; ++j) stored(i, j) = signal(i, j);
  const auto mask = (qkv::prefix(pinned) | qkv::window(window, 0)) & qkv::causal;
  claims(terminal::difference(layer.forward(stored, mask), first) < 1e-5,
         "the outputs are those of prefix(4) | window(60, 0) over the whole input");
  claims(terminal::difference(layer.forward(stored), first) > 1e-3, "and not those of looking back for ever");

  // The stream can stop here and go on elsewhere: the ring in a file, and the next frame gives the same bits.
  std::stringstream file;
  qkv::save_cache(file, stream.cache());
  Stream elsewhere(layer);
  qkv::load_cache(file, elsewhere.cache());
  callback(t);
  Matrix<float> again(frame, config.model_dim);
  elsewhere(in.data(), again.data());
  std::printf("\n  Saved at token %td: %td bytes\n", t, static_cast<std::ptrdiff_t>(file.str().size()));
  claims(again == out, "a saved stream goes on elsewhere with the same bits");

  // An altered file is refused, and the running stream does not notice.
  std::string altered = file.str();
  altered[altered.size() / 2] = static_cast<char>(altered[altered.size() / 2] ^ 1);
  std::istringstream bad(altered);
  std::string why;
  const bool loaded = qkv::try_load_cache(bad, elsewhere.cache(), &why);
  std::printf("  One bit altered: %s\n", why.c_str());
  claims(!loaded && elsewhere.cache().position() == t + frame, "an altered file is refused and changes nothing");
  return claims.status();
}

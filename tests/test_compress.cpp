#include <qkv/compress.hpp>

#include "support/catch.hpp"
#include "support/layers.hpp"

using namespace support;
using qkv::Compression, qkv::CompressionSettings;

namespace {

inline constexpr MultiHeadAttentionConfig gqa{.model_dim = 41,
                                              .heads = 6,
                                              .kv_heads = 3,
                                              .head_dim = 8,
                                              .v_head_dim = 5,
                                              .qkv_bias = true,
                                              .out_bias = true,
                                              .scale = 0.4};

MultiHeadAttentionConfig with_rope(const RopeConfig& rope) {
  auto c = gqa;
  c.rope = rope;
  return c;
}

/// Weights whose keys and values come from `rank` features of x.
template <class T>
MultiHeadAttention<T> low_rank(const MultiHeadAttentionConfig& c, Index rank) {
  auto w = multi_head_layer<T>(c).weights();
  const Matrix<T> down = normals<T>(c.model_dim, rank, 31) / T(6);
  const auto from = [&](Index out, std::uint64_t seed) {
    return Projection<T>(down * normals<T>(rank, out, seed) / std::sqrt(T(rank)));
  };
  w.key = from(c.kv_heads * c.head_dim, 32);
  w.value = from(c.kv_heads * c.v_head_dim, 33);
  return {c, std::move(w)};
}

/// Prompt and single tokens through a cache of the converted layer, against the original layer without a cache.
template <class T>
double difference(const MultiHeadAttention<T>& original, const LatentAttention<T>& converted, Index n = 29) {
  const Matrix<T> x = normals<T>(n, original.config().model_dim, 5);
  auto cache = converted.make_cache(n);
  return max_error(feed(converted, cache, x, {n - 4, 1}), original.forward(x));
}

}  // namespace

TEST_CASE("without RoPE a layer of low rank becomes latent attention exactly, and not with less", "[layer]") {
  const auto layer = low_rank<double>(gqa, 7);
  const Compression<double> c(layer), calibrated(layer, {}, normals<double>(90, 41, 3));
  for (const auto* each : {&c, &calibrated}) {
    CHECK(each->latent_dim_for(1e-5) == 7);
    CHECK(each->rope_dim() == 2);  // what latent attention asks for: zeros
    CHECK(each->rope_error() == 0);
    CHECK(difference(layer, each->layer(7)) <= 1e-12);
    CHECK(difference(layer, each->layer(6)) >= 1e-3);
  }
  const Matrix<double> x = normals<double>(23, 41, 6);
  CHECK(max_error(c.layer(7).forward(x), multi_head_by_formula(layer, x)) <= 1e-12);
}

TEST_CASE("with RoPE kept on all features a layer becomes latent attention exactly, biases included", "[layer]") {
  const RopeConfig ropes[] = {
      interleaved,
      half_split,
      {.pairing = qkv::Pairing::half_split,
       .theta = 300,
       .scaling = qkv::yarn_scaling({.factor = 8, .original_context = 16, .attention_factor = 1.3})},
      {.pairing = qkv::Pairing::interleaved, .dim = 6, .theta = 500}};
  for (const RopeConfig& rope : ropes) {
    const auto layer = multi_head_layer<double>(with_rope(rope));
    const Compression<double> c(layer);
    CHECK(c.rope_dim() == 3 * rope.rotated(8));
    CHECK(c.rope_error() <= 1e-7);
    // The values alone, or with the features that never turn: rank <= numbers per token, biases included.
    const Index latent_dim = c.latent_dim_for(1e-7);
    CHECK(latent_dim == 3 * (5 + 8 - rope.rotated(8)));
    CHECK(difference(layer, c.layer(latent_dim)) <= 1e-12);
    // Fewer features turn, and the error that was announced is made.
    const Compression<double> fewer(layer, {.rope_dim = 10, .context = 29});
    CHECK(fewer.rope_error() > 1e-3);
    CHECK(difference(layer, fewer.layer(39)) > 1e-3);
  }
}

TEST_CASE("where pairs hardly turn, taking RoPE from them changes nothing", "[layer]") {
  for (const qkv::Pairing pairing : {qkv::Pairing::interleaved, qkv::Pairing::half_split}) {
    RopeConfig rope{.pairing = pairing, .theta = 1e60};  // 1 radian per position, 1e-15, 1e-30, 1e-45
    rope.scaling.attention_factor = 1.3;
    const auto layer = multi_head_layer<double>(with_rope(rope));
    const Compression<double> c(layer, {.rope_dim = 6, .context = 29});
    CHECK(c.rope_error() <= 1e-7);
    CHECK(c.latent_dim_for(1e-7) == 3 * (6 + 5));
    CHECK(difference(layer, c.layer(33)) <= 1e-12);
  }
}

TEST_CASE("one rope key serves all kv heads where their keys differ by a turn of each pair", "[layer]") {
  for (const RopeConfig& rope : {interleaved, half_split}) {
    auto w = multi_head_layer<double>(with_rope(rope)).weights();
    const bool pairs_interleaved = rope.pairing == qkv::Pairing::interleaved;
    Matrix<double> key = w.key.weight();
    RowVector<double> bias = w.key.bias();
    for (Index g = 1; g < 3; ++g)
      for (Index i = 0; i < 4; ++i) {
        const Index a = pairs_interleaved ? 2 * i : i, b = pairs_interleaved ? a + 1 : i + 4;
        const double phase = 0.7 * static_cast<double>(g) + 0.4 * static_cast<double>(i), size = 0.5 + 0.3 * phase;
        const auto turned = [&](auto&& m) {
          m.col(8 * g + a) = size * (std::cos(phase) * m.col(a) - std::sin(phase) * m.col(b));
          m.col(8 * g + b) = size * (std::sin(phase) * m.col(a) + std::cos(phase) * m.col(b));
        };
        turned(key), turned(bias);
      }
    w.key = Projection<double>(key, bias);
    const MultiHeadAttention<double> layer(with_rope(rope), w);
    const Compression<double> c(layer, {.rope_dim = 8});
    CHECK(c.rope_error() <= 1e-7);
    CHECK(c.latent_dim_for(1e-7) == 15);
    CHECK(difference(layer, c.layer(15)) <= 1e-12);
    CHECK(Compression<double>(layer, {.rope_dim = 6}).rope_error() > 1e-3);
  }
}

TEST_CASE("relative_error is what scores and values lose, and no latent of that size chosen otherwise loses less",
          "[layer]") {
  const auto layer = multi_head_layer<double>(gqa);
  const Matrix<double> x = normals<double>(200, 41, 7) * normals<double>(41, 41, 8) + normals<double>(200, 41, 9);
  const Matrix<double> q = layer.queries(x), k = layer.keys(x), v = layer.values(x);
  const Compression<double> c(layer, {}, x), plain(layer);
  // Scores of all pairs of tokens; values as all kv heads have them: of each group of two query heads the first.
  const auto scores = [&](const Matrix<double>& keys) {
    double sum = 0;
    for (Index h = 0; h < 6; ++h) sum += (q.middleCols(h * 8, 8) * keys.middleCols(h * 8, 8).transpose()).squaredNorm();
    return sum;
  };
  const Matrix<double> all_k = qkv::repeat_kv_heads(k, {6, 3}), all_v = qkv::repeat_kv_heads(v, {6, 3});
  double before = 1;
  for (const Index latent_dim : {1, 5, 12, 20, 31, 39}) {
    const auto loss = [&](const LatentAttention<double>& converted) {
      const Matrix<double> latent = converted.latents(x).leftCols(latent_dim);
      const double lost_scores = scores(converted.restored_keys(latent) - all_k),
                   lost_values = (converted.restored_values(latent) - all_v).squaredNorm();
      return std::sqrt((lost_scores / scores(all_k) + lost_values / all_v.squaredNorm()) / 2);
    };
    CAPTURE(latent_dim);
    const double error = c.relative_error(latent_dim);
    CHECK(std::abs(loss(c.layer(latent_dim)) - error) <= 1e-7);
    CHECK(loss(plain.layer(latent_dim)) >= error - 1e-7);
    CHECK(error < before);
    CHECK(c.latent_dim_for(error + 1e-9) == latent_dim);
    before = error;
  }
  CHECK(before <= 1e-7);
}

TEST_CASE("rope_error counts the keys that lose their turning, and the pairs that matter most keep it", "[layer]") {
  auto config = with_rope(half_split);
  config.kv_heads = 1;
  const auto layer = multi_head_layer<double>(config);
  const Matrix<double> x = normals<double>(150, 41, 4), k = layer.weights().key.forward(x);
  double all = 0, largest = 0;
  for (Index i = 0; i < 4; ++i) {
    double turn = 0;
    for (Index distance = 0; distance < 50; ++distance) {
      const auto angle = static_cast<double>(distance) * static_cast<double>(turn_per_position(half_split, 8, i));
      turn += (std::pow(std::cos(angle) - 1, 2) + std::pow(std::sin(angle), 2)) / 50;
    }
    const double loss = (k.col(i).squaredNorm() + k.col(i + 4).squaredNorm()) * turn;
    all += loss, largest = std::max(largest, loss);
  }
  const Compression<double> c(layer, {.rope_dim = 2, .context = 50}, x);
  CHECK(std::abs(c.rope_error() - std::sqrt((all - largest) / k.squaredNorm())) <= 1e-12);
  CHECK(Compression<double>(layer, {.rope_dim = 4, .context = 50}, x).rope_error() < c.rope_error());
}

TEST_CASE("what cannot be compressed is refused in words", "[layer]") {
  const auto layer = multi_head_layer<double>(with_rope(interleaved));
  const Matrix<double> x = normals<double>(9, 41, 1);
  const auto refusal = [&](const MultiHeadAttention<double>& l, const CompressionSettings& s,
                           const Matrix<double>& rows) {
    return message_of([&] { (void)Compression<double>(l, s, rows); });
  };
  CHECK(contains(refusal(multi_head_layer<double>(small_gqa), {}, normals<double>(3, 23, 1)), "QK-norm"));
  CHECK(contains(refusal(multi_head_layer<double>(gqa, true), {}, x), "sinks"));
  auto cross = gqa;
  cross.key_dim = 12;
  CHECK(contains(refusal(multi_head_layer<double>(cross), {}, x), "cross-attention"));
  CHECK(contains(refusal(layer, {.rope_dim = 5}, x), "kv_heads*dim = 24 and context >= 1; given 5"));
  CHECK(contains(refusal(layer, {.rope_dim = 26}, x), "given 26"));
  CHECK(contains(refusal(layer, {.rope_dim = 2, .context = 0}, x), "given 2 and 0"));
  CHECK(contains(refusal(multi_head_layer<double>(gqa), {.rope_dim = 2}, x), "kv_heads*dim = 0"));
  CHECK(contains(refusal(layer, {}, normals<double>(9, 40, 1)), "[9, 40]"));
  Matrix<double> broken = x;
  broken(4, 4) = std::numeric_limits<double>::quiet_NaN();
  CHECK(contains(refusal(layer, {}, broken), "finite"));
  const Compression<double> c(layer);
  CHECK(contains(message_of([&] { (void)c.layer(0); }), "= 39; given 0"));
  CHECK(contains(message_of([&] { (void)c.relative_error(40); }), "given 40"));
}

TEST_CASE("latent attention without a norm and with its own frequencies asks for weights that fit", "[layer]") {
  const Compression<double> c(multi_head_layer<double>(with_rope(interleaved)), {.rope_dim = 6});
  auto w = c.weights(9);
  w.latent_norm = RowVector<double>::Ones(9);
  CHECK(contains(message_of([&] { (void)LatentAttention<double>(c.config(9), w); }), "latent_norm"));
  w = c.weights(9);
  w.rope_frequencies.resize(2);
  CHECK(
      contains(message_of([&] { (void)LatentAttention<double>(c.config(9), w); }), "one finite frequency per pair, 3"));
  const LatentAttention<double> layer = c.layer(9);
  const Matrix<double> x = normals<double>(3, 41, 2);
  CHECK(max_error(layer.latents(x).leftCols(9), layer.weights().latent_down.forward(x).leftCols(9)) == 0);
}

#include <qkv/rope_config.hpp>

#include <array>
#include <numbers>
#include <type_traits>

#include "support/catch.hpp"
#include "support/numbers.hpp"

using namespace support;
using qkv::Pairing, qkv::RopeConfig;

// A model's settings are constants, and cannot be written without a pairing.
inline constexpr RopeConfig llama31{.pairing = Pairing::half_split, .theta = 5e5, .scaling = qkv::llama3_scaling()};
inline constexpr RopeConfig deepseek{.pairing = Pairing::interleaved,
                                     .scaling = qkv::yarn_scaling({.factor = 40, .original_context = 4096})};
static_assert(!std::is_default_constructible_v<Pairing> && !std::is_default_constructible_v<RopeConfig>);
static_assert(llama31.pairing == Pairing::half_split && deepseek.pairing == Pairing::interleaved);
static_assert(Pairing::interleaved != Pairing::half_split);
static_assert(deepseek.scaling.factor == 40 && deepseek.rotated(64) == 64 &&
              RopeConfig{llama31}.scaling == llama31.scaling);

namespace {

RopeConfig with(qkv::RopeScaling scaling, double theta = 10000, Index dim = 0) {
  return {.pairing = Pairing::interleaved, .dim = dim, .theta = theta, .scaling = scaling};
}

/// Largest distance of cos(p·f), sin(p·f) from someone else's table at one position.
template <std::size_t N>
double distance(const qkv::RowVector<double>& f, double p, const std::array<double, N>& cos,
                const std::array<double, N>& sin) {
  if (f.size() != static_cast<Index>(N)) return std::numeric_limits<double>::infinity();
  double worst = 0;
  for (std::size_t i = 0; i < N; ++i) {
    const double angle = p * f(static_cast<Index>(i));
    worst = std::max({worst, std::abs(std::cos(angle) - cos[i]), std::abs(std::sin(angle) - sin[i])});
  }
  return worst;
}

}  // namespace

TEST_CASE("unscaled frequencies are powers of theta", "[rope]") {
  const auto f = qkv::rope_frequencies({.pairing = Pairing::half_split, .dim = 10, .theta = 500000}, 14);
  REQUIRE(f.size() == 5);
  for (Index i = 0; i < 5; ++i) REQUIRE(std::abs(f(i) * std::pow(500000.0, 0.2 * static_cast<double>(i)) - 1) < 1e-14);
}

TEST_CASE("linear scaling divides every frequency, and so reads position p as p / factor", "[rope]") {
  const auto plain = qkv::rope_frequencies(with({}), 18),
             scaled = qkv::rope_frequencies(with(qkv::linear_scaling(4)), 18);
  REQUIRE(max_error(scaled * 4, plain) < 1e-15);
}

TEST_CASE("NTK scaling keeps the fastest pair and divides the slowest by factor", "[rope]") {
  const auto plain = qkv::rope_frequencies(with({}), 18), scaled = qkv::rope_frequencies(with(qkv::ntk_scaling(6)), 18);
  REQUIRE(scaled(0) == 1);
  REQUIRE(std::abs(scaled(8) * 6 / plain(8) - 1) < 1e-13);
  for (Index i = 1; i < 9; ++i) {
    REQUIRE(scaled(i) < plain(i));
    REQUIRE(scaled(i) > plain(i) / 6 * (1 - 1e-13));
  }
}

TEST_CASE("YaRN frequencies are those of DeepSeek's code", "[rope]") {
  // deepseek-ai/DeepSeek-V3 inference/model.py, precompute_freqs_cis in float64: dim 16, position 9.
  constexpr std::array cos{-0.9111302618846769, -0.9566441995999118, 0.6216099682706644, 0.9769267595598033,
                           0.9989364307709063,  0.9999707483847982,  0.9999999746875001, 0.99999999746875};
  constexpr std::array sin{0.4121184852417566,   0.2912591206672232,   0.7833269096274834,     0.21357459225287603,
                           0.046108646463349987, 0.007648684510867598, 0.00022499999810156253, 7.115124729375468e-05};
  REQUIRE(distance(qkv::rope_frequencies(deepseek, 16), 9, cos, sin) < 1e-14);
}

TEST_CASE("YaRN leaves fast pairs and divides slow ones", "[rope]") {
  const auto plain = qkv::rope_frequencies(with({}), 64);
  const auto scaled = qkv::rope_frequencies(with(qkv::yarn_scaling({.factor = 40, .original_context = 4096})), 64);
  const auto turns = [&](Index i) { return plain(i) * 4096 / (2 * std::numbers::pi); };
  for (Index i = 0; i < 32; ++i) {
    const double ratio = scaled(i) / plain(i);
    if (turns(i) > 32) REQUIRE(ratio == 1);
    if (i > 0 && turns(i - 1) < 1) REQUIRE(std::abs(ratio * 40 - 1) < 1e-14);  // the border is rounded outwards
    REQUIRE((i == 0 || ratio <= scaled(i - 1) / plain(i - 1) + 1e-15));
  }
  // Equal borders of the ramp do not divide by zero.
  const auto step = qkv::rope_frequencies(
      with(qkv::yarn_scaling({.factor = 2, .original_context = 1, .beta_fast = 2, .beta_slow = 1})), 4);
  REQUIRE(step.allFinite());
}

TEST_CASE("the YaRN softmax factor is that of DeepSeek's code", "[rope]") {
  REQUIRE(std::abs(qkv::yarn_mscale(40) - 1.3688879454113936) < 1e-15);
  REQUIRE(std::abs(qkv::yarn_mscale(40, 0.707) - (0.1 * 0.707 * std::log(40.0) + 1)) < 1e-15);
  REQUIRE(qkv::yarn_mscale(1) == 1);
  REQUIRE(qkv::yarn_mscale(40, 0) == 1);  // a model without mscale_all_dim
  REQUIRE(qkv::yarn_mscale(0.5) == 1);
}

TEST_CASE("Llama 3 frequencies are those of a third party", "[rope]") {
  // rasbt/LLMs-from-scratch, llms_from_scratch/kv_cache/llama3.py in float64: dim 16, theta 5e5, position 21.
  constexpr std::array cos{-0.5477292602242684, 0.8732092442855369, 0.9951315477769321, 0.9998167736822628,
                           0.9999931093829134,  0.9999997408709543, 0.9999999902551847, 0.9999999996335361};
  constexpr std::array sin{0.8366556385360561,    0.48734547878715506,   0.09855558136953708,    0.01914207573881962,
                           0.0037123020745218377, 0.0007199013989675836, 0.00013960526684133012, 2.707263661187566e-05};
  const auto scaling = qkv::llama3_scaling({.factor = 8, .original_context = 32});
  REQUIRE(distance(qkv::rope_frequencies(with(scaling, 500000), 16), 21, cos, sin) < 1e-14);
}

TEST_CASE("settings without sense are refused in words", "[rope]") {
  const auto fails = [](const RopeConfig& config, Index head_dim) {
    return message_of([&] { qkv::rope_frequencies(config, head_dim); });
  };
  REQUIRE(contains(fails(with({}), 7), "even"));
  REQUIRE(contains(fails(with({}, 10000, 8), 6), "dim 8, head_dim 6"));
  REQUIRE(contains(fails(with({}, 10000, -2), 6), "dim -2"));
  REQUIRE(contains(fails(with({}, 0), 6), "theta"));
  REQUIRE(contains(fails(with(qkv::linear_scaling(0)), 6), "factor"));
  REQUIRE(contains(fails(with(qkv::ntk_scaling(2)), 2), "dim > 2"));
  REQUIRE(contains(fails(with(qkv::yarn_scaling({.factor = 4})), 6), "original_context"));
  REQUIRE(contains(fails(with(qkv::llama3_scaling({.low_freq_factor = 4})), 6), "high_freq_factor"));
}

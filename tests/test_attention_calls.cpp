// Every spelling of a call of attention(): what may be left out, and what `{}` and braces mean in which place.
#include <qkv/attention.hpp>
#include <qkv/kv_cache.hpp>

#include <cmath>
#include <initializer_list>
#include <optional>

#include "support/attention_case.hpp"

using namespace support;
using qkv::attention, qkv::attention_into, qkv::attention_state, qkv::causal, qkv::full, qkv::plain, qkv::serial;

namespace {

const Case sizes{.n_queries = 3, .n_keys = 7, .heads = {2, 1}, .head_dim = 5, .v_head_dim = 4};
const Inputs<float> in(sizes);
const Heads heads = sizes.heads;
constexpr auto strided = [](const At& at) { return at.key % 2 == 0; };
constexpr auto halved = [](float s, const At&) { return s / 2; };
constexpr auto reversed = [](Index n, const auto& f) {
  while (n-- > 0) f(n);
};

/// All calls gave these bits.
void same(const Matrix<float>& expected, std::initializer_list<Matrix<float>> calls) {
  for (const Matrix<float>& got : calls) {
    CAPTURE(&got - calls.begin());
    CHECK(same_bits(got, expected));
  }
}

/// call(args...) for attention of matrices and of a cache, the _into forms of both, and the state.
#define EVERY_FORM(...)                                                                                 \
  [&] {                                                                                                 \
    qkv::KvCache<float> cache({.kv_heads = 1, .head_dim = 5, .v_head_dim = 4, .capacity = 7});          \
    cache.append(in.k, in.v);                                                                           \
    const Matrix<float> out = attention(in.q, in.k, in.v, __VA_ARGS__);                                 \
    Matrix<float> into(3, 8), of_cache(3, 8);                                                           \
    attention_into(into, in.q, in.k, in.v, __VA_ARGS__);                                                \
    attention_into(of_cache, in.q, cache, __VA_ARGS__);                                                 \
    CHECK(same_bits(into, out));                                                                        \
    CHECK(same_bits(of_cache, out));                                                                    \
    CHECK(same_bits(attention(in.q, cache, __VA_ARGS__), out));                                         \
    CHECK(max_error(attention_state(in.q, in.k, in.v, __VA_ARGS__).finish(), out) <= tolerance<float>); \
    return out;                                                                                         \
  }()

}  // namespace

TEST_CASE("options may follow heads or the mask at once, and `{}` is the default wherever it stands",
          "[attention][calls]") {
  const Options<float> scaled{.scale = 0.5};
  const Matrix<float> plainly = attention(in.q, in.k, in.v, heads, full, plain, Options<float>{}, serial);
  same(plainly,
       {EVERY_FORM(heads), EVERY_FORM(heads, {}), EVERY_FORM(heads, {}, {}), EVERY_FORM(heads, {}, {}, {}),
        EVERY_FORM(heads, {}, {}, {}, {}), EVERY_FORM(heads, Options<float>{}), EVERY_FORM({2, 1}, full, {}, {}),
        EVERY_FORM({.heads = 2, .kv_heads = 1}, full, plain), EVERY_FORM(heads, {}, plain)});
  const Matrix<float> half = attention(in.q, in.k, in.v, heads, full, plain, scaled, serial);
  same(half, {EVERY_FORM(heads, {.scale = 0.5}), EVERY_FORM(heads, scaled), EVERY_FORM({2, 1}, {.scale = 0.5}, serial),
              EVERY_FORM(heads, {.scale = 0.5}, {}), EVERY_FORM(heads, scaled, reversed),
              EVERY_FORM(heads, {}, {.scale = 0.5}), EVERY_FORM(heads, {}, scaled, reversed),
              EVERY_FORM(heads, full, scaled), EVERY_FORM(heads, {}, {}, {.scale = 0.5}),
              EVERY_FORM(heads, {}, {}, scaled, reversed), EVERY_FORM(heads, full, {}, {.scale = 0.5})});
  const Matrix<float> causally = attention(in.q, in.k, in.v, heads, causal, plain, scaled, serial);
  CHECK_FALSE(same_bits(causally, half));
  same(causally,
       {EVERY_FORM(heads, causal, {.scale = 0.5}), EVERY_FORM(heads, causal, scaled),
        EVERY_FORM(heads, causal, {.scale = 0.5}, reversed), EVERY_FORM(heads, causal, scaled, {}),
        EVERY_FORM(heads, causal, {}, {.scale = 0.5}), EVERY_FORM(heads, causal, plain, {.scale = 0.5}, reversed)});
  const Matrix<float> own = attention(in.q, in.k, in.v, heads, strided, halved, Options<float>{}, serial);
  same(own, {EVERY_FORM(heads, strided, halved), EVERY_FORM(heads, strided, halved, {}),
             EVERY_FORM(heads, strided, halved, {}, reversed)});
  same(attention(in.q, in.k, in.v, heads, full, halved),
       {EVERY_FORM(heads, {}, halved), EVERY_FORM(heads, {}, halved, {})});
  CHECK(same_bits(attention(in.q, in.q, in.q), attention(in.q, in.q, in.q, {})));
}

TEST_CASE("a scale of 0 is no scale: 1/sqrt(head_dim)", "[attention][calls]") {
  const Matrix<float> plainly = attention(in.q, in.k, in.v, heads);
  same(plainly,
       {EVERY_FORM(heads, {.scale = 0}), EVERY_FORM(heads, {.scale = {}}), EVERY_FORM(heads, {.scale = std::nullopt})});
  CHECK(max_error(attention(in.q, in.k, in.v, heads, {.scale = 1 / std::sqrt(5.0)}), plainly) <= tolerance<float>);
}

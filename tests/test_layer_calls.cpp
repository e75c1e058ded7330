#include <qkv/embedding.hpp>
#include <qkv/explain.hpp>
#include <qkv/multi_head_attention.hpp>
#include <qkv/paged_cache.hpp>
#include <qkv/position.hpp>
#include <qkv/ring_cache.hpp>
#include <qkv/saved_cache.hpp>

#include <algorithm>
#include <array>
#include <sstream>
#include <stdexcept>
#include <thread>

#include "support/catch.hpp"
#include "support/executors.hpp"
#include "support/layers.hpp"

using namespace support;

TEST_CASE("what a call asks of its operands, it says before it writes", "[layer]") {
  const auto layer = multi_head_layer<float>(small_gqa);
  const Matrix<float> x = normals<float>(4, 23, 1);
  auto cache = layer.make_cache(6);
  layer.forward(x.topRows(3), cache);
  const Matrix<float> held = cache.keys();
  Matrix<float> out = Matrix<float>::Constant(4, 23, 7);
  const auto complains = [&](const std::string& text, const std::string& part) {
    CAPTURE(text);
    return contains(text, part) && (out.array() == 7).all() && cache.rows() == 3 && same_bits(cache.keys(), held);
  };
  CHECK(complains(message_of([&] { layer.forward_into(out, x.leftCols(22), cache); }), "model_dim 23]; given [4, 22]"));
  CHECK(complains(message_of([&] { layer.forward_into(out.topRows(3), x, cache); }),
                  "out must be [4, 23]; given [3, 23]"));
  CHECK(complains(message_of<std::length_error>([&] { layer.forward_into(out, x, cache); }),
                  "at most 3 more rows (position 3); given 4"));
  for (const auto& [kv_heads, head_dim, v_head_dim] : {std::array{3, 10, 7}, {2, 9, 7}, {2, 10, 8}}) {
    qkv::KvCache<float> odd({.kv_heads = kv_heads, .head_dim = head_dim, .v_head_dim = v_head_dim, .capacity = 6});
    CHECK(complains(message_of([&] { layer.forward_into(out, x, odd); }),
                    "the cache must have kv_heads 2, head_dim 10, v_head_dim 7; it has " + std::to_string(kv_heads) +
                        ", " + std::to_string(head_dim) + ", " + std::to_string(v_head_dim)));
    CHECK(odd.rows() == 0);
  }
}

namespace {

template <class Cache>
std::string saved(const Cache& cache) {
  std::ostringstream out;
  qkv::save_cache(out, cache);
  return out.str();
}

float fails_at_six(float s, const At& at) {
  if (at.key_position == 6) throw std::runtime_error("a score that fails");
  return s;
}

}  // namespace

TEST_CASE("a call that fails half way leaves its caches as they were", "[layer]") {
  const auto layer = multi_head_layer<float>(small_gqa);
  const Matrix<float> x = normals<float>(9, 23, 1), prompt = x.topRows(4), more = x.bottomRows(5);
  const auto check = [&](auto cache, auto other) {
    std::array<decltype(&cache), 2> both = {&cache, &other};
    const Index offsets[] = {0, 2, 5};
    layer.forward(prompt, cache), layer.forward(x, other);
    const std::string before = saved(cache), other_before = saved(other);
    CHECK(message_of<std::runtime_error>([&] { layer.forward(more, cache, qkv::causal, fails_at_six); }) ==
          "a score that fails");
    CHECK(saved(cache) == before);
    Matrix<float> out(5, 23);
    CHECK(message_of<std::runtime_error>([&] {
            layer.forward_into(out, more, std::span<const Index>(offsets), std::span<decltype(&cache) const>(both),
                               qkv::causal, fails_at_six);
          }) == "a score that fails");
    CHECK(saved(cache) == before);
    CHECK(saved(other) == other_before);
    auto twin = layer.make_cache(9);
    layer.forward(prompt, twin);
    CHECK(same_bits(layer.forward(more, cache), layer.forward(more, twin)));
  };
  check(layer.make_cache(9), layer.make_cache(12));
  const qkv::RingCacheConfig ring{.kv_heads = 2, .head_dim = 10, .v_head_dim = 7, .window = 12};
  check(qkv::RingCache<float>(ring), qkv::RingCache<float>(ring));
  qkv::PagePool<float> pool({.kv_heads = 2, .head_dim = 10, .v_head_dim = 7, .page_tokens = 2, .pages = 14});
  check(qkv::PagedCache<float>(pool), qkv::PagedCache<float>(pool));
  CHECK(pool.free_pages() == 14);

  // A ring gets back what the call had overwritten.
  qkv::RingCache<float> narrow({.kv_heads = 2, .head_dim = 10, .v_head_dim = 7, .window = 2});
  layer.forward(prompt, narrow);
  const std::string before = saved(narrow);
  CHECK(message_of<std::runtime_error>([&] { layer.forward(more, narrow, qkv::causal, fails_at_six); }) ==
        "a score that fails");
  CHECK(saved(narrow) == before);
}

TEST_CASE("x and out may be column blocks of one buffer, but share no element", "[layer]") {
  const auto layer = multi_head_layer<float>(small_gqa);
  const Matrix<float> x = normals<float>(5, 23, 2);
  auto cache = layer.make_cache(20);
  const Matrix<float> expected = layer.forward(x, cache);

  Matrix<float> buffer = Matrix<float>::Constant(7, 60, 7);
  buffer.block(1, 3, 5, 23) = x;
  cache.clear();
  layer.forward_into(buffer.block(1, 30, 5, 23), buffer.block(1, 3, 5, 23), cache);
  CHECK(same_bits(buffer.block(1, 30, 5, 23), expected));
  CHECK(same_bits(buffer.block(1, 3, 5, 23), x));
  buffer.block(1, 30, 5, 23).setConstant(7), buffer.block(1, 3, 5, 23).setConstant(7);
  CHECK((buffer.array() == 7).all());

  buffer.setConstant(1);
  for (const Index column : {3, 2, 25}) {
    CHECK(contains(
        message_of([&] { layer.forward_into(buffer.block(1, column, 5, 23), buffer.block(1, 3, 5, 23), cache); }),
        "must not share elements with the input x"));
    CHECK(cache.rows() == 5);
    CHECK((buffer.array() == 1).all());
  }
}

TEST_CASE("an output may lie upside down, but its rows share no element, wherever one is written", "[layer]") {
  constexpr Index n = 4;
  const auto gqa = multi_head_layer<float>(small_gqa);
  const auto mla = latent_layer<float>(small_mla);
  const Matrix<float> x = normals<float>(n, 23, 1), y = normals<float>(n, 29, 2), q = normals<float>(n, 12, 3),
                      k = normals<float>(n, 6, 4), v = normals<float>(n, 10, 5);
  const auto held = gqa.make_cache(9);
  const auto held_mla = mla.make_cache(9);
  qkv::KvCache<float> keys({.kv_heads = 2, .head_dim = 3, .v_head_dim = 5, .capacity = n});
  keys.append(k, v);
  const std::vector<Index> offsets = {0, 1, n};
  const std::vector<std::int32_t> ids = {3, 0, 1, 1};
  const qkv::LearnedPositions<float> learned(normals<float>(n, 12, 6));
  const qkv::Rope<float> rope(half_split, 6);
  const RowVector<float> gain = random_gain<float>(12, 7);
  const Matrix<float> table = normals<float>(7, 12, 8), cos = normals<float>(n, 3, 9), sin = normals<float>(n, 3, 10);

  /// call(out) for outputs of any stride, each compared with a plain one.
  const auto hold = [&](const char* name, Index cols, const auto& call) {
    Matrix<float> expected(n, cols);
    call(qkv::writable_view(expected));
    for (Index stride = -cols - 2; stride <= cols + 2; ++stride) {
      CAPTURE(name, stride);
      std::vector<float> buffer(static_cast<std::size_t>(2 * n * (cols + 2)), 7.5F);
      const qkv::View<float> out(buffer.data() + n * (cols + 2), n, cols, Eigen::OuterStride<>(stride));
      const std::string text = message_of([&] { call(out); });
      if (std::abs(stride) >= cols) {
        REQUIRE(text == "");
        REQUIRE(same_bits(out, expected));
      } else {
        REQUIRE(contains(text, "the rows of an output must not share elements"));
        REQUIRE(std::all_of(buffer.begin(), buffer.end(), [](float b) { return b == 7.5F; }));
      }
    }
  };
  using Out = qkv::View<float>;
  hold("attention", 20, [&](Out out) { qkv::attention_into(out, q, k, v, {4, 2}, qkv::causal); });
  hold("attention to a cache", 20, [&](Out out) { qkv::attention_into(out, q, keys, {4, 2}, qkv::causal); });
  const auto one = [&](const auto& layer, const auto& input, const auto& empty) {
    return [&](Out out) {
      auto cache = empty;
      try {
        layer.forward_into(out, input, cache);
      } catch (const std::invalid_argument&) {
        CHECK(cache.position() == 0);
        throw;
      }
    };
  };
  const auto batch = [&](const auto& layer, const auto& input, const auto& empty) {
    return [&](Out out) {
      std::vector caches(2, empty);
      const std::vector both = {&caches[0], &caches[1]};
      try {
        layer.forward_into(out, input, offsets, both);
      } catch (const std::invalid_argument&) {
        CHECK(caches[0].position() + caches[1].position() == 0);
        throw;
      }
    };
  };
  hold("layer", 23, one(gqa, x, held));
  hold("batch", 23, batch(gqa, x, held));
  hold("latent layer", 29, one(mla, y, held_mla));
  hold("latent batch", 29, batch(mla, y, held_mla));
  hold("rms_norm", 12, [&](Out out) { qkv::rms_norm_into(out, q, gain, 1e-6); });
  hold("layer_norm", 12, [&](Out out) { qkv::layer_norm_into(out, q, gain, gain, 1e-6); });
  hold("rope", 12, [&](Out out) { rope.apply_into(out, q, 2, Index{5}); });
  hold("rope, positions", 12, [&](Out out) { rope.apply_into(out, q, 2, std::array<Index, n>{7, 3, 2, 9}); });
  hold("rope, tables", 12, [&](Out out) { qkv::apply_rope_into(out, q, 2, cos, sin, qkv::Pairing::half_split); });
  hold("rope, in place", 12, [&](Out out) {
    if (std::abs(out.outerStride()) >= 12) out = q;
    rope.shift_in_place(out, 2, 3);
  });
  hold("positions", 12, [&](Out out) { learned.forward_into(out, q); });
  hold("positions, by row", 12, [&](Out out) { learned.forward_into(out, q, std::array<Index, n>{3, 0, 0, 1}); });
  hold("embedding", 12, [&](Out out) { qkv::embed_into(out, table, ids); });
  hold("logits", 7, [&](Out out) { qkv::Embedding<float>(table).logits_into(out, q); });
  hold("projection", 23, [&](Out out) { gqa.weights().output.forward_into(out, normals<float>(n, 42, 11)); });
}

TEST_CASE("{} in an argument's place is that argument's default", "[layer]") {
  const auto gqa = multi_head_layer<float>(small_gqa);
  const auto mla = latent_layer<float>(small_mla);
  const std::vector<Index> offsets = {0, 2, 5};
  const auto check = [&](const auto& layer, const Matrix<float>& x) {
    const auto held = layer.make_cache(9);
    const Matrix<float> expected = layer.forward(x, qkv::causal);
    CHECK_FALSE(same_bits(expected, layer.forward(x, qkv::full)));
    CHECK(same_bits(layer.forward(x, {}), expected));
    CHECK(same_bits(layer.forward(x, {}, {}, {}), expected));
    CHECK(same_bits(layer.forward(x, {}, {}, {}, {}), expected));
    auto cache = held, other = held;
    const Matrix<float> through = layer.forward(x, cache, qkv::causal);
    CHECK(same_bits(layer.forward(x, other, {}, {}, {}, {}), through));
    Matrix<float> out(x.rows(), x.cols());
    layer.forward_into(out, x, other = held, {}, {}, {}, {});
    CHECK(same_bits(out, through));
    std::vector caches(4, held);
    const std::vector first = {&caches[0], &caches[1]}, second = {&caches[2], &caches[3]};
    Matrix<float> batch(x.rows(), x.cols());
    layer.forward_into(batch, x, offsets, first, qkv::causal);
    layer.forward_into(out, x, offsets, second, {}, {}, {}, {});
    CHECK(same_bits(out, batch));
  };
  check(gqa, normals<float>(5, 23, 1));
  check(mla, normals<float>(5, 29, 2));
  const Matrix<float> q = normals<float>(4, 23, 3), k = normals<float>(7, 23, 4);
  CHECK(same_bits(gqa.forward(q, k, k, {}, {}, {}, {}), gqa.forward(q, k, k)));
  CHECK(same_bits(qkv::attention(q, k, k, {}, {}, {}, {}, {}), qkv::attention(q, k, k)));
  CHECK(same_bits(qkv::attention_weights(q, k, {}, {}, {}, {}, {}), qkv::attention_weights(q, k)));
  CHECK(qkv::attention_weights(q, k).row(1).sum() > 0.999F);
  CHECK(same_bits(qkv::attention_state(q, k, k, {}, {}, {}, {}, {}).maximum, qkv::attention_state(q, k, k).maximum));
  CHECK(qkv::explain(q, k, k, {}, {}, {}, {}).text() == qkv::explain(q, k, k).text());
}

TEST_CASE("options may follow the operands at once", "[layer]") {
  const std::vector<Index> offsets = {0, 2, 5};
  // An option that changes bits, whether it comes after a mask and a score or without them.
  const auto check = [&](const auto& layer, const Matrix<float>& x, const qkv::LayerOptions& options) {
    const auto held = layer.make_cache(9);
    CHECK(same_bits(layer.forward(x, options), layer.forward(x, qkv::causal, qkv::plain, options)));
    CHECK(same_bits(layer.forward(x, options, threaded(2)), layer.forward(x, qkv::causal, qkv::plain, options)));
    auto a = held, b = held;
    const Matrix<float> expected = layer.forward(x, a, qkv::causal, qkv::plain, options);
    CHECK(same_bits(layer.forward(x, b, options), expected));
    Matrix<float> out(x.rows(), x.cols());
    layer.forward_into(out, x, b = held, options, threaded(2));
    CHECK(same_bits(out, expected));
    CHECK_FALSE(same_bits(layer.forward(x, b = held), expected));
    std::vector caches(4, held);
    const std::vector first = {&caches[0], &caches[1]};
    const std::array second = {&caches[2], &caches[3]};
    const Matrix<float> batch = layer.forward(x, offsets, first, options);
    layer.forward_into(out, x, offsets, second, qkv::causal, qkv::plain, options);
    CHECK(same_bits(out, batch));
    CHECK(same_bits(layer.forward(x.topRows(2), a = held, options), batch.topRows(2)));
    CHECK(same_bits(layer.forward(x.bottomRows(3), a = held, options), batch.bottomRows(3)));
  };
  check(multi_head_layer<float>(small_gqa), normals<float>(5, 23, 1), {.kernel = qkv::Kernel::tiled});
  check(latent_layer<float>(small_mla), normals<float>(5, 29, 2), {.form = qkv::LatentForm::absorbed});
  const auto gqa = multi_head_layer<float>(small_gqa);
  const Matrix<float> q = normals<float>(4, 23, 3), k = normals<float>(7, 23, 4);
  CHECK(same_bits(gqa.forward(q, k, k, {.kernel = qkv::Kernel::reference}),
                  gqa.forward(q, k, k, qkv::full, qkv::plain, {.kernel = qkv::Kernel::reference})));
}

TEST_CASE("what a layer or a cache has no use for in options is refused, and nothing has changed", "[layer]") {
  const qkv::LayerOptions form{.form = qkv::LatentForm::absorbed}, shared{.share_prefixes = true};
  const auto gqa = multi_head_layer<float>(small_gqa);
  const auto mla = latent_layer<float>(small_mla);
  const Matrix<float> x = normals<float>(5, 23, 1), y = normals<float>(5, 29, 2);
  auto kept = gqa.make_cache(9);
  auto ring = gqa.make_ring_cache({.window = 3});
  auto pool = gqa.make_page_pool({.page_tokens = 2, .pages = 9});
  auto paged = gqa.make_paged_cache(pool);
  auto latent = mla.make_cache(9);
  auto latent_pool = mla.make_page_pool({.page_tokens = 2, .pages = 9});
  auto paged_latent = mla.make_paged_cache(latent_pool);
  const std::string no_form = "LayerOptions::form is of latent attention", no_share = "LayerOptions::share_prefixes";
  CHECK(contains(message_of([&] { gqa.forward(x, form); }),
                 no_form + "; a MultiHeadAttention needs automatic; given absorbed"));
  CHECK(contains(message_of([&] { gqa.forward(x, x, x, form); }), no_form));
  CHECK(contains(message_of([&] { gqa.forward(x, kept, form); }), no_form));
  CHECK(contains(message_of([&] { gqa.forward(x, paged, form); }), no_form));
  CHECK(contains(message_of([&] { gqa.forward(x, shared); }), no_share));
  CHECK(contains(message_of([&] { gqa.forward(x, kept, shared); }), no_share + " needs caches whose pages"));
  CHECK(contains(message_of([&] { gqa.forward(x, ring, shared); }), no_share));
  CHECK(contains(message_of([&] { mla.forward(y, shared); }), no_share + " is of a MultiHeadAttention"));
  CHECK(contains(message_of([&] { mla.forward(y, latent, shared); }), no_share));
  CHECK(contains(message_of([&] { mla.forward(y, paged_latent, shared); }), no_share));
  CHECK(kept.rows() + ring.rows() + paged.rows() + latent.rows() + paged_latent.rows() == 0);
  CHECK(same_bits(gqa.forward(x, paged, shared), gqa.forward(x, kept)));  // alone there is nothing to share
}

TEST_CASE("caches and pools that a layer makes are of its sizes", "[layer]") {
  const auto gqa = multi_head_layer<float>(small_gqa);
  const auto mla = latent_layer<float>(small_mla);
  auto ring = gqa.make_ring_cache<std::int8_t>({.window = 5, .pinned = 2, .slack = 3, .positions_in_cache = true});
  CHECK(std::tuple(ring.kv_heads(), ring.head_dim(), ring.v_head_dim()) == std::tuple(2, 10, 7));
  CHECK(std::tuple(ring.window(), ring.pinned(), ring.slack(), ring.positions_in_cache()) == std::tuple(5, 2, 3, true));
  auto pool = gqa.make_page_pool<qkv::half>({.page_tokens = 3, .pages = 4});
  CHECK(std::tuple(pool.kv_heads(), pool.head_dim(), pool.v_head_dim()) == std::tuple(2, 10, 7));
  auto paged = gqa.make_paged_cache(pool);
  CHECK(std::tuple(paged.capacity(), paged.page_tokens()) == std::tuple(12, 3));
  auto latent_pool = mla.make_page_pool<qkv::bfloat16>({.page_tokens = 3, .pages = 5});
  CHECK(std::tuple(latent_pool.latent_dim(), latent_pool.rope_dim()) == std::tuple(19, 6));
  CHECK(mla.make_paged_cache(latent_pool).capacity() == 15);
  CHECK(contains(message_of([&] { gqa.make_ring_cache({.kv_heads = 2, .window = 5}); }),
                 "are the layer's: leave them out"));
  CHECK(contains(message_of([&] { gqa.make_page_pool({.head_dim = 10, .pages = 5}); }), "given 1, 10, 10"));
  CHECK(contains(message_of([&] { mla.make_page_pool({.rope_dim = 6, .pages = 5}); }), "given 0, 6"));
  qkv::PagePool<float> other({.kv_heads = 2, .head_dim = 10, .v_head_dim = 8, .pages = 4});
  qkv::LatentPagePool<float> other_latents({.latent_dim = 19, .rope_dim = 8, .pages = 4});
  CHECK(contains(message_of([&] { (void)gqa.make_paged_cache(other); }), "it has 2, 10, 8"));
  CHECK(contains(message_of([&] { (void)mla.make_paged_cache(other_latents); }), "it has 19 and 8"));
}

TEST_CASE("both layers say their sizes and give every step, on any executor", "[layer]") {
  const auto gqa = multi_head_layer<float>(small_gqa, true);
  LatentAttentionConfig config = small_mla;
  config.q_latent_dim = 8;
  const auto mla = latent_layer<float>(config);
  const Matrix<float> x = normals<float>(40, 23, 1), y = normals<float>(40, 29, 2);
  const auto threads = threaded(3);
  CHECK(std::tuple(gqa.heads().heads, gqa.heads().kv_heads, gqa.head_dim(), gqa.v_head_dim()) ==
        std::tuple(6, 2, 10, 7));
  CHECK(std::tuple(mla.heads().heads, mla.heads().kv_heads, mla.head_dim(), mla.v_head_dim()) ==
        std::tuple(3, 3, 17, 9));
  CHECK(gqa.rope()->head_dim() == 10);
  CHECK(mla.rope()->head_dim() == 6);

  // With the scale that it says, the steps give the layer.
  const RowVector<float>& sinks = gqa.weights().sinks;
  const std::span<const float> logits(sinks.data(), 6);
  const Matrix<float> context =
      qkv::attention(gqa.queries(x, 0, threads), gqa.keys(x, 0, threads), gqa.values(x, threads), gqa.heads(),
                     qkv::causal, qkv::plain, {.scale = gqa.scale(), .sinks = logits});
  CHECK(same_bits(gqa.output(context, threads), gqa.forward(x)));

  const Matrix<float> latents = mla.latents(y, 0, threads), c = latents.leftCols(19);
  CHECK(same_bits(latents, mla.latents(y)));
  CHECK(same_bits(mla.queries(y, 3, threads), mla.queries(y, 3)));
  const Matrix<float> nope = mla.restored_keys(c, threads), v = mla.restored_values(c, threads);
  Matrix<float> k(40, 3 * 17);
  for (Index h = 0; h < 3; ++h) k.middleCols(17 * h, 17) << nope.middleCols(11 * h, 11), latents.rightCols(6);
  const Matrix<float> out = mla.output(
      qkv::attention(mla.queries(y), k, v, mla.heads(), qkv::causal, qkv::plain, {.scale = mla.scale()}), threads);
  CHECK(max_error(out, latent_by_formula(mla, y)) <= layer_tolerance<float>);
  CHECK(max_error(mla.forward(y), out) <= layer_tolerance<float>);
}

TEST_CASE("an output over an input that lies upside down is refused", "[layer]") {
  Matrix<float> buffer = normals<float>(9, 12, 1);
  const Matrix<float> before = buffer;
  const auto gqa = multi_head_layer<float>(small_gqa);
  const qkv::Rope<float> rope(half_split, 6);
  const RowVector<float> gain = random_gain<float>(12, 2);
  const qkv::ConstView<float> down(buffer.row(7).data(), 4, 12, Eigen::OuterStride<>(-12));  // rows 7, 6, 5, 4
  for (Index first = 0; first <= 5; ++first) {
    CAPTURE(first);
    auto out = qkv::writable_view(buffer.middleRows(first, 4));
    const auto refused = [&](const auto& call) {
      const bool said = contains(message_of(call), "share");
      const bool right = said == (first > 0) && (!said || same_bits(buffer, before));
      buffer = before;
      return right;
    };
    CHECK(refused([&] { qkv::attention_into(out, before.topRows(4), down, before.topRows(4), {2, 2}); }));
    CHECK(refused([&] { qkv::attention_into(out, down, before.topRows(4), before.topRows(4), {2, 2}); }));
    CHECK(refused([&] { qkv::rms_norm_into(out, down, gain, 1e-6); }));
    CHECK(refused([&] { rope.apply_into(out, down, 2, Index{3}); }));
  }
  Matrix<float> wide = normals<float>(8, 23, 3);
  const qkv::ConstView<float> x(wide.row(7).data(), 4, 23, Eigen::OuterStride<>(-23));
  auto cache = gqa.make_cache(9), other = gqa.make_cache(9);
  CHECK(contains(message_of([&] { gqa.forward_into(wide.middleRows(1, 4), x, cache); }), "share"));
  const Matrix<float> expected = gqa.forward(Matrix<float>(x), cache);
  gqa.forward_into(wide.topRows(4), x, other);
  CHECK(same_bits(wide.topRows(4), expected));
}

TEST_CASE("a layer refuses an output that its mask or score still reads", "[layer]") {
  const auto layer = multi_head_layer<float>(small_gqa);
  const Matrix<float> x = normals<float>(5, 23, 2);
  auto cache = layer.make_cache(20);
  Matrix<float> out = Matrix<float>::Constant(5, 23, 7);
  const auto added = out.leftCols(5);  // [n_queries, n_keys]
  const auto text = message_of([&] { layer.forward_into(out, x, cache, qkv::causal, qkv::bias(added)); });
  CHECK(contains(text, "must not share elements with the operand of a bias"));
  CHECK(cache.rows() == 0);
  CHECK((out.array() == 7).all());
}

TEST_CASE("a const layer serves two threads at once", "[layer]") {
  auto prepared = multi_head_layer<float>(small_gqa, true);
  prepared.reserve_positions(40);
  const auto& layer = prepared;
  const Matrix<float> a = normals<float>(90, 23, 3), b = normals<float>(90, 23, 4);
  const auto run = [&](const Matrix<float>& x) {
    auto cache = layer.make_cache(90);
    return feed(layer, cache, x, {31, 1, 1, 5, 8});
  };
  const Matrix<float> alone_a = run(a), alone_b = run(b);
  for (int round = 0; round < 5; ++round) {
    Matrix<float> of_a, of_b;
    std::thread first([&] { of_a = run(a); }), second([&] { of_b = run(b); });
    first.join(), second.join();
    CHECK(same_bits(of_a, alone_a));
    CHECK(same_bits(of_b, alone_b));
  }
}

TEST_CASE("an executor changes no bit of a layer", "[layer]") {
  const auto layer = multi_head_layer<float>(small_gqa, true);
  const Matrix<float> x = normals<float>(140, 23, 5);
  const auto run = [&](const auto& executor) {
    auto cache = layer.make_cache(140);
    return feed(layer, cache, x, {130, 1, 2}, qkv::causal, qkv::plain, qkv::LayerOptions{}, executor);
  };
  const Matrix<float> expected = run(qkv::serial);
  CHECK(same_bits(run(threaded(3)), expected));
  CHECK(same_bits(run(shuffled(1)), expected));
  CHECK(same_bits(layer.forward(x, qkv::causal, qkv::plain, {}, threaded(2)), layer.forward(x)));
}

TEST_CASE("a layer may keep its weights narrow", "[layer]") {
  const auto exact = multi_head_layer<float>(small_gqa, true);
  const auto& w = exact.weights();
  const auto narrow = w.stored_as<qkv::bfloat16>();
  const auto rounded = [](const qkv::Projection<float>& p) {
    return qkv::Projection<float>(p.weight().cast<qkv::bfloat16>().cast<float>(), p.bias());
  };
  CHECK(narrow.query.bytes() * 2 == w.query.bytes());
  const MultiHeadAttention<float> layer(small_gqa, narrow),
      wide(small_gqa,
           {rounded(w.query), rounded(w.key), rounded(w.value), rounded(w.output), w.query_norm, w.key_norm, w.sinks});
  const Matrix<float> x = normals<float>(60, 23, 6);
  CHECK(same_bits(layer.forward(x), wide.forward(x)));
  auto cache = layer.make_cache(60), other = layer.make_cache(60);
  const qkv::LayerOptions options{.kernel = qkv::Kernel::tiled};
  CHECK(same_bits(feed(layer, cache, x, {31, 1, 1, 5}, qkv::causal, qkv::plain, options),
                  layer.forward(x, other, qkv::causal, qkv::plain, options, threaded(3))));
}

#include <qkv/explain.hpp>
#include <qkv/explain_layer.hpp>

#include "support/attention_case.hpp"
#include "support/key_source.hpp"
#include "support/layers.hpp"

using namespace support;
using namespace qkv;

namespace {

const Heads heads{8, 2};
const Matrix<float> q = Matrix<float>::Zero(1000, 8 * 24), k = Matrix<float>::Zero(1300, 2 * 24),
                    v = Matrix<float>::Zero(1300, 2 * 40);

Index blocks(const Explanation& e) { return e.blocks_all + e.blocks_some + e.blocks_none; }

}  // namespace

TEST_CASE("explain names the kernel that the rule picks, and why", "[explain]") {
  const auto e = explain(q, k, v, heads, causal);
  CHECK(e.kernel == choose_kernel<float>(Kernel::automatic, 1000));
  CHECK(e.kernel == Kernel::tiled);
  CHECK(e.why == "1000 queries > 8");
  CHECK(explain(q.topRows(3), k, v, heads).kernel == Kernel::decode);
  CHECK(explain(q.topRows(3), k, v, heads).why == "3 queries <= 8");
  const auto later = explain(q.topRows(3), k.bottomRows(500), v.bottomRows(500), heads, causal, plain,
                             {.first_position = 0, .first_key_position = k.rows() - 500});
  CHECK(later.blocks_none > 0);
  CHECK(later.blocks_all + later.blocks_some == 0);
  const auto asked = explain(q, k, v, heads, causal, plain, {.kernel = Kernel::reference});
  CHECK(asked.kernel == Kernel::reference);
  CHECK(asked.why == "forced by options.kernel");
  const Matrix<long double> wide = Matrix<long double>::Zero(9, 4);
  CHECK(explain(wide, wide, wide).kernel == Kernel::reference);
  CHECK(explain(wide, wide, wide).why == "the scalar is neither float nor double");
}

TEST_CASE("explain says in which numbers a narrow cache is multiplied", "[explain]") {
  const PagedKeys<std::int8_t> int8(k, v, 2, consecutive_pages(1300, {100}));
  const PagedKeys<bfloat16> bf16(k, v, 2, consecutive_pages(1300, {100}));
  const bool in_bf16 = kernel::Isa::bf16_products, in_int8 = kernel::Isa::int8_products;
  const bool in_int16 = kernel::Isa::int16_products && !in_int8;
  const auto multiplied = [&](const char* how, Arithmetic arithmetic) {
    return contains(explain(q, int8, heads, causal, plain, {.arithmetic = arithmetic}).text(), how);
  };
  CHECK(multiplied("int8 keys multiplied in int8, values in bf16;", Arithmetic::automatic) == (in_int8 && in_bf16));
  CHECK(multiplied("int8 keys multiplied in int8, values in int16;", Arithmetic::automatic) == (in_int8 && !in_bf16));
  CHECK(multiplied("int8 keys multiplied in int16;", Arithmetic::automatic) == in_int16);
  CHECK(multiplied("int8 keys;", Arithmetic::exact));
  CHECK(multiplied("int8 keys multiplied in int8;", Arithmetic::int8) == in_int8);
  CHECK(multiplied("int8 keys multiplied in int16;", Arithmetic::int8) == in_int16);
  CHECK(contains(explain(q, bf16, heads).text(), "bf16 keys multiplied in bf16;") == in_bf16);
  CHECK(contains(explain(q, bf16, heads, causal, plain, {.arithmetic = Arithmetic::exact}).text(), "bf16 keys;"));
  CHECK(contains(explain(q.topRows(1), bf16, heads).text(), "bf16 keys;"));
  const std::string decoded = kernel::NarrowDot<float, std::int8_t>::name;
  CHECK(contains(explain(q.topRows(1), int8, heads).text(), "int8 keys" + decoded + ";"));
  CHECK(contains(explain(q.topRows(1), int8, heads, causal, plain, {.arithmetic = Arithmetic::exact}).text(),
                 "int8 keys;"));
  CHECK(contains(explain(q, k, v, heads).text(), "f32 keys;"));
}

TEST_CASE("explain counts flops, bytes and scratch as the definition does", "[explain]") {
  const auto e = explain(q, k, v, heads);
  CHECK(e.flops == 2.0 * 1000 * 1300 * 8 * (24 + 40));
  CHECK(e.bytes == 4.0 * (1000 * 8 * (24 + 40) + 1300 * 2 * (24 + 40)));
  CHECK(e.workspace_bytes == required_bytes<float>(Kernel::automatic, 1000, 1300, heads, 24, 40));
  CHECK(e.n_queries == 1000);
  CHECK(e.n_keys == 1300);
  CHECK(e.head_dim == 24);
  CHECK(e.v_head_dim == 40);
  CHECK(std::string(e.storage) == "f32");

  const PagedKeys<std::int8_t> cache(k, v, 2, consecutive_pages(1300, {100}));
  const auto c = explain(q, cache, heads);
  CHECK(std::string(c.storage) == "int8");
  CHECK(c.bytes == 4.0 * 1000 * 8 * (24 + 40) + 1300.0 * 2 * (24 + 4 + 40 + 4));
  CHECK(c.flops == e.flops);
}

TEST_CASE("explain counts the blocks that are skipped", "[explain]") {
  const auto all = explain(q, k, v, heads);
  CHECK(all.blocks_all == blocks(all));
  CHECK(blocks(all) > 0);

  const auto half = explain(q.topRows(1000), k.topRows(1000), v.topRows(1000), heads, causal);
  const double useful = 1000.0 * 1001 * 8 * (24 + 40);
  CHECK(half.blocks_none > 0);
  CHECK(half.blocks_some > 0);
  CHECK(half.blocks_all > 0);
  CHECK(half.flops >= useful);
  CHECK(half.flops < 1.5 * useful);
  CHECK(blocks(half) == blocks(explain(q, k.topRows(1000), v.topRows(1000), heads)));

  const auto none = explain(q, k, v, heads, causal, plain, {.first_position = -5000});
  CHECK(none.blocks_none == blocks(none));
  CHECK(none.flops == 0);

  // A predicate says nothing of blocks.
  const auto unknown = explain(q, k, v, heads, [](const At&) { return false; });
  CHECK(unknown.blocks_some == blocks(unknown));
  CHECK(unknown.flops == all.flops);
}

TEST_CASE("explain prints one line", "[explain]") {
  const std::string text = explain(q, k, v, heads, causal).text();
  for (const char* part : {"tiled kernel (1000 queries > 8)", "1000 queries x 1300 keys", "8/2 heads of 24/40",
                           "f32 keys", "% skipped", "Gflop", "MB", "kB scratch", isa_name})
    CHECK(contains(text, part));
  CHECK(!contains(text, "\n"));
  CHECK(contains(text, "WARNING: built for plain SSE2") == (std::string(isa_name) == "sse2"));
}

TEST_CASE("explain takes calls of any size", "[explain]") {
  CHECK(blocks(explain(q.topRows(0), k, v, heads)) == 0);
  CHECK(blocks(explain(q, k.topRows(0), v.topRows(0), heads)) == 0);
  CHECK(contains(explain(q, k.topRows(0), v.topRows(0), heads).text(), "(0% skipped)"));
}

TEST_CASE("no queries of any number of heads are explained, and their weights given, at once", "[explain]") {
  const Matrix<float> none(0, 0);
  const Heads absurd{Index{1} << 60, 1};
  CHECK(explain(none, none, none, absurd).flops == 0);
  CHECK(attention_weights(none, none, absurd).size() == 0);
  CHECK(attention(none, none, none, absurd).size() == 0);
}

TEST_CASE("explain refuses what the call would refuse", "[explain]") {
  const std::vector<Index> ids = {0, 0, 1}, two = {1, 2}, offsets = {0, 1000};
  const std::vector<float> sinks = {1};
  CHECK(contains(message_of([&] { explain(q, k, v, heads, documents(ids)); }), "an id for every position"));
  CHECK(contains(message_of([&] { explain(q, k, v, heads, causal & lengths(two)); }), "one length per sequence"));
  CHECK(contains(message_of([&] { explain(q, k, v, heads, lengths({})); }), "one length per sequence"));
  const Matrix<float> added(3, 3);
  CHECK(contains(message_of([&] { explain(q, k, v, heads, full, bias(added)); }), "a bias must be"));
  CHECK(contains(message_of([&] { explain(q, k, v, heads, full, plain, {.sinks = sinks}); }), "sinks needs one logit"));
  CHECK(contains(message_of([&] { explain(q, k, v, {4, 2}); }), "q must have heads*head_dim columns"));
  CHECK(contains(message_of([&] { explain(q, k, v, {8, 3}); }), "positive multiple"));
  CHECK(
      contains(message_of([&] { explain(q, k, v, heads, full, plain, {.query_offsets = offsets}); }), "one sequence"));
  CHECK(contains(message_of([&] { explain(q, k, v, heads, full, plain, {.key_offsets = offsets}); }), "one sequence"));
}

TEST_CASE("explain says of a layer what it projects, in which form, by which kernel and in which numbers",
          "[explain]") {
  const auto gqa = multi_head_layer<float>(small_gqa);
  LatentAttentionConfig config = small_mla;
  config.q_latent_dim = 8;
  const auto mla = latent_layer<float>(config);
  const auto keys = gqa.make_cache<std::int8_t>(70);
  const auto latents = mla.make_cache<bfloat16>(70);

  const auto e = explain(gqa, 40, keys);
  CHECK(e.projections == "23 -> 60, 23 -> 20, 23 -> 14, 42 -> 23");
  CHECK(e.weight_bytes == gqa.weights().query.bytes() + gqa.weights().key.bytes() + gqa.weights().value.bytes() +
                              gqa.weights().output.bytes());
  CHECK(e.form == LatentForm::automatic);
  CHECK(e.n_keys == 40);
  CHECK(contains(e.text(), "tiled kernel (40 queries > 8), " + std::string(isa_name) + "; int8 rows"));
  CHECK(std::string(explain(gqa, 40, keys, {.arithmetic = Arithmetic::exact}).arithmetic).empty());
  CHECK(explain(gqa, 1, keys).kernel == "decode");
  for (const Kernel kernel : {Kernel::reference, Kernel::tiled, Kernel::decode})
    for (const Index n : {1, 40}) {
      CHECK(explain(gqa, n, keys, {.kernel = kernel}).kernel == name(kernel));
      CHECK(explain(mla, n, latents, {.kernel = kernel}).kernel == name(kernel));
      CHECK(contains(explain(gqa, n, n, {.kernel = kernel}).text(), "forced by options.kernel"));
    }
  // The same numbers as attention over as many keys.
  for (const Index n : {1, 8, 9})
    for (const Arithmetic arithmetic : {Arithmetic::automatic, Arithmetic::exact, Arithmetic::int8}) {
      auto filled = gqa.make_cache<std::int8_t>(70);
      filled.append(Matrix<float>(n, 20), Matrix<float>(n, 14));
      const auto of_attention =
          explain(Matrix<float>(n, 60), filled, gqa.heads(), causal, plain, {.arithmetic = arithmetic});
      const auto of_layer = explain(gqa, n, keys, {.arithmetic = arithmetic});
      CHECK(of_layer.kernel == name(of_attention.kernel));
      CHECK(std::string(of_layer.arithmetic) == of_attention.arithmetic);
    }

  const auto absorbed = explain(mla, 1, latents, {.form = LatentForm::absorbed}),
             naive = explain(mla, 1, latents, {.form = LatentForm::naive});
  CHECK(absorbed.projections == "29 -> 8 -> 51, 29 -> 25, 27 -> 29");
  CHECK(absorbed.kernel == (kernel::absorbed::serves<float> ? "absorbed" : "tiled"));
  CHECK(contains(absorbed.text(), "bf16 rows multiplied in bf16") == kernel::Isa::bf16_products);
  CHECK(std::string(explain(mla, 1, latents, {.arithmetic = Arithmetic::exact}).arithmetic).empty());
  CHECK(contains(naive.text(), "naive form (forced by options.form); decode kernel (1 queries <= 8)"));
  CHECK(std::string(naive.arithmetic).empty());  // restored rows are in the layer's scalar
  for (const Index n : {1, 20, 60, 200, 900}) {
    CHECK(explain(mla, n, n).form == choose_latent_form(LatentForm::automatic, config, n, n));
    CHECK(explain(mla, n, 900).form == choose_latent_form(LatentForm::automatic, config, n, 900));
  }

  auto ring = gqa.make_ring_cache({.window = 7, .pinned = 2, .slack = 4});
  const auto in_pieces = explain(gqa, 30, ring);
  CHECK(std::tuple(in_pieces.n_queries, in_pieces.n_keys, in_pieces.pieces) == std::tuple(13, 13, 6));
  CHECK(contains(in_pieces.text(), "the first of 6 pieces: tiled kernel (13 queries > 8)"));
  ring.append(Matrix<float>(13, 20), Matrix<float>(13, 14));
  CHECK(explain(gqa, 3, ring).n_keys == 13);  // all that it holds

  CHECK(contains(message_of<std::length_error>([&] { explain(gqa, 71, keys); }), "at most 70 more rows"));
  CHECK(contains(message_of([&] { explain(gqa, 1, keys, {.form = LatentForm::naive}); }), "LayerOptions::form"));
  CHECK(contains(message_of([&] { explain(mla, 1, latents, {.share_prefixes = true}); }), "share_prefixes"));
  CHECK(contains(message_of([&] { explain(mla, 1, LatentCache<>({.latent_dim = 9, .rope_dim = 6, .capacity = 5})); }),
                 "it has 9 and 6"));
}

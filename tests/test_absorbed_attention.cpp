#include <qkv/absorbed_attention.hpp>
#include <qkv/attention.hpp>
#include <qkv/paged_latent_cache.hpp>

#include <utility>
#include <vector>

#include "support/allocations.hpp"
#include "support/catch.hpp"
#include "support/executors.hpp"
#include "support/numbers.hpp"
#include "support/oracle.hpp"

// The front door of absorbed attention; what its kernel computes, in every storage and arithmetic: test_absorbed.cpp.

using namespace support;
using qkv::Arithmetic, qkv::Matrix;

namespace {

/// Latents of 19 + 6 numbers in a cache, in pages and, where storage allows, as a matrix.
template <class S>
struct Sources {
  static constexpr Index latent_dim = 19, rope_dim = 6, width = latent_dim + rope_dim;
  qkv::LatentCache<S> cache;
  qkv::LatentPagePool<S> pool;
  qkv::PagedLatentCache<S> paged;
  Matrix<S> matrix;

  explicit Sources(Index n)
      : cache({.latent_dim = latent_dim, .rope_dim = rope_dim, .capacity = n}),
        pool({.latent_dim = latent_dim, .rope_dim = rope_dim, .page_tokens = 7, .pages = n / 7 + 1}),
        paged(pool) {
    const Matrix<float> c = numbers<float>(n, latent_dim, 1), r = numbers<float>(n, rope_dim, 2);
    cache.append(c, r), paged.append(c, r);
    if constexpr (!qkv::has_row_scale<S>) {
      matrix.resize(n, width);
      matrix << c.template cast<S>(), r.template cast<S>();
    }
  }
  /// The keys and values of attention() with one kv head.
  template <class T>
  Matrix<T> keys() const {
    Matrix<T> all(cache.rows(), width);
    all << cache.template latent<T>(), cache.template rope_keys<T>();
    return all;
  }
  template <class T>
  Matrix<T> values() const {
    return cache.template latent<T>();
  }
};

}  // namespace

TEMPLATE_TEST_CASE("absorbed attention is attention with one kv head, whose keys begin with the values", "[absorbed]",
                   float, std::int8_t) {
  using T = float;
  using S = TestType;
  const double allowed = 4e-6;
  for (const auto& [n, n_new] : {std::pair<Index, Index>{1, 1}, {197, 3}, {61, 20}})
    for (const Index heads : {1, 3, 16, 21}) {
      const Sources<S> all(n);
      const Matrix<T> q = numbers<T>(n_new, heads * all.width, 3), keys = all.template keys<T>(),
                      values = all.template values<T>();
      std::vector<T> sinks;
      for (Index h = 0; h < heads; ++h) sinks.push_back(static_cast<T>(h) / 4 - 1);
      const auto check = [&](const auto& mask, const auto& score, qkv::Options<T> options) {
        Matrix<T> log_sum_exp, expected_log_sum_exp;
        options.log_sum_exp = &expected_log_sum_exp;
        const Matrix<T> expected = qkv::attention(q, keys, values, {heads, 1}, mask, score, options);
        options.log_sum_exp = &log_sum_exp;
        const auto right = [&](const Matrix<T>& out) {
          CAPTURE(keys.rows(), q.rows(), heads, int(options.kernel));
          CHECK(max_error(out, expected) <= allowed);
          CHECK(max_error_with_infinities(log_sum_exp, expected_log_sum_exp) <= 20 * allowed);
        };
        const Matrix<T> out = qkv::absorbed_attention(q, all.cache, heads, mask, score, options);
        right(out);
        CHECK(same_bits(qkv::absorbed_attention(q, all.paged, heads, mask, score, options), out));
        if constexpr (!qkv::has_row_scale<S>) {
          const auto rows = qkv::latent_rows(all.matrix, all.latent_dim);
          CHECK(same_bits(qkv::absorbed_attention(q, rows, heads, mask, score, options), out));
        }
      };
      const qkv::Options<T> exact{.scale = 0.3, .arithmetic = Arithmetic::exact};
      check(qkv::causal, qkv::soft_cap(50), exact);
      auto asked = exact;
      asked.first_position = 5, asked.sinks = sinks;
      check(qkv::window(9, 2), qkv::soft_cap(2), asked);
      asked.kernel = qkv::Kernel::reference;
      check(qkv::window(9, 2), qkv::soft_cap(2), asked);
    }
}

TEST_CASE("absorbed attention in every spelling, into a matrix, in threads, without an allocation when warm",
          "[absorbed]") {
  const Sources<float> all(150);
  const Matrix<float> q = numbers<float>(2, 5 * all.width, 3);
  qkv::Workspace workspace;
  const qkv::Options<float> options{.scale = 0.3, .workspace = &workspace};
  const Matrix<float> expected = qkv::absorbed_attention(q, all.cache, 5, qkv::full, qkv::plain, options),
                      causally = qkv::absorbed_attention(q, all.cache, 5, qkv::causal, qkv::plain, options);
  const Threaded threads{3};
  for (const Matrix<float>& out :
       {qkv::absorbed_attention(q, all.cache, 5, {.scale = 0.3}),
        qkv::absorbed_attention(q, all.cache, 5, options, threads),
        qkv::absorbed_attention(q, all.cache, 5, {}, {.scale = 0.3}),
        qkv::absorbed_attention(q, all.cache, 5, {}, {}, options),
        qkv::absorbed_attention(Eigen::MatrixXf(q), all.cache, 5, qkv::full, options, threads)})
    CHECK(same_bits(out, expected));
  CHECK(same_bits(qkv::absorbed_attention(q, all.cache, 5, qkv::causal, {.scale = 0.3}), causally));
  Matrix<float> wide = Matrix<float>::Zero(3, 5 * 19 + 4);
  CHECK(allocations_of([&] {
          qkv::absorbed_attention_into(wide.block(1, 2, 2, 5 * 19), q, all.cache, 5, options);
        }).count == 0);
  CHECK(same_bits(Matrix<float>(wide.block(1, 2, 2, 5 * 19)), expected));
  qkv::absorbed_attention_into(wide.block(0, 0, 2, 5 * 19), q, all.cache, 5, qkv::causal, options);
  CHECK(same_bits(Matrix<float>(wide.block(0, 0, 2, 5 * 19)), causally));
  const qkv::LatentCache<float> none({.latent_dim = 19, .rope_dim = 6, .capacity = 4});
  CHECK(qkv::absorbed_attention(q, none, 5, options) == Matrix<float>::Zero(2, 5 * 19));
  CHECK(qkv::absorbed_attention(q.topRows(0), all.cache, 5, options).rows() == 0);
}

TEST_CASE("absorbed attention says what is wrong before it writes", "[absorbed]") {
  const Sources<float> all(11);
  const Matrix<float> q = numbers<float>(2, 3 * all.width, 3);
  const std::vector<float> four(4);
  const std::vector<Index> offsets = {0, 2};
  Matrix<float> out = Matrix<float>::Constant(2, 3 * 19, 7);
  const auto said = [&](const qkv::Options<float>& options, const auto& query, Index heads) {
    const auto text =
        message_of([&] { qkv::absorbed_attention_into(out, query, all.cache, heads, qkv::full, qkv::plain, options); });
    CHECK((out.array() == 7).all());
    return text;
  };
  CHECK(contains(said({}, q, 3), "absorbed attention needs options.scale"));
  CHECK(contains(said({.scale = 0}, q, 3), "absorbed attention needs options.scale"));
  CHECK(contains(said({.scale = 1}, q, 4),
                 "q must have heads*(latent_dim + rope_dim) columns; given 75 for heads 4, "
                 "latent_dim 19, rope_dim 6"));
  CHECK(contains(said({.scale = 1}, q, 0), "positive multiple"));
  CHECK(contains(said({.scale = 1}, q.leftCols(25), 1), "out must be [2, 19]; given [2, 57]"));
  CHECK(contains(said({.scale = 1e300}, q, 3), "scale must be 0"));
  CHECK(contains(said({.scale = 1, .first_key_position = 2}, q, 3), "first_key_position must be 0; given 2"));
  CHECK(contains(said({.scale = 1, .sinks = four}, q, 3), "sinks needs one logit per head; given 4 for 3"));
  CHECK(contains(said({.scale = 1, .query_offsets = offsets}, q, 3), "latent rows are of one sequence"));
  const Matrix<bool> allowed = Matrix<bool>::Ones(2, 10);
  CHECK(contains(message_of([&] { qkv::absorbed_attention(q, all.cache, 3, qkv::boolean(allowed), {.scale = 1}); }),
                 "a boolean mask must be"));
  CHECK(contains(message_of([&] { qkv::latent_rows(all.matrix, 25); }), "latent_dim 25 of 25 columns"));
  // Rows in memory that anyone may write.
  Matrix<float> memory = numbers<float>(11, 3 * 19 + 25, 4);
  const Matrix<float> before_call = memory;
  const auto rows = qkv::latent_rows(std::as_const(memory).leftCols(25), 19);
  for (const Index column : {18, 24})  // latents, rope keys
    CHECK(contains(
        message_of([&] { qkv::absorbed_attention_into(memory.block(3, column, 2, 57), q, rows, 3, {.scale = 1}); }),
        "must not share elements with the latent rows"));
  CHECK(contains(message_of([&] {
                   qkv::absorbed_attention_into(memory.block(3, 25, 2, 57), memory.block(4, 7, 2, 75), rows, 3,
                                                {.scale = 1});
                 }),
                 "must not share elements with the input q"));
  CHECK(same_bits(memory, before_call));
  qkv::absorbed_attention_into(memory.block(3, 25, 2, 57), q, rows, 3, {.scale = 1});
}

#include <qkv/attention.hpp>

#include "support/attention_case.hpp"

// The rule that picks a kernel, and that `automatic` keeps it.

using namespace support;
using namespace qkv;

static_assert(choose_kernel<float>(Kernel::automatic, 1) == Kernel::decode);
static_assert(choose_kernel<double>(Kernel::automatic, decode_max_queries) == Kernel::decode);
static_assert(choose_kernel<float>(Kernel::automatic, decode_max_queries + 1) == Kernel::tiled);
static_assert(choose_kernel<double>(Kernel::automatic, 100000) == Kernel::tiled);
static_assert(choose_kernel<long double>(Kernel::automatic, 1) == Kernel::reference);
static_assert(choose_kernel<long double>(Kernel::automatic, 100) == Kernel::reference);
static_assert(choose_kernel<float>(Kernel::tiled, 1) == Kernel::tiled);
static_assert(choose_kernel<float>(Kernel::reference, 1000) == Kernel::reference);
static_assert(choose_kernel<long double>(Kernel::decode, 3) == Kernel::decode);

TEST_CASE("kernels have names", "[kernel]") {
  CHECK(std::string(name(Kernel::automatic)) == "automatic");
  CHECK(std::string(name(Kernel::reference)) == "reference");
  CHECK(std::string(name(Kernel::tiled)) == "tiled");
  CHECK(std::string(name(Kernel::decode)) == "decode");
}

TEMPLATE_TEST_CASE("automatic gives the bits of the kernel that the rule names", "[kernel]", float, double) {
  for (const Index n : {Index{1}, decode_max_queries, decode_max_queries + 1, Index{77}}) {
    const Case c{.n_queries = n, .n_keys = 300, .heads = {6, 2}, .head_dim = 21, .v_head_dim = 13};
    const Inputs<TestType> in(c);
    const Kernel chosen = choose_kernel<TestType>(Kernel::automatic, n);
    CHECK(same_bits(attention(in.q, in.k, in.v, c.heads, causal),
                    attention(in.q, in.k, in.v, c.heads, causal, plain, {.kernel = chosen})));
  }
}

TEST_CASE("in a batch the rule looks at each sequence alone", "[kernel]") {
  const Case c{.n_queries = 80, .n_keys = 300, .heads = {6, 2}, .head_dim = 21, .v_head_dim = 13};
  const Inputs<float> in(c);
  const std::vector<Index> q_rows = {0, 2, 80}, k_rows = {0, 150, 300};
  const Matrix<float> out =
      attention(in.q, in.k, in.v, c.heads, causal, plain, {.query_offsets = q_rows, .key_offsets = k_rows});
  CHECK(same_bits(out.topRows(2), attention(in.q.topRows(2), in.k.topRows(150), in.v.topRows(150), c.heads, causal,
                                            plain, {.kernel = Kernel::decode})));
  CHECK(same_bits(out.bottomRows(78), attention(in.q.bottomRows(78), in.k.bottomRows(150), in.v.bottomRows(150),
                                                c.heads, causal, plain, {.kernel = Kernel::tiled})));
}

TEST_CASE("kernels agree with each other on every head and dimension up to 70", "[kernel]") {
  // Tails of registers and of tiles: every width once.
  for (Index d = 1; d <= 70; ++d) {
    const Case c{.n_queries = 6 + d % 5, .n_keys = 10 + 3 * d, .heads = {2, 1}, .head_dim = d, .v_head_dim = 71 - d};
    const Inputs<float> in(c);
    const auto expected = attention(in.q, in.k, in.v, c.heads, causal, plain, {.kernel = Kernel::reference});
    for (const Kernel kernel : fast_kernels) {
      INFO("kernel " << name(kernel) << ", head_dim " << d);
      CHECK(max_error(attention(in.q, in.k, in.v, c.heads, causal, plain, {.kernel = kernel}), expected) <= 4e-6);
    }
  }
}

TEST_CASE("kernels agree with each other on every number of queries and keys up to 140", "[kernel]") {
  for (Index n = 1; n <= 140; ++n) {
    const Case c{.n_queries = n, .n_keys = 141 - n + n % 3 * 90, .heads = {1, 1}, .head_dim = 3, .v_head_dim = 2};
    const Inputs<float> in(c);
    const auto expected = attention(in.q, in.k, in.v, c.heads, causal, plain, {.kernel = Kernel::reference});
    for (const Kernel kernel : fast_kernels) {
      INFO("kernel " << name(kernel) << ", " << n << " queries");
      CHECK(max_error(attention(in.q, in.k, in.v, c.heads, causal, plain, {.kernel = kernel}), expected) <= 4e-6);
    }
  }
}

TEST_CASE("the error of a long prompt does not grow with the number of its keys", "[kernel]") {
  const Case c{.n_queries = 11, .n_keys = 20011, .heads = {1, 1}, .head_dim = 5, .v_head_dim = 7};
  // Positive values, whose sums grow. Rows that repeat are the worst: additions round alike all along a chain.
  for (const Index period : {c.n_keys, Index{3}}) {
    Inputs<float> in(c);
    for (Index row = 0; row < c.n_keys; ++row) {
      in.k.row(row) = Matrix<float>(in.k.row(row % period));
      in.v.row(row) = Matrix<float>(in.v.row(row % period).cwiseAbs());
    }
    in.k /= 4;
    const Matrix<double> q = in.q.cast<double>(), k = in.k.cast<double>(), v = in.v.cast<double>();
    const auto expected = attention(q, k, v, c.heads, causal, plain, {.kernel = Kernel::reference});
    for (const Kernel kernel : fast_kernels) {
      INFO("kernel " << name(kernel) << ", rows repeat after " << period);
      CHECK(max_error(attention(in.q, in.k, in.v, c.heads, causal, plain, {.kernel = kernel}), expected) <=
            (period == 3 ? 6e-5 : 2e-6));  // one chain of all keys: 1.7e-4 and 5.7e-6
    }
  }
}

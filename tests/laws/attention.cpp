// laws/attention.cpp — what is true of attention whatever the numbers are, for every kernel.
#include <qkv/attention.hpp>

#include <numeric>
#include <random>

#include "support/attention_case.hpp"

using namespace support;
using namespace qkv;

namespace {

const Case many{.n_queries = 71, .n_keys = 207, .heads = {6, 2}, .head_dim = 19, .v_head_dim = 11};
const Case few{.n_queries = 3, .n_keys = 301, .heads = {6, 2}, .head_dim = 19, .v_head_dim = 11};

/// Runs a law for both shapes and all kernels.
template <class T, class Law>
void for_all(const Law& law) {
  for (const Case& c : {many, few})
    for (const Kernel kernel : kernels) {
      INFO("kernel " << name(kernel) << ", " << c.n_queries << " queries");
      law(c, Inputs<T>(c), Options<T>{.kernel = kernel});
    }
}

}  // namespace

TEMPLATE_TEST_CASE("the weights of a query sum to one", "[attention][laws]", float, double) {
  using T = TestType;
  for_all<T>([](const Case& c, const Inputs<T>& in, const Options<T>& options) {
    // Values of one: the output is the sum of the weights.
    const Matrix<T> ones = Matrix<T>::Ones(c.n_keys, in.v.cols());
    const Matrix<T> out = attention(in.q, in.k, ones, c.heads, causal & window(50, 0), soft_cap(5), options);
    CHECK(max_error(out, Matrix<T>::Ones(out.rows(), out.cols())) <=
          4 * static_cast<double>(std::numeric_limits<T>::epsilon()));
  });
}

TEMPLATE_TEST_CASE("values that are all alike come back", "[attention][laws]", float, double) {
  using T = TestType;
  for_all<T>([](const Case& c, const Inputs<T>& in, const Options<T>& options) {
    const Matrix<T> row = numbers<T>(1, in.v.cols(), 3), same = row.replicate(c.n_keys, 1);
    const Matrix<T> out = attention(in.q, in.k, same, c.heads, causal, plain, options);
    for (Index i = 0; i < c.n_queries; ++i)
      for (Index h = 0; h < c.heads.heads; ++h)
        REQUIRE(max_error(out.row(i).segment(h * c.v_head_dim, c.v_head_dim),
                          row.middleCols(c.heads.kv_head(h) * c.v_head_dim, c.v_head_dim)) <=
                8 * static_cast<double>(std::numeric_limits<T>::epsilon()));
  });
}

TEMPLATE_TEST_CASE("an output lies in the convex hull of the values that it sees", "[attention][laws]", float, double) {
  using T = TestType;
  for_all<T>([](const Case& c, const Inputs<T>& in, const Options<T>& options) {
    const Matrix<T> out = attention(in.q, in.k, in.v, c.heads, causal, plain, options);
    const Index first = c.n_keys - c.n_queries;
    const T slack = 16 * std::numeric_limits<T>::epsilon();
    for (Index i = 0; i < c.n_queries; ++i)
      for (Index x = 0; x < out.cols(); ++x) {
        const Index column = c.heads.kv_head(x / c.v_head_dim) * c.v_head_dim + x % c.v_head_dim;
        const auto seen = in.v.col(column).head(first + i + 1);
        REQUIRE(out(i, x) <= seen.maxCoeff() + slack);
        REQUIRE(out(i, x) >= seen.minCoeff() - slack);
      }
  });
}

TEMPLATE_TEST_CASE("adding a number to all scores of a query changes its log-sum-exp and nothing else",
                   "[attention][laws]", float, double) {
  using T = TestType;
  for_all<T>([](const Case& c, const Inputs<T>& in, Options<T> options) {
    Matrix<T> lse, shifted_lse;
    options.log_sum_exp = &lse;
    const Matrix<T> out = attention(in.q, in.k, in.v, c.heads, causal, plain, options);
    options.log_sum_exp = &shifted_lse;
    const auto shift = [](T s, const At& at) { return s + T(at.query % 3) * T(8) + T(at.head); };
    const Matrix<T> shifted = attention(in.q, in.k, in.v, c.heads, causal, shift, options);
    CHECK(max_error(shifted, out) <= 4 * tolerance<T>);  // the scores themselves are rounded anew
    for (Index i = 0; i < c.n_queries; ++i)
      for (Index h = 0; h < c.heads.heads; ++h) lse(i, h) += T(i % 3) * T(8) + T(h);
    CHECK(max_error(shifted_lse, lse) <= 8 * tolerance<T>);
  });
}

TEMPLATE_TEST_CASE("without a mask the order of the keys does not matter", "[attention][laws]", float, double) {
  using T = TestType;
  for_all<T>([](const Case& c, const Inputs<T>& in, const Options<T>& options) {
    std::vector<int> order(static_cast<std::size_t>(c.n_keys));
    std::iota(order.begin(), order.end(), 0);
    std::shuffle(order.begin(), order.end(), std::mt19937(4));
    const Eigen::PermutationMatrix<Eigen::Dynamic> p(Eigen::Map<Eigen::VectorXi>(order.data(), c.n_keys));
    CHECK(max_error(attention(in.q, p * in.k, p * in.v, c.heads, full, plain, options),
                    attention(in.q, in.k, in.v, c.heads, full, plain, options)) <= tolerance<T>);
  });
}

TEMPLATE_TEST_CASE("grouped heads equal heads whose keys and values are repeated", "[attention][laws]", float, double) {
  using T = TestType;
  for (const Heads heads : {Heads{6, 2}, Heads{7, 1}, Heads{14, 2}, Heads{3, 3}})
    for (Case c : {many, few})
      for (const Kernel kernel : kernels) {
        c.heads = heads;
        INFO("kernel " << name(kernel) << ", heads " << heads.heads << "/" << heads.kv_heads);
        const Inputs<T> in(c);
        CHECK(same_bits(attention(in.q, in.k, in.v, heads, causal, plain, {.kernel = kernel}),
                        attention(in.q, repeat_kv_heads(in.k, heads), repeat_kv_heads(in.v, heads), {heads.heads},
                                  causal, plain, {.kernel = kernel})));
      }
}

TEMPLATE_TEST_CASE("heads do not see each other", "[attention][laws]", float, double) {
  using T = TestType;
  for_all<T>([](const Case& c, const Inputs<T>& in, const Options<T>& options) {
    const Matrix<T> all = attention(in.q, in.k, in.v, c.heads, causal, plain, options);
    for (Index h = 0; h < c.heads.heads; ++h) {
      const Index kv = c.heads.kv_head(h);
      CHECK(same_bits(attention(head_columns(in.q, h, c.heads.heads), head_columns(in.k, kv, 2),
                                head_columns(in.v, kv, 2), {}, causal, plain, options),
                      head_columns(all, h, c.heads.heads)));
    }
  });
}

TEMPLATE_TEST_CASE("a sink is a state with v = 0, and the state's log-sum-exp is the call's", "[attention][laws]",
                   float, double) {
  using T = TestType;
  for_all<T>([](const Case& c, const Inputs<T>& in, Options<T> options) {
    const std::vector<T> sinks = {1, -2, 0, 3, T(0.5), -30};
    const auto state = attention_state(in.q, in.k, in.v, c.heads, causal, plain, options);
    auto sink = SoftmaxState<T>::empty(c.n_queries, 6, c.v_head_dim);
    sink.sum.setOnes();
    for (Index h = 0; h < 6; ++h) sink.maximum.col(h).setConstant(sinks[static_cast<std::size_t>(h)]);
    Matrix<T> lse;
    options.log_sum_exp = &lse;
    const Matrix<T> without = attention(in.q, in.k, in.v, c.heads, causal, plain, options);
    CHECK(max_error(state.finish(), without) <= tolerance<T> / 2);
    CHECK(max_error(state.log_sum_exp(), lse) <= 2 * tolerance<T>);
    options.sinks = sinks;
    const Matrix<T> with = attention(in.q, in.k, in.v, c.heads, causal, plain, options);
    CHECK(max_error(merge(state, sink).finish(), with) <= tolerance<T> / 2);
    CHECK(max_error(merge(state, sink).log_sum_exp(), lse) <= 2 * tolerance<T>);
    CHECK(max_error(state.finish(sinks), with) <= tolerance<T> / 2);
  });
}

TEMPLATE_TEST_CASE("scaling the queries is scaling the scores", "[attention][laws]", float, double) {
  using T = TestType;
  for_all<T>([](const Case& c, const Inputs<T>& in, Options<T> options) {
    options.scale = 0.25;
    const Matrix<T> expected = attention(in.q, in.k, in.v, c.heads, causal, plain, options);
    options.scale = 0.5;  // powers of two: nothing is rounded
    CHECK(same_bits(attention(in.q / T(2), in.k, in.v, c.heads, causal, plain, options), expected));
    CHECK(same_bits(attention(in.q, in.k / T(2), in.v, c.heads, causal, plain, options), expected));
  });
}

TEMPLATE_TEST_CASE("moving everything to other positions changes nothing under causal and windows", "[attention][laws]",
                   float, double) {
  using T = TestType;
  for_all<T>([](const Case& c, const Inputs<T>& in, Options<T> options) {
    // The same keys, once at the end of a longer sequence whose beginning the window hides.
    const Index shift = 130;
    Matrix<T> k = Matrix<T>::Zero(c.n_keys + shift, in.k.cols()), v = Matrix<T>::Zero(c.n_keys + shift, in.v.cols());
    k.bottomRows(c.n_keys) = in.k, v.bottomRows(c.n_keys) = in.v;
    CHECK(max_error(attention(in.q, k, v, c.heads, window(c.n_keys - c.n_queries, 0), plain, options),
                    attention(in.q, in.k, in.v, c.heads, window(c.n_keys - c.n_queries, 0), plain, options)) <=
          tolerance<T>);
  });
}

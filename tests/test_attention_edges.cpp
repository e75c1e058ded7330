#include <qkv/attention.hpp>

#include "support/attention_case.hpp"
#include "support/key_source.hpp"

using namespace support;
using namespace qkv;

namespace {

constexpr double minus_inf = -std::numeric_limits<double>::infinity();
bool before(const At& at) { return at.key_position <= at.query_position; }

}  // namespace

TEST_CASE("queries at negative positions see nothing under causal and get zeros", "[attention]") {
  const Case c{.n_queries = 9, .n_keys = 4, .heads = {2, 1}, .head_dim = 3, .v_head_dim = 5};
  const Inputs<double> in(c);
  for (const Kernel kernel : kernels) {
    INFO("kernel " << name(kernel));
    Matrix<double> lse;
    const Matrix<double> out =
        attention(in.q, in.k, in.v, c.heads, causal, plain, {.kernel = kernel, .log_sum_exp = &lse});
    CHECK(same_bits(Matrix<double>(out.topRows(5)), Matrix<double>(Matrix<double>::Zero(5, 10))));
    CHECK(same_bits(Matrix<double>(lse.topRows(5)), Matrix<double>(Matrix<double>::Constant(5, 2, minus_inf))));
    CHECK((out.bottomRows(4).array() != 0).all());
    CHECK(lse.bottomRows(4).array().isFinite().all());
  }
}

TEST_CASE("no keys give zeros and log-sum-exp -inf, or the sink", "[attention]") {
  const std::vector<float> sinks = {0.5F, -2};
  for (const Kernel kernel : kernels)
    for (const Index n : {1, 3, 70}) {
      INFO("kernel " << name(kernel) << ", " << n << " queries");
      const Matrix<float> q = normals<float>(n, 6, 1);
      Matrix<float> lse;
      for (const bool with_sink : {false, true}) {
        Options<float> options{.kernel = kernel, .log_sum_exp = &lse};
        if (with_sink) options.sinks = sinks;
        // The outputs come poisoned: zeros must be written.
        Matrix<float> out = Matrix<float>::Constant(n, 10, std::numeric_limits<float>::quiet_NaN());
        attention_into(out, q, Matrix<float>(0, 3), Matrix<float>(0, 5), {2, 1}, causal, plain, options);
        CHECK(out == Matrix<float>::Zero(n, 10));
        for (Index i = 0; i < n; ++i)
          for (Index h = 0; h < 2; ++h)
            REQUIRE(lse(i, h) == (with_sink ? sinks[static_cast<std::size_t>(h)] : static_cast<float>(minus_inf)));
      }
    }
}

TEST_CASE("rows that a mask hides completely give zeros, also with a sink", "[attention]") {
  const Case c{.n_queries = 70, .n_keys = 300, .heads = {2, 2}, .head_dim = 3, .v_head_dim = 5};
  const Inputs<float> in(c);
  const std::vector<float> sinks = {3, -1};
  const auto nobody = [](const At&) { return false; };
  const auto odd_queries = [](const At& at) { return at.query % 2 == 1; };
  for (const Kernel kernel : kernels) {
    INFO("kernel " << name(kernel));
    Matrix<float> lse;
    Options<float> options{.kernel = kernel, .log_sum_exp = &lse};
    CHECK(attention(in.q, in.k, in.v, c.heads, nobody, plain, options) == Matrix<float>::Zero(70, 10));
    CHECK(lse == Matrix<float>::Constant(70, 2, static_cast<float>(minus_inf)));
    options.sinks = sinks;
    CHECK(attention(in.q, in.k, in.v, c.heads, nobody, plain, options) == Matrix<float>::Zero(70, 10));
    CHECK(lse.col(0) == Matrix<float>::Constant(70, 1, 3));
    CHECK(lse.col(1) == Matrix<float>::Constant(70, 1, -1));
  }
  check_kernels<float>(c, odd_queries, plain, odd_queries, unchanged);
  check_kernels<float>(c, odd_queries, plain, odd_queries, unchanged, {.sinks = sinks});
  // What a mask hides, a score of -inf hides as well.
  for (const Kernel kernel : kernels)
    CHECK(attention(in.q, in.k, in.v, c.heads, full,
                    [](float, const At&) { return -std::numeric_limits<float>::infinity(); },
                    {.kernel = kernel}) == Matrix<float>::Zero(70, 10));
}

TEST_CASE("no queries give no rows", "[attention]") {
  for (const Kernel kernel : {Kernel::automatic, Kernel::reference, Kernel::tiled, Kernel::decode}) {
    Matrix<double> lse(5, 5);
    const auto out = attention(Matrix<double>(0, 6), normals<double>(7, 3, 1), normals<double>(7, 5, 2), {2, 1}, causal,
                               plain, {.kernel = kernel, .log_sum_exp = &lse});
    CHECK(out.rows() == 0);
    CHECK(out.cols() == 10);
    CHECK(lse.rows() == 0);
    CHECK(attention(Matrix<double>(0, 6), Matrix<double>(0, 3), Matrix<double>(0, 5), {2, 1}).rows() == 0);
  }
}

TEST_CASE("heads without features see everybody alike, and values without features give no columns", "[attention]") {
  const Matrix<double> v = normals<double>(9, 4, 1);
  for (const Kernel kernel : kernels) {
    INFO("kernel " << name(kernel));
    const auto out = attention(Matrix<double>(6, 0), Matrix<double>(9, 0), v, {}, full, plain, {.kernel = kernel});
    for (Index i = 0; i < 6; ++i) CHECK(max_error(out.row(i), v.colwise().mean()) <= 1e-15);
    const auto none = attention(normals<double>(6, 3, 2), normals<double>(9, 3, 3), Matrix<double>(9, 0), {}, full,
                                plain, {.kernel = kernel});
    CHECK(none.rows() == 6);
    CHECK(none.cols() == 0);
  }
}

TEMPLATE_TEST_CASE("scores of ±1e5 neither overflow nor vanish", "[attention]", float, double) {
  using T = TestType;
  const Case c{.n_queries = 67, .n_keys = 301, .heads = {2, 1}, .head_dim = 5, .v_head_dim = 7};
  // The score is replaced, so that it is exact: every seventh key far above the rest, or all of them far below zero.
  const auto peaks = [](auto, const At& at) { return T(at.key % 7 == 3 ? 100000 + at.key % 2 : -100000); };
  const auto abyss = [](auto, const At& at) { return T(-100000 + at.key % 3); };
  for (const Case& shape : {c, Case{.n_queries = 2, .n_keys = 301, .heads = {2, 1}, .head_dim = 5, .v_head_dim = 7}}) {
    check_kernels<T>(shape, causal, peaks, before,
                     [](long double, const At& at) { return at.key % 7 == 3 ? 1e5L + at.key % 2 : -1e5L; });
    check_kernels<T>(shape, causal, abyss, before, [](long double, const At& at) { return -1e5L + at.key % 3; });
    const std::vector<T> sinks = {T(-1e5), T(1e5)};
    check_kernels<T>(shape, causal, abyss, before, [](long double, const At& at) { return -1e5L + at.key % 3; },
                     {.sinks = sinks});
  }
  // From inputs: finite, and inside the values.
  Inputs<T> in(c);
  in.q *= T(500), in.k *= T(500);
  for (const Kernel kernel : kernels) {
    const Matrix<T> out = attention(in.q, in.k, in.v, c.heads, full, plain, {.kernel = kernel});
    CHECK(out.array().isFinite().all());
    CHECK(out.maxCoeff() <= in.v.maxCoeff());
    CHECK(out.minCoeff() >= in.v.minCoeff());
  }
}

TEMPLATE_TEST_CASE("scores at the far ends of float have the weights of their distances, in every arithmetic",
                   "[attention]", float, bfloat16, std::int8_t) {
  constexpr float most = std::numeric_limits<float>::max();
  const Case c{.n_queries = 21, .n_keys = 203, .heads = {2, 1}, .head_dim = 5, .v_head_dim = 7};
  const Inputs<float> in(c);
  Matrix<float> v = in.v.array() + 1;
  for (Index j = 0; j < c.n_keys; j += 5) v.row(j).array() += 2;
  const PagedKeys<TestType> cache(in.k, v, 1, consecutive_pages(c.n_keys, {50, 3}));
  // Scores of every fifth key and of the others: where a bias of the lowest number hides keys, the whole row among them,
  // and sizes in between, the distance large or next to nothing beside them.
  const float pairs[][2] = {{-most, -most},       {0.9F * most, 0.9F * most}, {0, -most},           {-1e30F, -most},
                            {most, -most},        {1e10F, 0.9e10F},           {-1e5F, -1e5F - 100}, {4e6F, 4e6F - 0.5F},
                            {-4e6F, -4e6F + 0.5F}};
  for (const auto& [fifths, others] : pairs) {
    const AnyScore<float> score = [a = fifths, b = others](float, const At& at) { return at.key % 5 == 0 ? a : b; };
    const float top = std::max(fifths, others), weights[] = {std::exp(fifths - top), std::exp(others - top)};
    for (const Kernel kernel : kernels)
      for (const Arithmetic arithmetic : {Arithmetic::automatic, Arithmetic::exact, Arithmetic::int8}) {
        INFO("kernel " << name(kernel) << ", arithmetic " << int(arithmetic) << ", " << fifths << ", " << others);
        const Matrix<float> out =
            attention(in.q, cache, c.heads, AnyMask::of(causal), score, {.kernel = kernel, .arithmetic = arithmetic});
        Matrix<float> sum = Matrix<float>::Zero(1, 7);
        float total = 0;
        for (Index j = 0; j < c.n_keys; ++j) {
          const float w = weights[j % 5 == 0 ? 0 : 1];
          sum += w * v.row(j), total += w;
          if (j < c.n_keys - c.n_queries) continue;
          // Values of up to 7: half a step of int8, 2⁻⁸ of them in bfloat16, and weights in steps of 1/255.
          const Matrix<float> mean = sum / total;
          REQUIRE(max_error(out.row(j - (c.n_keys - c.n_queries)), mean.replicate(1, 2)) <=
                  (sizeof(TestType) == 4 ? 2e-5 : 0.04));
        }
      }
  }
}

TEST_CASE("the position of the first query is the call's", "[attention]") {
  for (const Index first : {-3, 0, 1, 5, 40, 1000}) {
    const Case c{
        .n_queries = 6, .n_keys = 17, .heads = {2, 1}, .head_dim = 3, .v_head_dim = 5, .first_position = first};
    check_kernels<double>(c, causal, plain, before, unchanged);
    check_kernels<double>(
        c, window(4, 2), plain,
        [](const At& at) {
          return at.key_position >= at.query_position - 4 && at.key_position <= at.query_position + 2;
        },
        unchanged);
  }
}

TEST_CASE("a score of -inf is masked, and its value is not read", "[attention]") {
  const Case c{.n_queries = 66, .n_keys = 290, .heads = {2, 1}, .head_dim = 4, .v_head_dim = 6};
  Inputs<float> in(c);
  const auto hide = [](auto s, const At& at) {
    return at.key % 5 == 1 ? -std::numeric_limits<decltype(s)>::infinity() : s;
  };
  const auto expected = attention_by_formula(
      in.q, in.k, in.v, {.heads = c.heads}, [](const At& at) { return at.key % 5 != 1; }, unchanged);
  for (Index j = 1; j < c.n_keys; j += 5) in.v.row(j).setConstant(std::numeric_limits<float>::quiet_NaN());
  for (const Kernel kernel : kernels) {
    INFO("kernel " << name(kernel));
    const auto out = attention(in.q, in.k, in.v, c.heads, full, hide, {.first_position = 0, .kernel = kernel});
    CHECK(max_error(out, expected.out) <= tolerance<float>);
  }
}

TEST_CASE("long double runs through the reference kernel, whatever is not float or double", "[attention]") {
  const Case c{.n_queries = 7, .n_keys = 11, .heads = {4, 2}, .head_dim = 5, .v_head_dim = 3};
  const Inputs<long double> in(c);
  const auto expected =
      attention_by_formula(in.q, in.k, in.v, {.heads = c.heads, .first_position = 4}, before, unchanged);
  CHECK(max_error(attention(in.q, in.k, in.v, c.heads, causal), expected.out) <= 1e-17);
  CHECK(max_error(attention(in.q.topRows(1), in.k, in.v, c.heads, causal, plain, {.first_position = 4}),
                  expected.out.topRows(1)) <= 1e-17);
}

TEST_CASE("inputs may be expressions, column-major matrices and blocks", "[attention]") {
  const Case c{.n_queries = 6, .n_keys = 13, .heads = {4, 2}, .head_dim = 3, .v_head_dim = 5};
  const Inputs<float> in(c);
  const Matrix<float> expected = attention(in.q, in.k, in.v, c.heads, causal);
  const Eigen::MatrixXf q = in.q, k = in.k, v = in.v;
  CHECK(same_bits(attention(q, k, v, c.heads, causal), expected));
  CHECK(same_bits(attention(1 * q, k + Eigen::MatrixXf::Zero(13, 6), in.v.topRows(13), c.heads, causal), expected));
  CHECK(same_bits(attention_state(q, k, v, c.heads, causal).finish(),
                  attention_state(in.q, in.k, in.v, c.heads, causal).finish()));
  CHECK(same_bits(attention_weights(q, k, c.heads, causal), attention_weights(in.q, in.k, c.heads, causal)));
  const Eigen::MatrixXf transposed = in.q.transpose();
  CHECK(same_bits(attention(transposed.transpose(), k, v, c.heads, causal), expected));
  CHECK(same_bits(attention(in.q.row(5), k, v, c.heads, causal),
                  attention(Matrix<float>(in.q.bottomRows(1)), k, v, c.heads, causal)));
}

TEST_CASE("queries, keys, values and output may be column blocks of one buffer", "[attention]") {
  const Heads heads{4, 2};
  const Index n = 71, d = 5, dv = 3, q_cols = 20, kv_cols = 10, v_cols = 6, out_cols = 12;
  const Index pad = 3, total = q_cols + kv_cols + v_cols + out_cols + 2 * pad;
  for (const Kernel kernel : kernels) {
    INFO("kernel " << name(kernel));
    Matrix<float> buffer = normals<float>(n, total, 9);
    const Matrix<float> before_call = buffer;
    const auto q = buffer.middleCols(pad, q_cols);
    const auto v = buffer.middleCols(pad + q_cols, v_cols);
    auto out = buffer.middleCols(pad + q_cols + v_cols, out_cols);
    const auto k = buffer.middleCols(pad + q_cols + v_cols + out_cols, kv_cols);
    const Matrix<float> expected =
        attention(Matrix<float>(q), Matrix<float>(k), Matrix<float>(v), heads, causal, plain, {.kernel = kernel});
    attention_into(out, q, k, v, heads, causal, plain, {.kernel = kernel});
    CHECK(q.cols() == heads.heads * d);
    CHECK(v.cols() == heads.kv_heads * dv);
    CHECK(same_bits(out, expected));
    CHECK(same_bits(buffer.leftCols(pad + q_cols + v_cols), before_call.leftCols(pad + q_cols + v_cols)));
    CHECK(same_bits(buffer.rightCols(kv_cols + pad), before_call.rightCols(kv_cols + pad)));
  }
}

#include <qkv/attention.hpp>

#include "support/attention_case.hpp"

using namespace support;
using namespace qkv;

namespace {

bool before(const At& at) { return at.key_position <= at.query_position; }
const auto capped = [](long double s, const At&) { return 2 * std::tanh(s / 2); };

}  // namespace

TEMPLATE_TEST_CASE("weights at each of the four stages are the definition's", "[attention][weights]", float, double,
                   long double) {
  using T = TestType;
  const double allowed = sizeof(T) == 4 ? 4e-6 : 1e-14;
  const Case c{.n_queries = 9, .n_keys = 13, .heads = {6, 2}, .head_dim = 5, .v_head_dim = 3, .first_position = 3};
  const Inputs<T> in(c);
  const std::vector<T> sinks = {1, -2, 0, 3, T(0.5), -1};
  const Expected expected = attention_by_formula(
      in.q, in.k, in.v, {.heads = c.heads, .scale = 0.6, .first_position = 3, .sinks = {sinks.begin(), sinks.end()}},
      before, capped);
  const auto at_stage = [&](Stage stage) {
    return attention_weights(in.q, in.k, c.heads, causal, soft_cap(2), stage,
                             {.scale = 0.6, .first_position = 3, .sinks = sinks});
  };
  CHECK(max_error(at_stage(Stage::scaled), expected.scaled) <= allowed);  // masked keys included
  CHECK(max_error(at_stage(Stage::scored), expected.scored) <= allowed);
  CHECK(max_error_with_infinities(at_stage(Stage::masked), expected.masked) <= allowed);
  CHECK(max_error(at_stage(Stage::probabilities), expected.probabilities) <= allowed);
  CHECK(at_stage(Stage::masked)(0, 12) == -std::numeric_limits<T>::infinity());
  CHECK(at_stage(Stage::probabilities)(0, 12) == 0);
}

TEST_CASE("weights times values is what attention gives", "[attention][weights]") {
  const Case c{.n_queries = 70, .n_keys = 131, .heads = {6, 2}, .head_dim = 5, .v_head_dim = 3};
  const Inputs<double> in(c);
  const auto weights = attention_weights(in.q, in.k, c.heads, causal);
  REQUIRE(weights.rows() == 6 * 70);
  REQUIRE(weights.cols() == 131);
  const auto out = attention(in.q, in.k, in.v, c.heads, causal);
  for (Index h = 0; h < 6; ++h)
    CHECK(max_error(Matrix<double>(weights.middleRows(h * 70, 70) * in.v.middleCols(h / 3 * 3, 3)),
                    out.middleCols(h * 3, 3)) <= 1e-14);
}

TEST_CASE("weights of a part of the keys are those of the whole before the softmax", "[attention][weights]") {
  const Case c{.n_queries = 7, .n_keys = 31, .heads = {2, 1}, .head_dim = 5, .v_head_dim = 3};
  const Inputs<float> in(c);
  const auto all = attention_weights(in.q, in.k, c.heads, window(11, 0), plain, Stage::masked);
  const auto part = attention_weights(in.q, in.k.middleRows(12, 15), c.heads, window(11, 0), plain, Stage::masked,
                                      {.first_position = 24, .first_key_position = 12});
  CHECK(same_bits(Matrix<float>(all.middleCols(12, 15)), part));
}

TEST_CASE("queries that see nothing have weights of zero at the last stage", "[attention][weights]") {
  const Matrix<float> q = normals<float>(5, 6, 1), k = normals<float>(2, 6, 2);
  const auto weights = attention_weights(q, k, {2, 2}, causal);  // the first three stand before all keys
  CHECK(weights.topRows(3) == Matrix<float>::Zero(3, 2));
  CHECK(weights.middleRows(5, 3) == Matrix<float>::Zero(3, 2));
  CHECK(std::abs(weights.row(4).sum() - 1) <= 1e-6F);
  CHECK(attention_weights(q, Matrix<float>(0, 6), {2, 2}, causal).cols() == 0);
  CHECK(attention_weights(Matrix<float>(0, 6), k, {2, 2}, causal).rows() == 0);
}

TEST_CASE("NaN under a mask shows at the stages before the mask only", "[attention][weights]") {
  const Matrix<float> q = normals<float>(2, 3, 1);
  Matrix<float> k = normals<float>(3, 3, 2);
  k.row(2).setConstant(std::numeric_limits<float>::quiet_NaN());
  const auto at_stage = [&](Stage stage) {
    return attention_weights(q, k, {}, causal, plain, stage, {.first_position = 0});
  };
  CHECK(std::isnan(at_stage(Stage::scaled)(0, 2)));
  CHECK(std::isnan(at_stage(Stage::scored)(1, 2)));
  CHECK(at_stage(Stage::masked)(1, 2) == -std::numeric_limits<float>::infinity());
  CHECK(at_stage(Stage::probabilities).array().isFinite().all());
}

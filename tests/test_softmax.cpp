#include <qkv/softmax.hpp>

#include "support/catch.hpp"
#include "support/oracle.hpp"

using namespace support;
using namespace qkv;

namespace {

template <class T>
constexpr T inf = std::numeric_limits<T>::infinity();
template <class T>
constexpr T nan_of = std::numeric_limits<T>::quiet_NaN();

/// One query, one head, two features.
template <class T>
SoftmaxState<T> state(T m, T l, T o0, T o1) {
  auto s = SoftmaxState<T>::empty(1, 1, 2);
  s.maximum(0) = m, s.sum(0) = l, s.weighted(0) = o0, s.weighted(1) = o1;
  return s;
}

}  // namespace

TEMPLATE_TEST_CASE("softmax is its formula, and rows sum to one", "[softmax]", float, double, long double) {
  const Matrix<TestType> scores = TestType(4) * normals<TestType>(13, 37, 1);
  const Matrix<TestType> p = softmax(scores);
  const double allowed = 8 * static_cast<double>(std::numeric_limits<TestType>::epsilon());
  for (Index i = 0; i < scores.rows(); ++i) {
    long double total = 0, sum = 0;
    for (Index j = 0; j < scores.cols(); ++j) total += std::exp(static_cast<long double>(scores(i, j)));
    for (Index j = 0; j < scores.cols(); ++j) {
      sum += static_cast<long double>(p(i, j));
      REQUIRE(std::abs(static_cast<double>(p(i, j) - std::exp(static_cast<long double>(scores(i, j))) / total)) <=
              allowed);
    }
    CHECK(std::abs(static_cast<double>(sum - 1)) <= 4 * allowed);
  }
}

TEST_CASE("softmax takes expressions, empty matrices and huge scores", "[softmax]") {
  const Eigen::MatrixXd column_major = normals<double>(3, 5, 2);
  CHECK(max_error(softmax(column_major + column_major), softmax(Matrix<double>(2 * column_major))) <= 1e-16);
  CHECK(softmax(Matrix<float>(0, 5)).rows() == 0);
  CHECK(softmax(Matrix<float>(4, 0)).cols() == 0);
  const Matrix<float> huge = (Matrix<float>(2, 3) << 1e5F, -1e5F, 1e5F, -1e5F, -1e5F, -1e30F).finished();
  CHECK(softmax(huge) == (Matrix<float>(2, 3) << 0.5F, 0, 0.5F, 0.5F, 0.5F, 0).finished());
}

TEST_CASE("masked entries weigh nothing and a row of them is zeros", "[softmax]") {
  const Matrix<double> scores =
      (Matrix<double>(2, 3) << 1, -inf<double>, 1, -inf<double>, -inf<double>, -inf<double>).finished();
  CHECK(softmax(scores) == (Matrix<double>(2, 3) << 0.5, 0, 0.5, 0, 0, 0).finished());
}

TEST_CASE("NaN in a row of scores makes that row NaN and no other", "[softmax]") {
  for (Index where = 0; where < 4; ++where) {
    Matrix<float> scores = normals<float>(3, 4, 3);
    const Matrix<float> clean = softmax(scores);
    scores(1, where) = nan_of<float>;
    const Matrix<float> p = softmax(scores);
    CHECK(p.row(1).array().isNaN().all());
    CHECK(same_bits(p.row(0), clean.row(0)));
    CHECK(same_bits(p.row(2), clean.row(2)));
  }
}

TEST_CASE("NaN beside nothing but masked entries is NaN, not a row of zeros", "[softmax]") {
  for (Index where = 0; where < 3; ++where) {
    Matrix<double> scores = Matrix<double>::Constant(1, 3, -inf<double>);
    scores(where) = nan_of<double>;
    CHECK(softmax(scores).array().isNaN().all());
  }
}

TEST_CASE("the state of no keys gives zeros, log-sum-exp -inf, and only the sink where there is one", "[softmax]") {
  const auto none = SoftmaxState<double>::empty(2, 3, 5);
  CHECK(none.n_queries() == 2);
  CHECK(none.heads() == 3);
  CHECK(none.v_head_dim() == 5);
  CHECK(none.finish() == Matrix<double>::Zero(2, 15));
  CHECK(none.log_sum_exp() == Matrix<double>::Constant(2, 3, -inf<double>));
  const std::vector<double> sinks = {0.5, -3, -inf<double>};
  CHECK(none.finish(sinks) == Matrix<double>::Zero(2, 15));
  for (Index i = 0; i < 2; ++i)
    for (Index h = 0; h < 3; ++h) CHECK(none.log_sum_exp(sinks)(i, h) == sinks[static_cast<std::size_t>(h)]);
}

TEST_CASE("finish divides by the sum, and a sink takes its part", "[softmax]") {
  const auto s = state<double>(2, 4, 12, -8);
  CHECK(s.finish() == (Matrix<double>(1, 2) << 3, -2).finished());
  CHECK(std::abs(s.log_sum_exp()(0) - (2 + std::log(4.0))) <= 1e-15);
  for (const double sink : {-1.0, 2.0, 5.0}) {
    const double share = 4 * std::exp(2.0) / (4 * std::exp(2.0) + std::exp(sink));
    const std::vector<double> sinks = {sink};
    CHECK(std::abs(s.finish(sinks)(0) - 3 * share) <= 1e-15);
    CHECK(std::abs(s.finish(sinks)(1) + 2 * share) <= 1e-15);
    CHECK(std::abs(s.log_sum_exp(sinks)(0) - std::log(4 * std::exp(2.0) + std::exp(sink))) <= 1e-14);
  }
}

TEST_CASE("maxima of any size merge without overflow", "[softmax]") {
  auto s = merge(state<float>(1e5F, 1, 3, 4), state<float>(-1e5F, 2, 100, 100));
  CHECK(s.maximum(0) == 1e5F);
  CHECK(s.finish() == (Matrix<float>(1, 2) << 3, 4).finished());
  s = merge(state<float>(-1e5F, 2, 100, 100), state<float>(1e5F, 1, 3, 4));
  CHECK(s.finish() == (Matrix<float>(1, 2) << 3, 4).finished());
  const std::vector<float> far_below = {-1e5F}, far_above = {1e30F};
  CHECK(s.finish(far_below) == (Matrix<float>(1, 2) << 3, 4).finished());
  CHECK(s.finish(far_above) == Matrix<float>::Zero(1, 2));
  CHECK(s.log_sum_exp(far_above)(0) == 1e30F);
}

TEST_CASE("NaN in either state reaches the merged one", "[softmax]") {
  const auto good = state<double>(1, 2, 3, 4), none = SoftmaxState<double>::empty(1, 1, 2);
  const auto bad_score = state<double>(nan_of<double>, nan_of<double>, nan_of<double>, nan_of<double>);
  for (const auto& other : {good, none}) {
    CHECK(std::isnan(merge(bad_score, other).log_sum_exp()(0)));
    CHECK(std::isnan(merge(other, bad_score).log_sum_exp()(0)));
  }
  for (const auto& bad : {state<double>(nan_of<double>, 1, 1, 1), state<double>(1, 1, nan_of<double>, nan_of<double>)})
    for (const auto& other : {good, none}) {
      CHECK(merge(bad, other).finish().array().isNaN().all());
      CHECK(merge(other, bad).finish().array().isNaN().all());
    }
}

TEST_CASE("states of different shapes and a wrong number of sinks are refused in words", "[softmax]") {
  auto s = SoftmaxState<float>::empty(2, 3, 5);
  for (const auto& other : {SoftmaxState<float>::empty(1, 3, 5), SoftmaxState<float>::empty(2, 1, 5),
                            SoftmaxState<float>::empty(2, 3, 4), SoftmaxState<float>::empty(2, 5, 3)})
    CHECK(contains(message_of([&] { s.merge(other); }),
                   "states that merge must be of equal shape; given [2, 15] with 3"));
  const std::vector<float> two = {1, 2};
  CHECK(contains(message_of([&] { s.finish(two); }), "sinks needs one logit per head; given 2 for 3 heads"));
  CHECK(contains(message_of([&] { s.log_sum_exp(two); }), "sinks needs one logit per head"));
  CHECK(contains(message_of([] { SoftmaxState<float>::empty(-1, 1, 1); }), "n_queries >= 0"));
  CHECK(contains(message_of([] { SoftmaxState<float>::empty(1, 0, 1); }), "heads >= 1"));
}

#include <qkv/norm.hpp>

#include "support/catch.hpp"
#include "support/numbers.hpp"

using namespace support;

namespace {

template <class T>
qkv::Matrix<long double> rms_by_formula(const qkv::Matrix<T>& x, const qkv::RowVector<T>& gain, long double eps,
                                        Index heads) {
  const Index width = x.cols() / heads;
  qkv::Matrix<long double> y(x.rows(), x.cols());
  for (Index i = 0; i < x.rows(); ++i)
    for (Index h = 0; h < heads; ++h) {
      long double squares = 0;
      for (Index j = 0; j < width; ++j) squares += static_cast<long double>(x(i, h * width + j)) * x(i, h * width + j);
      const long double root = std::sqrt(squares / static_cast<long double>(width) + eps);
      for (Index j = 0; j < width; ++j) y(i, h * width + j) = x(i, h * width + j) / root * gain(j);
    }
  return y;
}

template <class T>
qkv::Matrix<long double> layer_by_formula(const qkv::Matrix<T>& x, const qkv::RowVector<T>& gain,
                                          const qkv::RowVector<T>& bias, long double eps) {
  qkv::Matrix<long double> y(x.rows(), x.cols());
  const auto width = static_cast<long double>(x.cols());
  for (Index i = 0; i < x.rows(); ++i) {
    long double mean = 0, variance = 0;
    for (Index j = 0; j < x.cols(); ++j) mean += x(i, j) / width;
    for (Index j = 0; j < x.cols(); ++j) variance += (x(i, j) - mean) * (x(i, j) - mean) / width;
    for (Index j = 0; j < x.cols(); ++j) y(i, j) = (x(i, j) - mean) / std::sqrt(variance + eps) * gain(j) + bias(j);
  }
  return y;
}

template <class T>
double few_ulps(double size) {
  return 6 * size * static_cast<double>(std::numeric_limits<T>::epsilon());
}

}  // namespace

TEMPLATE_TEST_CASE("RMSNorm divides by the root of the mean square", "[norm]", float, double, long double) {
  const Index width = GENERATE(1, 15, 16, 17, 131);
  const qkv::Matrix<TestType> x = numbers<TestType>(5, width, 1);
  const qkv::RowVector<TestType> gain = numbers<TestType>(1, width, 2);
  REQUIRE(max_error(qkv::rms_norm(x, gain, 1e-6), rms_by_formula(x, gain, 1e-6L, 1)) <= few_ulps<TestType>(4));
}

TEMPLATE_TEST_CASE("LayerNorm removes the mean and divides by the deviation", "[norm]", float, double, long double) {
  const Index width = GENERATE(2, 15, 33, 131);
  // Far from zero: sums in float, or E[x²] − E[x]², would fail.
  const qkv::Matrix<TestType> x = (numbers<TestType>(5, width, 3).array() + TestType(1000)).matrix();
  const qkv::RowVector<TestType> gain = numbers<TestType>(1, width, 4), bias = numbers<TestType>(1, width, 5);
  const double allowed = sizeof(TestType) == 4 ? few_ulps<TestType>(4) : 1e-9;
  REQUIRE(max_error(qkv::layer_norm(x, gain, bias, 1e-5), layer_by_formula(x, gain, bias, 1e-5L)) <= allowed);
}

TEMPLATE_TEST_CASE("RMSNorm per head norms each head by itself with one gain", "[norm]", float, double) {
  const Index heads = 3, head_dim = 21;
  const qkv::Matrix<TestType> x = numbers<TestType>(7, heads * head_dim, 6);
  const qkv::RowVector<TestType> gain = numbers<TestType>(1, head_dim, 7);
  const auto y = qkv::rms_norm(x, gain, 1e-5, heads);
  REQUIRE(max_error(y, rms_by_formula(x, gain, 1e-5L, heads)) <= few_ulps<TestType>(4));
  for (Index h = 0; h < heads; ++h)
    REQUIRE(same_bits(y.middleCols(h * head_dim, head_dim),
                      qkv::rms_norm(x.middleCols(h * head_dim, head_dim), gain, 1e-5)));
}

TEMPLATE_TEST_CASE("a normed row has the same bits alone, in place and in a strided view", "[norm]", float, double) {
  const Index width = 45;
  const qkv::Matrix<TestType> x = numbers<TestType>(6, width, 8);
  const qkv::RowVector<TestType> gain = numbers<TestType>(1, width, 9), bias = numbers<TestType>(1, width, 10);
  const auto rms = qkv::rms_norm(x, gain, 1e-6), layer = qkv::layer_norm(x, gain, bias, 1e-5);
  for (Index i = 0; i < x.rows(); ++i) {
    REQUIRE(same_bits(qkv::rms_norm(x.row(i), gain, 1e-6), rms.row(i)));
    REQUIRE(same_bits(qkv::layer_norm(x.row(i), gain, bias, 1e-5), layer.row(i)));
  }
  qkv::Matrix<TestType> buffer = qkv::Matrix<TestType>::Constant(6, width + 5, 3), apart(6, width);
  auto block = buffer.middleCols(2, width);
  block = x;
  qkv::rms_norm_into(block, block, gain, 1e-6);
  REQUIRE(same_bits(block, rms));
  qkv::rms_norm_into(apart, x, gain, 1e-6);
  REQUIRE(same_bits(apart, rms));
  block = x;
  qkv::layer_norm_into(block, block, gain, bias, 1e-5);
  REQUIRE(same_bits(block, layer));
  qkv::layer_norm_into(apart, x, gain, bias, 1e-5);
  REQUIRE(same_bits(apart, layer));
  block.setConstant(3);
  REQUIRE((buffer.array() == 3).all());
}

TEST_CASE("a common factor of a token does not change its RMSNorm, an offset not its LayerNorm", "[norm]") {
  const qkv::Matrix<double> x = numbers<double>(3, 19, 11);
  const qkv::RowVector<double> gain = numbers<double>(1, 19, 12), bias = numbers<double>(1, 19, 13);
  REQUIRE(max_error(qkv::rms_norm(x * 1024, gain, 0), qkv::rms_norm(x, gain, 0)) < 1e-15);
  REQUIRE(max_error(qkv::layer_norm((x.array() + 8).matrix(), gain, bias, 0), qkv::layer_norm(x, gain, bias, 0)) <
          1e-13);
}

TEST_CASE("norms survive rows of zeros and of huge floats, and keep NaN in its row", "[norm]") {
  qkv::Matrix<float> x = numbers<float>(4, 9, 14);
  x.row(0).setZero();
  x.row(1) *= 1e30F;  // the square overflows float
  x(2, 4) = std::numeric_limits<float>::quiet_NaN();
  const qkv::RowVector<float> ones = qkv::RowVector<float>::Ones(9);
  const auto y = qkv::rms_norm(x, ones, 1e-6);
  REQUIRE(y.row(0).isZero(0));
  REQUIRE(std::abs(y.row(1).squaredNorm() - 9) < 1e-4F);
  REQUIRE(y.row(2).array().isNaN().all());
  REQUIRE(same_bits(y.row(3), qkv::rms_norm(x.row(3), ones, 1e-6)));
}

TEST_CASE("norms refuse what does not fit, before they write", "[norm]") {
  qkv::Matrix<float> x = numbers<float>(4, 12, 15);
  const qkv::Matrix<float> before = x;
  const qkv::RowVector<float> gain = numbers<float>(1, 12, 16);
  REQUIRE(contains(message_of([&] { qkv::rms_norm(x, gain.leftCols(5), 1e-6); }), "[1, 12]"));
  REQUIRE(contains(message_of([&] { qkv::rms_norm(x, gain, 1e-6, 3); }), "[1, 4]"));
  REQUIRE(contains(message_of([&] { qkv::rms_norm(x, gain, 1e-6, 5); }), "heads 5"));
  // Every number divides 0 columns; a head has a feature all the same.
  const qkv::Matrix<float> none(3, 0), tall(Index{1} << 60, 0);
  const qkv::RowVector<float> no_gain(0);
  REQUIRE(
      contains(message_of([&] { qkv::rms_norm(none, no_gain, 1e-6, Index{1} << 60); }), "a feature or more for each"));
  REQUIRE(qkv::rms_norm(none, no_gain, 1e-6).rows() == 3);
  REQUIRE(qkv::rms_norm(tall, no_gain, 1e-6).size() == 0);  // at once
  REQUIRE(qkv::layer_norm(tall, no_gain, no_gain, 1e-6).size() == 0);
  REQUIRE_THROWS_AS(qkv::rms_norm(x, gain, -1.0), std::invalid_argument);
  REQUIRE(contains(message_of([&] { qkv::rms_norm(x, gain, -1e-9); }), "eps must be >= 0; given -1e-09"));
  REQUIRE_THROWS_AS(qkv::rms_norm(x, gain, std::nan("")), std::invalid_argument);
  REQUIRE_THROWS_AS(qkv::layer_norm(x, gain, gain.leftCols(5), 1e-6), std::invalid_argument);
  REQUIRE_THROWS_AS(qkv::rms_norm_into(x.topRows(3), x.bottomRows(3), gain, 1e-6), std::invalid_argument);
  REQUIRE_THROWS_AS(qkv::rms_norm_into(x, x, x.row(0), 1e-6), std::invalid_argument);
  REQUIRE(same_bits(x, before));
}

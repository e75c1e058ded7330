#include <qkv/projection.hpp>

#include "support/catch.hpp"
#include "support/numbers.hpp"

using namespace support;

namespace {

/// The contract's chain, one element at a time.
template <class T>
T chain(const qkv::Matrix<T>& x, Index row, const qkv::Matrix<T>& w, Index column, T start) {
  T sum = start;
  for (Index k = 0; k < x.cols(); ++k) {
#ifdef __FMA__
    sum = std::fma(x(row, k), w(k, column), sum);
#else
    volatile T product = x(row, k) * w(k, column);
    sum = product + sum;
#endif
  }
  return sum;
}

}  // namespace

TEMPLATE_TEST_CASE("a projection is x W plus b", "[projection]", float, double, long double) {
  const Index n = 5, in = 301, out = 71;
  const qkv::Matrix<TestType> x = numbers<TestType>(n, in, 1), w = numbers<TestType>(in, out, 2);
  const qkv::RowVector<TestType> b = numbers<TestType>(1, out, 3);
  qkv::Matrix<long double> expected(n, out), with_bias(n, out);
  for (Index i = 0; i < n; ++i)
    for (Index j = 0; j < out; ++j) {
      expected(i, j) = 0;
      for (Index k = 0; k < in; ++k) expected(i, j) += static_cast<long double>(x(i, k)) * w(k, j);
      with_bias(i, j) = expected(i, j) + b(j);
    }
  const double allowed = static_cast<double>(in) * 8 * static_cast<double>(std::numeric_limits<TestType>::epsilon());
  const qkv::Projection<TestType> plain(w), biased(w, b);
  REQUIRE_FALSE(plain.has_bias());
  REQUIRE(biased.has_bias());
  REQUIRE(biased.in_dim() == in);
  REQUIRE(biased.out_dim() == out);
  REQUIRE(max_error(plain.forward(x), expected) <= allowed);
  REQUIRE(max_error(biased.forward(x), with_bias) <= allowed);
}

TEMPLATE_TEST_CASE("a row's bits do not depend on the number of rows", "[projection]", float, double) {
  for (const Index in : {1, 2, 3, 7, 16, 31, 33, 64, 70, 128, 129, 261})
    for (Index out = 1; out <= 70; ++out) {
      const qkv::Matrix<TestType> x = numbers<TestType>(9, in, 4), w = numbers<TestType>(in, out, 5);
      const qkv::Projection<TestType> projection(w, numbers<TestType>(1, out, 6));
      const auto all = projection.forward(x);
      bool same = true;
      for (Index rows = 1; rows < 9; ++rows)
        for (Index first = 0; first + rows <= 9; first += rows)
          same = same && same_bits(projection.forward(x.middleRows(first, rows)), all.middleRows(first, rows));
      CAPTURE(in, out);
      REQUIRE(same);
      REQUIRE(all(8, out - 1) == chain<TestType>(x, 8, w, out - 1, projection.bias()(out - 1)));
      REQUIRE(all(0, 0) == chain<TestType>(x, 0, w, 0, projection.bias()(0)));
    }
}

TEST_CASE("weights in PyTorch's layout are the transpose", "[projection]") {
  const qkv::Matrix<float> x = numbers<float>(3, 17, 7), w = numbers<float>(17, 29, 8), torch = w.transpose();
  const qkv::RowVector<float> b = numbers<float>(1, 29, 9);
  REQUIRE(same_bits(qkv::from_torch(torch), w));
  REQUIRE(same_bits(qkv::Projection<float>::from_out_in(torch, b).forward(x), qkv::Projection<float>(w, b).forward(x)));
  const Eigen::MatrixXf column_major = w;
  REQUIRE(same_bits(qkv::Projection<float>(column_major).weight(), w));
}

TEST_CASE("forward_into reads and writes strided views and nothing beside them", "[projection]") {
  const qkv::Matrix<double> w = numbers<double>(11, 23, 10);
  const qkv::Projection<double> projection(w);
  const qkv::Matrix<double> wide = numbers<double>(6, 19, 11);
  const auto x = wide.middleCols(5, 11);
  qkv::Matrix<double> buffer = qkv::Matrix<double>::Constant(8, 31, 7);
  projection.forward_into(buffer.block(1, 4, 6, 23), x);
  REQUIRE(same_bits(buffer.block(1, 4, 6, 23), projection.forward(x)));
  REQUIRE(same_bits(projection.forward(x * 1.0), projection.forward(x)));
  buffer.block(1, 4, 6, 23).setConstant(7);
  REQUIRE((buffer.array() == 7).all());
}

TEST_CASE("NaN and infinity stay in their row", "[projection]") {
  qkv::Matrix<float> x = numbers<float>(6, 13, 12);
  const qkv::Projection<float> projection(numbers<float>(13, 37, 13));
  const auto clean = projection.forward(x);
  x(2, 5) = std::numeric_limits<float>::quiet_NaN();
  x(4, 0) = std::numeric_limits<float>::infinity();
  const auto y = projection.forward(x);
  REQUIRE(y.row(2).array().isNaN().all());
  REQUIRE(y.row(4).array().isInf().all());
  for (const Index i : {0, 1, 3, 5}) REQUIRE(same_bits(y.row(i), clean.row(i)));
}

TEST_CASE("no rows and no input features are legal", "[projection]") {
  const qkv::Projection<float> projection(numbers<float>(13, 37, 14));
  REQUIRE(projection.forward(qkv::Matrix<float>(0, 13)).rows() == 0);
  const qkv::RowVector<float> b = numbers<float>(1, 5, 15);
  const qkv::Projection<float> constant(qkv::Matrix<float>(0, 5), b);
  REQUIRE(same_bits(constant.forward(qkv::Matrix<float>(2, 0)).row(1), b));
}

TEST_CASE("a projection names the shapes that do not fit", "[projection]") {
  const qkv::Matrix<float> w = numbers<float>(13, 37, 16);
  REQUIRE(contains(message_of([&] { qkv::Projection<float>(w, numbers<float>(1, 13, 17)); }), "[13, 37]"));
  const qkv::Projection<float> projection(w);
  qkv::Matrix<float> x = numbers<float>(4, 40, 18), out(4, 36);
  REQUIRE(contains(message_of([&] { projection.forward(x); }), "x is [4, 40]"));
  REQUIRE(contains(message_of([&] { projection.forward_into(out, x.leftCols(13)); }), "out is [4, 36]"));
  REQUIRE(contains(message_of([&] { projection.forward_into(x.rightCols(37), x.leftCols(13)); }), "share elements"));
}

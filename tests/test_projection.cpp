#include <qkv/embedding.hpp>
#include <qkv/projection.hpp>

#include "support/catch.hpp"
#include "support/executors.hpp"
#include "support/numbers.hpp"

using namespace support;

namespace {

/// A scalar of the user's own, as wide as double, which no instruction set knows.
struct Real {
  double value = 0;
  Real() = default;
  Real(double x) : value(x) {}
  explicit operator float() const { return static_cast<float>(value); }
  explicit operator long double() const { return static_cast<long double>(value); }
  friend Real operator+(Real a, Real b) { return a.value + b.value; }
  friend Real operator*(Real a, Real b) { return a.value * b.value; }
};

}  // namespace

template <>
struct Eigen::NumTraits<Real> : Eigen::NumTraits<double> {
  using Real = ::Real;
  using NonInteger = ::Real;
  using Nested = ::Real;
  using Literal = ::Real;
};

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

TEST_CASE("a projection of a user's own scalar is x W plus b", "[projection]") {
  for (Index in = 1; in <= 40; in += 3)
    for (Index out = 1; out <= 40; ++out) {
      const qkv::Matrix<double> x = numbers<double>(9, in, 1), w = numbers<double>(in, out, 2),
                                b = numbers<double>(1, out, 3);
      const qkv::Matrix<double> expected = (x * w).rowwise() + b.row(0);
      const qkv::Projection<Real> projection(qkv::Matrix<Real>(w.cast<Real>()), qkv::RowVector<Real>(b.cast<Real>()));
      const qkv::Matrix<Real> reals = x.cast<Real>();
      CAPTURE(in, out);
      for (Index rows = 1; rows <= 9; ++rows)
        REQUIRE(max_error(projection.forward(reals.topRows(rows)), expected.topRows(rows)) <= 1e-14 * 40);
    }
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
  REQUIRE(same_bits(constant.stored_as<std::int8_t>().forward(qkv::Matrix<float>(2, 0)).row(1), b));
}

TEST_CASE("rows, inputs and outputs of nothing are done with at once, whatever their number", "[projection]") {
  constexpr Index absurd = Index{1} << 60;
  const qkv::Matrix<float> none(0, 0), wide(0, absurd), tall(absurd, 0);
  const qkv::Projection<float> to_many(wide), from_many(tall), to_none(none);
  REQUIRE(to_many.forward(none).cols() == absurd);
  REQUIRE(to_many.weight().cols() == absurd);
  REQUIRE(from_many.forward(wide).size() == 0);
  REQUIRE(from_many.weight().rows() == absurd);
  REQUIRE(from_many.stored_as<std::int8_t>().forward(wide).size() == 0);
  REQUIRE(to_none.forward(tall).rows() == absurd);
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

TEST_CASE("weights are handed back as they came, and copies share them", "[projection]") {
  const qkv::Matrix<float> w = numbers<float>(19, 71, 19);
  const qkv::RowVector<float> b = numbers<float>(1, 71, 20);
  qkv::Projection<float> projection(w, b), copy = projection;
  REQUIRE(same_bits(projection.weight(), w));
  REQUIRE(same_bits(qkv::Projection<float>::from_out_in(w.transpose()).weight(), w));
  REQUIRE(projection.bytes() == 3 * 32 * 19 * 4);  // 71 columns in panels of 32
  const qkv::Projection<float> moved = std::move(copy);
  REQUIRE(same_bits(copy.forward(w.transpose()), moved.forward(w.transpose())));
  projection = qkv::Projection<float>();
  REQUIRE(projection.in_dim() == 0);
  REQUIRE(projection.weight().size() == 0);
  REQUIRE(projection.forward(qkv::Matrix<float>(3, 0)).rows() == 3);
  REQUIRE(same_bits(copy.weight(), w));
  REQUIRE(same_bits(copy.bias(), b));
}

TEMPLATE_TEST_CASE("narrow weights are those rounded, within the error that is promised", "[projection]", qkv::half,
                   qkv::bfloat16, std::int8_t) {
  const Index in = 301, out = 67;
  const qkv::Matrix<float> x = numbers<float>(21, in, 21), w = numbers<float>(in, out, 22);
  const qkv::RowVector<float> b = numbers<float>(1, out, 23);
  const auto narrow = qkv::Projection<float>(w, b).stored_as<TestType>();
  REQUIRE(narrow.bytes() < 3 * 32 * in * static_cast<Index>(sizeof(TestType)) + 1000);
  const qkv::Matrix<float> rounded = narrow.weight();
  double worst = 0;
  for (Index c = 0; c < out; ++c)
    for (Index k = 0; k < in; ++k) {
      const double allowed =
          std::is_same_v<TestType, std::int8_t> ? static_cast<double>(w.col(c).cwiseAbs().maxCoeff()) / 254 * (1 + 1e-5)
          : std::is_same_v<TestType, qkv::half> ? std::abs(static_cast<double>(w(k, c))) / 2048 + 3e-8
                                                : std::abs(static_cast<double>(w(k, c))) / 256;
      worst = std::max(worst, std::abs(static_cast<double>(rounded(k, c) - w(k, c))) / allowed);
    }
  REQUIRE(worst <= 1);
  REQUIRE(worst > 0.5);  // it is rounded
  const auto y = narrow.forward(x);
  REQUIRE(max_error(y, qkv::Projection<float>(rounded, b).forward(x)) <= 1e-5 * std::sqrt(static_cast<double>(in)));
  for (const Index rows : {1, 2, 3, 4, 5, 13})
    for (Index first = 0; first + rows <= 21; first += rows)
      REQUIRE(same_bits(narrow.forward(x.middleRows(first, rows)), y.middleRows(first, rows)));
}

TEMPLATE_TEST_CASE("any executor gives the same bits, for one product or several together", "[projection]", float,
                   double) {
  const qkv::Matrix<TestType> w = numbers<TestType>(70, 1100, 24);
  const qkv::Projection<TestType> wide(w), narrow(w.leftCols(33)), none(w.leftCols(0));
  for (const Index n : {0, 1, 3, 40, 150}) {
    const qkv::Matrix<TestType> x = numbers<TestType>(n, 70, 25), expected = wide.forward(x);
    REQUIRE(same_bits(wide.forward(x, shuffled(1)), expected));
    REQUIRE(same_bits(wide.forward(x, threaded(3)), expected));
    qkv::Matrix<TestType> a(n, 1100), b(n, 33), c(n, 0);
    qkv::detail::run_together<TestType, 3>({{{&none, qkv::writable_view(c), qkv::view(x)},
                                             {&wide, qkv::writable_view(a), qkv::view(x)},
                                             {&narrow, qkv::writable_view(b), qkv::view(x)}}},
                                           threaded(3));
    REQUIRE(same_bits(a, expected));
    REQUIRE(same_bits(b, expected.leftCols(33)));
  }
}

TEST_CASE("a tied output head has the bits of a projection of its transpose", "[projection]") {
  const qkv::Matrix<float> table = numbers<float>(83, 150, 26), x = numbers<float>(7, 150, 27);
  REQUIRE(same_bits(qkv::Embedding<float>(table).logits(x), qkv::Projection<float>::from_out_in(table).forward(x)));
}

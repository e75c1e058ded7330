#include "qkv/product/packed_product.hpp"

#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "support/catch.hpp"

namespace {

using qkv::Index;
using qkv::Matrix;
using qkv::kernel::PackedWeights;
using qkv::kernel::Simd;
using qkv::kernel::TileOperands;
using qkv::kernel::TileShape;

template <class T>
inline constexpr T not_a_number = std::numeric_limits<T>::quiet_NaN();

template <class T>
Matrix<T> random_matrix(Index rows, Index cols, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<double> normal;
  Matrix<T> x(rows, cols);
  for (Index i = 0; i < rows; ++i)
    for (Index j = 0; j < cols; ++j) x(i, j) = static_cast<T>(normal(random));
  return x;
}

/// Equal bits, so NaN equals NaN of the same kind and 0 differs from -0.
template <class A, class B>
bool same_bits(const A& a, const B& b) {
  if (a.rows() != b.rows() || a.cols() != b.cols()) return false;
  for (Index i = 0; i < a.rows(); ++i)
    for (Index j = 0; j < a.cols(); ++j)
      if (!(a(i, j) == b(i, j) && std::signbit(a(i, j)) == std::signbit(b(i, j)))) return false;
  return true;
}

/// Σ |x_rk w_kc| + |b_c| bounds the error of a chain: about in · epsilon / 2 of it, and the square root of that usually.
template <class T>
double worst_relative_error(const Matrix<T>& got, const Matrix<T>& x, const Matrix<T>& w, const std::vector<T>& bias) {
  double worst = 0;
  for (Index r = 0; r < x.rows(); ++r)
    for (Index c = 0; c < w.cols(); ++c) {
      long double sum = bias.empty() ? 0 : bias[static_cast<std::size_t>(c)], size = std::abs(sum);
      for (Index k = 0; k < x.cols(); ++k) {
        const long double term = static_cast<long double>(x(r, k)) * static_cast<long double>(w(k, c));
        sum += term;
        size += std::abs(term);
      }
      const double error = static_cast<double>(std::abs(static_cast<long double>(got(r, c)) - sum) /
                                               (size + std::numeric_limits<long double>::min()));
      if (!(error <= worst)) worst = error;
    }
  return worst;
}

template <class T>
Matrix<T> product(const Matrix<T>& x, const PackedWeights<T>& w, const std::vector<T>& bias = {}) {
  Matrix<T> out = Matrix<T>::Constant(x.rows(), w.out(), not_a_number<T>);
  qkv::kernel::packed_product_into(out, x, w, std::span<const T>(bias));
  return out;
}

/// Runs the items backwards.
struct Backwards {
  template <class F>
  void operator()(Index n, F&& f) const {
    for (Index i = n; i-- > 0;) f(i);
  }
};

}  // namespace

TEMPLATE_TEST_CASE("a packed product is x·W + b within rounding, for any sizes", "[gemm]", float, double, long double) {
  struct Size {
    Index rows, in, out;
  };
  for (const Size s : {Size{1, 1, 1},
                       {2, 1, 3},
                       {1, 7, 5},
                       {3, 5, 31},
                       {5, 257, 33},
                       {13, 300, 65},
                       {97, 19, 34},
                       {7, 513, 17},
                       {1, 1031, 129},
                       {193, 11, 29},
                       {26, 2053, 9}}) {
    const auto x = random_matrix<TestType>(s.rows, s.in, 1), w = random_matrix<TestType>(s.in, s.out, 2);
    const auto b = random_matrix<TestType>(1, s.out, 3);
    const std::vector<TestType> bias(b.data(), b.data() + s.out);
    const PackedWeights<TestType> packed(w);
    const double bound = static_cast<double>(std::numeric_limits<TestType>::epsilon()) * (2 + std::sqrt(s.in));
    INFO(s.rows << " x " << s.in << " x " << s.out);
    CHECK(worst_relative_error(product(x, packed), x, w, {}) <= bound);
    CHECK(worst_relative_error(product(x, packed, bias), x, w, bias) <= bound);
  }
}

TEMPLATE_TEST_CASE("a row has the same bits alone and in a batch of any size", "[gemm]", float, double) {
  for (const Index in : {Index{37}, Index{600}}) {
    const Index out = 75;
    const auto x = random_matrix<TestType>(101, in, 4);
    const PackedWeights<TestType> w(random_matrix<TestType>(in, out, 5));
    const auto b = random_matrix<TestType>(1, out, 6);
    const std::vector<TestType> bias(b.data(), b.data() + out);
    Matrix<TestType> alone(x.rows(), out);
    for (Index r = 0; r < x.rows(); ++r) alone.row(r) = product<TestType>(x.row(r), w, bias);
    for (Index n = 1; n <= 101; n += n < 70 ? 1 : 31) {
      const Index first = (n * 7) % (102 - n);
      INFO("rows " << first << " … " << first + n - 1);
      CHECK(same_bits(product<TestType>(x.middleRows(first, n), w, bias), alone.middleRows(first, n)));
    }
  }
}

TEMPLATE_TEST_CASE("an output element is one chain of multiply-adds from the bias on", "[gemm]", float, double) {
  const Index in = 531, out = 37;
  const auto x = random_matrix<TestType>(17, in, 7), w = random_matrix<TestType>(in, out, 8);
  const auto b = random_matrix<TestType>(1, out, 9);
  const auto got = product(x, PackedWeights<TestType>(w), std::vector<TestType>(b.data(), b.data() + out));
  for (Index r = 0; r < x.rows(); ++r)
    for (Index c = 0; c < out; ++c) {
      TestType chain = b(0, c);
      for (Index k = 0; k < in; ++k) {
        const volatile TestType rounded = x(r, k) * w(k, c);
        chain = Simd<TestType>::fused ? std::fma(x(r, k), w(k, c), chain) : rounded + chain;
      }
      CHECK(got(r, c) == chain);
    }
}

TEMPLATE_TEST_CASE("the executor's order changes no bit", "[gemm]", float, double) {
  const auto x = random_matrix<TestType>(211, 67, 10);
  const PackedWeights<TestType> w(random_matrix<TestType>(67, 1100, 11));
  Matrix<TestType> out(x.rows(), w.out());
  qkv::kernel::packed_product_into(out, x, w, std::span<const TestType>(), Backwards{});
  CHECK(same_bits(out, product(x, w)));
}

TEMPLATE_TEST_CASE("blocks of wider matrices are read and written in place, and nothing around them", "[gemm]", float,
                   double) {
  const Index rows = 29, in = 41, out = 43;
  Matrix<TestType> wide_in = Matrix<TestType>::Constant(rows + 2, in + 7, not_a_number<TestType>);
  Matrix<TestType> wide_out = Matrix<TestType>::Constant(rows + 2, out + 9, TestType(-7));
  wide_in.block(1, 3, rows, in) = random_matrix<TestType>(rows, in, 12);
  const PackedWeights<TestType> w(random_matrix<TestType>(in, out, 13));
  for (const Index n : {rows, Index{1}, Index{5}}) {
    wide_out.setConstant(TestType(-7));
    qkv::kernel::packed_product_into(wide_out.block(1, 4, n, out), wide_in.block(1, 3, n, in), w);
    const Matrix<TestType> x = wide_in.block(1, 3, n, in);
    CHECK(same_bits(wide_out.block(1, 4, n, out), product(x, w)));
    wide_out.block(1, 4, n, out).setConstant(TestType(-7));
    CHECK((wide_out.array() == TestType(-7)).all());
  }
}

TEMPLATE_TEST_CASE("exact buffers are never left: the end of x, of out and of the bias", "[gemm]", float, double) {
  // Heap blocks of exactly the right size, for the address sanitizer; canaries for everyone else.
  for (Index rows = 1; rows <= 27; ++rows)
    for (const Index in : {Index{1}, Index{3}, Index{17}})
      for (const Index out : {Index{1}, Index{15}, Index{33}}) {
        const auto x = random_matrix<TestType>(rows, in, 14);
        const PackedWeights<TestType> w(random_matrix<TestType>(in, out, 15));
        const std::vector<TestType> bias(static_cast<std::size_t>(out), TestType(2));
        std::vector<TestType> memory(static_cast<std::size_t>(rows * out) + 64, TestType(-7));
        qkv::View<TestType> inside(memory.data() + 32, rows, out, Eigen::OuterStride<>(out));
        qkv::kernel::packed_product_into(inside, x, w, std::span<const TestType>(bias));
        for (std::size_t i = 0; i < 32; ++i) {
          CHECK(memory[i] == TestType(-7));
          CHECK(memory[memory.size() - 1 - i] == TestType(-7));
        }
        CHECK(same_bits(inside, product(x, w, bias)));
      }
}

TEMPLATE_TEST_CASE("NaN and infinity in a row or a column of weights stay there", "[gemm]", float, double) {
  const Index rows = 25, in = 70, out = 45;
  auto x = random_matrix<TestType>(rows, in, 16), w = random_matrix<TestType>(in, out, 17);
  const Matrix<TestType> clean = product(x, PackedWeights<TestType>(w));
  x(13, 5) = not_a_number<TestType>;
  x(4, 69) = std::numeric_limits<TestType>::infinity();
  w(8, 44) = not_a_number<TestType>;
  const Matrix<TestType> got = product(x, PackedWeights<TestType>(w));
  for (Index r = 0; r < rows; ++r)
    for (Index c = 0; c < out; ++c) {
      INFO(r << ", " << c);
      if (r == 13 || c == 44)
        CHECK(std::isnan(got(r, c)));
      else if (r == 4)
        CHECK(std::isinf(got(r, c)));
      else
        CHECK(got(r, c) == clean(r, c));
    }
}

TEST_CASE("no rows, no inputs and no outputs are legal products", "[gemm]") {
  const PackedWeights<float> w(random_matrix<float>(5, 7, 18)), no_inputs(Matrix<float>(0, 3)),
      no_outputs(Matrix<float>(4, 0)), nothing;
  CHECK(product<float>(Matrix<float>(0, 5), w).rows() == 0);
  CHECK((product<float>(Matrix<float>(3, 0), no_inputs).array() == 0).all());
  CHECK(
      (product<float>(Matrix<float>(2, 0), no_inputs, {1, 2, 3}).row(1).array() == Eigen::Array3f(1, 2, 3).transpose())
          .all());
  CHECK(product<float>(Matrix<float>::Ones(2, 4), no_outputs).size() == 0);
  CHECK(product<float>(Matrix<float>(2, 0), nothing).size() == 0);
}

TEST_CASE("wrong shapes and overlapping outputs are refused in words", "[gemm]") {
  const PackedWeights<float> w(random_matrix<float>(5, 7, 19));
  Matrix<float> x = random_matrix<float>(3, 5, 20), out(3, 7), wrong(3, 6), both(3, 12);
  CHECK_THROWS_AS(qkv::kernel::packed_product_into(wrong, x, w), std::invalid_argument);
  CHECK_THROWS_AS(qkv::kernel::packed_product_into(out, wrong, w), std::invalid_argument);
  const std::vector<float> bias(6);
  CHECK_THROWS_AS(qkv::kernel::packed_product_into(out, x, w, std::span<const float>(bias)), std::invalid_argument);
  CHECK_THROWS_AS(qkv::kernel::packed_product_into(both.leftCols(7), both.middleCols(6, 5), w), std::invalid_argument);
  CHECK_THROWS_AS(qkv::kernel::packed_product_into(both.leftCols(7), x, w, std::span<const float>(&both(1, 6), 7)),
                  std::invalid_argument);
  both.rightCols(5) = x;
  qkv::kernel::packed_product_into(both.leftCols(7), both.rightCols(5), w);
  CHECK(same_bits(both.leftCols(7), product(x, w)));
}

TEST_CASE("weights kept narrower give the product of the rounded weights", "[gemm]") {
  const Index rows = 15, in = 330, out = 50;
  const auto x = random_matrix<float>(rows, in, 21), w = random_matrix<float>(in, out, 22);
  const auto b = random_matrix<float>(1, out, 23);
  const std::vector<float> bias(b.data(), b.data() + out);
  const auto check = [&](const auto& packed, const Matrix<float>& rounded, double tolerance) {
    Matrix<float> got(rows, out), alone(1, out);
    qkv::kernel::packed_product_into(got, x, packed, std::span<const float>(bias));
    CHECK(worst_relative_error(got, x, rounded, bias) <= tolerance);
    qkv::kernel::packed_product_into(alone, Matrix<float>(x.row(7)), packed, std::span<const float>(bias));
    CHECK(same_bits(alone, got.row(7)));
  };
  const double bound = std::numeric_limits<float>::epsilon() * 20;
  check(PackedWeights<float, qkv::bfloat16>(w), w.cast<qkv::bfloat16>().cast<float>(), bound);
  check(PackedWeights<float, qkv::half>(w), w.cast<qkv::half>().cast<float>(), bound);
  Matrix<float> rounded(in, out);
  for (Index c = 0; c < out; ++c) {
    const float scale = w.col(c).cwiseAbs().maxCoeff() / 127.0F;
    for (Index k = 0; k < in; ++k) rounded(k, c) = std::nearbyint(w(k, c) / scale) * scale;
  }
  check(PackedWeights<float, std::int8_t>(w), rounded, bound);
}

TEST_CASE("packed weights take any expression and know their size", "[gemm]") {
  const auto w = random_matrix<float>(70, 33, 24);
  const Matrix<float> transposed = w.transpose();
  const Eigen::MatrixXf column_major = w;
  const auto x = random_matrix<float>(4, 70, 25);
  const PackedWeights<float> packed(w);
  CHECK(same_bits(product(x, packed), product(x, PackedWeights<float>(transposed.transpose()))));
  CHECK(same_bits(product(x, packed), product(x, PackedWeights<float>(column_major))));
  CHECK(packed.in() == 70);
  CHECK(packed.out() == 33);
  CHECK(packed.bytes() == 2 * 70 * 128);
  CHECK(reinterpret_cast<std::uintptr_t>(packed.rows(0, 0)) % 64 == 0);
  CHECK(PackedWeights<float, std::int8_t>(w).bytes() == 2 * 70 * 32 + 64 * 4);
}

TEMPLATE_TEST_CASE("packed rows are the transpose, for any height and depth", "[gemm]", float, double) {
  for (Index rows = 1; rows <= 35; ++rows)
    for (const Index depth : {Index{1}, Index{5}, Index{16}, Index{39}}) {
      const auto x = random_matrix<TestType>(rows, depth, 26);
      std::vector<TestType> panel(static_cast<std::size_t>(rows * depth + qkv::kernel::pack_slack<TestType>) + 1, -7);
      qkv::kernel::pack_rows(x.data(), depth, rows, rows, depth, panel.data());
      bool right = panel.back() == TestType(-7);
      for (Index r = 0; r < rows; ++r)
        for (Index k = 0; k < depth; ++k) right = right && panel[static_cast<std::size_t>(k * rows + r)] == x(r, k);
      INFO(rows << " x " << depth);
      CHECK(right);
    }
}

TEMPLATE_TEST_CASE("a tile adds to what it starts from, with rows of a apart or packed", "[gemm]", float, double) {
  constexpr Index columns = TileShape<TestType>::columns;
  const Index depth = 23;
  for (Index rows = 1; rows <= TileShape<TestType>::rows; ++rows) {
    const auto a = random_matrix<TestType>(rows, depth, 27), b = random_matrix<TestType>(depth, columns, 28),
               start = random_matrix<TestType>(rows, columns, 29);
    std::vector<TestType> panel(static_cast<std::size_t>(rows * depth + qkv::kernel::pack_slack<TestType>));
    qkv::kernel::pack_rows(a.data(), depth, rows, rows, depth, panel.data());
    Matrix<TestType> c = start;
    TileOperands<TestType> op{.depth = depth,
                              .a = panel.data(),
                              .b = b.data(),
                              .b_step = columns,
                              .start = c.data(),
                              .start_row = columns,
                              .c = c.data(),
                              .c_row = columns};
    qkv::kernel::packed_tile_of<TestType>(rows, op);
    for (Index r = 0; r < rows; ++r)
      for (Index j = 0; j < columns; ++j) {
        TestType sum = start(r, j);
        for (Index k = 0; k < depth; ++k) sum = qkv::detail::multiply_add(a(r, k), b(k, j), sum);
        CHECK(c(r, j) == sum);
      }
  }
  const auto a = random_matrix<TestType>(3, depth, 30), b = random_matrix<TestType>(depth, columns, 31);
  Matrix<TestType> c(3, columns);
  TileOperands<TestType> op{.depth = depth,
                            .a = a.data(),
                            .a_row = depth,
                            .a_step = 1,
                            .b = b.data(),
                            .b_step = columns,
                            .c = c.data(),
                            .c_row = columns};
  qkv::kernel::tile<3, TileShape<TestType>::vectors>(op, op.a_row, op.a_step);
  CHECK(same_bits(c, product(a, PackedWeights<TestType>(b))));
}

TEST_CASE("a product over no features is the bias, for any number of rows", "[gemm]") {
  const PackedWeights<float> weights(Matrix<float>(0, 9));
  const qkv::RowVector<float> bias = qkv::RowVector<float>::LinSpaced(9, 1, 2);
  for (const Index n : {1, 2, 13}) {
    Matrix<float> out = Matrix<float>::Constant(n, 9, 7);
    qkv::kernel::packed_product_into(out, Matrix<float>(n, 0), weights, std::span<const float>(bias.data(), 9));
    for (Index i = 0; i < n; ++i) CHECK(out.row(i) == bias);
  }
}

#include <qkv/position.hpp>

#include <array>
#include <vector>

#include "support/catch.hpp"
#include "support/numbers.hpp"

using namespace support;

TEMPLATE_TEST_CASE("sinusoidal positions follow the formula of section 3.5", "[position]", float, double) {
  const Index n = 37, model_dim = GENERATE(1, 6, 11);
  const auto table = qkv::sinusoidal_positions<TestType>(n, model_dim);
  qkv::Matrix<long double> expected(n, model_dim);
  for (Index p = 0; p < n; ++p)
    for (Index i = 0; 2 * i < model_dim; ++i) {
      const long double angle =
          static_cast<long double>(p) /
          std::pow(10000.0L, 2 * static_cast<long double>(i) / static_cast<long double>(model_dim));
      expected(p, 2 * i) = std::sin(angle);
      if (2 * i + 1 < model_dim) expected(p, 2 * i + 1) = std::cos(angle);
    }
  REQUIRE(max_error(table, expected) <= (sizeof(TestType) == 4 ? 6e-8 : 1e-14));
}

TEST_CASE("a sinusoidal vector depends on its position only", "[position]") {
  const std::vector<Index> positions{5, 0, 100000, 5, -3};
  const auto rows = qkv::sinusoidal_positions<float>(positions, 10);
  const auto table = qkv::sinusoidal_positions<float>(6, 10);
  REQUIRE(same_bits(rows.row(0), table.row(5)));
  REQUIRE(same_bits(rows.row(1), table.row(0)));
  REQUIRE(same_bits(rows.row(3), rows.row(0)));
  REQUIRE(std::abs(static_cast<double>(rows(2, 0)) - 0.035748797972016506) < 1e-8);  // sin(100000)
  REQUIRE(std::abs(static_cast<double>(rows(4, 0)) + 0.1411200080598672) < 1e-7);    // sin(-3)
  REQUIRE_THROWS_AS(qkv::sinusoidal_positions<float>(3, 0), std::invalid_argument);
}

TEST_CASE("moving by k positions is one rotation for all positions", "[position]") {
  // The paper's reason for sinusoids: PE(p + k) is a linear function of PE(p).
  const Index dim = 14, k = 9;
  const auto table = qkv::sinusoidal_positions<double>(60, dim), by = qkv::sinusoidal_positions<double>(k + 1, dim);
  for (Index p = 0; p + k < 60; ++p)
    for (Index i = 0; i < dim; i += 2) {
      const double s = by(k, i), c = by(k, i + 1);
      REQUIRE(std::abs(table(p, i) * c + table(p, i + 1) * s - table(p + k, i)) < 1e-13);
      REQUIRE(std::abs(table(p, i + 1) * c - table(p, i) * s - table(p + k, i + 1)) < 1e-13);
    }
}

TEST_CASE("learned positions add the row of each token's position", "[position]") {
  const qkv::Matrix<float> table = numbers<float>(13, 5, 1), x = numbers<float>(4, 5, 2);
  const qkv::LearnedPositions<float> positions(table);
  REQUIRE(same_bits(positions.forward(x, 3), x + table.middleRows(3, 4)));
  REQUIRE(same_bits(positions.forward(x), x + table.topRows(4)));
  REQUIRE(same_bits(positions.forward(x, 9), x + table.bottomRows(4)));
  const std::array<Index, 4> explicit_positions{12, 0, 7, 7};
  const auto y = positions.forward(x, explicit_positions);
  for (Index i = 0; i < 4; ++i)
    REQUIRE(same_bits(y.row(i), x.row(i) + table.row(explicit_positions[static_cast<std::size_t>(i)])));
  qkv::Matrix<float> in_place = x;
  positions.forward_into(in_place, in_place, explicit_positions);
  REQUIRE(same_bits(in_place, y));
}

TEST_CASE("learned positions end where their table ends", "[position]") {
  const qkv::LearnedPositions<float> positions(numbers<float>(13, 5, 1));
  qkv::Matrix<float> x = numbers<float>(4, 5, 2);
  const qkv::Matrix<float> before = x;
  REQUIRE(contains(message_of([&] { positions.forward_into(x, x, 10); }), "0 … 12"));
  REQUIRE_THROWS_AS(positions.forward(x, -1), std::invalid_argument);
  REQUIRE_THROWS_AS(positions.forward(x, std::numeric_limits<Index>::max()), std::invalid_argument);
  REQUIRE(contains(message_of([&] {
                     positions.forward_into(x, x, std::array<Index, 4>{0, 1, 2, 13});
                   }),
                   "position 13"));
  REQUIRE_THROWS_AS(positions.forward(x, std::array<Index, 3>{0, 1, 2}), std::invalid_argument);
  REQUIRE_THROWS_AS(positions.forward(x.leftCols(4)), std::invalid_argument);
  REQUIRE_THROWS_AS(positions.forward_into(x.topRows(3), x.bottomRows(3)), std::invalid_argument);  // shifted overlap
  REQUIRE(same_bits(x, before));
}

TEST_CASE("learned positions of nothing are added at once, to any number of rows", "[position]") {
  constexpr Index absurd = Index{1} << 60;
  const qkv::LearnedPositions<float> positions(qkv::Matrix<float>(absurd, 0));
  qkv::Matrix<float> x(absurd - 3, 0);
  REQUIRE(positions.forward(x, 3).rows() == absurd - 3);
  positions.forward_into(x, x, 3);
  REQUIRE(contains(message_of([&] { positions.forward_into(x, x, 4); }), "rows from position 4"));
}

TEST_CASE("ALiBi slopes are those of the authors' code", "[position]") {
  // get_slopes of the official repository, evaluated by hand.
  const std::vector<std::vector<double>> expected{
      {0.00390625},
      {0.0625, 0.00390625, 0.25},
      {0.25, 0.0625, 0.015625, 0.00390625, 0.5, 0.125},
      {0.5, 0.25, 0.125, 0.0625, 0.03125, 0.015625, 0.0078125, 0.00390625},
      {0.5, 0.25, 0.125, 0.0625, 0.03125, 0.015625, 0.0078125, 0.00390625, 0.7071067811865476, 0.3535533905932738,
       0.1767766952966369, 0.08838834764831845}};
  for (const auto& slopes : expected) {
    const auto actual = qkv::alibi_slopes<double>(static_cast<Index>(slopes.size()));
    REQUIRE(actual.size() == static_cast<Index>(slopes.size()));
    for (std::size_t h = 0; h < slopes.size(); ++h)
      REQUIRE(std::abs(actual(static_cast<Index>(h)) - slopes[h]) < 1e-15);
  }
  REQUIRE_THROWS_AS(qkv::alibi_slopes<float>(0), std::invalid_argument);
}

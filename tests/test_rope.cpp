#include <qkv/rope.hpp>

#include <array>
#include <vector>

#include "support/catch.hpp"
#include "support/numbers.hpp"

using namespace support;
using qkv::Pairing, qkv::Rope, qkv::RopeConfig;

namespace {

/// Equation 34 in long double; features past `dim` of each head stay.
template <class T>
qkv::Matrix<long double> by_formula(const qkv::Matrix<T>& x, Index heads, Index dim, bool interleaved,
                                    long double theta, const std::vector<Index>& positions) {
  qkv::Matrix<long double> y = x.template cast<long double>();
  const Index head_dim = x.cols() / heads;
  for (Index row = 0; row < x.rows(); ++row)
    for (Index h = 0; h < heads; ++h)
      for (Index i = 0; i < dim / 2; ++i) {
        const long double angle = static_cast<long double>(positions[static_cast<std::size_t>(row)]) *
                                  std::pow(theta, -2 * static_cast<long double>(i) / static_cast<long double>(dim));
        const Index a = h * head_dim + (interleaved ? 2 * i : i), b = interleaved ? a + 1 : a + dim / 2;
        const long double xa = x(row, a), xb = x(row, b);
        y(row, a) = xa * std::cos(angle) - xb * std::sin(angle);
        y(row, b) = xa * std::sin(angle) + xb * std::cos(angle);
      }
  return y;
}

Pairing pairing_of(bool interleaved) { return interleaved ? Pairing::interleaved : Pairing::half_split; }

}  // namespace

TEMPLATE_TEST_CASE("RoPE turns each pair by position times frequency", "[rope]", float, double, long double) {
  const bool interleaved = GENERATE(false, true);
  const Index dim = GENERATE(2, 22, 38, 154);
  const Index heads = 3, head_dim = dim + (dim == 22 ? 5 : 0);  // with 22: partial
  const std::vector<Index> positions{0, 7, 1, 100003, -12};
  const qkv::Matrix<TestType> x = numbers<TestType>(5, heads * head_dim, 1);
  const Rope<TestType> rope({.pairing = pairing_of(interleaved), .dim = dim, .theta = 5e5}, head_dim);
  const double allowed = sizeof(TestType) == 4 ? 3e-7 : 1e-10;  // double: the angle is 1e5 with half an ulp of error
  REQUIRE(max_error(rope.apply(x, heads, positions), by_formula(x, heads, dim, interleaved, 5e5L, positions)) <
          allowed);
}

TEST_CASE("features past dim keep their bits, and so does all of position 0", "[rope]") {
  const qkv::Matrix<float> x = numbers<float>(4, 2 * 13, 2);
  const Rope<float> rope({.pairing = Pairing::half_split, .dim = 6}, 13);
  const auto y = rope.apply(x, 2, 5);
  REQUIRE(same_bits(y.middleCols(6, 7), x.middleCols(6, 7)));
  REQUIRE(same_bits(y.rightCols(7), x.rightCols(7)));
  REQUIRE_FALSE(same_bits(y.leftCols(6), x.leftCols(6)));
  REQUIRE(same_bits(rope.apply(x, 2, std::vector<Index>(4, 0)), x));
}

TEST_CASE("scores of rotated queries and keys depend on the distance only", "[rope]") {
  const Index head_dim = 34;
  const qkv::Matrix<double> q = numbers<double>(1, head_dim, 3), k = numbers<double>(1, head_dim, 4);
  const Rope<double> rope({.pairing = pairing_of(GENERATE(false, true))}, head_dim);
  const auto score = [&](Index m, Index n) { return rope.apply(q, 1, m).row(0).dot(rope.apply(k, 1, n).row(0)); };
  for (const Index distance : {-9, 0, 1, 300})
    for (const Index n : {0, 3, 4097, 90001}) REQUIRE(std::abs(score(n + distance, n) - score(distance, 0)) < 1e-9);
  REQUIRE(std::abs(score(5, 0) - score(6, 0)) > 1e-3);
}

TEST_CASE("rotations keep lengths, compose by adding positions, and undo themselves", "[rope]") {
  const qkv::Matrix<double> x = numbers<double>(3, 2 * 10, 5);
  const Rope<double> rope({.pairing = Pairing::interleaved}, 10);
  const auto y = rope.apply(x, 2, 41);
  REQUIRE(std::abs(y.norm() - x.norm()) < 1e-14);
  const std::array<Index, 3> by{7, 7, 7}, back{-41, -42, -43};
  REQUIRE(max_error(rope.apply(y, 2, by), rope.apply(x, 2, 48)) < 1e-13);
  REQUIRE(max_error(rope.apply(y, 2, back), x) < 1e-13);
}

TEST_CASE("the two pairings are one rotation of permuted features", "[rope]") {
  const Index dim = 26;
  const qkv::Matrix<float> x = numbers<float>(6, dim, 6);
  qkv::Matrix<float> split(6, dim), back(6, dim);
  for (Index i = 0; i < dim / 2; ++i) split.col(i) = x.col(2 * i), split.col(i + dim / 2) = x.col(2 * i + 1);
  const auto y = Rope<float>({.pairing = Pairing::half_split}, dim).apply(split, 1, 9);
  for (Index i = 0; i < dim / 2; ++i) back.col(2 * i) = y.col(i), back.col(2 * i + 1) = y.col(i + dim / 2);
  REQUIRE(same_bits(back, Rope<float>({.pairing = Pairing::interleaved}, dim).apply(x, 1, 9)));
}

TEMPLATE_TEST_CASE("a reserved table, other rows, places and strides change no bit", "[rope]", float, double) {
  const Index heads = 3, head_dim = 70, n = 7;
  const RopeConfig config{.pairing = pairing_of(GENERATE(false, true)), .dim = 66};
  const qkv::Matrix<TestType> x = numbers<TestType>(n, heads * head_dim, 7);
  Rope<TestType> rope(config, head_dim);
  const auto y = rope.apply(x, heads, 11);
  const std::vector<Index> positions{11, 12, 13, 14, 15, 16, 17};
  REQUIRE(same_bits(rope.apply(x, heads, positions), y));
  for (Index i = 0; i < n; ++i) REQUIRE(same_bits(rope.apply(x.row(i), heads, 11 + i), y.row(i)));
  rope.reserve(14);  // some rows inside, some past the table
  REQUIRE(rope.cos().rows() == 14);
  REQUIRE(same_bits(rope.apply(x, heads, 11), y));
  qkv::Matrix<TestType> apart(n, heads * head_dim),
      buffer = qkv::Matrix<TestType>::Constant(n, heads * head_dim + 9, 2);
  rope.apply_into(apart, x, heads, 11);
  REQUIRE(same_bits(apart, y));
  auto block = buffer.middleCols(4, heads * head_dim);
  block = x;
  rope.apply_in_place(block, heads, positions);
  REQUIRE(same_bits(block, y));
  block.setConstant(2);
  REQUIRE((buffer.array() == 2).all());
}

TEST_CASE("features before the rope part of each head stay", "[rope]") {
  const Index heads = 3, nope = 11, rope_dim = 8, n = 4;
  const qkv::Matrix<float> x = numbers<float>(n, heads * (nope + rope_dim), 8);
  const Rope<float> rope({.pairing = Pairing::interleaved}, rope_dim);
  qkv::Matrix<float> y = x, apart(n, x.cols());
  rope.apply_in_place(y, heads, 5, nope);
  rope.apply_into(apart, x, heads, 5, nope);
  REQUIRE(same_bits(apart, y));
  for (Index h = 0; h < heads; ++h) {
    const Index c = h * (nope + rope_dim);
    REQUIRE(same_bits(y.middleCols(c, nope), x.middleCols(c, nope)));
    REQUIRE(same_bits(y.middleCols(c + nope, rope_dim), rope.apply(x.middleCols(c + nope, rope_dim), 1, 5)));
  }
}

TEST_CASE("the attention factor scales a rotation once, and a shift not again", "[rope]") {
  const double factor = qkv::yarn_mscale(4);
  const auto scaling = [](double attention_factor) {
    return qkv::yarn_scaling({.factor = 4, .original_context = 64, .attention_factor = attention_factor});
  };
  const qkv::Matrix<double> x = numbers<double>(3, 2 * 12, 9);
  const Rope<double> plain({.pairing = Pairing::half_split, .scaling = scaling(1)}, 12),
      scaled({.pairing = Pairing::half_split, .scaling = scaling(factor)}, 12);
  REQUIRE(max_error(scaled.apply(x, 2, 5), plain.apply(x, 2, 5) * factor) < 1e-14);
  for (const Index delta : {-30, 9}) {
    auto y = scaled.apply(x, 2, 40);
    scaled.shift_in_place(y, 2, delta);
    REQUIRE(max_error(y, scaled.apply(x, 2, 40 + delta)) < 1e-13);
  }
}

TEMPLATE_TEST_CASE("the caller's own tables give the same rotation", "[rope]", float, double) {
  const Index heads = 2, head_dim = 19, dim = 14, n = 5;
  const Pairing pairing = pairing_of(GENERATE(false, true));
  const qkv::Matrix<TestType> x = numbers<TestType>(n, heads * head_dim, 10);
  Rope<TestType> rope({.pairing = pairing, .dim = dim}, head_dim);
  rope.reserve(23);
  const std::vector<Index> positions{22, 0, 3, 3, 17};
  const auto y = rope.apply(x, heads, positions);
  REQUIRE(same_bits(qkv::apply_rope(x, heads, rope.cos(), rope.sin(), pairing, positions), y));
  qkv::Matrix<TestType> cos(n, dim / 2), sin(n, dim / 2);
  for (Index i = 0; i < n; ++i) {
    cos.row(i) = rope.cos().row(positions[static_cast<std::size_t>(i)]);
    sin.row(i) = rope.sin().row(positions[static_cast<std::size_t>(i)]);
  }
  REQUIRE(same_bits(qkv::apply_rope(x, heads, cos, sin, pairing), y));
  qkv::Matrix<TestType> out = x;
  REQUIRE(contains(message_of([&] {
                     qkv::apply_rope_into(out, x, heads, cos, sin, pairing, std::vector<Index>{0, 1, 2, 3, 5});
                   }),
                   "position 5 of row 4"));
  REQUIRE_THROWS_AS(qkv::apply_rope(x, heads, rope.cos(), rope.sin(), pairing), std::invalid_argument);
  REQUIRE_THROWS_AS(qkv::apply_rope(x, heads, cos, sin.leftCols(3), pairing), std::invalid_argument);
  REQUIRE_THROWS_AS(qkv::apply_rope(x, 38, cos, sin, pairing), std::invalid_argument);
  REQUIRE(same_bits(out, x));
}

TEST_CASE("the caller's own tables turn features of nothing at once, in any number of rows", "[rope]") {
  const qkv::Matrix<float> none(Index{1} << 60, 0), few(4, 0);
  const Pairing pairing = pairing_of(GENERATE(false, true));
  REQUIRE(qkv::apply_rope(none, 3, none, none, pairing).rows() == none.rows());
  REQUIRE(qkv::apply_rope(few, Index{1} << 60, few, few, pairing).rows() == 4);
  // Their positions lie in the tables all the same.
  const std::array<Index, 4> past{0, 3, 1, 4}, before{0, 3, -1, 2};
  REQUIRE(contains(message_of([&] { qkv::apply_rope(few, 1, few, few, pairing, past); }), "position 4 of row 3"));
  REQUIRE(contains(message_of([&] { qkv::apply_rope(few, 1, few, few, pairing, before); }), "position -1 of row 2"));
}

TEST_CASE("shapes that do not fit are refused before anything is written", "[rope]") {
  const Rope<float> rope({.pairing = Pairing::half_split}, 8);
  qkv::Matrix<float> x = numbers<float>(4, 24, 11);
  const qkv::Matrix<float> before = x;
  REQUIRE(contains(message_of([&] { rope.apply(x, 2, 0); }), "x is [4, 24], heads 2"));
  REQUIRE_THROWS_AS(rope.apply(x, 0, 0), std::invalid_argument);
  REQUIRE(contains(message_of([&] { rope.apply_in_place(x, 3, std::array<Index, 3>{0, 1, 2}); }), "3 positions"));
  REQUIRE_THROWS_AS(rope.apply_into(x.topRows(3), x.bottomRows(3), 3, 0), std::invalid_argument);
  constexpr Index last = std::numeric_limits<Index>::max();
  REQUIRE(contains(message_of([&] { rope.apply_in_place(x, 3, last - 3); }), "do not fit an Index"));
  REQUIRE(same_bits(x, before));
  REQUIRE(rope.apply(x, 3, last - 4).allFinite());
}

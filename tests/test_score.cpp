#include <qkv/score.hpp>

#include "support/catch.hpp"
#include "support/numbers.hpp"

using namespace support;
using namespace qkv;

namespace {

static_assert(Score<Plain, float> && Score<SoftCap, double> && Score<Alibi<float>, float> &&
              Score<Bias<float>, double>);
static_assert(Score<decltype([](auto s, const At&) { return s; }), long double>);
static_assert(Score<decltype([](float s, const At&) { return s; }), float>);
static_assert(!Score<Window, float> && !Score<int, float>);

// Scores hold views: what would dangle does not compile.
template <class X>
concept CanBeBias = requires(X&& x) {
  bias(std::forward<X>(x));
  bias_per_head(std::forward<X>(x), Index{1});
};
template <class X>
concept CanBeAlibi = requires(X&& x) {
  alibi(std::forward<X>(x));
};
static_assert(CanBeBias<Matrix<float>&> && CanBeBias<const Matrix<double>&> && !CanBeBias<Matrix<float>>);
static_assert(!CanBeBias<const Matrix<float>> && !CanBeAlibi<const RowVector<float>>);
static_assert(CanBeAlibi<RowVector<float>&> && CanBeAlibi<Eigen::VectorXf&> && !CanBeAlibi<RowVector<float>>);
// What looks at memory of someone else may be a temporary; what may look at a temporary may not.
static_assert(CanBeBias<ConstView<float>> && CanBeBias<View<float>> && CanBeBias<const Eigen::Map<Matrix<float>>>);
static_assert(CanBeBias<Eigen::Block<View<float>>> && CanBeBias<Eigen::Block<const Eigen::Block<ConstView<float>>>>);
static_assert(CanBeAlibi<Eigen::VectorBlock<Eigen::Map<RowVector<float>>>>);
static_assert(CanBeBias<const Eigen::Block<const Matrix<float>>> && !CanBeBias<Eigen::Block<Matrix<float>>>);
static_assert(!CanBeBias<Eigen::Block<Eigen::Block<Matrix<float>>>> && !CanBeBias<Eigen::Ref<const Matrix<float>>>);

const At somewhere{.sequence = 0, .head = 1, .query = 2, .key = 3, .query_position = 12, .key_position = 5};

}  // namespace

TEST_CASE("each score is its formula", "[score]") {
  CHECK(plain(1.25F, somewhere) == 1.25F);

  for (const double s : {-200.0, -3.0, 0.0, 0.25, 7.0, 1e5})
    CHECK(std::abs(soft_cap(30)(s, somewhere) - 30 * std::tanh(s / 30)) <= 1e-14 * 30);

  const RowVector<float> slopes = (RowVector<float>(3) << 0.5F, 0.25F, 0.125F).finished();
  CHECK(alibi(slopes)(1.0F, somewhere) == 1.0F - 0.25F * (12 - 5));
  CHECK(alibi(std::span<const float>(slopes.data(), 3))(1.0, somewhere) == 1.0 - 0.25 * 7);
  At later = somewhere;
  later.key_position = 14;  // a key after the query gains, as the formula says
  CHECK(alibi(slopes)(1.0F, later) == 1.5F);

  const Matrix<double> m = numbers<double>(6, 4, 1);
  CHECK(bias(m)(1.5, somewhere) == 1.5 + m(2, 3));
  CHECK(bias_per_head(m, 2)(1.5, somewhere) == 1.5 + m(3 + 2, 3));
  constexpr double infinity = std::numeric_limits<double>::infinity(), nan = std::numeric_limits<double>::quiet_NaN();
  Matrix<double> hidden = m;
  hidden(2, 3) = -infinity;
  for (const double s : {1.5, infinity, -infinity, nan}) CHECK(bias(hidden)(s, somewhere) == -infinity);
  CHECK(std::isnan(bias(m)(nan, somewhere)));
  CHECK(then(bias(hidden), soft_cap(2))(nan, somewhere) == -2);
  CHECK(bias(view(m).bottomRows(5))(1.5, somewhere) == 1.5 + m(3, 3));
  CHECK(bias(m.bottomRows(4))(1.5, somewhere) == 1.5 + m(4, 3));
}

TEST_CASE("then applies scores from left to right", "[score]") {
  const Matrix<double> m = numbers<double>(4, 4, 2);
  const auto twice = [](auto s, const At&) { return 2 * s; };
  const double capped_then_biased = then(soft_cap(2), bias(m))(3.0, somewhere);
  CHECK(std::abs(capped_then_biased - (2 * std::tanh(1.5) + m(2, 3))) <= 1e-15);
  const double biased_then_capped = then(bias(m), soft_cap(2))(3.0, somewhere);
  CHECK(std::abs(biased_then_capped - 2 * std::tanh((3 + m(2, 3)) / 2)) <= 1e-15);
  const auto add_one = [](auto s, const At&) { return s + 1; };
  CHECK(then(add_one, twice, add_one)(3.0F, somewhere) == 9.0F);
  CHECK(then(twice, add_one, twice, plain)(3.0F, somewhere) == 14.0F);
}

TEST_CASE("scores refuse operands that do not fit, in words", "[score]") {
  const auto said = [](const auto& score, const CallShape& shape) {
    return message_of([&] { detail::check_operand(score, shape); });
  };
  for (const double wrong :
       {0.0, -1.0, std::numeric_limits<double>::infinity(), std::numeric_limits<double>::quiet_NaN()})
    for (const std::string& text : {message_of([&] { soft_cap(wrong); }), said(SoftCap{wrong}, {}),
                                    said(then(plain, SoftCap{wrong}), {.heads = 3})})
      CHECK(contains(text, "soft_cap needs a finite cap > 0"));
  CHECK(said(soft_cap(5), {}).empty());
  for (const double cap : {1e300, std::numeric_limits<double>::infinity()}) {  // as a float, whatever it is
    CHECK(SoftCap{cap}.cap_as<float>() == std::numeric_limits<float>::max());
    CHECK(SoftCap{-cap}.cap_as<float>() == -std::numeric_limits<float>::max());
  }
  CHECK(soft_cap(1e-50).cap_as<float>() == std::numeric_limits<float>::min());
  CHECK(soft_cap(1e-50)(0.0F, At{}) == 0);

  const RowVector<float> slopes = RowVector<float>::Ones(3);
  CHECK(said(alibi(slopes), {.heads = 3}).empty());
  CHECK(contains(said(alibi(slopes), {.heads = 4}), "alibi needs one slope per head; given 3 for 4 heads"));

  const Matrix<float> m = Matrix<float>::Zero(6, 5);
  CHECK(said(bias(m), {.heads = 3, .n_queries = 6, .n_keys = 5}).empty());
  CHECK(said(bias_per_head(m, 3), {.heads = 3, .n_queries = 2, .n_keys = 5}).empty());
  CHECK(contains(said(bias(m), {.heads = 3, .n_queries = 2, .n_keys = 5}), "a bias must be [n_queries, n_keys]"));
  CHECK(contains(said(bias(m), {.n_queries = 6, .n_keys = 4}), "given [6, 5] for n_queries 6, n_keys 4"));
  CHECK(!said(bias_per_head(m, 2), {.heads = 3, .n_queries = 2, .n_keys = 5}).empty());
  CHECK(contains(message_of([&] { bias_per_head(m, 4); }), "bias_per_head needs heads*n_queries rows"));

  // Both sides of a chain are asked.
  for (const auto& text :
       {said(then(plain, bias(m)), {}), said(then(bias(m), plain), {}), said(then(plain, plain, bias(m)), {})})
    CHECK(contains(text, "a bias must be"));
}

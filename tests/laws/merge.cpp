// laws/merge.cpp — the softmax state is a commutative monoid, and every bracketing of the keys gives the same attention.
#include <qkv/attention.hpp>
#include <qkv/position.hpp>

#include <random>

#include "support/attention_case.hpp"

using namespace support;
using qkv::SoftmaxState;

namespace {

constexpr Index n = 5, heads = 3, dv = 7;

/// Any state that some keys could have left, from far below to far above.
template <class T>
SoftmaxState<T> random_state(std::uint64_t seed) {
  auto s = SoftmaxState<T>::empty(n, heads, dv);
  s.maximum = T(6) * normals<T>(n, heads, seed);
  s.sum = normals<T>(n, heads, seed + 1).array().abs() + T(1);
  s.weighted = T(2) * normals<T>(n, heads * dv, seed + 2);
  if (seed % 3 == 0) {  // one query has seen nothing
    s.maximum.row(1).setConstant(-std::numeric_limits<T>::infinity());
    s.sum.row(1).setZero();
    s.weighted.row(1).setZero();
  }
  return s;
}

template <class T>
bool identical(const SoftmaxState<T>& a, const SoftmaxState<T>& b) {
  return same_bits(a.maximum, b.maximum) && a.sum == b.sum && a.weighted == b.weighted;
}

template <class T>
double difference(const SoftmaxState<T>& a, const SoftmaxState<T>& b) {
  return std::max(max_error(a.finish(), b.finish()), max_error_with_infinities(a.log_sum_exp(), b.log_sum_exp()));
}

/// 0 … rows in parts, which may be empty.
std::vector<Index> random_cuts(Index rows, std::mt19937& random) {
  std::vector<Index> cuts = {0, rows};
  for (int i = 0; i < 5; ++i) cuts.push_back(std::uniform_int_distribution<Index>(0, rows)(random));
  std::sort(cuts.begin(), cuts.end());
  return cuts;
}

/// All of them, in a random bracketing.
template <class T>
SoftmaxState<T> merged(std::vector<SoftmaxState<T>> parts, std::mt19937& random) {
  while (parts.size() > 1) {
    std::shuffle(parts.begin(), parts.end(), random);
    parts[parts.size() - 2].merge(parts.back());
    parts.pop_back();
  }
  return parts[0];
}

template <class T>
Matrix<T> rows(const Matrix<T>& x, Index first, Index count) {
  return x.middleRows(first, count);
}

}  // namespace

TEMPLATE_TEST_CASE("merge is commutative", "[softmax][laws]", float, double) {
  for (std::uint64_t seed = 1; seed < 60; seed += 2) {
    const auto a = random_state<TestType>(seed), b = random_state<TestType>(seed + 100);
    const auto ab = merge(a, b), ba = merge(b, a);  // not the same bits: the compiler may fuse one product or the other
    CHECK(same_bits(ab.maximum, ba.maximum));
    CHECK(difference(ab, ba) <= 20 * static_cast<double>(std::numeric_limits<TestType>::epsilon()));
  }
}

TEMPLATE_TEST_CASE("merge is associative", "[softmax][laws]", float, double) {
  for (std::uint64_t seed = 1; seed < 60; ++seed) {
    const auto a = random_state<TestType>(seed), b = random_state<TestType>(seed + 100),
               c = random_state<TestType>(seed + 200);
    const auto left = merge(merge(a, b), c), right = merge(a, merge(b, c));
    CHECK(same_bits(left.maximum, right.maximum));
    CHECK(difference(left, right) <= 40 * static_cast<double>(std::numeric_limits<TestType>::epsilon()));
  }
}

TEMPLATE_TEST_CASE("the state of no keys changes nothing, on either side", "[softmax][laws]", float, double) {
  const auto none = SoftmaxState<TestType>::empty(n, heads, dv);
  for (std::uint64_t seed = 1; seed < 20; ++seed) {
    const auto a = random_state<TestType>(seed);
    CHECK(identical(merge(a, none), a));
    CHECK(identical(merge(none, a), a));
  }
  CHECK(identical(merge(none, none), none));
}

TEMPLATE_TEST_CASE("a sink is a state with v = 0", "[softmax][laws]", float, double) {
  const std::vector<TestType> sinks = {TestType(0.5), TestType(-7), TestType(30)};
  auto sink = SoftmaxState<TestType>::empty(n, heads, dv);
  sink.sum.setOnes();
  for (Index h = 0; h < heads; ++h) sink.maximum.col(h).setConstant(sinks[static_cast<std::size_t>(h)]);
  const double allowed = 20 * static_cast<double>(std::numeric_limits<TestType>::epsilon());
  for (std::uint64_t seed = 1; seed < 40; ++seed) {
    const auto a = random_state<TestType>(seed), joined = merge(a, sink);
    CHECK(max_error(joined.finish(), a.finish(sinks)) <= allowed);
    CHECK(max_error(joined.log_sum_exp(), a.log_sum_exp(sinks)) <= 30 * allowed);
  }
}

TEMPLATE_TEST_CASE("any split of the keys, merged in any order, gives the same attention", "[softmax][laws]", float,
                   double) {
  using T = TestType;
  const Case c{.n_queries = 9, .n_keys = 331, .heads = {6, 2}, .head_dim = 19, .v_head_dim = 11};
  const Inputs<T> in(c);
  const Index first = c.n_keys - c.n_queries;
  const std::vector<T> sinks = {1, -2, 0, 3, T(0.5), -1};
  Matrix<T> log_sum_exp;
  const Matrix<T> whole =
      qkv::attention(in.q, in.k, in.v, c.heads, qkv::causal, qkv::plain, {.sinks = sinks, .log_sum_exp = &log_sum_exp});
  std::mt19937 random(3);
  for (const Kernel kernel : kernels)
    for (int trial = 0; trial < 6; ++trial) {
      const std::vector<Index> cuts = random_cuts(c.n_keys, random);
      std::vector<SoftmaxState<T>> parts;
      for (std::size_t i = 1; i < cuts.size(); ++i) {
        const Index at = cuts[i - 1], count = cuts[i] - at;
        parts.push_back(qkv::attention_state(in.q, rows(in.k, at, count), rows(in.v, at, count), c.heads, qkv::causal,
                                             qkv::plain, {.first_position = first - at, .kernel = kernel}));
      }
      const SoftmaxState<T> all = merged(parts, random);
      CHECK(max_error(all.finish(sinks), whole) <= tolerance<T>);
      CHECK(max_error(all.log_sum_exp(sinks), log_sum_exp) <= 5 * tolerance<T>);
    }
}

TEMPLATE_TEST_CASE("parts that say where their keys stand merge to the whole, under masks and scores of positions",
                   "[softmax][laws]", float, double) {
  using T = TestType;
  std::mt19937 random(5);
  for (const Case& c : {Case{.n_queries = 13, .n_keys = 419, .heads = {6, 2}, .head_dim = 19, .v_head_dim = 11},
                        Case{.n_queries = 3, .n_keys = 203, .heads = {3, 3}, .head_dim = 8, .v_head_dim = 5}}) {
    const Inputs<T> in(c);
    std::vector<Index> ids(static_cast<std::size_t>(c.n_keys));
    for (std::size_t i = 0; i < ids.size(); ++i) ids[i] = static_cast<Index>(i * i % 97 / 40);
    const qkv::RowVector<T> slopes = qkv::alibi_slopes<T>(c.heads.heads);
    const AnyMask masks[] = {AnyMask::of(qkv::full), AnyMask::of(qkv::causal), AnyMask::of(qkv::window(150, 0)),
                             AnyMask::of((qkv::window(37, 5) | qkv::prefix(9)) & qkv::documents(ids))};
    for (const AnyMask& mask : masks)
      for (const Kernel kernel : kernels)
        for (const bool last : {true, false}) {  // the default position of the queries, and another
          const Index first = last ? c.n_keys - c.n_queries : c.n_keys / 2 - 7;
          const auto score = qkv::alibi(slopes);
          Options<T> options{.kernel = kernel};
          if (!last) options.first_position = first;
          const SoftmaxState<T> whole = qkv::attention_state(in.q, in.k, in.v, c.heads, mask, score, options);
          const std::vector<Index> cuts = random_cuts(c.n_keys, random);
          std::vector<SoftmaxState<T>> parts;
          options.first_position = first;
          for (std::size_t i = 1; i < cuts.size(); ++i) {
            const Index at = cuts[i - 1], count = cuts[i] - at;
            options.first_key_position = at;
            parts.push_back(qkv::attention_state(in.q, rows(in.k, at, count), rows(in.v, at, count), c.heads, mask,
                                                 score, options));
            // The same from the output and the log-sum-exp of this part alone.
            Matrix<T> log_sum_exp;
            Options<T> of_part = options;
            of_part.log_sum_exp = &log_sum_exp;
            const Matrix<T> out =
                qkv::attention(in.q, rows(in.k, at, count), rows(in.v, at, count), c.heads, mask, score, of_part);
            CHECK(max_error(out, parts.back().finish()) <= tolerance<T>);
            CHECK(max_error_with_infinities(log_sum_exp, parts.back().log_sum_exp()) <= 30 * tolerance<T>);
          }
          CHECK(difference(merged(parts, random), whole) <= 30 * tolerance<T>);
        }
  }
}

#include <qkv/attention.hpp>

#include "support/attention_case.hpp"

using namespace support;
using namespace qkv;

namespace {

bool before(const At& at) { return at.key_position <= at.query_position; }

}  // namespace

TEMPLATE_TEST_CASE("every kernel is the definition with every score", "[attention][score]", float, double) {
  using T = TestType;
  const AnyMask mask = AnyMask::of(causal);
  for (const Case& c : shapes()) {
    const Index heads = c.heads.heads;
    const RowVector<double> slopes = numbers<double>(1, heads, 5).cwiseAbs();
    const Matrix<double> m = normals<double>(c.n_queries, c.n_keys, 6),
                         each = normals<double>(heads * c.n_queries, c.n_keys, 7);
    const auto slope = [&](const At& at) { return static_cast<long double>(static_cast<T>(slopes(at.head))); };
    const auto wide = [](double x) { return static_cast<long double>(static_cast<T>(x)); };
    // With slopes up to 1 scores reach hundreds: what is left of them in T is that much coarser.
    const double distance = static_cast<double>(c.n_keys + c.n_queries);
    check_kernels<T, Types::kept>(
        c, mask, alibi(slopes), before,
        [&](long double s, const At& at) { return s - slope(at) * (at.query_position - at.key_position); }, {}, {},
        tolerance<T> * std::max(1.0, distance / 40));
    check_kernels<T, Types::kept>(c, mask, soft_cap(1.5), before,
                                  [](long double s, const At&) { return 1.5L * std::tanh(s / 1.5L); });
    check_kernels<T, Types::kept>(c, mask, then(soft_cap(2), bias(m)), before, [&](long double s, const At& at) {
      return 2 * std::tanh(s / 2) + wide(m(at.query, at.key));
    });
    check_kernels<T, Types::kept>(c, mask, bias_per_head(each, heads), before, [&](long double s, const At& at) {
      return s + wide(each(at.head * c.n_queries + at.query, at.key));
    });
    check_kernels<T>(
        c, full, [](auto s, const At& at) { return at.key % 2 ? s / 2 : -s; }, everyone,
        [](long double s, const At& at) { return at.key % 2 ? s / 2 : -s; });
  }
}

TEST_CASE("a score of one scalar is enough", "[attention][score]") {
  const Case c{.n_queries = 6, .n_keys = 13, .heads = {2, 1}, .head_dim = 3, .v_head_dim = 5};
  check_kernels<float, Types::kept>(
      c, causal, [](float s, const At&) { return s * 0.5F; }, before, [](long double s, const At&) { return s / 2; });
}

TEST_CASE("every mask goes with every score", "[attention][score]") {
  const Case c{.n_queries = 71, .n_keys = 263, .heads = {4, 2}, .head_dim = 9, .v_head_dim = 6};
  const Matrix<double> m = normals<double>(c.n_queries, c.n_keys, 8);
  const RowVector<double> slopes = (RowVector<double>(4) << 0.5, 0.25, 0.125, 0.0625).finished();
  using Sees = std::function<bool(const At&)>;
  using Score = AnyScore<double>;
  using Formula = std::function<long double(long double, const At&)>;
  const auto at_most = [](Index back) {
    return [back](const At& at) { return at.query_position - at.key_position <= back; };
  };
  const std::vector<std::pair<AnyMask, Sees>> masks = {
      {AnyMask::of(full), everyone},
      {AnyMask::of(causal), before},
      {AnyMask::of(window(40, infinite)), at_most(40)},
      {AnyMask::of(causal & window(130, infinite)), [&](const At& at) { return before(at) && at_most(130)(at); }},
      {AnyMask::of((causal | prefix(90)) & where([](const At& at) { return at.key % 5 != 2; })),
       [](const At& at) { return (before(at) || at.key_position < 90) && at.key % 5 != 2; }},
  };
  const std::vector<std::pair<Score, Formula>> scores = {
      {plain, unchanged},
      {soft_cap(3), [](long double s, const At&) { return 3 * std::tanh(s / 3); }},
      {alibi(slopes),
       [](long double s, const At& at) {
         return s - std::ldexp(1.0L, -1 - static_cast<int>(at.head)) * (at.query_position - at.key_position);
       }},
      {bias(m), [&](long double s, const At& at) { return s + static_cast<long double>(m(at.query, at.key)); }},
      {[](double s, const At& at) { return at.key % 7 == 3 ? -std::numeric_limits<double>::infinity() : s; },
       [](long double s, const At& at) { return at.key % 7 == 3 ? nothing : s; }},
  };
  const std::vector<double> sinks = {0.5, -1, 2, 0};
  for (std::size_t i = 0; i < masks.size(); ++i)
    for (std::size_t j = 0; j < scores.size(); ++j) {
      INFO("mask " << i << ", score " << j);
      Options<double> options;
      if ((i + j) % 2) options.sinks = sinks;
      if ((i + j) % 3 == 1) options.scale = -0.3;
      check_kernels<double>(c, masks[i].first, scores[j].first, masks[i].second, scores[j].second, options, {}, 3e-14);
    }
}

TEMPLATE_TEST_CASE("sinks take their share in every kernel", "[attention]", float, double) {
  using T = TestType;
  for (const Case& c : shapes()) {
    std::vector<T> sinks;
    for (Index h = 0; h < c.heads.heads; ++h) sinks.push_back(h == 1 ? T(-50) : T(h) - T(0.5));
    check_kernels<T>(c, causal, plain, before, unchanged, {.sinks = sinks});
  }
}

TEMPLATE_TEST_CASE("the scale is 1/√head_dim or what the caller says", "[attention]", float, double) {
  for (const double scale : {0.0, 0.7, -0.4, 1e-6}) {
    const Case c{.n_queries = 7, .n_keys = 20, .heads = {3, 1}, .head_dim = 11, .v_head_dim = 4};
    check_kernels<TestType>(c, causal, plain, before, unchanged, {.scale = scale});
  }
}

#include <qkv/attention.hpp>
#include <qkv/kv_cache.hpp>

#include <cfenv>

#include "support/attention_case.hpp"
#include "support/draw.hpp"
#include "support/key_source.hpp"
#include "support/narrow_errors.hpp"

// Keys and values stored in fewer bits: attention is exact on what is stored.

using namespace support;
using namespace qkv;

namespace {

bool before(const At& at) { return at.key_position <= at.query_position; }

/// What storage S makes of the rows, one head after the other.
template <class S>
Matrix<double> stored(const Matrix<float>& x, Index kv_heads) {
  const Index d = x.cols() / kv_heads;
  Matrix<double> y(x.rows(), x.cols());
  std::vector<S> row(static_cast<std::size_t>(d));
  float scale = 1;
  for (Index i = 0; i < x.rows(); ++i)
    for (Index h = 0; h < kv_heads; ++h) {
      store_row(&x.coeffRef(i, h * d), d, row.data(), &scale);
      load_row(row.data(), d, scale, &y.coeffRef(i, h * d));
    }
  return y;
}

constexpr Arithmetic arithmetics[] = {Arithmetic::automatic, Arithmetic::exact, Arithmetic::int8};

double relative_rms(const Matrix<float>& got, const Matrix<long double>& expected) {
  const Matrix<double> reference = expected.cast<double>();
  return (got.cast<double>() - reference).norm() / reference.norm();
}

const std::vector<Case>& some_shapes() {
  static const std::vector<Case> cases = {
      {.n_queries = 1, .n_keys = 277, .heads = {14, 2}, .head_dim = 40, .v_head_dim = 24},
      {.n_queries = 3, .n_keys = 9, .heads = {2, 1}, .head_dim = 5, .v_head_dim = 1},
      {.n_queries = 67, .n_keys = 131, .heads = {4, 2}, .head_dim = 17, .v_head_dim = 33},
      {.n_queries = 21, .n_keys = 25, .heads = {2, 2}, .head_dim = 10, .v_head_dim = 7},  // two registers, odd count
      {.n_queries = 25, .n_keys = 35, .heads = {2, 1}, .head_dim = 9, .v_head_dim = 11},  // ... that both reach
  };
  return cases;
}

/// Of the tiled kernel unless exact is asked for, relative to the output: int8 in int16 (AVX2, SSE2), or bfloat16 and int8.
template <class S>
constexpr double narrow_error = std::is_same_v<kernel::NarrowArithmetic<float, S>, kernel::Int16> ? 3e-4 : 1e-2;

/// Not written out where it is used: g++ 12 at -O3 gives up on that with an internal error.
template <class Q, class K>
[[gnu::noinline]] Q attended(const Case& c, const Q& q, const K& k, const K& v, Kernel kernel) {
  return attention(q, k, v, c.heads, causal, plain, {.kernel = kernel});
}

/// Inputs; `largest`: every product as large as it can be, of either sign, and as good as equal weights. Sums that do not fit
/// would wrap around.
Inputs<float> inputs(const Case& c, bool largest) {
  Inputs<float> in(c);
  if (!largest) return in;
  in.q = in.q.array().sign() * 0.01F;
  in.k.setConstant(1);
  in.q.row(0).setConstant(0.01F);
  for (Index r = 0; r < c.n_keys; r += 2) in.k.row(r).setConstant(-1);
  return in;
}

/// An int8 cache in pages, and what attention over it is by the formula on the rows as they are stored.
class StoredAsInt8 {
 public:
  StoredAsInt8(const Case& c, const Inputs<float>& in)
      : c_(c),
        in_(in),
        cache_(in.k, in.v, c.heads.kv_heads, consecutive_pages(c.n_keys, {50, 3})),
        expected_(attention_by_formula(
            in.q, stored<std::int8_t>(in.k, c.heads.kv_heads), stored<std::int8_t>(in.v, c.heads.kv_heads),
            {.heads = c.heads, .first_position = c.n_keys - c.n_queries}, before, unchanged)) {}
  double error(Kernel kernel, Arithmetic arithmetic) const {
    return relative_rms(attention(in_.q, cache_, c_.heads, causal, plain, {.kernel = kernel, .arithmetic = arithmetic}),
                        expected_.out);
  }

 private:
  const Case& c_;
  const Inputs<float>& in_;
  PagedKeys<std::int8_t> cache_;
  Expected expected_;
};

}  // namespace

TEMPLATE_LIST_TEST_CASE("attention is exact on rows stored as half, bfloat16 or int8", "[attention][storage]",
                        qkv::StorageTypes) {
  for (const Case& c : some_shapes()) {
    const Inputs<float> in(c);
    const PagedKeys<TestType> cache(in.k, in.v, c.heads.kv_heads, consecutive_pages(c.n_keys, {50, 3}));
    const Expected expected =
        attention_by_formula(in.q, stored<TestType>(in.k, c.heads.kv_heads), stored<TestType>(in.v, c.heads.kv_heads),
                             {.heads = c.heads, .first_position = c.n_keys - c.n_queries}, before, unchanged);
    for (const Kernel kernel : kernels) {
      INFO("kernel " << name(kernel) << ", " << c.n_queries << " queries");
      Matrix<float> lse;
      Options<float> options{.kernel = kernel, .arithmetic = Arithmetic::exact, .log_sum_exp = &lse};
      const auto out = attention(in.q, cache, c.heads, causal, plain, options);
      CHECK(max_error(out, expected.out) <= tolerance<float>);
      CHECK(max_error(lse, expected.log_sum_exp) <= 5 * tolerance<float>);
      // In the numbers of the storage type, where the CPU has them: root mean square error over that of the output.
      options.arithmetic = Arithmetic::automatic;
      const auto narrow = attention(in.q, cache, c.heads, causal, plain, options);
      // Decode multiplies int8 keys in integers, with VNNI for groups of heads only.
      const bool narrow_keys = std::is_same_v<TestType, bfloat16> || std::is_same_v<TestType, std::int8_t>;
      const bool may_differ = (kernel == Kernel::tiled && narrow_keys) ||
                              (kernel == Kernel::decode &&
                               kernel::decode_is_narrow<float, TestType>(Arithmetic::automatic, c.heads.group_size()));
      CHECK(relative_rms(narrow, expected.out) <= (may_differ ? narrow_error<TestType> : 1e-6));
      CHECK(max_error(lse, expected.log_sum_exp) <= (may_differ ? 5 * narrow_error<TestType> : 5 * tolerance<float>));
      if (!may_differ) CHECK(same_bits(narrow, out));
    }
    CHECK(max_error(attention_weights(in.q, cache, c.heads, causal), expected.probabilities) <= tolerance<float>);
  }
}

TEMPLATE_TEST_CASE("narrow arithmetic keeps its error, on sinks and on outlier channels too", "[attention][storage]",
                   bfloat16, std::int8_t) {
  const Case c{.n_queries = 67, .n_keys = 701, .heads = {4, 2}, .head_dim = 40, .v_head_dim = 56};
  const bool wide = std::is_same_v<TestType, bfloat16>;
  for (const std::string kind : {"normal", "sink", "outliers"}) {
    Inputs<float> in(c);
    if (kind == "sink") {  // the first key draws most of the weight, and its value is next to nothing
      in.q.array() += 1;
      in.k.row(0).setConstant(2);
      in.v.row(0) *= 0.01F;
    }
    if (kind == "outliers")  // one channel of every head ten times the others
      for (Index h = 0; h < c.heads.kv_heads; ++h) {
        in.k.col(h * c.head_dim + 3) *= 10;
        in.v.col(h * c.v_head_dim + 7) *= 10;
        in.q.middleCols(2 * h * c.head_dim, 2 * c.head_dim) *= 0.3F;
      }
    const PagedKeys<TestType> cache(in.k, in.v, c.heads.kv_heads, consecutive_pages(c.n_keys, {50, 3}));
    const Expected expected =
        attention_by_formula(in.q, stored<TestType>(in.k, c.heads.kv_heads), stored<TestType>(in.v, c.heads.kv_heads),
                             {.heads = c.heads, .first_position = c.n_keys - c.n_queries}, before, unchanged);
    const auto error = [&](Arithmetic arithmetic) {
      return relative_rms(
          attention(in.q, cache, c.heads, causal, plain, {.kernel = Kernel::tiled, .arithmetic = arithmetic}),
          expected.out);
    };
    INFO(kind << ": " << error(Arithmetic::automatic) << ", in int8 throughout " << error(Arithmetic::int8));
    CHECK(error(Arithmetic::exact) <= 1e-6);
    CHECK(error(Arithmetic::automatic) <= (wide ? 3e-3 : narrow_error<TestType>));
    CHECK(error(Arithmetic::int8) <= (wide ? 3e-3 : 2 * narrow_error<TestType>));
  }
}

TEST_CASE("prefill of int8 keeps the error of its integers at every width, and none overflows",
          "[attention][storage]") {
  for (const Index d : {1, 2, 7, 15, 16, 17, 40, 129, 511, 513, 1100})
    for (const bool largest : {false, true}) {
      const Case c{
          .n_queries = 19, .n_keys = 207, .heads = {2, 1}, .head_dim = d, .v_head_dim = std::min<Index>(d, 131)};
      const Inputs<float> in = inputs(c, largest);
      const StoredAsInt8 rows(c, in);
      const auto error = [&](Arithmetic arithmetic) { return rows.error(Kernel::tiled, arithmetic); };
      INFO("head_dim " << d << ", largest " << largest << ": " << error(Arithmetic::automatic));
      CHECK(error(Arithmetic::exact) <= 2e-6);
      CHECK(error(Arithmetic::automatic) <= (kernel::OfInt8::int16_keys ? 1.5e-4 : 1e-2));
    }
}

TEST_CASE("decode of int8 keys keeps the error of its integers at every width, and none overflows",
          "[attention][storage]") {
  // int16 queries (Int16RowDot) are rounded to 2^-16 of their largest number up to width 512; int8 queries to 2^-8.
  constexpr bool in_int16 = std::is_same_v<kernel::NarrowDot<float, std::int8_t>::Query, std::int16_t>;
  // Without vectors a sum is one chain of all features, and not one in each lane.
  constexpr double exact = kernel::Simd<float>::width > 1 ? 1e-6 : 3e-6;
  for (const Index d : {1, 7, 40, 129, 511, 513, 1100}) {
    for (const bool largest : {false, true}) {
      const Case c{.n_queries = 2, .n_keys = 83, .heads = {6, 2}, .head_dim = d, .v_head_dim = 19};
      const Inputs<float> in = inputs(c, largest);
      const StoredAsInt8 rows(c, in);
      const auto error = [&](Arithmetic arithmetic) { return rows.error(Kernel::decode, arithmetic); };
      INFO("head_dim " << d << ", largest " << largest << ": " << error(Arithmetic::automatic));
      CHECK(error(Arithmetic::exact) <= exact);
      CHECK(error(Arithmetic::automatic) <= (in_int16 ? 1e-4 : 1e-2));
    }
  }
}

TEST_CASE("decode of int8 values keeps the error of its integers at every width and in every group",
          "[attention][storage]") {
  // Weights in int16 (PairSums) are rounded to 2^-16 of the largest of their chunk of 256 keys.
  using Narrow = kernel::NarrowDot<float, std::int8_t>;
  constexpr bool in_int16 = !std::is_same_v<Narrow::Query, std::int8_t>;
  for (const Index d : {1, 7, 15, 16, 17, 31, 32, 33, 40, 63, 64, 65, 100, 130, 301})
    for (const Index group : {1, 2, 3, 4, 7}) {
      const Case c{.n_queries = 1, .n_keys = 531, .heads = {2 * group, 2}, .head_dim = 23, .v_head_dim = d};
      const Inputs<float> in(c);
      const StoredAsInt8 rows(c, in);
      const auto error = [&](Arithmetic arithmetic) { return rows.error(Kernel::decode, arithmetic); };
      INFO("v_head_dim " << d << ", group " << group << ": " << error(Arithmetic::automatic));
      CHECK(error(Arithmetic::exact) <= 1e-6);
      CHECK(error(Arithmetic::automatic) <= (in_int16 || group == 1 ? 1e-4 : 1e-2));
    }
}

TEST_CASE("the largest weights times the largest int8 values do not overflow, nor do tiny ones vanish",
          "[attention][storage]") {
  const Case c{.n_queries = 1, .n_keys = 769, .heads = {5, 1}, .head_dim = 8, .v_head_dim = 70};
  Inputs<float> in(c);
  in.q.setZero();  // all weights are the largest
  // Sums in integers are exact. Of widened values all terms are equal, and so may be the roundings of a sum of them:
  // (n - 1) u at most (Higham, Accuracy and Stability of Numerical Algorithms, 4.2). Values of bfloat16 are rounded.
  constexpr bool in_integers = kernel::ValueSums<kernel::NarrowDot<float, std::int8_t>>::integers;
  const double widened = double(c.n_keys) * std::numeric_limits<float>::epsilon() / 2;
  const auto bound = [&](Kernel kernel) {
    if (kernel == Kernel::tiled)
      return kernel::OfInt8::integer_weights ? 2e-6 : kernel::OfInt8::narrow ? 4e-3 : widened;
    return in_integers ? 2e-6 : widened;
  };
  for (const float value : {1.0F, -1.0F, 1e30F, 1e-30F, -1e-36F}) {
    in.v.setConstant(value);
    const PagedKeys<std::int8_t> cache(in.k, in.v, 1, consecutive_pages(c.n_keys, {50, 3}));
    for (const Kernel kernel : fast_kernels) {
      // Weights times scales are counted in steps of 2^-126 and more there.
      if (kernel == Kernel::tiled && kernel::OfInt8::integer_weights && std::abs(value) < 1e-31F) continue;
      const Matrix<float> out = attention(in.q, cache, c.heads, causal, plain, {.kernel = kernel});
      INFO("kernel " << name(kernel) << ": " << value << " became " << out(0, 0));
      CHECK(max_error(out / value, Matrix<float>::Ones(1, out.cols())) <= bound(kernel));
    }
  }
  in.v.setZero();
  const PagedKeys<std::int8_t> zeros(in.k, in.v, 1, consecutive_pages(c.n_keys, {50, 3}));
  for (const Kernel kernel : fast_kernels)
    CHECK(attention(in.q, zeros, c.heads, causal, plain, {.kernel = kernel}).isZero(0));
}

TEST_CASE("decode of int8 gives the same bits whatever rows its pages begin with", "[attention][storage]") {
  for (const Index d : {5, 33, 64}) {
    const Case c{.n_queries = 3, .n_keys = 601, .heads = {6, 2}, .head_dim = 12, .v_head_dim = d};
    const Inputs<float> in(c);
    const auto mask = causal & where([](const At& at) { return at.key % 11 != 3 && (at.key < 290 || at.key > 401); });
    const auto both = [&](const std::vector<Index>& rows) {
      const PagedKeys<std::int8_t> cache(in.k, in.v, c.heads.kv_heads, consecutive_pages(c.n_keys, rows));
      Matrix<float> out(2 * c.n_queries, c.heads.heads * d);
      out << attention(in.q, cache, c.heads, causal, plain, {.kernel = Kernel::decode}),
          attention(in.q, cache, c.heads, mask, plain, {.kernel = Kernel::decode});
      return out;
    };
    const Matrix<float> whole = both({c.n_keys});
    for (const std::vector<Index>& rows : {std::vector<Index>{1}, {3, 50, 1}, {7, 64}, {255, 2}, {64}})
      CHECK(same_bits(both(rows), whole));
  }
}

TEMPLATE_TEST_CASE("matrices of half or bfloat16 are read as they are", "[attention][storage]", half, bfloat16) {
  for (const Case& c : some_shapes()) {
    const Inputs<float> in(c);
    const Matrix<TestType> k = in.k.template cast<TestType>(), v = in.v.template cast<TestType>();
    const PagedKeys<TestType> cache(in.k, in.v, c.heads.kv_heads, {{c.n_keys, 0}});
    for (const Kernel kernel : kernels)
      CHECK(same_bits(attention(in.q, k, v, c.heads, causal, plain, {.kernel = kernel}),
                      attention(in.q, cache, c.heads, causal, plain, {.kernel = kernel})));
  }
}

TEST_CASE("double queries read float keys without loss", "[attention][storage]") {
  for (const Case& c : some_shapes()) {
    const Inputs<float> in(c);
    const Inputs<double> wide(c);  // the same numbers
    for (const Kernel kernel : kernels)
      CHECK(same_bits(attended(c, wide.q, in.k, in.v, kernel), attended(c, wide.q, wide.k, wide.v, kernel)));
  }
}

TEST_CASE("an int8 row that was not finite is NaN for those who see it", "[attention][storage]") {
  for (const Case& c : some_shapes()) {
    Inputs<float> in(c);
    const PagedKeys<std::int8_t> clean(in.k, in.v, c.heads.kv_heads, {{c.n_keys, 0}});
    const Index bad = c.n_keys - 1;  // the last query alone sees it
    in.v(bad, 0) = std::numeric_limits<float>::infinity();
    const PagedKeys<std::int8_t> spoiled(in.k, in.v, c.heads.kv_heads, {{c.n_keys, 0}});
    for (const Options<float>& options :
         {Options<float>{.kernel = Kernel::reference}, Options<float>{.kernel = Kernel::tiled},
          Options<float>{.kernel = Kernel::decode},
          Options<float>{.kernel = Kernel::tiled, .arithmetic = Arithmetic::int8}}) {
      INFO("kernel " << name(options.kernel) << ", " << c.n_queries << " queries");
      const auto expected = attention(in.q, clean, c.heads, causal, plain, options);
      const auto out = attention(in.q, spoiled, c.heads, causal, plain, options);
      const Index others = c.n_queries - 1, width = c.heads.group_size() * c.v_head_dim;
      CHECK(same_bits(out.topRows(others), expected.topRows(others)));
      CHECK(out.bottomRows(1).leftCols(width).array().isNaN().all());
      CHECK(out.bottomRows(1).rightCols(out.cols() - width).array().isFinite().all());
    }
  }
}

TEMPLATE_TEST_CASE("stored rows that are masked may hold anything, in every storage type", "[attention][storage]", half,
                   bfloat16, std::int8_t) {
  for (const Case& c : some_shapes()) {
    const Inputs<float> in(c);
    Inputs<float> bad = in;
    const auto mask = causal & where([](const At& at) { return at.key % 3 != 1; });
    for (Index j = 1; j < c.n_keys; j += 3) {
      bad.k.row(j).setConstant(std::numeric_limits<float>::quiet_NaN());
      bad.v.row(j).setConstant(std::numeric_limits<float>::infinity());
    }
    const PagedKeys<TestType> clean(in.k, in.v, c.heads.kv_heads, consecutive_pages(c.n_keys, {50, 3}));
    const PagedKeys<TestType> poisoned(bad.k, bad.v, c.heads.kv_heads, consecutive_pages(c.n_keys, {50, 3}));
    for (const Kernel kernel : kernels)
      for (const Arithmetic arithmetic : {Arithmetic::automatic, Arithmetic::exact, Arithmetic::int8}) {
        INFO("kernel " << name(kernel) << ", " << c.n_queries << " queries");
        const Options<float> options{.kernel = kernel, .arithmetic = arithmetic};
        CHECK(same_bits(attention(in.q, poisoned, c.heads, mask, plain, options),
                        attention(in.q, clean, c.heads, mask, plain, options)));
      }
  }
}

TEMPLATE_TEST_CASE("a stored value that is not finite reaches its feature and no other", "[attention][storage]", half,
                   bfloat16) {
  for (const Case& c : some_shapes())
    for (const float bad : {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
      Inputs<float> in(c);
      const Index row = c.n_keys - 1, feature = c.v_head_dim / 2;  // the last query alone sees it
      const PagedKeys<TestType> clean(in.k, in.v, c.heads.kv_heads, consecutive_pages(c.n_keys, {50, 3}));
      in.v(row, feature) = bad;
      const PagedKeys<TestType> spoiled(in.k, in.v, c.heads.kv_heads, consecutive_pages(c.n_keys, {50, 3}));
      for (const Kernel kernel : kernels) {
        INFO("kernel " << name(kernel) << ", " << c.n_queries << " queries, " << bad);
        const auto expected = attention(in.q, clean, c.heads, causal, plain, {.kernel = kernel});
        const auto out = attention(in.q, spoiled, c.heads, causal, plain, {.kernel = kernel});
        CHECK(same_bits(out.topRows(c.n_queries - 1), expected.topRows(c.n_queries - 1)));
        for (Index x = 0; x < out.cols(); ++x) {
          const Index head = x / c.v_head_dim;
          const bool hit = c.heads.kv_head(head) == 0 && x % c.v_head_dim == feature;
          REQUIRE(std::isfinite(out(c.n_queries - 1, x)) == !hit);
          if (hit && std::isinf(bad)) REQUIRE(out(c.n_queries - 1, x) == bad);  // times a weight above 0
          if (!hit) REQUIRE(std::abs(out(c.n_queries - 1, x) - expected(c.n_queries - 1, x)) <= 1e-6F);
        }
      }
    }
}

TEST_CASE("tiny, infinite and NaN queries of an int8 cache spoil nobody, and who sees nothing gives zeros",
          "[attention]") {
  KvCache<std::int8_t> cache({.kv_heads = 1, .head_dim = 24, .capacity = 40});
  cache.append(numbers<float>(40, 24, 1), numbers<float>(40, 24, 2));
  Matrix<float> q = numbers<float>(9, 24, 3);
  const Matrix<float> before = attention(q, cache, {}, causal, plain, {.first_position = -3, .kernel = Kernel::tiled});
  q.row(0).setConstant(std::numeric_limits<float>::quiet_NaN());  // at position -3: sees nothing
  q.row(4).setConstant(1e-44F);
  q.row(5).setConstant(std::numeric_limits<float>::infinity());
  const Matrix<float> out = attention(q, cache, {}, causal, plain, {.first_position = -3, .kernel = Kernel::tiled});
  CHECK(out.topRows(3).isZero(0));
  CHECK(same_bits(Matrix<float>(out.row(3)), Matrix<float>(before.row(3))));
  CHECK(max_error(out.row(4), cache.values().topRows(2).colwise().mean()) <= narrow_error<std::int8_t>);
  CHECK(same_bits(Matrix<float>(out.bottomRows(3)), Matrix<float>(before.bottomRows(3))));
}

TEMPLATE_TEST_CASE("the key that has all the weight keeps it, however large the scores", "[attention][storage]", float,
                   half, bfloat16, std::int8_t) {
  Draw draw(14);
  for (int round = 0; round < rounds(250); ++round) {
    const Index n = draw.whole(1, round % 10 == 0 ? 420 : 40);
    const Case c{.n_queries = draw.whole(1, std::min<Index>(n, 35)),
                 .n_keys = n,
                 .heads = draw.one_of({Heads{1, 1}, Heads{2, 1}, Heads{3, 1}}),
                 .head_dim = draw.whole(1, 20),
                 .v_head_dim = draw.whole(1, 20)};
    // Scores ±size of one key that all queries see, and at least 100 less of the others.
    const float size = draw.power(0, 10), side = draw.sign(), sign = draw.sign();
    const bool in_keys = !std::is_same_v<TestType, half> && draw.whole(0, 1) == 0;
    const Index best = draw.whole(0, n - c.n_queries);
    Inputs<float> in(c, static_cast<std::uint64_t>(round));
    for (Index j = 0; j < n; ++j)
      in.k.row(j).setConstant((side - (j == best ? 0 : draw.uniform(0.1, 1) + 100 / size)) * (in_keys ? size : 1));
    in.q.setConstant(sign * (in_keys ? 1 : size));
    in.v *= draw.power(-3, 3);
    const PagedKeys<TestType> cache(in.k, in.v, 1, consecutive_pages(n, {50, 3}));
    const Matrix<double> value = stored<TestType>(in.v, 1).row(best);
    for (const Kernel kernel : kernels)
      for (const Arithmetic arithmetic : arithmetics) {
        INFO("round " << round << ", kernel " << name(kernel) << ", arithmetic " << int(arithmetic) << ", size "
                      << side * size);
        const auto out =
            attention(in.q, cache, c.heads, causal, plain,
                      {.scale = sign / static_cast<float>(c.head_dim), .kernel = kernel, .arithmetic = arithmetic});
        REQUIRE(max_error(out, value.replicate(c.n_queries, c.heads.heads)) <=
                of_bfloat16 * value.cwiseAbs().maxCoeff());
      }
  }
}

TEMPLATE_TEST_CASE("errors of narrow arithmetic are what its roundings allow, whatever the scores and the values",
                   "[attention][storage]", half, bfloat16, std::int8_t) {
  Draw draw(15);
  double mean = 0;
  for (int round = 0; round < rounds(48); ++round) {
    const Index n = draw.whole(1, round % 4 == 0 ? 600 : 70);
    const Index group = draw.whole(1, 3), kv_heads = draw.whole(1, 2);
    const Case c{.n_queries = draw.whole(1, std::min<Index>(n, 21)),
                 .n_keys = n,
                 .heads = {group * kv_heads, kv_heads},
                 .head_dim = draw.one_of<Index>({draw.whole(1, 70), 64, 128}),
                 .v_head_dim = draw.whole(1, 12)};
    const Index d = c.head_dim, dv = c.v_head_dim;
    Inputs<float> in(c, static_cast<std::uint64_t>(round));
    // Scores of a deviation up to 20. Values of a row: normal; or of ±1e6, which cancel; of any size, row by row; or zeros.
    const float scale = draw.sign() * draw.power(-1, 1.3) / std::sqrt(static_cast<float>(d));
    const Index kind = round % 4;
    for (Index j = 0; j < n; ++j) {
      if (kind == 1) in.v.row(j).array() += draw.sign() * (std::is_same_v<TestType, half> ? 1e4F : 1e6F);
      if (kind == 2) in.v.row(j) *= draw.power(-3, 3);
      if (kind == 3 && j % 3 == 0) in.v.row(j).setZero();
    }
    const PagedKeys<TestType> cache(in.k, in.v, kv_heads, consecutive_pages(n, {50, 3}));
    const Matrix<double> k = stored<TestType>(in.k, kv_heads), v = stored<TestType>(in.v, kv_heads);
    const Expected expected = attention_by_formula(
        in.q, k, v, {.heads = c.heads, .scale = scale, .first_position = n - c.n_queries}, before, unchanged);
    ExactRow row;
    row.scale = scale;
    for (Index j = 0; j < n; ++j) row.positions.push_back(j);
    for (const Kernel kernel : kernels)
      for (const Arithmetic arithmetic : arithmetics) {
        const Matrix<float> out = attention(in.q, cache, c.heads, causal, plain,
                                            {.scale = scale, .kernel = kernel, .arithmetic = arithmetic});
        const NarrowErrors errors = kernel == Kernel::tiled ? narrow_errors<TestType>(arithmetic, d, kernel::tile_keys)
                                    : kernel == Kernel::decode ? decode_errors<TestType>(arithmetic, d, group)
                                                               : NarrowErrors{};
        double squares = 0, typical = 0;
        for (Index h = 0; h < c.heads.heads; ++h)
          for (Index i = 0; i < c.n_queries; ++i) {
            const Index kv = h / group;
            row.q.assign(&in.q(i, h * d), &in.q(i, h * d) + d);
            row.keys = k.middleCols(kv * d, d), row.values = v.middleCols(kv * dv, dv);
            row.probabilities.clear(), row.seen.clear(), row.value_scales.clear();
            for (Index j = 0; j < n; ++j) {
              row.probabilities.push_back(static_cast<double>(expected.probabilities(h * c.n_queries + i, j)));
              row.seen.push_back(j <= n - c.n_queries + i);
              row.value_scales.push_back(has_row_scale<TestType> ? row.values.row(j).cwiseAbs().maxCoeff() / 127 : 1);
            }
            const ErrorBound bound = error_bound(errors, row);
            for (Index x = 0; x < dv; ++x) {
              const double error =
                  std::abs(static_cast<double>(out(i, h * dv + x)) - static_cast<double>(expected.out(i, h * dv + x)));
              INFO("round " << round << ", kernel " << name(kernel) << ", arithmetic " << int(arithmetic) << ", query "
                            << i << ": " << out(i, h * dv + x) << " for " << expected.out(i, h * dv + x));
              REQUIRE(error <= bound.worst[static_cast<std::size_t>(x)]);
              squares += error * error, typical += std::pow(bound.typical[static_cast<std::size_t>(x)], 2);
            }
          }
        INFO("round " << round << ", kernel " << name(kernel) << ", arithmetic " << int(arithmetic) << ", deviation "
                      << scale * std::sqrt(static_cast<float>(d)));
        CHECK(squares <= 9 * typical);  // of few outputs, whose errors are related
        mean += squares / typical / rounds(48);
      }
  }
  CHECK(mean <= 9 * 0.5);  // kernels and arithmetics
}

TEMPLATE_TEST_CASE("stored numbers near the end of float reach who sees them, in their size, and nobody else",
                   "[attention][storage]", float, bfloat16, std::int8_t) {
  Draw draw(16);
  const auto far_out = [&] { return draw.sign() * draw.one_of({3.4e38F, 3.402e38F, 3.39e38F, 3.3895e38F, 3e38F}); };
  for (int round = 0; round < rounds(60); ++round) {
    const Index n = draw.whole(1, round % 10 == 0 ? 420 : 40);
    const Case c{
        .n_queries = draw.whole(1, n), .n_keys = n, .heads = {2, 1}, .head_dim = 9, .v_head_dim = draw.whole(1, 20)};
    const Inputs<float> in(c, static_cast<std::uint64_t>(round));
    const PagedKeys<TestType> clean(in.k, in.v, 1, consecutive_pages(n, {50, 3}));
    Inputs<float> bad = in;
    const Index row = draw.whole(0, n - 1), left = draw.whole(0, n);
    bad.v(row, draw.whole(0, c.v_head_dim - 1)) = far_out();
    const bool key_too = draw.whole(0, 1) == 0;  // of those who see it the scores are not finite
    if (key_too) bad.k(row, draw.whole(0, 8)) = far_out();
    const PagedKeys<TestType> cache(bad.k, bad.v, 1, consecutive_pages(n, {50, 3}));
    if (has_row_scale<TestType> && key_too)  // numbers past the end of float
      for (const auto& run : cache.key_rows().runs)
        if (run.position <= row && row < run.position + run.rows)
          const_cast<float*>(run.value_scales)[row - run.position] = 1e38F;
    const auto sees = [&](const At& at) { return before(at) && at.key_position >= at.query_position - left; };
    const Matrix<double> v = stored<TestType>(bad.v, 1);
    const Expected expected = attention_by_formula(
        in.q, stored<TestType>(in.k, 1), v, {.heads = c.heads, .first_position = n - c.n_queries}, sees, unchanged);
    for (const Kernel kernel : kernels)
      for (const Arithmetic arithmetic : arithmetics) {
        const Options<float> options{.kernel = kernel, .arithmetic = arithmetic};
        const auto out = attention(in.q, cache, c.heads, window(left, 0), plain, options);
        const auto without = attention(in.q, clean, c.heads, window(left, 0), plain, options);
        for (Index i = 0; i < c.n_queries; ++i) {
          INFO("round " << round << ", kernel " << name(kernel) << ", arithmetic " << int(arithmetic) << ", query "
                        << i);
          if (!sees(At{0, 0, i, row, n - c.n_queries + i, row}))
            REQUIRE(same_bits(Matrix<float>(out.row(i)), Matrix<float>(without.row(i))));
          else if (!key_too)
            for (Index x = 0; x < out.cols(); ++x) {
              const long double right = expected.out(i, x);
              REQUIRE((out(i, x) == right || std::abs(out(i, x) - right) <= 0.04L * 3.4e38L));
            }
        }
      }
  }
}

TEMPLATE_TEST_CASE("queries and keys near the end of float have their scores", "[attention][storage]", float,
                   bfloat16) {
  const Case c{.n_queries = 9, .n_keys = 23, .heads = {2, 1}, .head_dim = 6, .v_head_dim = 5};
  const float large = std::is_same_v<TestType, bfloat16> ? 3.38e38F : 3.4e38F;  // still finite when it is stored
  for (const bool in_keys : {false, true}) {
    Inputs<float> in(c);
    Matrix<float>&wide = in_keys ? in.k : in.q, &small = in_keys ? in.q : in.k;
    wide *= 1e36F, small *= 0.1F;
    for (Index i = 0; i < wide.rows(); ++i)
      for (Index x = 0; x < wide.cols(); x += 6) wide(i, x) = i % 2 == 0 ? (in_keys ? large : 3.4e38F) : -1e38F;
    const PagedKeys<TestType> cache(in.k, in.v, 1, consecutive_pages(c.n_keys, {50, 3}));
    const Expected expected =
        attention_by_formula(in.q, stored<TestType>(in.k, 1), stored<TestType>(in.v, 1),
                             {.heads = c.heads, .scale = 2e-38F, .first_position = 14}, before, unchanged);
    for (const Kernel kernel : kernels)
      for (const Arithmetic arithmetic : arithmetics) {
        INFO("in keys " << in_keys << ", kernel " << name(kernel) << ", arithmetic " << int(arithmetic));
        CHECK(max_error(attention(in.q, cache, c.heads, causal, plain,
                                  {.scale = 2e-38F, .kernel = kernel, .arithmetic = arithmetic}),
                        expected.out) <= 0.02);
      }
  }
}

TEMPLATE_TEST_CASE("no rounding mode makes more of a weight than its type holds", "[attention][storage]", bfloat16,
                   std::int8_t) {
  const Case c{.n_queries = 19, .n_keys = 301, .heads = {2, 1}, .head_dim = 9, .v_head_dim = 21};
  for (const bool equal : {false, true}) {
    Inputs<float> in(c);
    if (equal) in.q.setZero(), in.v.array() += 3;
    const PagedKeys<TestType> cache(in.k, in.v, 1, consecutive_pages(c.n_keys, {50, 3}));
    for (const Kernel kernel : kernels)
      for (const Arithmetic arithmetic : arithmetics) {
        const auto run = [&] {
          return attention(in.q, cache, c.heads, causal, plain, {.kernel = kernel, .arithmetic = arithmetic});
        };
        const Matrix<float> nearest = run();
        for (const int mode : {FE_UPWARD, FE_DOWNWARD, FE_TOWARDZERO}) {
          REQUIRE(std::fesetround(mode) == 0);
          const Matrix<float> out = run();
          std::fesetround(FE_TONEAREST);
          INFO("mode " << mode << ", kernel " << name(kernel) << ", arithmetic " << int(arithmetic));
          CHECK(relative_rms(out, nearest.cast<long double>()) <= (arithmetic == Arithmetic::exact ? 1e-4 : 3e-2));
        }
      }
  }
}

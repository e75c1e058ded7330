#include <qkv/attention.hpp>

#include "support/attention_case.hpp"

// What is masked is not read, whatever stands there; what is seen reaches those who see it, and nobody else.

using namespace support;
using namespace qkv;

namespace {

template <class T>
const std::vector<T> poisons = {std::numeric_limits<T>::quiet_NaN(), std::numeric_limits<T>::infinity(),
                                -std::numeric_limits<T>::infinity()};

struct Result {
  Matrix<float> out, log_sum_exp;
  friend bool operator==(const Result& a, const Result& b) {
    return same_bits(a.out, b.out) && same_bits(a.log_sum_exp, b.log_sum_exp);
  }
};

template <class M>
Result run(const Inputs<float>& in, const Case& c, const M& mask, Kernel kernel) {
  Result r;
  r.out = attention(in.q, in.k, in.v, c.heads, mask, plain,
                    {.first_position = c.first_position, .kernel = kernel, .log_sum_exp = &r.log_sum_exp});
  return r;
}

const Case many{.n_queries = 67, .n_keys = 301, .heads = {4, 2}, .head_dim = 17, .v_head_dim = 9};
const Case few{.n_queries = 3, .n_keys = 301, .heads = {4, 2}, .head_dim = 17, .v_head_dim = 9, .first_position = 270};

}  // namespace

TEST_CASE("NaN and infinities in masked keys and values change no bit", "[attention][nan]") {
  for (const Case& c : {many, few})
    for (const Kernel kernel : kernels)
      for (const float poison : poisons<float>) {
        INFO("kernel " << name(kernel) << ", " << c.n_queries << " queries, " << poison);
        const Inputs<float> in(c);
        Inputs<float> bad = in;
        // Hidden from all: every third key by a predicate, the rest after the last query by causal.
        const auto mask = where([](const At& at) { return at.key % 3 != 1; }) & window(200, 0);
        for (Index j = 1; j < c.n_keys; j += 3) bad.k.row(j).setConstant(poison), bad.v.row(j).setConstant(poison);
        for (Index j = first_position(c, c.n_keys) + c.n_queries; j < c.n_keys; ++j)
          bad.k.row(j).setConstant(poison), bad.v.row(j).setConstant(poison);
        CHECK(run(bad, c, mask, kernel) == run(in, c, mask, kernel));
        // One feature suffices to spoil a product.
        bad = in;
        for (Index j = 1; j < c.n_keys; j += 3) bad.k(j, 3) = poison, bad.v(j, c.v_head_dim) = poison;
        CHECK(run(bad, c, mask, kernel) == run(in, c, mask, kernel));
      }
}

TEST_CASE("rows past the length of a sequence may hold anything", "[attention][nan]") {
  const std::vector<Index> valid = {123};
  for (const Kernel kernel : kernels) {
    INFO("kernel " << name(kernel));
    const Inputs<float> in(many);
    Inputs<float> bad = in;
    bad.k.bottomRows(301 - 123).setConstant(std::numeric_limits<float>::quiet_NaN());
    bad.v.bottomRows(301 - 123).setConstant(std::numeric_limits<float>::quiet_NaN());
    CHECK(run(bad, many, lengths(valid), kernel) == run(in, many, lengths(valid), kernel));
    CHECK(run(bad, many, causal & lengths(valid), kernel) == run(in, many, causal & lengths(valid), kernel));
  }
}

TEST_CASE("NaN in a key reaches the queries that see it and no other", "[attention][nan]") {
  for (const Case& c : {many, few})
    for (const Kernel kernel : kernels)
      for (const Index where_it_is : {Index{0}, Index{130}, c.n_keys - 30}) {
        INFO("kernel " << name(kernel) << ", " << c.n_queries << " queries, key " << where_it_is);
        const Inputs<float> in(c);
        Inputs<float> bad = in;
        bad.k(where_it_is, 0) = std::numeric_limits<float>::quiet_NaN();  // kv head 0: query heads 0 and 1
        const Result clean = run(in, c, causal, kernel), got = run(bad, c, causal, kernel);
        for (Index i = 0; i < c.n_queries; ++i) {
          const bool sees = where_it_is <= first_position(c, c.n_keys) + i;
          const Index width = 2 * c.v_head_dim;
          CHECK(got.out.row(i).leftCols(width).array().isNaN().all() == sees);
          CHECK(got.log_sum_exp.row(i).leftCols(2).array().isNaN().all() == sees);
          if (!sees) CHECK(same_bits(got.out.row(i), clean.out.row(i)));
          CHECK(same_bits(got.out.row(i).rightCols(width), clean.out.row(i).rightCols(width)));
        }
      }
}

TEST_CASE("NaN in a value reaches that feature of the queries that see it and nothing else", "[attention][nan]") {
  for (const Case& c : {many, few})
    for (const Kernel kernel : kernels)
      for (const Index where_it_is : {Index{0}, Index{130}, c.n_keys - 30}) {
        INFO("kernel " << name(kernel) << ", " << c.n_queries << " queries, key " << where_it_is);
        const Inputs<float> in(c);
        Inputs<float> bad = in;
        bad.v(where_it_is, 2) = std::numeric_limits<float>::quiet_NaN();
        const Result clean = run(in, c, causal, kernel), got = run(bad, c, causal, kernel);
        CHECK(same_bits(got.log_sum_exp, clean.log_sum_exp));
        for (Index i = 0; i < c.n_queries; ++i) {
          const bool sees = where_it_is <= first_position(c, c.n_keys) + i;
          if (!sees) CHECK(same_bits(got.out.row(i), clean.out.row(i)));
          for (Index x = 0; x < got.out.cols(); ++x) {
            const bool hit = sees && (x == 2 || x == c.v_head_dim + 2);  // of both heads that share kv head 0
            REQUIRE(std::isnan(got.out(i, x)) == hit);
            if (!hit) REQUIRE(std::abs(got.out(i, x) - clean.out(i, x)) <= 1e-6F);
          }
        }
      }
}

TEST_CASE("NaN in a value that is seen reaches the output, however small its weight", "[attention][nan]") {
  // A weight that underflows to zero is not a mask.
  const auto far_below = [](float s, const At& at) { return at.key == 5 ? -1e5F : s; };
  for (const Case& c : {many, few})
    for (const Kernel kernel : kernels) {
      INFO("kernel " << name(kernel) << ", " << c.n_queries << " queries");
      Inputs<float> in(c);
      in.v(5, 2) = std::numeric_limits<float>::quiet_NaN();
      const auto out = attention(in.q, in.k, in.v, c.heads, full, far_below, {.kernel = kernel});
      CHECK(out.col(2).array().isNaN().all());
      CHECK(out.leftCols(2).array().isFinite().all());
    }
}

TEST_CASE("NaN in a query reaches its own row and head only", "[attention][nan]") {
  for (const Case& c : {many, few})
    for (const Kernel kernel : kernels) {
      INFO("kernel " << name(kernel));
      const Inputs<float> in(c);
      Inputs<float> bad = in;
      bad.q(1, 2 * c.head_dim + 5) = std::numeric_limits<float>::quiet_NaN();
      Result clean = run(in, c, causal, kernel), got = run(bad, c, causal, kernel);
      CHECK(got.out.row(1).segment(2 * c.v_head_dim, c.v_head_dim).array().isNaN().all());
      CHECK(std::isnan(got.log_sum_exp(1, 2)));
      for (Result* r : {&clean, &got})
        r->out.row(1).segment(2 * c.v_head_dim, c.v_head_dim).setZero(), r->log_sum_exp(1, 2) = 0;
      CHECK(got == clean);
    }
}

TEST_CASE("an infinite value that is seen is infinite in the output", "[attention][nan]") {
  for (const Case& c : {many, few})
    for (const Kernel kernel : kernels) {
      INFO("kernel " << name(kernel));
      Inputs<float> in(c);
      in.v(5, 4) = std::numeric_limits<float>::infinity();
      const Result got = run(in, c, full, kernel);
      for (Index i = 0; i < c.n_queries; ++i) {
        CHECK(got.out(i, 4) == std::numeric_limits<float>::infinity());
        CHECK(got.out.row(i).head(4).array().isFinite().all());
      }
    }
}

TEST_CASE("NaN in what masks and scores hide is not read either", "[attention][nan]") {
  Matrix<float> added = normals<float>(many.n_queries, many.n_keys, 4);
  const Matrix<float> clean = added;
  const Index first = many.n_keys - many.n_queries;
  for (Index i = 0; i < many.n_queries; ++i)
    for (Index j = first + i + 1; j < many.n_keys; ++j) added(i, j) = std::numeric_limits<float>::quiet_NaN();
  const Inputs<float> in(many);
  for (const Kernel kernel : kernels) {
    INFO("kernel " << name(kernel));
    CHECK(same_bits(attention(in.q, in.k, in.v, many.heads, causal, bias(added), {.kernel = kernel}),
                    attention(in.q, in.k, in.v, many.heads, causal, bias(clean), {.kernel = kernel})));
  }
}

TEST_CASE("a bias of -inf hides a key and its value, whatever they hold", "[attention][nan]") {
  const auto check = [](const Case& c, Kernel kernel, const auto& score_of, const auto& storage) {
    using S = std::decay_t<decltype(storage)>;
    Matrix<float> added = normals<float>(c.n_queries, c.n_keys, 4);
    for (Index i = 0; i < c.n_queries; ++i)
      for (Index j = 0; j < c.n_keys; ++j)
        if (j % 3 == 1 || j > 250 + i) added(i, j) = -std::numeric_limits<float>::infinity();
    const Matrix<bool> allowed = (added.array() > -std::numeric_limits<float>::infinity()).matrix();
    const Inputs<float> in(c);
    const Matrix<S> k = in.k.cast<S>(), v = in.v.cast<S>();
    const auto run = [&](const Matrix<S>& keys, const Matrix<S>& values, const AnyMask& mask) {
      Result r;
      r.out = attention(in.q, keys, values, c.heads, mask, score_of(added),
                        {.kernel = kernel, .log_sum_exp = &r.log_sum_exp});
      return r;
    };
    const Result clean = run(k, v, AnyMask::of(full));
    CHECK(clean.out.array().isFinite().all());
    const Result masked = run(k, v, AnyMask::of(boolean(allowed)));
    CHECK(max_error(masked.out, clean.out) <= 1e-6);
    for (const float poison : poisons<float>) {
      INFO("kernel " << name(kernel) << ", " << c.n_queries << " queries, " << poison);
      Matrix<S> bad_k = k, bad_v = v;
      for (Index j = 1; j < c.n_keys; j += 3) {
        bad_k.row(j).setConstant(S(poison));
        if (j % 2 == 0) bad_v.row(j).setConstant(S(poison));
      }
      CHECK(run(bad_k, bad_v, AnyMask::of(full)) == clean);
    }
  };
  const auto capped = [](const Matrix<float>& m) { return then(soft_cap(5), bias(m)); };
  for (const Case& c : {many, few})
    for (const Kernel kernel : kernels) {
      check(c, kernel, capped, float());
      check(c, kernel, capped, bfloat16());
    }
}

TEST_CASE("an output full of NaN is overwritten", "[attention][nan]") {
  const Inputs<float> in(many);
  for (const Kernel kernel : kernels) {
    Matrix<float> out = Matrix<float>::Constant(67, 36, std::numeric_limits<float>::quiet_NaN());
    Matrix<float> log_sum_exp = Matrix<float>::Constant(67, 4, std::numeric_limits<float>::quiet_NaN());
    attention_into(out, in.q, in.k, in.v, many.heads, window(5, 0), plain,
                   {.first_position = 250, .kernel = kernel, .log_sum_exp = &log_sum_exp});
    CHECK(out.array().isFinite().all());
  }
}

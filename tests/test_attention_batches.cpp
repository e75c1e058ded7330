#include <qkv/attention.hpp>

#include "support/attention_case.hpp"

// Sequences one under another, told apart by row offsets.

using namespace support;
using namespace qkv;

namespace {

struct Batch {
  std::vector<Index> q_rows, k_rows;
  Heads heads{6, 2};
  Index head_dim = 11, v_head_dim = 7;
  Matrix<float> q, k, v;

  Batch(std::vector<Index> query_offsets, std::vector<Index> key_offsets)
      : q_rows(std::move(query_offsets)),
        k_rows(std::move(key_offsets)),
        q(normals<float>(q_rows.back(), heads.heads * head_dim, 1)),
        k(normals<float>(k_rows.back(), heads.kv_heads * head_dim, 2)),
        v(normals<float>(k_rows.back(), heads.kv_heads * v_head_dim, 3)) {}

  std::size_t count() const { return q_rows.size() - 1; }
  Matrix<float> part(const Matrix<float>& x, const std::vector<Index>& rows, std::size_t s) const {
    return x.middleRows(rows[s], rows[s + 1] - rows[s]);
  }
};

/// One sequence of one query, one longer than a tile, an empty one, one without keys, more queries than keys.
Batch unequal() { return {{0, 1, 71, 71, 76, 79, 90}, {0, 300, 377, 380, 380, 517, 522}}; }

/// The batch as one call, and each sequence alone.
template <class M, class F>
void check_batch(const Batch& b, const M& mask, const F& score, Options<float> options) {
  Matrix<float> lse, alone_lse;
  Options<float> batch = options;
  batch.query_offsets = b.q_rows, batch.key_offsets = b.k_rows, batch.log_sum_exp = &lse;
  const Matrix<float> out = attention(b.q, b.k, b.v, b.heads, mask, score, batch);
  options.log_sum_exp = &alone_lse;
  for (std::size_t s = 0; s < b.count(); ++s) {
    INFO("sequence " << s << ", kernel " << name(options.kernel));
    const Matrix<float> alone = attention(b.part(b.q, b.q_rows, s), b.part(b.k, b.k_rows, s), b.part(b.v, b.k_rows, s),
                                          b.heads, mask, score, options);
    CHECK(same_bits(b.part(out, b.q_rows, s), alone));
    CHECK(same_bits(b.part(lse, b.q_rows, s), alone_lse));
  }
}

}  // namespace

TEST_CASE("unlike sequences of a batch have masks and scores of their own", "[attention][batch]") {
  const Batch b = unequal();
  std::vector<Matrix<bool>> allowed;
  std::vector<Matrix<float>> added;
  for (std::size_t s = 0; s < b.count(); ++s) {
    const Index n = b.q_rows[s + 1] - b.q_rows[s], n_keys = b.k_rows[s + 1] - b.k_rows[s];
    added.push_back(normals<float>(n * 6, n_keys, s + 7));
    allowed.push_back((normals<float>(n, n_keys, s + 20).array() < 0.8F).matrix());
  }
  std::vector<Boolean> masks;
  std::vector<Bias<float>> biases;
  for (std::size_t s = 0; s < b.count(); ++s)
    masks.push_back(boolean(allowed[s])), biases.push_back(bias_per_head(added[s], 6));
  for (const Kernel kernel : {Kernel::automatic, Kernel::reference}) {
    Options<float> batch{.kernel = kernel, .query_offsets = b.q_rows, .key_offsets = b.k_rows};
    const auto run = [&](const auto& mask, const auto& score, const Options<float>& options) {
      return attention(b.q, b.k, b.v, b.heads, mask, score, options);
    };
    const Matrix<float> out =
        run(window(90, infinite) & per_sequence(masks), then(soft_cap(4), per_sequence(biases)), batch);
    for (std::size_t s = 0; s < b.count(); ++s) {
      INFO("sequence " << s << ", kernel " << name(kernel));
      const Matrix<float> alone =
          attention(b.part(b.q, b.q_rows, s), b.part(b.k, b.k_rows, s), b.part(b.v, b.k_rows, s), b.heads,
                    window(90, infinite) & masks[s], then(soft_cap(4), biases[s]), {.kernel = kernel});
      CHECK(same_bits(b.part(out, b.q_rows, s), alone));
    }
  }
  // One mask of a batch is that of every sequence, and must fit each.
  const auto said = [&](const auto& mask) {
    return message_of([&] {
      attention(b.q, b.k, b.v, b.heads, window(90, infinite) & mask, then(soft_cap(4), per_sequence(biases)),
                {.query_offsets = b.q_rows, .key_offsets = b.k_rows});
    });
  };
  CHECK(contains(said(masks[1]), "a boolean mask must be [n_queries, n_keys]"));
  CHECK(contains(said(per_sequence(std::span(masks).first(5))),
                 "per_sequence needs one mask or score for each sequence; given 5 for 6 sequences"));
  const std::vector<Boolean> turned(masks.rbegin(), masks.rend());
  CHECK(contains(said(per_sequence(turned)), "given [11, 5] for n_queries 1, n_keys 300"));
}

TEST_CASE("a sequence gives the same bits in a batch as alone", "[attention][batch]") {
  const std::vector<float> sinks = {0, 1, 2, -1, -2, 3};
  for (const Kernel kernel : {Kernel::automatic, Kernel::reference, Kernel::tiled, Kernel::decode}) {
    check_batch(unequal(), full, plain, {.kernel = kernel});
    check_batch(unequal(), causal, plain, {.sinks = sinks, .kernel = kernel});
    check_batch(unequal(), window(20, 3), soft_cap(2), {.scale = 0.3, .first_position = 2, .kernel = kernel});
    check_batch(unequal(), window(20, 3), soft_cap(2), {.first_key_position = 77, .kernel = kernel});
  }
}

TEST_CASE("a batch of one is a call without offsets", "[attention][batch]") {
  check_batch({{0, 70}, {0, 131}}, causal, plain, {});
  check_batch({{0, 70, 70}, {0, 0, 131}}, causal, plain, {});
}

TEST_CASE("a batch of no sequences has no rows", "[attention][batch]") {
  const std::vector<Index> none = {0};
  CHECK(attention(Matrix<float>(0, 6), Matrix<float>(0, 6), Matrix<float>(0, 4), {2, 2}, causal, plain,
                  {.query_offsets = none, .key_offsets = none})
            .rows() == 0);
}

TEST_CASE("masks see which sequence they are asked about, and rows inside it", "[attention][batch]") {
  const Batch b = unequal();
  const std::vector<Index> valid = {250, 77, 1, 0, 100, 3};
  const auto mask = causal & lengths(valid) & [](const At& at) { return (at.sequence + at.key + at.query) % 5 != 0; };
  for (const Kernel kernel : kernels) {
    const Matrix<float> out = attention(b.q, b.k, b.v, b.heads, mask, plain,
                                        {.kernel = kernel, .query_offsets = b.q_rows, .key_offsets = b.k_rows});
    for (std::size_t s = 0; s < b.count(); ++s) {
      INFO("sequence " << s << ", kernel " << name(kernel));
      const Index n = b.q_rows[s + 1] - b.q_rows[s];
      const Expected expected = attention_by_formula(
          b.part(b.q, b.q_rows, s), b.part(b.k, b.k_rows, s), b.part(b.v, b.k_rows, s),
          {.heads = b.heads, .first_position = valid[s] - n, .sequence = static_cast<Index>(s)},
          [&](const At& at) {
            return at.key_position <= at.query_position && at.key < valid[s] &&
                   (at.sequence + at.key + at.query) % 5 != 0;
          },
          unchanged);
      CHECK(max_error(b.part(out, b.q_rows, s), expected.out) <= tolerance<float>);
    }
  }
}

TEST_CASE("NaN in one sequence stays in it", "[attention][batch]") {
  Batch b = unequal();
  const auto run = [&](Kernel kernel) {
    return attention(b.q, b.k, b.v, b.heads, causal, plain,
                     {.kernel = kernel, .query_offsets = b.q_rows, .key_offsets = b.k_rows});
  };
  const Batch clean = b;
  for (const Kernel kernel : kernels) {
    b = clean;
    const Matrix<float> expected = run(kernel);
    b.k.middleRows(300, 77).setConstant(std::numeric_limits<float>::quiet_NaN());
    b.v.middleRows(300, 77).setConstant(std::numeric_limits<float>::quiet_NaN());
    const Matrix<float> out = run(kernel);
    CHECK(same_bits(out.topRows(1), expected.topRows(1)));
    CHECK(out.middleRows(1, 70).array().isNaN().all());
    CHECK(same_bits(out.bottomRows(19), expected.bottomRows(19)));
  }
}

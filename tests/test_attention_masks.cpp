#include <qkv/attention.hpp>

#include <random>

#include "support/attention_case.hpp"

// Masks that bring operands of their own: lengths, documents, boolean matrices.

using namespace support;
using namespace qkv;

namespace {

Matrix<bool> coins(Index rows, Index cols, unsigned seed) {
  std::mt19937 random(seed);
  Matrix<bool> m(rows, cols);
  for (Index i = 0; i < m.size(); ++i) m.data()[i] = random() % 3 != 0;
  return m;
}

}  // namespace

TEMPLATE_TEST_CASE("every kernel is the definition under lengths, which also place the queries", "[attention]", float,
                   double) {
  for (const Case& c : shapes())
    for (const Index valid : {c.n_keys / 3, c.n_keys - 1, c.n_keys, Index{0}}) {
      const std::vector<Index> n = {valid};
      check_kernels<TestType>(
          c, causal & lengths(n), plain,
          [valid](const At& at) { return at.key < valid && at.key_position <= at.query_position; }, unchanged, {},
          valid);
    }
}

TEMPLATE_TEST_CASE("every kernel is the definition under documents", "[attention]", float, double) {
  for (const Case& c : shapes()) {
    if (first_position(c, c.n_keys) < 0) continue;  // refused: documents are of positions
    std::vector<Index> ids;
    for (Index p = 0; p < c.n_keys + c.n_queries; ++p) ids.push_back(p < 50 ? 4 : p < 140 ? 1 : 2 + p / 200);
    check_kernels<TestType>(
        c, causal & documents(ids), plain,
        [&ids](const At& at) {
          return at.key_position <= at.query_position &&
                 ids[static_cast<std::size_t>(at.key_position)] == ids[static_cast<std::size_t>(at.query_position)];
        },
        unchanged);
  }
}

TEMPLATE_TEST_CASE("every kernel is the definition under boolean matrices", "[attention]", float, double) {
  for (const Case& c : shapes()) {
    const Matrix<bool> one = coins(c.n_queries, c.n_keys, 1), each = coins(c.heads.heads * c.n_queries, c.n_keys, 2);
    check_kernels<TestType>(
        c, boolean(one), plain, [&](const At& at) { return one(at.query, at.key); }, unchanged);
    check_kernels<TestType>(
        c, boolean_per_head(each, c.heads.heads), plain,
        [&](const At& at) { return each(at.head * c.n_queries + at.query, at.key); }, unchanged);
  }
}

TEST_CASE("a mask may be a block of a larger matrix", "[attention]") {
  const Case c{.n_queries = 5, .n_keys = 9, .heads = {2, 1}, .head_dim = 3, .v_head_dim = 4};
  const Matrix<bool> large = coins(8, 20, 3);
  const auto part = large.block(2, 7, 5, 9);
  check_kernels<double>(
      c, boolean(part), plain, [&](const At& at) { return large(2 + at.query, 7 + at.key); }, unchanged);
}

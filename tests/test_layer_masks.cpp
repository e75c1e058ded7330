#include <qkv/multi_head_attention.hpp>
#include <qkv/position.hpp>

#include "support/catch.hpp"
#include "support/layers.hpp"

using namespace support;

namespace {

inline constexpr Index n_rows = 23;
const std::vector<std::vector<Index>> pieces = {{n_rows}, {1}, {9, 1, 4}};

/// ids of three documents, of 8, 5 and 10 tokens.
std::vector<Index> three_documents() {
  std::vector<Index> ids(n_rows, 5);
  std::fill_n(ids.begin(), 8, 2);
  std::fill_n(ids.begin() + 8, 5, 9);
  return ids;
}

/// Anything that looks random.
bool coin(Index query, Index key) { return (query * 7 + key * 5 + query * key) % 3 != 1; }

}  // namespace

TEST_CASE("documents stay apart in a cache", "[layer]") {
  const auto layer = multi_head_layer<double>(small_gqa);
  const Matrix<double> x = normals<double>(n_rows, 23, 1);
  const auto ids = three_documents();
  const auto expected = multi_head_by_formula(layer, x, [&](const At& at) {
    return causally(at) &&
           ids[static_cast<std::size_t>(at.query_position)] == ids[static_cast<std::size_t>(at.key_position)];
  });
  for (const auto& sizes : pieces) {
    auto cache = layer.make_cache(n_rows);
    CHECK(max_error(feed(layer, cache, x, sizes, qkv::causal & qkv::documents(ids)), expected) <=
          layer_tolerance<double>);
  }
}

TEST_CASE("a prefix may be read in both directions, a window forgets", "[layer]") {
  const auto layer = multi_head_layer<double>(small_gqa);
  const Matrix<double> x = normals<double>(n_rows, 23, 2);
  const auto expected = multi_head_by_formula(layer, x, [](const At& at) {
    return at.key_position < 6 || (causally(at) && at.query_position - at.key_position <= 4);
  });
  for (const std::vector<Index>& sizes : {std::vector<Index>{n_rows}, {6, 1}, {9, 1, 4}}) {
    auto cache = layer.make_cache(n_rows);
    CHECK(max_error(feed(layer, cache, x, sizes, qkv::window(4, 0) | qkv::prefix(6)), expected) <=
          layer_tolerance<double>);
  }
}

TEST_CASE("a matrix mask has a row per new token and a column per cached one", "[layer]") {
  const auto layer = multi_head_layer<double>(small_gqa);
  const Matrix<double> x = normals<double>(n_rows, 23, 3);
  const auto expected = multi_head_by_formula(
      layer, x, [](const At& at) { return causally(at) && coin(at.query_position, at.key_position); });
  for (const Index first : {0, 7, 22}) {
    auto cache = layer.make_cache(n_rows);
    layer.forward(x.topRows(first), cache);
    Matrix<bool> sees(n_rows - first, n_rows);
    for (Index i = 0; i < sees.rows(); ++i)
      for (Index j = 0; j < n_rows; ++j) sees(i, j) = coin(first + i, j);
    CHECK(max_error(layer.forward(x.bottomRows(n_rows - first), cache, qkv::causal & qkv::boolean(sees)),
                    expected.bottomRows(n_rows - first)) <= layer_tolerance<double>);
  }
}

TEST_CASE("a bias is added by call rows, ALiBi by positions", "[layer]") {
  const auto layer = multi_head_layer<double>(small_gqa, true);
  const Matrix<double> x = normals<double>(n_rows, 23, 4), table = normals<double>(n_rows, n_rows, 5);
  const RowVector<double> slopes = qkv::alibi_slopes<double>(6);
  const auto score = [&](long double s, const At& at) {
    return s -
           static_cast<long double>(slopes(at.head)) * static_cast<long double>(at.query_position - at.key_position) +
           static_cast<long double>(table(at.query_position, at.key_position));
  };
  const auto expected = multi_head_by_formula(layer, x, causally, score);
  for (const Index first : {0, 9, 22}) {
    auto cache = layer.make_cache(n_rows);
    const Matrix<double> above = table.topLeftCorner(first, first), below = table.bottomRows(n_rows - first);
    const auto start =
        layer.forward(x.topRows(first), cache, qkv::causal, qkv::then(qkv::alibi(slopes), qkv::bias(above)));
    CHECK(max_error(start, expected.topRows(first)) <= layer_tolerance<double>);
    const auto rest = layer.forward(x.bottomRows(n_rows - first), cache, qkv::causal,
                                    qkv::then(qkv::alibi(slopes), qkv::bias(below)));
    CHECK(max_error(rest, expected.bottomRows(n_rows - first)) <= layer_tolerance<double>);
  }
}

TEST_CASE("lengths hide keys and leave the new tokens where the cache has them", "[layer]") {
  const auto layer = multi_head_layer<double>(small_gqa);
  const Matrix<double> x = normals<double>(n_rows, 23, 6);
  auto cache = layer.make_cache(n_rows);
  layer.forward(x.topRows(14), cache);
  const Index length[] = {11};
  const auto out = layer.forward(x.bottomRows(9), cache, qkv::causal & qkv::lengths(length));
  const auto expected =
      multi_head_by_formula(layer, x, [](const At& at) { return causally(at) && at.key_position < 11; });
  CHECK(max_error(out, expected.bottomRows(9)) <= layer_tolerance<double>);
}

TEST_CASE("what does not fit the call is refused before the cache changes", "[layer]") {
  const auto layer = multi_head_layer<double>(small_gqa);
  const Matrix<double> x = normals<double>(9, 23, 7);
  auto cache = layer.make_cache(12);
  layer.forward(x.topRows(5), cache);
  const Matrix<double> held = cache.keys();
  Matrix<double> out = Matrix<double>::Constant(4, 23, 7);
  const auto unchanged_after = [&](const std::string& part, const auto& mask, const auto&... score) {
    const std::string text = message_of([&] { layer.forward_into(out, x.bottomRows(4), cache, mask, score...); });
    return contains(text, part) && (out.array() == 7).all() && cache.rows() == 5 && same_bits(cache.keys(), held);
  };
  const Matrix<bool> narrow = Matrix<bool>::Constant(4, 5, true), tall = Matrix<bool>::Constant(9, 9, true);
  CHECK(unchanged_after("given [4, 5] for n_queries 4, n_keys 9", qkv::causal & qkv::boolean(narrow)));
  CHECK(unchanged_after("given [9, 9] for n_queries 4, n_keys 9", qkv::causal & qkv::boolean(tall)));
  const std::vector<Index> ids(8, 1), length = {10};
  CHECK(unchanged_after("8 ids, the last position is 8", qkv::causal & qkv::documents(ids)));
  CHECK(unchanged_after("length 10, n_keys 9", qkv::causal & qkv::lengths(length)));
  const Matrix<double> table = normals<double>(4, 9, 8), small = table.leftCols(8);
  const RowVector<double> slopes = qkv::alibi_slopes<double>(6), two = slopes.head(2);
  CHECK(unchanged_after("given [4, 8]", qkv::causal, qkv::then(qkv::alibi(slopes), qkv::bias(small))));
  CHECK(unchanged_after("given 2 for 6 heads", qkv::causal, qkv::then(qkv::alibi(two), qkv::bias(table))));
}

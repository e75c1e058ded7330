#include <qkv/embedding.hpp>

#include <array>
#include <vector>

#include "support/catch.hpp"
#include "support/numbers.hpp"

using namespace support;

TEMPLATE_TEST_CASE("a token's vector is its row of the table", "[embedding]", float, double, long double) {
  const qkv::Matrix<TestType> table = numbers<TestType>(11, 7, 1);
  const qkv::Embedding<TestType> embedding(table);
  const std::vector<std::int32_t> ids{10, 0, 3, 3, 9};
  const std::vector<std::int64_t> wide(ids.begin(), ids.end());
  const auto x = embedding.forward(ids);
  REQUIRE(x.rows() == 5);
  REQUIRE(x.cols() == 7);
  for (std::size_t i = 0; i < ids.size(); ++i)
    for (Index j = 0; j < 7; ++j) REQUIRE(x(static_cast<Index>(i), j) == table(ids[i], j));
  REQUIRE(max_error(embedding.forward(wide), x) == 0);
  REQUIRE(max_error(qkv::embed(table, ids), x) == 0);
  REQUIRE(embedding.forward(std::span<const std::int32_t>()).rows() == 0);
}

TEST_CASE("the same word has the same vector in two sentences", "[embedding]") {
  const qkv::Embedding<float> embedding(numbers<float>(9, 5, 2));
  const auto river = embedding.forward(std::array<std::int32_t, 3>{1, 2, 7});
  const auto money = embedding.forward(std::array<std::int32_t, 4>{7, 3, 4, 5});
  REQUIRE(same_bits(river.row(2), money.row(0)));
}

TEST_CASE("an id outside the vocabulary is named before anything is written", "[embedding]") {
  const qkv::Embedding<float> embedding(numbers<float>(11, 7, 3));
  qkv::Matrix<float> out = qkv::Matrix<float>::Constant(3, 7, 5);
  const auto text = message_of([&] { embedding.forward_into(out, std::array<std::int32_t, 3>{1, 4, 11}); });
  REQUIRE(contains(text, "id 11"));
  REQUIRE(contains(text, "place 2"));
  REQUIRE(contains(text, "vocabulary is 11"));
  REQUIRE(contains(message_of([&] { embedding.forward_into(out, std::array<std::int64_t, 3>{1, -2, 3}); }), "id -2"));
  REQUIRE(contains(message_of([&] { embedding.forward(std::array<std::int64_t, 1>{std::int64_t{1} << 40}); }),
                   "id 1099511627776"));
  REQUIRE((out.array() == 5).all());
  REQUIRE(contains(message_of([&] { embedding.forward_into(out, std::array<std::int32_t, 2>{1, 2}); }), "[3, 7]"));
}

TEST_CASE("embedding writes into a block of a larger buffer and nowhere else", "[embedding]") {
  const qkv::Matrix<double> table = numbers<double>(6, 3, 4);
  qkv::Matrix<double> buffer = qkv::Matrix<double>::Constant(4, 9, -8);
  qkv::embed_into(buffer.block(1, 2, 2, 3), table, std::array<std::int32_t, 2>{5, 1});
  REQUIRE(same_bits(buffer.block(1, 2, 1, 3), table.row(5)));
  REQUIRE(same_bits(buffer.block(2, 2, 1, 3), table.row(1)));
  buffer.block(1, 2, 2, 3).setConstant(-8);
  REQUIRE((buffer.array() == -8).all());
  qkv::Matrix<double> shared = table;
  REQUIRE_THROWS_AS(qkv::embed_into(shared.topRows(2), shared, std::array<std::int32_t, 2>{5, 1}),
                    std::invalid_argument);
}

TEMPLATE_TEST_CASE("tied logits are dot products with every token's vector", "[embedding]", float, double,
                   long double) {
  const Index vocabulary = 139, model_dim = 157, n = 6;
  const qkv::Matrix<TestType> table = numbers<TestType>(vocabulary, model_dim, 5),
                              x = numbers<TestType>(n, model_dim, 6);
  const qkv::Embedding<TestType> embedding(table);
  const auto logits = embedding.logits(x);
  qkv::Matrix<long double> expected(n, vocabulary);
  for (Index i = 0; i < n; ++i)
    for (Index v = 0; v < vocabulary; ++v) {
      expected(i, v) = 0;
      for (Index k = 0; k < model_dim; ++k)
        expected(i, v) += static_cast<long double>(x(i, k)) * static_cast<long double>(table(v, k));
    }
  REQUIRE(max_error(logits, expected) <= 160 * static_cast<double>(std::numeric_limits<TestType>::epsilon()) * 8);
  if constexpr (sizeof(TestType) <= 8)
    for (Index i = 0; i < n; ++i) REQUIRE(same_bits(embedding.logits(x.row(i)), logits.row(i)));
  REQUIRE(contains(message_of([&] { embedding.logits(table.leftCols(3)); }), "[139, 157]"));
}

TEST_CASE("logits of no rows or of no tokens are there at once, whatever the number of the others", "[embedding]") {
  const qkv::Matrix<float> none(0, 0), tall(Index{1} << 60, 0);
  REQUIRE(qkv::Embedding<float>(tall).logits(none).cols() == tall.rows());
  REQUIRE(qkv::Embedding<float>(none).logits(tall).rows() == tall.rows());
}

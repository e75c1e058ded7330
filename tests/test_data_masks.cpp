#include <qkv/data_masks.hpp>

#include <array>
#include <vector>

#include "support/catch.hpp"
#include "support/numbers.hpp"

using namespace support;
using namespace qkv;

namespace {

static_assert(Mask<Lengths> && Mask<Documents> && Mask<Boolean>);

// Masks hold views: what would dangle does not compile.
template <class X>
concept CanBeBoolean = requires(X&& x) {
  boolean(std::forward<X>(x));
  boolean_per_head(std::forward<X>(x), Index{1});
};
static_assert(CanBeBoolean<Matrix<bool>&> && CanBeBoolean<const Matrix<bool>&>);
static_assert(!CanBeBoolean<Matrix<bool>> && !CanBeBoolean<const Matrix<bool>>);
template <class R>
concept CanBeIndices = requires(R&& r) {
  lengths(std::forward<R>(r));
  documents(std::forward<R>(r));
};
static_assert(CanBeIndices<std::vector<Index>&> && CanBeIndices<const std::vector<Index>&> &&
              CanBeIndices<Index (&)[3]>);
static_assert(CanBeIndices<std::span<const Index>> && CanBeIndices<std::span<Index, 3>>);
static_assert(!CanBeIndices<std::vector<Index>> && !CanBeIndices<const std::vector<Index>>);
static_assert(!CanBeIndices<std::array<Index, 3>>);

/// At these positions, in rows of the same numbers.
At pair(Index query, Index key) { return {0, 0, query, key, query, key}; }

/// One character per key, one line per query.
template <class M>
std::string picture(const M& mask, Index n_queries, Index n_keys) {
  std::string text;
  for (Index i = 0; i < n_queries; ++i, text += '\n')
    for (Index j = 0; j < n_keys; ++j) text += mask.sees(pair(i, j)) ? 'x' : '.';
  return text;
}

constexpr CallShape call(Index n_queries, Index n_keys) {
  return {
      .n_queries = n_queries, .n_keys = n_keys, .first_position = n_keys - n_queries, .last_key_position = n_keys - 1};
}

}  // namespace

TEST_CASE("each mask draws its picture", "[mask]") {
  const std::vector<Index> ids = {7, 7, 3, 3, 3}, valid = {3};
  CHECK(picture(documents(ids), 5, 5) == "xx...\nxx...\n..xxx\n..xxx\n..xxx\n");
  CHECK(picture(lengths(valid), 2, 5) == "xxx..\nxxx..\n");
  const std::vector<Index> halves = {0, 0, 1, 1};
  CHECK(picture(causal & documents(halves), 4, 4) == "x...\nxx..\n..x.\n..xx\n");
}

TEST_CASE("lengths and boolean matrices look at rows, documents at positions", "[mask]") {
  const At at{.sequence = 1, .head = 2, .query = 0, .key = 1, .query_position = 5, .key_position = 4};
  const std::vector<Index> one = {0, 1, 9}, two = {0, 2, 9};
  CHECK(!lengths(one).sees(at));
  CHECK(lengths(two).sees(at));

  Matrix<bool> allowed = Matrix<bool>::Zero(3, 2);
  allowed(0, 1) = true;
  CHECK(boolean(allowed).sees(at));
  CHECK(!boolean_per_head(allowed, 3).sees(at));
  allowed(2, 1) = true;
  CHECK(boolean_per_head(allowed, 3).sees(at));
  const std::vector<Index> same = {0, 0, 0, 0, 7, 7}, other = {7, 7, 7, 7, 7, 0};
  CHECK(documents(same).sees(at));
  CHECK(!documents(other).sees(at));
}

TEST_CASE("only lengths say how many keys are real", "[mask]") {
  const std::vector<Index> valid = {3, 9, -1};
  CHECK(detail::valid_keys(full, 0, 7) == 7);
  CHECK(detail::valid_keys(lengths(valid), 0, 7) == 3);
  CHECK(detail::valid_keys(lengths(valid), 1, 7) == 7);  // check() refuses it
  CHECK(detail::valid_keys(lengths(valid), 2, 7) == 0);
  CHECK(detail::valid_keys(lengths(valid), 3, 7) == 7);
  CHECK(detail::valid_keys(causal & lengths(valid), 0, 7) == 3);
  CHECK(detail::valid_keys(lengths(valid) & causal, 0, 7) == 3);
  CHECK(detail::valid_keys(lengths(valid) | prefix(2), 0, 7) == 7);
}

TEST_CASE("operands that do not fit the call are refused in words", "[mask]") {
  const auto said = [](const auto& mask, const CallShape& shape) {
    return message_of([&] { detail::check_operand(mask, shape); });
  };
  const std::vector<Index> ids = {0, 0, 1}, negative = {-1}, valid = {3};
  CHECK(said(full, call(2, 3)).empty());
  CHECK(said(documents(ids), call(2, 3)).empty());
  CHECK(contains(said(documents(ids), call(2, 4)), "an id for every position; given 3 ids, the last position is 3"));
  CHECK(contains(said(documents(ids), call(4, 3)), "positions >= 0; the first query is at -1"));
  CHECK(contains(said(documents(ids), {.n_queries = 2, .n_keys = 3, .first_position = 2, .last_key_position = 2}),
                 "the last position is 3"));
  CHECK(said(documents(ids), call(0, 3)).empty());

  CHECK(said(lengths(valid), call(2, 3)).empty());
  CHECK(contains(said(lengths(valid), call(2, 2)), "0 <= length <= n_keys; sequence 0 has length 3, n_keys 2"));
  CHECK(contains(said(lengths(negative), call(2, 2)), "0 <= length"));
  CHECK(contains(said(lengths(ids), call(2, 3)), "one length per sequence; given 3 for 1"));

  const Matrix<bool> allowed = Matrix<bool>::Ones(6, 5);
  CHECK(said(boolean(allowed), call(6, 5)).empty());
  CHECK(contains(said(boolean(allowed), call(5, 5)), "a boolean mask must be [n_queries, n_keys]"));
  CHECK(contains(said(boolean(allowed), call(6, 4)), "given [6, 5] for n_queries 6, n_keys 4"));
  CallShape three_heads = call(2, 5);
  three_heads.heads = 3;
  CHECK(said(boolean_per_head(allowed, 3), three_heads).empty());
  CHECK(!said(boolean_per_head(allowed, 2), three_heads).empty());
  CHECK(!said(boolean(allowed), three_heads).empty());
  CHECK(contains(message_of([&] { boolean_per_head(allowed, 4); }), "boolean_per_head needs heads*n_queries rows"));
  CHECK(contains(message_of([&] { boolean_per_head(allowed, 0); }), "boolean_per_head needs"));

  // Both sides of a composition are asked.
  for (const auto& text : {said(causal & documents(ids), call(2, 4)), said(documents(ids) & causal, call(2, 4)),
                           said(causal | documents(ids), call(2, 4)), said(documents(ids) | causal, call(2, 4))})
    CHECK(contains(text, "an id for every position"));
}

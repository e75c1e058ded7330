#include <qkv/heads.hpp>

#include "support/catch.hpp"
#include "support/numbers.hpp"

using namespace support;
using qkv::Heads;

namespace {

template <class X>
concept HasHeads = requires(X&& x) {
  qkv::head_columns(std::forward<X>(x), Index{0}, Index{1});
};
static_assert(HasHeads<qkv::Matrix<float>&> && HasHeads<const qkv::Matrix<float>&> && HasHeads<qkv::View<float>>);
static_assert(HasHeads<decltype(std::declval<qkv::Matrix<float>&>().topRows(1))>);
static_assert(!HasHeads<qkv::Matrix<float>> && !HasHeads<const qkv::Matrix<float>>);  // a view of what is gone

}  // namespace

TEST_CASE("neighbouring query heads share a key/value head", "[heads]") {
  static_assert(Heads{.heads = 8}.kv_heads == 8);  // MHA unless said otherwise
  static_assert(Heads{6, 2}.group_size() == 3);
  const std::vector<Index> expected = {0, 0, 0, 1, 1, 1};
  for (Index h = 0; h < 6; ++h) CHECK(Heads{6, 2}.kv_head(h) == expected[static_cast<std::size_t>(h)]);
  for (Index h = 0; h < 7; ++h) CHECK(Heads{7, 7}.kv_head(h) == h);
  for (Index h = 0; h < 7; ++h) CHECK(Heads{7, 1}.kv_head(h) == 0);
}

TEST_CASE("heads must be a positive multiple of kv_heads", "[heads]") {
  CHECK_NOTHROW(check(Heads{14, 2}));
  for (const Heads wrong : {Heads{7, 2}, Heads{0, 1}, Heads{1, 0}, Heads{-4, 2}, Heads{-4, -2}, Heads{2, 4}})
    CHECK(contains(message_of([&] { check(wrong); }), "heads must be a positive multiple of kv_heads"));
}

TEST_CASE("a head is a block of columns, seen without a copy", "[heads]") {
  qkv::Matrix<float> x = numbers<float>(3, 15, 1);
  for (Index h = 0; h < 5; ++h) {
    CHECK(same_bits(qkv::head_columns(x, h, 5), x.middleCols(3 * h, 3)));
    CHECK(qkv::head_columns(x, h, 5).data() == x.data() + 3 * h);
  }
  qkv::head_columns(x, 4, 5).setZero();
  CHECK(x.rightCols(3).isZero(0));
  CHECK(contains(message_of([&] { qkv::head_columns(x, 5, 5); }), "0 <= head < heads"));
  CHECK(contains(message_of([&] { qkv::head_columns(x, -1, 5); }), "0 <= head < heads"));
  CHECK(contains(message_of([&] { qkv::head_columns(x, 0, 4); }), "[3, 15]"));
  CHECK(contains(message_of([&] { qkv::head_columns(x, 0, 0); }), "head 0 of 0"));
}

TEST_CASE("repeat_kv_heads gives every query head its own copy", "[heads]") {
  const qkv::Matrix<double> x = numbers<double>(3, 10, 2);
  const qkv::Matrix<double> wide = qkv::repeat_kv_heads(x, {6, 2});
  REQUIRE(wide.cols() == 30);
  for (Index h = 0; h < 6; ++h) CHECK(same_bits(wide.middleCols(5 * h, 5), x.middleCols(5 * (h / 3), 5)));
  CHECK(contains(message_of([&] {
                   qkv::repeat_kv_heads(x, {9, 3});
                 }),
                 "kv_heads 3 must divide the columns of [3, 10]"));
  CHECK(contains(message_of([&] { qkv::repeat_kv_heads(x, {5, 2}); }), "positive multiple"));
  const qkv::Matrix<float> none(3, 0);
  CHECK(qkv::repeat_kv_heads(none, {Index{1} << 60, 2}).size() == 0);  // at once
  CHECK_THROWS_AS(qkv::repeat_kv_heads(x, {Index{1} << 62, 1}), std::length_error);
}

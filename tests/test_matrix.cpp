#include <qkv/detail/overlap.hpp>
#include <qkv/matrix.hpp>

#include <random>

#include "support/catch.hpp"
#include "support/numbers.hpp"

using namespace support;

namespace {

using Rows = qkv::Matrix<float>;
using Strided = Eigen::Map<Rows, 0, Eigen::Stride<Eigen::Dynamic, Eigen::Dynamic>>;

static_assert(qkv::is_viewable<Rows>);
static_assert(qkv::is_viewable<qkv::RowVector<float>>);
static_assert(qkv::is_viewable<Eigen::VectorXf>);
static_assert(qkv::is_viewable<decltype(std::declval<Rows&>().middleCols(0, 1))>);
static_assert(qkv::is_viewable<decltype(std::declval<Rows&>().row(0))>);
static_assert(qkv::is_viewable<decltype(std::declval<Rows&>().col(0))>);
static_assert(qkv::is_viewable<qkv::ConstView<float>>);
static_assert(qkv::is_viewable<Eigen::Ref<Rows>>);
static_assert(qkv::is_viewable<decltype(std::declval<Eigen::MatrixXf&>().transpose())>);
static_assert(!qkv::is_viewable<Eigen::MatrixXf>);
static_assert(!qkv::is_viewable<decltype(std::declval<Rows&>().transpose())>);
static_assert(!qkv::is_viewable<decltype(std::declval<Eigen::MatrixXf&>().row(0))>);
static_assert(!qkv::is_viewable<decltype(std::declval<Rows&>() * 2.0F)>);
static_assert(!qkv::is_viewable<Strided>);
static_assert(!qkv::MatrixLike<std::vector<float>>);
static_assert(qkv::is_writable<Rows&> && qkv::is_writable<Rows> && qkv::is_writable<qkv::View<float>>);
static_assert(qkv::is_writable<decltype(std::declval<Rows&>().middleCols(0, 1))>);
static_assert(!qkv::is_writable<const Rows&> && !qkv::is_writable<const qkv::View<float>&>);
static_assert(!qkv::is_writable<qkv::ConstView<float>> && !qkv::is_writable<Eigen::MatrixXf&>);
static_assert(!qkv::is_writable<decltype(std::declval<const Rows&>().middleCols(0, 1))>);
static_assert(!qkv::is_writable<decltype(std::declval<Rows&>() * 2.0F)>);

}  // namespace

TEST_CASE("a view reads the matrix it was made of", "[matrix]") {
  Rows m = numbers<float>(7, 11, 1);
  const auto same = [](const auto& x) {
    const auto v = qkv::view(x);
    return same_bits(v, x) && (x.size() == 0 || v.data() == x.data());
  };
  CHECK(same(m));
  CHECK(same(m.middleCols(3, 5)));
  CHECK(same(m.block(2, 4, 3, 6)));
  CHECK(same(m.row(4)));
  CHECK(same(m.col(9)));
  CHECK(same(m.row(4).segment(2, 5)));
  CHECK(same(m.topRows(0)));
  Eigen::VectorXf column = m.col(2);
  CHECK(same(column));
  Eigen::MatrixXf column_major = m;
  CHECK(same(column_major.transpose()));
}

TEST_CASE("a writable view writes where it looks and nowhere else", "[matrix]") {
  Rows m = numbers<float>(5, 9, 2);
  const Rows before = m;
  qkv::writable_view(m.block(1, 3, 3, 4)).setConstant(7);
  for (Index i = 0; i < m.rows(); ++i)
    for (Index j = 0; j < m.cols(); ++j) REQUIRE(m(i, j) == (i >= 1 && i < 4 && j >= 3 && j < 7 ? 7.0F : before(i, j)));
}

TEST_CASE("what can be viewed is not copied, and what cannot is copied row by row", "[matrix]") {
  const Rows m = numbers<float>(3, 5, 3);
  static_assert(std::is_same_v<decltype(qkv::viewable(m)), const Rows&>);
  CHECK(&qkv::viewable(m) == &m);
  const Eigen::MatrixXf column_major = m;
  static_assert(std::is_same_v<decltype(qkv::viewable(column_major)), Rows>);
  CHECK(same_bits(qkv::viewable(column_major), m));
  CHECK(same_bits(qkv::viewable(2.0F * m), Rows(2.0F * m)));
}

TEST_CASE("overlap of strided matrices is exact", "[matrix]") {
  using qkv::detail::Footprint;
  std::mt19937 random(7);
  const auto pick = [&](int low, int high) { return std::uniform_int_distribution<std::intptr_t>(low, high)(random); };
  const auto covers = [](const Footprint& f, std::intptr_t byte) {
    for (std::intptr_t i = 0; i < f.rows; ++i)
      if (byte >= f.begin + i * f.stride_bytes && byte < f.begin + i * f.stride_bytes + f.row_bytes) return true;
    return false;
  };
  int shared = 0;
  for (int trial = 0; trial < 5000; ++trial) {
    // Strides below the width of a row are legal in an Eigen::Map: rows that overlap each other.
    const Footprint a{pick(0, 40), pick(0, 5), pick(0, 7), pick(0, 14)},
        b{pick(0, 40), pick(0, 5), pick(0, 7), pick(0, 14)};
    bool expected = false;
    for (std::intptr_t byte = 0; byte < 120; ++byte) expected = expected || (covers(a, byte) && covers(b, byte));
    INFO(a.begin << " " << a.rows << " " << a.row_bytes << " " << a.stride_bytes << " / " << b.begin << " " << b.rows
                 << " " << b.row_bytes << " " << b.stride_bytes);
    REQUIRE(share_an_element(a, b) == expected);
    REQUIRE(share_an_element(b, a) == expected);
    shared += expected;
  }
  CHECK(shared > 500);
  CHECK(shared < 4500);
}

TEST_CASE("column blocks of one buffer are disjoint, and blocks that meet in one element are not", "[matrix]") {
  Rows buffer(6, 12);
  using qkv::detail::require_disjoint;
  CHECK_NOTHROW(require_disjoint(buffer.leftCols(5), buffer.rightCols(7), "x"));
  CHECK_NOTHROW(require_disjoint(buffer.topRows(2), buffer.bottomRows(4), "x"));
  const auto message =
      message_of([&] { require_disjoint(buffer.topLeftCorner(3, 5), buffer.bottomRightCorner(4, 8), "x"); });
  CHECK(contains(message, "the output must not share elements with the input x"));
}

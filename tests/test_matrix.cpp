#include <qkv/base/overlap.hpp>
#include <qkv/matrix.hpp>

#include <algorithm>
#include <cstddef>
#include <random>
#include <set>
#include <vector>

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

namespace {

/// A strided matrix of one of four scalars somewhere in a buffer: what is asked of it, and its bytes one by one.
struct Placed {
  qkv::detail::Footprint footprint;
  std::set<std::intptr_t> bytes;
  bool rows_apart = true;   // no byte belongs to two elements
  std::string refused_out;  // what writable_view says
};

template <class T>
Placed place(std::byte* buffer, Index offset, Index rows, Index cols, Index stride, bool as_column) {
  T* const data = reinterpret_cast<T*>(buffer) + offset;
  Placed placed;
  const auto fill = [&](auto map) {
    placed.footprint = qkv::detail::footprint(map);
    for (Index i = 0; i < rows; ++i)
      for (Index j = 0; j < cols; ++j)
        for (std::size_t byte = 0; byte < sizeof(T); ++byte)
          placed.rows_apart &=
              placed.bytes
                  .insert(reinterpret_cast<std::intptr_t>(data + i * stride + j) + static_cast<std::intptr_t>(byte))
                  .second;
    placed.refused_out = message_of([&] { qkv::writable_view(map); });
  };
  if (as_column && cols == 1)
    fill(Eigen::Map<Eigen::Matrix<T, Eigen::Dynamic, 1>, 0, Eigen::InnerStride<>>(data, rows,
                                                                                  Eigen::InnerStride<>(stride)));
  else
    fill(qkv::View<T>(data, rows, cols, Eigen::OuterStride<>(stride)));
  return placed;
}

}  // namespace

TEST_CASE("overlap of strided matrices is exact: strides of either sign, any scalars", "[matrix]") {
  alignas(16) static std::byte buffer[1024];
  std::mt19937 random(7);
  const auto pick = [&](Index low, Index high) { return std::uniform_int_distribution<Index>(low, high)(random); };
  const auto any = [&] {
    const Index rows = pick(0, 5), cols = pick(0, 7), stride = pick(-9, 9), bytes = pick(400, 500);
    switch (pick(0, 3)) {
      case 0:
        return place<std::int8_t>(buffer, bytes, rows, cols, stride, true);
      case 1:
        return place<std::int16_t>(buffer, bytes / 2, rows, cols, stride, true);
      case 2:
        return place<float>(buffer, bytes / 4, rows, cols, stride, false);
      default:
        return place<double>(buffer, bytes / 8, rows, cols, stride, true);
    }
  };
  int shared = 0, refused = 0;
  for (int trial = 0; trial < 20000; ++trial) {
    const Placed a = any(), b = any();
    const bool expected =
        std::any_of(a.bytes.begin(), a.bytes.end(), [&](auto byte) { return b.bytes.contains(byte); });
    const auto& f = a.footprint;
    INFO(f.begin << " " << f.rows << " " << f.row_bytes << " " << f.stride_bytes << " / " << b.footprint.begin << " "
                 << b.footprint.rows << " " << b.footprint.row_bytes << " " << b.footprint.stride_bytes);
    REQUIRE(share_an_element(a.footprint, b.footprint) == expected);
    REQUIRE(share_an_element(b.footprint, a.footprint) == expected);
    REQUIRE(a.refused_out.empty() == a.rows_apart);
    shared += expected, refused += !a.rows_apart;
  }
  CHECK(shared > 2000);
  CHECK(shared < 18000);
  CHECK(refused > 2000);
}

TEST_CASE("an output is compared with an input of another order too", "[matrix]") {
  std::vector<float> buffer(200);
  for (Index from = 0; from < 60; ++from) {
    const Eigen::Map<const Eigen::MatrixXf, 0, Eigen::OuterStride<>> columns(buffer.data() + 30, 3, 4,
                                                                             Eigen::OuterStride<>(5));
    const qkv::View<float> out(buffer.data() + from, 2, 2, Eigen::OuterStride<>(7));
    std::set<const float*> read;
    for (Index j = 0; j < 4; ++j)
      for (Index i = 0; i < 3; ++i) read.insert(&columns.coeffRef(i, j));
    bool expected = false;
    for (Index i = 0; i < 4; ++i) expected |= read.contains(&out.coeffRef(i / 2, i % 2));
    INFO(from);
    REQUIRE(message_of([&] { qkv::detail::require_disjoint(out, columns, "x"); }).empty() == !expected);
  }
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

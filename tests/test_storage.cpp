#include <qkv/product/packed_weights.hpp>
#include <qkv/storage.hpp>

#include <cstring>
#include <vector>

#include "support/catch.hpp"
#include "support/numbers.hpp"

using namespace support;

namespace {

struct Fixed16 {};  // a user's own number

struct Int4 {  // a user's own integers, with a scale per row
  std::int8_t value = 0;
  Int4() = default;
  template <class T>
  explicit Int4(T x) : value(static_cast<std::int8_t>(x)) {}
  explicit operator float() const { return value; }
};

}  // namespace

template <>
inline constexpr qkv::StorageTraits qkv::storage_traits<Int4>{.name = "int4", .largest = 7};

namespace {

static_assert(qkv::StorageType<float> && qkv::StorageType<qkv::half> && qkv::StorageType<qkv::bfloat16>);
static_assert(qkv::StorageType<std::int8_t> && qkv::StorageType<long double> && qkv::StorageType<Fixed16>);
static_assert(!qkv::StorageType<int> && !qkv::StorageType<std::uint8_t> && !qkv::StorageType<bool>);
static_assert(qkv::has_row_scale<std::int8_t> && !qkv::has_row_scale<float> && !qkv::has_row_scale<qkv::half>);
static_assert(std::is_same_v<qkv::WideStorage<std::int8_t>, float>);
static_assert(std::is_same_v<qkv::WideStorage<qkv::bfloat16>, qkv::bfloat16>);
static_assert(qkv::row_bytes<float>(129) == 516);
static_assert(qkv::row_bytes<qkv::half>(129) == 258);
static_assert(qkv::row_bytes<std::int8_t>(129) == 133);

/// q, scale of a row, straight from the definition.
std::vector<std::int8_t> quantised(const std::vector<float>& x, float& scale) {
  std::vector<std::int8_t> q(x.size(), 99);
  scale = qkv::quantize_row(x.data(), static_cast<Index>(x.size()), q.data());
  return q;
}

}  // namespace

TEST_CASE("storage types have the names that reports print", "[storage]") {
  CHECK(std::string(qkv::storage_name<float>) == "f32");
  CHECK(std::string(qkv::storage_name<double>) == "f64");
  CHECK(std::string(qkv::storage_name<qkv::half>) == "f16");
  CHECK(std::string(qkv::storage_name<qkv::bfloat16>) == "bf16");
  CHECK(std::string(qkv::storage_name<std::int8_t>) == "int8");
}

TEST_CASE("the largest magnitude of an int8 row becomes 127", "[storage]") {
  float scale = 0;
  // 254 / 127 = 2: quotients are exact, and halves round to even.
  const auto q = quantised({254, -254, 1, 3, 5, -1, -3, 2, 0, 253, 252}, scale);
  CHECK(scale == 2.0F);
  CHECK(q == std::vector<std::int8_t>{127, -127, 0, 2, 2, 0, -2, 1, 0, 126, 126});
}

TEST_CASE("an entry in storage_traits makes a storage with a row scale, of rows and of weights", "[storage]") {
  static_assert(qkv::StorageType<Int4> && qkv::has_row_scale<Int4> && qkv::row_bytes<Int4>(9) == 13);
  CHECK(std::string(qkv::storage_name<Int4>) == "int4");
  const qkv::Matrix<float> x = 3.0F * numbers<float>(31, 5, 1);
  const qkv::Matrix<float> weights = qkv::kernel::PackedWeights<float, Int4>(x).unpacked();
  for (Index c = 0; c < 5; ++c) {
    const qkv::RowVector<float> row = x.col(c);
    const float half_step = 0.5F / 7 * row.cwiseAbs().maxCoeff() * (1 + 1e-5F);
    std::vector<Int4> stored(31, Int4(0));
    qkv::RowVector<float> back(31);
    float scale = 0;
    qkv::store_row(row.data(), 31, stored.data(), &scale);
    qkv::load_row(stored.data(), 31, scale, back.data());
    for (const Int4 q : stored) REQUIRE(std::abs(q.value) <= 7);
    CHECK((back - row).cwiseAbs().maxCoeff() <= half_step);
    CHECK((back - row).cwiseAbs().maxCoeff() > 0.5F * half_step);
    CHECK(same_bits(qkv::RowVector<float>(weights.col(c)), back));
  }
}

TEST_CASE("an int8 row is read back within half a step", "[storage]") {
  for (const Index n : {1, 3, 31, 128, 577}) {
    const qkv::Matrix<float> x = 3.0F * numbers<float>(1, n, static_cast<std::uint64_t>(n));
    std::vector<std::int8_t> q(static_cast<std::size_t>(n));
    std::vector<float> back(static_cast<std::size_t>(n));
    float scale = 0;
    qkv::store_row(x.data(), n, q.data(), &scale);
    qkv::load_row(q.data(), n, scale, back.data());
    CHECK(std::abs(scale - x.cwiseAbs().maxCoeff() / 127) <= 1e-7F * scale);
    for (Index i = 0; i < n; ++i)
      REQUIRE(std::abs(back[static_cast<std::size_t>(i)] - x(0, i)) <= scale * 0.5F * (1 + 1e-5F));
  }
}

TEST_CASE("a row of zeros has scale 0 and comes back as zeros", "[storage]") {
  float scale = 7;
  const auto q = quantised({0, -0.0F, 0}, scale);
  CHECK(scale == 0.0F);
  CHECK(q == std::vector<std::int8_t>{0, 0, 0});
}

TEST_CASE("a row with one number that is not finite has scale NaN", "[storage]") {
  for (const float bad : {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity(),
                          -std::numeric_limits<float>::infinity()})
    for (std::size_t where = 0; where < 3; ++where) {
      std::vector<float> x = {1, 2, 3};
      x[where] = bad;
      float scale = 0, back = 0;
      const auto q = quantised(x, scale);
      CHECK(std::isnan(scale));
      qkv::load_row(q.data(), 1, scale, &back);
      CHECK(std::isnan(back));
    }
}

TEST_CASE("the smallest and the largest rows stay inside ±127", "[storage]") {
  const float tiny = std::numeric_limits<float>::denorm_min(), huge = 1e38F;
  for (const float x : {tiny, 3 * tiny, 100 * tiny, 190 * tiny, std::numeric_limits<float>::min(), huge, 1e-40F}) {
    float scale = 0;
    const auto q = quantised({x, -x, 0}, scale);
    CHECK(q[0] >= 0);
    CHECK(q[0] == -q[1]);
    CHECK(q[2] == 0);
    CHECK(std::isfinite(scale));
    CHECK(std::abs(static_cast<float>(q[0]) * scale - x) <= std::max(0.5F * scale, x * 1e-6F) + 127 * tiny);
  }
}

TEST_CASE("what was finite is read back finite, up to the largest float", "[storage]") {
  constexpr float most = std::numeric_limits<float>::max();
  for (const float x : {most, std::nextafter(most, 0.0F), most / 2, 0x1.fffffap127F}) {
    float scale = 0, back[3];
    const auto q = quantised({x, -x, x / 3}, scale);
    qkv::load_row(q.data(), 3, scale, back);
    CHECK(q[0] == 127);
    CHECK(q[1] == -127);
    for (const float b : back) CHECK(std::isfinite(b));
    CHECK(std::abs(back[0] - x) <= scale / 2);
    CHECK(std::abs(back[2] - x / 3) <= scale / 2 * (1 + 1e-5F));
  }
}

TEST_CASE("a row whose bytes no Index holds is an error", "[storage]") {
  constexpr Index most = std::numeric_limits<Index>::max();
  CHECK(qkv::row_bytes<std::int8_t>(most - 4) == most);
  CHECK(contains(message_of<std::length_error>([&] { (void)qkv::row_bytes<std::int8_t>(most - 3); }), "does not fit"));
  CHECK(contains(message_of<std::length_error>([&] { (void)qkv::row_bytes<float>(most / 4 + 1); }), "does not fit"));
  CHECK(contains(message_of([&] { (void)qkv::row_bytes<float>(-1); }), "a size must be >= 0"));
}

TEST_CASE("rows of other storage types are converted element by element", "[storage]") {
  const float x[] = {0.1F, -2.5F, 1e-6F, 300.0F, -0.0F};
  qkv::half h[5];
  qkv::bfloat16 b[5];
  double wide[5];
  float back[5];
  qkv::store_row(x, 5, h, nullptr);
  qkv::store_row(x, 5, b, nullptr);
  qkv::store_row(x, 5, wide, nullptr);
  for (int i = 0; i < 5; ++i) {
    CHECK(static_cast<float>(h[i]) == static_cast<float>(qkv::half(x[i])));
    CHECK(static_cast<float>(b[i]) == static_cast<float>(qkv::bfloat16(x[i])));
    CHECK(wide[i] == static_cast<double>(x[i]));
  }
  qkv::load_row(h, 5, 0.0F, back);  // no scale: not used
  CHECK(std::abs(back[0] - 0.1F) <= 0.1F * 0x1p-11F);
  CHECK(back[3] == 300.0F);
  qkv::load_row(b, 5, 0.0F, back);
  CHECK(std::abs(back[0] - 0.1F) <= 0.1F * 0x1p-8F);
}

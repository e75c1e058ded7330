#include "qkv/simd/narrow.hpp"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "support/catch.hpp"

namespace {

using qkv::Index;
using qkv::kernel::Simd;

template <class T>
inline constexpr T inf = std::numeric_limits<T>::infinity();
template <class T>
inline constexpr T not_a_number = std::numeric_limits<T>::quiet_NaN();

template <class T>
using Lanes = std::vector<T>;

template <class T>
Lanes<T> lanes_of(typename Simd<T>::Vec v) {
  Lanes<T> lanes(static_cast<std::size_t>(Simd<T>::width));
  Simd<T>::store(lanes.data(), v);
  return lanes;
}

template <class T>
T exp2_of(T x) {
  return lanes_of<T>(Simd<T>::exp2(Simd<T>::broadcast(x))).back();
}

template <class T>
Lanes<T> numbers(std::size_t n, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<double> normal;
  Lanes<T> x(n);
  for (T& e : x) e = static_cast<T>(normal(random));
  return x;
}

template <class T>
bool same(T a, T b) {
  return a == b || (std::isnan(a) && std::isnan(b));
}

/// Largest error in units of the last place of the result, over x in [from, to].
template <class T>
double worst_ulp(double from, double to, int steps) {
  double worst = 0;
  for (int i = 0; i <= steps; ++i) {
    const T x = static_cast<T>(from + (to - from) * i / steps);
    const long double want = std::exp2(static_cast<long double>(x));
    const long double ulp = std::ldexp(1.0L, std::ilogb(want) - (std::numeric_limits<T>::digits - 1));
    const double error = static_cast<double>(std::abs(static_cast<long double>(exp2_of(x)) - want) / ulp);
    if (!(error <= worst)) worst = error;
  }
  return worst;
}

// ---- what simd/isa/general.hpp says of words, one number after another ----
using qkv::kernel::Isa;
constexpr auto words = static_cast<std::size_t>(Isa::lanes);

/// n numbers, the extremes among them.
template <class T>
std::vector<T> drawn(std::size_t n, unsigned seed) {
  std::mt19937 random(seed);
  std::vector<T> x(n);
  for (T& e : x) {
    const unsigned long bits = random();
    e = bits % 4 == 0 ? std::numeric_limits<T>::min() : bits % 4 == 1 ? std::numeric_limits<T>::max() : T(bits >> 2);
  }
  return x;
}
template <class T>
std::vector<T> stored(Isa::Words v) {
  std::vector<T> x(4 * words / sizeof(T));
  Isa::store_words(x.data(), v);
  return x;
}
std::vector<std::int32_t> sums(Isa::Sums v) {
  std::vector<std::int32_t> x(words);
  Isa::store_sums(x.data(), v);
  return x;
}
using Bits16 = std::vector<std::uint16_t>;

}  // namespace

TEMPLATE_TEST_CASE("every lane computes what one number computes", "[simd]", float, double, long double) {
  using S = Simd<TestType>;
  const auto n = static_cast<std::size_t>(S::width);
  const auto a = numbers<TestType>(n, 1), b = numbers<TestType>(n, 2), c = numbers<TestType>(n, 3);
  const auto va = S::load(a.data()), vb = S::load(b.data()), vc = S::load(c.data());
  const auto sum = lanes_of<TestType>(S::add(va, vb)), difference = lanes_of<TestType>(S::sub(va, vb)),
             product = lanes_of<TestType>(S::mul(va, vb)), quotient = lanes_of<TestType>(S::div(va, vb)),
             fused = lanes_of<TestType>(S::fma(va, vb, vc)), largest = lanes_of<TestType>(S::max(va, vb)),
             smallest = lanes_of<TestType>(S::min(va, vb)),
             chosen = lanes_of<TestType>(S::select(S::less(va, vb), vb, vc)), iota = lanes_of<TestType>(S::iota());
  const volatile bool twice = !S::fused;
  for (std::size_t i = 0; i < n; ++i) {
    CHECK(sum[i] == a[i] + b[i]);
    CHECK(difference[i] == a[i] - b[i]);
    const volatile TestType rounded_product = a[i] * b[i];
    CHECK(product[i] == rounded_product);
    CHECK(quotient[i] == a[i] / b[i]);
    CHECK(fused[i] == (twice ? rounded_product + c[i] : std::fma(a[i], b[i], c[i])));
    CHECK(largest[i] == std::max(a[i], b[i]));
    CHECK(smallest[i] == std::min(a[i], b[i]));
    CHECK(chosen[i] == (a[i] < b[i] ? b[i] : c[i]));
    CHECK(iota[i] == static_cast<TestType>(i));
  }
}

TEMPLATE_TEST_CASE("comparisons with NaN are false", "[simd]", float, double, long double) {
  using S = Simd<TestType>;
  const auto one = S::broadcast(TestType(1)), none = S::broadcast(not_a_number<TestType>);
  CHECK_FALSE(S::any(S::less(one, none)));
  CHECK_FALSE(S::any(S::less(none, one)));
  CHECK_FALSE(S::any(S::less_equal(none, none)));
  CHECK_FALSE(S::any(S::less(one, one)));
  CHECK(S::any(S::less_equal(one, one)));
  CHECK_FALSE(S::any(S::both(S::less_equal(one, one), S::less(one, one))));
  CHECK(S::any(S::both(S::less_equal(one, one), S::less(S::zero(), one))));
  // One lane is enough for any().
  for (Index lane = 0; lane < S::width; ++lane) {
    Lanes<TestType> x(static_cast<std::size_t>(S::width), TestType(2));
    x[static_cast<std::size_t>(lane)] = TestType(0);
    CHECK(S::any(S::less(S::load(x.data()), one)));
  }
}

TEMPLATE_TEST_CASE("partial loads and stores touch n numbers and no more", "[simd]", float, double, long double) {
  using S = Simd<TestType>;
  for (Index n = 0; n <= S::width; ++n) {
    const auto count = static_cast<std::size_t>(n);
    const Lanes<TestType> exact = numbers<TestType>(count, 4);  // the sanitizers watch the end of it
    const auto read = lanes_of<TestType>(S::load_n(exact.data(), n));
    for (std::size_t i = 0; i < read.size(); ++i) CHECK(read[i] == (i < count ? exact[i] : TestType(0)));
    Lanes<TestType> written(static_cast<std::size_t>(S::width) + 1, TestType(-7));
    S::store_n(written.data(), S::broadcast(TestType(5)), n);
    for (std::size_t i = 0; i < written.size(); ++i) CHECK(written[i] == TestType(i < count ? 5 : -7));
  }
}

TEMPLATE_TEST_CASE("transpose swaps rows and lanes; sums and maxima cover every lane", "[simd]", float, double,
                   long double) {
  using S = Simd<TestType>;
  typename S::Vec rows[S::lanes];
  for (Index i = 0; i < S::width; ++i) rows[i] = S::add(S::iota(), S::broadcast(static_cast<TestType>(i * 100)));
  CHECK(S::sum_lanes(rows[S::width - 1]) ==
        static_cast<TestType>((S::width - 1) * 100 * S::width + S::width * (S::width - 1) / 2));
  CHECK(S::max_lanes(S::sub(S::zero(), rows[0])) == TestType(0));
  CHECK(S::max_lanes(rows[0]) == static_cast<TestType>(S::width - 1));
  S::transpose(rows);
  for (Index i = 0; i < S::width; ++i) {
    const auto row = lanes_of<TestType>(rows[i]);
    for (Index j = 0; j < S::width; ++j) CHECK(row[static_cast<std::size_t>(j)] == static_cast<TestType>(j * 100 + i));
  }
}

TEMPLATE_TEST_CASE("every half, bfloat16 and int8 becomes the number it stands for", "[simd]", float, double) {
  using S = Simd<TestType>;
  const auto check_all = [](const auto& stored) {
    using Storage = std::remove_cvref_t<decltype(stored[0])>;
    long wrong = 0;
    for (std::size_t i = 0; i + static_cast<std::size_t>(S::width) <= stored.size();
         i += static_cast<std::size_t>(S::width)) {
      const auto got = lanes_of<TestType>(S::load(stored.data() + i));
      for (std::size_t j = 0; j < got.size(); ++j) {
        const auto want = static_cast<TestType>(static_cast<float>(stored[i + j]));
        wrong += !(same(got[j], want) && (std::isnan(want) || std::signbit(got[j]) == std::signbit(want)));
      }
    }
    CHECK(wrong == 0);
    for (Index n = 0; n <= S::width; ++n) {
      const std::vector<Storage> exact(stored.begin() + 300, stored.begin() + 300 + n);
      const auto got = lanes_of<TestType>(S::load_n(exact.data(), n));
      for (std::size_t j = 0; j < got.size(); ++j)
        CHECK(same(got[j], j < exact.size() ? static_cast<TestType>(static_cast<float>(exact[j])) : TestType(0)));
    }
  };
  std::vector<qkv::half> halves;
  std::vector<qkv::bfloat16> bfloats;
  std::vector<std::int8_t> bytes;
  for (std::uint32_t i = 0; i < 65536; ++i) {
    halves.push_back(Eigen::numext::bit_cast<qkv::half>(static_cast<std::uint16_t>(i)));
    bfloats.push_back(Eigen::numext::bit_cast<qkv::bfloat16>(static_cast<std::uint16_t>(i)));
    if (i < 1024) bytes.push_back(static_cast<std::int8_t>(static_cast<int>(i % 256) - 128));
  }
  check_all(halves);
  check_all(bfloats);
  check_all(bytes);
}

TEMPLATE_TEST_CASE("2^x is within about one ulp of the exact power", "[simd]", float, double) {
  const double low = std::is_same_v<TestType, float> ? -126 : -1022;
  const double high = std::is_same_v<TestType, float> ? 127.4 : 1023.4;
  const double bound = Simd<TestType>::fused ? 0.95 : 1.1;  // without FMA every step of the polynomial rounds twice
  CHECK(worst_ulp<TestType>(-1.5, 1.5, 100003) < bound);
  CHECK(worst_ulp<TestType>(low, 0, 200003) < bound);
  CHECK(worst_ulp<TestType>(0, high, 50021) < bound);
}

TEMPLATE_TEST_CASE("2^x at its edges: zero, one, infinity, NaN", "[simd]", float, double, long double) {
  CHECK(exp2_of(-inf<TestType>) == TestType(0));
  CHECK_FALSE(std::signbit(exp2_of(-inf<TestType>)));
  CHECK(exp2_of(std::numeric_limits<TestType>::lowest()) == TestType(0));
  CHECK(exp2_of(TestType(-20000)) == TestType(0));
  CHECK(exp2_of(TestType(0)) == TestType(1));
  CHECK(exp2_of(TestType(-0.0)) == TestType(1));
  CHECK(exp2_of(TestType(-1)) == TestType(0.5));
  CHECK(exp2_of(TestType(-126)) == std::exp2(TestType(-126)));
  CHECK(exp2_of(inf<TestType>) == inf<TestType>);
  CHECK(exp2_of(TestType(30000)) == inf<TestType>);
  CHECK(exp2_of(std::numeric_limits<TestType>::max()) == inf<TestType>);
  CHECK(std::isnan(exp2_of(not_a_number<TestType>)));
  CHECK(std::isnan(exp2_of(-not_a_number<TestType>)));
  // Tiny results are right or zero, never garbage.
  for (double x = 0; x > -1200; x -= 0.37) {
    const TestType got = exp2_of(static_cast<TestType>(x));
    const TestType want = std::exp2(static_cast<TestType>(x));
    const bool close = std::abs(got - want) <= want * 2 * std::numeric_limits<TestType>::epsilon() +
                                                   std::numeric_limits<TestType>::denorm_min();
    CHECK((close || (want < std::numeric_limits<TestType>::min() && got == TestType(0))));
  }
}

TEST_CASE("2^x keeps NaN whatever its payload", "[simd]") {
  for (std::uint32_t bits = 0x7F800001U; bits < 0x7FFFFFFFU; bits += 40503U) {
    CHECK(std::isnan(exp2_of(std::bit_cast<float>(bits))));
    CHECK(std::isnan(exp2_of(std::bit_cast<float>(bits | 0x80000000U))));
  }
}

TEST_CASE("a softmax weight that is rounded to a few bits is 2^(d c)", "[simd]") {
  using S = Simd<float>;
  const auto weight = [](float d, float c) {
    return lanes_of<float>(S::weight_short(S::broadcast(d), S::broadcast(c))).back();
  };
  constexpr bool fused = S::fused && S::width > 1;  // then the product is not rounded
  double worst = 0;
  for (float d = 0; d > -87; d -= 0.0137F) {
    const double c = 1.44269504F, want = std::exp2(fused ? double(d) * c : static_cast<double>(d * 1.44269504F));
    worst = std::max(worst, std::abs(static_cast<double>(weight(d, 1.44269504F)) - want) / want);
  }
  INFO(worst);
  // By degree 1 after a table; or the polynomial 9.1e-8, the rest roundings.
  CHECK(worst <= (S::width == 16 ? 6e-5 : fused ? 2.5e-7 : 3.5e-7));
  CHECK(weight(0, 3) == 1.0F);
  CHECK(weight(-inf<float>, 0.1F) == 0.0F);
  CHECK(weight(std::numeric_limits<float>::lowest(), 1) == 0.0F);
  CHECK(weight(-8, 0.5F) == 0.0625F);
  CHECK(std::isnan(weight(not_a_number<float>, 1)));
}

TEMPLATE_TEST_CASE("a softmax weight is 2^(d c), to 1.5 ulp where the product is not rounded", "[simd]", float,
                   double) {
  using S = Simd<TestType>;
  const auto weight = [](TestType d, TestType c) {
    return lanes_of<TestType>(S::weight(S::broadcast(d), S::broadcast(c))).back();
  };
  double worst = 0;
  for (int i = 0; i <= 40000; ++i) {
    const TestType d = -static_cast<TestType>(i) * TestType(0.017), c = TestType(0.1803368801);
    const long double exponent = static_cast<long double>(d) * static_cast<long double>(c), want = std::exp2(exponent);
    if (exponent < -125) break;
    // Where the product is rounded before, that shows as well: half a unit of the exponent.
    const long double rounded = std::abs(exponent) * std::numeric_limits<TestType>::epsilon() / 2;
    const long double relative = std::abs(static_cast<long double>(weight(d, c)) - want) / want;
    const double error = static_cast<double>((relative - 0.7L * rounded) / std::numeric_limits<TestType>::epsilon());
    if (!(error <= worst)) worst = error;
  }
  CHECK(worst <= 1.5);
  CHECK(weight(0, 3) == TestType(1));
  CHECK(weight(-inf<TestType>, TestType(0.1)) == TestType(0));
  CHECK_FALSE(std::signbit(weight(-inf<TestType>, TestType(0.1))));
  CHECK(weight(-20000, 2) == TestType(0));
  CHECK(weight(std::numeric_limits<TestType>::lowest(), 1) == TestType(0));
  CHECK(weight(-8, TestType(0.5)) == TestType(0.0625));
  CHECK(std::isnan(weight(not_a_number<TestType>, 1)));
}

TEST_CASE("products of int8 and of int16 are exact in 32 bits", "[simd][isa]") {
  for (unsigned seed = 0; seed < 200; ++seed) {
    std::vector<std::int32_t> start = drawn<std::int32_t>(words, seed), want = start;
    for (std::size_t i = 0; i < words; ++i) want[i] = start[i] /= 2;
    const auto a = drawn<std::int8_t>(4 * words, seed + 1);
    if constexpr (Isa::int8_products) {
      const auto b = drawn<std::uint8_t>(4 * words, seed + 2);
      for (std::size_t i = 0; i < 4 * words; ++i) want[i / 4] += a[i] * b[i];
      CHECK(sums(Isa::add_int8_products(Isa::load_sums(start.data()), Isa::load_words(a.data()),
                                        Isa::load_words(b.data()))) == want);
    }
    if constexpr (Isa::int16_products) {
      const auto b = drawn<std::int16_t>(2 * words, seed + 3);
      const std::vector<std::int16_t> wide(a.begin(), a.begin() + 2 * Isa::lanes);
      want = start;
      for (std::size_t i = 0; i < 2 * words; ++i) want[i / 2] += wide[i] * b[i];
      CHECK(sums(Isa::add_int16_products(Isa::load_sums(start.data()), Isa::load_words(wide.data()),
                                         Isa::load_words(b.data()))) == want);
    }
  }
}

TEST_CASE("words of integers are read and joined as the interface says", "[simd][isa]") {
  if constexpr (Isa::int16_products) {
    const auto bytes = drawn<std::int8_t>(16 * words, 1), more = drawn<std::int8_t>(16 * words, 2);
    for (Index n = -1; n <= 4 * Isa::lanes; ++n) {  // the sanitizers watch the end of it
      const std::vector<std::int8_t> some(bytes.begin(), bytes.begin() + std::max<Index>(n, 0));
      std::vector<std::int8_t> want = some;
      want.resize(4 * words);
      CHECK(stored<std::int8_t>(Isa::load_words_n(some.data(), n)) == want);
    }
    std::vector<std::int32_t> rows[words], want(words);
    Isa::Sums registers[words];
    for (std::size_t r = 0; r < words; ++r) {
      rows[r] = drawn<std::int32_t>(words, static_cast<unsigned>(r));
      for (std::int32_t& x : rows[r]) want[r] += x >>= 8;
      registers[r] = Isa::load_sums(rows[r].data());
    }
    CHECK(sums(Isa::sum_each(registers)) == want);
    CHECK(sums(Isa::subtract(Isa::broadcast_sum(-7), Isa::broadcast_sum(5))) == std::vector<std::int32_t>(words, -12));

    // Two rows of 4·lanes bytes in decode's order, and back: weights of one and none pick either.
    for (const bool second : {false, true}) {
      const Isa::Words a = Isa::load_words(bytes.data()), b = Isa::load_words(more.data());
      const Isa::Words low = Isa::unpack_low_int16(a, b), high = Isa::unpack_high_int16(a, b);
      const Isa::Words pick = Isa::broadcast_word(second ? 0x10000 : 1);
      Isa::Words part[] = {Isa::low_int8(low), Isa::high_int8(low), Isa::low_int8(high), Isa::high_int8(high)};
      for (Isa::Words& v : part) v = Isa::words_of(Isa::add_int16_products(Isa::broadcast_sum(0), pick, v));
      Isa::order_unpacked(part);
      std::vector<std::int32_t> got;
      for (const Isa::Words& v : part)
        for (const std::int32_t x : stored<std::int32_t>(v)) got.push_back(x);
      const auto& row = second ? more : bytes;
      CHECK(got == std::vector<std::int32_t>(row.begin(), row.begin() + 4 * Isa::lanes));
    }

    std::vector<float> x = numbers<float>(2 * words, 3);
    for (float& e : x) e *= 30000;
    x[0] = 1e6F, x[1] = -1e6F, x[2] = 2.5F;
    std::vector<std::int16_t> rounded(2 * words);
    Isa::store_int16(rounded.data(), Simd<float>::load(x.data()), Simd<float>::load(x.data() + words));
    for (std::size_t i = 0; i < 2 * words; ++i)
      CHECK(rounded[i] == std::clamp(std::nearbyint(x[i]), -32768.0F, 32767.0F));
    CHECK(std::isnan(lanes_of<float>(Isa::positive(Simd<float>::broadcast(not_a_number<float>))).back()));
    CHECK(lanes_of<float>(Isa::positive(Simd<float>::broadcast(-1))).back() == 0);
  }
  // What panels of int16 ask for: AVX-512 has products of int8 instead.
  if constexpr (Isa::int16_products && !Isa::bf16_products) {
    const auto bytes = drawn<std::int8_t>(64, 1), more = drawn<std::int8_t>(64, 2);
    for (Index n = -1; n <= 2 * Isa::lanes; ++n) {
      const std::vector<std::int8_t> some(bytes.begin(), bytes.begin() + std::max<Index>(n, 0));
      std::vector<std::int16_t> want(some.begin(), some.end()), pairs(2 * words);
      want.resize(2 * words);
      CHECK(stored<std::int16_t>(Isa::widen_int8_n(some.data(), n)) == want);
      for (std::size_t i = 0; i < words; ++i) pairs[2 * i] = want[i], pairs[2 * i + 1] = more[i];
      CHECK(stored<std::int16_t>(Isa::pair_int8(Isa::load_int8_n(some.data(), n), Isa::load_int8(more.data()))) ==
            pairs);
    }
    CHECK(stored<std::int16_t>(Isa::widen_int8(more.data())) ==
          std::vector<std::int16_t>(more.begin(), more.begin() + 2 * Isa::lanes));
    Bits16 side_by_side(48);
    Isa::interleave_rows(bytes.data(), more.data(), 48, side_by_side.data());
    for (std::size_t i = 0; i < 48; ++i)
      CHECK(side_by_side[i] == (std::uint8_t(bytes[i]) | std::uint8_t(more[i]) << 8));
    const auto a = drawn<std::int32_t>(words, 4), b = drawn<std::int32_t>(words, 5);
    std::vector<std::int16_t> saturated;
    for (const auto* from : {&a, &b})
      for (const std::int32_t e : *from) saturated.push_back(static_cast<std::int16_t>(std::clamp(e, -32768, 32767)));
    CHECK(stored<std::int16_t>(Isa::pack_int16(Isa::load_words(a.data()), Isa::load_words(b.data()))) == saturated);
    CHECK(stored<qkv::kernel::Word>(Isa::pair_int16(Isa::broadcast_word(32767), Isa::broadcast_word(12))).back() ==
          (12U << 16 | 32767));
    CHECK(stored<std::int32_t>(Isa::truncate_to_int32(Simd<float>::broadcast(2.75F))).back() == 2);
  }
}

TEST_CASE("words of int8 are rounded and joined as the interface says", "[simd][isa]") {
  if constexpr (Isa::int8_products) {
    const auto lanes_of_first = [](Index parts, std::int32_t x) {
      std::vector<std::int32_t> want(words);
      for (std::size_t i = 0; i < words; i += static_cast<std::size_t>(parts)) want[i] = x;
      return want;
    };
    CHECK(sums(Isa::broadcast_first<1>(-9)) == lanes_of_first(1, -9));
    CHECK(sums(Isa::broadcast_first<2>(-9)) == lanes_of_first(2, -9));
    CHECK(sums(Isa::broadcast_first<4>(-9)) == lanes_of_first(4, -9));

    std::vector<float> x(4 * words);
    std::vector<std::uint8_t> want(4 * words);
    for (std::size_t i = 0; i < x.size(); ++i) {
      x[i] = static_cast<float>(i * 37 % 255) - 127 + (i % 3 == 0 ? 0.49F : i % 3 == 1 ? -0.5F : 0);
      want[i] = static_cast<std::uint8_t>(std::nearbyint(x[i]) + 128);
    }
    const auto quarter = [&](std::size_t i) { return Simd<float>::load(x.data() + i * words); };
    CHECK(stored<std::uint8_t>(Isa::round_plus_128(quarter(0), quarter(1), quarter(2), quarter(3))) == want);

    std::vector<std::int32_t> steps[4];
    std::vector<std::int8_t> bytes[4];
    std::vector<std::int8_t> four(4 * words);
    for (std::size_t j = 0; j < 4; ++j) {
      bytes[j] = drawn<std::int8_t>(words, static_cast<unsigned>(j));
      for (std::size_t i = 0; i < words; ++i) {
        steps[j].push_back(static_cast<std::int32_t>((i * 4 + j) * 57 % 300));
        want[4 * i + j] = static_cast<std::uint8_t>(std::min(steps[j][i], 255));
        four[4 * i + j] = bytes[j][i];
      }
    }
    const auto load = [&](std::size_t j) { return Isa::load_words(steps[j].data()); };
    CHECK(stored<std::uint8_t>(Isa::to_uint8(load(0), load(1), load(2), load(3))) == want);
    const auto row = [&](std::size_t j) { return Isa::load_int8(bytes[j].data()); };
    CHECK(stored<std::int8_t>(Isa::quad_int8(row(0), row(1), row(2), row(3))) == four);
    for (std::int8_t& e : four) e = static_cast<std::int8_t>(e ^ -128);
    CHECK(stored<std::int8_t>(Isa::plus_128(Isa::quad_int8(row(0), row(1), row(2), row(3)))) == four);
  }
}

TEST_CASE("numbers are repeated in a register, and neighbours are added up", "[simd][isa]") {
  const auto check = [&]<Index Parts>(std::integral_constant<Index, Parts>) {
    if constexpr (Isa::repeats) {
      const auto x = numbers<float>(words, 8);
      const auto got = lanes_of<float>(Isa::repeat<Parts>(x.data()));
      for (std::size_t i = 0; i < words; ++i) CHECK(got[i] == x[i % Parts]);
      Lanes<float> added(words / Parts);
      Isa::store_part_sums<Parts>(added.data(), Simd<float>::load(x.data()));
      for (std::size_t i = 0; i < added.size(); ++i) {
        double want = 0;
        for (std::size_t j = 0; j < Parts; ++j) want += static_cast<double>(x[i * Parts + j]);
        CHECK(std::abs(added[i] - want) < 1e-6);
      }
    }
  };
  check(std::integral_constant<Index, 2>{});
  check(std::integral_constant<Index, 4>{});
}

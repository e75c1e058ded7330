#include <qkv/absorbed_attention.hpp>

#include <cfenv>
#include <functional>
#include <vector>

#include "support/catch.hpp"
#include "support/draw.hpp"
#include "support/executors.hpp"
#include "support/narrow_errors.hpp"
#include "support/numbers.hpp"
#include "support/oracle.hpp"
#include "support/storages.hpp"

using namespace support;
using qkv::Arithmetic, qkv::At, qkv::Matrix;

namespace {

using Wide = Matrix<long double>;

struct Sizes {
  Index heads, n_new, latent_dim, rope_dim;
};

/// Latent rows in memory of their own: runs of `lengths` rows, `gap` positions apart, NaN wherever no row is.
template <class S>
struct Rows {
  Rows(const Sizes& s, std::vector<Index> lengths, Index gap = 0, std::uint64_t seed = 1) {
    Index n = 0, position = 5 * gap;
    for (const Index length : lengths) n += length;
    const Matrix<float> c = numbers<float>(n, s.latent_dim, seed), r = numbers<float>(n, s.rope_dim, seed + 1);
    const Index stride = s.latent_dim + s.rope_dim + 3;
    const bool one_row = !qkv::has_row_scale<S>;
    const Index slots = n + static_cast<Index>(lengths.size());
    memory.assign(static_cast<std::size_t>(slots * stride), qkv::has_row_scale<S> ? S(127) : S(NAN));
    ropes.assign(static_cast<std::size_t>(slots * stride), qkv::WideStorage<S>(NAN));
    scales.assign(static_cast<std::size_t>(slots), NAN);
    latent = Wide(n, s.latent_dim), rope = Wide(n, s.rope_dim);
    Index slot = 0, row = 0;
    for (const Index length : lengths) {
      qkv::LatentRun<S> run;
      run.rows = length, run.position = position;
      run.latent = memory.data() + slot * stride;
      run.rope = one_row ? reinterpret_cast<const qkv::WideStorage<S>*>(run.latent + s.latent_dim)
                         : ropes.data() + slot * stride;
      run.scales = scales.data() + slot;
      for (Index i = 0; i < length; ++i, ++row) {
        S* const to = memory.data() + (slot + i) * stride;
        float* const scale = scales.data() + slot + i;
        auto* const turned = const_cast<qkv::WideStorage<S>*>(run.rope + i * stride);
        qkv::store_row(c.row(row).data(), s.latent_dim, to, scale);
        qkv::store_row(r.row(row).data(), s.rope_dim, turned, nullptr);
        qkv::load_row(to, s.latent_dim, *scale, latent.row(row).data());
        qkv::load_row(turned, s.rope_dim, 1.0F, rope.row(row).data());
        positions.push_back(position + i);
      }
      runs.push_back(run);
      position += length + gap;
      slot += length + 1;
    }
    all = {.runs = runs,
           .rows = n,
           .latent_dim = s.latent_dim,
           .rope_dim = s.rope_dim,
           .latent_row_stride = stride,
           .rope_row_stride = stride};
  }
  Rows(const Rows&) = delete;

  const qkv::LatentRows<S>& latent_rows() const { return all; }
  S* latent_of(Index row) {
    for (auto& run : runs) {
      if (row < run.rows) return const_cast<S*>(run.latent) + row * all.latent_row_stride;
      row -= run.rows;
    }
    return nullptr;
  }

  std::vector<S> memory;
  std::vector<qkv::WideStorage<S>> ropes;
  std::vector<float> scales;
  std::vector<qkv::LatentRun<S>> runs;
  std::vector<Index> positions;
  qkv::LatentRows<S> all;
  Wide latent, rope;
};

/// Σ p c / Σ p [n_new, heads·latent_dim]; a query that sees nothing: zeros.
template <class T, class S, class M = qkv::Window, class E = qkv::Serial>
Matrix<T> absorbed(const Sizes& s, const Rows<S>& rows, const Matrix<T>& q, T scale, Index first,
                   const M& mask = qkv::causal, Arithmetic arithmetic = Arithmetic::exact,
                   const E& executor = qkv::serial) {
  return qkv::absorbed_attention(q, rows, s.heads, mask,
                                 {.scale = scale, .first_position = first, .arithmetic = arithmetic}, executor);
}

template <class T, class S, class Sees>
Wide formula(const Sizes& s, const Rows<S>& rows, const Matrix<T>& q, T scale, Index first, const Sees& sees) {
  Wide out = Wide::Zero(s.n_new, s.heads * s.latent_dim);
  const Index width = s.latent_dim + s.rope_dim;
  for (Index i = 0; i < s.n_new; ++i)
    for (Index h = 0; h < s.heads; ++h) {
      std::vector<long double> weight;
      std::vector<Index> seen;
      long double top = -std::numeric_limits<long double>::infinity(), sum = 0;
      for (Index j = 0; j < rows.all.rows; ++j) {
        if (!sees(At{0, h, i, j, first + i, rows.positions[static_cast<std::size_t>(j)]})) continue;
        long double dot = 0;
        for (Index x = 0; x < width; ++x)
          dot += static_cast<long double>(q(i, h * width + x)) *
                 (x < s.latent_dim ? rows.latent(j, x) : rows.rope(j, x - s.latent_dim));
        weight.push_back(static_cast<long double>(scale) * dot);
        seen.push_back(j);
        top = std::max(top, weight.back());
      }
      for (auto& w : weight) sum += w = std::exp(w - top);
      for (std::size_t k = 0; k < seen.size(); ++k)
        for (Index x = 0; x < s.latent_dim; ++x)
          out(i, h * s.latent_dim + x) += weight[k] / sum * rows.latent(seen[k], x);
    }
  return out;
}

/// Any mask that is only a condition, behind one type: the kernel is compiled once for all.
using Condition = std::function<bool(const At&)>;

bool causally(const At& at) { return at.key_position <= at.query_position; }

/// Two thirds of the blocks of 64 keys, others for each head.
struct BlocksByHead {
  bool sees(const At& at) const { return (at.key_position / 64 + at.head) % 3 != 1; }
  qkv::Cover cover(const qkv::Block& b) const {
    if (b.key_position / 64 != b.last_key_position() / 64) return qkv::Cover::some;
    return (b.key_position / 64 + b.head) % 3 != 1 ? qkv::Cover::all : qkv::Cover::none;
  }
};

const Sizes sizes[] = {{16, 1, 64, 32},  {33, 1, 32, 6}, {1, 1, 67, 5},  {8, 3, 128, 64}, {5, 7, 19, 3},
                       {16, 2, 512, 64}, {2, 9, 64, 10}, {11, 3, 40, 6}, {4, 1, 36, 12}};

/// Of int8 latents: in int16 (AVX2, SSE2), or in int8 and bfloat16.
constexpr double int8_error = qkv::kernel::OfInt8::int16_keys ? 3e-4 : 0.03;

constexpr Arithmetic arithmetics[] = {Arithmetic::automatic, Arithmetic::exact, Arithmetic::int8};

/// Few heads and many, whole panels and parts of one.
Index some_heads(Draw& draw) { return draw.whole(1, 40); }

template <class Computed, class Stored>
struct In {
  using T = Computed;
  using S = Stored;
};

}  // namespace

TEMPLATE_TEST_CASE("the absorbed kernel is its formula, whatever the heads, tokens, widths and runs", "[absorbed]",
                   (In<float, float>), (In<double, double>), (In<float, qkv::half>), (In<float, qkv::bfloat16>),
                   (In<float, std::int8_t>), (In<double, std::int8_t>)) {
  using T = typename TestType::T;
  using S = typename TestType::S;
  for (const Sizes& s : sizes)
    for (const T scale : {T(0.15), T(-0.2)}) {
      CAPTURE(s.heads, s.n_new, s.latent_dim, scale);
      const Matrix<T> q = numbers<T>(s.n_new, s.heads * (s.latent_dim + s.rope_dim), 7);
      for (const Rows<S>& rows :
           {Rows<S>(s, {823}), Rows<S>(s, {1, 30, 2, 64, 7, 199}), Rows<S>(s, {17, 40, 3}, 101)}) {
        const Index first = rows.positions.back() - s.n_new + 1;
        const Wide expected = formula(s, rows, q, scale, first, causally);
        CHECK(max_error(absorbed(s, rows, q, scale, first), expected) <= (sizeof(T) == 4 ? 3e-6 : 1e-14));
        CHECK(max_error(absorbed(s, rows, q, scale, first, qkv::causal, Arithmetic::automatic), expected) <=
              (sizeof(T) == 8                     ? 1e-14
               : std::is_same_v<S, qkv::bfloat16> ? 0.01
               : std::is_same_v<S, std::int8_t>   ? int8_error
                                                  : 3e-6));
        const Wide bytes =
            absorbed(s, rows, q, scale, first, qkv::causal, Arithmetic::int8).template cast<long double>();
        const double rms = static_cast<double>((bytes - expected).norm() / expected.norm());
        CHECK(rms <= (sizeof(T) == 8                     ? 1e-14
                      : std::is_same_v<S, qkv::bfloat16> ? 3e-3
                      : std::is_same_v<S, std::int8_t>   ? int8_error
                                                         : 3e-6));
      }
    }
}

TEMPLATE_TEST_CASE("masks reach the absorbed kernel: windows, lambdas, queries that see nothing", "[absorbed]", float,
                   qkv::bfloat16, std::int8_t) {
  const double budget = sizeof(TestType) == 4 ? 3e-6 : sizeof(TestType) == 1 ? int8_error : 0.03;
  for (const Sizes& s : {Sizes{16, 5, 32, 4}, Sizes{3, 40, 32, 4}}) {
    const Rows<TestType> rows(s, {3, 400, 50, 1, 399});
    const Matrix<float> q = numbers<float>(s.n_new, s.heads * 36, 8);
    const Index first = 853 - s.n_new;
    const auto check = [&](const auto& mask) {
      const Wide expected =
          formula(s, rows, q, 0.4F, first, [&](const At& at) { return qkv::detail::as_mask(mask).sees(at); });
      for (const Arithmetic in : {Arithmetic::automatic, Arithmetic::int8})
        CHECK(max_error(absorbed(s, rows, q, 0.4F, first, mask, in), expected) <= budget);
    };
    check(qkv::window(57, 3));
    check((qkv::prefix(4) | qkv::window(9, 0)) & qkv::causal);
    check(Condition([](const At& at) { return (at.key_position * at.key_position + at.head + at.query) % 7 < 3; }));
    check(Condition([](const At& at) { return at.query != 1 && at.head != 2 && causally(at); }));
    check(Condition([](const At&) { return false; }));
    check(BlocksByHead{});
  }
}

TEMPLATE_LIST_TEST_CASE("bits of the absorbed kernel depend on neither threads, pieces nor runs", "[absorbed]",
                        support::AllStorages) {
  using T = std::conditional_t<std::is_same_v<TestType, double>, double, float>;
  for (const Sizes& s : {Sizes{16, 9, 64, 32}, Sizes{5, 31, 33, 5}, Sizes{2, 19, 64, 8}, Sizes{130, 2, 32, 2}}) {
    const Rows<TestType> rows(s, {1801});
    std::vector<Index> lengths(27, 64);
    lengths.push_back(1801 - 27 * 64);
    const Rows<TestType> pages(s, lengths);
    const Index width = s.heads * (s.latent_dim + s.rope_dim), first = 1801 - s.n_new;
    const Matrix<T> q = numbers<T>(s.n_new, width, 9);
    for (const Arithmetic in : {Arithmetic::automatic, Arithmetic::int8}) {
      const auto whole = absorbed(s, rows, q, T(0.5), first, qkv::causal, in);
      CHECK(same_bits(absorbed(s, pages, q, T(0.5), first, qkv::causal, in), whole));
      CHECK(same_bits(absorbed(s, rows, q, T(0.5), first, qkv::causal, in, threaded(3)), whole));
      CHECK(same_bits(absorbed(s, pages, q, T(0.5), first, qkv::causal, in, shuffled(4)), whole));
      for (Index i = 0; i < s.n_new; ++i) {
        const Sizes one{s.heads, 1, s.latent_dim, s.rope_dim};
        const Matrix<T> row = q.row(i);
        CHECK(same_bits(absorbed(one, rows, row, T(0.5), first + i, qkv::causal, in), whole.row(i)));
      }
    }
  }
}

TEMPLATE_LIST_TEST_CASE("pieces of any length, on rows that come one after another, give the bits of the whole",
                        "[absorbed]", qkv::StorageTypes) {
  Draw draw(18);
  for (int round = 0; round < rounds(12); ++round) {
    const Index n_new = draw.whole(2, 25), n = n_new + (round % 3 == 0 ? 0 : draw.whole(0, 400));
    const Sizes s{some_heads(draw), n_new, draw.whole(1, 70), draw.whole(1, 20)};
    const Index width = s.heads * (s.latent_dim + s.rope_dim), first = n - n_new;
    const Matrix<float> q = numbers<float>(n_new, width, 19);
    const qkv::Window mask = qkv::window(round % 2 == 0 ? draw.whole(0, n) : qkv::infinite, 0);
    const Rows<TestType> all(s, {n});
    for (const Arithmetic in : arithmetics) {
      const auto whole = absorbed(s, all, q, 0.3F, first, mask, in);
      for (Index at = 0, some = 0; at < n_new; at += some) {
        some = std::min(draw.whole(0, 2) > 0 ? 1 : draw.whole(1, 20), n_new - at);
        const Index held = first + at + some, page = draw.whole(1, held);
        const Rows<TestType> rows(s, page < held ? std::vector<Index>{page, held - page} : std::vector<Index>{held});
        const Sizes piece{s.heads, some, s.latent_dim, s.rope_dim};
        CAPTURE(round, s.heads, s.latent_dim, int(in), first + at, some);
        REQUIRE(same_bits(absorbed(piece, rows, Matrix<float>(q.middleRows(at, some)), 0.3F, first + at, mask, in),
                          whole.middleRows(at, some)));
      }
    }
  }
}

TEMPLATE_TEST_CASE("the row that has all the weight of the absorbed kernel keeps it, however large the scores",
                   "[absorbed]", float, qkv::bfloat16, std::int8_t) {
  Draw draw(20);
  for (int round = 0; round < rounds(150); ++round) {
    const Index n = draw.whole(1, round % 10 == 0 ? 420 : 40), best = draw.whole(0, n - 1);
    const Sizes s{some_heads(draw), 1, draw.whole(1, 40), draw.whole(1, 9)};
    const float size = draw.power(0, 10), side = draw.sign(), sign = draw.sign();
    Rows<TestType> rows(s, {n});
    const auto& all = rows.all;
    for (Index j = 0; j < n; ++j) {
      // Latents in whole steps, by which rows of int8 are themselves; the rope part alone tells rows apart, or zeros do.
      const float c = side - (j == best ? 0 : draw.uniform(0.1, 1) + 100 / size);
      const std::vector<float> same(static_cast<std::size_t>(s.latent_dim), c),
          zeros(static_cast<std::size_t>(s.rope_dim));
      qkv::store_row(same.data(), s.latent_dim, rows.latent_of(j), &rows.scales[static_cast<std::size_t>(j)]);
      qkv::store_row(zeros.data(), s.rope_dim, const_cast<qkv::WideStorage<TestType>*>(all.rope(all.runs[0], j)),
                     static_cast<float*>(nullptr));
      qkv::load_row(rows.latent_of(j), s.latent_dim, rows.scales[static_cast<std::size_t>(j)],
                    rows.latent.row(j).data());
    }
    const Matrix<float> q = Matrix<float>::Constant(1, s.heads * (s.latent_dim + s.rope_dim), size * sign);
    for (const Arithmetic in : arithmetics) {
      const auto out = absorbed(s, rows, q, sign / static_cast<float>(s.latent_dim), n - 1, qkv::causal, in);
      CAPTURE(round, s.heads, s.latent_dim, int(in), side * size);
      const double right = static_cast<double>(rows.latent(best, 0));
      REQUIRE(max_error(out, Wide::Constant(1, out.cols(), right)) <= of_bfloat16 * std::abs(right));
    }
  }
}

TEMPLATE_TEST_CASE("errors of the absorbed kernel in narrow numbers are what its roundings allow", "[absorbed]",
                   qkv::half, qkv::bfloat16, std::int8_t) {
  Draw draw(21);
  double mean = 0;
  for (int round = 0; round < rounds(32); ++round) {
    const Index n = draw.whole(1, round % 4 == 0 ? 600 : 70);
    const Sizes s{some_heads(draw), draw.whole(1, std::min<Index>(n, 3)), draw.whole(1, 100), draw.whole(1, 20)};
    const Index width = s.latent_dim + s.rope_dim, first = n - s.n_new;
    const float scale = draw.sign() * 3 * draw.power(-1, 1.3) / std::sqrt(static_cast<float>(width));
    const Matrix<float> q = numbers<float>(s.n_new, s.heads * width, static_cast<std::uint64_t>(round));
    const Rows<TestType> rows(s, {n});
    Matrix<double> keys(n, width);
    keys << rows.latent.template cast<double>(), rows.rope.template cast<double>();
    const Expected expected =
        attention_by_formula(q, keys, Matrix<double>(rows.latent.template cast<double>()),
                             {.heads = {s.heads, 1}, .scale = scale, .first_position = first}, causally, unchanged);
    ExactRow row;
    row.scale = scale, row.keys = keys, row.values = rows.latent.template cast<double>(),
    row.positions = rows.positions;
    for (Index j = 0; j < n; ++j)
      row.value_scales.push_back(qkv::has_row_scale<TestType> ? rows.scales[static_cast<std::size_t>(j)] : 1);
    for (const Arithmetic in : arithmetics) {
      const Matrix<float> out = absorbed(s, rows, q, scale, first, qkv::causal, in);
      NarrowErrors errors = narrow_errors<TestType>(in, s.latent_dim, qkv::kernel::absorbed::block_rows<true>);
      errors.rope_dim = s.rope_dim;
      errors.rope_relative =
          errors.query_step > 0 && qkv::kernel::Isa::bf16_products ? 2.02 * of_bfloat16 : errors.query_relative;
      double squares = 0, typical = 0;
      for (Index h = 0; h < s.heads; ++h)
        for (Index i = 0; i < s.n_new; ++i) {
          row.q.assign(&q(i, h * width), &q(i, h * width) + width);
          row.probabilities.clear(), row.seen.clear();
          for (Index j = 0; j < n; ++j) {
            row.probabilities.push_back(static_cast<double>(expected.probabilities(h * s.n_new + i, j)));
            row.seen.push_back(j <= first + i);
          }
          const ErrorBound bound = error_bound(errors, row);
          for (Index x = 0; x < s.latent_dim; ++x) {
            const long double right = expected.out(i, h * s.latent_dim + x);
            const auto error = static_cast<double>(std::abs(out(i, h * s.latent_dim + x) - right));
            CAPTURE(round, s.heads, s.latent_dim, int(in), scale, i, h, x);
            REQUIRE(error <= bound.worst[static_cast<std::size_t>(x)]);
            squares += error * error, typical += std::pow(bound.typical[static_cast<std::size_t>(x)], 2);
          }
        }
      CAPTURE(round, s.heads, s.latent_dim, int(in), scale);
      CHECK(squares <= 9 * typical);  // of few outputs, whose errors are related
      mean += squares / typical / rounds(32);
    }
  }
  CHECK(mean <= 3 * 0.5);  // arithmetics
}

TEST_CASE("int8 latents and rope keys near the end of float reach who sees them, in their size, and nobody else",
          "[absorbed]") {
  Draw draw(22);
  for (int round = 0; round < rounds(40); ++round) {
    const Index n = draw.whole(4, round % 5 == 0 ? 420 : 40), bad = draw.whole(0, n - 1);
    const Sizes s{some_heads(draw), draw.whole(1, 4), draw.whole(1, 40), draw.whole(1, 9)};
    const Index width = s.latent_dim + s.rope_dim, first = n - s.n_new;
    Matrix<float> q = numbers<float>(s.n_new, s.heads * width, static_cast<std::uint64_t>(round)) *
                      (0.9F / static_cast<float>(s.latent_dim));  // Σ|q·c| stays below FLT_MAX
    for (Index x = 0; x < q.cols(); ++x)
      if (x % width >= s.latent_dim) q.col(x).setConstant(0);
    Rows<std::int8_t> rows(s, {n});
    const Condition sees = [&](const At& at) { return causally(at) && (at.key != bad || at.query % 2 == 1); };
    Matrix<float> before[3];
    for (const Arithmetic in : arithmetics) before[int(in)] = absorbed(s, rows, q, 2e-38F, first, sees, in);
    // A latent: its scores are small, since the scale is. Its rope key: 0 times it is 0.
    rows.scales[static_cast<std::size_t>(bad)] = draw.one_of({3.4e38F, 3.3895e38F, 3.39e38F, 3e38F}) / 127;
    const_cast<float*>(rows.all.rope(rows.all.runs[0], bad))[s.rope_dim - 1] = draw.sign() * 3.4e38F;
    qkv::load_row(rows.latent_of(bad), s.latent_dim, rows.scales[static_cast<std::size_t>(bad)],
                  rows.latent.row(bad).data());
    rows.rope.setZero();
    const Wide expected = formula(s, rows, q, 2e-38F, first, sees);
    for (const Arithmetic in : arithmetics) {
      const auto after = absorbed(s, rows, q, 2e-38F, first, sees, in);
      for (Index i = 0; i < s.n_new; ++i) {
        CAPTURE(round, s.heads, s.latent_dim, int(in), bad, i);
        if (sees(At{0, 0, i, bad, first + i, bad}))
          REQUIRE(max_error(after.row(i) / 3.4e38F, expected.row(i) / 3.4e38L) <= 0.03);
        else
          REQUIRE(same_bits(Matrix<float>(after.row(i)), Matrix<float>(before[int(in)].row(i))));
      }
    }
  }
}

TEMPLATE_TEST_CASE("no rounding mode makes more of a weight of the absorbed kernel than its type holds", "[absorbed]",
                   qkv::bfloat16, std::int8_t) {
  const Sizes s{8, 2, 40, 6};
  const Rows<TestType> rows(s, {203});
  for (const float size : {0.0F, 1.0F})
    for (const Arithmetic in : arithmetics) {
      const auto run = [&] {
        return absorbed(s, rows, Matrix<float>(numbers<float>(2, 8 * 46, 23) * size), 0.5F, 201, qkv::causal, in);
      };
      const Matrix<float> nearest = run();
      for (const int mode : {FE_UPWARD, FE_DOWNWARD, FE_TOWARDZERO}) {
        REQUIRE(std::fesetround(mode) == 0);
        const Matrix<float> out = run();
        std::fesetround(FE_TONEAREST);
        CAPTURE(size, int(in), mode);
        CHECK((out - nearest).norm() <= 0.05F * nearest.norm());
      }
    }
}

TEMPLATE_TEST_CASE("a latent row that is not finite reaches who sees it and nobody else", "[absorbed]", float,
                   qkv::bfloat16, std::int8_t) {
  for (const bool paged : {false, true})
    for (const Index bad : {0, 95, 300, 301, 396}) {
      const Sizes s{paged ? Index(8) : Index(16), 6, 32, 4};
      const Matrix<float> q = numbers<float>(6, s.heads * 36, 10);
      const Arithmetic in = bad % 2 == 0 ? Arithmetic::automatic : Arithmetic::int8;
      Rows<TestType> rows(s, paged ? std::vector<Index>{33, 64, 299 - 97, 101} : std::vector<Index>{400});
      const Condition sees = [&](const At& at) { return causally(at) && (at.key != bad || at.query % 2 == 1); };
      const auto before = absorbed(s, rows, q, 0.4F, 394, sees, in);
      if constexpr (qkv::has_row_scale<TestType>)
        for (std::size_t slot = 0, row = 0, r = 0; r < rows.runs.size(); ++r, ++slot)
          for (Index i = 0; i < rows.runs[r].rows; ++i, ++slot, ++row) {
            if (static_cast<Index>(row) == bad) rows.scales[slot] = NAN;
          }
      else
        rows.latent_of(bad)[11] = TestType(NAN);
      const auto after = absorbed(s, rows, q, 0.4F, 394, sees, in);
      for (Index i = 0; i < 6; ++i) {
        CAPTURE(paged, bad, i);
        if (i % 2 == 0 || bad > 394 + i)
          CHECK(same_bits(after.row(i), before.row(i)));
        else
          CHECK(after.row(i).array().isNaN().any());
      }
    }
}

TEST_CASE("scores of the absorbed kernel may be huge", "[absorbed]") {
  const Sizes s{16, 1, 32, 4};
  const Rows<float> rows(s, {700});
  const Matrix<float> q = numbers<float>(1, 16 * 36, 11) * 1e4F;
  CHECK(max_error(absorbed(s, rows, q, 1.0F, 699), formula(s, rows, q, 1.0F, 699, causally)) <= 1e-2);
}

TEST_CASE("int8 latents may be of any size, or zeros", "[absorbed]") {
  for (const Index dim : {37, 700}) {  // of 700 features in int16, queries are rounded to fewer steps
    const Sizes s{5, 3, dim, 6};
    const Matrix<float> q = numbers<float>(3, 5 * (dim + 6), 12);
    Rows<std::int8_t> rows(s, {203});
    for (Index i = 0; i < 203; ++i) {
      const float factor = i % 5 == 1 ? 0.0F : i % 7 == 2 ? 1e-30F : i % 11 == 3 ? 3.0F : i < 100 ? 1.0F : 1e-4F;
      rows.scales[static_cast<std::size_t>(i)] *= factor;
      rows.latent.row(i) *= static_cast<long double>(rows.scales[static_cast<std::size_t>(i)]) == 0 ? 0 : factor;
    }
    const Wide expected = formula(s, rows, q, 0.1F, 200, causally);
    // Without parts a score is one chain of 706 products, of which each rounds the sum so far: twice the error of two chains.
    const double exact = qkv::kernel::absorbed::parts_of<qkv::kernel::Exact<float>>(s.heads) > 1 ? 5e-6 : 1e-5;
    CHECK(max_error(absorbed(s, rows, q, 0.1F, 200), expected) <= exact);
    CHECK(max_error(absorbed(s, rows, q, 0.1F, 200, qkv::causal, Arithmetic::automatic), expected) <= 3 * int8_error);
    // So small that steps of weights are near the end of what float can hold: nothing is left of them, but no NaN.
    for (Index i = 0; i < 203; ++i) rows.scales[static_cast<std::size_t>(i)] = i % 2 == 0 ? 1e-40F : 0.0F;
    const auto vanished = absorbed(s, rows, q, 0.1F, 200, qkv::causal, Arithmetic::automatic);
    CHECK(vanished.cwiseAbs().maxCoeff() <= 1e-36F);
  }
}

TEST_CASE("the largest numbers of queries and int8 latents do not leave 32 bits", "[absorbed]") {
  for (const Index dim : {512, 600, 1500}) {
    const Sizes s{3, 1, dim, 2};
    Rows<std::int8_t> rows(s, {99});
    for (Index i = 0; i < 99; ++i)
      for (Index x = 0; x < dim; ++x) {
        const int sign = i % 2 == 0 ? 1 : -1;
        rows.latent_of(i)[x] = static_cast<std::int8_t>(127 * sign);
        rows.latent(i, x) = static_cast<long double>(rows.scales[static_cast<std::size_t>(i)]) * 127 * sign;
      }
    const Matrix<float> q = Matrix<float>::Constant(1, 3 * (dim + 2), 0.01F);
    CHECK(max_error(absorbed(s, rows, q, 0.5F, 98, qkv::causal, Arithmetic::automatic),
                    formula(s, rows, q, 0.5F, 98, causally)) <= 3 * int8_error);
  }
}

TEST_CASE("a query or a rope key of int8 latents that is not finite reaches its own head, or who sees it",
          "[absorbed]") {
  const Sizes s{9, 4, 40, 6};
  Matrix<float> q = numbers<float>(4, 9 * 46, 13);
  Rows<std::int8_t> rows(s, {150, 33});
  const Condition sees = [](const At& at) { return causally(at) && (at.key != 97 || at.query % 2 == 1); };
  const auto run = [&] { return absorbed(s, rows, q, 0.3F, 179, sees, Arithmetic::automatic); };
  const auto before = run();
  q(2, 5 * 46 + 7) = NAN;
  auto after = run();
  for (Index i = 0; i < 4; ++i)
    for (Index h = 0; h < 9; ++h) {
      const Matrix<float> head = after.row(i).segment(h * 40, 40);
      if (i == 2 && h == 5)
        CHECK(head.array().isNaN().all());
      else
        CHECK(same_bits(head, Matrix<float>(before.row(i).segment(h * 40, 40))));
    }
  q(2, 5 * 46 + 7) = 0;
  const auto plain = run();
  const_cast<float*>(rows.runs[0].rope)[97 * rows.all.rope_row_stride + 3] = NAN;
  after = run();
  for (Index i = 0; i < 4; ++i)
    if (i % 2 == 0)
      CHECK(same_bits(after.row(i), plain.row(i)));
    else
      CHECK(after.row(i).array().isNaN().all());
}

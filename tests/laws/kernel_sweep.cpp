// laws/kernel_sweep.cpp — every kernel of attention is its formula for all numbers of heads, queries and features, in every
// storage and arithmetic, however rows are cut into runs.
#include <qkv/attention.hpp>
#include <qkv/kv_cache.hpp>

#include <functional>

#include "support/sweep.hpp"

using namespace support;
using namespace qkv;

namespace {

/// Groups from 1 to 16, queries from 1 to 70 and widths from 1 to 70 in turn (their periods have no common factor), or a
/// usual width.
struct AttentionSizes {
  Heads heads;
  Index queries, keys, head_dim, v_head_dim;

  AttentionSizes(Draw& draw, std::uint64_t seed) {
    const auto turn = [&](std::uint64_t n) { return 1 + static_cast<Index>(seed % n); };
    const auto usual = [&] { return draw.one_of<Index>({64, 80, 96, 112, 128, 192, 256}); };
    const Index group = turn(17) % 17 == 0 ? draw.from(1, 3) : turn(17);
    heads.kv_heads = group > 4 ? draw.from(1, 2) : draw.from(1, 5);
    heads.heads = heads.kv_heads * group;
    head_dim = draw.one_in(6) ? usual() : turn(71) % 71 + 1;
    v_head_dim = draw.one_in(6) ? usual() : draw.from(1, 70);
    queries = draw.one_in(2) ? turn(73) % 73 + 1 : draw.from(1, 9);
    keys = draw.one_in(10) ? draw.from(150, 600) : draw.from(1, 80);
    constexpr Index most = 600'000;  // a case of many of everything would take the time of hundreds
    const Index work = heads.heads * queries * (head_dim + v_head_dim);
    keys = std::min(keys, 1 + most / work);
  }
};

/// Pieces of what a cache holds.
template <class S>
struct CutKeys {
  KeyRows<S> rows;
  std::vector<KeyRun<S>> runs;

  CutKeys(const KeyRows<S>& all, const Pieces& pieces) : rows(all) {
    const KeyRun<S>& whole = all.runs[0];
    Index row = 0;
    for (std::size_t i = 0; i < pieces.rows.size(); row += pieces.rows[i], ++i) {
      KeyRun<S> run{pieces.rows[i], pieces.position[i], all.key(whole, 0, row), all.value(whole, 0, row)};
      if constexpr (has_row_scale<S>)
        run.key_scales = whole.key_scales + row, run.value_scales = whole.value_scales + row;
      runs.push_back(run);
    }
  }
  KeyRows<S> key_rows() const {
    KeyRows<S> cut = rows;
    cut.runs = runs;
    return cut;
  }
};

/// Two keys, one of which has all the weight, though the scores are as large as float holds them: q·k = ±2^most, and q
/// times what it is of that. Features beside the one that counts are zeros.
template <class S>
void check_largest_scores(int most) {
  for (int exponent = 0; exponent <= most; ++exponent)
    for (const double sign : {1.0, -1.0})
      for (const Heads heads : {Heads{1, 1}, Heads{3, 1}})
        for (const Arithmetic arithmetic : {Arithmetic::automatic, Arithmetic::exact, Arithmetic::int8}) {
          const double k = std::ldexp(1, std::is_same_v<S, half> ? 3 : exponent), q = std::ldexp(sign, most) / k;
          const Index d = exponent % 2 == 0 ? 1 : 7;
          Matrix<float> queries = Matrix<float>::Zero(2, heads.heads * d), keys = Matrix<float>::Zero(2, d),
                        values(2, 1);
          for (Index h = 0; h < heads.heads; ++h) queries.col(h * d + d / 2).setConstant(static_cast<float>(q));
          keys.col(d / 2) << static_cast<float>(k), static_cast<float>(exponent % 3 == 0 ? -k : k / 2);
          values << 5, 7;
          KvCache<S> cache({.head_dim = d, .v_head_dim = 1, .capacity = 2});
          cache.append(keys, values);
          const double expected = sign > 0 ? 5 : 7;
          for (const Kernel kernel : {Kernel::reference, Kernel::tiled, Kernel::decode}) {
            CAPTURE(storage_name<S>, name(kernel), q, k, heads.heads, d, static_cast<int>(arithmetic));
            const Options<float> options{.scale = 1, .first_position = 0, .kernel = kernel, .arithmetic = arithmetic};
            const auto out = attention(queries, cache, heads, SweepMask{}, plain, options);
            CHECK((out.array() - static_cast<float>(expected)).abs().maxCoeff() < 0.03F);
          }
        }
}

template <class T, class S, class F>
void check_attention(std::uint64_t cases, const std::function<F(Draw&, const std::vector<T>&)>& drawn_score) {
  sweep(cases, [&](Draw& draw, std::uint64_t seed, std::ostream& text) {
    const AttentionSizes s(draw, seed);
    const Index d = s.head_dim, dv = s.v_head_dim, heads = s.heads.heads, kv_heads = s.heads.kv_heads;
    const auto arithmetic = draw.one_of({Arithmetic::automatic, Arithmetic::exact, Arithmetic::int8});
    const SweepMask mask = SweepMask::drawn(draw);
    std::vector<T> slopes(static_cast<std::size_t>(heads)), sinks;
    for (T& slope : slopes) slope = static_cast<T>(draw.from(0, 100)) / 1000;
    const F score = drawn_score(draw, slopes);

    const Magnitudes size = Magnitudes::drawn(draw, std::is_same_v<S, half>, false);
    KvCache<S> cache({.kv_heads = kv_heads, .head_dim = d, .v_head_dim = dv, .capacity = s.keys});
    const Matrix<T> q = numbers<T>(s.queries, heads * d, draw.next()) * static_cast<T>(size.q);
    cache.append(numbers<T>(s.keys, kv_heads * d, draw.next()) * static_cast<T>(size.k),
                 numbers<T>(s.keys, kv_heads * dv, draw.next()) * static_cast<T>(size.v));
    const Pieces pieces(draw, s.keys, false);
    const CutKeys<S> source(cache.key_rows(), pieces);
    const Index first = pieces.positions.back() + 1 - (draw.one_in(3) ? draw.from(0, 90) : s.queries);

    const double given = draw.one_of({0.0, 0.3, -0.2, 1.0}),
                 scale = (given != 0 ? given : 1 / std::sqrt(static_cast<double>(d))) / (size.q * size.k);
    Options<T> options{.first_position = first, .arithmetic = arithmetic};
    if (given != 0 || size.q * size.k != 1) options.scale = scale;
    if (draw.one_in(4)) {
      for (Index h = 0; h < heads; ++h) sinks.push_back(static_cast<T>(draw.from(-20, 20)) / 10);
      options.sinks = sinks;
    }
    text << storage_name<S> << ", heads " << heads << "/" << kv_heads << ", " << s.queries << " queries, " << s.keys
         << " keys in " << source.runs.size() << " runs, dims " << d << "/" << dv << ", arithmetic "
         << static_cast<int>(arithmetic) << ", scale " << scale << ", q " << size.q << ", k " << size.k << ", v "
         << size.v << ", first position " << first << ", holes " << mask.holes << ", sinks " << sinks.size();

    const Matrix<double> queries = q.template cast<double>(), keys = cache.template keys<double>(),
                         values = cache.template values<double>();
    Matrix<double> expected(s.queries, heads * dv), log_sum_exp(s.queries, heads);
    std::vector<OneQuery> all;
    for (Index i = 0; i < s.queries; ++i)
      for (Index h = 0; h < heads; ++h) {
        const auto at = [&](Index j) {
          return At{0, h, i, j, first + i, pieces.positions[static_cast<std::size_t>(j)]};
        };
        OneQuery one{&queries(i, h * d), d, scale};
        one.run(
            &keys(0, s.heads.kv_head(h) * d), keys.cols(), &values(0, s.heads.kv_head(h) * dv), values.cols(), dv,
            s.keys, sinks.empty() ? -INFINITY : static_cast<double>(sinks[static_cast<std::size_t>(h)]),
            [&](double x, Index j) { return score(x, at(j)); }, [&](Index j) { return mask.sees(at(j)); },
            &expected(i, h * dv));
        all.push_back(one);
      }

    double worst = 0;
    const Index group = s.heads.group_size();
    for (const Kernel kernel : {Kernel::tiled, Kernel::decode, Kernel::reference}) {
      if (kernel == Kernel::reference && seed % 8 != 0) continue;
      Matrix<T> sums;
      options.kernel = kernel, options.log_sum_exp = &sums;
      const Matrix<T> out = attention(q, source, s.heads, mask, score, options);
      const Rounding rounding = kernel == Kernel::tiled    ? tiled_rounding<T, S>(arithmetic, d)
                                : kernel == Kernel::decode ? decode_rounding<T, S>(arithmetic, group, d)
                                                           : Rounding{};
      double of_kernel = 0;
      for (Index i = 0; i < s.queries; ++i)
        for (Index h = 0; h < heads; ++h) {
          const OneQuery& one = all[static_cast<std::size_t>(i * heads + h)];
          of_kernel = std::max(of_kernel, part_of(static_cast<double>(sums(i, h)), one.log_sum_exp,
                                                  one.log_error(rounding, half_ulp<T>)));
          for (Index x = h * dv; x < (h + 1) * dv; ++x)
            of_kernel = std::max(
                of_kernel, part_of(static_cast<double>(out(i, x)), expected(i, x), one.error(rounding, half_ulp<T>)));
        }
      text << "; " << name(kernel) << " " << of_kernel;
      worst = std::max(worst, of_kernel);
    }
    return worst;
  });
}

}  // namespace

TEST_CASE("tiled and decode are their formula for all heads, queries and features", "[sweep]") {
  SECTION("float") { check_attention<float, float, Plain>(700, no_score<float>); }
  SECTION("half") { check_attention<float, half, Plain>(500, no_score<float>); }
  SECTION("bfloat16") { check_attention<float, bfloat16, Plain>(700, no_score<float>); }
  SECTION("int8") { check_attention<float, std::int8_t, Plain>(700, no_score<float>); }
  SECTION("double") { check_attention<double, double, Plain>(500, no_score<double>); }
  SECTION("float, with a score") { check_attention<float, float, Capped>(500, capped); }
  SECTION("int8, with a score") { check_attention<float, std::int8_t, Capped>(500, capped); }
}

TEST_CASE("bits of a prompt in pieces stay where distances are no longer whole numbers of float", "[sweep]") {
  const Heads heads{2, 1};
  const Index n = 75, keys = 210, d = 6;
  const Matrix<float> q = numbers<float>(n, 2 * d, 1), k = numbers<float>(keys, d, 2), v = numbers<float>(keys, 3, 3);
  KvCache<float> cache({.head_dim = d, .v_head_dim = 3, .capacity = keys});
  cache.append(k, v);
  const std::vector<float> slopes = {0x1p-9F, 0x1p-17F};
  const Capped score = then(soft_cap(30), alibi(std::span<const float>(slopes)));
  for (const Index first :
       {(Index{1} << 24) - 40, (Index{1} << 24) + 171, (Index{1} << 25) + 31, (Index{1} << 33) + 12345})
    for (const Kernel kernel : {Kernel::tiled, Kernel::decode}) {
      const SweepMask mask{.holes = 5};
      const auto run = [&](Index at, Index count) {
        const Options<float> options{.first_position = first + at, .kernel = kernel};
        const Matrix<float> rows = q.middleRows(at, count);
        return attention(rows, cache, heads, mask, score, options);
      };
      const Matrix<float> whole = run(0, n);
      for (const Index size : {1, 3, 16, 33})
        for (Index at = 0; at < n; at += size) {
          CAPTURE(name(kernel), first, size, at);
          const Index count = std::min(size, n - at);
          CHECK(same_bits(run(at, count), Matrix<float>(whole.middleRows(at, count))));
        }
    }
}

TEST_CASE("scores as large as float holds them leave the weight where it belongs", "[sweep]") {
  check_largest_scores<float>(126);
  check_largest_scores<half>(126);
  check_largest_scores<bfloat16>(126);
  check_largest_scores<std::int8_t>(126);
}

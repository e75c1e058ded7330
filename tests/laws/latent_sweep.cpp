// laws/latent_sweep.cpp — absorbed latent attention is its formula for every number of heads and tokens, in every storage
// and arithmetic, however rows are cut into runs and lanes into groups.
#include <qkv/call/latent_forms.hpp>
#include <qkv/latent_cache.hpp>

#include <numeric>

#include "support/sweep.hpp"

using namespace support;
using namespace qkv;

namespace {

/// All heads from 1 to 40 in turn, with 1 to 8 tokens in turn or just past a group of lanes (of 64, or 128).
struct LatentSizes {
  Index heads, tokens, keys, latent_dim, rope_dim;

  LatentSizes(Draw& draw, std::uint64_t seed) {
    heads = 1 + static_cast<Index>(seed % 40);
    const Index turn = static_cast<Index>(seed / 40 % 14);
    tokens = turn < 8 ? turn + 1 : turn < 12 ? 64 * draw.from(1, 3) / heads + 1 : draw.from(1, 200 / heads + 8);
    keys = draw.one_in(8) ? draw.from(150, 500) : draw.from(1, 70);
    latent_dim = draw.one_in(4) ? draw.one_of<Index>({32, 64, 128}) : draw.from(1, 70);
    rope_dim = draw.from(1, 24);
  }
};

template <class T, class S, class F>
void check_absorbed(std::uint64_t cases, F (&drawn_score)(Draw&, const std::vector<T>&)) {
  sweep(cases, [&](Draw& draw, std::uint64_t seed, std::ostream& text) {
    const LatentSizes s(draw, seed);
    const Index width = s.latent_dim + s.rope_dim;
    const auto arithmetic = draw.one_of({Arithmetic::automatic, Arithmetic::exact, Arithmetic::int8});
    const SweepMask mask = SweepMask::drawn(draw);
    std::vector<T> slopes(static_cast<std::size_t>(s.heads));
    for (T& slope : slopes) slope = static_cast<T>(draw.from(0, 100)) / 1000;
    const F score = drawn_score(draw, slopes);
    const Magnitudes size = Magnitudes::drawn(draw, std::is_same_v<S, half>, true);
    const T scale =
        static_cast<T>(draw.one_of({1 / std::sqrt(static_cast<double>(width)), 0.3, -0.2, 1.0}) / (size.q * size.k));

    LatentCache<S> cache({.latent_dim = s.latent_dim, .rope_dim = s.rope_dim, .capacity = s.keys});
    cache.append(numbers<T>(s.keys, s.latent_dim, draw.next()) * static_cast<T>(size.k),
                 numbers<T>(s.keys, s.rope_dim, draw.next()) * static_cast<T>(size.k));
    const Matrix<T> q = numbers<T>(s.tokens, s.heads * width, draw.next()) * static_cast<T>(size.q);
    LatentRows<S> rows = cache.latent_rows();
    const Pieces pieces(draw, s.keys, true);
    std::vector<LatentRun<S>> runs;
    for (Index i = 0, row = 0; row < s.keys; row += pieces.rows[static_cast<std::size_t>(i)], ++i) {
      LatentRun<S> run = rows.runs[0];
      run.latent = rows.latent(rows.runs[0], row), run.rope = rows.rope(rows.runs[0], row);
      if constexpr (has_row_scale<S>) run.scales += row;
      run.rows = pieces.rows[static_cast<std::size_t>(i)], run.position = pieces.position[static_cast<std::size_t>(i)];
      runs.push_back(run);
    }
    rows.runs = runs;
    const Index first = pieces.positions.back() + 1 - (draw.one_in(3) ? draw.from(0, 90) : s.tokens);
    text << storage_name<S> << ", " << s.heads << " heads, " << s.tokens << " tokens, " << s.keys << " keys in "
         << runs.size() << " runs, latent_dim " << s.latent_dim << ", rope_dim " << s.rope_dim << ", arithmetic "
         << static_cast<int>(arithmetic) << ", scale " << scale << ", q " << size.q << ", k " << size.k << ", holes "
         << mask.holes;

    Workspace workspace;
    Matrix<T> out(s.tokens, s.heads * s.latent_dim), m(s.tokens, s.heads), l(s.tokens, s.heads);
    const kernel::StateView<T> state{m.data(), l.data(), writable_view(out), s.heads};
    const auto rule = detail::rule_of<T, T>(mask, score);
    const kernel::LatentTask<T, S> task{rows, s.heads, scale, 0, first, rule, Kernel::automatic, arithmetic};
    kernel::latent_absorbed(task, view(q), state, workspace, serial);

    const Matrix<double> queries = q.template cast<double>(), latent = cache.template latent<double>(),
                         rope = cache.template rope_keys<double>();
    Matrix<double> keys(s.keys, width);
    keys << latent, rope;
    const Rounding rounding = tiled_rounding<T, S>(arithmetic, s.latent_dim);
    Rounding all = rounding;  // the rope part of int8 latents is multiplied in bfloat16
    if (has_row_scale<S> && rounding.query_step > 1e-3) all.product = bf16_ulp;
    double worst = 0;
    std::vector<double> expected(static_cast<std::size_t>(s.latent_dim));
    for (Index i = 0; i < s.tokens; ++i)
      for (Index h = 0; h < s.heads; ++h) {
        OneQuery one{&queries(i, h * width), width, static_cast<double>(scale)};
        const auto at = [&](Index j) {
          return At{0, h, i, j, first + i, pieces.positions[static_cast<std::size_t>(j)]};
        };
        one.run(
            keys.data(), width, latent.data(), s.latent_dim, s.latent_dim, s.keys, -INFINITY,
            [&](double x, Index j) { return score(x, at(j)); }, [&](Index j) { return mask.sees(at(j)); },
            expected.data());
        const double maximum = static_cast<double>(m(i, h)), sum = static_cast<double>(l(i, h));
        worst = std::max(worst, part_of(maximum + std::log(sum), one.log_sum_exp, one.log_error(all, half_ulp<T>)));
        for (Index x = 0; x < s.latent_dim && sum != 0; ++x)
          worst = std::max(worst, part_of(static_cast<double>(out(i, h * s.latent_dim + x)) / sum,
                                          expected[static_cast<std::size_t>(x)], one.error(all, half_ulp<T>)));
      }
    return worst;
  });
}

}  // namespace

TEST_CASE("the absorbed kernel is its formula for all heads and tokens", "[sweep]") {
  SECTION("float") { check_absorbed<float, float>(1120, no_score<float>); }
  SECTION("half") { check_absorbed<float, half>(560, no_score<float>); }
  SECTION("bfloat16") { check_absorbed<float, bfloat16>(1120, no_score<float>); }
  SECTION("int8") { check_absorbed<float, std::int8_t>(1120, no_score<float>); }
  SECTION("double") { check_absorbed<double, double>(560, no_score<double>); }
  SECTION("float, with a score") { check_absorbed<float, float>(560, capped); }
  SECTION("int8, with a score") { check_absorbed<float, std::int8_t>(560, capped); }
}

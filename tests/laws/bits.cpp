// laws/bits.cpp — within one build the bits of a result depend on its inputs alone: not on the executor, not on how a
// prompt arrives, not on how a cache holds its rows.
#include <qkv/attention.hpp>

#include <unsupported/Eigen/CXX11/ThreadPool>

#include "support/attention_case.hpp"
#include "support/draw.hpp"
#include "support/executors.hpp"
#include "support/key_source.hpp"

using namespace support;
using namespace qkv;

namespace {

const Case prompt{.n_queries = 203, .n_keys = 340, .heads = {6, 2}, .head_dim = 21, .v_head_dim = 13};
const Case step{.n_queries = 3, .n_keys = 531, .heads = {7, 1}, .head_dim = 40, .v_head_dim = 24};

/// Output and log-sum-exp side by side.
template <class T, class... Operands>
Matrix<T> run(Options<T> options, const Operands&... operands) {
  Matrix<T> log_sum_exp;
  options.log_sum_exp = &log_sum_exp;
  const Matrix<T> out =
      std::apply([&](const auto&... first) { return attention(first..., options); }, std::tie(operands...));
  Matrix<T> both(out.rows(), out.cols() + log_sum_exp.cols());
  both << out, log_sum_exp;
  return both;
}

const auto odd = [](const At& at) { return at.key_position <= at.query_position && at.key_position % 5 != 2; };
const auto distance = [](auto s, const At& at) {
  return s - decltype(s)(0.125) * static_cast<decltype(s)>(at.query_position - at.key_position);
};

template <class T, class M, class F>
void check_pieces(const Case& c, const M& mask, const F& score) {
  const Inputs<T> in(c);
  const Index first = c.n_keys - c.n_queries;
  for (const Kernel kernel : kernels) {
    const Matrix<T> whole = run<T>({.kernel = kernel}, in.q, in.k, in.v, c.heads, mask, score);
    for (const std::vector<Index>& sizes : {std::vector<Index>{1}, {64}, {2, 65, 1, 17}, {100, 3}}) {
      if (kernel == Kernel::reference && sizes[0] == 1) continue;  // slow, and rows are computed one by one anyway
      for (Index at = 0, i = 0; at < c.n_queries; ++i) {
        const Index n = std::min(sizes[static_cast<std::size_t>(i) % sizes.size()], c.n_queries - at);
        const Matrix<T> q = in.q.middleRows(at, n), expected = whole.middleRows(at, n);
        INFO("kernel " << name(kernel) << ", queries " << at << "+" << n);
        // All keys are there, the later ones masked; or only those that have been appended so far.
        REQUIRE(same_bits(run<T>({.first_position = first + at, .kernel = kernel}, q, in.k, in.v, c.heads, mask, score),
                          expected));
        const Index held = first + at + n;
        const Matrix<T> k = in.k.topRows(held), v = in.v.topRows(held);
        REQUIRE(same_bits(run<T>({.kernel = kernel}, q, k, v, c.heads, mask, score), expected));
        at += n;
      }
    }
  }
}

}  // namespace

TEST_CASE("a prompt in pieces gives the bits of the whole prompt", "[attention][bits]") {
  check_pieces<float>(prompt, causal, plain);
  check_pieces<double>(prompt, causal, plain);
  check_pieces<float>(prompt, odd, distance);
  check_pieces<float>(prompt, causal & window(70, infinite), plain);
}

TEST_CASE("a prompt in pieces gives the bits of the whole prompt where its keys are summed in sections",
          "[attention][bits]") {
  const Case across{.n_queries = 203, .n_keys = 9303, .heads = {2, 1}, .head_dim = 3, .v_head_dim = 5};
  static_assert(2 * kernel::section_keys > 9100 && 2 * kernel::section_keys < 9303);
  check_pieces<float>(across, causal, plain);
  // Queries that see the section before the border, the one after it, or both.
  check_pieces<float>(across, causal & window(40, infinite), plain);
}

namespace {

/// Keys 10 and 11, and for queries after the first those of the second section. Says what it hides in whole.
struct TwoSections {
  bool sees(const At& at) const {
    return at.key_position == 10 || at.key_position == 11 || (at.query > 0 && at.key_position >= kernel::section_keys);
  }
  Cover cover(const Block& b) const {
    const Index first = b.key_position, last = b.last_key_position();
    const bool early = first <= 11 && last >= 10, late = b.query + b.n_queries > 1 && last >= kernel::section_keys;
    return early || late ? Cover::some : Cover::none;
  }
};

}  // namespace

TEST_CASE("a section that a query does not see leaves the sign of its zeros", "[attention][bits]") {
  const Matrix<float> q = Matrix<float>::Ones(9, 1);
  Matrix<float> k = Matrix<float>::Zero(kernel::section_keys + 9, 1), v = k;
  k(11, 0) = -1, v(11, 0) = -std::numeric_limits<float>::denorm_min();  // times a weight below a half: -0
  const auto first_of = [&](Index n) {
    return run<float>({.kernel = Kernel::tiled}, Matrix<float>(q.topRows(n)), k, v, Heads{}, TwoSections{}, plain)
        .row(0)
        .eval();
  };
  // Without FMA the product is rounded before it is added, and 0 + -0 is 0.
  CHECK(std::signbit(first_of(1)(0)) == kernel::Simd<float>::fused);
  CHECK(same_bits(first_of(9), first_of(1)));
}

TEMPLATE_TEST_CASE("a prompt in pieces gives the bits of the whole prompt from every storage type", "[attention][bits]",
                   half, bfloat16, std::int8_t) {
  const Inputs<float> in(prompt);
  const Index first = prompt.n_keys - prompt.n_queries;
  const auto keys = [&](Index held, const std::vector<Index>& pages) {
    return PagedKeys<TestType>(Matrix<float>(in.k.topRows(held)), Matrix<float>(in.v.topRows(held)), 2,
                               consecutive_pages(held, pages));
  };
  for (const Kernel kernel : fast_kernels) {
    const Options<float> options{.kernel = kernel};
    const Matrix<float> whole = run(options, in.q, keys(prompt.n_keys, {64}), prompt.heads, causal, plain);
    for (Index at = 0, n = 1; at < prompt.n_queries; at += n, n = std::min(2 * n + 5, prompt.n_queries - at)) {
      INFO("kernel " << name(kernel) << ", queries " << at << "+" << n);
      const Matrix<float> q = in.q.middleRows(at, n);
      REQUIRE(same_bits(run(options, q, keys(first + at + n, {64, 3}), prompt.heads, causal, plain),
                        whole.middleRows(at, n)));
    }
  }
}

TEMPLATE_LIST_TEST_CASE("pieces of any length give the bits of the whole prompt, in every arithmetic",
                        "[attention][bits]", qkv::StorageTypes) {
  Draw random(8);
  const auto draw = [&](Index low, Index high) { return random.whole(low, high); };
  for (int round = 0; round < rounds(30); ++round) {
    const Case c{.n_queries = draw(2, round % 6 == 0 ? 300 : 60),
                 .n_keys = 0,
                 .heads = {2, 1},
                 .head_dim = draw(1, 40),
                 .v_head_dim = draw(1, 20)};
    const Index n = c.n_queries + (round % 2 == 0 ? 0 : draw(0, 250)), first = n - c.n_queries;
    Case sized = c;
    sized.n_keys = n;
    const Inputs<float> in(sized, static_cast<std::uint64_t>(round));
    const auto keys = [&](Index held) {
      return PagedKeys<TestType>(Matrix<float>(in.k.topRows(held)), Matrix<float>(in.v.topRows(held)), 1,
                                 consecutive_pages(held, {draw(1, 70), draw(1, 9)}));
    };
    const Window mask = window(round % 3 == 0 ? draw(0, n) : infinite, 0);
    std::vector<Index> ends;  // of pieces, mostly of one token
    for (Index at = 0; at < c.n_queries;)
      ends.push_back(at += std::min(draw(0, 2) > 0 ? 1 : draw(1, 40), c.n_queries - at));
    for (const Kernel kernel : fast_kernels)
      for (const Arithmetic arithmetic : {Arithmetic::automatic, Arithmetic::exact, Arithmetic::int8}) {
        const Options<float> options{.kernel = kernel, .arithmetic = arithmetic};
        const Matrix<float> whole = run(options, in.q, keys(n), c.heads, mask, plain);
        for (Index at = 0, i = 0; at < c.n_queries; at = ends[static_cast<std::size_t>(i++)]) {
          const Index some = ends[static_cast<std::size_t>(i)] - at;
          INFO("round " << round << ", kernel " << name(kernel) << ", arithmetic " << int(arithmetic) << ", queries "
                        << first + at << "+" << some);
          REQUIRE(same_bits(
              run(options, Matrix<float>(in.q.middleRows(at, some)), keys(first + at + some), c.heads, mask, plain),
              whole.middleRows(at, some)));
        }
      }
  }
}

TEST_CASE("tokens that come later never change a bit of earlier outputs", "[attention][bits]") {
  for (const Kernel kernel : kernels) {
    INFO("kernel " << name(kernel));
    Inputs<float> in(prompt);
    const Matrix<float> before = run<float>({.kernel = kernel}, in.q, in.k, in.v, prompt.heads, causal, plain);
    const Index first = prompt.n_keys - prompt.n_queries, changed = first + 90;
    in.k.bottomRows(prompt.n_keys - changed) *= 3.0F;
    in.v.bottomRows(prompt.n_keys - changed).setConstant(17);
    in.q.bottomRows(prompt.n_queries - 90) *= -2.0F;
    const Matrix<float> after = run<float>({.kernel = kernel}, in.q, in.k, in.v, prompt.heads, causal, plain);
    CHECK(same_bits(after.topRows(90), before.topRows(90)));
    CHECK((after.bottomRows(113).array() != before.bottomRows(113).array()).any());
  }
}

TEST_CASE("the same call gives the same bits again", "[attention][bits]") {
  const Inputs<float> in(prompt);
  Workspace workspace;
  for (const Kernel kernel : kernels) {
    const Options<float> options{.kernel = kernel, .workspace = &workspace};
    const Matrix<float> once = run(options, in.q, in.k, in.v, prompt.heads, causal, plain);
    CHECK(same_bits(run(options, in.q, in.k, in.v, prompt.heads, causal, plain), once));
  }
}

TEST_CASE("what lies in the scratch memory changes no bit", "[attention][bits]") {
  Workspace workspace;
  const auto fill = [&](int byte) {
    const std::size_t bytes = std::size_t{3} << 20;
    const auto a = workspace.lease(bytes), b = workspace.lease(bytes), c = workspace.lease(bytes);
    for (const auto* lease : {&a, &b, &c}) std::memset(lease->data(), byte, bytes);
  };
  std::vector<Case> cases = shapes();
  cases.push_back({.n_queries = 6, .n_keys = 9, .heads = {2, 1}, .head_dim = 0, .v_head_dim = 4});
  cases.push_back({.n_queries = 6, .n_keys = 9, .heads = {2, 1}, .head_dim = 4, .v_head_dim = 0});
  for (const Case& c : cases) {
    const Inputs<float> in(c);
    const PagedKeys<half> pages(in.k, in.v, c.heads.kv_heads, consecutive_pages(c.n_keys, {50, 3}));
    const PagedKeys<std::int8_t> quantised(in.k, in.v, c.heads.kv_heads, consecutive_pages(c.n_keys, {50, 3}));
    for (const Kernel kernel : kernels) {
      INFO("kernel " << name(kernel) << ", head_dim " << c.head_dim << ", " << c.n_queries << " queries");
      const Options<float> options{.first_position = c.first_position, .kernel = kernel, .workspace = &workspace};
      const auto both = [&](const auto&... keys) {
        fill(0);
        const Matrix<float> zeros = run(options, in.q, keys..., c.heads, causal, plain);
        fill(0xFF);  // NaN, as a number
        return same_bits(run(options, in.q, keys..., c.heads, causal, plain), zeros);
      };
      CHECK(both(in.k, in.v));
      CHECK(both(pages));
      CHECK(both(quantised));
    }
  }
}

TEST_CASE("rows give the same bits at any distance from each other", "[attention][bits]") {
  const Inputs<float> in(prompt);
  Matrix<float> wide = Matrix<float>::Constant(prompt.n_keys, 300, std::numeric_limits<float>::quiet_NaN());
  auto q = wide.block(5, 3, in.q.rows(), in.q.cols());
  auto k = wide.middleCols(150, in.k.cols());
  auto v = wide.middleCols(201, in.v.cols());
  q = in.q, k = in.k, v = in.v;
  for (const Kernel kernel : kernels)
    CHECK(same_bits(run<float>({.kernel = kernel}, q, k, v, prompt.heads, causal, plain),
                    run<float>({.kernel = kernel}, in.q, in.k, in.v, prompt.heads, causal, plain)));
}

TEST_CASE("every executor gives the bits of the serial one", "[attention][bits]") {
  Eigen::ThreadPool threads(3);
  const PoolExecutor pool(threads);
  for (const Case& c : {prompt, step})
    for (const Kernel kernel : kernels) {
      INFO("kernel " << name(kernel));
      const Inputs<float> in(c);
      Matrix<float> lse, expected_lse;
      const Matrix<float> expected =
          attention(in.q, in.k, in.v, c.heads, causal, plain, {.kernel = kernel, .log_sum_exp = &expected_lse});
      const auto check = [&](const auto& executor) {
        Workspace workspace;
        for (int again = 0; again < 3; ++again) {
          const Matrix<float> out =
              attention(in.q, in.k, in.v, c.heads, causal, plain,
                        {.kernel = kernel, .log_sum_exp = &lse, .workspace = &workspace}, executor);
          CHECK(same_bits(out, expected));
          CHECK(same_bits(lse, expected_lse));
        }
      };
      check(shuffled(1));
      check(threaded(3));
      check(pool);
      const auto state = attention_state(in.q, in.k, in.v, c.heads, causal, plain, {.kernel = kernel});
      const auto other = attention_state(in.q, in.k, in.v, c.heads, causal, plain, {.kernel = kernel}, pool);
      CHECK(same_bits(state.maximum, other.maximum));
      CHECK(same_bits(state.sum, other.sum));
      CHECK(same_bits(state.weighted, other.weighted));
    }
}

TEST_CASE("an exception of a mask reaches the caller from every executor, and the next call is as ever",
          "[attention][bits]") {
  Eigen::ThreadPool threads(2);
  const PoolExecutor pool(threads);
  const Inputs<float> in(prompt);
  const auto fails = [](const At& at) {
    if (at.query == 71 && at.key == 200) throw std::runtime_error("from the mask");
    return true;
  };
  Workspace workspace;
  for (const Kernel kernel : kernels) {
    const Options<float> options{.kernel = kernel, .workspace = &workspace};
    const auto said = [&](const auto& executor) {
      return message_of<std::runtime_error>(
          [&] { attention(in.q, in.k, in.v, prompt.heads, fails, plain, options, executor); });
    };
    CHECK(said(serial) == "from the mask");
    CHECK(said(threaded(2)) == "from the mask");
    CHECK(said(pool) == "from the mask");
    CHECK(same_bits(run(options, in.q, in.k, in.v, prompt.heads, causal, plain),
                    run<float>({.kernel = kernel}, in.q, in.k, in.v, prompt.heads, causal, plain)));
  }
}

TEST_CASE("keys that are split among threads give the bits of one thread, from whatever runs", "[attention][bits]") {
  const Case c{.n_queries = 3, .n_keys = 5003, .heads = {6, 2}, .head_dim = 21, .v_head_dim = 13};  // three splits
  const Inputs<float> in(c);
  const Options<float> options{.kernel = Kernel::decode};
  const Matrix<float> whole = run<float>(options, in.q, in.k, in.v, c.heads, causal, plain);
  CHECK(max_error(whole, run<float>({.kernel = Kernel::reference}, in.q, in.k, in.v, c.heads, causal, plain)) <= 4e-6);
  Eigen::ThreadPool threads(3);
  const PoolExecutor pool(threads);
  const auto split = [&](const auto& executor, const auto&... keys) {
    Matrix<float> lse;
    Options<float> with_lse = options;
    with_lse.log_sum_exp = &lse;
    const Matrix<float> out = attention(in.q, keys..., c.heads, causal, plain, with_lse, executor);
    return same_bits(out, whole.leftCols(out.cols())) && same_bits(lse, whole.rightCols(lse.cols()));
  };
  const PagedKeys<float> pages(in.k, in.v, 2, consecutive_pages(c.n_keys, {64, 3, 2048}));
  CHECK(split(serial, pages));
  CHECK(split(pool, pages));
  CHECK(split(pool, in.k, in.v));
  CHECK(split(shuffled(1), in.k, in.v));
  CHECK(split(threaded(2), in.k, in.v));
  const Matrix<float> last = in.q.bottomRows(1);
  CHECK(same_bits(run<float>(options, last, in.k, in.v, c.heads, causal, plain), whole.bottomRows(1)));
}

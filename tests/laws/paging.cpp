// laws/paging.cpp — however a cache holds its rows, attention sees the same keys: paged = contiguous to the last bit.
#include <qkv/attention.hpp>

#include "support/attention_case.hpp"
#include "support/key_source.hpp"

using namespace support;
using namespace qkv;

namespace {

const Case prompt{.n_queries = 71, .n_keys = 401, .heads = {6, 2}, .head_dim = 21, .v_head_dim = 13};
const Case step{.n_queries = 2, .n_keys = 531, .heads = {7, 1}, .head_dim = 40, .v_head_dim = 24};

const std::vector<std::vector<Index>> page_sizes = {{1000}, {16}, {1}, {100, 3, 1, 57}, {128}, {0, 30, 0, 0, 7}};

template <class S, class T, class M>
void check_paged(const Case& c, const M& mask, Arithmetic arithmetic = Arithmetic::automatic) {
  const Inputs<T> in(c);
  for (const Kernel kernel : kernels) {
    Matrix<T> lse, expected_lse;
    const PagedKeys<S> whole(in.k, in.v, c.heads.kv_heads, {{c.n_keys, 0}});
    const Matrix<T> expected = attention(in.q, whole, c.heads, mask, plain,
                                         {.kernel = kernel, .arithmetic = arithmetic, .log_sum_exp = &expected_lse});
    for (const auto& sizes : page_sizes) {
      INFO("kernel " << name(kernel) << ", pages of " << sizes[0] << " …");
      const PagedKeys<S> paged(in.k, in.v, c.heads.kv_heads, consecutive_pages(c.n_keys, sizes));
      CHECK(same_bits(attention(in.q, paged, c.heads, mask, plain,
                                {.kernel = kernel, .arithmetic = arithmetic, .log_sum_exp = &lse}),
                      expected));
      CHECK(same_bits(lse, expected_lse));
    }
    if constexpr (std::is_same_v<S, T>)  // and all of them equal the plain matrices
      CHECK(same_bits(attention(in.q, in.k, in.v, c.heads, mask, plain, {.kernel = kernel}), expected));
  }
}

}  // namespace

static_assert(KeySource<PagedKeys<float>> && !KeySource<Matrix<float>> && !KeySource<Window>);

TEST_CASE("pages in any order and of any size give the bits of contiguous rows", "[attention][bits]") {
  for (const Case& c : {prompt, step}) {
    check_paged<float, float>(c, causal);
    check_paged<double, double>(c, causal);
    check_paged<float, float>(
        c, window(150, 0) & [](const At& at) { return at.key % 4 != 1; });
  }
  check_paged<float, float>({.n_queries = 19, .n_keys = 5003, .heads = {2, 1}, .head_dim = 5, .v_head_dim = 3}, causal);
}

TEST_CASE("rows of every storage type give the same bits in pages", "[attention][bits]") {
  for (const Case& c : {prompt, step}) {
    for (const Arithmetic arithmetic : {Arithmetic::automatic, Arithmetic::exact, Arithmetic::int8}) {
      check_paged<half, float>(c, causal, arithmetic);
      check_paged<bfloat16, float>(c, causal, arithmetic);
      check_paged<std::int8_t, float>(c, causal, arithmetic);
    }
  }
}

TEST_CASE("rows keep their positions where a cache has forgotten what was between", "[attention]") {
  // Four pinned first tokens, then a window that begins at 96: what masks and scores ask for are positions, and rows
  // where they ask for rows.
  const std::vector<Page> pages = {{4, 0}, {32, 96}, {70, 128}, {1, 198}, {55, 260}};
  std::vector<Index> positions;
  for (const Page& page : pages)
    for (Index i = 0; i < page.rows; ++i) positions.push_back(page.position + i);
  for (const Index n : {3, 67}) {
    const Case c{.n_queries = n, .n_keys = 162, .heads = {4, 2}, .head_dim = 9, .v_head_dim = 5};
    const Inputs<double> in(c);
    const PagedKeys<double> cache(in.k, in.v, c.heads.kv_heads, pages);
    const auto distance = [](auto s, const At& at) {
      return s - static_cast<decltype(s)>(at.query_position - at.key_position) / 64;
    };
    const auto mask = (prefix(4) | window(90, 0)) & [](const At& at) { return at.key != 7; };
    const Expected expected = attention_by_formula(
        in.q, in.k, in.v, {.heads = c.heads, .first_position = 315 - n, .key_positions = positions},
        [](const At& at) {
          const Index back = at.query_position - at.key_position;
          return at.key != 7 && (at.key_position < 4 || (back >= 0 && back <= 90));
        },
        distance);
    for (const Kernel kernel : kernels) {
      INFO("kernel " << name(kernel) << ", " << n << " queries");
      Matrix<double> lse;
      const Options<double> options{.kernel = kernel, .log_sum_exp = &lse};  // the queries are the last: up to 314
      CHECK(max_error(attention(in.q, cache, c.heads, mask, distance, options), expected.out) <= tolerance<double>);
      CHECK(max_error(lse, expected.log_sum_exp) <= 10 * tolerance<double>);
    }
    CHECK(max_error(attention_weights(in.q, cache, c.heads, mask, distance), expected.probabilities) <=
          tolerance<double>);
    // Where all is seen the kernels ask nothing of single keys: the gaps are not keys even so.
    const Expected all = attention_by_formula(in.q, in.k, in.v, {.heads = c.heads}, everyone, unchanged);
    for (const Kernel kernel : kernels) {
      INFO("kernel " << name(kernel) << ", " << n << " queries");
      CHECK(max_error(attention(in.q, cache, c.heads, full, plain, {.kernel = kernel}), all.out) <= tolerance<double>);
    }
  }
}

TEST_CASE("a cache that holds nothing gives zeros", "[attention]") {
  const Matrix<float> none(0, 6), q = normals<float>(5, 12, 1);
  for (const Kernel kernel : kernels) {
    const PagedKeys<float> empty(none, none, 2, {}), empty_page(none, none, 2, {{0, 0}});
    CHECK(attention(q, empty, {4, 2}, causal, plain, {.kernel = kernel}) == Matrix<float>::Zero(5, 12));
    CHECK(attention(q, empty_page, {4, 2}, causal, plain, {.kernel = kernel}) == Matrix<float>::Zero(5, 12));
  }
}

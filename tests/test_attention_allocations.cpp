#include "support/allocations.hpp"

#include <qkv/attention.hpp>

#include "support/attention_case.hpp"
#include "support/key_source.hpp"

// Counted: every form of operator new, and with glibc malloc, calloc, realloc and aligned_alloc, which Eigen uses.

using namespace support;
using namespace qkv;

namespace {

const Case prompt{.n_queries = 203, .n_keys = 340, .heads = {6, 2}, .head_dim = 21, .v_head_dim = 13};
const Case step{.n_queries = 2, .n_keys = 531, .heads = {7, 1}, .head_dim = 40, .v_head_dim = 24};

}  // namespace

TEST_CASE("the counter counts what C++ and Eigen allocate", "[attention][allocation]") {
  CHECK(allocations_of([] { ::operator delete(::operator new(1)); }).count > 0);  // a new-expression may be elided
#ifdef QKV_TEST_COUNTS_MALLOC
  CHECK(allocations_of([] { Matrix<float>(3, 5).setZero(); }).count > 0);
#endif
}

TEST_CASE("attention_into allocates nothing once its workspace is warm", "[attention][allocation]") {
  for (const Case& c : {prompt, step})
    for (const Kernel kernel : kernels) {
      INFO("kernel " << name(kernel) << ", " << c.n_queries << " queries");
      const Inputs<float> in(c);
      const PagedKeys<half> cache(in.k, in.v, c.heads.kv_heads, consecutive_pages(c.n_keys, {100, 3}));
      const std::vector<float> sinks(static_cast<std::size_t>(c.heads.heads), 0.5F);
      const std::vector<Index> q_rows = {0, 1, c.n_queries}, k_rows = {0, 30, c.n_keys};
      Workspace workspace;
      Matrix<float> out(c.n_queries, c.heads.heads * c.v_head_dim), log_sum_exp;
      const Options<float> options{
          .sinks = sinks, .kernel = kernel, .log_sum_exp = &log_sum_exp, .workspace = &workspace};
      Options<float> batch = options;
      batch.query_offsets = q_rows, batch.key_offsets = k_rows;
      const auto calls = [&] {
        attention_into(out, in.q, in.k, in.v, c.heads, causal & window(90, 0), soft_cap(30), options);
        attention_into(out, in.q, in.k, in.v, c.heads, causal, plain, batch);
        attention_into(out, in.q, cache, c.heads, causal, plain, options);
      };
      calls();  // warm-up
      CHECK(allocations_of(calls).count == 0);
    }
}

TEST_CASE("a call without a workspace gives back what it takes", "[attention][allocation]") {
  const Inputs<float> in(prompt);
  Matrix<float> out(prompt.n_queries, 6 * prompt.v_head_dim);
  for (const Kernel kernel : kernels) {
    const auto taken =
        allocations_of([&] { attention_into(out, in.q, in.k, in.v, prompt.heads, causal, plain, {.kernel = kernel}); });
    CHECK(taken.count > 0);
    CHECK(taken.new_bytes == 0);
  }
}

TEMPLATE_TEST_CASE("required_bytes is what a fresh workspace holds after the call", "[attention][allocation]", float,
                   double) {
  for (const Case& c : {prompt, step})
    for (const Kernel kernel : {Kernel::automatic, Kernel::reference, Kernel::tiled, Kernel::decode}) {
      INFO("kernel " << name(kernel) << ", " << c.n_queries << " queries");
      const Inputs<TestType> in(c);
      Workspace workspace;
      attention(in.q, in.k, in.v, c.heads, causal, plain, {.kernel = kernel, .workspace = &workspace});
      CHECK(workspace.bytes() ==
            required_bytes<TestType>(kernel, c.n_queries, c.n_keys, c.heads, c.head_dim, c.v_head_dim));
    }
}

#include <qkv/attention.hpp>
#include <qkv/kv_cache.hpp>

#include "support/attention_case.hpp"
#include "support/key_source.hpp"

// Errors state the rule, and come before the first write.

using namespace support;
using namespace qkv;

namespace {

constexpr Index n = 3, n_keys = 5;
const Matrix<float> q = normals<float>(n, 8, 1), k = normals<float>(n_keys, 4, 2), v = normals<float>(n_keys, 6, 3);
constexpr Heads heads{4, 2};

/// The error of a call, which must have left its output and log-sum-exp alone.
template <class Call>
std::string error_of(Index rows, Index cols, const Call& call) {
  Matrix<float> out = Matrix<float>::Constant(rows, cols, 7.5F), log_sum_exp = Matrix<float>::Constant(2, 9, 8.5F);
  const std::string text = message_of([&] { call(out, &log_sum_exp); });
  CHECK(out == Matrix<float>::Constant(rows, cols, 7.5F));
  CHECK(log_sum_exp == Matrix<float>::Constant(2, 9, 8.5F));
  return text;
}

template <class Q, class K, class V>
std::string error_with(const Q& query, const K& key, const V& value, Heads h, Index rows = n, Index cols = 12) {
  return error_of(rows, cols, [&](auto& out, auto* log_sum_exp) {
    attention_into(out, query, key, value, h, full, plain, {.log_sum_exp = log_sum_exp});
  });
}

template <class M, class F>
std::string error_with(const M& mask, const F& score, Options<float> options) {
  return error_of(n, 12, [&](auto& out, auto* log_sum_exp) {
    options.log_sum_exp = log_sum_exp;
    attention_into(out, q, k, v, heads, AnyMask::of(mask), score, options);
  });
}
std::string error_with(const Options<float>& options) { return error_with(full, plain, options); }

/// Records what a mask is told before anything is written.
struct Recorder {
  std::vector<CallShape>* calls;
  bool refuse = false;
  bool sees(const At&) const { return true; }
  void check(const CallShape& call) const {
    calls->push_back(call);
    detail::require(!refuse || call.sequence < 1, "this mask refuses sequence ", call.sequence);
  }
};

/// A cache of the user's own: rows in memory that anyone may write, here upside down.
struct Borrowed {
  ConstView<float> k, v;
  KeyRun<float> run = qkv::key_run(k, v);
  KeyRows<float> key_rows() const { return qkv::key_rows(run, k, v, 2); }
};

}  // namespace

TEST_CASE("a window or a cap made by hand is checked like one of window() and soft_cap()", "[attention][errors]") {
  CHECK(contains(error_with(Window{-3, 1}, plain, {}), "window(left, right) needs left >= 0 and right >= 0"));
  CHECK(contains(error_with(causal | Window{infinite, -1}, plain, {}), "window(left, right) needs left >= 0"));
  CHECK(contains(error_with(full, SoftCap{}, {}), "soft_cap needs a finite cap > 0; given 0"));
}

TEST_CASE("shapes that do not fit are refused, with the rule and the numbers", "[attention][errors]") {
  CHECK(error_with(q, k, v, heads, n, 11).find("out must be [3, 12]; given [3, 11]") == 0);
  CHECK(error_with(q, k, v, heads, 4, 12).find("out must be [3, 12]; given [4, 12]") == 0);
  CHECK(contains(error_with(q.leftCols(7), k, v, heads),
                 "q must have heads*head_dim columns; given 7 for heads 4, head_dim 2"));
  CHECK(contains(error_with(q, k.topRows(4), v, heads),
                 "k and v must have the same number of rows; given [4, 4] and [5, 6]"));
  CHECK(
      contains(error_with(q, k.leftCols(3), v, heads), "kv_heads 2 must divide the columns of k [5, 3] and v [5, 6]"));
  CHECK(
      contains(error_with(q, k, v.leftCols(5), heads), "kv_heads 2 must divide the columns of k [5, 4] and v [5, 5]"));
  for (const Heads wrong : {Heads{4, 3}, Heads{0, 1}, Heads{4, 0}, Heads{-4, 2}, Heads{-4, -4}, Heads{2, 4}})
    CHECK(contains(error_with(q, k, v, wrong), "heads must be a positive multiple of kv_heads"));
}

TEST_CASE("sizes that no memory holds are refused before anything is allocated", "[attention][errors]") {
  const Heads enormous{Index{1} << 40, 2};
  CHECK(contains(message_of([&] { attention(q, k, v, enormous); }), "q must have heads*head_dim columns"));
  const PagedKeys<float> cache(k, v, 2, consecutive_pages(n_keys, {2, 3}));
  CHECK(contains(message_of([&] { attention(q, cache, enormous); }), "q must have heads*head_dim columns"));
  CHECK(contains(message_of([&] { attention(q, cache, {-4, 2}); }), "positive multiple"));
  CHECK(contains(message_of([&] {
                   attention(q, cache, {4, 1});
                 }),
                 "the keys must have kv_heads = 1 heads; they have 2"));
  // The product of heads and head_dim wraps around to the columns of q.
  const Heads wrapping{(Index{1} << 62) + 4, 2};
  CHECK(contains(message_of([&] { attention(q, k, v, wrapping); }), "q must have heads*head_dim columns"));
}

TEST_CASE("heads and rows without features are bounded too", "[attention][errors]") {
  const Heads enormous{Index{1} << 62, 2};
  const auto none = [](Index rows) { return Matrix<float>(rows, 0); };
  const auto refused = [](const auto& call) {
    return contains(message_of<std::length_error>(call), "must be at most 2^48; given n_queries");
  };
  CHECK(refused([&] { attention(none(1), none(5), none(5), enormous); }));
  CHECK(refused([&] { attention(none(Index{1} << 60), none(5), none(5), {2, 2}); }));
  CHECK(refused([&] { attention_state(none(1), none(Index{1} << 60), none(Index{1} << 60), {2, 2}); }));
  CHECK(refused([&] { attention_weights(none(1), none(5), enormous); }));
  CHECK(refused([&] { required_bytes<float>(Kernel::automatic, Index{1} << 60, 5, {2, 2}, 8, 8); }));
  CHECK(contains(message_of([&] { required_bytes<float>(Kernel::automatic, 1, -5, {2, 2}, 8, 8); }), "1, -5, 8, 8"));
  CHECK(contains(message_of([&] { required_bytes<float>(Kernel::automatic, 1, 5, {2, 0}, 8, 8); }), "kv_heads 0"));
  CHECK(attention(none(3), none(5), none(5), {2, 2}).size() == 0);
}

TEST_CASE("what is of one sequence refuses offsets of either side", "[attention][errors]") {
  const std::vector<Index> offsets = {0, 2, 5};
  const Options<float> options{.key_offsets = offsets};
  const auto refused = [](const auto& call) {
    return contains(message_of(call), "query_offsets and key_offsets must be empty; given 0 and 3");
  };
  CHECK(refused([&] { attention_state(q, k, v, heads, full, plain, options); }));
  CHECK(refused([&] { attention_weights(q, k, heads, full, plain, Stage::masked, options); }));
  const PagedKeys<float> cache(k, v, 2, consecutive_pages(n_keys, {2, 3}));
  CHECK(refused([&] { attention(q, cache, heads, full, plain, options); }));
}

/// Keys of one head with these runs, `rows` of them by their own account, in memory of their own.
struct Runs {
  std::vector<KeyRun<float>> runs;
  Index rows;
  Matrix<float> memory = Matrix<float>::Ones(400, 2);

  explicit Runs(const std::vector<Page>& pages, Index extra = 0) : rows(extra) {
    for (const Page& page : pages) {
      runs.push_back({page.rows, page.position, memory.data(), memory.data()});
      rows += page.rows;
    }
  }
  KeyRows<float> key_rows() const {
    return {.runs = runs, .rows = rows, .head_dim = 2, .v_head_dim = 2, .key_row_stride = 2, .value_row_stride = 2};
  }
};

TEST_CASE("runs of rows that do not stand at ascending positions from 0 on are refused", "[attention][errors]") {
  const Matrix<float> query = Matrix<float>::Ones(3, 2);
  const auto refusals = [&](const Runs& source, const std::string& why) {
    int n_refused = 0;
    for (const Kernel kernel : kernels)
      n_refused += contains(error_of(3, 2,
                                     [&](auto& out, auto* log_sum_exp) {
                                       attention_into(out, query, source, {}, full, plain,
                                                      {.kernel = kernel, .log_sum_exp = log_sum_exp});
                                     }),
                            why);
    return n_refused + contains(message_of([&] { attention_weights(query, source); }), why);
  };
  const std::string order = "in ascending order and none twice", count = "as many as their runs hold";
  constexpr Index far = std::numeric_limits<Index>::max();
  // Negative, out of order, one inside or twice, too far to be added up; also at the borders of what kernels go by.
  for (const std::vector<Page>& pages : std::vector<std::vector<Page>>{{{5, -3}},
                                                                       {{200, -200}},
                                                                       {{1, -1}, {2, 0}},
                                                                       {{3, 192}, {2, 191}},
                                                                       {{3, 4}, {2, 0}},
                                                                       {{200, 0}, {2, 199}},
                                                                       {{3, 0}, {3, 0}},
                                                                       {{2, 0}, {2, far - 1}},
                                                                       {{2, far / 2}},
                                                                       {{2, std::numeric_limits<Index>::min()}}}) {
    CAPTURE(pages[0].rows, pages[0].position);
    CHECK(refusals(Runs(pages), order) == 4);
  }
  CHECK(refusals(Runs({{3, 0}, {2, 3}}, 1), count) == 4);
  CHECK(refusals(Runs({{3, 0}, {2, 3}}, -1), count) == 4);
  CHECK(refusals(Runs({{3, 0}, {far, 3}}, 1 - far), count) == 4);
  CHECK(refusals(Runs({{6, 0}, {-1, 6}}, 1), order) == 4);
  // Gaps, runs without rows, and a far position are none of these.
  for (const Kernel kernel : kernels)
    CHECK(attention(query, Runs({{0, -7}, {3, 5}, {0, 2}, {2, 197}, {1, far / 8}}), {}, full, plain,
                    {.kernel = kernel}) == Matrix<float>::Ones(3, 2));
}

/// A cache of the library with rows of somebody else.
struct Disguised : KvCache<float> {
  const Runs& rows;
  explicit Disguised(const Runs& of) : KvCache<float>({.head_dim = 2, .v_head_dim = 2, .capacity = 1}), rows(of) {}
  KeyRows<float> key_rows() const { return rows.key_rows(); }
};
static_assert(detail::owns_rows<KvCache<float>> && !detail::owns_rows<Disguised> && !detail::owns_rows<Runs>);

TEST_CASE("a cache that is derived from one of the library's is looked at like any other", "[attention][errors]") {
  const Runs twice({{3, 0}, {3, 0}});
  const Matrix<float> query = Matrix<float>::Ones(3, 2);
  CHECK(contains(message_of([&] { attention(query, Disguised(twice)); }), "in ascending order and none twice"));
}

TEST_CASE("options that do not fit are refused, with the rule and the numbers", "[attention][errors]") {
  const std::vector<float> three = {1, 2, 3};
  CHECK(contains(error_with({.sinks = three}), "sinks needs one logit per head; given 3 for 4 heads"));
  CHECK(contains(error_with({.scale = std::numeric_limits<double>::quiet_NaN()}), "scale must be a number; given NaN"));
  CHECK(contains(error_with({.scale = -INFINITY}), "scale must be finite; given -inf"));
  for (const double scale :
       {1e300, -1e300, 3e38, 1e-39, -1e-310})  // not a normal number of float, or not twice as much
    CHECK(contains(error_with({.scale = scale}),
                   "scale must be 0 (1/sqrt(head_dim)) or lie between 1.17549435e-38 and "
                   "1.70141173e+38, or their negatives"));
  for (const double scale : {1.7e38, -1.7e38, 1.2e-38})
    CHECK(message_of([&] { attention(q, k, v, heads, full, plain, {.scale = scale}); }).empty());
  const Matrix<double> wide = q.cast<double>(), key = k.cast<double>(), value = v.cast<double>();
  const auto of_double = [&](double scale) {
    return message_of(
        [&] { attention(wide, key, value, heads, full, plain, {.scale = scale, .kernel = Kernel::reference}); });
  };
  CHECK(of_double(1e300).empty());
  CHECK(contains(of_double(1e308), "scale must be 0"));

  constexpr Index far = std::numeric_limits<Index>::max() / 4;
  for (const Index wrong : {Index(-1), far + 1, std::numeric_limits<Index>::max()})
    CHECK(contains(error_with({.first_key_position = wrong}), "first_key_position must lie within 0 ... "));
  CHECK(max_error(attention(q, k, v, heads, causal, {.first_key_position = far}), attention(q, k, v, heads, causal)) <=
        tolerance<float>);
  const PagedKeys<float> cache(k, v, 2, consecutive_pages(n_keys, {2, 3}));
  const Options<float> elsewhere{.first_key_position = 3};
  const std::string own = "the rows of a cache stand at positions of their own: first_key_position must be 0; given 3";
  CHECK(message_of([&] { attention(q, cache, heads, elsewhere); }) == own);
  CHECK(message_of([&] { attention_weights(q, cache, heads, full, plain, {}, elsewhere); }) == own);

  const auto offsets = [](const std::vector<Index>& queries, const std::vector<Index>& keys) {
    return error_with({.query_offsets = queries, .key_offsets = keys});
  };
  CHECK(contains(offsets({0, 3}, {}), "query_offsets and key_offsets must be of equal length; given 2 and 0"));
  CHECK(contains(offsets({}, {0, 5}), "equal length; given 0 and 2"));
  CHECK(contains(offsets({0, 1, 3}, {0, 5}), "equal length"));
  CHECK(contains(offsets({1, 3}, {0, 5}), "query_offsets must begin with 0 and end with n_queries"));
  CHECK(contains(offsets({0, 2}, {0, 5}), "query_offsets must begin with 0 and end with n_queries"));
  CHECK(contains(offsets({0, 3}, {0, 6}), "key_offsets must begin with 0 and end with n_keys"));
  CHECK(contains(offsets({0, 2, 1, 3}, {0, 1, 2, 5}), "query_offsets must not decrease; entry 2 is 1 after 2"));
  CHECK(contains(offsets({0, 1, 2, 3}, {0, 7, 2, 5}), "key_offsets must not decrease; entry 2 is 2 after 7"));
  CHECK(contains(offsets({0}, {0}), "query_offsets must begin with 0 and end with n_queries"));
}

TEST_CASE("operands of masks and scores are checked for every sequence before the first write", "[attention][errors]") {
  const Matrix<bool> allowed = Matrix<bool>::Ones(3, 4);
  CHECK(contains(error_with(boolean(allowed), plain, {}), "a boolean mask must be [n_queries, n_keys]"));
  const Matrix<float> added = Matrix<float>::Ones(2, 5);
  CHECK(contains(error_with(full, bias(added), {}), "a bias must be [n_queries, n_keys]"));
  CHECK(contains(error_with(full, then(plain, bias(added)), {}), "a bias must be [n_queries, n_keys]"));
  const std::vector<Index> ids = {0, 0, 0, 0}, two = {1, 2}, longer = {1, 4};
  CHECK(contains(error_with(causal & documents(ids), plain, {}), "an id for every position"));
  CHECK(contains(error_with(lengths(two), plain, {}), "one length per sequence"));
  const std::vector<Index> q_rows = {0, 1, 3}, k_rows = {0, 2, 5};
  CHECK(contains(error_with(lengths(longer), plain, {.query_offsets = q_rows, .key_offsets = k_rows}),
                 "sequence 1 has length 4, n_keys 3"));

  std::vector<CallShape> calls;
  CHECK(error_with(Recorder{&calls, true}, plain, {.query_offsets = q_rows, .key_offsets = k_rows}) ==
        "this mask refuses sequence 1");
}

TEST_CASE("a user's mask is told the shape of each sequence of the call", "[attention][errors]") {
  std::vector<CallShape> calls;
  const std::vector<Index> q_rows = {0, 1, 1, 3}, k_rows = {0, 0, 2, 5};
  attention(q, k, v, heads, Recorder{&calls}, plain, {.query_offsets = q_rows, .key_offsets = k_rows});
  REQUIRE(calls.size() == 3);
  const Index n_q[] = {1, 0, 2}, n_k[] = {0, 2, 3};
  for (std::size_t s = 0; s < 3; ++s) {
    CHECK(calls[s].sequences == 3);
    CHECK(calls[s].sequence == static_cast<Index>(s));
    CHECK(calls[s].heads == 4);
    CHECK(calls[s].n_queries == n_q[s]);
    CHECK(calls[s].n_keys == n_k[s]);
    CHECK(calls[s].first_position == n_k[s] - n_q[s]);
    CHECK(calls[s].last_key_position == n_k[s] - 1);
  }
  calls.clear();
  attention(q, k, v, heads, Recorder{&calls} & causal, plain, {.first_position = 30});
  REQUIRE(calls.size() == 1);
  CHECK(calls[0].first_position == 30);
  // Keys that stand elsewhere, and queries that are the last of them; or of none.
  attention(q, k, v, heads, Recorder{&calls}, {.first_key_position = 40});
  attention_state(q, k.topRows(0), v.topRows(0), heads, Recorder{&calls}, {.first_key_position = 40});
  REQUIRE(calls.size() == 3);
  CHECK(calls[1].first_position == 40 + n_keys - n);
  CHECK(calls[1].last_key_position == 40 + n_keys - 1);
  CHECK(calls[2].first_position == 40 - n);
}

TEST_CASE("an output that shares an element with an input is refused", "[attention][errors]") {
  Matrix<float> buffer = normals<float>(9, 30, 4);
  const Matrix<float> before_call = buffer;
  const auto said = [&](auto&& out, const auto& query, const auto& key, const auto& value) {
    const std::string text = message_of([&] { attention_into(out, query, key, value, heads); });
    CHECK(same_bits(buffer, before_call));
    return text;
  };
  const auto query = buffer.block(0, 0, 3, 8), key = buffer.block(0, 8, 5, 4), value = buffer.block(0, 12, 5, 6);
  const std::string rule = "the output must not share elements with the input ";
  CHECK(said(buffer.block(2, 7, 3, 12), query, k, v) == rule + "q");  // one element
  CHECK(said(buffer.block(4, 11, 3, 12), q, key, v) == rule + "k");
  CHECK(said(buffer.block(0, 17, 3, 12), q, k, value) == rule + "v");
  CHECK(said(buffer.block(3, 0, 3, 12), query, key, v) == rule + "k");
  // Rows below, columns beside: no element in common.
  CHECK_NOTHROW(attention_into(buffer.block(0, 18, 3, 12), query, key, value, heads));
  CHECK_NOTHROW(attention_into(buffer.block(5, 0, 3, 12), query, key, value, heads));
}

TEST_CASE("an output that shares an element with the rows of a user's cache is refused", "[attention][errors]") {
  Matrix<float> buffer = normals<float>(9, 23, 6);
  const Matrix<float> before_call = buffer;
  const Eigen::OuterStride<> down(-23);
  const Borrowed source{{&buffer(6, 1), n_keys, 4, down}, {&buffer(7, 17), n_keys, 6, down}};
  Matrix<float> keys = Matrix<float>(source.k), values = Matrix<float>(source.v), expected(n, 12);
  attention_into(expected, q, keys, values, heads);
  int refused = 0;
  for (Index row = 0; row <= 6; ++row)
    for (Index col = 0; col <= 11; ++col) {
      const auto meets = [&](Index first_row, Index first_col, Index cols) {
        return row < first_row + n_keys && row + n > first_row && col < first_col + cols && col + 12 > first_col;
      };
      const bool shares = meets(2, 1, 4) || meets(3, 17, 6);
      CAPTURE(row, col, shares);
      const std::string text = message_of([&] { attention_into(buffer.block(row, col, n, 12), q, source, heads); });
      REQUIRE(contains(text, "must not share elements with the keys and values") == shares);
      REQUIRE((shares ? same_bits(buffer, before_call) : same_bits(buffer.block(row, col, n, 12), expected)));
      buffer = before_call;
      refused += shares;
    }
  CHECK(refused > 20);
  CHECK(refused < 80);
}

TEST_CASE("an output that shares an element with an operand of the mask or score is refused", "[attention][errors]") {
  Matrix<float> buffer = normals<float>(9, 30, 5);
  const Matrix<float> before_call = buffer;
  const PagedKeys<float> cache(k, v, 2, consecutive_pages(n_keys, {2, 3}));
  const auto out = [&] { return buffer.block(1, 3, 3, 12); };
  const auto said = [&](const auto& mask, const auto& score, const Options<float>& options = {}) {
    const auto text = message_of([&] { attention_into(out(), q, k, v, heads, mask, score, options); });
    CHECK(text == message_of([&] { attention_into(out(), q, cache, heads, mask, score, options); }));
    CHECK(same_bits(buffer, before_call));
    return text;
  };
  const std::string rule = "the output (and the log-sum-exp) must not share elements with the operand of ";
  const auto added = buffer.block(3, 14, 3, 5), beside = buffer.block(3, 15, 3, 5);  // one element, none
  CHECK(said(full, bias(added)) == rule + "a bias");
  CHECK(said(causal, then(soft_cap(5), bias(added))) == rule + "a bias");
  const auto slopes = buffer.row(2).segment(1, 4);
  CHECK(said(causal, alibi(slopes)) == rule + "alibi");
  CHECK(said(causal, plain, {.sinks = {&buffer(3, 12), 4}}) == rule + "sinks");
  const Eigen::Map<const Matrix<bool>> allowed(reinterpret_cast<const bool*>(buffer.row(3).data() + 3), 3, 5);
  CHECK(said(boolean(allowed) & causal, plain) == rule + "a boolean mask");
  attention_into(out(), q, k, v, heads, full, bias(beside));
  buffer = before_call;

  // The log-sum-exp is an output too.
  Matrix<float> lse = Matrix<float>::Constant(3, 5, 7), result(3, 12);
  CHECK(message_of([&] { attention_into(result, q, k, v, heads, full, bias(lse), {.log_sum_exp = &lse}); }) ==
        rule + "a bias");
  CHECK((lse.array() == 7).all());
}

TEST_CASE("states and weights refuse what belongs to whole calls", "[attention][errors]") {
  const std::vector<float> sinks = {1, 2, 3, 4};
  const std::vector<Index> q_rows = {0, 3}, k_rows = {0, 5};
  Matrix<float> lse;
  const auto state_error = [&](const Options<float>& options) {
    return message_of([&] { attention_state(q, k, v, heads, full, plain, options); });
  };
  CHECK(contains(state_error({.sinks = sinks}), "a state is of one sequence and without sinks"));
  CHECK(contains(state_error({.log_sum_exp = &lse}), "log_sum_exp must be empty"));
  CHECK(contains(state_error({.query_offsets = q_rows, .key_offsets = k_rows}), "one sequence"));
  CHECK(contains(message_of([&] {
                   attention_weights(q, k, heads, full, plain, Stage::probabilities,
                                     {.query_offsets = q_rows, .key_offsets = k_rows});
                 }),
                 "weights are of one sequence"));
  CHECK(
      contains(message_of([&] { attention_weights(q.leftCols(7), k, heads); }), "q must have heads*head_dim columns"));
  const PagedKeys<float> cache(k, v, 2, consecutive_pages(n_keys, {2, 3}));
  CHECK(contains(
      message_of([&] { attention(q, cache, heads, full, plain, {.query_offsets = q_rows, .key_offsets = k_rows}); }),
      "a cache holds one sequence"));
  Matrix<float> wrong(3, 11);
  CHECK(contains(message_of([&] { attention_into(wrong, q, cache, heads); }), "out must be [3, 12]; given [3, 11]"));
}

TEST_CASE("a log-sum-exp that is an operand, and positions out of reach, are refused", "[attention]") {
  Matrix<float> queries = numbers<float>(4, 4, 1), out(4, 4);
  const Matrix<float> before = queries;
  CHECK_THROWS_AS(attention_into(out, queries, queries, queries, {}, causal, plain, {.log_sum_exp = &queries}),
                  std::invalid_argument);
  CHECK_THROWS_AS(attention_into(out, queries, queries, queries, {}, causal, plain, {.log_sum_exp = &out}),
                  std::invalid_argument);
  CHECK_THROWS_AS(attention(queries, queries, queries, {}, causal, plain, {.first_position = infinite - 1}),
                  std::invalid_argument);
  CHECK(queries == before);
}

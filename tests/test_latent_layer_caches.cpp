#include <qkv/latent_attention.hpp>

#include <thread>

#include "support/batches.hpp"
#include "support/catch.hpp"
#include "support/executors.hpp"

using namespace support;
using qkv::Kernel, qkv::LatentCache, qkv::LatentForm, qkv::LayerOptions;

namespace {

template <class Computed, class Stored>
struct In {
  using T = Computed;
  using S = Stored;
};
using F32 = In<float, float>;
using F16 = In<float, qkv::half>;
using BF16 = In<float, qkv::bfloat16>;
using Int8 = In<float, std::int8_t>;
using F64 = In<double, double>;
using WideInt8 = In<double, std::int8_t>;

/// A latent cache of the user's own: what it holds comes in runs of 1, 2, 3 … rows.
struct InRuns : LatentCache<float> {
  using LatentCache<float>::LatentCache;
  std::vector<qkv::LatentRun<float>> mutable runs = {};
  Index before = 0;  // positions that they stand too early

  qkv::LatentRows<float> latent_rows() const {
    auto all = LatentCache<float>::latent_rows();
    runs.clear();
    for (Index first = 0, n = 1; first < all.rows; first += n++) {
      auto run = all.runs[0];
      run.latent += first * all.latent_row_stride, run.rope += first * all.rope_row_stride;
      run.position = first - before, run.rows = std::min(n, all.rows - first);
      runs.push_back(run);
    }
    all.runs = runs;
    return all;
  }
};

inline constexpr Index n_rows = 263;  // across the border of a latent chunk

}  // namespace

TEMPLATE_TEST_CASE("a prompt in pieces gives latent attention's bits at once, where kernel and form are fixed",
                   "[layer]", F32, F16, BF16, Int8, F64, WideInt8) {
  using T = typename TestType::T;
  using S = typename TestType::S;
  const auto layer = latent_layer<T>(small_mla);
  const Matrix<T> x = normals<T>(n_rows, 29, 1);
  for (const LatentForm form : {LatentForm::naive, LatentForm::absorbed})
    for (const Kernel kernel : {Kernel::automatic, Kernel::tiled, Kernel::decode}) {
      if (kernel == Kernel::automatic && form == LatentForm::naive) continue;  // chooses by the number of rows
      CAPTURE(name(kernel), form == LatentForm::naive);
      const auto fed = [&](const std::vector<Index>& sizes) {
        auto cache = layer.template make_cache<S>(n_rows);
        return feed(layer, cache, x, sizes, qkv::causal, qkv::plain, LayerOptions{.kernel = kernel, .form = form});
      };
      const Matrix<T> whole = fed({n_rows});
      CHECK(same_bits(fed({67, 1, 53, 9}), whole));
      CHECK(same_bits(fed({n_rows - 5, 1}), whole));
    }
}

TEMPLATE_TEST_CASE("latent attention attends what its cache holds, the rows of this call included", "[layer]", F32, F16,
                   BF16, Int8, F64, WideInt8) {
  using T = typename TestType::T;
  using S = typename TestType::S;
  const auto layer = latent_layer<T>(small_mla);
  const auto& c = layer.config();
  const Matrix<T> x = normals<T>(61, 29, 2);
  auto cache = layer.template make_cache<S>(64);
  const Matrix<T> out = feed(layer, cache, x, {40, 1, 1, 10, 3}, qkv::causal, qkv::plain,
                             LayerOptions{.arithmetic = qkv::Arithmetic::exact});
  const Wide latent = cache.template latent<long double>(), rope = cache.template rope_keys<long double>();
  const Wide nope = project(latent, layer.weights().key_up), v = project(latent, layer.weights().value_up);
  Wide k(61, c.heads * c.head_dim());
  for (Index h = 0; h < c.heads; ++h) {
    k.middleCols(h * c.head_dim(), c.nope_dim) = nope.middleCols(h * c.nope_dim, c.nope_dim);
    k.middleCols(h * c.head_dim() + c.nope_dim, c.rope_dim) = rope;
  }
  const Wide context =
      attention_by_formula(layer.queries(x), k, v, {.heads = {c.heads, c.heads}}, causally, unchanged).out;
  CHECK(max_error(out, project(context, layer.weights().output)) <= layer_tolerance<T>);
  const double lost = qkv::has_row_scale<S> ? 0.1 : sizeof(S) == 2 ? 0.03 : layer_tolerance<T>;
  CHECK(max_error(out, latent_by_formula(layer, x)) <= lost);
}

TEMPLATE_TEST_CASE("a latent cache goes back and on as if it had never been there", "[layer]", F32, F16, Int8, F64) {
  using T = typename TestType::T;
  using S = typename TestType::S;
  const auto layer = latent_layer<T>(small_mla);
  const Matrix<T> x = normals<T>(21, 29, 3), astray = normals<T>(9, 29, 4);
  auto straight = layer.template make_cache<S>(24), winding = straight;
  layer.forward(x.topRows(12), straight), layer.forward(x.topRows(12), winding);
  for (const Index back : {12, 7, 0}) {
    layer.forward(astray, winding);
    winding.truncate(back);
    if (back < 12) layer.forward(x.middleRows(back, 12 - back), winding);
  }
  auto copy = winding;
  const Matrix<T> expected = layer.forward(x.bottomRows(9), straight);
  CHECK(same_bits(layer.forward(x.bottomRows(9), winding), expected));
  CHECK(same_bits(layer.forward(x.bottomRows(9), copy), expected));
}

TEMPLATE_TEST_CASE("in a batch each sequence of latent attention has the bits it has alone", "[layer]", F32, Int8,
                   F64) {
  using T = typename TestType::T;
  using S = typename TestType::S;
  const auto layer = latent_layer<T>(small_mla);
  std::vector<LatentCache<S>> together(4, layer.template make_cache<S>(90)), alone = together;
  CHECK(batch_equals_alone<T>(layer, together, alone));
  if constexpr (std::is_same_v<TestType, F32>) {
    for (auto* caches : {&together, &alone})
      for (auto& cache : *caches) cache.clear();
    CHECK(batch_equals_alone<T>(layer, together, alone, qkv::causal, qkv::plain, LayerOptions{}, threaded(2)));
    for (auto* caches : {&together, &alone})
      for (auto& cache : *caches) cache.clear();
    const std::vector<qkv::Window> windows = {qkv::causal, qkv::window(3, 0), qkv::window(0, 0), qkv::window(20, 0)};
    CHECK(batch_equals_alone<T>(layer, together, alone, qkv::per_sequence(windows)));
  }
}

TEST_CASE("latent rows may lie in several runs", "[layer]") {
  const auto layer = latent_layer<float>(small_mla);
  const Matrix<float> x = normals<float>(70, 29, 9);
  const Wide expected = latent_by_formula(layer, x);
  for (const LatentForm form : {LatentForm::naive, LatentForm::absorbed}) {
    InRuns cache({.latent_dim = 19, .rope_dim = 6, .capacity = 70});
    CHECK(max_error(feed(layer, cache, x, {40, 1, 7}, qkv::causal, qkv::plain, LayerOptions{.form = form}), expected) <=
          layer_tolerance<float>);
    cache.truncate(30);
    Matrix<bool> sees(40, 70);  // by call rows and columns, across the runs
    for (Index i = 0; i < 40; ++i)
      for (Index j = 0; j < 70; ++j) sees(i, j) = (i * 3 + j * j) % 4 != 1;
    CHECK(max_error(layer.forward(x.bottomRows(40), cache, qkv::causal & qkv::boolean(sees), qkv::plain,
                                  LayerOptions{.form = form}),
                    latent_by_formula(layer, x, [&](const At& at) {
                      return causally(at) && (at.query < 30 || sees(at.query - 30, at.key));
                    }).bottomRows(40)) <= layer_tolerance<float>);
  }
}

TEST_CASE("a latent cache whose rows stand before position 0 is refused, and stays as it was", "[layer]") {
  const auto layer = latent_layer<float>(small_mla);
  const Matrix<float> x = normals<float>(20, 29, 9);
  for (const LatentForm form : {LatentForm::naive, LatentForm::absorbed}) {
    InRuns cache({.latent_dim = 19, .rope_dim = 6, .capacity = 70});
    layer.forward(x, cache);
    cache.before = 3;
    const auto call = [&] { layer.forward(x, cache, qkv::causal, qkv::plain, LayerOptions{.form = form}); };
    CHECK(contains(message_of(call), "given 1 rows at position -3"));
    CHECK(cache.rows() == 20);
  }
}

TEST_CASE("one full latent cache stops the whole batch before it begins", "[layer]") {
  const auto layer = latent_layer<float>(small_mla);
  std::vector<LatentCache<float>> caches(3, layer.make_cache(10));
  caches.push_back(LatentCache<float>({.latent_dim = 19, .rope_dim = 8, .capacity = 10}));
  for (std::size_t s = 0; s < 3; ++s) layer.forward(normals<float>(static_cast<Index>(4 + s), 29, s), caches[s]);
  const Matrix<float> x = normals<float>(12, 29, 5);
  Matrix<float> out = Matrix<float>::Constant(12, 29, 7);
  auto pointers = pointers_to(caches);
  const auto complaint = [&]<class Error>(Error, const std::vector<Index>& offsets) {
    const std::span<LatentCache<float>* const> all(pointers.data(), offsets.size() - 1);
    const std::string text =
        message_of<Error>([&] { layer.forward_into(out, x, std::span<const Index>(offsets), all); });
    REQUIRE((out.array() == 7).all());
    for (std::size_t s = 0; s < 3; ++s) REQUIRE(caches[s].rows() == static_cast<Index>(4 + s));
    return text;
  };
  CHECK(contains(complaint(std::length_error(""), {0, 2, 7, 12}), "caches[2] takes at most 4 more rows"));
  CHECK(contains(complaint(std::invalid_argument(""), {0, 2, 4, 8, 12}), "rope_dim 6; it has 19 and 8"));
  CHECK(contains(complaint(std::invalid_argument(""), {0, 2, 4, 8}), "end with n 12"));
}

TEST_CASE("a latent call that fails half way leaves its caches as they were", "[layer]") {
  const auto layer = latent_layer<float>(small_mla);
  const Matrix<float> x = normals<float>(9, 29, 5);
  for (const LatentForm form : {LatentForm::naive, LatentForm::absorbed}) {
    std::vector<LatentCache<float>> caches(2, layer.make_cache(9));
    layer.forward(x.topRows(4), caches[0]);
    const Matrix<float> held = caches[0].latent();
    const auto fails = [](const At& at) {
      if (at.key_position == 6) throw std::runtime_error("a mask that fails");
      return at.key_position <= at.query_position;
    };
    Matrix<float> out(9, 29);
    const Index offsets[] = {0, 4, 9};
    auto pointers = pointers_to(caches);
    CHECK(message_of<std::runtime_error>([&] {
            layer.forward_into(out, x, std::span<const Index>(offsets), std::span<LatentCache<float>* const>(pointers),
                               fails, qkv::plain, {.form = form});
          }) == "a mask that fails");
    CHECK(caches[1].rows() == 0);
    REQUIRE(caches[0].rows() == 4);
    CHECK(same_bits(caches[0].latent(), held));
  }
}

TEST_CASE("latent attention says what is wrong before the cache changes", "[layer]") {
  const auto layer = latent_layer<float>(small_mla);
  const Matrix<float> x = normals<float>(5, 29, 6);
  auto cache = layer.make_cache(7);
  layer.forward(x.topRows(3), cache);
  const Matrix<float> held = cache.latent();
  Matrix<float> buffer = Matrix<float>::Constant(5, 70, 7);
  auto out = buffer.middleCols(2, 29);
  const auto complains = [&](const std::string& text, const std::string& part) {
    CAPTURE(text);
    return contains(text, part) && (buffer.array() == 7).all() && cache.rows() == 3 && same_bits(cache.latent(), held);
  };
  CHECK(complains(message_of([&] { layer.forward_into(out, x.leftCols(28), cache); }), "model_dim 29]; given [5, 28]"));
  CHECK(complains(message_of([&] { layer.forward_into(out.topRows(4), x, cache); }),
                  "out must be [5, 29]; given [4, 29]"));
  CHECK(complains(message_of<std::length_error>([&] { layer.forward_into(out, x, cache); }), "at most 4 more rows"));
  CHECK(complains(message_of([&] { layer.forward_into(buffer.block(0, 28, 4, 29), buffer.block(0, 0, 4, 29), cache); }),
                  "must not share elements with the input x"));
  const std::vector<Index> ids(6, 0);
  const Matrix<bool> sees = Matrix<bool>::Constant(4, 6, true);
  const auto four = [&](const auto& mask) {
    return message_of([&] { layer.forward_into(out.topRows(4), x.topRows(4), cache, mask); });
  };
  CHECK(complains(four(qkv::documents(ids)), "6 ids"));
  CHECK(complains(four(qkv::boolean(sees)), "n_keys 7"));

  buffer.middleCols(31, 29) = x;
  layer.forward_into(buffer.block(0, 2, 4, 29), buffer.block(0, 31, 4, 29), cache);
  auto again = layer.make_cache(7);
  layer.forward(x.topRows(3), again);
  CHECK(same_bits(buffer.block(0, 2, 4, 29), layer.forward(x.topRows(4), again)));
}

TEST_CASE("a const latent layer serves two threads at once", "[layer]") {
  const auto layer = latent_layer<float>(small_mla);
  const Matrix<float> a = normals<float>(80, 29, 7), b = normals<float>(80, 29, 8);
  const auto run = [&](const Matrix<float>& x) {
    auto cache = layer.make_cache(80);
    return feed(layer, cache, x, {31, 1, 1, 5, 8});
  };
  const Matrix<float> alone_a = run(a), alone_b = run(b);
  for (int round = 0; round < 5; ++round) {
    Matrix<float> of_a, of_b;
    std::thread first([&] { of_a = run(a); }), second([&] { of_b = run(b); });
    first.join(), second.join();
    CHECK(same_bits(of_a, alone_a));
    CHECK(same_bits(of_b, alone_b));
  }
}

TEST_CASE("latent attention goes on after a context shift as if the dropped tokens had never been", "[layer]") {
  const auto layer = latent_layer<float>(small_mla);
  const Matrix<float> x = normals<float>(103, 29, 9);
  auto cache = layer.make_cache<qkv::half>(103), rebuilt = cache;
  (void)layer.forward(x.topRows(90), cache);
  cache.drop_rows(4, 41, *layer.rope());  // the first four stay
  (void)layer.forward(x.topRows(4), rebuilt);
  (void)layer.forward(x.middleRows(45, 45), rebuilt);
  CHECK(max_error(layer.forward(x.bottomRows(13), cache), layer.forward(x.bottomRows(13), rebuilt)) <= 2e-3);
}

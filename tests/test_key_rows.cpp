#include <qkv/kernel/task.hpp>
#include <qkv/key_rows.hpp>

#include <random>
#include <set>

#include "support/catch.hpp"
#include "support/key_source.hpp"

using namespace support;
using namespace qkv;

namespace {

struct Row {
  Index logical, position, column;
  friend bool operator==(const Row&, const Row&) = default;
};
struct Chunk {
  Index first;
  std::vector<Row> rows;
};

/// The grid walked by the library.
std::vector<Chunk> walked(const KeyRows<float>& keys, Index chunk) {
  std::vector<Chunk> chunks;
  for (const kernel::GridCell& cell : kernel::GridCells(keys.runs, chunk)) {
    chunks.push_back({cell.first, {}});
    for (const kernel::GridPiece& piece : kernel::GridPieces(keys.runs, chunk, cell))
      for (Index i = 0; i < piece.count; ++i) {
        const KeyRun<float>& run = keys.runs[piece.run];
        REQUIRE(run.position + piece.row == piece.position);
        chunks.back().rows.push_back({piece.key + i, piece.position + i, piece.column + i});
      }
  }
  return chunks;
}

/// The grid by its definition: rows with the same position / chunk belong together.
std::vector<Chunk> defined(const std::vector<KeyRun<float>>& runs, Index chunk) {
  std::vector<Chunk> chunks;
  Index logical = 0;
  for (const auto& run : runs)
    for (Index i = 0; i < run.rows; ++i, ++logical) {
      const Index position = run.position + i, first = position / chunk * chunk;
      if (chunks.empty() || chunks.back().first != first) chunks.push_back({first, {}});
      chunks.back().rows.push_back({logical, position, position - first});
    }
  return chunks;
}

void check_grid(const std::vector<KeyRun<float>>& runs, Index chunk) {
  KeyRows<float> keys{.runs = runs};
  const auto got = walked(keys, chunk), expected = defined(runs, chunk);
  REQUIRE(got.size() == expected.size());
  for (std::size_t i = 0; i < got.size(); ++i) {
    REQUIRE(got[i].first == expected[i].first);
    REQUIRE(got[i].rows == expected[i].rows);
  }
}

}  // namespace

TEST_CASE("plain matrices are one run, addressed by row and head", "[key_rows]") {
  Matrix<float> buffer = numbers<float>(7, 30, 1);
  const ConstView<float> k = view(buffer.middleCols(2, 12)), v = view(buffer.middleCols(20, 6));
  const KeyRun<float> run = key_run(k, v);
  const KeyRows<float> rows = key_rows(run, k, v, 3);
  CHECK(rows.rows == 7);
  CHECK(rows.runs.size() == 1);
  CHECK(run.rows == 7);
  CHECK(run.position == 0);
  CHECK(rows.kv_heads == 3);
  CHECK(rows.head_dim == 4);
  CHECK(rows.v_head_dim == 2);
  for (Index h = 0; h < 3; ++h)
    for (Index i = 0; i < 7; ++i) {
      CHECK(rows.key(run, h, i) == &buffer.coeffRef(i, 2 + 4 * h));
      CHECK(rows.value(run, h, i) == &buffer.coeffRef(i, 20 + 2 * h));
      CHECK(rows.key_scale(run, h, i) == 1.0F);
      CHECK(rows.value_scale(run, h, i) == 1.0F);
    }
}

TEST_CASE("scales of int8 rows have strides of their own", "[key_rows]") {
  std::vector<float> key_scales(40), value_scales(40);
  for (std::size_t i = 0; i < 40; ++i) key_scales[i] = static_cast<float>(i), value_scales[i] = 100 + key_scales[i];
  const KeyRun<std::int8_t> run{.rows = 5, .key_scales = key_scales.data(), .value_scales = value_scales.data()};
  const KeyRows<std::int8_t> rows{.scale_row_stride = 3, .scale_head_stride = 17};
  CHECK(rows.key_scale(run, 1, 4) == 29.0F);
  CHECK(rows.value_scale(run, 1, 4) == 129.0F);
}

TEST_CASE("chunks lie on a grid of positions, whatever runs hold the keys", "[key_rows]") {
  const auto run = [](Index rows, Index position) { return KeyRun<float>{.rows = rows, .position = position}; };
  check_grid({}, 8);
  check_grid({run(0, 0)}, 8);
  check_grid({run(1, 7)}, 8);
  check_grid({run(8, 0), run(8, 8)}, 8);
  check_grid({run(20, 3)}, 8);
  check_grid({run(4, 0), run(30, 96), run(11, 126)}, 32);  // pinned rows, then a window
  check_grid({run(2, 5), run(0, 7), run(3, 7), run(0, 0), run(1, 10)}, 8);
  check_grid({run(1, 0), run(1, 2), run(1, 4), run(1, 6), run(1, 9)}, 8);

  std::mt19937 random(5);
  const auto pick = [&](Index low, Index high) { return std::uniform_int_distribution<Index>(low, high)(random); };
  for (int trial = 0; trial < 2000; ++trial) {
    std::vector<KeyRun<float>> runs;
    Index position = pick(0, 40);
    for (Index i = pick(0, 9); i > 0; --i) {
      const Index rows = pick(0, 3) == 0 ? 0 : pick(1, 30);
      runs.push_back(run(rows, position));
      position += rows + (pick(0, 2) ? 0 : pick(0, 50));
    }
    check_grid(runs, pick(1, 20));
  }
}

TEST_CASE("the test suite's own pages hold every row once", "[key_rows]") {
  const Matrix<float> k = numbers<float>(50, 6, 1), v = numbers<float>(50, 10, 2);
  const PagedKeys<float> cache(k, v, 2, consecutive_pages(50, {7, 20, 1}));
  const KeyRows<float> rows = cache.key_rows();
  Index j = 0;
  std::set<const float*> seen;
  for (const auto& run : rows.runs)
    for (Index i = 0; i < run.rows; ++i, ++j)
      for (Index h = 0; h < 2; ++h) {
        REQUIRE(run.position + i == j);
        for (Index x = 0; x < 3; ++x) REQUIRE(rows.key(run, h, i)[x] == k(j, 3 * h + x));
        for (Index x = 0; x < 5; ++x) REQUIRE(rows.value(run, h, i)[x] == v(j, 5 * h + x));
        CHECK(seen.insert(rows.key(run, h, i)).second);
      }
  CHECK(j == 50);
}

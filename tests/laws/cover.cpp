// laws/cover.cpp — what a mask says of a block is what it says of every pair in it, alone and under & and |.
#include <qkv/data_masks.hpp>
#include <qkv/mask.hpp>

#include <functional>
#include <random>

#include "support/catch.hpp"
#include "support/numbers.hpp"

using namespace support;
using namespace qkv;

namespace {

/// Any mask behind one type, so that random expressions can be built at run time.
struct AnyMask {
  std::function<bool(const At&)> see;
  std::function<Cover(const Block&)> answer;
  std::function<SeenBy(const Block&)> queries = [](const Block&) { return SeenBy{0, 0, false}; };
  std::function<SeenBy(const Block&)> keys = queries;
  bool sees(const At& at) const { return see(at); }
  Cover cover(const Block& block) const { return answer(block); }
  SeenBy seen_by(const Block& block) const { return queries(block); }
  SeenBy keys_seen(const Block& block) const { return keys(block); }
};
template <Mask M>
AnyMask any(const M& mask) {
  return {[mask](const At& at) { return mask.sees(at); },
          [mask](const Block& block) { return detail::cover(mask, block); },
          [mask](const Block& block) { return detail::seen_by(mask, block); },
          [mask](const Block& block) { return detail::keys_seen(mask, block); }};
}

/// A user's mask that names the queries of a key as an interval: here they are the same for every key.
struct Band {
  Index first = 0, last = 0;
  bool sees(const At& at) const { return at.query_position >= first && at.query_position <= last; }
  SeenBy seen_by(const Block& b) const {
    const Index begin = std::clamp<Index>(first - b.query_position, 0, b.n_queries);
    return {begin, std::clamp<Index>(last + 1 - b.query_position, begin, b.n_queries)};
  }
};

struct Random {
  std::mt19937 engine;
  Index operator()(Index low, Index high) { return std::uniform_int_distribution<Index>(low, high)(engine); }
};

constexpr Index n_rows = 40, n_positions = 60;

/// Rows and positions of a block are independent: a cache may hold any row anywhere.
Block random_block(Random& pick, Index lowest_query_position) {
  Block b;
  b.sequence = pick(0, 2), b.head = pick(0, 3);
  b.n_queries = pick(1, 9), b.n_keys = pick(1, 12);
  b.query = pick(0, n_rows - b.n_queries), b.key = pick(0, n_rows - b.n_keys);
  b.query_position = pick(lowest_query_position, n_positions - b.n_queries);
  b.key_position = pick(0, n_positions - b.n_keys);
  return b;
}

struct Count {
  Index seen = 0, pairs = 0;
  Cover exact() const { return seen == 0 ? Cover::none : seen == pairs ? Cover::all : Cover::some; }
};

template <class M>
Count brute_force(const M& mask, const Block& b) {
  Count c;
  for (Index i = 0; i < b.n_queries; ++i)
    for (Index j = 0; j < b.n_keys; ++j, ++c.pairs)
      c.seen += mask.sees({b.sequence, b.head, b.query + i, b.key + j, b.query_position + i, b.key_position + j});
  return c;
}

/// `some` is always legal; `exact` masks must not use it where they could say more.
template <class M>
void check_block(const M& mask, const Block& block, bool exact = false) {
  const Cover said = detail::cover(mask, block), true_cover = brute_force(mask, block).exact();
  if (said == true_cover || (said == Cover::some && !exact)) return;
  FAIL("cover " << static_cast<int>(said) << " but brute force " << static_cast<int>(true_cover) << ": queries "
                << block.query_position << "+" << block.n_queries << ", keys " << block.key_position << "+"
                << block.n_keys << ", rows " << block.query << ", " << block.key);
}

/// What a mask names as an interval is exactly what it lets see: the queries that see the block's first key, and the keys
/// that its first query sees. Says which of the two it names.
struct Named {
  bool queries, keys;
};
template <class M>
Named check_interval(const M& mask, const Block& block) {
  Block column = block, row = block;
  column.n_keys = row.n_queries = 1;
  const SeenBy queries = detail::seen_by(mask, column), keys = detail::keys_seen(mask, row);
  const auto check = [&](const SeenBy& said, Index i, const At& at) {
    if (said.exact && mask.sees(at) != (i >= said.begin && i < said.end))
      FAIL("[" << said.begin << ", " << said.end << ") are named, but not so " << i << ": query position "
               << at.query_position << ", key position " << at.key_position);
  };
  for (const SeenBy& said : {queries, keys})
    if (said.exact) REQUIRE((said.begin >= 0 && said.begin <= said.end));
  for (Index i = 0; i < block.n_queries; ++i)
    check(queries, i,
          {block.sequence, block.head, block.query + i, block.key, block.query_position + i, block.key_position});
  for (Index j = 0; j < block.n_keys; ++j)
    check(keys, j,
          {block.sequence, block.head, block.query, block.key + j, block.query_position, block.key_position + j});
  return {queries.exact, keys.exact};
}
template <class M>
bool named(const M& mask, const Block& block) {
  const Named both = check_interval(mask, block);
  return both.queries && both.keys;
}

/// Operands that every random mask may look at.
struct Operands {
  std::vector<Index> ids, valid;
  Matrix<bool> allowed{4 * n_rows, n_rows};
  std::vector<Window> windows;  // of each sequence

  explicit Operands(Random& pick) {
    Index id = 0;
    for (Index p = 0; p < n_positions; ++p) ids.push_back(id += pick(0, 9) == 0);
    for (int s = 0; s < 3; ++s) valid.push_back(pick(0, n_rows)), windows.push_back({pick(0, 20), pick(0, 20)});
    for (Index i = 0; i < allowed.size(); ++i) allowed.data()[i] = pick(0, 1) == 1;
  }
};

AnyMask random_mask(Random& pick, const Operands& o, int depth) {
  switch (depth > 0 ? pick(0, 14) : pick(0, 10)) {
    case 0:
      return any(full);
    case 1:
      return any(causal);
    case 2:
      return any(window(pick(0, 20), pick(0, 20)));
    case 3:
      return any(pick(0, 1) ? window(infinite, pick(0, 20)) : window(pick(0, 20), infinite));
    case 4:
      return any(prefix(pick(0, n_positions)));
    case 5:
      return any(lengths(o.valid));
    case 6:
      return any(documents(o.ids));
    case 7:
      return any(boolean_per_head(o.allowed, 4));
    case 8:
      return any(where([](const At& at) { return (at.query_position + at.key) % 3 != 0; }));
    case 9:
      return any(Band{pick(0, 30), pick(0, 60)});
    case 10:
      return any(per_sequence(o.windows));
    case 11:
    case 12:
      return any(random_mask(pick, o, depth - 1) & random_mask(pick, o, depth - 1));
    default:
      return any(random_mask(pick, o, depth - 1) | random_mask(pick, o, depth - 1));
  }
}

}  // namespace

TEST_CASE("cover of a block equals brute force for windows, prefixes and lengths, exactly", "[mask][laws]") {
  Random pick{std::mt19937(11)};
  for (int trial = 0; trial < 3000; ++trial) {
    const Operands o(pick);
    const Block block = random_block(pick, -20);
    check_block(full, block, true);
    check_block(per_sequence(o.windows), block, true);
    check_block(causal, block, true);
    check_block(window(infinite, infinite), block, true);
    check_block(window(pick(0, 25), pick(0, 25)), block, true);
    check_block(window(infinite, pick(0, 25)), block, true);
    check_block(window(pick(0, 25), infinite), block, true);
    check_block(Window{pick(-30, 25), pick(-30, 25)}, block);
    check_block(prefix(pick(0, n_positions + 5)), block, true);
    check_block(lengths(o.valid), block, true);
  }
}

TEST_CASE("cover of a block never contradicts brute force for documents and boolean matrices", "[mask][laws]") {
  Random pick{std::mt19937(12)};
  int decided = 0;
  for (int trial = 0; trial < 3000; ++trial) {
    Operands o(pick);
    if (trial % 2) std::shuffle(o.ids.begin(), o.ids.end(), pick.engine);  // ids need not be sorted
    const Block block = random_block(pick, 0);
    check_block(documents(o.ids), block);
    check_block(boolean_per_head(o.allowed, 4), block);
    decided += documents(o.ids).cover(block) != Cover::some;
  }
  CHECK(decided > 500);
}

TEST_CASE("cover of a block is exact for documents that lie one after another in blocks of one id", "[mask][laws]") {
  Random pick{std::mt19937(13)};
  for (int trial = 0; trial < 1000; ++trial) {
    const std::vector<Index> ids = [&] {
      std::vector<Index> v(static_cast<std::size_t>(n_positions));
      for (std::size_t p = 0; p < v.size(); ++p) v[p] = static_cast<Index>(p) / 20;
      return v;
    }();
    Block block = random_block(pick, 0);
    block.n_queries = std::min(block.n_queries, 20 - block.query_position % 20);
    block.n_keys = std::min(block.n_keys, 20 - block.key_position % 20);
    check_block(documents(ids), block, true);
  }
}

TEST_CASE("cover of a block never contradicts brute force under & and |", "[mask][laws]") {
  Random pick{std::mt19937(14)};
  int none = 0, some = 0, all = 0;
  for (int trial = 0; trial < 6000; ++trial) {
    const Operands o(pick);
    const AnyMask mask = random_mask(pick, o, 3);
    for (int i = 0; i < 3; ++i) {
      const Block block = random_block(pick, 0);
      check_block(mask, block);
      const Cover said = mask.cover(block);
      ++(said == Cover::none ? none : said == Cover::all ? all : some);
    }
  }
  CHECK(none > 1000);
  CHECK(some > 1000);
  CHECK(all > 1000);
}

TEST_CASE("the queries that see a key, and the keys that a query sees, are the intervals that a mask names",
          "[mask][laws]") {
  Random pick{std::mt19937(16)};
  int queries = 0, keys = 0;
  for (int trial = 0; trial < 6000; ++trial) {
    Operands o(pick);
    const Block low = random_block(pick, -20), block = random_block(pick, 0);
    for (const Window& w :
         {causal, window(pick(0, 25), pick(0, 25)), window(infinite, pick(0, 25)), window(pick(0, 25), infinite),
          window(infinite, infinite), Window{pick(-30, 25), pick(-30, 25)}, Window{infinite, pick(-30, -1)}})
      REQUIRE(named(w, low));
    REQUIRE(named(full, low));
    REQUIRE(named(prefix(pick(0, n_positions)), low));
    REQUIRE(named(lengths(o.valid), low));
    REQUIRE(named(causal & lengths(o.valid), low));
    REQUIRE(named(documents(o.ids), block));  // one document after another
    REQUIRE(named(causal & documents(o.ids), block));
    for (int depth = 1; depth < 4; ++depth) {
      const Named both = check_interval(random_mask(pick, o, depth), block);
      queries += both.queries, keys += both.keys;
    }
    std::shuffle(o.ids.begin(), o.ids.end(), pick.engine);
    check_interval(documents(o.ids), block);
  }
  CHECK(queries > 5000);
  CHECK(keys > 5000);
  // Two intervals with a gap between them are no interval.
  const Block block{.n_queries = 9};
  CHECK(!(Band{0, 2} | Band{5, 7}).seen_by(block).exact);
  CHECK(check_interval(Band{0, 2} | Band{3, 7}, block).queries);
  CHECK(check_interval(Band{0, 5} & Band{3, 7}, block).queries);
  const std::vector<Index> ids{0, 1, 0};
  CHECK(!documents(ids).seen_by({.n_queries = 3}).exact);
  CHECK(!documents(ids).keys_seen({.n_keys = 3}).exact);
}

TEST_CASE("& sees what both see and | sees what either sees, and blocks are skipped accordingly", "[mask][laws]") {
  Random pick{std::mt19937(15)};
  const std::pair<Cover, Cover> cases[] = {{Cover::none, Cover::none}, {Cover::none, Cover::some},
                                           {Cover::none, Cover::all},  {Cover::some, Cover::some},
                                           {Cover::some, Cover::all},  {Cover::all, Cover::all}};
  for (const auto& [x, y] : cases)
    for (const bool swapped : {false, true}) {
      const Cover first = swapped ? y : x, second = swapped ? x : y;
      const AnyMask a{[](const At&) { return true; }, [first](const Block&) { return first; }};
      const AnyMask b{[](const At&) { return true; }, [second](const Block&) { return second; }};
      CHECK((a & b).cover({}) == std::min(x, y));
      CHECK((a | b).cover({}) == std::max(x, y));
    }
  for (int trial = 0; trial < 2000; ++trial) {
    const Operands o(pick);
    const AnyMask a = random_mask(pick, o, 1), b = random_mask(pick, o, 1);
    const Block at_corner = random_block(pick, 0);
    const At at{at_corner.sequence, at_corner.head,           at_corner.query,
                at_corner.key,      at_corner.query_position, at_corner.key_position};
    REQUIRE((a & b).sees(at) == (a.sees(at) && b.sees(at)));
    REQUIRE((a | b).sees(at) == (a.sees(at) || b.sees(at)));
  }
}

TEST_CASE("windows without bounds and positions far from zero do not overflow", "[mask][laws]") {
  const Index most = std::numeric_limits<Index>::max();
  for (const Index p : {Index{0}, most / 2, most - 20, -most / 2})
    for (const Window w : {window(infinite, 0), window(0, infinite), window(infinite, infinite), window(most - 1, 3),
                           window(3, most - 1), window(7, 2)})
      for (const Index offset : {-12, -3, 0, 5}) {
        if (p == -most / 2 && offset < 0) continue;
        const Block block{0, 0, 0, 5, p, 0, 4, std::max<Index>(0, p + offset)};
        check_block(w, block, true);
        CHECK(named(w, block));
      }
}

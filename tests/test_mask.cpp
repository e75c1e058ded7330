#include <qkv/mask.hpp>

#include "support/catch.hpp"
#include "support/numbers.hpp"

using namespace support;
using namespace qkv;

namespace {

struct Diagonal {
  bool sees(const At& at) const { return at.query_position == at.key_position; }
};
struct OnlyCover {
  Cover cover(const Block&) const { return Cover::all; }
};

static_assert(Mask<Full> && Mask<Window> && Mask<Prefix>);
static_assert(Mask<Diagonal> && Mask<decltype(causal & prefix(3))> && !Mask<OnlyCover> && !Mask<int>);
static_assert(MaskFunction<decltype([](const At&) { return true; })>);
static_assert(!MaskFunction<decltype([](const At&) { return 1; })>);  // a score, not a mask
static_assert(!MaskFunction<decltype([](float s, const At&) { return s; })>);

template <class A, class B>
concept CanBeJoined = requires(const A& a, const B& b) {
  a& b;
  a | b;
};
static_assert(CanBeJoined<Window, Prefix> && CanBeJoined<Window, decltype([](const At&) { return true; })>);
static_assert(!CanBeJoined<Window, int> && !CanBeJoined<Window, OnlyCover>);

// Who asks for the head is asked for every head, and with it whoever is joined to it.
template <class M>
constexpr bool alike = qkv::detail::ignores_heads<M>;
static_assert(alike<Full> && alike<Window> && alike<Prefix> && alike<decltype((prefix(3) | causal) & prefix(5))>);
static_assert(!alike<Diagonal> && !alike<decltype(causal & Diagonal{})> && !alike<decltype(Diagonal{} | prefix(5))>);

// Masks that need no memory work at compile time.
static_assert(causal.sees({.query_position = 3, .key_position = 3}) &&
              !causal.sees({.query_position = 3, .key_position = 4}));
static_assert((causal & prefix(2)).cover({.query_position = 5, .key_position = 2}) == Cover::none);

/// At these positions, in rows of the same numbers.
At pair(Index query, Index key) { return {0, 0, query, key, query, key}; }

/// One character per key, one line per query.
template <class M>
std::string picture(const M& mask, Index n_queries, Index n_keys) {
  std::string text;
  for (Index i = 0; i < n_queries; ++i, text += '\n')
    for (Index j = 0; j < n_keys; ++j) text += mask.sees(pair(i, j)) ? 'x' : '.';
  return text;
}

}  // namespace

TEST_CASE("each mask draws its picture", "[mask]") {
  CHECK(picture(full, 2, 3) == "xxx\nxxx\n");
  CHECK(picture(causal, 3, 4) == "x...\nxx..\nxxx.\n");
  CHECK(picture(window(1, 0), 4, 4) == "x...\nxx..\n.xx.\n..xx\n");
  CHECK(picture(window(0, 2), 3, 5) == "xxx..\n.xxx.\n..xxx\n");
  CHECK(picture(window(0, 0), 3, 3) == "x..\n.x.\n..x\n");
  CHECK(picture(window(infinite, 1), 3, 4) == "xx..\nxxx.\nxxxx\n");
  CHECK(picture(window(infinite, infinite), 2, 3) == "xxx\nxxx\n");
  CHECK(picture(prefix(2), 2, 4) == "xx..\nxx..\n");
  CHECK(picture(Diagonal{}, 3, 3) == "x..\n.x.\n..x\n");
}

TEST_CASE("masks compose", "[mask]") {
  CHECK(picture(causal | prefix(2), 3, 4) == "xx..\nxx..\nxxx.\n");
  CHECK(picture((prefix(1) | window(1, 0)) & causal, 4, 4) == "x...\nxx..\nxxx.\nx.xx\n");
  const auto even = [](const At& at) { return at.key % 2 == 0; };
  CHECK(picture(causal & even, 3, 4) == "x...\nx...\nx.x.\n");
  CHECK(picture(even | window(0, 0), 3, 4) == "x.x.\nxxx.\nx.x.\n");
  CHECK(picture(where(even), 1, 4) == "x.x.\n");
  CHECK(picture(where(even) & where([](const At& at) { return at.query == 1; }), 2, 3) == "...\nx.x\n");
}

TEST_CASE("a window sees left + right + 1 keys", "[mask]") {
  for (const Index left : {0, 1, 5})
    for (const Index right : {0, 2, 7}) {
      Index seen = 0;
      for (Index key = -50; key < 50; ++key)
        seen += window(left, right).sees({.query_position = 3, .key_position = key});
      CHECK(seen == left + right + 1);
    }
  CHECK(contains(message_of([] { window(-1, 0); }), "left >= 0 and right >= 0"));
  CHECK(contains(message_of([] { window(0, -3); }), "given 0 and -3"));
}

TEST_CASE("a window made by hand is refused by a call where window() refuses it, and is defined for any numbers",
          "[mask]") {
  CHECK(contains(message_of([] { Window{-3, 1}.check({}); }), "left >= 0 and right >= 0"));
  CHECK(contains(message_of([] { (causal & Window{1, -1}).check({}); }), "given 1 and -1"));
  CHECK(message_of([] { Window{}.check({}); }).empty());
  CHECK(picture(Window{-3, 1}, 3, 6) == "......\n......\n......\n");
  CHECK(picture(Window{-1, 2}, 3, 6) == ".xx...\n..xx..\n...xx.\n");
  CHECK(picture(Window{infinite, -1}, 3, 3) == "...\nx..\nxx.\n");

  // No number of any field overflows. (Positions from ±2⁶² on are refused by a call.)
  constexpr Index most = std::numeric_limits<Index>::max(), least = std::numeric_limits<Index>::min();
  const Index ends[] = {least, least + 1, least / 2, -3, -1, 0, 1, 3, most / 2, most - 1, most};
  for (const Index left : ends)
    for (const Index right : ends)
      for (const Index query : ends)
        for (const Index key : ends) {
          const Window w{left, right};
          const auto wide = [](Index i) { return static_cast<long double>(i); };
          const bool sees = (left == infinite || wide(query) - wide(left) <= wide(key)) &&
                            (right == infinite || wide(key) <= wide(query) + wide(right));
          if (std::abs(wide(query)) > 0x1p62L || std::abs(wide(key)) > 0x1p62L) {
            w.sees(pair(query, key));
            continue;
          }
          const Block block{.query_position = query, .key_position = key};
          CHECK(w.sees(pair(query, key)) == sees);
          CHECK(w.cover(block) == (sees ? Cover::all : Cover::none));
          CHECK(w.seen_by(block).end - w.seen_by(block).begin == (sees ? 1 : 0));
        }
  CHECK(!Prefix{least}.sees(pair(0, 0)));
  CHECK(Prefix{most}.sees(pair(0, 3)));
}

TEST_CASE("windows and prefixes look at positions, not at rows", "[mask]") {
  const At at{.sequence = 1, .head = 2, .query = 0, .key = 1, .query_position = 100, .key_position = 90};
  CHECK(window(10, 0).sees(at));
  CHECK(!window(9, 0).sees(at));
  CHECK(prefix(91).sees(at));
  CHECK(!prefix(90).sees(at));
}

#include <qkv/attention.hpp>

#include "support/attention_case.hpp"

// Every kernel under every positional mask; operands per call (lengths, documents, matrices) are in
// test_attention_masks.cpp, scores in test_attention_scores.cpp.

using namespace support;
using namespace qkv;

namespace {

bool third(Index page, Index head) { return (page + head) % 3 != 1; }

struct EveryThird {  // a user's mask that helps the kernels, differently in each head
  bool sees(const At& at) const { return third(at.key_position / 64, at.head); }
  Cover cover(const Block& b) const {
    const Index first = b.key_position / 64, last = b.last_key_position() / 64;
    if (first != last) return Cover::some;
    return third(first, b.head) ? Cover::all : Cover::none;
  }
};

}  // namespace

TEMPLATE_TEST_CASE("every kernel is the definition when everybody sees everything", "[attention]", float, double) {
  for (const Case& c : shapes()) check_kernels<TestType, Types::kept>(c, full, plain, everyone, unchanged);
}

TEMPLATE_TEST_CASE("every kernel is the definition under causal and windows", "[attention]", float, double) {
  for (const Case& c : shapes()) {
    check_kernels<TestType, Types::kept>(
        c, causal, plain, [](const At& at) { return at.key_position <= at.query_position; }, unchanged);
    for (const auto& [left, right] : {std::pair<Index, Index>{9, 4}, {150, 0}, {0, 70}, {0, 0}})
      check_kernels<TestType>(
          c, window(left, right), plain,
          [l = left, r = right](const At& at) {
            const Index distance = at.key_position - at.query_position;
            return distance >= -l && distance <= r;
          },
          unchanged);
    check_kernels<TestType>(
        c, window(infinite, 3), plain, [](const At& at) { return at.key_position - at.query_position <= 3; },
        unchanged);
  }
}

TEMPLATE_TEST_CASE("every kernel is the definition under composed masks", "[attention]", float, double) {
  for (const Case& c : shapes()) {
    check_kernels<TestType>(
        c, prefix(100), plain, [](const At& at) { return at.key_position < 100; }, unchanged);
    check_kernels<TestType, Types::kept>(
        c, (prefix(16) | window(64, 0)) & causal, plain,
        [](const At& at) {
          return at.key_position <= at.query_position &&
                 (at.key_position < 16 || at.query_position - at.key_position <= 64);
        },
        unchanged);
  }
}

TEMPLATE_TEST_CASE("every kernel is the definition under masks that users write", "[attention]", float, double) {
  for (const Case& c : shapes()) {
    check_kernels<TestType>(
        c, EveryThird{}, plain, [](const At& at) { return (at.key_position / 64 + at.head) % 3 != 1; }, unchanged);
    check_kernels<TestType>(
        c, [](const At& at) { return (at.query + 2 * at.key + at.head) % 3 == 0; }, plain,
        [](const At& at) { return (at.query + 2 * at.key + at.head) % 3 == 0; }, unchanged);
  }
}

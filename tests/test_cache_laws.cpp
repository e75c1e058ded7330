// Ten thousand random operations on each cache (append, overwrite, go back, drop, fork, copy, save and load), compared after every
// one with a model that only knows what the words mean: rows in a list, rows by position, pages behind shared pointers.

#include "support/cache_rows.hpp"
#include "support/catch.hpp"

#include <qkv/saved_cache.hpp>

#include <algorithm>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <random>
#include <set>
#include <sstream>
#include <stdexcept>
#include <vector>

using namespace qkv;
using support::HeldRow;
using support::holds;

namespace {

constexpr int operations = 10000;

class Dice {
 public:
  explicit Dice(std::uint32_t seed) : engine_(seed) {}
  Index roll(Index low, Index high) {  // both included
    return low + static_cast<Index>(engine_() % static_cast<std::uint32_t>(high - low + 1));
  }
  /// So many ids that were never given before.
  std::vector<Index> fresh_ids(Index n) {
    std::vector<Index> ids;
    for (Index i = 0; i < n; ++i) ids.push_back(next_id_++);
    return ids;
  }

 private:
  std::mt19937 engine_;
  Index next_id_ = 0;
};

template <class F>
bool raises(F&& f) {
  try {
    f();
  } catch (const std::length_error&) {
    return true;
  } catch (const std::out_of_range&) {
    return true;
  }
  return false;
}

/// Through a file, which is cut first: the cut one must be refused and leave `to` as it is.
template <class From, class To>
bool saved_and_loaded(const From& from, To& to, Index cut) {
  std::ostringstream out;
  save_cache(out, from);
  const std::string bytes = out.str();
  std::istringstream broken(bytes.substr(0, static_cast<std::size_t>(cut) % bytes.size())), whole(bytes);
  const Index position = to.position(), rows = to.rows();
  const bool refused = !try_load_cache(broken, to) && to.position() == position && to.rows() == rows;
  return refused && try_load_cache(whole, to);
}

/// Every row there is, in a list.
struct ListModel {
  std::vector<Index> rows;

  void drop(Index first, Index n) { rows.erase(rows.begin() + first, rows.begin() + first + n); }
  std::vector<HeldRow> held() const {
    std::vector<HeldRow> all;
    for (std::size_t i = 0; i < rows.size(); ++i) all.push_back({static_cast<Index>(i), rows[i]});
    return all;
  }
};

/// Rows by position; a row beside the pinned ones is lost when the one `ring` positions later is written.
struct RingModel {
  Index window, pinned, ring, position = 0;
  std::map<Index, Index> rows;

  bool sees_all(Index p) const {
    for (Index seen = 0; seen < p; ++seen)
      if ((seen < pinned || seen >= p - window) && rows.count(seen) == 0) return false;
    return true;
  }
  void write(Index p, Index id) {
    rows[p] = id;
    if (p - ring >= pinned) rows.erase(p - ring);
    position = std::max(position, p + 1);
  }
  /// n rows may come if, with them in place, a query at `position` still has all it sees, and none of them is lost.
  bool takes(Index n) const {
    RingModel after = *this;
    for (Index i = 0; i < n; ++i) after.write(position + i, 0);
    for (Index i = 0; i < n; ++i)
      if (after.rows.count(position + i) == 0) return false;
    return after.sees_all(position);
  }
  void truncate(Index p) {
    position = p;
    rows.erase(rows.lower_bound(p), rows.end());
  }
  std::vector<HeldRow> held() const {
    std::vector<HeldRow> all;
    for (const auto& [position_of_row, id] : rows) all.push_back({position_of_row, id});
    return all;
  }
};

using ModelPage = std::vector<Index>;

/// A table of shared pages; who writes into a page that others hold takes a copy.
struct PagedModel {
  std::vector<std::shared_ptr<ModelPage>> table;
  Index rows = 0;

  void write(Index p, Index id, Index page_tokens) {
    const auto page = static_cast<std::size_t>(p / page_tokens);
    if (page == table.size()) table.push_back(std::make_shared<ModelPage>(page_tokens, -1));
    if (table[page].use_count() > 1) table[page] = std::make_shared<ModelPage>(*table[page]);
    (*table[page])[static_cast<std::size_t>(p % page_tokens)] = id;
    rows = std::max(rows, p + 1);
  }
  void drop(Index first, Index n, Index page_tokens) {
    const std::vector<HeldRow> before = held(page_tokens);
    const Index left = rows - n;
    for (Index p = first; p < left; ++p) write(p, before[static_cast<std::size_t>(p + n)].id, page_tokens);
    truncate(left, page_tokens);
  }
  void truncate(Index p, Index page_tokens) {
    table.resize(static_cast<std::size_t>((p + page_tokens - 1) / page_tokens));
    rows = p;
  }
  std::vector<HeldRow> held(Index page_tokens) const {
    std::vector<HeldRow> all;
    for (Index p = 0; p < rows; ++p)
      all.push_back(
          {p, (*table[static_cast<std::size_t>(p / page_tokens)])[static_cast<std::size_t>(p % page_tokens)]});
    return all;
  }
};

std::set<const ModelPage*> pages_in_use(const std::vector<PagedModel>& sequences) {
  std::set<const ModelPage*> pages;
  for (const PagedModel& sequence : sequences)
    for (const auto& page : sequence.table) pages.insert(page.get());
  return pages;
}

}  // namespace

TEMPLATE_TEST_CASE("a contiguous cache is a list of rows", "", float, bfloat16, std::int8_t) {
  for (const Index block : {0, 3}) {
    Dice dice(7);
    const Index capacity = 15;
    KvCache<TestType> cache({.kv_heads = 2, .head_dim = 3, .v_head_dim = 5, .capacity = capacity, .block = block});
    ListModel model;
    for (int step = 0; step < operations / 2; ++step) {
      const Index held = static_cast<Index>(model.rows.size());
      const Index kind = dice.roll(0, 20);
      bool refused = false, should_refuse = false;
      if (kind < 8) {
        const auto ids = dice.fresh_ids(dice.roll(0, 4));
        should_refuse = held + static_cast<Index>(ids.size()) > capacity;
        refused = kind < 4 ? !support::try_append_ids(cache, ids) : raises([&] { support::append_ids(cache, ids); });
        if (!should_refuse) model.rows.insert(model.rows.end(), ids.begin(), ids.end());
      } else if (kind < 13) {
        const Index to = dice.roll(-1, capacity);
        should_refuse = to < 0 || to > held;
        refused = kind < 10 ? !cache.try_truncate(to) : raises([&] { cache.truncate(to); });
        if (!should_refuse) model.rows.resize(static_cast<std::size_t>(to));
      } else if (kind < 18) {
        const auto ids = dice.fresh_ids(dice.roll(0, 5));
        const Index n = static_cast<Index>(ids.size()), at = dice.roll(-1, capacity);
        should_refuse = at < 0 || at > held || at + n > capacity;
        refused = raises([&] { support::scatter_ids(cache, at, ids); });
        if (!should_refuse) {
          model.rows.resize(static_cast<std::size_t>(std::max(held, at + n)));
          std::copy(ids.begin(), ids.end(), model.rows.begin() + at);
        }
      } else if (kind == 20) {  // without a rotation: as they are
        const Index first = dice.roll(-1, held), n = dice.roll(-1, 5);
        should_refuse = first < 0 || n < 0 || first + n > held;
        refused = raises([&] { cache.drop_rows(first, n, std::nullopt); });
        if (!should_refuse) model.drop(first, n);
      } else if (kind == 18) {
        KvCache<TestType> copy = cache;
        if (dice.roll(0, 1) == 0) {  // through a file and a cache of other blocks
          KvCache<TestType> other(
              {.kv_heads = 2, .head_dim = 3, .v_head_dim = 5, .capacity = capacity, .block = 3 - block});
          REQUIRE(saved_and_loaded(copy, other, step));
          cache.truncate(dice.roll(0, held));
          REQUIRE(saved_and_loaded(other, cache, 7 * step));
        } else {
          cache = std::move(copy);
        }
      } else if (dice.roll(0, 9) == 0) {
        cache.clear();
        model.rows.clear();
      }
      const bool same = holds(cache.key_rows(), model.held());
      const Index rows = static_cast<Index>(model.rows.size());
      const bool counts = cache.rows() == rows && cache.position() == rows && cache.max_append() == capacity - rows;
      if (refused != should_refuse || !same || !counts) {
        INFO("operation " << step << " of kind " << kind << ", block " << block);
        REQUIRE(refused == should_refuse);
        REQUIRE(same);
        REQUIRE(counts);
      }
    }
    REQUIRE(cache.capacity() == capacity);
  }
}

TEMPLATE_TEST_CASE("a ring is a map of positions that loses a row when another takes its place", "", float, half,
                   std::int8_t) {
  struct Sizes {
    Index window, pinned, slack;
  };
  for (const Sizes& s : {Sizes{5, 2, 3}, Sizes{4, 0, 1}, Sizes{0, 3, 2}, Sizes{2, 1, 6}}) {
    Dice dice(static_cast<std::uint32_t>(11 + s.window));
    RingCache<TestType> cache(
        {.kv_heads = 2, .head_dim = 3, .v_head_dim = 5, .window = s.window, .pinned = s.pinned, .slack = s.slack});
    RingModel model{.window = s.window, .pinned = s.pinned, .ring = s.window + s.slack, .rows = {}};
    for (int step = 0; step < operations / 4; ++step) {
      const Index kind = dice.roll(0, 19);
      bool refused = false, should_refuse = false;
      if (kind < 10) {
        const auto ids = dice.fresh_ids(dice.roll(0, kind < 7 ? 2 : s.slack + 2));
        should_refuse = !model.takes(static_cast<Index>(ids.size()));
        refused = kind < 5 ? !support::try_append_ids(cache, ids) : raises([&] { support::append_ids(cache, ids); });
        if (!should_refuse)
          for (const Index id : ids) model.write(model.position, id);
      } else if (kind < 14) {
        const Index to = model.position - dice.roll(-1, kind == 10 ? model.position + 1 : s.slack + 1);
        should_refuse = to < 0 || to > model.position || !model.sees_all(to);
        refused = kind < 12 ? !cache.try_truncate(to) : raises([&] { cache.truncate(to); });
        if (!should_refuse) model.truncate(to);
      } else if (kind < 18) {
        const auto ids = dice.fresh_ids(dice.roll(0, 3));
        const Index n = static_cast<Index>(ids.size());
        const Index at = kind < 17 ? model.position - dice.roll(-1, s.window + 2) : dice.roll(0, s.pinned);
        if (n == 0) continue;
        should_refuse = at < 0 || at > model.position || !model.takes(std::max<Index>(0, at + n - model.position));
        for (Index p = at; p < std::min(at + n, model.position); ++p)
          should_refuse = should_refuse || model.rows.count(p) == 0;
        refused = raises([&] { support::scatter_ids(cache, at, ids); });
        if (!should_refuse)
          for (Index i = 0; i < n; ++i) model.write(at + i, ids[static_cast<std::size_t>(i)]);
      } else if (kind == 18) {
        RingCache<TestType> copy = cache;
        if (dice.roll(0, 1) == 0) {
          (void)cache.try_truncate(dice.roll(0, model.position));
          REQUIRE(saved_and_loaded(copy, cache, step));
        } else {
          cache = std::move(copy);
        }
      } else if (dice.roll(0, 9) == 0) {
        cache.clear();
        model.truncate(0);
      }
      Index most = 0;
      while (model.takes(most + 1)) ++most;
      const bool same = holds(cache.key_rows(), model.held());
      const bool counts = cache.position() == model.position && cache.rows() == static_cast<Index>(model.rows.size()) &&
                          cache.max_append() == most;
      if (refused != should_refuse || !same || !counts) {
        INFO("operation " << step << " of kind " << kind << ", window " << s.window << ", pinned " << s.pinned
                          << ", slack " << s.slack << ", position " << model.position);
        REQUIRE(refused == should_refuse);
        REQUIRE(same);
        REQUIRE(counts);
      }
    }
    REQUIRE(cache.capacity() == s.window + s.pinned + s.slack);
  }
}

TEMPLATE_TEST_CASE("paged sequences are tables of shared pages", "", float, half, std::int8_t) {
  Dice dice(13);
  const Index pages = 14, page_tokens = 3, most_sequences = 6;
  PagePool<TestType> pool({.kv_heads = 2, .head_dim = 3, .v_head_dim = 5, .page_tokens = page_tokens, .pages = pages});
  std::vector<PagedCache<TestType>> caches;
  std::vector<PagedModel> models;
  int exhausted = 0, undroppable = 0;
  for (int step = 0; step < operations; ++step) {
    const Index kind = dice.roll(0, 21);
    if (caches.empty() || (kind == 0 && static_cast<Index>(caches.size()) < most_sequences)) {
      caches.emplace_back(pool);
      models.emplace_back();
    }
    const auto s = static_cast<std::size_t>(dice.roll(0, static_cast<Index>(caches.size()) - 1));
    const Index held = models[s].rows, free = pages - static_cast<Index>(pages_in_use(models).size());
    bool refused = false, should_refuse = false;
    const auto missing = [&](Index at, Index n) {
      Index needed = 0;  // pages that are not there yet, or that others hold too
      const auto end_page = static_cast<std::size_t>((at + n + page_tokens - 1) / page_tokens);
      for (auto page = static_cast<std::size_t>(at / page_tokens); page < end_page; ++page)
        needed += page >= models[s].table.size() || models[s].table[page].use_count() > 1;
      return needed > free;
    };
    if (kind < 13) {
      const bool append = kind < 9;
      const auto ids = dice.fresh_ids(dice.roll(1, 5));
      const Index n = static_cast<Index>(ids.size()), at = append ? held : dice.roll(-1, held + 1);
      should_refuse = at < 0 || at > held || missing(at, n);
      exhausted += should_refuse && append;
      if (append && kind < 5)
        refused = !support::try_append_ids(caches[s], ids);
      else
        refused = raises([&] { support::scatter_ids(caches[s], at, ids); });
      if (!should_refuse)
        for (Index i = 0; i < n; ++i) models[s].write(at + i, ids[static_cast<std::size_t>(i)], page_tokens);
    } else if (kind < 16) {
      const Index to = dice.roll(-1, held + 1);
      should_refuse = to < 0 || to > held;
      refused = kind < 14 ? !caches[s].try_truncate(to) : raises([&] { caches[s].truncate(to); });
      if (!should_refuse) models[s].truncate(to, page_tokens);
    } else if (kind > 19) {  // without a rotation: as they are
      const Index first = dice.roll(-1, held), n = dice.roll(-1, 4), moved = held - n - first;
      should_refuse = first < 0 || n < 0 || moved < 0;
      if (!should_refuse && n > 0 && moved > 0 && missing(first, moved)) should_refuse = true, ++undroppable;
      refused = raises([&] { caches[s].drop_rows(first, n, std::nullopt); });
      if (!should_refuse && n > 0) models[s].drop(first, n, page_tokens);
    } else if (kind < 18) {
      if (static_cast<Index>(caches.size()) < most_sequences) {
        const Index to = dice.roll(0, 1) == 0 ? held : dice.roll(0, held);
        caches.push_back(caches[s].fork(to));
        models.push_back(models[s]);
        models.back().truncate(to, page_tokens);
      }
    } else if (kind == 18 && dice.roll(0, 1) == 0) {
      // From a file into another sequence: a copy of its own, in pages of its own.
      const auto to = static_cast<std::size_t>(dice.roll(0, static_cast<Index>(caches.size()) - 1));
      std::vector<PagedModel> others = models;
      others[to] = {};
      should_refuse = pages - static_cast<Index>(pages_in_use(others).size()) < (held + page_tokens - 1) / page_tokens;
      std::vector<HeldRow> rows = models[s].held(page_tokens);
      others.clear();
      refused = !saved_and_loaded(caches[s], caches[to], step);
      if (!should_refuse) {
        models[to] = {};
        for (const HeldRow& row : rows) models[to].write(row.position, row.id, page_tokens);
      }
    } else if (kind == 18) {
      caches[s] = std::move(caches.back());
      caches.pop_back();
      if (s + 1 < models.size()) models[s] = models.back();
      models.pop_back();
    } else {
      caches[s].clear();
      models[s] = {};
    }

    const Index in_use = static_cast<Index>(pages_in_use(models).size());
    bool same = pool.free_pages() == pages - in_use, counts = true, references = true;
    for (std::size_t c = 0; c < caches.size(); ++c) {
      same = same && holds(caches[c].key_rows(), models[c].held(page_tokens));
      counts = counts && caches[c].rows() == models[c].rows && caches[c].pages().size() == models[c].table.size();
      for (std::size_t i = 0; i < models[c].table.size(); ++i)
        references = references && pool.references(caches[c].pages()[i]) == models[c].table[i].use_count();
    }
    if (refused != should_refuse || !same || !counts || !references) {
      INFO("operation " << step << " of kind " << kind);
      REQUIRE(refused == should_refuse);
      REQUIRE(same);
      REQUIRE(counts);
      REQUIRE(references);
    }
  }
  REQUIRE(exhausted > 50);
  REQUIRE(undroppable > 3);
  caches.clear();
  REQUIRE(pool.free_pages() == pages);
}

TEMPLATE_TEST_CASE("a latent cache is a list of latents and rope keys", "", float, std::int8_t) {
  Dice dice(17);
  const Index capacity = 13;
  LatentCache<TestType> cache({.latent_dim = 7, .rope_dim = 4, .capacity = capacity});
  ListModel model;
  const auto latent = [](const std::vector<Index>& ids) { return support::cache_rows<float>(ids, 1, 7, false); };
  const auto rope = [](const std::vector<Index>& ids) { return support::cache_rows<float>(ids, 1, 4, true); };
  for (int step = 0; step < operations; ++step) {
    const Index held = static_cast<Index>(model.rows.size());
    const Index kind = dice.roll(0, 10);
    bool refused = false, should_refuse = false;
    if (kind == 10) {
      const Index first = dice.roll(-1, held), n = dice.roll(-1, 4);
      should_refuse = first < 0 || n < 0 || first + n > held;
      refused = raises([&] { cache.drop_rows(first, n, std::nullopt); });
      if (!should_refuse) model.drop(first, n);
    } else if (kind < 5) {
      const auto ids = dice.fresh_ids(dice.roll(0, 4));
      should_refuse = held + static_cast<Index>(ids.size()) > capacity;
      refused =
          kind < 2 ? !cache.try_append(latent(ids), rope(ids)) : raises([&] { cache.append(latent(ids), rope(ids)); });
      if (!should_refuse) model.rows.insert(model.rows.end(), ids.begin(), ids.end());
    } else if (kind < 8) {
      const Index to = dice.roll(-1, capacity);
      should_refuse = to < 0 || to > held;
      refused = kind < 6 ? !cache.try_truncate(to) : raises([&] { cache.truncate(to); });
      if (!should_refuse) model.rows.resize(static_cast<std::size_t>(to));
    } else if (kind == 8) {
      LatentCache<TestType> copy = cache;
      if (dice.roll(0, 1) == 0) {
        cache.truncate(dice.roll(0, held));
        REQUIRE(saved_and_loaded(copy, cache, step));
      } else {
        cache = std::move(copy);
      }
    } else if (dice.roll(0, 9) == 0) {
      cache.clear();
      model.rows.clear();
    }
    const bool same = support::max_error(cache.latent(), latent(model.rows)) == 0 &&
                      support::max_error(cache.rope_keys(), rope(model.rows)) == 0;
    if (refused != should_refuse || !same) {
      INFO("operation " << step << " of kind " << kind);
      REQUIRE(refused == should_refuse);
      REQUIRE(same);
    }
  }
  REQUIRE(cache.position() == static_cast<Index>(model.rows.size()));
}

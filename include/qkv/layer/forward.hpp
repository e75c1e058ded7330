// layer/forward.hpp — the calls of both layers: sequences with a cache each; a single one is a batch of one.
//
//     check             operands, options, caches, mask and score: nothing is evicted or written before all of it holds
//     find room         in all caches together
//     project           all rows at once                                     Layer::project
//     norm, rotate      the rows of each sequence at its positions           Layer::finish
//     append            to all caches, or to none                            Layer::append, layer/appended.hpp
//     attend            each sequence to the rows in its cache               Layer::attend
//     output            all rows at once
//
// Masks, scores and executors are passed as plain functions, so this is compiled once per layer and kind of cache. In a
// ring, the first of the new rows must still see the old ones of its window: where a ring gets more than it can append
// at once, the sequences run one after another, a piece at a time.
//
// Before: layer/common.hpp   Next: layer/appended.hpp
#pragma once

#include <algorithm>
#include <iterator>
#include <span>
#include <type_traits>

#include "appended.hpp"
#include "batch_rows.hpp"
#include "common.hpp"
#include "shared_prefix.hpp"

namespace qkv { inline namespace QKV_ABI { namespace detail {

struct LayerExplainer;

/// The type that a list of addresses points to, and the list as a span.
template <class L>
using Listed = std::remove_pointer_t<std::remove_cvref_t<decltype(*std::data(std::declval<const L&>()))>>;
template <class L>
using ListView = std::span<Listed<L>* const>;

template <class C, class Layer>
concept CacheOf = Layer::template serves<C>;
/// The addresses of a batch's caches: a std::vector, an array or a std::span of pointers.
template <class L, class Layer>
concept CachesOf = CacheOf<Listed<L>, Layer> && std::convertible_to<const L&, ListView<L>>;

/// What both layers offer. The mask is causal by default and for `{}`, the score plain.
template <class Layer, class T>
class LayerCalls {
 public:
  /// The next tokens of the cache's sequence: a prompt, a chunk of one, or a single new token. Appends their rows,
  /// attends to all that the cache holds. Full caches throw std::length_error. After any exception, of an allocation
  /// too, caches are as they were; rows that a ring overwrites are saved in its workspace until the call returns.
  template <MatrixLike X, CacheOf<Layer> C, InMaskPlace M = Omitted, class F = Omitted, Executor E = Serial>
  Matrix<T> forward(const X& x, C& cache, const M& mask = {}, const F& score = {}, const LayerOptions& options = {},
                    const E& executor = serial) const {
    Matrix<T> out(x.rows(), model_dim());
    forward_into(out, viewable(x), cache, mask, score, options, executor);
    return out;
  }
  template <MatrixLike X, CacheOf<Layer> C, Executor E = Serial>
  Matrix<T> forward(const X& x, C& cache, const LayerOptions& options, const E& executor = serial) const {
    return forward(x, cache, Omitted{}, Omitted{}, options, executor);
  }

  /// The same into out [n, model_dim], which shares no element with x. Allocates nothing once the cache's workspace is
  /// warm (serial executor).
  template <MatrixLike Out, MatrixLike X, CacheOf<Layer> C, InMaskPlace M = Omitted, class F = Omitted,
            Executor E = Serial>
  void forward_into(Out&& out, const X& x, C& cache, const M& mask = {}, const F& score = {},
                    const LayerOptions& options = {}, const E& executor = serial) const {
    const Index row_offsets[] = {0, x.rows()};
    C* const caches[] = {&cache};
    forward_into(out, x, std::span<const Index>(row_offsets), caches, mask, score, options, executor);
  }
  template <MatrixLike Out, MatrixLike X, CacheOf<Layer> C, Executor E = Serial>
  void forward_into(Out&& out, const X& x, C& cache, const LayerOptions& options, const E& executor = serial) const {
    forward_into(out, x, cache, Omitted{}, Omitted{}, options, executor);
  }

  /// The next tokens of several sequences: rows row_offsets[s] … row_offsets[s+1]-1 of x belong to the cache at
  /// caches[s]. One projection for all rows (with a ring: where no sequence needs pieces); each sequence gives the same
  /// bits as alone. Either all caches append their rows or none.
  template <MatrixLike X, CachesOf<Layer> L, InMaskPlace M = Omitted, class F = Omitted, Executor E = Serial>
  Matrix<T> forward(const X& x, std::span<const Index> row_offsets, const L& caches, const M& mask = {},
                    const F& score = {}, const LayerOptions& options = {}, const E& executor = serial) const {
    Matrix<T> out(x.rows(), model_dim());
    forward_into(out, viewable(x), row_offsets, caches, mask, score, options, executor);
    return out;
  }
  template <MatrixLike X, CachesOf<Layer> L, Executor E = Serial>
  Matrix<T> forward(const X& x, std::span<const Index> row_offsets, const L& caches, const LayerOptions& options,
                    const E& executor = serial) const {
    return forward(x, row_offsets, caches, Omitted{}, Omitted{}, options, executor);
  }

  template <MatrixLike Out, MatrixLike X, CachesOf<Layer> L, InMaskPlace M = Omitted, class F = Omitted,
            Executor E = Serial>
  void forward_into(Out&& out, const X& x, std::span<const Index> row_offsets, const L& caches, const M& mask = {},
                    const F& score = {}, const LayerOptions& options = {}, const E& executor = serial) const {
    call<Listed<L>>(writable_view(out), view(x), row_offsets, caches, given_or(mask, causal), given_or(score, plain),
                    options, executor);
  }
  template <MatrixLike Out, MatrixLike X, CachesOf<Layer> L, Executor E = Serial>
  void forward_into(Out&& out, const X& x, std::span<const Index> row_offsets, const L& caches,
                    const LayerOptions& options, const E& executor = serial) const {
    forward_into(out, x, row_offsets, caches, Omitted{}, Omitted{}, options, executor);
  }

 private:
  const Layer& self() const { return static_cast<const Layer&>(*this); }
  Index model_dim() const { return self().config().model_dim; }

  /// Only this is compiled for each mask and score.
  template <class C, class M, class F>
  void call(View<T> out, const ConstView<T>& x, std::span<const Index> row_offsets, std::span<C* const> caches,
            const M& given_mask, const F& score, const LayerOptions& options, const AnyExecutor& executor) const {
    check_functions<M, F, T>();
    using Rules = typename Layer::template RulesOf<C>;
    const auto& mask = as_mask(given_mask);
    const auto count = static_cast<Index>(caches.size());
    const auto of = [&](Index s, typename Rules::Use use) {
      decltype(auto) own_mask = of_sequence(mask, s, count);
      decltype(auto) own_score = of_sequence(score, s, count);
      if constexpr (SlidingCache<C>) {
        const auto seen = visible(*caches[static_cast<std::size_t>(s)]) & own_mask;
        use(Rules::rule(seen, own_score));
      } else {
        use(Rules::rule(own_mask, own_score));
      }
    };
    const auto of_prefix = [&](const Stacked& stacked, typename Rules::Use use) {
      if constexpr (PooledCache<C> && Layer::shares_prefixes) {
        const StackedMask<std::remove_cvref_t<decltype(mask)>> stacked_mask{mask, stacked};
        const auto f = stacked_score(score, stacked);
        use(Rules::rule(stacked_mask, f));
      }
    };
    run(out, x, row_offsets, caches, Rules{of, of_prefix}, options, executor);
  }

  template <class C, class Rules>
  void run(View<T> out, const ConstView<T>& x, std::span<const Index> row_offsets, std::span<C* const> caches,
           const Rules& rules, const LayerOptions& options, const AnyExecutor& executor) const {
    self().template check_settings<C>(options);
    require(x.cols() == model_dim(), "x must be [n, model_dim ", model_dim(), "]; given ", Shape{x.rows(), x.cols()});
    check_out(out, x.rows(), model_dim());
    require_disjoint(out, x, "x");
    check_batch(row_offsets, caches, x.rows());
    for (const C* cache : caches) self().check_cache(*cache);
    for (std::size_t s = 0; s < caches.size(); ++s)
      rules.of(static_cast<Index>(s), [&](const auto& rule) {
        check_growth(rule, *caches[s], self().heads(), row_offsets[s + 1] - row_offsets[s], footprint(out));
      });
    if (x.rows() == 0) return;
    find_room(row_offsets, caches);
    Appended<C> appended(row_offsets, caches, caches[0]->workspace());
    bool in_pieces = false;
    if constexpr (SlidingCache<C>) in_pieces = needs_pieces(row_offsets, caches);
    if (in_pieces)
      run_in_pieces(out, x, row_offsets, caches, rules, options, executor);
    else
      run_at_once(out, x, row_offsets, caches, rules, options, executor);
    appended.keep();
  }

  template <class C, class Rules>
  void run_in_pieces(View<T> out, const ConstView<T>& x, std::span<const Index> row_offsets, std::span<C* const> caches,
                     const Rules& rules, const LayerOptions& options, const AnyExecutor& executor) const {
    for (std::size_t s = 0; s < caches.size(); ++s) {
      const auto of = [&](Index, typename Rules::Use use) { rules.of(static_cast<Index>(s), use); };
      for (Index first = row_offsets[s]; first < row_offsets[s + 1];) {
        const Index n = piece(*caches[s], caches[s]->position(), row_offsets[s + 1] - first);
        const Index own_offsets[] = {0, n};
        run_at_once(rows_of(out, first, n), rows_of(x, first, n), std::span<const Index>(own_offsets),
                    caches.subspan(s, 1), Rules{of, rules.of_prefix}, options, executor);
        first += n;
      }
    }
  }

  template <class C, class Rules>
  void run_at_once(View<T> out, const ConstView<T>& x, std::span<const Index> row_offsets, std::span<C* const> caches,
                   const Rules& rules, const LayerOptions& options, const AnyExecutor& executor) const {
    typename Layer::Rows rows;
    const Scratch scratch(caches[0]->workspace(), [&](Carver& carver) { self().lay_out(carver, rows, x.rows()); });
    self().project(rows, x, executor);
    constexpr Index block = 16;  // rows of a work item
    executor((x.rows() + block - 1) / block, [&](Index item) {
      const Index row = item * block, n_rows = std::min(block, x.rows() - row);
      for_each_sequence(row_offsets, row, n_rows, [&](std::size_t s, Index first, Index n) {
        self().finish(rows, first, n, caches[s]->position() + first - row_offsets[s]);
      });
    });
    self().append(rows, row_offsets, caches);
    self().attend(rows, row_offsets, caches, rules, options, executor);
    self().weights().output.forward_into(out, rows.context, executor);
  }
};

}}}  // namespace qkv::QKV_ABI::detail

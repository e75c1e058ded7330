// explain_layer.hpp — what a layer's forward will do, in one printable line: projections, form, kernel and arithmetic, and why.
//
//     std::puts(explain(layer, 1, cache).text().c_str());
//
//     1 queries x 2049 keys; projections 5120 -> 1536 -> 24576, 5120 -> 576, 16384 -> 5120, 522 MB of weights; absorbed
//     form (less time than restoring keys and values); absorbed kernel (its own), avx512; bf16 rows multiplied in bf16
//
// The rules are those that forward uses: choose_latent_form in latent_form.hpp, choose_kernel in options.hpp.
//
// Before: latent_attention.hpp   Next: checkpoint.hpp
#pragma once

#include <cstdio>
#include <initializer_list>
#include <string>

#include "explain.hpp"
#include "latent_attention.hpp"
#include "multi_head_attention.hpp"

namespace qkv { inline namespace QKV_ABI {

struct LayerExplanation {
  Index n_queries = 0, n_keys = 0;  // keys: those of the call included
  Index pieces = 1;                 // of a call on a ring; the other members describe the first
  std::string projections;
  Index weight_bytes = 0;
  LatentForm form = LatentForm::automatic;  // automatic: a layer without forms
  std::string form_why;
  std::string kernel;  // as name(Kernel) has it, or "absorbed": the kernel of that form
  std::string why;
  const char* storage = "";     // of the rows that it attends to
  const char* arithmetic = "";  // " multiplied in …" where that is narrower than the layer's scalar

  std::string text() const {
    char line[512];
    std::snprintf(line, sizeof line, "%td queries x %td keys; projections %s, %.3g MB of weights; ", n_queries, n_keys,
                  projections.c_str(), static_cast<double>(weight_bytes) / 1e6);
    std::string all = line;
    if (pieces > 1) all += "the first of " + std::to_string(pieces) + " pieces: ";
    if (form != LatentForm::automatic) all += std::string(name(form)) + " form (" + form_why + "); ";
    return all + kernel + " kernel (" + why + "), " + isa_name + "; " + storage + " rows" + arithmetic +
           Explanation::warning();
  }
};

namespace detail {

/// x · first · second …
template <class T>
void add_projections(LayerExplanation& e, std::initializer_list<const Projection<T>*> chain) {
  e.projections += (e.projections.empty() ? "" : ", ") + std::to_string((*chain.begin())->in_dim());
  for (const Projection<T>* p : chain) {
    e.projections += " -> " + std::to_string(p->out_dim());
    e.weight_bytes += p->bytes();
  }
}

/// A friend of both layers: what they check before a call, and what they choose.
struct LayerExplainer {
  template <class T>
  static void describe(LayerExplanation& e, const MultiHeadAttention<T>& layer) {
    const auto& w = layer.weights();
    add_projections<T>(e, {&w.query}), add_projections<T>(e, {&w.key}), add_projections<T>(e, {&w.value});
    add_projections<T>(e, {&w.output});
  }
  template <class T>
  static void describe(LayerExplanation& e, const LatentAttention<T>& layer) {
    const auto& w = layer.weights();
    if (layer.config().q_latent_dim > 0)
      add_projections<T>(e, {&w.query_down, &w.query_up});
    else
      add_projections<T>(e, {&w.query});
    add_projections<T>(e, {&w.latent_down}), add_projections<T>(e, {&w.output});
    e.weight_bytes += w.key_up.bytes() + w.value_up.bytes();  // for the restored or the absorbed form, by head
  }

  template <StorageType S, class T>
  static void choose(LayerExplanation& e, const MultiHeadAttention<T>& layer, const LayerOptions& options) {
    const auto choice = explain_kernel<T, S>(options.kernel, options.arithmetic, e.n_queries, layer.heads());
    e.kernel = name(choice.kernel), e.why = choice.why, e.arithmetic = choice.arithmetic;
  }
  template <StorageType S, class T>
  static void choose(LayerExplanation& e, const LatentAttention<T>& layer, const LayerOptions& options) {
    e.form = choose_latent_form<T, S>(options, layer.config(), e.n_queries, e.n_keys);
    e.form_why = options.form != LatentForm::automatic ? "forced by options.form"
                 : e.form == LatentForm::absorbed      ? "less time than restoring keys and values"
                                                       : "less time than absorbing them";
    if (e.form == LatentForm::absorbed && kernel::has_absorbed_kernel<T>(options.kernel)) {
      e.kernel = "absorbed", e.why = "its own", e.arithmetic = arithmetic_name<T, S>(options.arithmetic);
      return;
    }
    const Kernel kernel = e.form == LatentForm::absorbed
                              ? kernel::general_absorbed_kernel<T>(options.kernel, e.n_queries)
                              : options.kernel;
    const auto choice = explain_kernel<T, T>(kernel, options.arithmetic, e.n_queries, layer.heads());
    e.kernel = name(choice.kernel), e.why = choice.why;
  }

  template <StorageType S, class Layer>
  static LayerExplanation explain(const Layer& layer, Index n_queries, Index n_keys, Index pieces,
                                  const LayerOptions& options) {
    LayerExplanation e;
    e.n_queries = n_queries, e.n_keys = n_keys, e.pieces = pieces, e.storage = storage_name<S>;
    describe(e, layer);
    choose<S>(e, layer, options);
    return e;
  }
  template <class Layer, class C>
  static LayerExplanation of_cache(const Layer& layer, Index n, const C& cache, const LayerOptions& options) {
    layer.template check_settings<C>(options);
    layer.check_cache(cache);
    require_room(cache, n, most_rows(cache));
    Index pieces = 0;
    for (Index position = cache.position(), end = position + n; position < end; ++pieces)
      position += piece(cache, position, end - position);
    const Index first = piece(cache, cache.position(), n);
    Index keys = cache.rows() + first;
    if constexpr (SlidingCache<C>) keys = std::min(keys, cache.capacity());
    return explain<typename C::Storage>(layer, first, keys, pieces, options);
  }
  template <class Layer>
  static LayerExplanation of_text(const Layer& layer, Index n_queries, Index n_keys, const LayerOptions& options) {
    layer.template check_settings<void>(options);
    require(n_queries >= 0 && n_keys >= 0, "a call has n_queries and n_keys >= 0; given ", n_queries, ", ", n_keys);
    return explain<typename Layer::Scalar>(layer, n_queries, n_keys, 1, options);
  }
};

}  // namespace detail

/// What layer.forward(x [n_queries, model_dim], cache, options) will do. Errors are those of the call.
template <class Layer, class C>
requires(Layer::template serves<C>) LayerExplanation
    explain(const Layer& layer, Index n_queries, const C& cache, const LayerOptions& options = {}) {
  return detail::LayerExplainer::of_cache(layer, n_queries, cache, options);
}

/// The same of a text without a cache, or of one in the layer's scalar: n_queries rows against n_keys, their own included.
template <class Layer>
requires requires { typename Layer::Scalar; } && requires(const Layer& l) {
  l.weights().output;
}
LayerExplanation explain(const Layer& layer, Index n_queries, Index n_keys, const LayerOptions& options = {}) {
  return detail::LayerExplainer::of_text(layer, n_queries, n_keys, options);
}

}}  // namespace qkv::QKV_ABI

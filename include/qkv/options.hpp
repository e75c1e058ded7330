// options.hpp — optional settings of a call of attention(), and the rule that picks its kernel.
//
// Before: softmax.hpp   Next: attention.hpp
#pragma once

#include <concepts>
#include <cstddef>
#include <optional>
#include <span>
#include <type_traits>
#include <utility>

#include "matrix.hpp"
#include "workspace.hpp"

namespace qkv { inline namespace QKV_ABI {

enum class Kernel {
  automatic,  // by the rule below
  reference,  // loops straight from the formula; any scalar, slow, the oracle of the tests
  tiled,      // blocks of queries × blocks of keys: prefill
  decode,     // a few queries against many keys, every key row read once
};

constexpr const char* name(Kernel kernel) {
  switch (kernel) {
    case Kernel::automatic:
      return "automatic";
    case Kernel::reference:
      return "reference";
    case Kernel::tiled:
      return "tiled";
    case Kernel::decode:
      return "decode";
  }
  return "?";
}

/// Up to this many queries of one sequence go to the decode kernel. Measured time over that of the tiled kernel, for 1
/// to 32 query heads per key head: 8 queries 0.3 to 0.85 (int8 with AVX2: 0.6 to 1.3); 12 queries above 1 where 32
/// heads share one key head.
inline constexpr Index decode_max_queries = 8;
/// The same for the queries of several sequences on a shared prefix, where each query head of a group counts as a
/// query. Measured with AVX2, time over that of the tiled kernel: 16 queries 0.75, 32 queries 1.
inline constexpr Index decode_max_stacked_queries = 24;

/// Resolves `automatic`, by the scalar and the number of queries of the sequence only: a sequence gives the same bits
/// alone and in any batch, on any number of threads.
template <class T>
constexpr Kernel choose_kernel(Kernel forced, Index n_queries, Index decode_most = decode_max_queries) {
  if (forced != Kernel::automatic) return forced;
  if (!std::is_same_v<T, float> && !std::is_same_v<T, double>) return Kernel::reference;
  return n_queries <= decode_most ? Kernel::decode : Kernel::tiled;
}

/// The number types in which the tiled kernel and absorbed latent attention multiply, and decode an int8 cache. Sums
/// are always in the scalar of q, or wider.
enum class Arithmetic {
  /// As stored, where the CPU has the instructions and q is float: a bfloat16 cache in bfloat16, an int8 cache in int8
  /// (q·k) and bfloat16 (values; int16 with AVX-VNNI); otherwise exact. Decode: int8 caches only; for groups of heads
  /// q·k in int8 and values in int16 where the CPU can. With AVX2 and SSE2 all three kernels multiply an int8 cache in
  /// int16. Errors grow with the scores: docs/numerics.md.
  automatic,
  /// Everything is widened to the scalar of q.
  exact,
  /// As automatic, but where the CPU has int8 products an int8 cache in int8 throughout: weights in 8 bits, faster and
  /// coarser.
  int8,
};

/// The two forms of latent attention; see call/latent_forms.hpp.
enum class LatentForm { automatic, naive, absorbed };

constexpr const char* name(LatentForm form) {
  switch (form) {
    case LatentForm::automatic:
      return "automatic";
    case LatentForm::naive:
      return "naive";
    case LatentForm::absorbed:
      return "absorbed";
  }
  return "?";
}

/// Options of a layer's forward: a forced kernel or form gives, for instance, the same bits for a prompt in pieces as
/// at once. `automatic` selects for absorbed latent attention of float and double its own kernel, for any number of
/// queries (kernel/absorbed/absorbed.hpp); a forced kernel runs on rows converted to the layer's scalar. Options that
/// do not apply to the layer or the cache are refused (std::invalid_argument), before anything is written or evicted.
struct LayerOptions {
  Kernel kernel = Kernel::automatic;
  Arithmetic arithmetic = Arithmetic::automatic;
  /// LatentAttention only.
  LatentForm form = LatentForm::automatic;
  /// MultiHeadAttention over PagedCaches only: the sequences of a batch attend together to the pages that they share at
  /// the beginning; equal within rounding, not in bits.
  bool share_prefixes = false;
};

/// The four stages of ONNX's qk_matmul_output_mode: what attention_weights() returns.
enum class Stage {
  scaled,         // scale · q·k, masked keys included
  scored,         // after the score function, masked keys included
  masked,         // masked keys are -inf
  probabilities,  // after the softmax (sinks included)
};

/// A std::span<const X>, but not of a temporary vector or array: options may outlive the statement.
template <class X>
class LastingSpan : public std::span<const X> {
 public:
  LastingSpan() = default;
  template <detail::LastingRange<X> R>
  constexpr LastingSpan(R&& range) : std::span<const X>(std::forward<R>(range)) {}
  template <class P>
  requires(std::convertible_to<P*, const X*>) constexpr LastingSpan(P* first, std::size_t n)
      : std::span<const X>(first, n) {}
  template <detail::DyingRange<X> R>
  LastingSpan(R&&) = delete;  // a view: give the vector a name, and let it outlive the call
};

/// Optional inputs as values or views, optional outputs as pointers to where they go. Positions of a batch apply to
/// each of its sequences.
template <class T>
struct Options {
  std::optional<double> scale = {};               // none, or 0: 1/√head_dim; else normal in T
  std::optional<Index> first_position = {};       // of the first query; default: the queries are the last valid tokens
  Index first_key_position = 0;                   // of the first row of k and v; a cache has its own positions
  LastingSpan<T> sinks = {};                      // none, or one learned logit per head
  Kernel kernel = Kernel::automatic;              // force one
  Arithmetic arithmetic = Arithmetic::automatic;  // of the fast kernels
  Matrix<T>* log_sum_exp = nullptr;               // where to write log Σ exp(score) [n_queries, heads]; resized
  Workspace* workspace = nullptr;                 // scratch memory to reuse; default: allocated by the call
  // Batches: sequence s has query rows [query_offsets[s], query_offsets[s+1]) and key rows likewise. Both or none.
  LastingSpan<Index> query_offsets = {};
  LastingSpan<Index> key_offsets = {};
};

namespace detail {

/// Placeholder for an omitted mask or score, and for `{}`: `full`, `plain`. A scalar, so that `{}` converts to it
/// rather than to Options, where both are possible.
enum class Omitted {};

template <class X>
inline constexpr bool is_options = false;
template <class T>
inline constexpr bool is_options<Options<T>> = true;

/// What may be passed as a mask or a score: not options, which select a shorter overload.
template <class X>
concept MaskOrScore = !is_options<X>;

/// x, or the default where it was omitted.
template <class X, class Default>
constexpr const auto& given_or(const X& x, const Default& otherwise) {
  if constexpr (std::is_same_v<X, Omitted>)
    return otherwise;
  else
    return x;
}

}  // namespace detail

}}  // namespace qkv::QKV_ABI

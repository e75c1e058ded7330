// options.hpp — what a call of attention() may ask for beyond its operands, and the rule that picks its kernel.
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

/// Up to this many queries of one sequence are served by the decode kernel. Measured: with 8 it takes 0.3 to 0.85 of the
/// time of the tiled kernel, for one to 32 query heads per key head; with 12 it is slower where 32 share one. Of int8 with
/// AVX2 8 take 0.6 to 1.3.
inline constexpr Index decode_max_queries = 8;
/// The same for the queries of several sequences on a prefix that they share: every query head is a query of its own there,
/// one to a key head. Measured with AVX2: 16 take 0.75 of the tiled kernel's time, 32 as long.
inline constexpr Index decode_max_stacked_queries = 24;

/// The one place where `automatic` is decided: by the scalar and the number of queries of the sequence and nothing else,
/// so that a sequence gives the same bits alone and in any batch, on any number of threads.
template <class T>
constexpr Kernel choose_kernel(Kernel forced, Index n_queries, Index decode_most = decode_max_queries) {
  if (forced != Kernel::automatic) return forced;
  if (!std::is_same_v<T, float> && !std::is_same_v<T, double>) return Kernel::reference;
  return n_queries <= decode_most ? Kernel::decode : Kernel::tiled;
}

/// In which numbers the tiled kernel and absorbed latent attention multiply, and the decode kernel an int8 cache. Sums are
/// always of the scalar of q, or wider.
enum class Arithmetic {
  automatic,  // as stored: a bfloat16 cache in bfloat16, an int8 cache in int8 (q·k) and bfloat16 (values; int16 with
              // AVX-VNNI), where the CPU has the instructions and q is float; otherwise exact. Decode: int8 alone; for
  // groups of heads q·k in int8 and values in int16 where the CPU can. With AVX2 and SSE2 all three kernels
  // multiply an int8 cache in int16. Errors grow with the scores: docs/numerics.md
  exact,  // everything widened to the scalar of q
  int8,   // as automatic, but where the CPU has int8 products an int8 cache in int8 throughout: weights in 8 bits,
          // faster and coarser
};

/// The two ways of latent attention; see call/latent_forms.hpp.
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

/// What a layer's forward may be told: force a kernel or a form, for instance to have the same bits for a prompt in pieces
/// as at once. Absorbed latent attention of float and double has a kernel of its own (kernel/absorbed/absorbed.hpp), which
/// `automatic` means for any number of queries; a forced kernel serves it in the general way. What a layer or a cache has no
/// use for is refused (std::invalid_argument), before anything is written or evicted.
struct LayerOptions {
  Kernel kernel = Kernel::automatic;
  Arithmetic arithmetic = Arithmetic::automatic;
  /// Of a LatentAttention only.
  LatentForm form = LatentForm::automatic;
  /// Of a MultiHeadAttention over PagedCaches only: the sequences of a batch attend together to the pages that they have in
  /// common at the beginning; other bits, same numbers.
  bool share_prefixes = false;
};

/// The four stages of ONNX's qk_matmul_output_mode, for looking inside attention_weights().
enum class Stage {
  scaled,         // scale · q·k, masked keys included
  scored,         // after the score function, masked keys included
  masked,         // masked keys are -inf
  probabilities,  // after the softmax (sinks included)
};

/// A std::span<const X>, made from whatever that is made from but a temporary vector or array: options may be kept.
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

/// Everything that a call can do without: what goes in as a value or a view, what comes out as a pointer to where it goes.
/// Positions of a batch are the same for each of its sequences.
template <class T>
struct Options {
  std::optional<double> scale = {};               // none, or 0: 1/√head_dim; else normal in T
  std::optional<Index> first_position = {};       // of the first query; default: the queries are the last valid tokens
  Index first_key_position = 0;                   // of the first row of k and v; a cache knows where its rows stand
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

/// Stands where a call names no mask or score, or `{}`: `full`, `plain`. A scalar, so that `{}` is converted to it rather than
/// to Options, where both are possible.
enum class Omitted {};

template <class X>
inline constexpr bool is_options = false;
template <class T>
inline constexpr bool is_options<Options<T>> = true;

/// What may stand where a mask or a score is expected: options there belong to a shorter form of the call.
template <class X>
concept MaskOrScore = !is_options<X>;

/// x, or what it stands for where it was omitted.
template <class X, class Default>
constexpr const auto& given_or(const X& x, const Default& otherwise) {
  if constexpr (std::is_same_v<X, Omitted>)
    return otherwise;
  else
    return x;
}

}  // namespace detail

}}  // namespace qkv::QKV_ABI

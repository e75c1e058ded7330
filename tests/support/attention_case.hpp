// support/attention_case.hpp — one description of a case, and every kernel run on it against the oracle.
#pragma once

#include <qkv/attention.hpp>

#include <functional>
#include <optional>
#include <sstream>

#include "catch.hpp"
#include "oracle.hpp"

namespace support {

using qkv::Kernel;
using qkv::Options;

inline constexpr Kernel kernels[] = {Kernel::reference, Kernel::tiled, Kernel::decode};
inline constexpr Kernel fast_kernels[] = {Kernel::tiled, Kernel::decode};

struct Case {
  Index n_queries, n_keys;
  Heads heads;
  Index head_dim, v_head_dim;
  std::optional<Index> first_position = {};
};

template <class T>
struct Inputs {
  Matrix<T> q, k, v;

  explicit Inputs(const Case& c, std::uint64_t seed = 1)
      : q(normals<T>(c.n_queries, c.heads.heads * c.head_dim, seed)),
        k(normals<T>(c.n_keys, c.heads.kv_heads * c.head_dim, seed + 1)),
        v(normals<T>(c.n_keys, c.heads.kv_heads * c.v_head_dim, seed + 2)) {}
};

inline void describe(std::ostream& out, const Case& c) {
  out << c.n_queries << " queries, " << c.n_keys << " keys, heads " << c.heads.heads << "/" << c.heads.kv_heads
      << ", dims " << c.head_dim << "/" << c.v_head_dim << ", first position "
      << (c.first_position ? std::to_string(*c.first_position) : "default");
}

/// Sizes pairwise different; across the borders of blocks; more, as many and fewer queries than keys; group ratio 7.
inline const std::vector<Case>& shapes() {
  static const std::vector<Case> all = {
      {.n_queries = 1, .n_keys = 1, .heads = {1, 1}, .head_dim = 1, .v_head_dim = 3},
      {.n_queries = 3, .n_keys = 7, .heads = {2, 1}, .head_dim = 5, .v_head_dim = 1},
      {.n_queries = 11, .n_keys = 4, .heads = {3, 3}, .head_dim = 7, .v_head_dim = 2},
      {.n_queries = 1, .n_keys = 521, .heads = {14, 2}, .head_dim = 40, .v_head_dim = 24},
      {.n_queries = 67, .n_keys = 131, .heads = {7, 1}, .head_dim = 17, .v_head_dim = 33, .first_position = 23},
      {.n_queries = 203, .n_keys = 277, .heads = {2, 1}, .head_dim = 64, .v_head_dim = 47},
      {.n_queries = 5, .n_keys = 309, .heads = {4, 2}, .head_dim = 128, .v_head_dim = 80, .first_position = 300},
  };
  return all;
}

/// first_position as the contract defines it.
inline Index first_position(const Case& c, Index valid_keys) {
  return c.first_position.value_or(valid_keys - c.n_queries);
}

/// Masks and scores behind one type each: kernels are compiled for them once and not for every test.
struct AnyMask {
  std::function<bool(const At&)> see;
  std::function<qkv::Cover(const qkv::Block&)> answer;
  std::function<qkv::SeenBy(const qkv::Block&)> interval;
  std::function<Index(Index, Index)> count;
  std::function<void(const qkv::CallShape&)> refuse;

  template <class M>
  static AnyMask of(const M& mask) {
    return {[mask](const At& at) { return mask.sees(at); },
            [mask](const qkv::Block& block) { return qkv::detail::cover(mask, block); },
            [mask](const qkv::Block& block) { return qkv::detail::seen_by(mask, block); },
            [mask](Index sequence, Index n_keys) { return qkv::detail::valid_keys(mask, sequence, n_keys); },
            [mask](const qkv::CallShape& call) { qkv::detail::check_operand(mask, call); }};
  }

  bool sees(const At& at) const { return see(at); }
  qkv::Cover cover(const qkv::Block& block) const { return answer(block); }
  qkv::SeenBy seen_by(const qkv::Block& block) const { return interval(block); }
  Index valid_keys(Index sequence, Index n_keys) const { return count(sequence, n_keys); }
  void check(const qkv::CallShape& call) const { refuse(call); }
};

template <class T>
using AnyScore = std::function<T(T, const At&)>;

/// The mask and score themselves where a test is about their types, otherwise behind one type.
enum class Types { erased, kept };

/// Runs every kernel on a case with this mask and score and compares output and log-sum-exp with the definition.
/// `sees` and `score_by_formula` say what mask and score mean, independently of them.
template <class T, Types types = Types::erased, class M, class F, class Sees, class Formula>
void check_kernels(const Case& c, const M& mask, const F& score, const Sees& sees, const Formula& score_by_formula,
                   Options<T> options = {}, std::optional<Index> valid_keys = {}, double allowed = tolerance<T>) {
  constexpr bool known_mask = types == Types::kept || std::is_same_v<M, AnyMask>;
  constexpr bool known_score = types == Types::kept || std::is_same_v<F, qkv::Plain> || std::is_same_v<F, AnyScore<T>>;
  if constexpr (!known_mask) {
    check_kernels<T>(c, AnyMask::of(qkv::detail::as_mask(mask)), score, sees, score_by_formula, options, valid_keys,
                     allowed);
  } else if constexpr (!known_score) {
    check_kernels<T>(c, mask, AnyScore<T>(score), sees, score_by_formula, options, valid_keys, allowed);
  } else {
    const Inputs<T> in(c);
    const Index first = first_position(c, valid_keys.value_or(c.n_keys));
    const Expected expected = attention_by_formula(in.q, in.k, in.v,
                                                   {.heads = c.heads,
                                                    .scale = options.scale.value_or(0),
                                                    .first_position = first,
                                                    .sinks = {options.sinks.begin(), options.sinks.end()}},
                                                   sees, score_by_formula);
    std::ostringstream text;
    describe(text, c);
    INFO(text.str());
    options.first_position = c.first_position;
    for (const Kernel kernel : kernels) {
      Matrix<T> log_sum_exp;
      options.kernel = kernel;
      options.log_sum_exp = &log_sum_exp;
      const Matrix<T> out = qkv::attention(in.q, in.k, in.v, c.heads, mask, score, options);
      INFO("kernel " << name(kernel));
      CHECK(max_error(out, expected.out) <= allowed);
      // log-sum-exp is of the size of the scores, not of the values.
      const long double largest = 1 + expected.scored.cwiseAbs().maxCoeff();
      CHECK(max_error_with_infinities(log_sum_exp, expected.log_sum_exp) <= allowed * static_cast<double>(largest));
    }
  }
}

}  // namespace support

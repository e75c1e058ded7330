// memory.hpp — bytes of a token in a cache, before anything is allocated.
//
//     numbers per token and layer                                            DeepSeek-V3's sizes
//     MHA         heads·(head_dim + v_head_dim)                              128·(128 + 128) = 32768     56.9
//     GQA         kv_heads·(head_dim + v_head_dim)                           8·(128 + 128)   =  2048      3.6
//     MQA         head_dim + v_head_dim                                      128 + 128       =   256      0.4
//     MLA naive   heads·(nope_dim + rope_dim + v_head_dim)                   128·(192 + 128) = 40960     71.1
//     MLA         latent_dim + rope_dim                                      512 + 64        =   576      1
//
// Bytes follow from the storage: int8 adds a float per row, and keeps MLA's rope key as floats. DeepSeek-V2, arXiv:2405.04434,
// table 1.
//
// Of every cache   bytes()            exactly these figures times the rows it has memory for: its capacity, the blocks so
//                                     far, or the pages in its table. There is no padding.
//                  overhead_bytes()   all else that it has allocated: tables, workspace, unrotated keys for context shifts
// The two add up to what a cache or a pool has allocated. A paged sequence has allocated its overhead only: its pages belong
// to the pool, whose bytes() are all pages and used_bytes() those in use, shared ones counted once.
//
// Before: model_config.hpp   Next: kv_cache.hpp
#pragma once

#include "model_config.hpp"
#include "storage.hpp"

namespace qkv { inline namespace QKV_ABI {

/// Numbers that one token adds to the cache of one layer. std::length_error where a size does not fit an Index.
constexpr Index elements_per_token(const MultiHeadAttentionConfig& c) {
  return detail::checked_product(c.kv_heads, detail::checked_sum(c.head_dim, c.v_head_dim));
}
constexpr Index elements_per_token(const LatentAttentionConfig& c) {
  return detail::checked_sum(c.latent_dim, c.rope_dim);
}
/// The same for MLA if the keys and values of every head were cached instead of the latent they come from.
constexpr Index naive_elements_per_token(const LatentAttentionConfig& c) {
  return detail::checked_product(c.heads,
                                 detail::checked_sum(detail::checked_sum(c.nope_dim, c.rope_dim), c.v_head_dim));
}

/// Bytes that one token adds to the cache of one layer, scales included.
template <StorageType S>
constexpr Index bytes_per_token(const MultiHeadAttentionConfig& c) {
  return detail::checked_product(c.kv_heads, detail::checked_sum(row_bytes<S>(c.head_dim), row_bytes<S>(c.v_head_dim)));
}
template <StorageType S>
constexpr Index bytes_per_token(const LatentAttentionConfig& c) {
  return detail::checked_sum(row_bytes<S>(c.latent_dim), row_bytes<WideStorage<S>>(c.rope_dim));
}
template <StorageType S>
constexpr Index naive_bytes_per_token(const LatentAttentionConfig& c) {
  const Index key = row_bytes<S>(detail::checked_sum(c.nope_dim, c.rope_dim));
  return detail::checked_product(c.heads, detail::checked_sum(key, row_bytes<S>(c.v_head_dim)));
}

/// Bytes of the caches of `layers` layers with memory for `tokens` tokens each: what bytes() of the caches add up to.
template <StorageType S, class Config>
constexpr Index cache_bytes(const Config& config, Index tokens, Index layers = 1) {
  return detail::checked_product(layers, detail::checked_product(tokens, bytes_per_token<S>(config)));
}
template <StorageType S>
constexpr Index naive_cache_bytes(const LatentAttentionConfig& config, Index tokens, Index layers = 1) {
  return detail::checked_product(layers, detail::checked_product(tokens, naive_bytes_per_token<S>(config)));
}

/// The multi-head attention that an MLA layer is compared with: as many heads, of nope_dim and v_head_dim features. GQA
/// and MQA of the same heads: another kv_heads.
constexpr MultiHeadAttentionConfig multi_head_equivalent(const LatentAttentionConfig& c, Index kv_heads) {
  return {.model_dim = c.model_dim,
          .heads = c.heads,
          .kv_heads = kv_heads,
          .head_dim = c.nope_dim,
          .v_head_dim = c.v_head_dim};
}
constexpr MultiHeadAttentionConfig multi_head_equivalent(const LatentAttentionConfig& c) {
  return multi_head_equivalent(c, c.heads);
}

/// How many times smaller b is than a: ratio(elements_per_token(mha), elements_per_token(mla)).
constexpr double ratio(Index a, Index b) { return static_cast<double>(a) / static_cast<double>(b); }

static_assert(elements_per_token(deepseek_v3) == 576);
static_assert(naive_elements_per_token(deepseek_v3) == 40960);
static_assert(elements_per_token(multi_head_equivalent(deepseek_v3)) == 32768);
static_assert(elements_per_token(multi_head_equivalent(deepseek_v3, 8)) == 2048);
static_assert(elements_per_token(multi_head_equivalent(deepseek_v3, 1)) == 256);

}}  // namespace qkv::QKV_ABI

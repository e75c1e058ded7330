// saved_cache.hpp — a cache in a stream: the rows of a prompt are saved once and loaded with the same bits.
//
//     bytes     little-endian, whatever the machine
//      0   8    "qkvcache"
//      8   4    version of the format: 1
//     12   4    kind       1 every row from position 0 on (KvCache, PagedCache)   2 RingCache, 4 with positions_in_cache
//                          3 latents (paged or not)
//     16   4    storage    1 float   2 double   3 half   4 bfloat16   5 int8 with scales      (file_code in storage.hpp)
//     20  24    shape      kv_heads, head_dim, v_head_dim;   latent_dim, rope_dim, 0
//     44  24    ring       window, pinned, slack;   else 0
//     68  16    position of the next token, rows held
//     84   4    CRC-32C of the bytes so far
//     88        the rows, in ascending position: keys of all heads, values of all heads, scales of both, if any
//               (latents: latent, rope key, scale if any)
//      …   4    CRC-32C of bytes 0 … 83 and the rows
//
// Refused, with the cache left exactly as it was: another kind, storage, shape or ring; rows that do not fit; a stream
// that is too short; any altered byte. KvCache and PagedCache hold the same and read each other's files, and so do
// LatentCache and PagedLatentCache; capacities and blocks may differ. Memory is allocated as bytes arrive, not for what
// a header claims, and pages are evicted only for rows whose checksum was right. Caches may follow one another in a
// stream: one per layer. Keys rotated by a context shift are saved as rotated: a cache that loads them treats them as
// the originals.
// CRC-32C: Castagnoli et al. 1993; RFC 3720, appendix B.4.
//
// Before: paged_cache.hpp   Next: multi_head_weights.hpp
#pragma once

#include <array>
#include <cstdint>
#include <cstring>
#include <istream>
#include <ostream>
#include <string>
#include <vector>

#include "cache/file.hpp"
#include "latent_cache.hpp"
#include "paged_cache.hpp"
#include "ring_cache.hpp"

namespace qkv { inline namespace QKV_ABI {

/// Writes what the cache holds. False where the stream fails.
template <class Cache>
[[nodiscard]] bool try_save_cache(std::ostream& out, const Cache& cache) {
  std::array<std::byte, detail::SavedHeader::bytes - 4> head{};
  std::memcpy(head.data(), detail::saved_magic, 8);
  detail::CacheFile::header(cache).for_each_field(head.data(), [](std::byte* p, const auto& field) {
    std::memcpy(p, &field, sizeof field);
    detail::little_endian<std::remove_cvref_t<decltype(field)>>(p, 1);
  });
  detail::Crc32c crc;
  const auto write = [&](const std::byte* p, std::size_t n) {
    crc.add(p, n);
    out.write(reinterpret_cast<const char*>(p), static_cast<std::streamsize>(n));
  };
  const auto write_sum = [&] {
    std::uint32_t sum = crc.value();
    detail::little_endian<std::uint32_t>(reinterpret_cast<std::byte*>(&sum), 1);
    out.write(reinterpret_cast<const char*>(&sum), sizeof sum);
  };
  write(head.data(), head.size());
  write_sum();

  std::vector<std::byte> row(static_cast<std::size_t>(detail::CacheFile::row_bytes_of(cache)));
  std::size_t used = 0;
  detail::CacheFile::for_each_array(cache, [&]<class T>(const T* p, Index n) {
    const auto count = static_cast<std::size_t>(n);
    std::memcpy(row.data() + used, p, count * sizeof(T));
    detail::little_endian<T>(row.data() + used, count);
    used += count * sizeof(T);
    if (used < row.size()) return;
    write(row.data(), used);
    used = 0;
  });
  write_sum();
  return static_cast<bool>(out);
}

/// The same; std::runtime_error where the stream fails.
template <class Cache>
void save_cache(std::ostream& out, const Cache& cache) {
  detail::require<std::runtime_error>(try_save_cache(out, cache), "the stream did not take the saved cache");
}

/// Replaces the rows of the cache by the saved ones: the same bits. False where the next bytes of the stream are not a
/// saved cache that fits this one; `why`, where given, then states the reason, and the cache is exactly as it was.
template <class Cache>
[[nodiscard]] bool try_load_cache(std::istream& in, Cache& cache, std::string* why = nullptr) {
  const std::string text = detail::load_or_say_why(in, cache);
  if (why) *why = text;
  return text.empty();
}

/// The same; std::runtime_error with the reason.
template <class Cache>
void load_cache(std::istream& in, Cache& cache) {
  const std::string why = detail::load_or_say_why(in, cache);
  detail::require<std::runtime_error>(why.empty(), why);
}

}}  // namespace qkv::QKV_ABI

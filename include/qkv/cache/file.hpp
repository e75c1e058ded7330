// cache/file.hpp — the bytes of a saved cache, read and written: byte order, checksum, errors.
// Format: saved_cache.hpp.
//
// Before: cache/paged_rows.hpp   Next: compress/key_directions.hpp
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cstdint>
#include <cstring>
#include <istream>
#include <limits>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include "blocks.hpp"

namespace qkv { inline namespace QKV_ABI { namespace detail {

/// CRC-32C (polynomial 0x1EDC6F41, reflected), eight bytes at a time.
class Crc32c {
 public:
  void add(const std::byte* p, std::size_t n) {
    const auto at = [&](std::size_t i) { return static_cast<std::uint32_t>(p[i]); };
    for (; n >= 8; p += 8, n -= 8) {
      const std::uint32_t low = state_ ^ (at(0) | at(1) << 8 | at(2) << 16 | at(3) << 24);
      state_ = tables[7][low & 255] ^ tables[6][low >> 8 & 255] ^ tables[5][low >> 16 & 255] ^ tables[4][low >> 24] ^
               tables[3][at(4)] ^ tables[2][at(5)] ^ tables[1][at(6)] ^ tables[0][at(7)];
    }
    for (; n > 0; ++p, --n) state_ = state_ >> 8 ^ tables[0][(state_ ^ at(0)) & 255];
  }
  std::uint32_t value() const { return ~state_; }

 private:
  /// tables[k][b]: the contribution of byte b to the sum when k more bytes follow it.
  static constexpr auto tables = [] {
    std::array<std::array<std::uint32_t, 256>, 8> t{};
    for (std::uint32_t b = 0; b < 256; ++b) {
      std::uint32_t sum = b;
      for (int bit = 0; bit < 8; ++bit) sum = sum >> 1 ^ (sum & 1U ? 0x82F63B78U : 0U);
      t[0][b] = sum;
    }
    for (std::size_t k = 1; k < 8; ++k)
      for (std::size_t b = 0; b < 256; ++b) t[k][b] = t[k - 1][b] >> 8 ^ t[0][t[k - 1][b] & 255];
    return t;
  }();
  std::uint32_t state_ = ~0U;
};

/// Numbers in the machine's byte order <-> little-endian bytes.
template <class T>
void little_endian([[maybe_unused]] std::byte* p, [[maybe_unused]] std::size_t n) {
  if constexpr (std::endian::native == std::endian::big)
    for (; n > 0; --n, p += sizeof(T)) std::reverse(p, p + sizeof(T));
}

/// The name of the storage that has this code in files.
inline const char* storage_of_code(std::uint32_t code) {
  const char* name = "unknown";
  const auto look = [&](const StorageTraits& traits) { name = traits.file_code == code ? traits.name : name; };
  look(storage_traits<double>);
  [&]<class... S>(std::type_identity<std::tuple<S...>>) {
    (look(storage_traits<S>), ...);
  }(std::type_identity<StorageTypes>{});
  return name;
}

/// What the first 84 bytes of a saved cache say.
struct SavedHeader {
  static constexpr std::size_t bytes = 88;  // with their checksum

  std::array<std::uint32_t, 3> tags{};  // version, kind, storage
  std::array<std::int64_t, 3> shape{}, ring{};
  std::array<std::int64_t, 2> place{};  // position, rows
  friend bool operator==(const SavedHeader&, const SavedHeader&) = default;

  template <class F>
  void for_each_field(std::byte* base, F&& f) {
    std::byte* p = base + 8;
    for (auto& x : tags) f(p, x), p += sizeof x;
    for (auto* group : {&shape, &ring})
      for (auto& x : *group) f(p, x), p += sizeof x;
    for (auto& x : place) f(p, x), p += sizeof x;
  }
};

inline constexpr const char* saved_magic = "qkvcache";
inline constexpr std::uint32_t saved_version = 1;

/// The caches' friend: what of a cache is saved, and how it is restored.
struct CacheFile {
  template <class Cache>
  static constexpr bool latent = requires(const Cache& cache) {
    cache.latent_rows();
  };
  template <class Cache>
  static constexpr bool ring = requires(const Cache& cache) {
    cache.window(), cache.pinned(), cache.slack();
  };

  template <class Cache>
  static std::uint32_t kind([[maybe_unused]] const Cache& cache) {
    if constexpr (latent<Cache>) return 3;
    if constexpr (ring<Cache>) return cache.positions_in_cache() ? 4 : 2;
    return 1;
  }
  template <class Cache>
  static SavedHeader header(const Cache& cache) {
    using S = typename Cache::Storage;
    static_assert(storage_traits<S>.file_code != 0,
                  "qkv: caches of a storage with a file_code can be saved (storage.hpp)");
    SavedHeader h;
    h.tags = {saved_version, kind(cache), storage_traits<S>.file_code};
    if constexpr (latent<Cache>)
      h.shape = {cache.latent_dim(), cache.rope_dim(), 0};
    else
      h.shape = {cache.kv_heads(), cache.head_dim(), cache.v_head_dim()};
    if constexpr (ring<Cache>) h.ring = {cache.window(), cache.pinned(), cache.slack()};
    h.place = {cache.position(), cache.rows()};
    return h;
  }

  /// Calls f(p, n) for the arrays of numbers that make up the rows, in the order of the file.
  template <class Cache, class F>
  static void for_each_array(const Cache& cache, F&& f) {
    if constexpr (latent<Cache>) {
      const auto all = cache.latent_rows();
      for (const auto& run : all.runs)
        for (Index i = 0; i < run.rows; ++i) {
          f(all.latent(run, i), all.latent_dim);
          f(all.rope(run, i), all.rope_dim);
          if constexpr (has_row_scale<typename Cache::Storage>) f(run.scales + i, Index(1));
        }
    } else {
      const auto all = cache.key_rows();
      for (const auto& run : all.runs)
        for (Index i = 0; i < run.rows; ++i) {
          for (Index h = 0; h < all.kv_heads; ++h) f(all.key(run, h, i), all.head_dim);
          for (Index h = 0; h < all.kv_heads; ++h) f(all.value(run, h, i), all.v_head_dim);
          if constexpr (has_row_scale<typename Cache::Storage>)
            for (const float* scales : {run.key_scales, run.value_scales})
              for (Index h = 0; h < all.kv_heads; ++h)
                f(scales + h * all.scale_head_stride + i * all.scale_row_stride, Index(1));
        }
    }
  }
  template <class Cache>
  static Index row_bytes_of(const Cache& cache) {
    using S = typename Cache::Storage;
    if constexpr (latent<Cache>)
      return row_bytes<S>(cache.latent_dim()) + row_bytes<WideStorage<S>>(cache.rope_dim());
    else
      return cache.kv_heads() * (row_bytes<S>(cache.head_dim()) + row_bytes<S>(cache.v_head_dim()));
  }

  template <class Cache>
  static bool can_restore(const Cache& cache, Index position, Index rows) {
    return cache.can_restore(position, rows);
  }
  /// Called last, for it may evict other sequences.
  template <class Cache>
  static bool make_room(Cache& cache, Index rows) {
    if constexpr (requires { cache.make_room_to_restore(rows); })
      return cache.make_room_to_restore(rows);
    else
      return true;
  }
  /// Writes the rows of a file whose checksum was right.
  template <class Cache>
  static void restore(Cache& cache, Index position, Index rows, std::byte* from) {
    cache.restore(position, rows);  // sets their number; they are uninitialised
    for_each_array(cache, [&]<class T>(const T* p, Index n) {
      const auto count = static_cast<std::size_t>(n);
      little_endian<T>(from, count);
      std::memcpy(const_cast<T*>(p), from, count * sizeof(T));
      from += count * sizeof(T);
    });
  }
};

/// The next n bytes, or fewer where the stream ends; memory is allocated as bytes arrive.
inline std::vector<std::byte> read_bytes(std::istream& in, Index n) {
  constexpr Index at_once = Index{1} << 20;
  std::vector<std::byte> bytes;
  while (in && static_cast<Index>(bytes.size()) < n) {
    const std::size_t held = bytes.size();
    const Index piece = std::min(at_once, n - static_cast<Index>(held));
    bytes.resize(held + static_cast<std::size_t>(piece));
    in.read(reinterpret_cast<char*>(bytes.data() + held), piece);
    bytes.resize(held + static_cast<std::size_t>(in.gcount()));
  }
  return bytes;
}

inline std::uint32_t little_endian_word(const std::byte* p) {
  std::uint32_t word = 0;
  for (int i = 0; i < 4; ++i) word |= static_cast<std::uint32_t>(p[i]) << 8 * i;
  return word;
}

/// Why the next bytes of the stream are not a saved cache that fits `cache`; or an empty text, and the cache is
/// restored.
template <class Cache>
std::string load_or_say_why(std::istream& in, Cache& cache) {
  const auto refuse = [](const auto&... parts) { return message_of({"the saved cache ", MessagePart(parts)...}); };

  std::vector<std::byte> head = read_bytes(in, static_cast<Index>(SavedHeader::bytes));
  if (head.empty()) return refuse("is not there: the stream is at its end, or had failed before");
  if (head.size() < 8 || std::memcmp(head.data(), saved_magic, 8) != 0)
    return refuse("does not begin with \"", saved_magic, "\": this is something else, or its beginning is damaged");
  if (head.size() < SavedHeader::bytes) return refuse("ends inside its header, after ", head.size(), " bytes");
  Crc32c crc;
  crc.add(head.data(), SavedHeader::bytes - 4);
  const bool intact = crc.value() == little_endian_word(head.data() + SavedHeader::bytes - 4);
  SavedHeader saved;
  saved.for_each_field(head.data(), [](std::byte* p, auto& field) {
    little_endian<std::remove_reference_t<decltype(field)>>(p, 1);
    std::memcpy(&field, p, sizeof field);
  });
  if (saved.tags[0] != saved_version)
    return refuse("has version ", saved.tags[0], " of the format; this program reads version ", saved_version);
  if (!intact) return refuse("has a damaged header: its checksum does not fit");

  const SavedHeader mine = CacheFile::header(cache);
  const auto text = [](const std::array<std::int64_t, 3>& x) {
    return message_of({"[", x[0], ", ", x[1], ", ", x[2], "]"});
  };
  if (saved.tags[1] != mine.tags[1])
    return refuse("is of kind ", saved.tags[1], ", this cache of kind ", mine.tags[1],
                  " (1: every row, 2: ring, 3: latent, 4: ring with positions in the cache)");
  if (saved.tags[2] != mine.tags[2])
    return refuse("has storage ", storage_of_code(saved.tags[2]), ", this cache ", storage_of_code(mine.tags[2]));
  if (saved.shape != mine.shape)
    return refuse("has shape ", text(saved.shape), ", this cache ", text(mine.shape),
                  " ([kv_heads, head_dim, v_head_dim], or [latent_dim, rope_dim, 0])");
  if (saved.ring != mine.ring)
    return refuse("has [window, pinned, slack] ", text(saved.ring), ", this cache ", text(mine.ring));
  const auto [position, rows] = saved.place;
  const Index row = CacheFile::row_bytes_of(cache);
  const auto refuse_rows = [&, n = rows, at = position] {
    return refuse("holds ", n, " rows up to position ", at, ", which do not fit this cache of capacity ",
                  cache.capacity(), " (or its pool)");
  };
  if (!CacheFile::can_restore(cache, position, rows) ||
      (row > 0 && rows > (std::numeric_limits<Index>::max() - 4) / row))
    return refuse_rows();

  std::vector<std::byte> body = read_bytes(in, rows * row + 4);
  const auto payload = static_cast<std::size_t>(rows * row);
  if (body.size() < payload + 4)
    return refuse("ends after ", body.size(), " of the ", payload + 4, " bytes of its ", rows, " rows");
  crc.add(body.data(), payload);
  if (crc.value() != little_endian_word(body.data() + payload))
    return refuse("has damaged rows: their checksum does not fit");
  if (!CacheFile::make_room(cache, rows)) return refuse_rows();
  CacheFile::restore(cache, position, rows, body.data());
  return {};
}

}}}  // namespace qkv::QKV_ABI::detail

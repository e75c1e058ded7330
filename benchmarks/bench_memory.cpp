// bench_memory — does a cache take the memory that memory.hpp says, of the allocator and of the machine?
//
//     memory/<cache>/<storage>/n:<>/kv_heads:<>/d:<>       cache: contiguous, growing (blocks of 1024), ring, paged
//     memory/<latent|paged_latent>/<storage>/n:<>/latent:<>/rope:<>
//
// Sizes of one layer of Llama 3 8B (8 key/value heads of 128) and of DeepSeek-V3 (latent 512, rope key 64). Every row
// makes a cache, fills it with n tokens and counts:
//
//     computed_bytes          n times the constexpr figure of memory.hpp
//     bytes, overhead_bytes   what the cache says of itself (paged: the pool and its sequence)
//     allocated_bytes         what operator new gave and has not been given back; requested by whoever, counted exactly
//     allocations             calls of the allocator
//     resident_bytes          growth of the resident set while the cache was made and filled (Linux; elsewhere absent)
//
// The time is that of making and filling it. A row is an error where computed_bytes or allocated_bytes are not what the
// cache says.
#include <benchmark/benchmark.h>
#include <qkv/qkv.hpp>

#include <fstream>
#include <memory>
#include <string>
#if defined(__GLIBC__)
#include <malloc.h>
#endif
#if defined(__unix__)
#include <unistd.h>
#endif

#include "support/allocations.hpp"
#include "support/machine.hpp"

namespace {

using qkv::Index;
using qkv::Matrix;

constexpr qkv::MultiHeadAttentionConfig heads = qkv::llama_3_8b;
constexpr qkv::LatentAttentionConfig mla = qkv::deepseek_v3;
constexpr Index piece = 512;  // tokens of an append

/// Bytes of the resident set; 0 where the system does not say.
Index resident() {
#if defined(__unix__)
  std::ifstream statm("/proc/self/statm");
  Index total = 0, pages = 0;
  if (statm >> total >> pages) return pages * static_cast<Index>(sysconf(_SC_PAGESIZE));
#endif
  return 0;
}

/// Memory that was freed goes back to the system, so that it is not taken for the next row's.
void give_back() {
#if defined(__GLIBC__)
  malloc_trim(0);
#endif
}

template <class Cache>
void fill(Cache& cache, Index n, const Matrix<float>& first, const Matrix<float>& second) {
  while (cache.position() < n) {
    const Index rows = std::min({piece, n - cache.position(), cache.max_append()});
    cache.append(first.topRows(rows), second.topRows(rows));
  }
}

template <class S>
struct Contiguous {
  static constexpr const char* name = "contiguous";
  qkv::KvCache<S> cache;
  explicit Contiguous(Index n) : cache({.kv_heads = heads.kv_heads, .head_dim = heads.head_dim, .capacity = n}) {}
  Index bytes() const { return cache.bytes(); }
  Index overhead() const { return cache.overhead_bytes(); }
};

template <class S>
struct Growing {
  static constexpr const char* name = "growing";
  qkv::KvCache<S> cache;
  explicit Growing(Index n)
      : cache({.kv_heads = heads.kv_heads, .head_dim = heads.head_dim, .capacity = n, .block = 1024}) {}
  Index bytes() const { return cache.bytes(); }
  Index overhead() const { return cache.overhead_bytes(); }
};

/// A window of n - 1 tokens behind the newest, full and wrapped.
template <class S>
struct Ring {
  static constexpr const char* name = "ring";
  qkv::RingCache<S> cache;
  explicit Ring(Index n)
      : cache({.kv_heads = heads.kv_heads, .head_dim = heads.head_dim, .window = n - 1, .slack = 1}) {}
  Index bytes() const { return cache.bytes(); }
  Index overhead() const { return cache.overhead_bytes(); }
};

template <class S>
struct Paged {
  static constexpr const char* name = "paged";
  qkv::PagePool<S> pool;
  qkv::PagedCache<S> cache;
  explicit Paged(Index n)
      : pool({.kv_heads = heads.kv_heads, .head_dim = heads.head_dim, .page_tokens = 64, .pages = n / 64}),
        cache(pool) {}
  Index bytes() const { return pool.bytes(); }
  Index overhead() const { return pool.overhead_bytes() + cache.overhead_bytes(); }
};

template <class S>
struct Latent {
  static constexpr const char* name = "latent";
  qkv::LatentCache<S> cache;
  explicit Latent(Index n) : cache({.latent_dim = mla.latent_dim, .rope_dim = mla.rope_dim, .capacity = n}) {}
  Index bytes() const { return cache.bytes(); }
  Index overhead() const { return cache.overhead_bytes(); }
};

template <class S>
struct PagedLatent {
  static constexpr const char* name = "paged_latent";
  qkv::LatentPagePool<S> pool;
  qkv::PagedLatentCache<S> cache;
  explicit PagedLatent(Index n)
      : pool({.latent_dim = mla.latent_dim, .rope_dim = mla.rope_dim, .page_tokens = 64, .pages = n / 64}),
        cache(pool) {}
  Index bytes() const { return pool.bytes(); }
  Index overhead() const { return pool.overhead_bytes() + cache.overhead_bytes(); }
};

template <template <class> class Holder>
inline constexpr bool is_latent =
    std::is_same_v<Holder<float>, Latent<float>> || std::is_same_v<Holder<float>, PagedLatent<float>>;

template <class S, template <class> class Holder>
void memory(benchmark::State& state, Index n) {
  constexpr bool latent = is_latent<Holder>;
  constexpr Index per_token = latent ? qkv::bytes_per_token<S>(mla) : qkv::bytes_per_token<S>(heads);
  const Matrix<float> first = machine::normal(piece, latent ? mla.latent_dim : heads.kv_heads * heads.head_dim, 1),
                      second = machine::normal(piece, latent ? mla.rope_dim : heads.kv_heads * heads.v_head_dim, 2);
  Index bytes = 0, overhead = 0, grown = 0;
  support::Allocations counted;
  for (auto _ : state) {
    give_back();
    const Index before = resident();
    const support::Allocations at_start = support::allocations();
    const double start = machine::seconds();
    const auto holder = std::make_unique<Holder<S>>(n);
    fill(holder->cache, n, first, second);
    state.SetIterationTime(machine::seconds() - start);
    counted = support::allocations() - at_start;
    counted.new_bytes -= static_cast<std::int64_t>(sizeof *holder);
    grown = resident() - before;
    bytes = holder->bytes(), overhead = holder->overhead();
  }
  const auto report = [&](const char* name, Index value) { state.counters[name] = static_cast<double>(value); };
  report("computed_bytes", n * per_token);
  report("bytes", bytes);
  report("overhead_bytes", overhead);
  report("allocated_bytes", counted.new_bytes);
  report("allocations", counted.count);
  if (grown > 0) report("resident_bytes", grown);
  report("cache_bytes_per_token", per_token);
  if (bytes != n * per_token)
    state.SkipWithError(
        ("bytes() is " + std::to_string(bytes) + ", memory.hpp says " + std::to_string(n * per_token)).c_str());
  else if (counted.new_bytes != bytes + overhead)
    state.SkipWithError(("allocated " + std::to_string(counted.new_bytes) + " bytes, the cache says " +
                         std::to_string(bytes + overhead))
                            .c_str());
}

template <class S, template <class> class Holder>
void add(Index n) {
  const std::string sizes =
      is_latent<Holder> ? "/latent:" + std::to_string(mla.latent_dim) + "/rope:" + std::to_string(mla.rope_dim)
                        : "/kv_heads:" + std::to_string(heads.kv_heads) + "/d:" + std::to_string(heads.head_dim);
  const std::string name =
      std::string("memory/") + Holder<S>::name + "/" + qkv::storage_name<S> + "/n:" + std::to_string(n) + sizes;
  benchmark::RegisterBenchmark(name.c_str(), [n](benchmark::State& state) { memory<S, Holder>(state, n); })
      ->UseManualTime()
      ->Iterations(1)
      ->Unit(benchmark::kMillisecond);
}

template <class S>
void add_caches(Index n) {
  add<S, Contiguous>(n);
  add<S, Growing>(n);
  add<S, Ring>(n);
  add<S, Paged>(n);
  add<S, Latent>(n);
  add<S, PagedLatent>(n);
}

[[maybe_unused]] const bool registered = [] {
  for (const Index n : {1024, 4096, 16384, 65536, 131072}) {
    add_caches<float>(n);
    add_caches<qkv::bfloat16>(n);
    add_caches<std::int8_t>(n);
  }
  benchmark::AddCustomContext("qkv build", qkv::build_name);
  return true;
}();

}  // namespace

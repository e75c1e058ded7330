// kv_cache.hpp — keys and values of the tokens so far: a new token computes one row of K and V, not all of them.
//
//     without:  step n projects n tokens and scores n² pairs           a whole text:  O(n²) projections, O(n³) pairs
//     with:     step n projects one token and scores n pairs           a whole text:  O(n) projections,  O(n²) pairs
//
// A cache distinguishes the `position` of the next token in its sequence, the `rows` held, and the `capacity`. In a
// KvCache position = rows; a RingCache evicts rows while its position goes on; a PagedCache stores rows in pages of a
// pool.
//
// Layout [kv_head][token][head_dim]: the rows of one head lie one after another, as decoding reads them. A token costs
// kv_heads·(head_dim + v_head_dim) numbers per layer: memory.hpp. Rows are stored as S (float, half, bfloat16, int8 with a
// scale per row and head); attention sees what the cache *holds*, the rows of the current call included.
//
// A cache belongs to one sequence of one layer, and to one thread at a time.
//
// Before: memory.hpp   Next: ring_cache.hpp
#pragma once

#include <algorithm>
#include <new>
#include <utility>
#include <vector>

#include "cache/blocks.hpp"
#include "cache/context_shift.hpp"
#include "key_rows.hpp"
#include "rope.hpp"

namespace qkv { inline namespace QKV_ABI {

/// All that attention and the layers require of a cache. KvCache, RingCache and PagedCache satisfy it; so may your own
/// type.
template <class C>
concept KeyValueCache = requires(C& cache, const C& constant, const View<float>& rows, Index position) {
  typename C::Storage;
  { constant.key_rows() } -> std::same_as<KeyRows<typename C::Storage>>;
  { constant.kv_heads() } -> std::same_as<Index>;
  { constant.head_dim() } -> std::same_as<Index>;
  { constant.v_head_dim() } -> std::same_as<Index>;
  { constant.position() } -> std::same_as<Index>;    // of the next token
  { constant.rows() } -> std::same_as<Index>;        // held
  { constant.max_append() } -> std::same_as<Index>;  // rows that one append may add now
  cache.append(rows, rows);
  { cache.try_append(rows, rows) } -> std::same_as<bool>;  // false, cache unchanged, where they do not fit
  cache.truncate(position);
  { cache.workspace() } -> std::same_as<Workspace&>;
};

/// What the three caches share. Errors leave a cache as it was; the try_ forms return false instead of raising where a
/// cache is full or a position out of range (wrong shapes always raise std::invalid_argument).
template <class Cache, StorageType S>
class CacheInterface {
 public:
  using Storage = S;

  Index kv_heads() const { return shape_.kv_heads; }
  Index head_dim() const { return shape_.head_dim; }
  Index v_head_dim() const { return shape_.v_head_dim; }

  /// Scratch memory for attention over this cache, kept between calls. A cache that was copied or moved starts with none.
  Workspace& workspace() { return workspace_; }

  /// Appends k [n, kv_heads·head_dim] and v [n, kv_heads·v_head_dim] of any floating-point scalar at position().
  /// std::length_error unless n <= max_append().
  template <MatrixLike K, MatrixLike V>
  void append(const K& k, const V& v) {
    self().scatter_rows(self().position(), k, v);
  }
  template <MatrixLike K, MatrixLike V>
  [[nodiscard]] bool try_append(const K& k, const V& v) {
    detail::check_rows(shape_, k, v);
    if (!self().make_room(k.rows())) return false;
    append(k, v);
    return true;
  }

  /// Whether n more rows fit. Of a paged cache, after its pool has evicted for missing pages (page_pool.hpp).
  bool make_room(Index n) const { return n <= self().max_append(); }

  /// Truncates to `position`: as if the rows from there on had never been appended. std::out_of_range unless
  /// can_truncate(position).
  void truncate(Index position) {
    detail::require<std::out_of_range>(self().can_truncate(position),
                                       "truncate(position) needs 0 <= position <= ", self().position(),
                                       " and every row visible from there still held; given position ", position);
    self().rewind(position);
  }
  [[nodiscard]] bool try_truncate(Index position) {
    if (!self().can_truncate(position)) return false;
    self().rewind(position);
    return true;
  }

  /// What the cache holds, in ascending position: keys [rows, kv_heads·head_dim], values [rows, kv_heads·v_head_dim].
  template <class T = detail::ReadAs<S>>
  Matrix<T> keys() const {
    return detail::load_all<T, false>(self().key_rows());
  }
  template <class T = detail::ReadAs<S>>
  Matrix<T> values() const {
    return detail::load_all<T, true>(self().key_rows());
  }

 protected:
  CacheInterface() = default;
  explicit CacheInterface(const detail::CacheShape& shape) : shape_(shape) { detail::check(shape); }

  /// Raises unless n rows may be written from `position` on: no row may be left out between those held and these.
  void check_write(Index position, Index n) const {
    detail::require<std::out_of_range>(position >= 0 && position <= self().position(),
                                       "rows may be written at positions 0 ... ", self().position(), "; given ",
                                       position);
    const Index grows = n - (self().position() - position);
    detail::require<std::length_error>(grows <= self().max_append(), "the cache (capacity ", self().capacity(),
                                       ", rows held ", self().rows(), ", position ", self().position(),
                                       ") takes at most ", self().max_append(), " more rows in one piece; given ",
                                       grows);
  }

  detail::CacheShape shape_;
  Workspace workspace_;

 private:
  Cache& self() { return static_cast<Cache&>(*this); }
  const Cache& self() const { return static_cast<const Cache&>(*this); }
};

struct KvCacheConfig {
  Index kv_heads = 1;
  Index head_dim = 0;
  Index v_head_dim = head_dim;
  Index capacity = 0;  // the most rows it will hold
  Index block = 0;     // 0: all of the capacity is allocated at once; else so many rows at a time, as they are needed
};

/// What scatter_rows does at the end of the storage: stop, or go on at its beginning.
enum class Wrap { none, circular };

/// Every row from position 0 on. Growing (config.block) never copies rows: attention iterates over the blocks as runs.
/// Appending a row costs amortised O(1) beyond writing its bytes, whatever the number of blocks.
template <StorageType S = float>
class KvCache : public CacheInterface<KvCache<S>, S> {
  using Base = CacheInterface<KvCache<S>, S>;

 public:
  /// std::invalid_argument unless capacity is positive and a multiple of block.
  explicit KvCache(const KvCacheConfig& config)
      : Base({config.kv_heads, config.head_dim, config.v_head_dim}), capacity_(config.capacity), block_(config.block) {
    detail::require(capacity_ >= 1 && block_ >= 0 && (block_ == 0 || capacity_ % block_ == 0),
                    "a cache needs capacity >= 1 and a block that divides it, or 0; given capacity ", capacity_,
                    ", block ", block_);
    if (block_ == 0) reserve(block_ = capacity_);
  }

  /// A copy holds the same bytes in its own memory.
  KvCache(const KvCache& other) : Base(other), capacity_(other.capacity_), block_(other.block_) {
    reserve(static_cast<Index>(other.blocks_.size()) * block_);
    for (std::size_t b = 0; b < other.runs_.size(); ++b)
      blocks_[b].copy_rows(other.blocks_[b], 0, 0, 0, 0, other.runs_[b].rows);
    rewind(other.rows_);
  }
  /// A moved-from cache has capacity 0.
  KvCache(KvCache&& other) noexcept { swap(other); }
  KvCache& operator=(KvCache other) noexcept {
    swap(other);
    return *this;
  }
  ~KvCache() = default;

  Index position() const { return rows_; }
  Index rows() const { return rows_; }
  Index capacity() const { return capacity_; }
  Index max_append() const { return capacity_ - rows_; }
  bool can_truncate(Index position) const { return position >= 0 && position <= rows_; }

  void clear() { rewind(0); }

  /// Context shift: evicts rows first … first+n-1; later rows move n positions down, values unchanged, keys rotated by
  /// -n. `rope`: the layer's rope(), the same at every shift; std::nullopt: keys have no positions and stay unchanged.
  /// Equal to a cache built without those rows, but for one more rounding of each key to S (int8: half a quantisation
  /// step), after any number of shifts: the first one allocates a second copy of the keys, and 8 bytes per row, for the
  /// blocks it rotates. Shift::in_place allocates neither, and rounds at every shift. A copy of the cache includes the
  /// unrotated keys; a loaded cache starts from the keys of the file. std::out_of_range unless 0 <= first and first + n
  /// <= rows(). Later shifts allocate nothing once the workspace is warm.
  template <class R>
  void drop_rows(Index first, Index n, const R& rope, Shift how = Shift::exact) {
    const auto* const rotation = detail::rope_of(rope);
    detail::check_shift(first, n, rows_, rotation, this->head_dim());
    const auto scratch = this->workspace_.lease(detail::shift_bytes<S>(rotation, this->kv_heads() * this->head_dim()));
    const Index left = rows_ - n;
    const auto unrotated = [](const auto& block) { return static_cast<bool>(block.unrotated()); };
    if (n > 0 && (rotation ? how == Shift::exact : std::any_of(blocks_.begin(), blocks_.end(), unrotated)))
      for (Index row = first; row < left; row += block_ - row % block_) block_of(row).keep_unrotated();
    detail::shift_blocks<S>(first, n, rows_, this->shape_, rotation, how, scratch.data(), [&](Index row) {
      return detail::BlockRow<S>{block_of(row), 0, row % block_};
    });
    rewind(left);
  }

  /// Lower-level than append: overwrites rows position … position+n-1, and appends those past rows(). Circular: ONNX
  /// TensorScatter, row (position + i) modulo capacity, for caches that are full or become so; rows then are slots, not
  /// positions (RingCache distinguishes them). std::out_of_range where rows would be left out, std::length_error past
  /// capacity.
  template <MatrixLike K, MatrixLike V>
  void scatter_rows(Index position, const K& k, const V& v, Wrap wrap = Wrap::none) {
    detail::check_rows(this->shape_, k, v);
    const Index n = k.rows();
    const bool circular = wrap == Wrap::circular && position >= 0 && n > 0;
    detail::require<std::length_error>(!circular || n <= capacity_, "a circular write takes at most capacity ",
                                       capacity_, " rows; given ", n);
    if (circular) position %= capacity_;
    const Index up_to_end = circular ? std::min(n, capacity_ - position) : n;
    this->check_write(position, up_to_end);
    const Index end = position + up_to_end;
    const auto& keys = viewable(k);
    const auto& values = viewable(v);
    reserve(end);
    for (Index i = 0; i < n; ++i) {
      const Index row = (position + i) % capacity_;
      block_of(row).store(0, row % block_, view(keys).row(i).data(), view(values).row(i).data());
    }
    hold(std::max(rows_, end), rows_ / block_);
  }

  /// Allocates memory for `rows` rows now, so that appending them allocates nothing.
  void reserve(Index rows) {
    rows = std::clamp<Index>(rows, 0, capacity_);
    const auto blocks = static_cast<std::size_t>(rows / block_ + (rows % block_ > 0 ? 1 : 0));
    if (blocks > blocks_.capacity()) blocks_.reserve(std::max(blocks, 2 * blocks_.capacity()));
    runs_.reserve(blocks_.capacity());
    while (blocks_.size() < blocks) blocks_.emplace_back(this->shape_, block_, 1);
  }

  /// Bytes of keys, values and scales: of all capacity, or of the blocks so far where the cache grows. See memory.hpp.
  Index bytes() const {
    Index sum = 0;
    for (const auto& block : blocks_) sum += block.bytes();
    return sum;
  }
  /// All other bytes: tables, workspace, and unrotated keys for context shifts.
  Index overhead_bytes() const {
    Index sum = static_cast<Index>(blocks_.capacity() * sizeof(blocks_[0]) + runs_.capacity() * sizeof(runs_[0])) +
                this->workspace_.bytes();
    for (const auto& block : blocks_) sum += block.unrotated().bytes();
    return sum;
  }

  /// For kernels; valid until the next change of the cache.
  KeyRows<S> key_rows() const { return detail::key_rows_of<S>(this->shape_, block_, runs_, rows_); }

 private:
  friend Base;
  friend detail::CacheFile;
  bool can_restore(Index position, Index rows) const { return rows == position && rows >= 0 && rows <= capacity_; }
  void restore(Index, Index rows) {
    reserve(rows);
    for (const auto& block : blocks_) block.unrotated().forget(0, block_);
    hold(rows, 0);
  }
  detail::CacheBlocks<S>& block_of(Index row) { return blocks_[static_cast<std::size_t>(row / block_)]; }
  void rewind(Index position) { hold(position, position / block_); }
  /// Sets the number of rows. Runs of the first `unchanged` blocks are kept, so that an append updates only the last
  /// ones.
  void hold(Index rows, Index unchanged) {
    rows_ = rows;
    runs_.resize(std::min(static_cast<std::size_t>(unchanged), runs_.size()));
    for (Index first = static_cast<Index>(runs_.size()) * block_; first < rows_; first += block_)
      runs_.push_back(
          blocks_[static_cast<std::size_t>(first / block_)].run(0, 0, std::min(block_, rows_ - first), first));
  }

  void swap(KvCache& other) noexcept {
    std::swap(this->shape_, other.shape_);
    std::swap(capacity_, other.capacity_);
    std::swap(block_, other.block_);
    std::swap(rows_, other.rows_);
    std::swap(blocks_, other.blocks_);
    std::swap(runs_, other.runs_);
  }

  Index capacity_ = 0, block_ = 1, rows_ = 0;
  std::vector<detail::CacheBlocks<S>> blocks_;
  std::vector<KeyRun<S>> runs_;
};

template <StorageType S>
inline constexpr bool detail::owns_rows<KvCache<S>> = true;

}}  // namespace qkv::QKV_ABI

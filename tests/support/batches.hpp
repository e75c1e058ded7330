// support/batches.hpp — several sequences in one call, against each of them alone.
#pragma once

#include <span>
#include <vector>

#include "layers.hpp"

namespace support {

/// The rows that each sequence brings in one call.
using Round = std::vector<Index>;

/// Unequal, none at all, and on both sides of every automatic choice; sequence 0 is the shortest at first.
inline const std::vector<Round> rounds = {{3, 41, 0, 7}, {1, 1, 1, 1},  {0, 5, 70, 4},
                                          {0, 0, 0, 0},  {2, 1, 0, 66}, {1, 1, 1, 1}};

inline std::vector<Index> offsets_of(const Round& round) {
  std::vector<Index> offsets = {0};
  for (const Index n : round) offsets.push_back(offsets.back() + n);
  return offsets;
}

template <class Cache>
std::vector<Cache*> pointers_to(std::vector<Cache>& caches) {
  std::vector<Cache*> pointers;
  for (Cache& cache : caches) pointers.push_back(&cache);
  return pointers;
}

template <class Layer, class T, class Cache, class... More>
Matrix<T> run_batch(const Layer& layer, const Matrix<T>& x, const std::vector<Index>& offsets,
                    const std::vector<Cache*>& caches, const More&... more) {
  Matrix<T> out = Matrix<T>::Constant(x.rows(), layer.config().model_dim, std::numeric_limits<T>::quiet_NaN());
  layer.forward_into(out, x, std::span<const Index>(offsets), std::span<Cache* const>(caches), more...);
  return out;
}

/// What an argument is to sequence s where it is called alone.
template <class X>
const X& own_of(const X& x, std::size_t) {
  return x;
}
template <class M>
const M& own_of(const qkv::PerSequence<M>& masks, std::size_t s) {
  return masks.list[s];
}

/// Every round in one call gives each sequence the bits it has alone. `together` and `alone` are four empty caches each.
template <class T, class Layer, class Cache, class Other, class... More>
bool batch_equals_alone(const Layer& layer, std::vector<Cache>& together, std::vector<Other>& alone,
                        const More&... more) {
  const auto pointers = pointers_to(together);
  std::uint64_t seed = 1;
  bool same = true;
  for (const Round& round : rounds) {
    const auto offsets = offsets_of(round);
    const Matrix<T> x = normals<T>(offsets.back(), layer.config().model_dim, seed++);
    const Matrix<T> out = run_batch(layer, x, offsets, pointers, more...);
    for (std::size_t s = 0; s < round.size(); ++s) {
      const Matrix<T> expected = layer.forward(x.middleRows(offsets[s], round[s]), alone[s], own_of(more, s)...);
      same = same && same_bits(out.middleRows(offsets[s], round[s]), expected) &&
             together[s].position() == alone[s].position();
    }
  }
  return same;
}

}  // namespace support

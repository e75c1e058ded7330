// support/storages.hpp — the storage types that tests go through.
#pragma once

#include <qkv/storage.hpp>

#include <cmath>
#include <limits>
#include <utility>

namespace support {

/// Of caches that float and double attention read.
using AllStorages = decltype(std::tuple_cat(std::declval<std::tuple<double>>(), std::declval<qkv::StorageTypes>()));

/// The largest rounding error of a number that is stored, of its size; with a row scale, of the size of the row's largest.
template <class S>
inline const double rounding = qkv::has_row_scale<S>
                                   ? 0.5 / static_cast<double>(qkv::storage_traits<S>.largest) * (1 + 1e-5)
                                   : std::exp2(-std::numeric_limits<S>::digits);

}  // namespace support

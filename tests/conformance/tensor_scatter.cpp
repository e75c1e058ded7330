// tensor_scatter.cpp — ONNX TensorScatter: rows written into a cache at a place of their own in each sequence.
//
//     past_cache [batch, …outer, capacity, …inner]   update [batch, …outer, n, …inner]   write_indices [batch]
//
// That is a KvCache of `outer` heads and `inner` features; the tensor serves as keys and as values, and both must agree.
#include <numeric>

#include <qkv/kv_cache.hpp>

#include "layout.hpp"
#include "operators.hpp"

namespace conformance {

template <class T>
Results tensor_scatter(const Case& c) {
  const Tensor &past = c.in("past_cache"), &update = c.in("update");
  const Tensor* indices = c.find_in("write_indices");
  const Index given_axis = c.integer("axis", -2), axis = given_axis < 0 ? given_axis + past.rank() : given_axis;
  expect(axis >= 1 && axis < past.rank(), "axis must be one of past_cache ", shape_text(past.shape),
         " and not the batch; given ", given_axis);
  const std::string mode = c.word("mode", "linear");
  expect(mode == "linear" || mode == "circular", "mode must be linear or circular; given ", mode);
  const Index batch = past.dim(0), capacity = past.dim(axis);
  expect(update.rank() == past.rank(), "update must have the rank of past_cache");
  for (Index i = 0; i < past.rank(); ++i)
    expect(i == axis || update.dim(i) == past.dim(i), "update must have past_cache's shape but for axis ", axis,
           "; given ", shape_text(update.shape), " and ", shape_text(past.shape));
  expect(!indices || indices->shape == std::vector{batch}, "write_indices must be [batch]");

  const auto product = [&](Index first, Index last) {
    Index n = 1;
    for (Index i = first; i < last; ++i) n *= past.dim(i);
    return n;
  };
  const Index outer = product(1, axis), inner = product(axis + 1, past.rank());
  Tensor old = past, fresh = update, by_keys = tensor_of({batch, outer, capacity, inner}), by_values = by_keys;
  old.shape = by_keys.shape;
  fresh.shape = {batch, outer, update.dim(axis), inner};

  for (Index b = 0; b < batch; ++b) {
    qkv::KvCache<T> cache({.kv_heads = outer, .head_dim = inner, .v_head_dim = inner, .capacity = capacity});
    const Matrix<T> held = heads_first<T>(old, b), rows = heads_first<T>(fresh, b);
    cache.append(held, held);
    const Index position = indices ? indices->integer(b) : 0;
    cache.scatter_rows(position, rows, rows, mode == "circular" ? qkv::Wrap::circular : qkv::Wrap::none);
    set_heads_first<T>(by_keys, b, cache.keys());
    set_heads_first<T>(by_values, b, cache.values());
  }
  by_keys.shape = by_values.shape = past.shape;
  return {{"present_cache", std::move(by_keys)}, {"present_cache", std::move(by_values)}};
}

template Results tensor_scatter<float>(const Case&);
template Results tensor_scatter<double>(const Case&);

}  // namespace conformance

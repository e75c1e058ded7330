// layers.hpp — what the cases of whole layers share: weights by name, and steps of tokens that fill caches.
#pragma once

#include <qkv/checkpoint.hpp>

#include "layout.hpp"

namespace conformance {

/// The case's inputs under their own names, as the converters of checkpoint.hpp take them.
template <class T>
qkv::Tensors<T> weights_of(const Case& c) {
  qkv::Tensors<T> tensors;
  for (const auto& [name, tensor] : c.inputs())
    if (tensor.rank() >= 1 && tensor.rank() <= 2) tensors.emplace(name, matrix<T>(tensor));
  return tensors;
}

/// Step i feeds `length` tokens of each sequence, the first at `start`.
struct Step {
  std::string name;
  const Tensor* x;  // [batch, length, model_dim]
  Index start, length;
};

inline std::vector<Step> steps_of(const Case& c, Index batch, Index model_dim) {
  std::vector<Step> steps;
  const Index n = c.integer("n_steps");
  expect(n >= 1 && batch >= 1, "n_steps and batch must be >= 1");
  for (Index i = 0; i < n; ++i) {
    const std::string name = "step" + std::to_string(i);
    const Step step{name, &c.in(name + ".x"), c.integer(name + ".start_pos"), c.integer(name + ".len")};
    expect(step.x->shape == std::vector{batch, step.length, model_dim}, name, ".x must be ",
           shape_text({batch, step.length, model_dim}), "; given ", shape_text(step.x->shape));
    steps.push_back(step);
  }
  return steps;
}

inline Index positions_of(const std::vector<Step>& steps) {
  Index n = 0;
  for (const Step& step : steps) n = std::max(n, step.start + step.length);
  return n;
}

/// One step of all sequences: layer.forward_into(out, x, row offsets, caches). A start before the end of what a cache
/// holds takes back the rows from there on.
template <class T, class Layer, class Cache, class... More>
Tensor forward_step(const Layer& layer, std::vector<Cache>& caches, const Step& step, const More&... more) {
  const Matrix<T> x = matrix<T>(*step.x);
  std::vector<Index> offsets{0};
  std::vector<Cache*> pointers;
  for (Cache& cache : caches) {
    cache.truncate(step.start);
    offsets.push_back(offsets.back() + step.length);
    pointers.push_back(&cache);
  }
  Matrix<T> out(x.rows(), x.cols());
  layer.forward_into(out, x, std::span<const Index>(offsets), std::span<Cache* const>(pointers), more...);
  Tensor y = tensor_of(step.x->shape);
  Eigen::Map<Matrix<double>>(y.values.data(), out.rows(), out.cols()) = out.template cast<double>();
  return y;
}

/// Cosines and sines of positions 0 … n-1.
template <class T>
void add_tables(Results& results, const qkv::RopeConfig& config, Index head_dim, Index n) {
  qkv::Rope<T> rope(config, head_dim);
  rope.reserve(n);
  for (const auto& [name, table] : {std::pair{"freqs_cos", &rope.cos()}, std::pair{"freqs_sin", &rope.sin()}}) {
    Tensor tensor = tensor_of({1, table->rows(), table->cols()});
    set_sequence<T>(tensor, 0, *table);
    tensor.shape = {table->rows(), table->cols()};
    results.emplace(name, std::move(tensor));
  }
}

}  // namespace conformance

// rotary.cpp — ONNX RotaryEmbedding: the caller's tables of cosines and sines, by position or a row for each token.
//
//     X [batch, heads, tokens, head_dim] or [batch, tokens, heads·head_dim] with num_heads
//     cos_cache, sin_cache [positions, dim/2] with position_ids [batch, tokens], or [batch, tokens, dim/2] without
#include <qkv/rope.hpp>

#include "layout.hpp"
#include "operators.hpp"

namespace conformance {

template <class T>
Results rotary_embedding(const Case& c) {
  const Tensor &x = c.in("X"), &cos = c.in("cos_cache"), &sin = c.in("sin_cache");
  const Tensor* ids = c.find_in("position_ids");
  expect(x.rank() == 3 || x.rank() == 4, "X must be of rank 3 or 4; given ", shape_text(x.shape));
  const Index batch = x.dim(0), tokens = x.dim(-2), heads = x.rank() == 4 ? x.dim(1) : c.integer("num_heads");
  expect(heads >= 1 && (x.rank() == 4 || x.dim(2) % heads == 0), "num_heads ", heads, " must divide the features of X ",
         shape_text(x.shape));
  const Index head_dim = x.rank() == 4 ? x.dim(3) : x.dim(2) / heads, given_dim = c.integer("rotary_embedding_dim", 0);
  const Index pairs = (given_dim == 0 ? head_dim : given_dim) / 2;
  expect(cos.dim(-1) == pairs && sin.dim(-1) == pairs, "the tables must have a column for each of ", pairs,
         " pairs; given ", shape_text(cos.shape), " and ", shape_text(sin.shape));
  if (ids)
    expect(ids->shape == std::vector{batch, tokens} && cos.rank() == 2 && sin.rank() == 2,
           "position_ids must be [batch, tokens] and the tables of rank 2; given ", shape_text(ids->shape), " and ",
           shape_text(cos.shape));
  else
    expect(cos.rank() == 3 && cos.dim(0) == batch && cos.dim(1) == tokens && sin.shape == cos.shape,
           "without position_ids the tables must be [batch, tokens, dim/2]; given ", shape_text(cos.shape));
  const qkv::Pairing pairing = c.integer("interleaved", 0) != 0 ? qkv::Pairing::interleaved : qkv::Pairing::half_split;

  Tensor y = tensor_of(x.shape);
  for (Index b = 0; b < batch; ++b) {
    Matrix<T> rows = onnx_sequence<T>(x, b);
    if (ids) {
      std::vector<Index> positions;
      for (Index i = 0; i < tokens; ++i) positions.push_back(ids->integer(b * tokens + i));
      qkv::apply_rope_into(rows, rows, heads, matrix<T>(cos), matrix<T>(sin), pairing, positions);
    } else {
      qkv::apply_rope_into(rows, rows, heads, sequence<T>(cos, b), sequence<T>(sin, b), pairing);
    }
    set_onnx_sequence(y, b, rows);
  }
  return {{"Y", std::move(y)}};
}

template Results rotary_embedding<float>(const Case&);
template Results rotary_embedding<double>(const Case&);

}  // namespace conformance

// onnx_attention.cpp — ONNX Attention, opset 23 to 25.
//
//     scale · q·k    ->  softcap  ->  + attn_mask  ->  causal, window, nonpad_kv_seqlen  ->  softmax  ->  · v
//
//     softcap                 soft_cap(c)                   numbers in attn_mask     bias(matrix), after the cap
//     is_causal, windows      window(left, right)           bool in attn_mask        boolean(matrix)
//     nonpad_kv_seqlen        lengths(n): the queries are the last valid tokens
//     past_key, past_value    a KvCache; the queries stand behind it
#include <algorithm>

#include <qkv/attention.hpp>
#include <qkv/kv_cache.hpp>

#include "layout.hpp"
#include "operators.hpp"

namespace conformance {
namespace {

struct Shapes {
  qkv::Heads heads;
  Index batch, n_queries, n_past, n_keys, head_dim, v_head_dim;

  explicit Shapes(const Case& c) {
    const Tensor &q = c.in("Q"), &k = c.in("K"), &v = c.in("V");
    expect((q.rank() == 3 || q.rank() == 4) && k.rank() == q.rank() && v.rank() == q.rank() && k.dim(0) == q.dim(0) &&
               v.dim(0) == q.dim(0) && k.dim(-2) == v.dim(-2),
           "Q, K and V must all be of rank 3 or 4 and agree in batch and keys; given ", shape_text(q.shape), ", ",
           shape_text(k.shape), ", ", shape_text(v.shape));
    const bool split = q.rank() == 4;
    heads = {.heads = split ? q.dim(1) : c.integer("q_num_heads"),
             .kv_heads = split ? k.dim(1) : c.integer("kv_num_heads")};
    check(heads);
    expect(!split || v.dim(1) == heads.kv_heads, "K and V must have the same heads");
    head_dim = split ? q.dim(3) : q.dim(2) / heads.heads;
    v_head_dim = split ? v.dim(3) : v.dim(2) / heads.kv_heads;
    batch = q.dim(0), n_queries = q.dim(-2), n_past = 0;
    if (const Tensor* past = c.find_in("past_key")) {
      expect(past->rank() == 4, "past_key must be of rank 4; given ", shape_text(past->shape));
      n_past = past->dim(2);
      check_past(*past, head_dim);
      check_past(c.in("past_value"), v_head_dim);
    }
    n_keys = n_past + k.dim(-2);
  }

 private:
  void check_past(const Tensor& past, Index width) const {
    expect(past.shape == std::vector{batch, heads.kv_heads, n_past, width}, "past_key and past_value must be ",
           shape_text({batch, heads.kv_heads, n_past, width}), "; given ", shape_text(past.shape));
  }
};

/// Sequence b's part of attn_mask, whose axes align with [batch, heads, n_queries, n_keys] from the right and stretch
/// where they are 1: one matrix for all heads, or one per head below another. Missing last keys are `hidden`.
template <class S>
Matrix<S> mask_rows(const Tensor& mask, const Shapes& shapes, Index b, S hidden) {
  expect(mask.rank() >= 1 && mask.rank() <= 4 && mask.dim(-1) <= shapes.n_keys, "attn_mask ", shape_text(mask.shape),
         " does not fit ", shapes.n_keys, " keys");
  const auto axis = [&](Index from_right, Index wanted) {
    const Index n = mask.rank() >= from_right ? mask.dim(-from_right) : 1;
    expect(n == 1 || n == wanted, "attn_mask ", shape_text(mask.shape), " does not broadcast to ",
           shape_text({shapes.batch, shapes.heads.heads, shapes.n_queries, shapes.n_keys}));
    return n;
  };
  const Index width = mask.dim(-1), rows = axis(2, shapes.n_queries), heads = axis(3, shapes.heads.heads),
              batch = axis(4, shapes.batch);
  Matrix<S> out = Matrix<S>::Constant(heads * shapes.n_queries, shapes.n_keys, hidden);
  for (Index h = 0; h < heads; ++h)
    for (Index i = 0; i < shapes.n_queries; ++i) {
      const Index row = ((batch == 1 ? 0 : b) * heads + h) * rows + (rows == 1 ? 0 : i);
      for (Index j = 0; j < width; ++j) out(h * shapes.n_queries + i, j) = static_cast<S>(mask[row * width + j]);
    }
  return out;
}

qkv::Window window_of(const Case& c) {
  const Index left = c.integer("left_window_size", -1), right = c.integer("right_window_size", -1);
  const qkv::Window window = qkv::window(left < 0 ? qkv::infinite : left, right < 0 ? qkv::infinite : right);
  return c.integer("is_causal", 0) != 0 ? qkv::Window{window.left, 0} : window;
}

/// f(cap): the score before attn_mask.
template <class F>
void with_cap(double cap, F&& f) {
  if (cap > 0)
    f(qkv::soft_cap(cap));
  else
    f(qkv::plain);
}

}  // namespace

template <class T>
Results onnx_attention(const Case& c) {
  const Shapes shapes(c);
  const qkv::Heads heads = shapes.heads;
  const Index batch = shapes.batch, n_queries = shapes.n_queries, n_past = shapes.n_past, n_keys = shapes.n_keys,
              head_dim = shapes.head_dim, v_head_dim = shapes.v_head_dim;
  const Tensor *attn_mask = c.find_in("attn_mask"), *nonpad = c.find_in("nonpad_kv_seqlen");
  expect(!nonpad || nonpad->shape == std::vector{batch}, "nonpad_kv_seqlen must be [batch]");
  const qkv::Window window = window_of(c);
  const double cap = c.number("softcap", 0);
  const Index mode = c.integer("qk_matmul_output_mode", 0);
  expect(mode >= 0 && mode <= 3, "qk_matmul_output_mode must be 0, 1, 2 or 3; given ", mode);
  const auto stage = static_cast<qkv::Stage>(mode);

  std::vector<Index> y_shape{batch, heads.heads, n_queries, v_head_dim};
  if (c.in("Q").rank() == 3) y_shape = {batch, n_queries, heads.heads * v_head_dim};
  Tensor y = tensor_of(y_shape), present_key = tensor_of({batch, heads.kv_heads, n_keys, head_dim}),
         present_value = tensor_of({batch, heads.kv_heads, n_keys, v_head_dim}),
         qk = tensor_of({batch, heads.heads * n_queries, n_keys});
  const bool cached = n_past > 0 || c.asks("present_key") || c.asks("present_value");

  for (Index b = 0; b < batch; ++b) {
    const Matrix<T> q = onnx_sequence<T>(c.in("Q"), b), k = onnx_sequence<T>(c.in("K"), b),
                    v = onnx_sequence<T>(c.in("V"), b);
    qkv::KvCache<T> cache(
        {.kv_heads = heads.kv_heads, .head_dim = head_dim, .v_head_dim = v_head_dim, .capacity = n_keys});
    if (cached) {
      if (n_past > 0) cache.append(heads_first<T>(c.in("past_key"), b), heads_first<T>(c.in("past_value"), b));
      cache.append(k, v);
      set_heads_first<T>(present_key, b, cache.keys());
      set_heads_first<T>(present_value, b, cache.values());
    }

    const std::vector<Index> valid{nonpad ? nonpad->integer(b) : n_keys};
    qkv::Options<T> options;
    options.scale = static_cast<double>(static_cast<float>(c.number("scale", 0)));  // an ONNX attribute is a float
    options.first_position = nonpad ? valid[0] - n_queries : n_past;
    options.kernel = c.kernel;

    const auto run = [&](const auto& mask, const auto& score_before_bias, const auto& score) {
      const Matrix<T> out = cached ? qkv::attention(q, cache, heads, mask, score, options)
                                   : qkv::attention(q, k, v, heads, mask, score, options);
      set_onnx_sequence(y, b, out);
      if (!c.asks("qk_matmul_output")) return;
      const auto weights = [&](const auto& at_stage) {
        return cached ? qkv::attention_weights(q, cache, heads, mask, at_stage, stage, options)
                      : qkv::attention_weights(q, k, heads, mask, at_stage, stage, options);
      };
      // ONNX counts attn_mask, numbers too, to the third stage.
      set_sequence<T>(qk, b, stage == qkv::Stage::scored ? weights(score_before_bias) : weights(score));
    };

    const auto visible = window & qkv::lengths(valid);
    with_cap(cap, [&](const auto& score) {
      if (!attn_mask) {
        run(visible, score, score);
      } else if (attn_mask->is_bool()) {
        const Matrix<bool> allowed = mask_rows<bool>(*attn_mask, shapes, b, false);
        run(visible &
                (allowed.rows() == n_queries ? qkv::boolean(allowed) : qkv::boolean_per_head(allowed, heads.heads)),
            score, score);
      } else {
        const Matrix<T> added = mask_rows<T>(*attn_mask, shapes, b, -std::numeric_limits<T>::infinity());
        run(visible, score,
            then(score, added.rows() == n_queries ? qkv::bias(added) : qkv::bias_per_head(added, heads.heads)));
      }
    });
  }
  qk.shape = {batch, heads.heads, n_queries, n_keys};
  return {{"Y", std::move(y)},
          {"present_key", std::move(present_key)},
          {"present_value", std::move(present_value)},
          {"qk_matmul_output", std::move(qk)}};
}

template Results onnx_attention<float>(const Case&);
template Results onnx_attention<double>(const Case&);

}  // namespace conformance

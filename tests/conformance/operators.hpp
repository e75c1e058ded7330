// operators.hpp — what the runner can run: each function reads a case's inputs, computes its outputs with the public API
// of this library in T = float or double, and returns them. Errors of the case are exceptions.
#pragma once

#include "case.hpp"

namespace conformance {

template <class T>
Results onnx_attention(const Case& c);  // Attention
template <class T>
Results flex_attention(const Case& c);  // FlexAttention
template <class T>
Results rotary_embedding(const Case& c);  // RotaryEmbedding
template <class T>
Results tensor_scatter(const Case& c);  // TensorScatter
template <class T>
Results deepseek_mla(const Case& c);  // DeepSeekMLA
template <class T>
Results torch_mha(const Case& c);  // TorchMHA
template <class T>
Results gpt2_attention(const Case& c);  // GPT2Attention
template <class T>
Results llama_attention(const Case& c);  // LlamaAttention
template <class T>
Results llama2c_model(const Case& c);  // Llama2cModel

}  // namespace conformance

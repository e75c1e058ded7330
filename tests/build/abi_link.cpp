// Two translation units that pass one of our types between them: abi_link.cmake compiles each by flags of its own.
#include <qkv/softmax.hpp>

float largest_sum(const qkv::SoftmaxState<float>& state);

#ifdef QKV_CALLER
int main() { return largest_sum(qkv::SoftmaxState<float>::empty(3, 2, 5)) == 0 ? 0 : 1; }
#else
float largest_sum(const qkv::SoftmaxState<float>& state) { return state.sum.maxCoeff(); }
#endif

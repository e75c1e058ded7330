// Two translation units use the same functions: nothing is defined twice, and both see the same objects.
#include <qkv/qkv.hpp>

float sum_of_attention(const Eigen::MatrixXf& x);  // odr_b.cpp
qkv::ErrorHandler install(qkv::ErrorHandler handler);

int main() {
  const Eigen::MatrixXf x = Eigen::MatrixXf::Random(5, 6);
  const float here = qkv::attention(x, x, x, {.heads = 3}, qkv::causal).sum();
  const qkv::ErrorHandler mine = [](const char*) {};
  qkv::set_error_handler(mine);
  return here == sum_of_attention(x) && install(nullptr) == mine ? 0 : 1;
}

#include <qkv/qkv.hpp>

float sum_of_attention(const Eigen::MatrixXf& x);
qkv::ErrorHandler install(qkv::ErrorHandler handler);

float sum_of_attention(const Eigen::MatrixXf& x) { return qkv::attention(x, x, x, {.heads = 3}, qkv::causal).sum(); }
qkv::ErrorHandler install(qkv::ErrorHandler handler) { return qkv::set_error_handler(handler); }

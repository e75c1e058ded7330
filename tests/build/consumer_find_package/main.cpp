// A user's program: the umbrella header, one call, a result that is known.
#include <cmath>
#include <cstdio>
#include <qkv/qkv.hpp>

int main() {
  // Constant values come back exactly, whatever the weights.
  const Eigen::MatrixXf q = Eigen::MatrixXf::Random(5, 2 * 7), k = Eigen::MatrixXf::Random(9, 7);
  const Eigen::MatrixXf v = Eigen::MatrixXf::Constant(9, 3, 0.5f);
  const auto out = qkv::attention(q, k, v, {.heads = 2, .kv_heads = 1}, qkv::causal);
  std::printf("qkv %d.%d.%d, %s: [%td, %td]\n", qkv::version.major, qkv::version.minor, qkv::version.patch,
              qkv::build_name, out.rows(), out.cols());
  return out.rows() == 5 && out.cols() == 6 && (out.array() - 0.5f).abs().maxCoeff() < 1e-6f ? 0 : 1;
}

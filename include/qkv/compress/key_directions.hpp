// compress/key_directions.hpp — keys over the kv heads, RoPE pair by pair: their principal directions, and which need RoPE.
//
// A pair of features (a, b) of kv head g is a complex number z_g; zᴴz [kv_heads, kv_heads] is a sum over tokens. RoPE
// multiplies all z_g by the same e^(jφ), so it commutes with a change to the eigenvectors of zᴴz.
//
// Before: cache/file.hpp   Next: kernel/pair_rule.hpp
#pragma once

#include "../base/eigen.hpp"

#include <Eigen/Eigenvalues>

#include <algorithm>
#include <cmath>
#include <tuple>
#include <utility>
#include <vector>

#include "../rope_config.hpp"

namespace qkv { inline namespace QKV_ABI { namespace detail {

/// a·b and aᵀ·m·a. Every product of a compression goes through here: each kind that Eigen compiles costs a second.
inline Eigen::MatrixXd product(const Eigen::MatrixXd& a, const Eigen::MatrixXd& b) { return a * b; }
inline Eigen::MatrixXd moments_of(const Eigen::MatrixXd& a, const Eigen::MatrixXd& m) {
  return product(a.transpose(), product(m, a));
}

/// A complex direction x + jy over the kv heads, of norm 1.
struct KeyDirection {
  Eigen::VectorXd x, y;
  double energy = 0;  // σ², of z along it
  double loss = 0;    // energy of the error without RoPE
  Index pair = 0;
};

/// The eigenvectors of the Hermitian matrix r + jq >= 0, largest first. As a real matrix [[r, −q], [q, r]] it has each
/// eigenvalue twice, for v and jv; so one vector is extracted at a time, and its eigenvalue moved below all others.
inline std::vector<KeyDirection> principal_directions(Eigen::MatrixXd r, Eigen::MatrixXd q) {
  const Index n = r.rows();
  const double trace = r.trace(), below = trace > 0 ? trace : 1;
  std::vector<KeyDirection> found;
  Eigen::MatrixXd real(2 * n, 2 * n);
  for (Index i = 0; i < n; ++i) {
    real << r, -q, q, r;
    const Eigen::SelfAdjointEigenSolver<Eigen::MatrixXd> solver(real);
    const Eigen::VectorXd v = solver.eigenvectors().col(2 * n - 1), x = v.head(n), y = v.tail(n);
    const double value = solver.eigenvalues()(2 * n - 1);
    found.push_back({x, y, std::max(value, 0.0)});
    r -= (value + below) * (x * x.transpose() + y * y.transpose());
    q -= (value + below) * (y * x.transpose() - x * y.transpose());
  }
  return found;
}

/// F with F·Fᵀ = a (symmetric, >= 0) and F⁻¹; directions in which a vanishes keep a thousandth of the largest.
inline std::pair<Eigen::MatrixXd, Eigen::MatrixXd> root_and_inverse(const Eigen::MatrixXd& a) {
  const Eigen::SelfAdjointEigenSolver<Eigen::MatrixXd> solver(a);
  const double largest = solver.eigenvalues().maxCoeff();
  const Eigen::VectorXd root = solver.eigenvalues().cwiseMax(largest > 0 ? 1e-6 * largest : 1).cwiseSqrt();
  Eigen::MatrixXd forward = solver.eigenvectors(), back = solver.eigenvectors().transpose();
  for (Index i = 0; i < root.size(); ++i) forward.col(i) *= root(i), back.row(i) /= root(i);
  return {forward, back};
}

/// The mean of |e^(jφ) − 1|² over the distances of a context: what is lost where a pair has no RoPE.
inline double mean_rotation_loss(double frequency, Index context) {
  double sum = 0;
  for (Index distance = 0; distance < context; ++distance)
    sum += 2 - 2 * std::cos(frequency * static_cast<double>(distance));
  return sum / static_cast<double>(context);
}

/// The two features of pair i among dim rotated ones.
inline std::pair<Index, Index> pair_features(Pairing pairing, Index dim, Index i) {
  return pairing == Pairing::interleaved ? std::pair(2 * i, 2 * i + 1) : std::pair(i, i + dim / 2);
}

/// All directions of all pairs, those first whose RoPE matters most. gram [kv_heads·head_dim, kv_heads·head_dim]: the
/// keys' second moments; frequency [dim / 2].
inline std::vector<KeyDirection> key_directions(const Eigen::MatrixXd& gram, Index kv_heads,
                                                const RowVector<double>& frequency, Pairing pairing, Index context) {
  const Index head_dim = gram.rows() / kv_heads;
  std::vector<KeyDirection> all;
  for (Index i = 0; i < frequency.size(); ++i) {
    const auto [a, b] = pair_features(pairing, 2 * frequency.size(), i);
    Eigen::MatrixXd r(kv_heads, kv_heads), q(r);  // zᴴz = r + jq
    for (Index g = 0; g < kv_heads; ++g)
      for (Index h = 0; h < kv_heads; ++h) {
        const Index from = g * head_dim, to = h * head_dim;
        r(g, h) = gram(from + a, to + a) + gram(from + b, to + b);
        q(g, h) = gram(from + a, to + b) - gram(from + b, to + a);
      }
    const double loss = mean_rotation_loss(frequency(i), context);
    for (auto& direction : principal_directions(r, q)) {
      direction.loss = direction.energy * loss;
      direction.pair = i;
      all.push_back(std::move(direction));
    }
  }
  std::stable_sort(all.begin(), all.end(), [](const KeyDirection& x, const KeyDirection& y) {
    return std::tie(x.loss, x.energy) > std::tie(y.loss, y.energy);
  });
  return all;
}

}}}  // namespace qkv::QKV_ABI::detail

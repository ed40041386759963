// SPDX-License-Identifier: Apache-2.0
// The DW shortcut with one kernel: a training step, two passes over the tokens forward and two backward, and one pass in evaluation.
#include <cmath>
#include <vector>

#include "../tensor_args.h"
#include "launch.h"

namespace lifeops {
namespace {

// Per-channel values in the accumulation type.
template <class A> A* channel_values(const Tensor& t, const char* name, int64_t C, DType dtype) {
  check_accumulated(t, name, C, dtype);
  return static_cast<A*>(t.mutable_data_ptr());
}

template <class T> std::vector<double> converted(const void* p, int64_t n) { return {static_cast<const T*>(p), static_cast<const T*>(p) + n}; }

std::vector<double> in_double(const Tensor& t) {
  switch (dtype_of(t)) {
    case DType::f64: return converted<double>(t.const_data_ptr(), t.numel());
    case DType::f32: return converted<float>(t.const_data_ptr(), t.numel());
    case DType::f16: return converted<torch::headeronly::Half>(t.const_data_ptr(), t.numel());
    default: return converted<torch::headeronly::BFloat16>(t.const_data_ptr(), t.numel());
  }
}
// C values of a parameter, or of what stands for it.
std::vector<double> parameter(const std::optional<Tensor>& t, const char* name, int64_t C, double otherwise) {
  if (!t) return std::vector<double>(size_t(C), otherwise);
  check_size(*t, name, C);
  return in_double(*t);
}

void forward(const Tensor& x, const Tensor& block_output, const Tensor& weight, const std::optional<Tensor>& bias,
             const std::optional<Tensor>& gamma, const std::optional<Tensor>& beta, double eps, const Tensor& y, const Tensor& mean,
             const Tensor& var, const Tensor& affine, int64_t H, int64_t W, int64_t P, int64_t isa) {
  const TokenDWConvParams p = forward_params(x, weight, bias, block_output, y, H, W, P, P, int64_t(Prefix::zero), false);
  const int64_t C = p.C;
  const std::vector<double> gammas = parameter(gamma, "gamma", C, 1), betas = parameter(beta, "beta", C, 0);
  if (p.B * H * W * C == 0) return;
  const auto run = [&](auto zero) {
    using A = decltype(zero);
    A *means = channel_values<A>(mean, "mean", C, p.dtype), *vars = channel_values<A>(var, "var", C, p.dtype);
    A *scales = channel_values<A>(affine, "affine", 3 * C, p.dtype), *shifts = scales + C, *rstds = shifts + C;
    std::vector<A> moments(size_t(2 * C), A(0));
    const Rows rows{const_cast<char*>(behind(x, P, p.dtype)), x.stride(0), x.stride(1)};
    launch_channel_stats(rows, p.B, H * W, C, p.dtype, Act::gelu, isa, moments.data());
    const double n = double(p.B * H * W);
    for (int64_t c = 0; c < C; ++c) {
      const double m2 = double(moments[size_t(C + c)]), r = 1 / std::sqrt(m2 / n + eps), s = gammas[size_t(c)] * r;
      means[c] = moments[size_t(c)], vars[c] = A(m2 / (n > 1 ? n - 1 : 1));
      rstds[c] = A(r), scales[c] = A(s), shifts[c] = A(betas[size_t(c)] - double(means[c]) * s);
    }
    const ChannelAffine prologue{scales, shifts, Act::gelu_first};
    TokenDWConvExtras extras{};
    extras.prologue = &prologue, extras.backwards = true;
    launch_forward(p, extras, isa);
  };
  p.dtype == DType::f64 ? run(double{}) : run(float{});
}

// Running statistics mean and var: without them (0, and 1 with eps) gamma and beta are the affine.
void evaluate(const Tensor& x, const Tensor& block_output, const Tensor& weight, const std::optional<Tensor>& bias,
              const std::optional<Tensor>& mean, const std::optional<Tensor>& var, const std::optional<Tensor>& gamma,
              const std::optional<Tensor>& beta, double eps, const Tensor& y, int64_t H, int64_t W, int64_t P, int64_t isa) {
  const TokenDWConvParams p = forward_params(x, weight, bias, block_output, y, H, W, P, P, int64_t(Prefix::zero), false);
  const std::vector<double> means = parameter(mean, "mean", p.C, 0), vars = parameter(var, "var", p.C, 1 - eps);
  const std::vector<double> gammas = parameter(gamma, "gamma", p.C, 1), betas = parameter(beta, "beta", p.C, 0);
  const auto run = [&](auto zero) {
    using A = decltype(zero);
    std::vector<A> affine(size_t(2 * p.C));
    for (int64_t c = 0; c < p.C; ++c) {
      const double s = gammas[size_t(c)] / std::sqrt(vars[size_t(c)] + eps);
      affine[size_t(c)] = A(s), affine[size_t(p.C + c)] = A(mean ? betas[size_t(c)] - means[size_t(c)] * s : betas[size_t(c)]);
    }
    const ChannelAffine prologue{affine.data(), affine.data() + p.C, Act::gelu_first};
    TokenDWConvExtras extras{};
    extras.prologue = &prologue;
    launch_forward(p, extras, isa);
  };
  p.dtype == DType::f64 ? run(double{}) : run(float{});
}

// dw in the accumulation type. See lifeops/ops/dw_shortcut/function.py for the formulas.
void backward(const Tensor& dy, const Tensor& x, const Tensor& weight, const Tensor& mean, const Tensor& affine,
              const std::optional<Tensor>& dx, const Tensor& dw, const Tensor& dbias, const Tensor& dgamma, const Tensor& dbeta, int64_t H,
              int64_t W, int64_t P, int64_t isa) {
  const int64_t K = weight.size(weight.dim() - 1);
  GradWeightParams g = grad_weight_params(dy, x, dw, {}, K, H, W, P, P);
  const int64_t C = g.C, taps = K * K;
  check_size(weight, "weight", C * taps);
  check_accumulated(dw, "dw", C * taps, g.dtype);
  if (g.B * H * W * C == 0) return;
  const auto run = [&](auto zero) {
    using A = decltype(zero);
    const auto values = [&](const Tensor& t, const char* name, int64_t rows = 1) {
      return channel_values<A>(t, name, rows * C, g.dtype);
    };
    const A *means = values(mean, "mean"), *scales = values(affine, "affine", 3), *shifts = scales + C, *rstds = shifts + C;
    A* to_dw = static_cast<A*>(dw.mutable_data_ptr());
    A *to_dbias = values(dbias, "dbias"), *to_dgamma = values(dgamma, "dgamma"), *to_dbeta = values(dbeta, "dbeta");
    std::vector<A> windows(size_t(C * taps)), ones(size_t(C), A(1)), zeros(size_t(C), A(0)), a(zeros), b(zeros);
    g.windows = windows.data();
    const ChannelAffine gelu{ones.data(), zeros.data(), Act::gelu};
    launch_grad_weight(g, gelu, isa);
    const std::vector<double> weights = in_double(weight);
    const double n = double(g.B * H * W);
    for (int64_t c = 0; c < C; ++c) {
      double dscale = 0, dshift = 0;
      for (int64_t t = c * taps; t < (c + 1) * taps; ++t) {
        const double w = weights[size_t(t)], one = double(windows[size_t(t)]);
        dscale += w * double(to_dw[t]), dshift += w * one;
        to_dw[t] = A(double(scales[c]) * double(to_dw[t]) + double(shifts[c]) * one);
      }
      const double gain = double(rstds[c]) * (dscale - double(means[c]) * dshift), slope = -double(scales[c]) * double(rstds[c]) * gain / n;
      to_dbias[c] = windows[size_t(c * taps + taps / 2)], to_dgamma[c] = A(gain), to_dbeta[c] = A(dshift);
      a[size_t(c)] = A(-double(scales[c]) * dshift / n - slope * double(means[c])), b[size_t(c)] = A(slope);
    }
    if (!dx) return;
    const TokenDWConvParams p = forward_params(dy, weight, {}, {}, *dx, H, W, P, P, int64_t(Prefix::zero), true);
    const ChannelAffine derivative{scales, shifts, Act::gelu_first};
    const TokenDWConvExtras extras{nullptr, nullptr, &derivative, a.data(), b.data(), behind(x, P, g.dtype), x.stride(0), x.stride(1), false, true};
    launch_forward(p, extras, isa);
  };
  g.dtype == DType::f64 ? run(double{}) : run(float{});
}

}  // namespace
}  // namespace lifeops

STABLE_TORCH_LIBRARY_IMPL(lifeops_native, CPU, m) {
  m.impl("dw_shortcut", TORCH_BOX(&lifeops::forward));
  m.impl("dw_shortcut_eval", TORCH_BOX(&lifeops::evaluate));
  m.impl("dw_shortcut_bwd", TORCH_BOX(&lifeops::backward));
}

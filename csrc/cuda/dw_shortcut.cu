// SPDX-License-Identifier: Apache-2.0
// The DW shortcut with one kernel on CUDA tensors: four launches for a training step's forward, five for its backward.
#include "channel_act_launch.h"
#include "dw_shortcut_launch.h"
#include "token_dwconv_act_launch.h"
#include "values.h"

namespace lifeops {
namespace cuda {
namespace {

ChannelValues parameter(const std::optional<Tensor>& t, const char* name, int64_t C, const Tensor& first) {
  if (!t) return {nullptr, DType::f32};
  check_device(name, *t, first);
  check_size(*t, name, C);
  return {t->const_data_ptr(), dtype_of(*t)};
}

Rows patches(const Tensor& t, int64_t P, DType dtype) { return {const_cast<char*>(behind(t, P, dtype)), t.stride(0), t.stride(1)}; }

Tensor accumulators(const Tensor& like, int64_t rows, int64_t C, DType dtype) {
  return torch::stable::new_empty(like, {rows, C}, accumulator_type(dtype));
}

// Scale and shift of the norm, in front of the convolution.
template <typename T>
cudaError_t launch_convolution(const TokenDWConvParams& p, const void* affine, int device, cudaStream_t stream) {
  using Acc = acc_t<T>;
  const AffineAct prologue{affine, static_cast<const Acc*>(affine) + p.C, Act::gelu_first}, nothing{nullptr, nullptr, Act::none};
  const auto plan = plan_token_dwconv_act(p, prologue, nothing, false, attribute(cudaDevAttrMultiProcessorCount, device));
  return launch_token_dwconv_act<T>(plan, {}, {}, stream);
}

// The statistics of GELU(x), joined to chunks.
template <typename T>
cudaError_t launch_stats(const TokenDWConvParams& p, const Rows& x, const Tensor& like, ShortcutNormArgs* norm, cudaStream_t stream) {
  ChannelActParams s{};
  s.pass = ChannelPass::stats, s.x = x, s.B = p.B, s.n = p.H * p.W, s.C = p.C, s.dtype = p.dtype, s.act = Act::gelu;
  auto plan = plan_channel_act(s, 0);
  norm->stats = plan_task_sums(plan.args.parts, p.B, p.C, kForwardSums);
  const SumsBuffers buffers(norm->stats, p.dtype, like);
  plan.args.partial = buffers.partial();
  buffers.give(norm->stats, nullptr);
  const cudaError_t error = launch_channel_act<T>(plan, norm->stats, stream);
  return error ? error : launch_shortcut_norm<T>(*norm, stream);  // before the buffers go
}

void dw_shortcut(Tensor x, Tensor block_output, Tensor weight, std::optional<Tensor> bias, std::optional<Tensor> gamma,
                 std::optional<Tensor> beta, double eps, Tensor y, Tensor mean, Tensor var, Tensor affine, int64_t H, int64_t W, int64_t P,
                 int64_t) {
  check_device("x", x, x), check_device("block_output", block_output, x), check_device("weight", weight, x);
  check_device("bias", bias, x), check_device("y", y, x);
  const TokenDWConvParams p = forward_params(x, weight, bias, block_output, y, H, W, P, P, int64_t(Prefix::zero), false);
  ShortcutNormArgs norm{};
  norm.gamma = parameter(gamma, "gamma", p.C, x), norm.beta = parameter(beta, "beta", p.C, x);
  norm.eps = eps, norm.C = p.C, norm.n = static_cast<double>(p.B * H * W);
  norm.mean = checked_values(mean, "mean", p.C, p.dtype, x), norm.var = checked_values(var, "var", p.C, p.dtype, x);
  norm.affine = checked_values(affine, "affine", 3 * p.C, p.dtype, x);
  if (p.B * H * W * p.C == 0) return;
  const int device = x.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const cudaStream_t stream = current_stream(device);
  const cudaError_t error = by_dtype(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    const cudaError_t before = launch_stats<T>(p, patches(x, P, p.dtype), x, &norm, stream);
    return before ? before : launch_convolution<T>(p, norm.affine, device, stream);
  });
  check_launch("dw_shortcut", error, device);
}

void dw_shortcut_eval(Tensor x, Tensor block_output, Tensor weight, std::optional<Tensor> bias, std::optional<Tensor> mean,
                      std::optional<Tensor> var, std::optional<Tensor> gamma, std::optional<Tensor> beta, double eps, Tensor y, int64_t H,
                      int64_t W, int64_t P, int64_t) {
  check_device("x", x, x), check_device("block_output", block_output, x), check_device("weight", weight, x);
  check_device("bias", bias, x), check_device("y", y, x);
  const TokenDWConvParams p = forward_params(x, weight, bias, block_output, y, H, W, P, P, int64_t(Prefix::zero), false);
  ShortcutNormArgs norm{};
  norm.running_mean = parameter(mean, "mean", p.C, x), norm.running_var = parameter(var, "var", p.C, x);
  norm.gamma = parameter(gamma, "gamma", p.C, x), norm.beta = parameter(beta, "beta", p.C, x), norm.eps = eps, norm.C = p.C;
  if (p.B * H * W * p.C == 0) return;
  const int device = x.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const Tensor affine = accumulators(x, 3, p.C, p.dtype);
  norm.affine = affine.mutable_data_ptr();
  const cudaStream_t stream = current_stream(device);
  const cudaError_t error = by_dtype(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    const cudaError_t before = launch_shortcut_norm<T>(norm, stream);
    return before ? before : launch_convolution<T>(p, norm.affine, device, stream);
  });
  check_launch("dw_shortcut_eval", error, device);
}

// GELU in front of the filter's gradient, whose partial sums are left to the kernels between.
template <typename T>
cudaError_t launch_filter_sums(const Tensor& dy, const TokenDWConvGradWeightParams& p, ShortcutGradArgs* a, cudaStream_t stream) {
  auto plan = plan_token_dwconv_act_grad_weight(p, {nullptr, nullptr, Act::gelu});
  TokenDWConvGradWeightArgs& conv = plan.args.conv;
  const Tensor partial = torch::stable::new_empty(dy, {conv.chunks, conv.taps, p.C}, accumulator_type(p.dtype));
  conv.partial = partial.mutable_data_ptr(), a->partial = conv.partial, a->chunks = conv.chunks, conv.p.dw = nullptr;
  const cudaError_t error = launch_token_dwconv_act_grad_weight<T>(plan, stream);
  return error ? error : launch_shortcut_grad<T>(*a, p.dtype, stream);  // before the partial sums go
}

template <typename T>
cudaError_t launch_grad_input(const TokenDWConvParams& p, const ShortcutGradArgs& a, int device, cudaStream_t stream) {
  using Acc = acc_t<T>;
  const Acc *affine = static_cast<const Acc*>(a.affine), *ab = static_cast<const Acc*>(a.ab);
  const AffineAct prologue{affine, affine + p.C, Act::gelu_first};
  const int multiprocessors = attribute(cudaDevAttrMultiProcessorCount, device);
  return launch_token_dwconv_act_grad_input<T>(plan_token_dwconv_act_grad_input(p, prologue, ab, ab + p.C, multiprocessors), {}, stream);
}

void dw_shortcut_bwd(Tensor dy, Tensor x, Tensor weight, Tensor mean, Tensor affine, std::optional<Tensor> dx, Tensor dw, Tensor dbias,
                     Tensor dgamma, Tensor dbeta, int64_t H, int64_t W, int64_t P, int64_t) {
  check_device("dy", dy, dy), check_device("x", x, dy), check_device("weight", weight, dy), check_device("dx", dx, dy);
  const int64_t K = weight.size(weight.dim() - 1), C = dy.size(2);
  const TokenDWConvGradWeightParams p = grad_weight_params(dy, x, dw, {}, K, H, W, P, P);
  check_size(weight, "weight", C * K * K);
  ShortcutGradArgs a{};
  a.dy = patches(dy, P, p.dtype), a.B = p.B, a.H = H, a.W = W, a.C = C, a.K = p.K;
  a.weight = weight.const_data_ptr(), a.weight_dtype = dtype_of(weight);
  a.mean = checked_values(mean, "mean", C, p.dtype, dy), a.affine = checked_values(affine, "affine", 3 * C, p.dtype, dy);
  a.dw = checked_values(dw, "dw", C * K * K, p.dtype, dy), a.dbias = checked_values(dbias, "dbias", C, p.dtype, dy);
  a.dgamma = checked_values(dgamma, "dgamma", C, p.dtype, dy), a.dbeta = checked_values(dbeta, "dbeta", C, p.dtype, dy);
  if (p.B * H * W * C == 0) return;
  const int device = dy.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const Tensor total = accumulators(dy, H * W, C, p.dtype), sums = accumulators(dy, 2 * K * K, C, p.dtype);
  const Tensor ab = accumulators(dy, 2, C, p.dtype);
  a.total = total.mutable_data_ptr(), a.sums = sums.mutable_data_ptr(), a.ab = ab.mutable_data_ptr();
  const cudaStream_t stream = current_stream(device);
  const cudaError_t error = by_dtype(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    const cudaError_t before = launch_filter_sums<T>(dy, p, &a, stream);
    if (before || !dx) return before;
    return launch_grad_input<T>(forward_params(dy, weight, {}, x, *dx, H, W, P, P, int64_t(Prefix::zero), true), a, device, stream);
  });
  check_launch("dw_shortcut_bwd", error, device);
}

}  // namespace
}  // namespace cuda
}  // namespace lifeops

STABLE_TORCH_LIBRARY_IMPL(lifeops_native, CUDA, m) {
  m.impl("dw_shortcut", TORCH_BOX(&lifeops::cuda::dw_shortcut));
  m.impl("dw_shortcut_eval", TORCH_BOX(&lifeops::cuda::dw_shortcut_eval));
  m.impl("dw_shortcut_bwd", TORCH_BOX(&lifeops::cuda::dw_shortcut_bwd));
}

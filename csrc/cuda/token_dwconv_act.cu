// SPDX-License-Identifier: Apache-2.0
// token_dwconv with prologue and epilogue on CUDA tensors.
#include "token_dwconv_act_launch.h"
#include "values.h"

namespace lifeops {
namespace cuda {
namespace {

void token_dwconv_act(Tensor x, Tensor weight, std::optional<Tensor> bias, std::optional<Tensor> scale,
                      std::optional<Tensor> shift, int64_t act, std::optional<Tensor> out_scale,
                      std::optional<Tensor> out_shift, int64_t out_act, std::optional<Tensor> residual, Tensor y,
                      std::optional<Tensor> pool, std::optional<Tensor> stats, int64_t H, int64_t W, int64_t x_prefix,
                      int64_t y_prefix, int64_t prefix_mode, int64_t) {
  check_device("x", x, x);
  check_device("weight", weight, x);
  check_device("bias", bias, x);
  check_device("residual", residual, x);
  check_device("y", y, x);
  const TokenDWConvParams p = forward_params(x, weight, bias, residual, y, H, W, x_prefix, y_prefix, prefix_mode, false);
  const AffineAct prologue = checked_affine(scale, shift, act, int64_t(Act::gelu_first), p.C, p.dtype, x);
  const AffineAct epilogue = checked_affine(out_scale, out_shift, out_act, int64_t(Act::gelu), p.C, p.dtype, x);
  void* pool_out = checked_values(pool, "pool", p.B * p.C, p.dtype, x);
  void* stats_out = checked_values(stats, "stats", 2 * p.C, p.dtype, x);
  if (p.B * p.H * p.W * p.C == 0) return;
  const int device = x.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const bool sums = pool_out || stats_out;
  auto plan = plan_token_dwconv_act(p, prologue, epilogue, sums, attribute(cudaDevAttrMultiProcessorCount, device));
  TaskSumsArgs of_pool = plan_task_sums(plan.args.strips, p.B, p.C, kForwardSums), of_stats = of_pool;
  std::optional<SumsBuffers> buffers;
  if (sums) {
    buffers.emplace(of_pool, p.dtype, x);
    plan.args.partial = buffers->partial();
    buffers->give(of_pool, pool_out), buffers->give(of_stats, stats_out);
  }
  const cudaStream_t stream = current_stream(device);
  const cudaError_t error = by_dtype(
      p.dtype, [&](auto zero) { return launch_token_dwconv_act<decltype(zero)>(plan, of_pool, of_stats, stream); });
  check_launch("token_dwconv_act", error, device);
}

void token_dwconv_act_grad_input(Tensor dy, Tensor x, Tensor weight, std::optional<Tensor> scale, std::optional<Tensor> shift,
                                 int64_t act, std::optional<Tensor> a, std::optional<Tensor> b, Tensor dx, Tensor sums,
                                 int64_t H, int64_t W, int64_t dy_prefix, int64_t x_prefix, int64_t prefix_mode, int64_t) {
  check_device("dy", dy, dy);
  check_device("x", x, dy);
  check_device("weight", weight, dy);
  check_device("dx", dx, dy);
  const TokenDWConvParams p = forward_params(dy, weight, {}, x, dx, H, W, dy_prefix, x_prefix, prefix_mode, true);
  const AffineAct prologue = checked_affine(scale, shift, act, int64_t(Act::gelu_first), p.C, p.dtype, dy);
  const void* a_values = checked_values(a, "a", p.C, p.dtype, dy);
  const void* b_values = checked_values(b, "b", p.C, p.dtype, dy);
  void* out = checked_values(sums, "sums", 2 * p.C, p.dtype, dy);
  if (p.B * p.H * p.W * p.C == 0) return;
  const int device = dy.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  auto plan = plan_token_dwconv_act_grad_input(p, prologue, a_values, b_values,
                                               attribute(cudaDevAttrMultiProcessorCount, device));
  TaskSumsArgs of_prologue = plan_task_sums(plan.args.strips, p.B, p.C, kGradSums);
  const SumsBuffers buffers(of_prologue, p.dtype, dy);
  plan.args.partial = buffers.partial();
  buffers.give(of_prologue, out);
  const cudaStream_t stream = current_stream(device);
  const cudaError_t error = by_dtype(p.dtype, [&](auto zero) {
    return launch_token_dwconv_act_grad_input<decltype(zero)>(plan, of_prologue, stream);
  });
  check_launch("token_dwconv_act_grad_input", error, device);
}

void token_dwconv_act_grad_weight(Tensor dy, Tensor x, std::optional<Tensor> scale, std::optional<Tensor> shift, int64_t act,
                                  Tensor dw, std::optional<Tensor> db, int64_t K, int64_t H, int64_t W, int64_t dy_prefix,
                                  int64_t x_prefix, int64_t) {
  check_device("dy", dy, dy);
  check_device("x", x, dy);
  check_device("dw", dw, dy);
  check_device("db", db, dy);
  const TokenDWConvGradWeightParams p = grad_weight_params(dy, x, dw, db, K, H, W, dy_prefix, x_prefix);
  const AffineAct prologue = checked_affine(scale, shift, act, int64_t(Act::gelu_first), p.C, p.dtype, dy);
  STD_TORCH_CHECK(p.B * p.H * p.W * p.C > 0, "lifeops_native: token_dwconv_act_grad_weight of nothing");
  const int device = dy.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  auto plan = plan_token_dwconv_act_grad_weight(p, prologue);
  TokenDWConvGradWeightArgs& conv = plan.args.conv;
  const Tensor partial = torch::stable::new_empty(dy, {conv.chunks, conv.taps, p.C}, accumulator_type(p.dtype));
  conv.partial = partial.mutable_data_ptr();
  const cudaStream_t stream = current_stream(device);
  const cudaError_t error =
      by_dtype(p.dtype, [&](auto zero) { return launch_token_dwconv_act_grad_weight<decltype(zero)>(plan, stream); });
  check_launch("token_dwconv_act_grad_weight", error, device);
}

}  // namespace
}  // namespace cuda
}  // namespace lifeops

STABLE_TORCH_LIBRARY_IMPL(lifeops_native, CUDA, m) {
  m.impl("token_dwconv_act", TORCH_BOX(&lifeops::cuda::token_dwconv_act));
  m.impl("token_dwconv_act_grad_input", TORCH_BOX(&lifeops::cuda::token_dwconv_act_grad_input));
  m.impl("token_dwconv_act_grad_weight", TORCH_BOX(&lifeops::cuda::token_dwconv_act_grad_weight));
}

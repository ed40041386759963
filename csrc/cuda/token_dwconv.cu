// SPDX-License-Identifier: Apache-2.0
// token_dwconv on CUDA tensors: libtorch's stable ABI on one side, the torch-free kernels on the other.
#include "launcher.h"
#include "token_dwconv_launch.h"

namespace lifeops {
namespace cuda {
namespace {

void token_dwconv(Tensor x, Tensor weight, std::optional<Tensor> bias, std::optional<Tensor> residual, Tensor y,
                  int64_t H, int64_t W, int64_t x_prefix, int64_t y_prefix, int64_t prefix_mode, bool flip, int64_t) {
  check_device("x", x, x);
  check_device("weight", weight, x);
  check_device("bias", bias, x);
  check_device("residual", residual, x);
  check_device("y", y, x);
  const TokenDWConvParams p =
      forward_params(x, weight, bias, residual, y, H, W, x_prefix, y_prefix, prefix_mode, flip);
  if (p.B * p.H * p.W * p.C == 0) return;
  const int device = x.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const auto plan = plan_token_dwconv(p, attribute(cudaDevAttrMultiProcessorCount, device));
  const cudaStream_t stream = current_stream(device);
  const cudaError_t error =
      by_dtype(p.dtype, [&](auto zero) { return launch_token_dwconv<decltype(zero)>(plan, stream); });
  check_launch("token_dwconv", error, device);
}

void token_dwconv_grad_weight(Tensor dy, std::optional<Tensor> x, std::optional<Tensor> dw, std::optional<Tensor> db,
                              int64_t K, int64_t H, int64_t W, int64_t dy_prefix, int64_t x_prefix, int64_t) {
  check_device("dy", dy, dy);
  check_device("x", x, dy);
  check_device("dw", dw, dy);
  check_device("db", db, dy);
  const TokenDWConvGradWeightParams p = grad_weight_params(dy, x, dw, db, K, H, W, dy_prefix, x_prefix);
  STD_TORCH_CHECK(p.B * p.H * p.W * p.C > 0, "lifeops_native: token_dwconv_grad_weight of nothing");
  const int device = dy.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  auto plan = plan_token_dwconv_grad_weight(p);
  const Tensor partial =
      torch::stable::new_empty(dy, {plan.args.chunks, plan.args.taps, p.C}, accumulator_type(p.dtype));
  plan.args.partial = partial.mutable_data_ptr();
  const cudaStream_t stream = current_stream(device);
  const cudaError_t error =
      by_dtype(p.dtype, [&](auto zero) { return launch_token_dwconv_grad_weight<decltype(zero)>(plan, stream); });
  check_launch("token_dwconv_grad_weight", error, device);
}

}  // namespace
}  // namespace cuda
}  // namespace lifeops

STABLE_TORCH_LIBRARY_IMPL(lifeops_native, CUDA, m) {
  m.impl("token_dwconv", TORCH_BOX(&lifeops::cuda::token_dwconv));
  m.impl("token_dwconv_grad_weight", TORCH_BOX(&lifeops::cuda::token_dwconv_grad_weight));
}

// SPDX-License-Identifier: Apache-2.0
// token_dwconv on CUDA tensors: libtorch's stable ABI on one side, the torch-free kernels on the other.
#ifndef USE_CUDA
#define USE_CUDA  // the stream functions of torch's C shim
#endif
#ifndef TORCH_TARGET_VERSION
#define TORCH_TARGET_VERSION 0x020a000000000000
#endif
#include <torch/csrc/stable/accelerator.h>

#include "../tensor_args.h"
#include "token_dwconv_launch.h"

namespace lifeops {
namespace {

template <typename F> cudaError_t by_dtype(DType dtype, F&& f) {
  switch (dtype) {
    case DType::f64: return f(double{});
    case DType::f32: return f(float{});
    case DType::f16: return f(f16{});
    default: return f(bf16{});
  }
}

void check_device(const char* name, const Tensor& t, const Tensor& first) {
  STD_TORCH_CHECK(t.is_cuda() && t.get_device_index() == first.get_device_index(), "lifeops_native: ", name,
                  " must be on CUDA device ", first.get_device_index());
}
void check_device(const char* name, const std::optional<Tensor>& t, const Tensor& first) {
  if (t) check_device(name, *t, first);
}

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  const cudaError_t error = cudaDeviceGetAttribute(&value, which, device);
  STD_TORCH_CHECK(error == cudaSuccess, "lifeops_native: CUDA device ", device, ": ", cudaGetErrorString(error));
  return value;
}

cudaStream_t current_stream(int device) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

void check_launch(const char* op, cudaError_t error, int device) {
  if (error == cudaSuccess) return;
  const int major = attribute(cudaDevAttrComputeCapabilityMajor, device);
  const int minor = attribute(cudaDevAttrComputeCapabilityMinor, device);
  const bool missing = error == cudaErrorNoKernelImageForDevice || error == cudaErrorUnsupportedPtxVersion;
  STD_TORCH_CHECK(false, "lifeops_native::", op, ": CUDA launch failed on compute capability ", major, ".", minor, ": ",
                  cudaGetErrorString(error), missing ? "; rebuild with TORCH_CUDA_ARCH_LIST=" : "",
                  missing ? std::to_string(major) + "." + std::to_string(minor) : std::string());
}

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
  const auto plan = cuda::plan_token_dwconv(p, attribute(cudaDevAttrMultiProcessorCount, device));
  const cudaStream_t stream = current_stream(device);
  const cudaError_t error =
      by_dtype(p.dtype, [&](auto zero) { return cuda::launch_token_dwconv<decltype(zero)>(plan, stream); });
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
  auto plan = cuda::plan_token_dwconv_grad_weight(p);
  using torch::headeronly::ScalarType;
  const auto sum_dtype = p.dtype == DType::f64 ? ScalarType::Double : ScalarType::Float;
  const Tensor partial = torch::stable::new_empty(dy, {plan.args.chunks, plan.args.taps, p.C}, sum_dtype);
  plan.args.partial = partial.mutable_data_ptr();
  const cudaStream_t stream = current_stream(device);
  const cudaError_t error =
      by_dtype(p.dtype, [&](auto zero) { return cuda::launch_token_dwconv_grad_weight<decltype(zero)>(plan, stream); });
  check_launch("token_dwconv_grad_weight", error, device);
}

}  // namespace
}  // namespace lifeops

STABLE_TORCH_LIBRARY_IMPL(lifeops_native, CUDA, m) {
  m.impl("token_dwconv", TORCH_BOX(&lifeops::token_dwconv));
  m.impl("token_dwconv_grad_weight", TORCH_BOX(&lifeops::token_dwconv_grad_weight));
}

// SPDX-License-Identifier: Apache-2.0
// What the launchers share: libtorch's stable ABI on one side, the torch-free kernels on the other.
#pragma once
#ifndef USE_CUDA
#define USE_CUDA  // the stream functions of torch's C shim
#endif
#ifndef TORCH_TARGET_VERSION
#define TORCH_TARGET_VERSION 0x020a000000000000
#endif
#include <torch/csrc/stable/accelerator.h>

#include "../dtype.h"
#include "../tensor_args.h"

namespace lifeops {
namespace cuda {

template <typename F> cudaError_t by_dtype(DType dtype, F&& f) {
  switch (dtype) {
    case DType::f64: return f(double{});
    case DType::f32: return f(float{});
    case DType::f16: return f(f16{});
    default: return f(bf16{});
  }
}

inline void check_device(const char* name, const Tensor& t, const Tensor& first) {
  STD_TORCH_CHECK(t.is_cuda() && t.get_device_index() == first.get_device_index(), "lifeops_native: ", name,
                  " must be on CUDA device ", first.get_device_index());
}
inline void check_device(const char* name, const std::optional<Tensor>& t, const Tensor& first) {
  if (t) check_device(name, *t, first);
}

inline int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  const cudaError_t error = cudaDeviceGetAttribute(&value, which, device);
  STD_TORCH_CHECK(error == cudaSuccess, "lifeops_native: CUDA device ", device, ": ", cudaGetErrorString(error));
  return value;
}

inline cudaStream_t current_stream(int device) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

inline void check_launch(const char* op, cudaError_t error, int device) {
  if (error == cudaSuccess) return;
  const int major = attribute(cudaDevAttrComputeCapabilityMajor, device);
  const int minor = attribute(cudaDevAttrComputeCapabilityMinor, device);
  const bool missing = error == cudaErrorNoKernelImageForDevice || error == cudaErrorUnsupportedPtxVersion;
  STD_TORCH_CHECK(false, "lifeops_native::", op, ": CUDA launch failed on compute capability ", major, ".", minor, ": ",
                  cudaGetErrorString(error), missing ? "; rebuild with TORCH_CUDA_ARCH_LIST=" : "",
                  missing ? std::to_string(major) + "." + std::to_string(minor) : std::string());
}

inline auto accumulator_type(DType dtype) {
  using torch::headeronly::ScalarType;
  return dtype == DType::f64 ? ScalarType::Double : ScalarType::Float;
}

}  // namespace cuda
}  // namespace lifeops

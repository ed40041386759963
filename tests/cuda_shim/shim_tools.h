// SPDX-License-Identifier: Apache-2.0
// From a dtype at run time to the element type, and from a launch to the shim's.
#pragma once
#include "cuda_shim.h"

#include "../../csrc/cuda/launch.h"
#include "../../csrc/dtype.h"

template <typename F> int by_dtype(lifeops::DType dtype, F&& f) {
  using lifeops::DType;
  switch (dtype) {
#ifndef SHIM_ONE_DTYPE  // the sanitizers' program: a fourth of the compile time
    case DType::f64: f(double{}); break;
    case DType::f32: f(float{}); break;
    case DType::f16: f(lifeops::f16{}); break;
#endif
    default: f(lifeops::bf16{}); break;
  }
  return 0;
}

// What a plan is run with; kernels without a barrier may run their threads one after the other.
inline auto launcher(bool no_barrier) {
  return [no_barrier](auto kernel, lifeops::cuda::LaunchShape shape, const auto& args) {
    cuda_shim::launch(kernel, shape.blocks, shape.threads, args, no_barrier);
  };
}

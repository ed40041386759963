// SPDX-License-Identifier: Apache-2.0
// From a dtype at run time to the element type, from a launch to the shim's, and the buffers of sums.
#pragma once
#include "cuda_shim.h"

#include "../../csrc/cuda/task_sums_plan.h"

namespace lifeops {
namespace cuda {
template <typename Args> constexpr bool kSecondStage = false;
template <> constexpr bool kSecondStage<TaskSumsArgs> = true;
}  // namespace cuda
}  // namespace lifeops

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

// What a plan is run with. Threads of a kernel without a barrier may run one after the other.
struct Launcher {
  bool no_barrier = false;

  template <typename Args> void operator()(void (*kernel)(Args), lifeops::cuda::LaunchShape shape, const Args& args) const {
    cuda_shim::launch(kernel, shape.blocks, shape.threads, args, no_barrier || lifeops::cuda::kSecondStage<Args>);
  }
};

// Room for sums: not a byte more than the kernels may write, and nothing they may read before.
template <typename Acc> struct Buffers {
  std::vector<Acc> partial;
  std::vector<double> merged;

  Buffers(const lifeops::cuda::TaskSumsArgs& a, bool used)
      : partial(used ? a.strips.tiling.tasks * a.sums * a.C : 0, Acc(NAN)), merged(a.chunks * (a.sums + 1) * a.C, NAN) {}
  void give(lifeops::cuda::TaskSumsArgs& a, void* out) { a.partial = partial.data(), a.merged = merged.data(), a.out = out; }
};

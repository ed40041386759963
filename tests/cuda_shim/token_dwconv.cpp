// SPDX-License-Identifier: Apache-2.0
// token_dwconv's CUDA kernels on the CPU, behind a C interface for ctypes. The plan, the dispatch and the kernels are
// those of the GPU; only the launch differs.
#include "cuda_shim.h"

#include "../../csrc/cuda/token_dwconv.cuh"
#include "shim_tools.h"

using namespace lifeops;
using namespace lifeops::cuda;

extern "C" {

// -> vec of the chosen kernel (0: the one for any K).
int shim_token_dwconv(const TokenDWConvParams* p, int multiprocessors) {
  const auto plan = plan_token_dwconv(*p, multiprocessors);
  by_dtype(p->dtype, [&](auto zero) {
    run_token_dwconv<decltype(zero)>(plan, Launcher{plan.variant.vec == 0});
  });
  return plan.variant.vec;
}

int shim_token_dwconv_grad_weight(const TokenDWConvGradWeightParams* p) {
  auto plan = plan_token_dwconv_grad_weight(*p);
  // Not a byte more than the kernels may write, and nothing they may read before.
  const size_t count = static_cast<size_t>(plan.args.chunks) * plan.args.taps * p->C;
  std::vector<double> f64(p->dtype == DType::f64 ? count : 0, NAN);
  std::vector<float> f32(p->dtype == DType::f64 ? 0 : count, NAN);
  plan.args.partial = f64.empty() ? static_cast<void*>(f32.data()) : f64.data();
  int stage = 0;
  by_dtype(p->dtype, [&](auto zero) {
    run_token_dwconv_grad_weight<decltype(zero)>(plan, [&](auto kernel, LaunchShape shape, const auto& args) {
      Launcher{stage++ == 1}(kernel, shape, args);  // the second stage has no barrier
    });
  });
  return plan.variant.vec;
}
}

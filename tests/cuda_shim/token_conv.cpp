// SPDX-License-Identifier: Apache-2.0
// The CUDA kernels of the general token convolution on the CPU, behind a C interface for ctypes; plans and dispatch are the GPU's.
#include "cuda_shim.h"

#include "../../csrc/cuda/token_conv.cuh"
#include "shim_tools.h"

using namespace lifeops;
using namespace lifeops::cuda;

extern "C" {

// -> K of the tile kernel that ran (0: the kernel for anything).
int shim_token_conv(const TokenConvParams* p, int multiprocessors) {
  const auto plan = plan_token_conv(*p, multiprocessors);
  by_dtype(p->dtype, [&](auto zero) { run_token_conv<decltype(zero)>(plan, Launcher{plan.variant.K == 0}); });
  return plan.variant.K;
}

int shim_token_conv_grad_weight(const TokenConvGradWeightParams* p) {
  auto plan = plan_token_conv_grad_weight(*p);
  const TokenDWConvGradWeightArgs& sums = plan.args.sums;
  by_dtype(p->dtype, [&](auto zero) {
    using T = decltype(zero);
    // Not a byte more than the kernels may write, and nothing they may read before.
    std::vector<acc_t<T>> partial(static_cast<size_t>(sums.chunks) * sums.taps * sums.p.C, acc_t<T>(NAN));
    plan.args.sums.partial = partial.data();
    int stage = 0;
    run_token_conv_grad_weight<T>(plan, [&](auto kernel, LaunchShape shape, const auto& args) {
      Launcher{stage++ == 1}(kernel, shape, args);  // the second stage has no barrier
    });
  });
  return plan.variant.K;
}
}

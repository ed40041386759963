// SPDX-License-Identifier: Apache-2.0
// The CUDA kernels with prologue and epilogue, and the channel passes, on the CPU, behind a C interface for ctypes.
#include "cuda_shim.h"

#include "../../csrc/cuda/token_dwconv_act.cuh"
#include "shim_tools.h"

using namespace lifeops;
using namespace lifeops::cuda;

extern "C" {

// pool (B, C) and stats (2, C) may be null. -> vec of the chosen kernel (0: the one for any K).
int shim_token_dwconv_act(const TokenDWConvParams* p, const AffineAct* prologue, const AffineAct* epilogue, void* pool,
                          void* stats, int multiprocessors) {
  auto plan = plan_token_dwconv_act(*p, *prologue, *epilogue, pool || stats, multiprocessors);
  by_dtype(p->dtype, [&](auto zero) {
    using T = decltype(zero);
    using Acc = acc_t<T>;
    auto sums = plan_task_sums(plan.args.strips, p->B, p->C, kForwardSums);
    std::vector<Acc> partial(pool || stats ? sums.strips.tiling.tasks * kForwardSums * p->C : 0, Acc(NAN));
    std::vector<double> merged(sums.chunks * kForwardSums * p->C, NAN);
    if (pool || stats) plan.args.partial = partial.data();
    sums.partial = partial.data(), sums.merged = merged.data();
    run_token_dwconv_act<T>(plan, launcher(plan.variant.vec == 0));
    if (sums.out = pool; pool) run_image_sums<Acc, true>(sums, launcher(true));
    if (sums.out = stats; stats) run_stats<Acc>(sums, launcher(true));
  });
  return plan.variant.vec;
}

// p->x is dy, p->residual the forward pass's x, p->y dx.
int shim_token_dwconv_act_grad_input(const TokenDWConvParams* p, const AffineAct* prologue, const void* a, const void* b,
                                     void* out, int multiprocessors) {
  auto plan = plan_token_dwconv_act_grad_input(*p, *prologue, a, b, multiprocessors);
  by_dtype(p->dtype, [&](auto zero) {
    using T = decltype(zero);
    using Acc = acc_t<T>;
    auto sums = plan_task_sums(plan.args.strips, p->B, p->C, kGradSums);
    std::vector<Acc> partial(sums.strips.tiling.tasks * kGradSums * p->C, Acc(NAN));
    std::vector<double> merged(sums.chunks * kGradSums * p->C, NAN);
    plan.args.partial = partial.data();
    sums.partial = partial.data(), sums.merged = merged.data(), sums.out = out;
    run_token_dwconv_act_grad_input<T>(plan, launcher(plan.variant.vec == 0));
    run_sums<Acc>(sums, launcher(true));
  });
  return plan.variant.vec;
}

int shim_token_dwconv_act_grad_weight(const TokenDWConvGradWeightParams* p, const AffineAct* prologue) {
  auto plan = plan_token_dwconv_act_grad_weight(*p, *prologue);
  by_dtype(p->dtype, [&](auto zero) {
    using T = decltype(zero);
    const TokenDWConvGradWeightArgs& a = plan.args.conv;
    std::vector<acc_t<T>> partial(static_cast<size_t>(a.chunks) * a.taps * p->C, acc_t<T>(NAN));
    plan.args.conv.partial = partial.data();
    int stage = 0;
    run_token_dwconv_act_grad_weight<T>(plan, [&](auto kernel, LaunchShape shape, const auto& args) {
      launcher(stage++ == 1)(kernel, shape, args);  // the second stage has no barrier
    });
  });
  return plan.variant.vec;
}
}

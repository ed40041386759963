// SPDX-License-Identifier: Apache-2.0
// The CUDA kernels with prologue and epilogue on the CPU, behind a C interface for ctypes.
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
    TaskSumsArgs of_pool = plan_task_sums(plan.args.strips, p->B, p->C, kForwardSums), of_stats = of_pool;
    Buffers<acc_t<T>> buffers(of_stats, pool || stats);
    plan.args.partial = buffers.partial.data();
    buffers.give(of_pool, pool), buffers.give(of_stats, stats);
    run_token_dwconv_act<T>(plan, of_pool, of_stats, Launcher{});
  });
  return plan.variant.vec;
}

// p->x is dy, p->residual the forward pass's x, p->y dx.
int shim_token_dwconv_act_grad_input(const TokenDWConvParams* p, const AffineAct* prologue, const void* a, const void* b,
                                     void* out, int multiprocessors) {
  auto plan = plan_token_dwconv_act_grad_input(*p, *prologue, a, b, multiprocessors);
  by_dtype(p->dtype, [&](auto zero) {
    using T = decltype(zero);
    TaskSumsArgs sums = plan_task_sums(plan.args.strips, p->B, p->C, kGradSums);
    Buffers<acc_t<T>> buffers(sums, true);
    plan.args.partial = buffers.partial.data();
    buffers.give(sums, out);
    run_token_dwconv_act_grad_input<T>(plan, sums, Launcher{});
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
    run_token_dwconv_act_grad_weight<T>(plan, Launcher{});
  });
  return plan.variant.vec;
}
}

// SPDX-License-Identifier: Apache-2.0
// From a plan to a kernel. `launch(kernel, shape, args)` is a stream launch in the .cu files and a loop over threads in
// the host tests; everything else is shared. No torch in here.
#pragma once
#include "token_dwconv_bwd_dw.cuh"

namespace lifeops {
namespace cuda {

template <typename T, int K, typename Launch>
void launch_fwd_tile(const Plan<TokenDWConvFwdArgs>& plan, const Launch& launch) {
  if (plan.variant.vec == 1)
    launch(token_dwconv_fwd_tile_kernel<T, K, 1, 8>, plan.shape, plan.args);
  else if (plan.variant.tile_w == 7)
    launch(token_dwconv_fwd_tile_kernel<T, K, 2, 7>, plan.shape, plan.args);
  else
    launch(token_dwconv_fwd_tile_kernel<T, K, 2, 8>, plan.shape, plan.args);
}

template <typename T, int K, typename Launch>
void launch_bwd_dw_tile(const Plan<TokenDWConvGradWeightArgs>& plan, const Launch& launch) {
  if (plan.variant.vec == 1)
    launch(token_dwconv_bwd_dw_tile_kernel<T, K, 1, 8>, plan.shape, plan.args);
  else if (plan.variant.tile_w == 7)
    launch(token_dwconv_bwd_dw_tile_kernel<T, K, 2, 7>, plan.shape, plan.args);
  else
    launch(token_dwconv_bwd_dw_tile_kernel<T, K, 2, 8>, plan.shape, plan.args);
}

template <typename T, typename Launch>
void run_token_dwconv(const Plan<TokenDWConvFwdArgs>& plan, const Launch& launch) {
  if constexpr (sizeof(T) < 8) {
    if (plan.variant.vec) {
      switch (plan.args.p.K) {
        case 3: return launch_fwd_tile<T, 3>(plan, launch);
        case 5: return launch_fwd_tile<T, 5>(plan, launch);
        default: return launch_fwd_tile<T, 7>(plan, launch);
      }
    }
  }
  launch(token_dwconv_fwd_any_kernel<T>, plan.shape, plan.args);
}

// Both stages; plan.args.partial points at chunks * taps * C accumulators.
template <typename T, typename Launch>
void run_token_dwconv_grad_weight(const Plan<TokenDWConvGradWeightArgs>& plan, const Launch& launch) {
  bool tiled = false;
  if constexpr (sizeof(T) < 8) {
    tiled = plan.variant.vec != 0;
    if (tiled) switch (plan.args.p.K) {
        case 3: launch_bwd_dw_tile<T, 3>(plan, launch); break;
        case 5: launch_bwd_dw_tile<T, 5>(plan, launch); break;
        default: launch_bwd_dw_tile<T, 7>(plan, launch); break;
      }
  }
  if (!tiled) launch(token_dwconv_bwd_dw_any_kernel<T>, plan.shape, plan.args);
  const LaunchShape second{checked_blocks(ceil_div(plan.args.taps * plan.args.p.C, kThreads)), kThreads};
  launch(token_dwconv_bwd_dw_reduce_kernel<T>, second, plan.args);
}

}  // namespace cuda
}  // namespace lifeops

// SPDX-License-Identifier: Apache-2.0
// From a plan of the general token convolution to a kernel; `launch` as in token_dwconv.cuh. No torch in here.
#pragma once
#include "token_conv_bwd_dw.cuh"
#include "token_conv_transpose.cuh"

namespace lifeops {
namespace cuda {

template <typename T, typename Launch> void run_token_conv(const ConvPlan<TokenConvArgs>& plan, const Launch& launch) {
  const ConvVariant& v = plan.variant;
  if constexpr (sizeof(T) < 8) {
    if (v.transpose && v.K == 3 && v.stride == 2) return launch(token_conv_transpose_tile_kernel<T, 3, 2>, plan.shape, plan.args);
    if (v.transpose && v.K == 3 && v.stride == 4) return launch(token_conv_transpose_tile_kernel<T, 3, 4>, plan.shape, plan.args);
    if (v.transpose && v.K == 2) return launch(token_conv_transpose_tile_kernel<T, 2, 2>, plan.shape, plan.args);
    if (v.transpose && v.K == 4) return launch(token_conv_transpose_tile_kernel<T, 4, 4>, plan.shape, plan.args);
    if (v.K && v.stride == 1 && v.even) return launch(token_conv_fwd_tile_kernel<T, 3, 1, 2, 1>, plan.shape, plan.args);
    if (v.K && v.stride == 1) return launch(token_conv_fwd_tile_kernel<T, 3, 1, 2, 2>, plan.shape, plan.args);
    if (v.K && v.even) return launch(token_conv_fwd_tile_kernel<T, 3, 2, 2, 1>, plan.shape, plan.args);
    if (v.K && v.stride == 2) return launch(token_conv_fwd_tile_kernel<T, 3, 2, 4, 4>, plan.shape, plan.args);
    if (v.K && v.stride == 4) return launch(token_conv_fwd_tile_kernel<T, 3, 4, 4, 4>, plan.shape, plan.args);
    if (v.K) return launch(token_conv_fwd_tile_kernel<T, 3, 8, 4, 4>, plan.shape, plan.args);
  }
  launch(token_conv_any_kernel<T>, plan.shape, plan.args);
}

// Both stages; plan.args.sums.partial points at chunks * taps * C*m accumulators.
template <typename T, typename Launch>
void run_token_conv_grad_weight(const ConvPlan<TokenConvGradWeightArgs>& plan, const Launch& launch) {
  const TokenDWConvGradWeightArgs& sums = plan.args.sums;
  bool tiled = false;
  if constexpr (sizeof(T) < 8) {
    tiled = plan.variant.K != 0;
    if (tiled && plan.variant.stride == 1) launch(token_conv_bwd_dw_tile_kernel<T, 3, 1, 2>, plan.shape, plan.args);
    if (tiled && plan.variant.stride == 2) launch(token_conv_bwd_dw_tile_kernel<T, 3, 2, 4>, plan.shape, plan.args);
    if (tiled && plan.variant.stride == 4) launch(token_conv_bwd_dw_tile_kernel<T, 3, 4, 4>, plan.shape, plan.args);
    if (tiled && plan.variant.stride == 8) launch(token_conv_bwd_dw_tile_kernel<T, 3, 8, 4>, plan.shape, plan.args);
  }
  if (!tiled) launch(token_conv_bwd_dw_any_kernel<T>, plan.shape, plan.args);
  const LaunchShape second{checked_blocks(ceil_div(sums.taps * sums.p.C, kThreads)), kThreads};
  launch(token_dwconv_bwd_dw_reduce_kernel<T>, second, sums);
}

}  // namespace cuda
}  // namespace lifeops

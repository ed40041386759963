// SPDX-License-Identifier: Apache-2.0
// From a plan to a kernel, as token_dwconv.cuh does it for the plain convolution. No torch in here.
#pragma once
#include "token_dwconv_act_any.cuh"
#include "token_dwconv_act_bwd_dw.cuh"

namespace lifeops {
namespace cuda {

// Calls launch with the kernel of the plan's K, channels per thread and tile width; Kernels::tile<K, vec, tile_w>().
template <typename Kernels, typename Args, typename Launch>
void launch_sweep(const Plan<Args>& plan, int K, const Launch& launch) {
  const bool narrow = plan.variant.tile_w == 7;
  auto of_vec = [&](auto k) {
    constexpr int kK = decltype(k)::value, kMost = sweep_vec(kK);
    if constexpr (kMost == 2) {
      if (plan.variant.vec == 1) return launch(Kernels::template tile<kK, 1, 8>(), plan.shape, plan.args);
    }
    if (narrow) return launch(Kernels::template tile<kK, kMost, 7>(), plan.shape, plan.args);
    launch(Kernels::template tile<kK, kMost, 8>(), plan.shape, plan.args);
  };
  switch (K) {
    case 3: return of_vec(std::integral_constant<int, 3>{});
    case 5: return of_vec(std::integral_constant<int, 5>{});
    default: return of_vec(std::integral_constant<int, 7>{});
  }
}

template <typename T> struct ForwardActKernels {
  template <int K, int kVec, int kTileW> static auto tile() { return token_dwconv_act_fwd_tile_kernel<T, K, kVec, kTileW>; }
};
template <typename T> struct GradInputActKernels {
  template <int K, int kVec, int kTileW> static auto tile() { return token_dwconv_act_bwd_dx_tile_kernel<T, K, kVec, kTileW>; }
};

template <typename T> struct GradWeightActKernels {
  template <int K, int kVec, int kTileW> static auto tile() { return token_dwconv_act_bwd_dw_tile_kernel<T, K, kVec, kTileW>; }
};

// -> whether there is a tile kernel for the plan, which then has been launched.
template <typename T, typename Kernels, typename Args, typename Launch>
bool launch_tile(const Plan<Args>& plan, int K, const Launch& launch) {
  if constexpr (sizeof(T) < 8) {
    if (plan.variant.vec) return launch_sweep<Kernels>(plan, K, launch), true;
  }
  return false;
}

// plan.args.partial points at tasks * kForwardSums * C accumulators; the second stages run if they have an `out`.
template <typename T, typename Launch>
void run_token_dwconv_act(const Plan<TokenDWConvActArgs>& plan, const TaskSumsArgs& pool, const TaskSumsArgs& stats,
                          const Launch& launch) {
  if (!launch_tile<T, ForwardActKernels<T>>(plan, plan.args.conv.p.K, launch))
    launch(token_dwconv_act_fwd_any_kernel<T>, plan.shape, plan.args);
  if (pool.out) run_image_sums<acc_t<T>, true>(pool, launch);
  if (stats.out) run_stats<acc_t<T>>(stats, launch);
}

// plan.args.partial points at tasks * kGradSums * C accumulators, or is null as sums.out is.
template <typename T, typename Launch>
void run_token_dwconv_act_grad_input(const Plan<TokenDWConvActArgs>& plan, const TaskSumsArgs& sums, const Launch& launch) {
  if (!launch_tile<T, GradInputActKernels<T>>(plan, plan.args.conv.p.K, launch))
    launch(token_dwconv_act_bwd_dx_any_kernel<T>, plan.shape, plan.args);
  if (sums.out) run_sums<acc_t<T>>(sums, launch);
}

// Both stages, or without dw the first; plan.args.conv.partial points at chunks * taps * C accumulators.
template <typename T, typename Launch>
void run_token_dwconv_act_grad_weight(const Plan<TokenDWConvActGradWeightArgs>& plan, const Launch& launch) {
  const TokenDWConvGradWeightArgs& a = plan.args.conv;
  if (!launch_tile<T, GradWeightActKernels<T>>(plan, a.p.K, launch))
    launch(token_dwconv_act_bwd_dw_any_kernel<T>, plan.shape, plan.args);
  if (a.p.dw) launch(token_dwconv_bwd_dw_reduce_kernel<T>, one_thread_each(a.taps * a.p.C), a);
}

}  // namespace cuda
}  // namespace lifeops

// SPDX-License-Identifier: Apache-2.0
// Defines and instantiates the launches of one element type.
#pragma once
#include "stream_launch.cuh"
#include "token_dwconv_act.cuh"
#include "token_dwconv_act_launch.h"

namespace lifeops {
namespace cuda {

template <typename T>
cudaError_t launch_token_dwconv_act(const Plan<TokenDWConvActArgs>& plan, const TaskSumsArgs& pool, const TaskSumsArgs& stats,
                                    cudaStream_t stream) {
  run_token_dwconv_act<T>(plan, pool, stats, StreamLaunch{stream});
  return cudaGetLastError();
}

template <typename T>
cudaError_t launch_token_dwconv_act_grad_input(const Plan<TokenDWConvActArgs>& plan, const TaskSumsArgs& sums,
                                               cudaStream_t stream) {
  run_token_dwconv_act_grad_input<T>(plan, sums, StreamLaunch{stream});
  return cudaGetLastError();
}

template <typename T>
cudaError_t launch_token_dwconv_act_grad_weight(const Plan<TokenDWConvActGradWeightArgs>& plan, cudaStream_t stream) {
  run_token_dwconv_act_grad_weight<T>(plan, StreamLaunch{stream});
  return cudaGetLastError();
}

}  // namespace cuda
}  // namespace lifeops

#define LIFEOPS_TOKEN_DWCONV_ACT_OF(T)                                                                                    \
  template cudaError_t lifeops::cuda::launch_token_dwconv_act<T>(                                                         \
      const lifeops::cuda::Plan<lifeops::cuda::TokenDWConvActArgs>&, const lifeops::cuda::TaskSumsArgs&,                  \
      const lifeops::cuda::TaskSumsArgs&, cudaStream_t);                                                                  \
  template cudaError_t lifeops::cuda::launch_token_dwconv_act_grad_input<T>(                                              \
      const lifeops::cuda::Plan<lifeops::cuda::TokenDWConvActArgs>&, const lifeops::cuda::TaskSumsArgs&, cudaStream_t);   \
  template cudaError_t lifeops::cuda::launch_token_dwconv_act_grad_weight<T>(                                             \
      const lifeops::cuda::Plan<lifeops::cuda::TokenDWConvActGradWeightArgs>&, cudaStream_t);

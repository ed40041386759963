// SPDX-License-Identifier: Apache-2.0
// Defines and instantiates the launches of one element type.
#pragma once
#include "stream_launch.cuh"
#include "token_dwconv.cuh"
#include "token_dwconv_launch.h"

namespace lifeops {
namespace cuda {

template <typename T> cudaError_t launch_token_dwconv(const Plan<TokenDWConvFwdArgs>& plan, cudaStream_t stream) {
  run_token_dwconv<T>(plan, StreamLaunch{stream});
  return cudaGetLastError();
}

template <typename T>
cudaError_t launch_token_dwconv_grad_weight(const Plan<TokenDWConvGradWeightArgs>& plan, cudaStream_t stream) {
  run_token_dwconv_grad_weight<T>(plan, StreamLaunch{stream});
  return cudaGetLastError();
}

}  // namespace cuda
}  // namespace lifeops

#define LIFEOPS_TOKEN_DWCONV_OF(T)                                                                                    \
  template cudaError_t lifeops::cuda::launch_token_dwconv<T>(                                                         \
      const lifeops::cuda::Plan<lifeops::cuda::TokenDWConvFwdArgs>&, cudaStream_t);                                   \
  template cudaError_t lifeops::cuda::launch_token_dwconv_grad_weight<T>(                                             \
      const lifeops::cuda::Plan<lifeops::cuda::TokenDWConvGradWeightArgs>&, cudaStream_t);

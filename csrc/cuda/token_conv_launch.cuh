// SPDX-License-Identifier: Apache-2.0
// Defines and instantiates the launches of one element type.
#pragma once
#include "stream_launch.cuh"
#include "token_conv.cuh"
#include "token_conv_launch.h"

namespace lifeops {
namespace cuda {

template <typename T> cudaError_t launch_token_conv(const ConvPlan<TokenConvArgs>& plan, cudaStream_t stream) {
  run_token_conv<T>(plan, StreamLaunch{stream});
  return cudaGetLastError();
}

template <typename T>
cudaError_t launch_token_conv_grad_weight(const ConvPlan<TokenConvGradWeightArgs>& plan, cudaStream_t stream) {
  run_token_conv_grad_weight<T>(plan, StreamLaunch{stream});
  return cudaGetLastError();
}

}  // namespace cuda
}  // namespace lifeops

#define LIFEOPS_TOKEN_CONV_OF(T)                                                                                      \
  template cudaError_t lifeops::cuda::launch_token_conv<T>(                                                           \
      const lifeops::cuda::ConvPlan<lifeops::cuda::TokenConvArgs>&, cudaStream_t);                                    \
  template cudaError_t lifeops::cuda::launch_token_conv_grad_weight<T>(                                               \
      const lifeops::cuda::ConvPlan<lifeops::cuda::TokenConvGradWeightArgs>&, cudaStream_t);

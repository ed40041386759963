// SPDX-License-Identifier: Apache-2.0
// What the launcher calls; one translation unit per element type defines it, so that they compile side by side.
#pragma once
#include <cuda_runtime_api.h>

#include "token_conv_plan.h"

namespace lifeops {
namespace cuda {

template <typename T> cudaError_t launch_token_conv(const ConvPlan<TokenConvArgs>& plan, cudaStream_t stream);
template <typename T>
cudaError_t launch_token_conv_grad_weight(const ConvPlan<TokenConvGradWeightArgs>& plan, cudaStream_t stream);

}  // namespace cuda
}  // namespace lifeops

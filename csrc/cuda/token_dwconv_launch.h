// SPDX-License-Identifier: Apache-2.0
// What the launcher calls; one translation unit per element type defines it, so that they compile side by side.
#pragma once
#include <cuda_runtime_api.h>

#include "token_dwconv_plan.h"

namespace lifeops {
namespace cuda {

template <typename T> cudaError_t launch_token_dwconv(const Plan<TokenDWConvFwdArgs>& plan, cudaStream_t stream);
template <typename T>
cudaError_t launch_token_dwconv_grad_weight(const Plan<TokenDWConvGradWeightArgs>& plan, cudaStream_t stream);

}  // namespace cuda
}  // namespace lifeops

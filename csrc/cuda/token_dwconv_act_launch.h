// SPDX-License-Identifier: Apache-2.0
// What the launcher of the kernels with prologue and epilogue calls; one translation unit per element type defines it.
#pragma once
#include <cuda_runtime_api.h>

#include "task_sums_plan.h"

namespace lifeops {
namespace cuda {

// The second stages run if they have somewhere to write to.
template <typename T>
cudaError_t launch_token_dwconv_act(const Plan<TokenDWConvActArgs>& plan, const TaskSumsArgs& pool, const TaskSumsArgs& stats,
                                    cudaStream_t stream);
template <typename T>
cudaError_t launch_token_dwconv_act_grad_input(const Plan<TokenDWConvActArgs>& plan, const TaskSumsArgs& sums,
                                               cudaStream_t stream);
template <typename T>
cudaError_t launch_token_dwconv_act_grad_weight(const Plan<TokenDWConvActGradWeightArgs>& plan, cudaStream_t stream);

}  // namespace cuda
}  // namespace lifeops

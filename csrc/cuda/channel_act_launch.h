// SPDX-License-Identifier: Apache-2.0
// What the launcher of the channel passes calls; one translation unit per element type defines it.
#pragma once
#include <cuda_runtime_api.h>

#include "channel_act_plan.h"

namespace lifeops {
namespace cuda {

template <typename T>
cudaError_t launch_channel_act(const Plan<ChannelActArgs>& plan, const TaskSumsArgs& sums, cudaStream_t stream);

}  // namespace cuda
}  // namespace lifeops

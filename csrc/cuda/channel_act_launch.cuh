// SPDX-License-Identifier: Apache-2.0
// Defines and instantiates the launch of one element type.
#pragma once
#include "channel_act.cuh"
#include "channel_act_launch.h"
#include "stream_launch.cuh"

namespace lifeops {
namespace cuda {

template <typename T>
cudaError_t launch_channel_act(const Plan<ChannelActArgs>& plan, const TaskSumsArgs& sums, cudaStream_t stream) {
  run_channel_act<T>(plan, sums, StreamLaunch{stream});
  return cudaGetLastError();
}

}  // namespace cuda
}  // namespace lifeops

#define LIFEOPS_CHANNEL_ACT_OF(T)                                                                             \
  template cudaError_t lifeops::cuda::launch_channel_act<T>(                                                  \
      const lifeops::cuda::Plan<lifeops::cuda::ChannelActArgs>&, const lifeops::cuda::TaskSumsArgs&, cudaStream_t);

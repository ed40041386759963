// SPDX-License-Identifier: Apache-2.0
// `launch(kernel, shape, args)` on a CUDA stream.
#pragma once
#include <cuda_runtime_api.h>

#include "launch.h"

namespace lifeops {
namespace cuda {

struct StreamLaunch {
  cudaStream_t stream;

  template <typename Kernel, typename Args> void operator()(Kernel* kernel, LaunchShape shape, const Args& args) const {
    kernel<<<shape.blocks, shape.threads, 0, stream>>>(args);
  }
};

}  // namespace cuda
}  // namespace lifeops

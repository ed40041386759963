// SPDX-License-Identifier: Apache-2.0
// What the launcher of the DW shortcut calls beside the passes of the other operators.
#pragma once
#include <cuda_runtime_api.h>

#include "dw_shortcut_plan.h"

namespace lifeops {
namespace cuda {

template <typename T> cudaError_t launch_shortcut_norm(const ShortcutNormArgs& a, cudaStream_t stream);
template <typename T> cudaError_t launch_shortcut_grad(const ShortcutGradArgs& a, DType dtype, cudaStream_t stream);

}  // namespace cuda
}  // namespace lifeops

// SPDX-License-Identifier: Apache-2.0
#include "dw_shortcut.cuh"
#include "dw_shortcut_launch.h"
#include "stream_launch.cuh"

namespace lifeops {
namespace cuda {

template <typename T> cudaError_t launch_shortcut_norm(const ShortcutNormArgs& a, cudaStream_t stream) {
  run_shortcut_norm<T>(a, StreamLaunch{stream});
  return cudaGetLastError();
}

template <typename T> cudaError_t launch_shortcut_grad(const ShortcutGradArgs& a, DType dtype, cudaStream_t stream) {
  run_shortcut_grad<T>(a, dtype, StreamLaunch{stream});
  return cudaGetLastError();
}

#define LIFEOPS_DW_SHORTCUT_OF(T)                                                     \
  template cudaError_t launch_shortcut_norm<T>(const ShortcutNormArgs&, cudaStream_t); \
  template cudaError_t launch_shortcut_grad<T>(const ShortcutGradArgs&, DType, cudaStream_t);
LIFEOPS_DW_SHORTCUT_OF(double)
LIFEOPS_DW_SHORTCUT_OF(float)
LIFEOPS_DW_SHORTCUT_OF(f16)
LIFEOPS_DW_SHORTCUT_OF(bf16)

}  // namespace cuda
}  // namespace lifeops

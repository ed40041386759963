// SPDX-License-Identifier: Apache-2.0
// The CUDA channel passes on the CPU, behind a C interface for ctypes.
#include "cuda_shim.h"

#include "../../csrc/cuda/channel_act.cuh"
#include "shim_tools.h"

using namespace lifeops;
using namespace lifeops::cuda;

extern "C" {

// `out` as sums of the native operator, or null. -> channels per thread.
int shim_channel_act(const ChannelActParams* p, int64_t lead, void* out) {
  auto plan = plan_channel_act(*p, lead);
  by_dtype(p->dtype, [&](auto zero) {
    using T = decltype(zero);
    TaskSumsArgs sums = plan_task_sums(plan.args.parts, p->B, p->C, std::max<int>(1, channel_sums(p->pass)));
    Buffers<acc_t<T>> buffers(sums, out != nullptr);
    plan.args.partial = buffers.partial.data();
    buffers.give(sums, out);
    run_channel_act<T>(plan, sums, Launcher{true});
  });
  return plan.variant.vec;
}
}

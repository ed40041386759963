// SPDX-License-Identifier: Apache-2.0
// The compiler's default instruction set (SSE2 or NEON).
#include "target_baseline.h"

#include "channel_act_kernels.h"
#include "rollout_step_kernels.h"
#include "token_dwconv_kernels.h"

namespace lifeops {
const TokenDWConvKernels token_dwconv_baseline = {baseline::forward, baseline::forward_scratch, baseline::forward_channels, baseline::grad_weight,
                                              baseline::grad_weight_scratch, baseline::grad_weight_channels,
                                                  baseline::backward, baseline::backward_scratch, baseline::backward_channels};
const ChannelActKernel channel_act_baseline = baseline::channel_act;
const RolloutKernels rollout_step_baseline = {baseline::rollout_row_size, baseline::rollout_scratch_size, baseline::rollout_pack_keys, baseline::rollout_run};
}  // namespace lifeops

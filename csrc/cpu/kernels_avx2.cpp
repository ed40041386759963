// SPDX-License-Identifier: Apache-2.0
// AVX2 with FMA and F16C.
#if defined(__x86_64__)
#include "target_avx2.h"

#include "channel_act_kernels.h"
#include "rollout_step_kernels.h"
#include "token_dwconv_kernels.h"

namespace lifeops {
const TokenDWConvKernels token_dwconv_avx2 = {avx2::forward, avx2::forward_scratch, avx2::forward_channels, avx2::grad_weight,
                                              avx2::grad_weight_scratch, avx2::grad_weight_channels,
                                              avx2::backward, avx2::backward_scratch, avx2::backward_channels};
const ChannelActKernel channel_act_avx2 = avx2::channel_act;
const RolloutKernels rollout_step_avx2 = {avx2::rollout_row_size, avx2::rollout_scratch_size, avx2::rollout_pack_keys, avx2::rollout_run};
}  // namespace lifeops
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif

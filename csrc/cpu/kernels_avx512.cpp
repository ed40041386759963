// SPDX-License-Identifier: Apache-2.0
// AVX-512 F, BW, VL, DQ.
#if defined(__x86_64__)
#include "target_avx512.h"

#include "channel_act_kernels.h"
#include "rollout_step_kernels.h"
#include "token_dwconv_kernels.h"

namespace lifeops {
const TokenDWConvKernels token_dwconv_avx512 = {avx512::forward, avx512::forward_scratch, avx512::forward_channels, avx512::grad_weight,
                                              avx512::grad_weight_scratch, avx512::grad_weight_channels,
                                                avx512::backward, avx512::backward_scratch, avx512::backward_channels};
const ChannelActKernel channel_act_avx512 = avx512::channel_act;
const RolloutKernels rollout_step_avx512 = {avx512::rollout_row_size, avx512::rollout_scratch_size, avx512::rollout_pack_keys, avx512::rollout_run};
}  // namespace lifeops
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif

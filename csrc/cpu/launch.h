// SPDX-License-Identifier: Apache-2.0
// What operators made of several passes launch. Parameters as the kernels take them; nothing is checked here.
#pragma once
#include "channel_act.h"
#include "token_dwconv.h"

namespace lifeops {

// With a derivative its sums are computed and dropped.
void launch_forward(const TokenDWConvParams& p, const TokenDWConvExtras& extras, int64_t isa);
void launch_grad_weight(const GradWeightParams& p, const ChannelAffine& prologue, int64_t isa);
// out (2, C): mean and m2 of f(x), in the accumulation type.
void launch_channel_stats(const Rows& x, int64_t B, int64_t n, int64_t C, DType dtype, Act act, int64_t isa, void* out);

}  // namespace lifeops

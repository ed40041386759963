// SPDX-License-Identifier: Apache-2.0
// One pass over a sequence that batch norm, activation, gate and pool need. No torch in here.
#pragma once
#include "../params.h"

namespace lifeops {

enum class ChannelPass : int32_t { stats = 0, act = 1, pool = 2, sums = 3, grad = 4 };

// Sums per channel that a task writes: stats: (k, sum of f(x) - k, m2 of f(x)), see moments.h.
static constexpr int64_t channel_sums(ChannelPass pass) {
  return pass == ChannelPass::stats ? 3 : pass == ChannelPass::pool ? 1 : pass == ChannelPass::sums ? 5 : 0;
}

struct Rows {
  void* data;  // at the first patch of the first image
  int64_t stride_b, stride_n;
};

// v = scale * x + shift. Per-channel values are in the accumulation type and never null but `a`, `b`; gate and pool_grad too, with
// an image stride of 0 where one row of constants serves all images.
struct ChannelActParams {
  ChannelPass pass;
  Rows x, dy, residual, y;  // residual.data may be null
  int64_t B, n, C;          // images, patches, channels
  DType dtype;
  Act act;
  const void *scale, *shift, *gate, *pool_grad, *a, *b;
  int64_t gate_stride, pool_grad_stride;
};

// Patches [n0, n1) of image b; `partial` (sums, C).
struct ChannelTask {
  int64_t b, n0, n1;
  void* partial;
};

using ChannelActKernel = void (*)(const ChannelActParams&, const ChannelTask&);
extern const ChannelActKernel channel_act_baseline;
#if defined(__x86_64__)
extern const ChannelActKernel channel_act_avx2;
extern const ChannelActKernel channel_act_avx512;
#endif

}  // namespace lifeops

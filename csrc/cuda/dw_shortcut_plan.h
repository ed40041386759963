// SPDX-License-Identifier: Apache-2.0
// What lies between the passes of a DW shortcut's step (lifeops/ops/dw_shortcut has the formulas). No torch in here.
#pragma once
#include "channel_act_plan.h"

namespace lifeops {
namespace cuda {

// A value per channel of a type known at run time, or null.
struct ChannelValues {
  const void* data;
  DType dtype;
};

// Scale, shift and rstd. With `stats.merged`, chunks of statistics, mean and unbiased variance are written; else they are read from
// running_mean and running_var, without which gamma and beta are the affine.
struct ShortcutNormArgs {
  TaskSumsArgs stats;
  ChannelValues running_mean, running_var, gamma, beta;
  double eps;
  int64_t C;
  double n;                  // values of a channel
  void *mean, *var, *affine;  // (C,), (C,), (3, C) in the accumulator's type
};

// From dy and the first stage of the filter's gradient to the gradients of all parameters.
struct ShortcutGradArgs {
  Rows dy;
  FastDiv slabs;  // of the images' sums
  int64_t B, H, W, C;
  int32_t K, chunks;
  DType weight_dtype;
  const void* partial;  // (chunks, K * K + 1, C): G in chunks, and db
  void *total, *sums;   // (H * W, C): dy summed over the images; (2, K * K, C): G and S
  const void *weight, *mean, *affine;
  void *dw, *dbias, *dgamma, *dbeta;
  void* ab;  // (2, C): what dx gets of the norm, a + b gelu(x)
};

inline int choose_image_vec(const Rows& dy, int64_t C, DType dtype) {
  const int es = element_size(dtype);
  return es < 8 && C % 4 == 0 && is_aligned(dy, es, 4) ? 4 : 1;
}

}  // namespace cuda
}  // namespace lifeops

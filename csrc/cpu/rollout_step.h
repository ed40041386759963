// SPDX-License-Identifier: Apache-2.0
// One layer of attention roll-out, r <- r A, for a strip of queries. No torch in here.
#pragma once
#include "../params.h"

namespace lifeops {

enum class HeadFusion : int32_t { mean = 0, max = 1, min = 2 };

// (B, h, N, d) in any strides, in elements.
struct HeadView {
  const void* data;
  int64_t stride_b, stride_h, stride_n, stride_d;
};

// A_ij = (1 - residual) * fuse_h(softmax_j(scale * q_i k_j)) + residual * [i == j]; the `dropped` smallest entries of every fused row are
// zero, and rows are normalised unless the heads' mean is kept whole. r is in the accumulation type, its tokens lie one by one.
struct RolloutParams {
  HeadView q, k;
  const void* r;
  int64_t r_stride_b, r_stride_r;
  int64_t B, h, N, d, R, dropped;
  double scale, residual;
  HeadFusion fusion;
  DType dtype;
};

// Queries [n0, n1) of image b. `keys` are that image's packed keys, all heads; `partial` (R, row_size(p)) is written.
struct RolloutTask {
  int64_t b, n0, n1;
  const void* keys;
  void *partial, *scratch;
};

struct RolloutKernels {
  int64_t (*row_size)(const RolloutParams&);     // elements of a padded row of N tokens
  int64_t (*scratch_size)(const RolloutParams&);  // bytes per task
  void (*pack_keys)(const RolloutParams&, int64_t b, int64_t head, void* out);  // d * row_size elements
  void (*run)(const RolloutParams&, const RolloutTask&);
};

extern const RolloutKernels rollout_step_baseline;
#if defined(__x86_64__)
extern const RolloutKernels rollout_step_avx2;
extern const RolloutKernels rollout_step_avx512;
#endif

}  // namespace lifeops

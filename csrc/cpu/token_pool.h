// SPDX-License-Identifier: Apache-2.0
// What the three instruction-set builds of pooling offer, and how the work is cut. No torch in here.
#pragma once
#include "windows.h"

namespace lifeops {

// Forward y[o] is the largest, or the mean, of the positions that window o sees; NaN is the largest. Backward x is dy, y is dx, and `pooled`
// is the input of a max, whose places are found again: the first of equals, the last NaN. Strides in elements; channels have stride 1.
struct TokenPoolParams {
  const void *x, *pooled;  // at their first patches; pooled null but in the backward pass of a max
  void* y;
  Axis rows, columns;
  int64_t B, C;
  int64_t x_stride_b, x_stride_n, y_stride_b, y_stride_n, pooled_stride_b, pooled_stride_n;
  bool max, count_include_pad, backward;
  DType dtype;
};

// Rows [r0, r1) of y of image b, vectors [v0, v1) of channels.
struct TokenPoolTask {
  int64_t b, v0, v1, r0, r1;
};

struct TokenPoolKernels {
  void (*run)(const TokenPoolParams&, const TokenPoolTask&, void* scratch);
  int64_t (*scratch)(const TokenPoolParams&, int64_t vectors);  // bytes that a task of so many vectors needs
  int64_t vector_bytes;
};

extern const TokenPoolKernels token_pool_baseline;
#if defined(__x86_64__)
extern const TokenPoolKernels token_pool_avx2;
extern const TokenPoolKernels token_pool_avx512;
#endif

}  // namespace lifeops

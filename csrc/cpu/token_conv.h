// SPDX-License-Identifier: Apache-2.0
// What the three instruction-set builds of the strided convolution offer, and how the work is cut. No torch in here.
#pragma once
#include "windows.h"

namespace lifeops {

// Forward, x fine and y coarse; w[c m + j] is the filter of fine channel c that makes coarse channel c m + j:
//   y[o, c m + j] = bias[c m + j] + sum_{i} w[c m + j, i] x[o s - p + i, c]              in rows and columns, where x exists
// Transposed, x coarse and y fine, the adjoint:
//   y[f, c] = bias[c] + sum_{j, o, i: o s - p + i = f} w[c m + j, i] x[o, c m + j]
// Every stride is in elements; channels have stride 1.
struct TokenConvParams {
  const void *x, *weight, *bias;  // x at its first patch; weight (C m, Kh, Kw), contiguous; bias may be null
  void* y;                        // at its first patch
  Axis rows, columns;
  int64_t B, C, m;  // images, channels of the fine side, coarse channels of each
  int64_t x_stride_b, x_stride_n, y_stride_b, y_stride_n;
  bool transpose;
  DType dtype, weight_dtype, bias_dtype;
};

// Rows [r0, r1) of y of image b, vectors [v0, v1) of fine channels.
struct TokenConvTask {
  int64_t b, v0, v1, r0, r1;
};

// dw[c m + j, i] = sum over images and o of dy[o, c m + j] x[o s - p + i, c], db[c m + j] = sum of dy[o, c m + j].
struct TokenConvGradWeightParams {
  const void *dy, *x;  // at their first patches
  void *dw, *db;       // (C m, Kh, Kw), contiguous; (C m,) or null
  Axis rows, columns;
  int64_t B, C, m;
  int64_t x_stride_b, x_stride_n, dy_stride_b, dy_stride_n;
  DType dtype, weight_dtype, bias_dtype;
};

// A fixed share of the sum over images and strips of coarse rows, for vectors [v0, v1) of fine channels.
struct TokenConvGradWeightTask {
  int64_t v0, v1, unit0, unit1, strips;  // unit = image * strips + strip
  int64_t room;                          // vectors that the scratch is made for and rows are counted by, at least v1 - v0
  void* partial;                         // (vectors, m, Kh Kw + 1, lanes) sums in the accumulation type, db the last; at v0
};

struct TokenConvKernels {
  // `weight` is packed (vectors, m, Kh Kw, lanes) in the accumulation type; `bias` (vectors, m, lanes), transposed (vectors, lanes), or null.
  void (*run)(const TokenConvParams&, const void* weight, const void* bias, const TokenConvTask&, void* scratch);
  int64_t (*scratch)(const TokenConvParams&, int64_t vectors);  // bytes that a task of so many vectors needs
  void (*grad_weight)(const TokenConvGradWeightParams&, const TokenConvGradWeightTask&, void* scratch);
  int64_t (*grad_weight_scratch)(const TokenConvGradWeightParams&, int64_t vectors);
  int64_t vector_bytes;
};

extern const TokenConvKernels token_conv_baseline;
#if defined(__x86_64__)
extern const TokenConvKernels token_conv_avx2;
extern const TokenConvKernels token_conv_avx512;
#endif

}  // namespace lifeops

// SPDX-License-Identifier: Apache-2.0
// Plain-old-data arguments of the token kernels, shared by the CPU and the CUDA code. No torch in here.
#pragma once
#include <cstdint>

namespace lifeops {

// Element types as Python passes them; the order is part of the native interface.
enum class DType : int32_t { f64 = 0, f32 = 1, f16 = 2, bf16 = 3 };

// What happens to the prefix rows of the output.
enum class Prefix : int32_t { copy = 0, zero = 1 };

// Activations, in the order Python lists them: f(scale x + shift); gelu_first, of a prologue, is scale gelu(x) + shift.
enum class Act : int32_t { none = 0, relu = 1, relu6 = 2, hardswish = 3, gelu = 4, gelu_first = 5 };

// y[b, y_prefix + r*W + q, c] = bias[c] + residual[...] + sum_{i,j} w[c,i,j] * x[b, x_prefix + (r+i-K/2)*W + (q+j-K/2), c]
// with zero padding. The same kernel is the input gradient when `flip` mirrors the filter.
// Every stride is in elements; channels have stride 1. residual and y have the same shape.
struct TokenDWConvParams {
  const void* x;
  const void* weight;    // (C, K, K) of dtype `weight_dtype`, contiguous
  const void* bias;      // (C,) of dtype `bias_dtype` or null
  const void* residual;  // like y, or null
  void* y;
  int64_t B, H, W, C;
  int64_t x_stride_b, x_stride_n, y_stride_b, y_stride_n, r_stride_b, r_stride_n;
  int32_t K;
  int32_t x_prefix, y_prefix;  // rows in front of the patches of x and of y
  Prefix prefix;
  bool flip;
  DType dtype, weight_dtype, bias_dtype;
};

// dw[c, i, j] = sum_{b,r,q} dy[b, dy_prefix + r*W + q, c] * x[b, x_prefix + (r+i-K/2)*W + (q+j-K/2), c]
// db[c]       = sum_{b,r,q} dy[b, dy_prefix + r*W + q, c]
struct TokenDWConvGradWeightParams {
  const void* dy;
  const void* x;  // null when only db is wanted
  void* dw;       // (C, K, K) of dtype `weight_dtype`, contiguous, or null
  void* db;       // (C,) of dtype `bias_dtype`, or null
  int64_t B, H, W, C;
  int64_t x_stride_b, x_stride_n, dy_stride_b, dy_stride_n;
  int32_t K;
  int32_t x_prefix, dy_prefix;
  DType dtype, weight_dtype, bias_dtype;
};

}  // namespace lifeops

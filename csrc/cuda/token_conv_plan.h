// SPDX-License-Identifier: Apache-2.0
// The general token convolution on CUDA: its arguments, which kernel runs, over which tiles, with how many blocks. Pure host
// functions of the problem, shared by the launcher and the host tests. No torch in here.
#pragma once
#include "token_dwconv_plan.h"

namespace lifeops {
namespace cuda {

// A filter of Kh x Kw at strides (sh, sw) and paddings (ph, pw), from a fine grid H x W to the coarse one, rows x columns.
struct TokenConvShape {
  int64_t H, W, rows, columns;
  int32_t Kh, Kw, sh, sw, ph, pw;
};

// Forward, x fine and y coarse:     y[r, q, c*m + j] = bias[c*m + j] + sum_{i,k} w[c*m + j, i, k] x[r*sh + i - ph, q*sw + k - pw, c]
// Transposed, x coarse and y fine:  y[u, v, c] = bias[c] + sum_{j,i,k} w[c*m + j, i, k] x[r, q, c*m + j]   over r*sh + i - ph = u, ...
// Every stride is in elements; channels have stride 1.
struct TokenConvParams {
  const void* x;
  const void* weight;  // (C*m, Kh, Kw) of dtype `weight_dtype`, contiguous
  const void* bias;    // one value per channel of y of dtype `bias_dtype`, or null
  void* y;
  int64_t B, C, m;  // C: channels of the fine side
  TokenConvShape shape;
  int64_t x_stride_b, x_stride_n, y_stride_b, y_stride_n;
  int32_t x_prefix, y_prefix;
  Prefix prefix;
  bool transpose, flip;  // flip: a mirrored filter, of the plan's own
  DType dtype, weight_dtype, bias_dtype;
};

struct TokenConvArgs {
  TokenConvParams p;
  FastDiv multiplier;
  Tiling tiling;
  int32_t tasks_per_warp;
  const void* x_patches;
  void* y_patches;
  uint32_t x_image_bytes, y_image_bytes, x_token_bytes, y_token_bytes, x_row_bytes, y_row_bytes;
};

// dw[c*m + j, i, k] = sum_{b,r,q} dy[b, r, q, c*m + j] x[b, r*sh + i - ph, q*sw + k - pw, c];  db[o] = sum_{b,r,q} dy[b, r, q, o]
struct TokenConvGradWeightParams {
  const void *dy, *x;
  void* dw;  // (C*m, Kh, Kw) of dtype `weight_dtype`, contiguous
  void* db;  // (C*m,) of dtype `bias_dtype`, or null
  int64_t B, C, m;
  TokenConvShape shape;
  int64_t x_stride_b, x_stride_n, dy_stride_b, dy_stride_n;
  int32_t x_prefix, dy_prefix;
  DType dtype, weight_dtype, bias_dtype;
};

struct TokenConvGradWeightArgs {
  TokenConvShape shape;
  int64_t m;
  TokenDWConvGradWeightArgs sums;  // dy on the coarse grid with its channels, x, and the sums; its second stage is this one's
};

// Outputs side by side in a tile of kTileH rows: 64 accumulators per thread. Four channels per thread read twice as much of a token at
// once; at stride 1 the wider halo of narrow tiles costs what that saves.
constexpr __host__ __device__ int conv_columns(int vec) { return 16 / vec; }
inline int strided_vec(int stride) { return stride == 1 ? 2 : 4; }

// `K` and `stride` of the tile kernel that runs, both axes alike, and its channels per thread; K 0: the kernel for anything. `even`: an
// even channel multiplier, two channels of y read one of x.
struct ConvVariant {
  int K, stride, vec;
  bool even, transpose;
};

// Whether the first token and every other one start on `vec` channels.
inline bool is_aligned(const void* p, int64_t stride_b, int64_t stride_n, int vec, int element) {
  return reinterpret_cast<uintptr_t>(p) % (vec * element) == 0 && stride_b % vec == 0 && stride_n % vec == 0;
}

template <typename Args> struct ConvPlan {
  Args args;
  ConvVariant variant;
  LaunchShape shape;
};

inline bool is_square(const TokenConvShape& s, int K, int stride) {
  return s.Kh == K && s.Kw == K && s.sh == stride && s.sw == stride;
}

// Rows or columns of cells: positions of the padded grid over the stride, those that the fine grid reaches.
inline int64_t cells(int64_t size, int64_t pad, int64_t stride) { return ceil_div(size + pad, stride) - pad / stride; }

// An adjoint at stride 1 is a convolution with the mirrored filter.
inline TokenConvParams as_forward(TokenConvParams p) {
  TokenConvShape& s = p.shape;
  if (!p.transpose || s.sh != 1 || s.sw != 1 || p.m != 1 || s.ph >= s.Kh || s.pw >= s.Kw) return p;
  s = {s.rows, s.columns, s.H, s.W, s.Kh, s.Kw, 1, 1, s.Kh - 1 - s.ph, s.Kw - 1 - s.pw};
  p.transpose = false, p.flip = true;
  return p;
}

inline ConvVariant choose_conv(const TokenConvParams& p) {
  const int es = element_size(p.dtype);
  const TokenConvShape& s = p.shape;
  const int64_t x_width = p.transpose ? s.columns : s.W, y_width = p.transpose ? s.W : s.columns;
  const bool small = is_small(p.x_stride_b, p.x_stride_n, x_width, es) && is_small(p.y_stride_b, p.y_stride_n, y_width, es);
  const bool even = p.m > 1, any_way = is_square(s, 3, 2) || is_square(s, 3, 4);
  const bool tiles = p.transpose ? any_way || is_square(s, 2, 2) || is_square(s, 4, 4)
                                 : any_way || is_square(s, 3, 1) || is_square(s, 3, 8);
  if (p.dtype == DType::f64 || !small || !tiles || (even && (p.m % 2 || p.transpose || s.sh > 2))) return {};
  const int vec = p.transpose || even ? 2 : strided_vec(s.sh);
  const bool aligned = p.C * p.m % vec == 0 && is_aligned(p.y, p.y_stride_b, p.y_stride_n, vec, es) &&
                       (even || is_aligned(p.x, p.x_stride_b, p.x_stride_n, vec, es));
  return aligned ? ConvVariant{s.Kh, s.sh, vec, even, p.transpose} : ConvVariant{};
}

inline TokenConvArgs conv_args(const TokenConvParams& p) {
  const int es = element_size(p.dtype);
  const TokenConvShape& s = p.shape;
  const int64_t x_width = p.transpose ? s.columns : s.W, y_width = p.transpose ? s.W : s.columns;
  TokenConvArgs a{};
  a.p = p, a.multiplier = FastDiv(p.m);
  a.x_patches = static_cast<const char*>(p.x) + p.x_prefix * p.x_stride_n * es;
  a.y_patches = static_cast<char*>(p.y) + p.y_prefix * p.y_stride_n * es;
  a.x_image_bytes = p.x_stride_b * es, a.y_image_bytes = p.y_stride_b * es;
  a.x_token_bytes = p.x_stride_n * es, a.x_row_bytes = p.x_stride_n * x_width * es;
  a.y_token_bytes = p.y_stride_n * es, a.y_row_bytes = p.y_stride_n * y_width * es;
  return a;
}

// Blocks of a tile kernel that fit an SM. Three leave 168 registers, with which stride 4 spills 8 bytes on sm_80.
constexpr int resident_conv_blocks(int element, int stride) { return element == 4 || stride > 2 ? 2 : 3; }

inline ConvPlan<TokenConvArgs> plan_token_conv(const TokenConvParams& given, int multiprocessors = 132) {
  ConvPlan<TokenConvArgs> plan{};
  const TokenConvParams p = as_forward(given);
  const TokenConvShape& s = p.shape;
  plan.variant = choose_conv(p);
  plan.args = conv_args(p);
  const int64_t height = p.transpose ? s.H : s.rows, width = p.transpose ? s.W : s.columns, channels = p.transpose ? p.C : p.C * p.m;
  if (plan.variant.K == 0) {
    const int64_t outputs = p.B * (p.y_prefix + height * width) * channels;
    plan.shape = {checked_blocks(std::min<int64_t>(ceil_div(outputs, kThreads), 1 << 20)), kThreads};
    return plan;
  }
  if (p.transpose)
    plan.args.tiling = make_tiling(p.B, cells(s.H, s.ph, s.sh), cells(s.W, s.pw, s.sw), channels,
                                   {2, conv_columns(2) / s.sw}, kTileH / s.sh);
  else
    plan.args.tiling = make_tiling(p.B, height, width, channels, {plan.variant.vec, conv_columns(plan.variant.vec)}, kTileH);
  plan.shape = one_wave(plan.args, multiprocessors, resident_conv_blocks(element_size(p.dtype), s.sh));
  return plan;
}

// As for token_dwconv: the partial sums are a function of the problem alone, never of the device.
inline ConvPlan<TokenConvGradWeightArgs> plan_token_conv_grad_weight(const TokenConvGradWeightParams& p) {
  const int es = element_size(p.dtype);
  const TokenConvShape& s = p.shape;
  TokenDWConvGradWeightParams sums{p.dy, p.x, p.dw, p.db, p.B, s.rows, s.columns, p.C * p.m, p.x_stride_b, p.x_stride_n, p.dy_stride_b,
                                   p.dy_stride_n, 0, p.x_prefix, p.dy_prefix, p.dtype, p.weight_dtype, p.bias_dtype};
  ConvPlan<TokenConvGradWeightArgs> plan{};
  plan.args.shape = s, plan.args.m = p.m;
  TokenDWConvGradWeightArgs& a = plan.args.sums = grad_weight_args(sums);
  a.taps = s.Kh * s.Kw + 1;
  a.x_row_bytes = p.x_stride_n * s.W * es;
  const int vec = strided_vec(s.sh);
  const bool tiles = is_square(s, 3, 1) || is_square(s, 3, 2) || is_square(s, 3, 4) || is_square(s, 3, 8);
  const bool aligned = p.C % vec == 0 && is_aligned(p.dy, p.dy_stride_b, p.dy_stride_n, vec, es) &&
                       is_aligned(p.x, p.x_stride_b, p.x_stride_n, vec, es);
  const bool small = is_small(p.dy_stride_b, p.dy_stride_n, s.columns, es) && is_small(p.x_stride_b, p.x_stride_n, s.W, es);
  if (p.dtype == DType::f64 || p.m > 1 || !aligned || !small || !tiles) {
    plan.shape = {checked_blocks(chunk_rows(a)), kThreads};
    return plan;
  }
  plan.variant = {3, s.sh, vec, false, false};
  a.tiling = make_tiling(p.B, s.rows, s.columns, p.C, {vec, conv_columns(vec)}, kTileH);
  plan.shape = chunk_tiles(a);
  return plan;
}

}  // namespace cuda
}  // namespace lifeops

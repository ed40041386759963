// SPDX-License-Identifier: Apache-2.0
// The same for any K, any grid, any stride and double: a warp takes 32 channels of a strip of whole rows, one output at
// a time, every tap a load. Not fast, never wrong. No torch in here.
#pragma once
#include "task_sums.cuh"
#include "token_dwconv_act_fwd.cuh"

namespace lifeops {
namespace cuda {

// What of the problem one thread works on: channel c of rows [r0, r0 + height) of image b.
struct AnyStrip {
  int task;
  int64_t b, r0, height, c;
};

// -> whether there is anything to do.
__device__ __forceinline__ bool locate_any(const Strips& strips, int64_t C, AnyStrip* out) {
  int slab;
  out->task = task_of_warp(strips.tiling, &slab);
  const int b = strips.tiling.tiles.div(out->task);
  out->b = b, out->c = slab * kLanes + threadIdx.x % kLanes;
  out->r0 = static_cast<int64_t>(out->task - b * static_cast<int>(strips.tiling.tiles.divisor)) * strips.height;
  out->height = min(static_cast<int64_t>(strips.height), strips.H - out->r0);
  return out->task < strips.tiling.tasks && out->c < C;
}

// One output of the convolution; value(x) is what the prologue makes of an input.
template <typename T, typename Value>
__device__ __forceinline__ acc_t<T> convolve_any(const TokenDWConvParams& p, const AnyStrip& at, int64_t r, int64_t q,
                                                 Value&& value) {
  const int taps = p.K * p.K;
  const T* x = static_cast<const T*>(p.x) + at.b * p.x_stride_b + at.c;
  acc_t<T> sum = 0;
#pragma unroll 1
  for (int kh = 0; kh < p.K; ++kh) {
    const int64_t row = r + kh - p.K / 2;
    if (row < 0 || row >= p.H) continue;
#pragma unroll 1
    for (int kw = 0; kw < p.K; ++kw) {
      const int64_t column = q + kw - p.K / 2;
      if (column < 0 || column >= p.W) continue;
      const int t = kh * p.K + kw;
      sum += value(to_acc(x[(p.x_prefix + row * p.W + column) * p.x_stride_n])) *
             load_as<acc_t<T>>(p.weight, p.weight_dtype, at.c * taps + (p.flip ? taps - 1 - t : t));
    }
  }
  return sum;
}

template <typename T>
__device__ __forceinline__ void copy_prefix_any(const TokenDWConvParams& p, const AnyStrip& at, bool with_residual) {
#pragma unroll 1
  for (int64_t n = 0; n < p.y_prefix; ++n) {
    acc_t<T> value = 0;
    if (p.prefix == Prefix::copy) value = to_acc(static_cast<const T*>(p.x)[at.b * p.x_stride_b + n * p.x_stride_n + at.c]);
    if (with_residual) value += to_acc(static_cast<const T*>(p.residual)[at.b * p.r_stride_b + n * p.r_stride_n + at.c]);
    static_cast<T*>(p.y)[at.b * p.y_stride_b + n * p.y_stride_n + at.c] = from_acc<T>(value);
  }
}

// body(y, residual, r, q) for the strip's outputs in order; the residual is null where the problem has none.
template <typename T, typename Body>
__device__ __forceinline__ void for_outputs(const TokenDWConvParams& p, const AnyStrip& at, Body&& body) {
#pragma unroll 1
  for (int64_t r = at.r0; r < at.r0 + at.height; ++r)
#pragma unroll 1
    for (int64_t q = 0; q < p.W; ++q) {
      const int64_t n = p.y_prefix + r * p.W + q;
      const T* residual = p.residual ? static_cast<const T*>(p.residual) + at.b * p.r_stride_b + n * p.r_stride_n + at.c : nullptr;
      body(static_cast<T*>(p.y) + at.b * p.y_stride_b + n * p.y_stride_n + at.c, residual, r, q);
    }
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 4)
    token_dwconv_act_fwd_any_kernel(const __grid_constant__ TokenDWConvActArgs args) {
  using Acc = acc_t<T>;
  const TokenDWConvParams& p = args.conv.p;
  AnyStrip at;
  if (!locate_any(args.strips, p.C, &at)) return;
  if (at.r0 == 0) copy_prefix_any<T>(p, at, p.residual != nullptr);
  const ForwardRow<Acc, 1> around(args, at.c);
  Acc sums[kForwardSums][1] = {};
  int seen = 0;
  for_outputs<T>(p, at, [&](T* y, const T* residual, int64_t r, int64_t q) {
    Acc value;
    with_act<true>(args.prologue.act, [&](auto act) {
      value = convolve_any<T>(p, at, r, q, [&](Acc x) {
        return affine_act<decltype(act)::value>(x, around.prologue.scale[0], around.prologue.shift[0]);
      });
    });
    with_act<false>(args.epilogue.act, [&](auto act) {
      value = affine_act<decltype(act)::value>(value, around.epilogue.scale[0], around.epilogue.shift[0]);
    });
    const Acc stored = to_acc(from_acc<T>(value));
    if (seen == 0) sums[0][0] = zero_unless_finite(stored);
    JoinBlock<Acc>(seen++, 1)(stored - sums[0][0], 0, &sums[1][0], &sums[2][0]);
    *y = from_acc<T>(residual ? value + to_acc(*residual) : value);
  });
  if (args.partial) store_sums<kForwardSums, 1>(args, at.task, at.c, sums);
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 4)
    token_dwconv_act_bwd_dx_any_kernel(const __grid_constant__ TokenDWConvActArgs args) {
  using Acc = acc_t<T>;
  const TokenDWConvParams& p = args.conv.p;
  AnyStrip at;
  if (!locate_any(args.strips, p.C, &at)) return;
  if (at.r0 == 0) copy_prefix_any<T>(p, at, false);
  const GradRow<Acc, 1> around(args, at.c);
  const AffineGrad<Acc> f{around.prologue.scale[0], around.prologue.shift[0], around.a[0], around.b[0], args.b != nullptr};
  Acc sums[kGradSums][1] = {};
  for_outputs<T>(p, at, [&](T* dx, const T* x, int64_t r, int64_t q) {
    const Acc du = convolve_any<T>(p, at, r, q, [](Acc dy) { return dy; });
    with_act<true>(args.prologue.act, [&](auto act) {
      *dx = from_acc<T>(affine_act_grad<decltype(act)::value>(du, to_acc(*x), f, &sums[0][0], &sums[1][0]));
    });
  });
  if (args.partial) store_sums<kGradSums, 1>(args, at.task, at.c, sums);
}

}  // namespace cuda
}  // namespace lifeops

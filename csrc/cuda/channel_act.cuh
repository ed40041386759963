// SPDX-License-Identifier: Apache-2.0
// The passes of ChannelPass (csrc/cpu/channel_act.h): a warp takes the patches of a task for its channels, whose constants
// and sums stay in registers, and has the loads of four tokens on their way. Sums leave as in a sweep. No torch in here.
#pragma once
#include <type_traits>

#include "channel_act_plan.h"
#include "moments.cuh"
#include "task_sums.cuh"

namespace lifeops {
namespace cuda {

// Tokens [n0, n1) of image b, channels c ...
struct ChannelStrip {
  int task;
  int64_t b, n0, n1, c;
};

// -> whether there is anything to do.
template <int kVec> __device__ __forceinline__ bool locate_channels(const ChannelActArgs& a, ChannelStrip* out) {
  int slab;
  out->task = task_of_warp(a.parts.tiling, &slab);
  out->c = (slab * kLanes + static_cast<int>(threadIdx.x % kLanes)) * kVec;
  if (out->task >= a.parts.tiling.tasks || out->c >= a.p.C) return false;
  const int b = a.parts.tiling.tiles.div(out->task);
  out->b = b, out->n0 = static_cast<int64_t>(out->task - b * static_cast<int>(a.parts.tiling.tiles.divisor)) * a.parts.height;
  out->n1 = min(out->n0 + a.parts.height, a.p.n);
  return true;
}

template <typename T> __device__ __forceinline__ T* token_at(const Rows& rows, const ChannelStrip& at, int64_t n) {
  return static_cast<T*>(rows.data) + at.b * rows.stride_b + n * rows.stride_n + at.c;
}

// body(n, count) for the tokens of a task, four at a time while there are four; count is a constant.
template <typename Body> __device__ __forceinline__ void for_tokens(const ChannelStrip& at, Body&& body) {
  int64_t n = at.n0;
#pragma unroll 1
  for (; n + 4 <= at.n1; n += 4) body(n, std::integral_constant<int, 4>{});
#pragma unroll 1
  for (; n < at.n1; ++n) body(n, std::integral_constant<int, 1>{});
}

template <typename T, int kVec, int kCount>
__device__ __forceinline__ void load_tokens(const Rows& rows, const ChannelStrip& at, int64_t n, Pack<T, kVec> (&out)[kCount]) {
#pragma unroll
  for (int t = 0; t < kCount; ++t) out[t] = Pack<T, kVec>::load(token_at<const T>(rows, at, n + t));
}

// The rows of the residual in front of its patches go to y as they are.
template <typename T, int kVec> __device__ __forceinline__ void copy_lead(const ChannelActArgs& a, const ChannelStrip& at) {
  for (int64_t n = -a.lead; n < 0; ++n)
    Pack<T, kVec>::load(token_at<const T>(a.p.residual, at, n)).store(token_at<T>(a.p.y, at, n));
}

// y = f(v) * gate + residual
template <typename T, int kVec>
__global__ void __launch_bounds__(kThreads, 4) channel_act_kernel(const __grid_constant__ ChannelActArgs a) {
  using Acc = acc_t<T>;
  ChannelStrip at;
  if (!locate_channels<kVec>(a, &at)) return;
  if (at.n0 == 0) copy_lead<T, kVec>(a, at);
  const Affine<Acc, kVec> affine({a.p.scale, a.p.shift, a.p.act}, at.c);
  Acc gate[kVec];
  load_values<Acc, kVec>(a.p.gate, at.b * a.p.gate_stride + at.c, 1, gate);
  with_act<false>(a.p.act, [&](auto act) {
    for_tokens(at, [&](int64_t n, auto count) {
      Pack<T, kVec> x[count.value], residual[count.value];
      load_tokens<T, kVec>(a.p.x, at, n, x);
      if (a.p.residual.data) load_tokens<T, kVec>(a.p.residual, at, n, residual);
#pragma unroll
      for (int t = 0; t < count.value; ++t) {
        Acc value[kVec], added[kVec] = {};
        unpack<T, kVec>(x[t], value);
        if (a.p.residual.data) unpack<T, kVec>(residual[t], added);
#pragma unroll
        for (int i = 0; i < kVec; ++i)
          value[i] = affine_act<decltype(act)::value>(value[i], affine.scale[i], affine.shift[i]) * gate[i] + added[i];
        pack<T, kVec>(value).store(token_at<T>(a.p.y, at, n + t));
      }
    });
  });
}

// dx = scale * (dy * gate + pool_grad) * f'(v) + a + b x
template <typename T, int kVec>
__global__ void __launch_bounds__(kThreads, 4) channel_grad_kernel(const __grid_constant__ ChannelActArgs args) {
  using Acc = acc_t<T>;
  const ChannelActParams& p = args.p;
  ChannelStrip at;
  if (!locate_channels<kVec>(args, &at)) return;
  const Affine<Acc, kVec> affine({p.scale, p.shift, p.act}, at.c);
  Acc gate[kVec], pool_grad[kVec], a[kVec], b[kVec];
  load_values<Acc, kVec>(p.gate, at.b * p.gate_stride + at.c, 1, gate);
  load_values<Acc, kVec>(p.pool_grad, at.b * p.pool_grad_stride + at.c, 0, pool_grad);
  load_values<Acc, kVec>(p.a, at.c, 0, a);
  load_values<Acc, kVec>(p.b, at.c, 0, b);
  with_act<false>(p.act, [&](auto act) {
    for_tokens(at, [&](int64_t n, auto count) {
      Pack<T, kVec> x[count.value], dy[count.value];
      load_tokens<T, kVec>(p.x, at, n, x);
      load_tokens<T, kVec>(p.dy, at, n, dy);
#pragma unroll
      for (int t = 0; t < count.value; ++t) {
        Acc value[kVec], g[kVec];
        unpack<T, kVec>(x[t], value);
        unpack<T, kVec>(dy[t], g);
#pragma unroll
        for (int i = 0; i < kVec; ++i) {
          const Acc v = affine.scale[i] * value[i] + affine.shift[i];
          Acc dx = affine.scale[i] * ((g[i] * gate[i] + pool_grad[i]) * derivative<decltype(act)::value>(v)) + a[i];
          if (p.b) dx += b[i] * value[i];
          g[i] = dx;
        }
        pack<T, kVec>(g).store(token_at<T>(p.y, at, n + t));
      }
    });
  });
}

// What one token adds to the sums of a pass.
template <ChannelPass kPass, Act act, typename Acc, int kSums>
__device__ __forceinline__ void add_token(Acc x, Acc dy, Acc scale, Acc shift, Acc (&sums)[kSums]) {
  const Acc v = scale * x + shift, value = activate<act>(v);
  if constexpr (kPass == ChannelPass::pool) {
    sums[0] += value;
  } else {
    const Acc slope = derivative<act>(v), dv = dy * slope;
    sums[0] += dy * value, sums[1] += dv, sums[2] += dv * x, sums[3] += slope, sums[4] += slope * x;
  }
}

// The statistics of kCount tokens behind `seen` others.
template <Act act, typename T, int kVec, int kCount>
__device__ __forceinline__ void add_statistics(const Pack<T, kVec> (&x)[kCount], int seen, acc_t<T> (&sums)[kVec][3]) {
  acc_t<T> value[kCount][kVec];
#pragma unroll
  for (int t = 0; t < kCount; ++t) unpack<T, kVec>(x[t], value[t]);
  const JoinBlock<acc_t<T>> join(seen, kCount);
#pragma unroll
  for (int i = 0; i < kVec; ++i) {
    acc_t<T> d[kCount];
#pragma unroll
    for (int t = 0; t < kCount; ++t) d[t] = activate<act>(value[t][i]);
    if (seen == 0) sums[i][0] = zero_unless_finite(d[0]);
#pragma unroll
    for (int t = 0; t < kCount; ++t) d[t] -= sums[i][0];
    join_values<kCount>(d, 0, join, &sums[i][1], &sums[i][2]);
  }
}

template <ChannelPass kPass> constexpr int kChannelSums = channel_sums(kPass);

template <typename T, int kVec, ChannelPass kPass>
__global__ void __launch_bounds__(kThreads, 4) channel_sums_kernel(const __grid_constant__ ChannelActArgs a) {
  using Acc = acc_t<T>;
  constexpr int kSums = kChannelSums<kPass>;
  ChannelStrip at;
  if (!locate_channels<kVec>(a, &at)) return;
  const Affine<Acc, kVec> affine({a.p.scale, a.p.shift, a.p.act}, at.c);
  Acc sums[kVec][kSums] = {};
  with_act<false>(a.p.act, [&](auto act) {
    for_tokens(at, [&](int64_t n, auto count) {
      Pack<T, kVec> x[count.value], dy[count.value] = {};
      load_tokens<T, kVec>(a.p.x, at, n, x);
      if constexpr (kPass == ChannelPass::stats) return add_statistics<decltype(act)::value, T, kVec>(x, static_cast<int>(n - at.n0), sums);
      if constexpr (kPass == ChannelPass::sums) load_tokens<T, kVec>(a.p.dy, at, n, dy);
#pragma unroll
      for (int t = 0; t < count.value; ++t) {
        Acc value[kVec], g[kVec];
        unpack<T, kVec>(x[t], value);
        unpack<T, kVec>(dy[t], g);
#pragma unroll
        for (int i = 0; i < kVec; ++i)
          add_token<kPass, decltype(act)::value>(value[i], g[i], affine.scale[i], affine.shift[i], sums[i]);
      }
    });
  });
#pragma unroll
  for (int k = 0; k < kSums; ++k)
#pragma unroll
    for (int i = 0; i < kVec; ++i) static_cast<Acc*>(a.partial)[(static_cast<int64_t>(at.task) * kSums + k) * a.p.C + at.c + i] = sums[i][k];
}

// The passes that write sums need plan.args.partial and where to put them.
template <typename T, int kVec, typename Launch>
void run_channel_pass(const Plan<ChannelActArgs>& plan, const TaskSumsArgs& sums, const Launch& launch) {
  switch (plan.args.p.pass) {
    case ChannelPass::act: return launch(channel_act_kernel<T, kVec>, plan.shape, plan.args);
    case ChannelPass::grad: return launch(channel_grad_kernel<T, kVec>, plan.shape, plan.args);
    case ChannelPass::stats:
      launch(channel_sums_kernel<T, kVec, ChannelPass::stats>, plan.shape, plan.args);
      return run_stats<acc_t<T>>(sums, launch);
    case ChannelPass::pool: launch(channel_sums_kernel<T, kVec, ChannelPass::pool>, plan.shape, plan.args); break;
    default: launch(channel_sums_kernel<T, kVec, ChannelPass::sums>, plan.shape, plan.args);
  }
  run_image_sums<acc_t<T>, false>(sums, launch);
}

template <typename T, typename Launch>
void run_channel_act(const Plan<ChannelActArgs>& plan, const TaskSumsArgs& sums, const Launch& launch) {
  if constexpr (sizeof(T) < 8) {
    if (plan.variant.vec == 4) return run_channel_pass<T, 4>(plan, sums, launch);
  }
  run_channel_pass<T, 1>(plan, sums, launch);
}

}  // namespace cuda
}  // namespace lifeops

// SPDX-License-Identifier: Apache-2.0
// The DW shortcut between its passes: statistics to constants, partial sums to gradients, each sum in an order that depends on the
// problem alone. No torch in here.
#pragma once
#include "dw_shortcut_plan.h"
#include "task_sums.cuh"

namespace lifeops {
namespace cuda {

__device__ __forceinline__ double value_of(const ChannelValues& v, int64_t c, double otherwise) {
  return v.data ? load_as<double>(v.data, v.dtype, c) : otherwise;
}

template <typename Acc>
__global__ void __launch_bounds__(kThreads) shortcut_norm_kernel(const __grid_constant__ ShortcutNormArgs a) {
  const int64_t c = global_thread();
  if (c >= a.C) return;
  double mean = value_of(a.running_mean, c, 0), rstd = 1;
  if (a.stats.merged) {
    const MeanM2 found = finished_stats(a.stats, c);
    mean = found.mean, rstd = 1 / sqrt(found.m2 / a.n + a.eps);
    static_cast<Acc*>(a.mean)[c] = static_cast<Acc>(mean);
    static_cast<Acc*>(a.var)[c] = static_cast<Acc>(found.m2 / (a.n > 1 ? a.n - 1 : 1));
  } else if (a.running_var.data) {
    rstd = 1 / sqrt(value_of(a.running_var, c, 0) + a.eps);
  }
  const double scale = value_of(a.gamma, c, 1) * rstd;
  Acc* affine = static_cast<Acc*>(a.affine) + c;
  affine[0] = static_cast<Acc>(scale), affine[a.C] = static_cast<Acc>(value_of(a.beta, c, 0) - mean * scale);
  affine[2 * a.C] = static_cast<Acc>(rstd);
}

// dy over the images: a block takes a patch and a slab of channels, its warps every fourth image.
template <typename T, int kVec>
__global__ void __launch_bounds__(kThreads) shortcut_images_kernel(const __grid_constant__ ShortcutGradArgs a) {
  using Acc = acc_t<T>;
  constexpr int kSlab = kLanes * kVec;
  __shared__ Acc s_sums[kWarps * kSlab];
  const int n = a.slabs.div(blockIdx.x), c_first = (blockIdx.x - n * a.slabs.divisor) * kSlab;
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
  Acc sum[kVec] = {};
  if (c_first + lane * kVec < a.C) {
    const T* dy = static_cast<const T*>(a.dy.data) + n * a.dy.stride_n + c_first + lane * kVec;
#pragma unroll 8
    for (int64_t b = warp; b < a.B; b += kWarps) {
      Acc value[kVec];
      unpack<T, kVec>(Pack<T, kVec>::load(dy + b * a.dy.stride_b), value);
#pragma unroll
      for (int i = 0; i < kVec; ++i) sum[i] += value[i];
    }
  }
#pragma unroll
  for (int i = 0; i < kVec; ++i) s_sums[warp * kSlab + lane * kVec + i] = sum[i];
  __syncthreads();
  for (int k = threadIdx.x; k < kSlab; k += kThreads) {
    if (c_first + k >= a.C) continue;
    Acc all = s_sums[k];
#pragma unroll
    for (int w = 1; w < kWarps; ++w) all += s_sums[w * kSlab + k];
    static_cast<Acc*>(a.total)[n * a.C + c_first + k] = all;
  }
}

// G and S of a tap, 32 channels to a block: its warps every fourth chunk, then every fourth row of the grid.
template <typename Acc>
__global__ void __launch_bounds__(kThreads) shortcut_taps_kernel(const __grid_constant__ ShortcutGradArgs a) {
  __shared__ double s_sums[2][kThreads];
  const int slabs = static_cast<int>((a.C + kLanes - 1) / kLanes), t = blockIdx.x / slabs, taps = a.K * a.K;
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes, dr = t / a.K - a.K / 2, dq = t % a.K - a.K / 2;
  const int64_t c = (blockIdx.x - t * slabs) * kLanes + lane;
  double g = 0, s = 0;
  if (c < a.C) {
    const Acc* partial = static_cast<const Acc*>(a.partial) + t * a.C + c;
#pragma unroll 8
    for (int chunk = warp; chunk < a.chunks; chunk += kWarps) g += partial[static_cast<int64_t>(chunk) * (taps + 1) * a.C];
    for (int64_t r = warp; r < a.H; r += kWarps) {
      if (r + dr < 0 || r + dr >= a.H) continue;
      const Acc* total = static_cast<const Acc*>(a.total) + r * a.W * a.C + c;
#pragma unroll 8
      for (int64_t q = max(0, -dq); q < a.W - max(0, dq); ++q) s += total[q * a.C];
    }
  }
  s_sums[0][threadIdx.x] = g, s_sums[1][threadIdx.x] = s;
  __syncthreads();
  if (warp >= 2 || c >= a.C) return;
  double all = s_sums[warp][lane];
#pragma unroll
  for (int w = 1; w < kWarps; ++w) all += s_sums[warp][w * kLanes + lane];
  static_cast<Acc*>(a.sums)[(static_cast<int64_t>(warp) * taps + t) * a.C + c] = static_cast<Acc>(all);
}

template <typename Acc>
__global__ void __launch_bounds__(kThreads) shortcut_gradients_kernel(const __grid_constant__ ShortcutGradArgs a) {
  const int64_t c = global_thread();
  if (c >= a.C) return;
  const int taps = a.K * a.K;
  const Acc *sums = static_cast<const Acc*>(a.sums) + c, *affine = static_cast<const Acc*>(a.affine) + c;
  const double mean = static_cast<const Acc*>(a.mean)[c], scale = affine[0], shift = affine[a.C], rstd = affine[2 * a.C];
  double dscale = 0, dshift = 0;
#pragma unroll 4
  for (int t = 0; t < taps; ++t) {
    const double g = sums[t * a.C], s = sums[(taps + t) * a.C], w = load_as<double>(a.weight, a.weight_dtype, c * taps + t);
    dscale += w * g, dshift += w * s;
    static_cast<Acc*>(a.dw)[c * taps + t] = static_cast<Acc>(scale * g + shift * s);
  }
  const double n = static_cast<double>(a.B * a.H * a.W), gain = rstd * (dscale - mean * dshift), slope = -scale * rstd * gain / n;
  static_cast<Acc*>(a.dbias)[c] = sums[(taps + taps / 2) * a.C];
  static_cast<Acc*>(a.dgamma)[c] = static_cast<Acc>(gain), static_cast<Acc*>(a.dbeta)[c] = static_cast<Acc>(dshift);
  static_cast<Acc*>(a.ab)[c] = static_cast<Acc>(-scale * dshift / n - slope * mean);
  static_cast<Acc*>(a.ab)[a.C + c] = static_cast<Acc>(slope);
}

template <typename T, typename Launch> void run_shortcut_norm(const ShortcutNormArgs& a, const Launch& launch) {
  launch(shortcut_norm_kernel<acc_t<T>>, one_thread_each(a.C), a);
}

template <typename T, typename Launch> void run_shortcut_images(ShortcutGradArgs a, DType dtype, const Launch& launch) {
  const int vec = choose_image_vec(a.dy, a.C, dtype);
  a.slabs = FastDiv(static_cast<uint32_t>(ceil_div(a.C, kLanes * vec)));
  const LaunchShape shape{checked_blocks(a.H * a.W * a.slabs.divisor), kThreads};
  if constexpr (sizeof(T) < 8) {
    if (vec == 4) return launch(shortcut_images_kernel<T, 4>, shape, a);
  }
  launch(shortcut_images_kernel<T, 1>, shape, a);
}

template <typename T, typename Launch> void run_shortcut_grad(const ShortcutGradArgs& a, DType dtype, const Launch& launch) {
  using Acc = acc_t<T>;
  run_shortcut_images<T>(a, dtype, launch);
  launch(shortcut_taps_kernel<Acc>, LaunchShape{checked_blocks(a.K * a.K * ceil_div(a.C, kLanes)), kThreads}, a);
  launch(shortcut_gradients_kernel<Acc>, one_thread_each(a.C), a);
}

}  // namespace cuda
}  // namespace lifeops

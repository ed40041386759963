// SPDX-License-Identifier: Apache-2.0
// Second stages: what the tasks of a sweep summed, added in an order that depends on the problem alone. No atomics, no
// thread that walks thousands of rows: chunks of tasks first, then the chunks, in double. No torch in here.
#pragma once
#include "task_sums_plan.h"

namespace lifeops {
namespace cuda {

__device__ __forceinline__ int64_t global_thread() {
  return static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
}

// Where one_task_per_warp has put this warp; the task may lie beyond the last one.
__device__ __forceinline__ int task_of_warp(const Tiling& tiling, int* slab) {
  const int group = tiling.slabs.div(blockIdx.x);
  *slab = blockIdx.x - group * tiling.slabs.divisor;
  return group * kWarps + static_cast<int>(threadIdx.x / kLanes);
}

constexpr int kMergedStats = kForwardSums + 1;  // n, mean, m2, plain sum

// Mean and m2 of n values joined with those of others (Chan, Golub, LeVeque 1983).
struct Moments {
  double n, mean, m2;

  __device__ __forceinline__ void join(double count, double other_mean, double other_m2) {
    const double total = n + count, share = count / total, delta = other_mean - mean;
    m2 += other_m2 + delta * delta * n * share, mean += delta * share, n = total;
  }
};

// What a chunk's tasks summed (k, sum of y - k, m2 of y) -> n, mean, m2, plain sum.
template <typename Acc>
__global__ void __launch_bounds__(kThreads) merge_stats_kernel(const __grid_constant__ TaskSumsArgs a) {
  const int64_t i = global_thread(), chunk = i / a.C, c = i - chunk * a.C;
  if (chunk >= a.chunks) return;
  Moments sum{0, 0, 0};
  double plain = 0;
  const int first = static_cast<int>(chunk) * a.tasks_per_chunk, end = min(first + a.tasks_per_chunk, a.strips.tiling.tasks);
  for (int task = first; task < end; ++task) {
    const Acc* p = static_cast<const Acc*>(a.partial) + static_cast<int64_t>(task) * kForwardSums * a.C + c;
    const double n = static_cast<double>(a.strips.count(task)), k = static_cast<double>(p[0]), s = static_cast<double>(p[a.C]);
    sum.join(n, k + s / n, static_cast<double>(p[2 * a.C])), plain += n * k + s;
  }
  double* merged = a.merged + chunk * kMergedStats * a.C + c;
  merged[0] = sum.n, merged[a.C] = sum.mean, merged[2 * a.C] = sum.m2, merged[3 * a.C] = plain;
}

// Mean and m2 of channel c from all chunks; an infinity makes the mean what a plain sum would be, and m2 NaN.
struct MeanM2 {
  double mean, m2;
};
__device__ __forceinline__ MeanM2 finished_stats(const TaskSumsArgs& a, int64_t c) {
  Moments sum{0, 0, 0};
  double plain = 0;
  for (int64_t chunk = 0; chunk < a.chunks; ++chunk) {
    const double* merged = a.merged + chunk * kMergedStats * a.C + c;
    sum.join(merged[0], merged[a.C], merged[2 * a.C]), plain += merged[3 * a.C];
  }
  const bool finite = sum.mean - sum.mean == 0;
  return {finite ? sum.mean : plain / sum.n, finite ? sum.m2 : sum.mean - sum.mean};
}

template <typename Acc>
__global__ void __launch_bounds__(kThreads) finish_stats_kernel(const __grid_constant__ TaskSumsArgs a) {
  const int64_t c = global_thread();
  if (c >= a.C) return;
  const MeanM2 found = finished_stats(a, c);
  static_cast<Acc*>(a.out)[c] = static_cast<Acc>(found.mean);
  static_cast<Acc*>(a.out)[a.C + c] = static_cast<Acc>(found.m2);
}

// Plain sums over all tasks.
template <typename Acc>
__global__ void __launch_bounds__(kThreads) merge_sums_kernel(const __grid_constant__ TaskSumsArgs a) {
  const int64_t i = global_thread(), width = a.sums * a.C, chunk = i / width, k = i - chunk * width;
  if (chunk >= a.chunks) return;
  const int first = static_cast<int>(chunk) * a.tasks_per_chunk, end = min(first + a.tasks_per_chunk, a.strips.tiling.tasks);
  double sum = 0;
  for (int task = first; task < end; ++task) sum += static_cast<const Acc*>(a.partial)[task * width + k];
  a.merged[chunk * width + k] = sum;
}

template <typename Acc>
__global__ void __launch_bounds__(kThreads) finish_sums_kernel(const __grid_constant__ TaskSumsArgs a) {
  const int64_t k = global_thread(), width = a.sums * a.C;
  if (k >= width) return;
  double sum = 0;
  for (int64_t chunk = 0; chunk < a.chunks; ++chunk) sum += a.merged[chunk * width + k];
  static_cast<Acc*>(a.out)[k] = static_cast<Acc>(sum);
}

// Sums of every image: kShifted sums of y from k and the sum of y - k, else plain ones.
template <typename Acc, bool kShifted>
__global__ void __launch_bounds__(kThreads) image_sums_kernel(const __grid_constant__ TaskSumsArgs a) {
  const int64_t i = global_thread(), per_image = a.strips.tiling.tiles.divisor, bc = a.B * a.C;
  const int64_t k = i / bc, b = (i - k * bc) / a.C, c = i - k * bc - b * a.C;
  if (k >= (kShifted ? 1 : a.sums)) return;
  Acc sum = 0;
  for (int64_t task = b * per_image; task < (b + 1) * per_image; ++task) {
    const Acc* p = static_cast<const Acc*>(a.partial) + (task * a.sums + k) * a.C + c;
    sum += kShifted ? p[0] * static_cast<Acc>(a.strips.count(static_cast<int>(task))) + p[a.C] : p[0];
  }
  static_cast<Acc*>(a.out)[i] = sum;
}

// Without `out` the chunks are left to who joins them.
template <typename Acc, typename Launch> void run_stats(const TaskSumsArgs& a, const Launch& launch) {
  launch(merge_stats_kernel<Acc>, one_thread_each(a.chunks * a.C), a);
  if (a.out) launch(finish_stats_kernel<Acc>, one_thread_each(a.C), a);
}
template <typename Acc, typename Launch> void run_sums(const TaskSumsArgs& a, const Launch& launch) {
  launch(merge_sums_kernel<Acc>, one_thread_each(a.chunks * a.sums * a.C), a);
  launch(finish_sums_kernel<Acc>, one_thread_each(a.sums * a.C), a);
}
template <typename Acc, bool kShifted, typename Launch> void run_image_sums(const TaskSumsArgs& a, const Launch& launch) {
  launch(image_sums_kernel<Acc, kShifted>, one_thread_each((kShifted ? 1 : a.sums) * a.B * a.C), a);
}

}  // namespace cuda
}  // namespace lifeops

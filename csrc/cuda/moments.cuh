// SPDX-License-Identifier: Apache-2.0
// Mean and m2 of a task's values: k, the first of them (0 where it is not finite), sum of y - k and m2 of y, block by block joined with
// Chan's formula. csrc/cpu/moments.h says why and how exact that is. No torch in here.
#pragma once
#include "../dtype.h"

namespace lifeops {
namespace cuda {

template <typename Acc> __device__ __forceinline__ Acc zero_unless_finite(Acc v) { return v - v == 0 ? v : Acc(0); }

// How c values are joined with the n before them.
template <typename Acc> struct JoinBlock {
  Acc ratio, weight;  // c / n, n / (c (n + c)); 0 where nothing came before

  __device__ __forceinline__ JoinBlock(int n, int c) {
    const Acc before = static_cast<Acc>(n), now = static_cast<Acc>(c);
    ratio = n > 0 ? now / before : Acc(0), weight = before / (now * (before + now));
  }
  // A block's sum of y - k and its m2.
  __device__ __forceinline__ void operator()(Acc block_sum, Acc block_m2, Acc* sum, Acc* m2) const {
    const Acc gap = block_sum - *sum * ratio;
    *m2 += block_m2 + gap * (gap * weight), *sum += block_sum;
  }
};

// The values d[first .. kCount) less k.
template <int kCount, typename Acc>
__device__ __forceinline__ void join_values(const Acc (&d)[kCount], int first, const JoinBlock<Acc>& join, Acc* sum, Acc* m2) {
  Acc block = 0, square = 0;
#pragma unroll
  for (int q = 0; q < kCount; ++q)
    if (q >= first) block += d[q];
  const Acc mean = block / static_cast<Acc>(kCount - first);
#pragma unroll
  for (int q = 0; q < kCount; ++q)
    if (q >= first) square += (d[q] - mean) * (d[q] - mean);
  join(block, square, sum, m2);
}

}  // namespace cuda
}  // namespace lifeops

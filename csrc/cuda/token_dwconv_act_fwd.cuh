// SPDX-License-Identifier: Apache-2.0
// Depth-wise convolution with a prologue and an epilogue, and its input gradient: one walk down a strip for both.
//
// K rows of sums wait for their last input row: acc[k] still lacks k rows. Each input row adds to all of them and moves
// them up by one, which costs nothing, as the first product of acc[k] takes acc[k + 1] as its addend. The finished row
// goes through the epilogue, or through the derivative of the prologue, while the next input row is on its way.
// No torch in here.
#pragma once
#include "token_dwconv_act_rows.cuh"

namespace lifeops {
namespace cuda {

// Where a thread finds its taps: in registers if they fit beside the sums, else in shared memory.
template <typename Acc, int K, int kVec> struct Filter {
  static constexpr int kPitch = kLanes * kVec + kVec;
  static constexpr bool kRegisters = K * K * kVec < 50;
  const Acc* column;
  Acc taps[kRegisters ? K * K : 1][kVec];

  __device__ __forceinline__ explicit Filter(const Acc* s_column) : column(s_column) {
    if constexpr (kRegisters) {
#pragma unroll
      for (int t = 0; t < K * K; ++t) load(t, taps[t]);
    }
  }
  __device__ __forceinline__ void load(int t, Acc (&out)[kVec]) const {
    const auto pack = Pack<Acc, kVec>::load(column + t * kPitch);
    unpack<Acc, kVec>(pack, out);
  }
  __device__ __forceinline__ void row(int kh, Acc (&out)[K][kVec]) const {
#pragma unroll
    for (int kw = 0; kw < K; ++kw) {
      if constexpr (kRegisters) {
#pragma unroll
        for (int i = 0; i < kVec; ++i) out[kw][i] = taps[kh * K + kw][i];
      } else {
        load(kh * K + kw, out[kw]);
      }
    }
  }
};

// All sums one row up, plus input row `n` of the strip (row n - K/2 of its outputs) times the taps that reach it.
template <typename Acc, int K, int kVec, int kTileW>
__device__ __forceinline__ void add_row(int n, const Strip& strip, const Acc (&values)[kTileW + K - 1][kVec],
                                        const Filter<Acc, K, kVec>& filter, Acc (&acc)[K][kTileW][kVec]) {
  constexpr int kHalo = K / 2;
#pragma unroll
  for (int k = 0; k < K; ++k) {
    const int row = n - (K - 1) + k;  // of the outputs
    if (K > 3 && (row < 0 || row >= strip.height)) continue;
    Acc taps[K][kVec];
    filter.row(K - 1 - k, taps);
#pragma unroll
    for (int q = 0; q < kTileW; ++q)
#pragma unroll
      for (int i = 0; i < kVec; ++i)
        acc[k][q][i] = values[kHalo + q][i] * taps[kHalo][i] + (k + 1 < K ? acc[k + 1][q][i] : Acc(0));
    for_columns<kHalo, kTileW>(strip.left, strip.right, [&](int s) {
#pragma unroll
      for (int q = 0; q < kTileW; ++q) {
        const int kw = s - q + kHalo;
        if (kw < 0 || kw >= K || kw == kHalo) continue;
#pragma unroll
        for (int i = 0; i < kVec; ++i) acc[k][q][i] += values[kHalo + s][i] * taps[kw][i];
      }
    });
  }
}

// What an input row below the grid adds: nothing.
template <typename Acc, int K, int kVec, int kTileW>
__device__ __forceinline__ void move_up(Acc (&acc)[K][kTileW][kVec]) {
#pragma unroll
  for (int k = 0; k + 1 < K; ++k)
#pragma unroll
    for (int q = 0; q < kTileW; ++q)
#pragma unroll
      for (int i = 0; i < kVec; ++i) acc[k][q][i] = acc[k + 1][q][i];
}

template <int kSums, int kVec, typename Acc>
__device__ __forceinline__ void store_sums(const TokenDWConvActArgs& a, int task, int c, const Acc (&sums)[kSums][kVec]) {
#pragma unroll
  for (int k = 0; k < kSums; ++k)
#pragma unroll
    for (int i = 0; i < kVec; ++i)
      static_cast<Acc*>(a.partial)[(static_cast<int64_t>(task) * kSums + k) * a.conv.p.C + c + i] = sums[k][i];
}

template <typename T, int K, int kVec, int kTileW, template <typename, int> class Row>
__device__ __forceinline__ void sweep(const TokenDWConvActArgs& args) {
  using Acc = acc_t<T>;
  constexpr int kSlab = kLanes * kVec, kHalo = K / 2, kPitch = Filter<Acc, K, kVec>::kPitch;
  alignas(16) __shared__ Acc s_filter[K * K * kPitch];
  const TokenDWConvFwdArgs& a = args.conv;
  const int group = a.tiling.slabs.div(blockIdx.x), c_first = (blockIdx.x - group * a.tiling.slabs.divisor) * kSlab;
  const int channels = min(static_cast<int>(a.p.C) - c_first, kSlab);
  stage_filter<K * K, kPitch>(a.p, c_first, channels, s_filter);
  __syncthreads();

  const int lane = threadIdx.x % kLanes, warp = warp_uniform(threadIdx.x / kLanes), c = c_first + lane * kVec;
  if (lane * kVec >= channels) return;
  const Filter<Acc, K, kVec> filter(s_filter + lane * kVec);
  const Row<Acc, kVec> around(args, c);
  const Steps<kTileW + K - 1> x_columns(a.x_token_bytes);
  const Steps<kTileW> y_columns(a.y_token_bytes), r_columns(a.r_token_bytes);
  const T* x_patches = opaque(static_cast<const T*>(a.x_patches) + c);
  const T* r_patches = opaque(static_cast<const T*>(a.r_patches) + c);
  T* y_patches = opaque(static_cast<T*>(a.y_patches) + c);
  int task = group * a.tasks_per_warp * kWarps + warp;
  for (int i = 0; i < a.tasks_per_warp && task < a.tiling.tasks; ++i, task += kWarps) {
    const Strip strip = locate_strip<K, kTileW>(args.strips, task);
    if (strip.r0 == 0 && strip.q0 == 0)
      copy_prefix<T, kVec>(a, strip, x_patches, y_patches, Row<Acc, kVec>::kSums == kGradSums ? nullptr : a.r_patches, c);
    const int begin = max(0, kHalo - strip.r0), rows = strip.height + K - 1;
    const int end = min(rows, args.strips.H - strip.r0 + kHalo);  // of its input rows, [begin, end) exist
    const T* x = locate_token(x_patches, strip, begin - kHalo, -kHalo, a.x_image_bytes, a.x_row_bytes, a.x_token_bytes);
    T* y = locate_token(y_patches, strip, 0, 0, a.y_image_bytes, a.y_row_bytes, a.y_token_bytes);
    const T* r = locate_token(r_patches, strip, 0, 0, a.r_image_bytes, a.r_row_bytes, a.r_token_bytes);
    Acc acc[K][kTileW][kVec] = {}, sums[Row<Acc, kVec>::kSums][kVec] = {};
    Pack<T, kVec> next[kTileW + K - 1], side[kTileW];
    auto finish = [&](int n) {
      around.template finish<T, kTileW>(args, strip, n - (K - 1), &r, r_columns, side, acc[0], sums);
      store_row<T, kVec, kTileW>(opaque(y), strip, y_columns, acc[0]);
      y = advance(y, a.y_row_bytes);
    };
    load_row<T, kVec, kTileW, kHalo>(x, x_columns, strip, next);
#pragma unroll 1
    for (int n = begin; n < end; ++n) {
      Acc values[kTileW + K - 1][kVec];
      around.template convert<T, K, kTileW>(args, strip, next, values);
      if (n >= K - 1) around.template prefetch<T, kTileW>(args, r, r_columns, side);
      x = advance(x, n + 1 < end ? a.x_row_bytes : 0);  // or once more: a branch around the loads would delay them
      load_row<T, kVec, kTileW, kHalo>(opaque(x), x_columns, strip, next);
      add_row<Acc, K, kVec, kTileW>(n, strip, values, filter, acc);
      if (n >= K - 1) finish(n);
    }
#pragma unroll 1
    for (int n = end; n < rows; ++n) {  // input rows below the grid
      move_up<Acc, K, kVec, kTileW>(acc);
      if (n < K - 1) continue;
      around.template prefetch<T, kTileW>(args, r, r_columns, side);
      finish(n);
    }
    if (args.partial) store_sums<Row<Acc, kVec>::kSums, kVec>(args, task, c, sums);
  }
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
#define LIFEOPS_SWEEP_BLOCKS(K, T, grad) 2
#else
#define LIFEOPS_SWEEP_BLOCKS(K, T, grad) sweep_blocks(K, sizeof(T), grad)
#endif

template <typename T, int K, int kVec, int kTileW>
__global__ void __launch_bounds__(kThreads, LIFEOPS_SWEEP_BLOCKS(K, T, false))
    token_dwconv_act_fwd_tile_kernel(const __grid_constant__ TokenDWConvActArgs args) {
  sweep<T, K, kVec, kTileW, ForwardRow>(args);
}

template <typename T, int K, int kVec, int kTileW>
__global__ void __launch_bounds__(kThreads, LIFEOPS_SWEEP_BLOCKS(K, T, true))
    token_dwconv_act_bwd_dx_tile_kernel(const __grid_constant__ TokenDWConvActArgs args) {
  sweep<T, K, kVec, kTileW, GradRow>(args);
}

}  // namespace cuda
}  // namespace lifeops

// SPDX-License-Identifier: Apache-2.0
// Gradients of the filter and of the bias, from one pass over dy and x.
//
// The forward kernel with the roles swapped: a tile of dy takes the place of the accumulators, the K x K sums that of
// the filter. A warp keeps its sums in registers over all its tiles; the warps of a block are added in shared memory,
// the blocks' sums by a second kernel, each in a fixed order. No atomics. No torch in here.
#pragma once
#include "token_dwconv_fwd.cuh"

namespace lifeops {
namespace cuda {

template <typename Acc>
__device__ __forceinline__ Acc* partial_row(const TokenDWConvGradWeightArgs& a, int chunk, int t) {
  return static_cast<Acc*>(a.partial) + (static_cast<int64_t>(chunk) * a.taps + t) * a.p.C;
}

// sums[0 .. kCount) of all warps -> rows first_tap .. of the chunk's partial sums. All threads of the block call it.
template <int kCount, int kVec, typename Acc>
__device__ __forceinline__ void reduce_warps(const TokenDWConvGradWeightArgs& a, int chunk, int first_tap, int c_first,
                                             int channels, const Acc (*sums)[kVec], Acc* s_sums) {
  constexpr int kSlab = kLanes * kVec;
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
#pragma unroll
  for (int k = 0; k < kCount; ++k)
#pragma unroll
    for (int i = 0; i < kVec; ++i) s_sums[(warp * kCount + k) * kSlab + lane * kVec + i] = sums[k][i];
  __syncthreads();
#pragma unroll 1
  for (int k = threadIdx.x; k < kCount * kSlab; k += kThreads) {
    const int c = k % kSlab;
    if (c >= channels) continue;
    Acc sum = s_sums[k];
#pragma unroll
    for (int w = 1; w < kWarps; ++w) sum += s_sums[w * kCount * kSlab + k];
    partial_row<Acc>(a, chunk, first_tap + k / kSlab)[c_first + c] = sum;
  }
  __syncthreads();
}

// The tile of dy, widened; zero where the tile owns nothing. Its sum is db.
template <typename T, int kVec, int kTileW>
__device__ __forceinline__ void load_dy(const T* row, const Tile& tile, int rows, const Steps<2>& dy_rows,
                                        const Steps<kTileW>& dy_columns, acc_t<T> (&dy)[kTileH][kTileW][kVec],
                                        acc_t<T> (&db)[kVec]) {
  Pack<T, kVec> packs[kTileH][kTileW] = {};
#pragma unroll
  for (int r = 0; r < kTileH; ++r, row = opaque(dy_rows.at(row, 1))) {
    if (r >= rows) break;
#pragma unroll
    for (int q = 0; q < kTileW; ++q) packs[r][q] = Pack<T, kVec>::load(dy_columns.at(row, q));
  }
  if (tile.first > 0) {
#pragma unroll
    for (int r = 0; r < kTileH; ++r)
#pragma unroll
      for (int q = 0; q < kTileW; ++q)
        if (q < tile.first) packs[r][q] = {};
  }
#pragma unroll
  for (int r = 0; r < kTileH; ++r)
#pragma unroll
    for (int q = 0; q < kTileW; ++q) {
      unpack<T, kVec>(packs[r][q], dy[r][q]);
#pragma unroll
      for (int i = 0; i < kVec; ++i) db[i] += dy[r][q][i];
    }
}

// dw += input row `j` of the tile times the rows of dy it meets.
template <typename T, int K, int kVec, int kTileW>
__device__ __forceinline__ void correlate_row(int j, const Pack<T, kVec> (&row)[kTileW + K - 1], bool left, bool right,
                                              const acc_t<T> (&dy)[kTileH][kTileW][kVec], acc_t<T> (&dw)[K * K][kVec]) {
  auto column = [&](int s) {
    acc_t<T> value[kVec];
    unpack<T, kVec>(row[K / 2 + s], value);
#pragma unroll
    for (int r = 0; r < kTileH; ++r) {
#pragma unroll
      for (int q = 0; q < kTileW; ++q) {
        const int kh = j - r, kw = s - q + K / 2;
        if (kh < 0 || kh >= K || kw < 0 || kw >= K) continue;
#pragma unroll
        for (int i = 0; i < kVec; ++i) dw[kh * K + kw][i] += value[i] * dy[r][q][i];
      }
    }
  };
#pragma unroll
  for (int s = 0; s < kTileW; ++s) column(s);
  if (left) {
#pragma unroll
    for (int s = -(K / 2); s < 0; ++s) column(s);
  }
  if (right) {
#pragma unroll
    for (int s = kTileW; s < kTileW + K / 2; ++s) column(s);
  }
}

template <typename T, int K, int kVec, int kTileW>
__global__ void __launch_bounds__(kThreads)
    token_dwconv_bwd_dw_tile_kernel(const __grid_constant__ TokenDWConvGradWeightArgs a) {
  using Acc = acc_t<T>;
  constexpr int kSlab = kLanes * kVec, kRows = kTileH + K - 1;
  __shared__ Acc s_sums[kWarps * K * kSlab];
  const int chunk = a.tiling.slabs.div(blockIdx.x), c_first = (blockIdx.x - chunk * a.tiling.slabs.divisor) * kSlab;
  const int channels = min(static_cast<int>(a.p.C) - c_first, kSlab);
  const int warp = warp_uniform(threadIdx.x / kLanes);
  // Lanes beyond C repeat the last channels, which keeps the warp together; their sums are not stored.
  const int c = c_first + min(static_cast<int>(threadIdx.x % kLanes) * kVec, channels - kVec);
  const int H = a.p.H, W = a.p.W;
  const Steps<kTileW + K - 1> x_columns(a.x_token_bytes);
  const Steps<kTileW> dy_columns(a.dy_token_bytes);
  const Steps<2> x_rows(a.x_row_bytes), dy_rows(a.dy_row_bytes);
  Acc dw[K * K][kVec] = {}, db[1][kVec] = {};
  const int first = chunk * a.tasks_per_chunk, end = min(first + a.tasks_per_chunk, a.tiling.tasks);
  for (int task = first + warp; task < end; task += kWarps) {
    const Tile tile = locate_tile<K, kTileW>(a.tiling, task, H, W);
    const T* row = locate_token(static_cast<const T*>(a.x_patches) + c, tile, -(K / 2), -(K / 2), a.x_image_bytes,
                                a.x_row_bytes, a.x_token_bytes);
    const T* dy_row = locate_token(static_cast<const T*>(a.dy_patches) + c, tile, 0, 0, a.dy_image_bytes,
                                   a.dy_row_bytes, a.dy_token_bytes);
    Pack<T, kVec> r_rows[2][kTileW + K - 1];
    auto fetch = [&](int j) {
      if (tile.rows >> j & 1) load_row<T, kVec, kTileW, K / 2>(row, x_columns, tile, r_rows[j % 2]);
    };
    Acc dy[kTileH][kTileW][kVec];
    fetch(0);
    load_dy<T, kVec, kTileW>(dy_row, tile, min(kTileH, H - tile.r0), dy_rows, dy_columns, dy, db[0]);
#pragma unroll
    for (int j = 0; j < kRows; ++j) {
      row = opaque(x_rows.at(row, 1));
      if (j + 1 < kRows) fetch(j + 1);
      if (tile.rows >> j & 1) correlate_row<T, K, kVec, kTileW>(j, r_rows[j % 2], tile.left, tile.right, dy, dw);
    }
  }
#pragma unroll
  for (int kh = 0; kh < K; ++kh) reduce_warps<K, kVec>(a, chunk, kh * K, c_first, channels, dw + kh * K, s_sums);
  reduce_warps<1, kVec>(a, chunk, K * K, c_first, channels, db, s_sums);
}

// Any K, any grid, any stride, double, and db alone: one tap per block, one row of the grid per warp and step; value(x, c)
// is what the forward pass made of an input.
template <typename T, typename Value>
__device__ __forceinline__ void correlate_any(const TokenDWConvGradWeightArgs& a, Value&& value) {
  using Acc = acc_t<T>;
  __shared__ Acc s_sums[kThreads];
  const TokenDWConvGradWeightParams& p = a.p;
  const int slabs = (p.C + kLanes - 1) / kLanes;
  const int slab = blockIdx.x % slabs, t = blockIdx.x / slabs % a.taps, chunk = blockIdx.x / slabs / a.taps;
  const int c_first = slab * kLanes, channels = min(static_cast<int>(p.C) - c_first, kLanes);
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
  const bool is_bias = t == a.taps - 1;
  const int dr = is_bias ? 0 : t / p.K - p.K / 2, dq = is_bias ? 0 : t % p.K - p.K / 2;
  const T* dy = static_cast<const T*>(a.dy_patches) + c_first + lane;
  const T* x = static_cast<const T*>(a.x_patches) + (is_bias ? 0 : c_first + lane);
  const int64_t first = static_cast<int64_t>(chunk) * a.tasks_per_chunk;
  const int64_t end = lane < channels ? min(first + a.tasks_per_chunk, p.B * p.H) : 0;
  const int64_t q_begin = max(0, -dq), q_end = p.W - max(0, dq);
  Acc sum[1][1] = {};
  for (int64_t row = first + warp; row < end; row += kWarps) {
    const int64_t b = row / p.H, r = row - b * p.H;
    if (r + dr < 0 || r + dr >= p.H) continue;
    for (int64_t q = q_begin; q < q_end; ++q) {
      const Acc grad = to_acc(dy[b * p.dy_stride_b + (r * p.W + q) * p.dy_stride_n]);
      if (is_bias)
        sum[0][0] += grad;
      else
        sum[0][0] += grad * value(to_acc(x[b * p.x_stride_b + ((r + dr) * p.W + q + dq) * p.x_stride_n]), c_first + lane);
    }
  }
  reduce_warps<1, 1>(a, chunk, t, c_first, channels, sum, s_sums);
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    token_dwconv_bwd_dw_any_kernel(const __grid_constant__ TokenDWConvGradWeightArgs a) {
  correlate_any<T>(a, [](acc_t<T> x, int) { return x; });
}

// Second stage: the chunks in order, one thread per sum.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    token_dwconv_bwd_dw_reduce_kernel(const __grid_constant__ TokenDWConvGradWeightArgs a) {
  using Acc = acc_t<T>;
  const TokenDWConvGradWeightParams& p = a.p;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= a.taps * p.C) return;
  const int64_t t = i / p.C, c = i - t * p.C;
  const bool is_bias = t == a.taps - 1;
  if (is_bias ? !p.db : !p.dw) return;
  Acc sum = 0;
  for (int chunk = 0; chunk < a.chunks; ++chunk) sum += partial_row<Acc>(a, chunk, t)[c];
  if (is_bias)
    store_as<Acc>(p.db, p.bias_dtype, c, sum);
  else
    store_as<Acc>(p.dw, p.weight_dtype, c * (a.taps - 1) + t, sum);
}

}  // namespace cuda
}  // namespace lifeops

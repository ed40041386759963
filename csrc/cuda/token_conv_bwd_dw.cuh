// SPDX-License-Identifier: Apache-2.0
// Gradients of the strided filter and of its bias, from one pass over dy and x: the forward kernel with the roles swapped, and
// token_dwconv's sums over warps, blocks and chunks, each in a fixed order. No torch in here.
#pragma once
#include "token_conv_fwd.cuh"
#include "token_dwconv_bwd_dw.cuh"

namespace lifeops {
namespace cuda {

// dw += row j of x times the rows of dy that it meets.
template <typename T, int K, int S, int kVec, int kCount, int kColumns>
__device__ __forceinline__ void correlate_strided(int j, const Pack<T, kVec> (&row)[kCount],
                                                  const acc_t<T> (&dy)[kTileH][kColumns][kVec], acc_t<T> (&dw)[K * K][kVec]) {
#pragma unroll
  for (int s = 0; s < kCount; ++s) {
    if (s % S >= K) continue;
    acc_t<T> value[kVec];
    unpack<T, kVec>(row[s], value);
#pragma unroll
    for (int r = 0; r < kTileH; ++r) {
#pragma unroll
      for (int q = 0; q < kColumns; ++q) {
        const int kh = j - r * S, kw = s - q * S;
        if (kh < 0 || kh >= K || kw < 0 || kw >= K) continue;
#pragma unroll
        for (int i = 0; i < kVec; ++i) dw[kh * K + kw][i] += value[i] * dy[r][q][i];
      }
    }
  }
}

template <typename T, int K, int S, int kVec>
__global__ void __launch_bounds__(kThreads)
    token_conv_bwd_dw_tile_kernel(const __grid_constant__ TokenConvGradWeightArgs args) {
  using Acc = acc_t<T>;
  constexpr int kSlab = kVec * kLanes, kColumns = conv_columns(kVec), kRows = (kTileH - 1) * S + K, kCount = (kColumns - 1) * S + K;
  __shared__ Acc s_sums[kWarps * K * kSlab];
  const TokenDWConvGradWeightArgs& a = args.sums;
  const TokenConvShape& shape = args.shape;
  const int chunk = a.tiling.slabs.div(blockIdx.x), c_first = (blockIdx.x - chunk * a.tiling.slabs.divisor) * kSlab;
  const int channels = min(static_cast<int>(a.p.C) - c_first, kSlab);
  const int warp = warp_uniform(threadIdx.x / kLanes);
  // Lanes beyond C repeat the last channels, which keeps the warp together; their sums are not stored.
  const int c = c_first + min(static_cast<int>(threadIdx.x % kLanes) * kVec, channels - kVec);
  const int H = shape.H, W = shape.W, rows = shape.rows, columns = shape.columns;
  const Steps<kCount> x_columns(a.x_token_bytes);
  const Steps<kColumns> dy_columns(a.dy_token_bytes);
  const Steps<(S > K ? S - K : 0) + 2> x_rows(a.x_row_bytes);
  const Steps<2> dy_rows(a.dy_row_bytes);
  Acc dw[K * K][kVec] = {}, db[1][kVec] = {};
  const int first = chunk * a.tasks_per_chunk, end = min(first + a.tasks_per_chunk, a.tiling.tasks);
  for (int task = first + warp; task < end; task += kWarps) {
    Tile tile = locate_conv_tile(a.tiling, task);
    tile.r0 *= kTileH, tile.q0 *= kColumns;
    const Tile from{tile.b, tile.r0 * S - shape.ph, tile.q0 * S - shape.pw, 0, 0, false, false};
    const View view = view_from<kRows, kCount>(from.r0, from.q0, H, W);
    const View written = view_from<kTileH, kColumns>(tile.r0, tile.q0, rows, columns);
    const T* row = locate_token(static_cast<const T*>(a.x_patches) + c, from, 0, 0, a.x_image_bytes, a.x_row_bytes, a.x_token_bytes);
    const T* dy_row = locate_token(static_cast<const T*>(a.dy_patches) + c, tile, 0, 0, a.dy_image_bytes, a.dy_row_bytes,
                                   a.dy_token_bytes);
    Pack<T, kVec> packs[kTileH][kColumns] = {}, r_rows[2][kCount];
    auto fetch = [&](int n) {
      if (view.rows >> row_met(n, K, S) & 1) load_view<positions_met(kCount, K, S)>(row, x_columns, view, r_rows[n % 2]);
    };
    fetch(0);
#pragma unroll
    for (int r = 0; r < kTileH; ++r, dy_row = opaque(dy_rows.at(dy_row, 1)))
      if (written.rows >> r & 1) load_view<positions_met(kColumns, 1, 1)>(dy_row, dy_columns, written, packs[r]);
    Acc dy[kTileH][kColumns][kVec];
#pragma unroll
    for (int r = 0; r < kTileH; ++r)
#pragma unroll
      for (int q = 0; q < kColumns; ++q) {
        unpack<T, kVec>(packs[r][q], dy[r][q]);
#pragma unroll
        for (int i = 0; i < kVec; ++i) db[0][i] += dy[r][q][i];
      }
#pragma unroll
    for (int n = 0; n < rows_met(K, S); ++n) {
      const int j = row_met(n, K, S);
      if (n + 1 < rows_met(K, S)) {
        row = opaque(x_rows.at(row, row_met(n + 1, K, S) - j));
        fetch(n + 1);
      }
      if (view.rows >> j & 1) correlate_strided<T, K, S, kVec, kCount, kColumns>(j, r_rows[n % 2], dy, dw);
    }
  }
#pragma unroll
  for (int kh = 0; kh < K; ++kh) reduce_warps<K, kVec>(a, chunk, kh * K, c_first, channels, dw + kh * K, s_sums);
  reduce_warps<1, kVec>(a, chunk, K * K, c_first, channels, db, s_sums);
}

// Anything: one tap per block, one row of the coarse grid per warp and step.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    token_conv_bwd_dw_any_kernel(const __grid_constant__ TokenConvGradWeightArgs args) {
  using Acc = acc_t<T>;
  __shared__ Acc s_sums[kThreads];
  const TokenDWConvGradWeightArgs& a = args.sums;
  const TokenDWConvGradWeightParams& p = a.p;
  const TokenConvShape& s = args.shape;
  const int slabs = (p.C + kLanes - 1) / kLanes;
  const int slab = blockIdx.x % slabs, t = blockIdx.x / slabs % a.taps, chunk = blockIdx.x / slabs / a.taps;
  const int c_first = slab * kLanes, channels = min(static_cast<int>(p.C) - c_first, kLanes);
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
  const bool is_bias = t == a.taps - 1;
  const int kh = t / s.Kw, kw = t % s.Kw;
  const T* dy = static_cast<const T*>(a.dy_patches) + c_first + lane;
  const T* x = static_cast<const T*>(a.x_patches) + (c_first + lane) / args.m;
  const int64_t first = static_cast<int64_t>(chunk) * a.tasks_per_chunk;
  const int64_t end = lane < channels ? min(first + a.tasks_per_chunk, p.B * s.rows) : 0;
  // The columns of dy whose tap lies on the grid; db takes them all.
  const int64_t before = s.pw - kw, reach = s.W + before;
  const int64_t q_begin = is_bias || before <= 0 ? 0 : (before + s.sw - 1) / s.sw;
  const int64_t q_end = is_bias ? s.columns : reach <= 0 ? 0 : min(s.columns, (reach + s.sw - 1) / s.sw);
  Acc sum[1][1] = {};
  for (int64_t coarse = first + warp; coarse < end; coarse += kWarps) {
    const int64_t b = coarse / s.rows, r = coarse - b * s.rows, row = r * s.sh + kh - s.ph;
    if (!is_bias && (row < 0 || row >= s.H)) continue;
    const T* dy_row = dy + b * p.dy_stride_b + r * s.columns * p.dy_stride_n;
    const T* x_row = x + b * p.x_stride_b + (row * s.W - before) * p.x_stride_n;
    for (int64_t q = q_begin; q < q_end; ++q) {
      const Acc grad = to_acc(dy_row[q * p.dy_stride_n]);
      sum[0][0] += is_bias ? grad : grad * to_acc(x_row[q * s.sw * p.x_stride_n]);
    }
  }
  reduce_warps<1, 1>(a, chunk, t, c_first, channels, sum, s_sums);
}

}  // namespace cuda
}  // namespace lifeops

// SPDX-License-Identifier: Apache-2.0
// The adjoint of the strided convolution, as a gather: with u + ph = R*S + f, row f of a cell has the taps f, f + S, ... and they meet
// rows R, R - 1, ... of x. A warp owns four rows of eight outputs of 64 channels, whole cells of S x S. No torch in here.
#pragma once
#include "token_conv_fwd.cuh"

namespace lifeops {
namespace cuda {

// acc += row j of x (cell row j - kReach of the tile), all taps that meet it.
template <typename T, int K, int S, int kCount>
__device__ __forceinline__ void accumulate_transposed(int j, const Pack<T, 2> (&row)[kCount], const acc_t<T> (&r_filter)[K * K][2],
                                                      acc_t<T> (&acc)[kTileH][conv_columns(2)][2]) {
  constexpr int kReach = (K - 1) / S;
#pragma unroll
  for (int s = 0; s < kCount; ++s) {
    acc_t<T> value[2];
    unpack<T, 2>(row[s], value);
#pragma unroll
    for (int r = 0; r < kTileH; ++r) {
#pragma unroll
      for (int q = 0; q < conv_columns(2); ++q) {
        const int kh = r % S + (r / S + kReach - j) * S, kw = q % S + (q / S + kReach - s) * S;
        if (kh < 0 || kh >= K || kw < 0 || kw >= K) continue;
#pragma unroll
        for (int i = 0; i < 2; ++i) acc[r][q][i] += value[i] * r_filter[kh * K + kw][i];
      }
    }
  }
}

template <typename T, int K, int S>
__global__ void __launch_bounds__(kThreads, resident_conv_blocks(sizeof(T), S))
    token_conv_transpose_tile_kernel(const __grid_constant__ TokenConvArgs a) {
  using Acc = acc_t<T>;
  constexpr int kSlab = 2 * kLanes, kReach = (K - 1) / S, kCellRows = kTileH / S, kCellColumns = conv_columns(2) / S;
  constexpr int kRows = kCellRows + kReach, kCount = kCellColumns + kReach;
  static_assert(kCellRows * S == kTileH && kCellColumns * S == conv_columns(2), "a tile is whole cells");
  __shared__ Acc s_filter[K * K * (kSlab + 2)];
  const TokenConvParams& p = a.p;
  const int group = a.tiling.slabs.div(blockIdx.x), c_first = (blockIdx.x - group * a.tiling.slabs.divisor) * kSlab;
  const int channels = min(static_cast<int>(p.C) - c_first, kSlab);
  const int lane = threadIdx.x % kLanes, warp = warp_uniform(threadIdx.x / kLanes), c = c_first + lane * 2;
  Acc r_filter[K * K][2], bias[2];
  load_filter(p, c_first, channels, s_filter, r_filter);
  if (lane * 2 >= channels) return;
  load_bias(p, c, bias);

  const TokenConvShape& shape = p.shape;
  const int H = shape.H, W = shape.W, rows = shape.rows, columns = shape.columns;
  const Steps<kCount> x_columns(a.x_token_bytes);
  const Steps<2> x_rows(a.x_row_bytes);
  const Steps<conv_columns(2)> y_columns(a.y_token_bytes);
  const Steps<kTileH> y_rows(a.y_row_bytes);
  const T* x_patches = opaque(static_cast<const T*>(a.x_patches) + c);
  T* y_patches = opaque(static_cast<T*>(a.y_patches) + c);
  int task = group * a.tasks_per_warp * kWarps + warp;
  for (int n = 0; n < a.tasks_per_warp && task < a.tiling.tasks; ++n, task += kWarps) {
    Tile tile = locate_conv_tile(a.tiling, task);
    if (tile.r0 == 0 && tile.q0 == 0) write_prefix<T, 2>(a, tile.b, x_patches, y_patches);
    const int cell_row = tile.r0 * kCellRows + static_cast<uint32_t>(shape.ph) / S;
    const int cell_column = tile.q0 * kCellColumns + static_cast<uint32_t>(shape.pw) / S;
    const Tile from{tile.b, cell_row - kReach, cell_column - kReach, 0, 0, false, false};
    const View view = view_from<kRows, kCount>(from.r0, from.q0, rows, columns);
    const T* row = locate_token(x_patches, from, 0, 0, a.x_image_bytes, a.x_row_bytes, a.x_token_bytes);
    Acc acc[kTileH][conv_columns(2)][2];
    fill(acc, bias);
    Pack<T, 2> r_rows[kRows][kCount];
#pragma unroll
    for (int j = 0; j < kRows; ++j, row = opaque(x_rows.at(row, 1)))
      if (view.rows >> j & 1) load_view<positions_met(kCount, 1, 1)>(row, x_columns, view, r_rows[j]);
#pragma unroll
    for (int j = 0; j < kRows; ++j)
      if (view.rows >> j & 1) accumulate_transposed<T, K, S, kCount>(j, r_rows[j], r_filter, acc);
    tile.r0 = cell_row * S - shape.ph, tile.q0 = cell_column * S - shape.pw;
    T* y = locate_token(y_patches, tile, 0, 0, a.y_image_bytes, a.y_row_bytes, a.y_token_bytes);
    store_view<T, 2>(y, view_from<kTileH, conv_columns(2)>(tile.r0, tile.q0, H, W), y_rows, y_columns, acc);
  }
}

}  // namespace cuda
}  // namespace lifeops

// SPDX-License-Identifier: Apache-2.0
// Gradients of the filter and of the bias where the convolution has a prologue.
//
// A warp walks down its strips as the forward kernel does: K rows of dy wait in registers, each row of x goes through the
// prologue and meets all of them. The sums stay in registers over all strips and leave as in the plain kernel.
// No torch in here.
#pragma once
#include "sweep.cuh"
#include "token_dwconv_bwd_dw.cuh"

namespace lifeops {
namespace cuda {

// dy moves down by a row; row 0 is the new one, zero where the strip owns nothing. Its sum is db.
template <typename T, int K, int kVec, int kTileW>
__device__ __forceinline__ void push_dy(const Tile& tile, bool exists, const Pack<T, kVec> (&row)[kTileW],
                                        acc_t<T> (&dy)[K][kTileW][kVec], acc_t<T> (&db)[kVec]) {
#pragma unroll
  for (int k = K - 1; k > 0; --k)
#pragma unroll
    for (int q = 0; q < kTileW; ++q)
#pragma unroll
      for (int i = 0; i < kVec; ++i) dy[k][q][i] = dy[k - 1][q][i];
#pragma unroll
  for (int q = 0; q < kTileW; ++q) {
    Pack<T, kVec> kept = row[q];
    if (!exists || q < tile.first) kept = {};
    unpack<T, kVec>(kept, dy[0][q]);
#pragma unroll
    for (int i = 0; i < kVec; ++i) db[i] += dy[0][q][i];
  }
}

// dw += a row of x times the rows of dy; dy[k] is k rows above the newest, which tap row 0 connects with this row of x.
template <typename Acc, int K, int kVec, int kTileW>
__device__ __forceinline__ void correlate(const Tile& tile, const Acc (&values)[kTileW + K - 1][kVec],
                                          const Acc (&dy)[K][kTileW][kVec], Acc (&dw)[K * K][kVec]) {
  constexpr int kHalo = K / 2;
  for_columns<kHalo, kTileW>(tile.left, tile.right, [&](int s) {
#pragma unroll
    for (int k = 0; k < K; ++k)
#pragma unroll
      for (int q = 0; q < kTileW; ++q) {
        const int kw = s - q + kHalo;
        if (kw < 0 || kw >= K) continue;
#pragma unroll
        for (int i = 0; i < kVec; ++i) dw[k * K + kw][i] += values[kHalo + s][i] * dy[k][q][i];
      }
  });
}

template <typename T, int K, int kVec, int kTileW>
__global__ void __launch_bounds__(kThreads)
    token_dwconv_act_bwd_dw_tile_kernel(const __grid_constant__ TokenDWConvActGradWeightArgs args) {
  using Acc = acc_t<T>;
  constexpr int kSlab = kLanes * kVec, kHalo = K / 2;
  __shared__ Acc s_sums[kWarps * K * kSlab];
  const TokenDWConvGradWeightArgs& a = args.conv;
  const int chunk = a.tiling.slabs.div(blockIdx.x), c_first = (blockIdx.x - chunk * a.tiling.slabs.divisor) * kSlab;
  const int channels = min(static_cast<int>(a.p.C) - c_first, kSlab);
  const int warp = warp_uniform(threadIdx.x / kLanes);
  // Lanes beyond C repeat the last channels, which keeps the warp together; their sums are not stored.
  const int c = c_first + min(static_cast<int>(threadIdx.x % kLanes) * kVec, channels - kVec);
  const Affine<Acc, kVec> prologue(args.prologue, c);
  const Steps<kTileW + K - 1> x_columns(a.x_token_bytes);
  const Steps<kTileW> dy_columns(a.dy_token_bytes);
  Acc dw[K * K][kVec] = {}, db[1][kVec] = {};
  const int first = chunk * a.tasks_per_chunk, last = min(first + a.tasks_per_chunk, a.tiling.tasks);
  for (int task = first + warp; task < last; task += kWarps) {
    const Strip strip = locate_strip<K, kTileW>(args.strips, task);
    const int begin = max(0, kHalo - strip.r0), end = min(strip.height + K - 1, args.strips.H - strip.r0 + kHalo);
    const T* x = locate_token(static_cast<const T*>(a.x_patches) + c, strip, begin - kHalo, -kHalo, a.x_image_bytes,
                              a.x_row_bytes, a.x_token_bytes);
    const T* dy_row = locate_token(static_cast<const T*>(a.dy_patches) + c, strip, 0, 0, a.dy_image_bytes, a.dy_row_bytes,
                                   a.dy_token_bytes);
    Pack<T, kVec> next[kTileW + K - 1], next_dy[kTileW];
    Acc dy[K][kTileW][kVec] = {};
    auto load_dy = [&](int n) {  // row n for its turn; where it is the last one, that once more
      load_columns<T, kVec, kTileW>(opaque(dy_row), dy_columns, next_dy);
      if (n + 1 < strip.height) dy_row = advance(dy_row, a.dy_row_bytes);
    };
    load_row<T, kVec, kTileW, kHalo>(x, x_columns, strip, next);
    load_dy(0);
#pragma unroll 1
    for (int n = 0; n < begin; ++n) {  // rows of x above the grid
      push_dy<T, K, kVec, kTileW>(strip, n < strip.height, next_dy, dy, db[0]);
      load_dy(n + 1);
    }
#pragma unroll 1
    for (int n = begin; n < end; ++n) {
      Acc values[kTileW + K - 1][kVec];
      convert_row<T, kHalo, kVec, kTileW>(next, strip, args.read_plainly, args.prologue, prologue, values);
      if (n + 1 < end) x = advance(x, a.x_row_bytes);
      push_dy<T, K, kVec, kTileW>(strip, n < strip.height, next_dy, dy, db[0]);
      load_row<T, kVec, kTileW, kHalo>(opaque(x), x_columns, strip, next);
      load_dy(n + 1);
      correlate<Acc, K, kVec, kTileW>(strip, values, dy, dw);
    }
  }
#pragma unroll
  for (int kh = 0; kh < K; ++kh) reduce_warps<K, kVec>(a, chunk, kh * K, c_first, channels, dw + kh * K, s_sums);
  reduce_warps<1, kVec>(a, chunk, K * K, c_first, channels, db, s_sums);
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 4)
    token_dwconv_act_bwd_dw_any_kernel(const __grid_constant__ TokenDWConvActGradWeightArgs args) {
  correlate_any<T>(args.conv, [&](acc_t<T> x, int c) {
    const Affine<acc_t<T>, 1> prologue(args.prologue, c);
    with_act<true>(args.prologue.act,
                   [&](auto act) { x = affine_act<decltype(act)::value>(x, prologue.scale[0], prologue.shift[0]); });
    return x;
  });
}

}  // namespace cuda
}  // namespace lifeops

// SPDX-License-Identifier: Apache-2.0
// Depth-wise convolution over the patch rows of a token sequence, forward and (with the filter mirrored) dX.
//
// A warp owns kTileH x kTileW outputs of 32 * kVec channels: the accumulators and the filter stay in registers, the
// K-1 halo included every input row is loaded once per tile, unpacked once and used for up to K * min(K, kTileH) taps.
// Rows and halo columns outside the grid are skipped by warp-uniform branches. No torch in here.
#pragma once
#include "token_dwconv_plan.h"

namespace lifeops {
namespace cuda {

// Where a tile lies and what it sees: `first` is the first column it owns (segments may overlap), `rows` has a bit per
// input row that exists, left and right say whether there are halo columns beside it; if so, all K/2 of them.
struct Tile {
  int b, r0, q0, first;
  uint32_t rows;
  bool left, right;
};

// The tile's columns: its rows are the caller's.
template <int K, int kTileW>
__device__ __forceinline__ Tile locate_columns(const Tiling& a, int b, int r0, int segment, int W) {
  constexpr int kHalo = K / 2;
  const int last = W - kTileW;  // segments lie side by side from the left; the last ones are moved left to fit
  const int q0 = min(segment * kTileW, segment + 1 < static_cast<int>(a.segments.divisor) ? last - kHalo : last);
  const int own = segment == 0 ? 0 : min(segment * kTileW, last - kHalo + kTileW);
  return {b, r0, q0, own - q0, 0, q0 > 0, q0 < last};
}

template <int K, int kTileW>
__device__ __forceinline__ Tile locate_tile(const Tiling& a, int task, int H, int W) {
  constexpr int kHalo = K / 2, kRows = kTileH + K - 1;
  const int b = a.tiles.div(task), tile = task - b * a.tiles.divisor;
  const int strip = a.segments.div(tile), segment = tile - strip * a.segments.divisor;
  Tile found = locate_columns<K, kTileW>(a, b, strip * kTileH, segment, W);
  const int row0 = strip * kTileH - kHalo, begin = max(0, -row0), end = min(kRows, H - row0);
  found.rows = (1u << end) - (1u << begin);
  return found;
}

// The token `dr` rows and `dq` columns off the tile's first one.
template <typename T>
__device__ __forceinline__ T* locate_token(T* patches, const Tile& tile, int dr, int dq, uint32_t image_bytes,
                                           uint32_t row_bytes, uint32_t token_bytes) {
  const int64_t image = static_cast<uint64_t>(static_cast<uint32_t>(tile.b)) * image_bytes;
  return opaque(advance(patches, image + static_cast<int64_t>(tile.r0 + dr) * static_cast<int32_t>(row_bytes) +
                                     static_cast<int64_t>(tile.q0 + dq) * static_cast<int32_t>(token_bytes)));
}

// One input row of a tile with its halo; `row` points at the leftmost halo column, which need not exist.
template <typename T, int kVec, int kTileW, int kHalo>
__device__ __forceinline__ void load_row(const T* row, const Steps<kTileW + 2 * kHalo>& columns, const Tile& tile,
                                         Pack<T, kVec> (&dst)[kTileW + 2 * kHalo]) {
#pragma unroll
  for (int s = kHalo; s < kHalo + kTileW; ++s) dst[s] = Pack<T, kVec>::load(columns.at(row, s));
  if (tile.left) {
#pragma unroll
    for (int s = 0; s < kHalo; ++s) dst[s] = Pack<T, kVec>::load(columns.at(row, s));
  }
  if (tile.right) {
#pragma unroll
    for (int s = kHalo + kTileW; s < kTileW + 2 * kHalo; ++s) dst[s] = Pack<T, kVec>::load(columns.at(row, s));
  }
}

// The filter of one channel slab, widened and mirrored on the way into shared memory as [tap][channel].
template <int kTaps, int kPitch, typename Acc, typename W>
__device__ __forceinline__ void stage_filter_of(const W* filter, bool flip, int count, Acc* s_filter) {
#pragma unroll 1
  for (uint32_t i = threadIdx.x; i < static_cast<uint32_t>(count); i += kThreads) {
    const uint32_t c = i / kTaps, t = i - c * kTaps;
    s_filter[(flip ? kTaps - 1 - t : t) * kPitch + c] = static_cast<Acc>(to_acc(filter[i]));
  }
}

template <int kTaps, int kPitch, typename Acc, typename Params>
__device__ __forceinline__ void stage_filter(const Params& p, int c_first, int channels, Acc* s_filter) {
  const int64_t first = static_cast<int64_t>(c_first) * kTaps;
  auto stage = [&](auto* filter) {
    stage_filter_of<kTaps, kPitch>(filter + first, p.flip, channels * kTaps, s_filter);
  };
  switch (p.weight_dtype) {  // outside the loop: it runs 25 times per thread at K 7
    case DType::f64: stage(static_cast<const double*>(p.weight)); break;
    case DType::f32: stage(static_cast<const float*>(p.weight)); break;
    case DType::f16: stage(static_cast<const f16*>(p.weight)); break;
    default: stage(static_cast<const bf16*>(p.weight)); break;
  }
}

// The prefix rows of an image, which lie right before its patches in x, y and the residual (its first patch row, or
// null); `tile` is the image's first tile.
template <typename T, int kVec>
__device__ __forceinline__ void copy_prefix(const TokenDWConvFwdArgs& a, const Tile& tile, const T* x, T* y,
                                            const void* residual_patches, int c) {
  const int count = a.p.y_prefix;
  x = locate_token(x, tile, 0, -count, a.x_image_bytes, 0, a.x_token_bytes);
  y = locate_token(y, tile, 0, -count, a.y_image_bytes, 0, a.y_token_bytes);
  const T* r = residual_patches ? locate_token(static_cast<const T*>(residual_patches) + c, tile, 0, -count,
                                               a.r_image_bytes, 0, a.r_token_bytes)
                                : nullptr;
#pragma unroll 1
  for (int n = 0; n < count; ++n) {
    acc_t<T> value[kVec] = {}, residual[kVec];
    if (a.p.prefix == Prefix::copy) unpack<T, kVec>(Pack<T, kVec>::load(x), value);
    if (r) {
      unpack<T, kVec>(Pack<T, kVec>::load(r), residual);
#pragma unroll
      for (int i = 0; i < kVec; ++i) value[i] += residual[i];
      r = advance(r, a.r_token_bytes);
    }
    pack<T, kVec>(value).store(y);
    x = advance(x, a.x_token_bytes), y = advance(y, a.y_token_bytes);
  }
}

// acc += row `j` of the tile (row r0 + j - K/2 of the image), all taps that reach it.
template <typename T, int K, int kVec, int kTileW>
__device__ __forceinline__ void accumulate_row(int j, const Pack<T, kVec> (&row)[kTileW + K - 1], bool left, bool right,
                                               const acc_t<T> (&r_filter)[K * K][kVec],
                                               acc_t<T> (&acc)[kTileH][kTileW][kVec]) {
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
        for (int i = 0; i < kVec; ++i) acc[r][q][i] += value[i] * r_filter[kh * K + kw][i];
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

template <typename T, int kVec, int kTileW>
__device__ __forceinline__ void add_bias_and_residual(const TokenDWConvFwdArgs& a, const Tile& tile, int c, int rows,
                                                      acc_t<T> (&acc)[kTileH][kTileW][kVec]) {
  if (a.p.bias) {
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      const acc_t<T> bias = load_as<acc_t<T>>(a.p.bias, a.p.bias_dtype, c + i);
#pragma unroll
      for (int r = 0; r < kTileH; ++r)
#pragma unroll
        for (int q = 0; q < kTileW; ++q) acc[r][q][i] += bias;
    }
  }
  if (a.r_patches) {
    const T* row = locate_token(static_cast<const T*>(a.r_patches) + c, tile, 0, 0, a.r_image_bytes, a.r_row_bytes,
                                a.r_token_bytes);
#pragma unroll
    for (int r = 0; r < kTileH; ++r, row = advance(row, a.r_row_bytes)) {
      if (r >= rows) break;
#pragma unroll
      for (int q = 0; q < kTileW; ++q) {
        acc_t<T> value[kVec];
        unpack<T, kVec>(Pack<T, kVec>::load(advance(row, static_cast<int64_t>(q) * a.r_token_bytes)), value);
#pragma unroll
        for (int i = 0; i < kVec; ++i) acc[r][q][i] += value[i];
      }
    }
  }
}

// Round once and store the rows and columns the tile owns.
template <typename T, int kVec, int kTileW>
__device__ __forceinline__ void store_tile(T* y, const Tile& tile, int rows, const Steps<kTileH>& y_rows,
                                           const Steps<kTileW>& y_columns,
                                           const acc_t<T> (&acc)[kTileH][kTileW][kVec]) {
  if (rows == kTileH && tile.first == 0) {  // whole tiles first: the tests would cost 1 instruction per element
#pragma unroll
    for (int r = 0; r < kTileH; ++r) {
      T* row = opaque(y_rows.at(y, r));
#pragma unroll
      for (int q = 0; q < kTileW; ++q) pack<T, kVec>(acc[r][q]).store(y_columns.at(row, q));
    }
  } else {
#pragma unroll
    for (int r = 0; r < kTileH; ++r) {
      if (r >= rows) break;
      T* row = opaque(y_rows.at(y, r));
#pragma unroll
      for (int q = 0; q < kTileW; ++q)
        if (q >= tile.first) pack<T, kVec>(acc[r][q]).store(y_columns.at(row, q));
    }
  }
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
#define LIFEOPS_RESIDENT_BLOCKS(K, T) 2  // sm_75 spills 16 bytes with 168 registers
#else
#define LIFEOPS_RESIDENT_BLOCKS(K, T) resident_blocks(K, sizeof(T))
#endif

template <typename T, int K, int kVec, int kTileW>
__global__ void __launch_bounds__(kThreads, LIFEOPS_RESIDENT_BLOCKS(K, T))
    token_dwconv_fwd_tile_kernel(const __grid_constant__ TokenDWConvFwdArgs a) {
  using Acc = acc_t<T>;
  constexpr int kTaps = K * K, kSlab = kLanes * kVec, kPitch = kSlab + kVec, kRows = kTileH + K - 1;
  __shared__ Acc s_filter[kTaps * kPitch];
  const TokenDWConvParams& p = a.p;
  const int group = a.tiling.slabs.div(blockIdx.x), c_first = (blockIdx.x - group * a.tiling.slabs.divisor) * kSlab;
  const int channels = min(static_cast<int>(p.C) - c_first, kSlab);
  stage_filter<kTaps, kPitch>(p, c_first, channels, s_filter);
  __syncthreads();

  const int lane = threadIdx.x % kLanes, warp = warp_uniform(threadIdx.x / kLanes), c = c_first + lane * kVec;
  if (lane * kVec >= channels) return;
  Acc r_filter[kTaps][kVec];
#pragma unroll
  for (int t = 0; t < kTaps; ++t)
#pragma unroll
    for (int i = 0; i < kVec; ++i) r_filter[t][i] = s_filter[t * kPitch + lane * kVec + i];

  const int H = p.H, W = p.W;
  const Steps<kTileW + K - 1> x_columns(a.x_token_bytes);
  const Steps<2> x_rows(a.x_row_bytes);
  const Steps<kTileW> y_columns(a.y_token_bytes);
  const Steps<kTileH> y_rows(a.y_row_bytes);
  const T* x_patches = opaque(static_cast<const T*>(a.x_patches) + c);
  T* y_patches = opaque(static_cast<T*>(a.y_patches) + c);
  int task = group * a.tasks_per_warp * kWarps + warp;
  for (int n = 0; n < a.tasks_per_warp && task < a.tiling.tasks; ++n, task += kWarps) {
    const Tile tile = locate_tile<K, kTileW>(a.tiling, task, H, W);
    if (tile.r0 == 0 && tile.q0 == 0) copy_prefix<T, kVec>(a, tile, x_patches, y_patches, a.r_patches, c);
    const T* row =
        locate_token(x_patches, tile, -(K / 2), -(K / 2), a.x_image_bytes, a.x_row_bytes, a.x_token_bytes);
    Acc acc[kTileH][kTileW][kVec] = {};
    Pack<T, kVec> r_rows[2][kTileW + K - 1];  // row j in use, row j + 1 on its way
    auto fetch = [&](int j) {
      if (tile.rows >> j & 1) load_row<T, kVec, kTileW, K / 2>(row, x_columns, tile, r_rows[j % 2]);
    };
    fetch(0);
#pragma unroll
    for (int j = 0; j < kRows; ++j) {
      row = opaque(x_rows.at(row, 1));
      if (j + 1 < kRows) fetch(j + 1);
      if (tile.rows >> j & 1)
        accumulate_row<T, K, kVec, kTileW>(j, r_rows[j % 2], tile.left, tile.right, r_filter, acc);
    }
    const int rows = min(kTileH, H - tile.r0);
    add_bias_and_residual<T, kVec, kTileW>(a, tile, c, rows, acc);
    T* y = locate_token(y_patches, tile, 0, 0, a.y_image_bytes, a.y_row_bytes, a.y_token_bytes);
    store_tile<T, kVec, kTileW>(y, tile, rows, y_rows, y_columns, acc);
  }
}

// Any K, any grid, any stride, double: one output at a time, every tap a load. Not fast, never wrong.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    token_dwconv_fwd_any_kernel(const __grid_constant__ TokenDWConvFwdArgs a) {
  const TokenDWConvParams& p = a.p;
  const int64_t tokens = p.y_prefix + p.H * p.W, outputs = p.B * tokens * p.C;
  const int taps = p.K * p.K;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < outputs;
       i += static_cast<int64_t>(gridDim.x) * kThreads) {
    const int64_t bn = i / p.C, c = i - bn * p.C, b = bn / tokens, n = bn - b * tokens;
    const T* x = static_cast<const T*>(p.x) + b * p.x_stride_b + c;
    acc_t<T> sum = 0;
    if (n < p.y_prefix) {
      if (p.prefix == Prefix::copy) sum = to_acc(x[n * p.x_stride_n]);
    } else {
      const int64_t r = (n - p.y_prefix) / p.W, q = (n - p.y_prefix) - r * p.W;
      for (int kh = 0; kh < p.K; ++kh) {
        const int64_t row = r + kh - p.K / 2;
        if (row < 0 || row >= p.H) continue;
        for (int kw = 0; kw < p.K; ++kw) {
          const int64_t column = q + kw - p.K / 2;
          if (column < 0 || column >= p.W) continue;
          const int t = kh * p.K + kw;
          sum += to_acc(x[(p.x_prefix + row * p.W + column) * p.x_stride_n]) *
                 load_as<acc_t<T>>(p.weight, p.weight_dtype, c * taps + (p.flip ? taps - 1 - t : t));
        }
      }
      if (p.bias) sum += load_as<acc_t<T>>(p.bias, p.bias_dtype, c);
    }
    if (p.residual) sum += to_acc(static_cast<const T*>(p.residual)[b * p.r_stride_b + n * p.r_stride_n + c]);
    static_cast<T*>(p.y)[b * p.y_stride_b + n * p.y_stride_n + c] = from_acc<T>(sum);
  }
}

}  // namespace cuda
}  // namespace lifeops

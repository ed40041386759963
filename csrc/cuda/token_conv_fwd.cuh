// SPDX-License-Identifier: Apache-2.0
// The strided convolution over the patch rows of a token sequence.
//
// A warp owns 64 outputs per lane, four rows of 8 at two channels or of 4 at four channels: the accumulators and the filter stay in registers, every input row is
// loaded once per tile and used for all taps that it meets. Rows outside the grid are skipped by warp-uniform branches; columns
// outside are zero, and tiles that see none of them test nothing. No torch in here.
#pragma once
#include "token_conv_plan.h"
#include "token_dwconv_fwd.cuh"

namespace lifeops {
namespace cuda {

// What a tile sees of a grid: a bit per row and per column that exist.
struct View {
  uint32_t rows, columns;
};

// Bits of the positions first .. first + kCount - 1 that lie in [0, size).
template <int kCount> __device__ __forceinline__ uint32_t bits_inside(int first, int size) {
  const int begin = min(kCount, max(0, -first)), end = max(begin, min(kCount, size - first));
  return (1u << end) - (1u << begin);
}

template <int kRows, int kColumns>
__device__ __forceinline__ View view_from(int row, int column, int H, int W) {
  return {bits_inside<kRows>(row, H), bits_inside<kColumns>(column, W)};
}

// Bits of the `count` positions that taps meet: with a stride above K some meet none.
constexpr __host__ __device__ uint32_t positions_met(int count, int K, int S) {
  uint32_t bits = 0;
  for (int s = 0; s < count; ++s) bits |= (s % S < K ? 1u : 0u) << s;
  return bits;
}

// Of kTileH outputs at stride S, the rows of x that taps meet: how many, and the n-th from the first.
constexpr __host__ __device__ int rows_met(int K, int S) { return S < K ? (kTileH - 1) * S + K : kTileH * K; }
constexpr __host__ __device__ int row_met(int n, int K, int S) { return S < K ? n : n / K * S + n % K; }

// Columns kFirst .. kEnd - 1 of a row, those of kMet; zero where there are none.
template <uint32_t kMet, int kFirst, int kEnd, typename T, int kVec, int kColumns>
__device__ __forceinline__ void load_part(const T* row, const Steps<kColumns>& columns, const View& view,
                                          Pack<T, kVec> (&dst)[kColumns]) {
  constexpr uint32_t kWhole = kMet & ((1u << kEnd) - (1u << kFirst));
  if ((view.columns & kWhole) == kWhole) {
#pragma unroll
    for (int s = kFirst; s < kEnd; ++s)
      if (kMet >> s & 1) dst[s] = Pack<T, kVec>::load(columns.at(row, s));
  } else {
#pragma unroll
    for (int s = kFirst; s < kEnd; ++s) {
      if (!(kMet >> s & 1)) continue;
      dst[s] = {};
      if (view.columns >> s & 1) dst[s] = Pack<T, kVec>::load(columns.at(row, s));
    }
  }
}

// In halves: the border of the grid is in one of them, and the other tests nothing.
template <uint32_t kMet, typename T, int kVec, int kColumns>
__device__ __forceinline__ void load_view(const T* row, const Steps<kColumns>& columns, const View& view,
                                          Pack<T, kVec> (&dst)[kColumns]) {
  load_part<kMet, 0, kColumns / 2>(row, columns, view, dst);
  load_part<kMet, kColumns / 2, kColumns>(row, columns, view, dst);
}

// The tile of a task; r0 and q0 count in tiles.
__device__ __forceinline__ Tile locate_conv_tile(const Tiling& a, int task) {
  const int b = a.tiles.div(task), tile = task - b * a.tiles.divisor;
  const int strip = a.segments.div(tile);
  return {b, strip, static_cast<int>(tile - strip * a.segments.divisor), 0, 0, false, false};
}

// The prefix rows of image b, which lie right before its patches; kIn is 1 where x has fewer channels, and then they are zero.
template <typename T, int kVec>
__device__ __forceinline__ void write_prefix(const TokenConvArgs& a, int b, const T* x, T* y) {
  const Tile image{b, 0, 0, 0, 0, false, false};
  const int count = a.p.y_prefix;
  x = locate_token(x, image, 0, -count, a.x_image_bytes, 0, a.x_token_bytes);
  y = locate_token(y, image, 0, -count, a.y_image_bytes, 0, a.y_token_bytes);
#pragma unroll 1
  for (int n = 0; n < count; ++n) {
    Pack<T, kVec> value = {};
    if (a.p.prefix == Prefix::copy) value = Pack<T, kVec>::load(x);
    value.store(y);
    x = advance(x, a.x_token_bytes), y = advance(y, a.y_token_bytes);
  }
}

// Rows and columns [r, r + kRows) x [q, q + kColumns) of y that exist on an H x W grid.
template <typename T, int kVec, int kRows, int kColumns>
__device__ __forceinline__ void store_view(T* y, const View& view, const Steps<kRows>& rows, const Steps<kColumns>& columns,
                                           const acc_t<T> (&acc)[kRows][kColumns][kVec]) {
  if (view.rows == (1u << kRows) - 1 && view.columns == (1u << kColumns) - 1) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      T* row = opaque(rows.at(y, r));
#pragma unroll
      for (int q = 0; q < kColumns; ++q) pack<T, kVec>(acc[r][q]).store(columns.at(row, q));
    }
  } else {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (!(view.rows >> r & 1)) continue;
      T* row = opaque(rows.at(y, r));
#pragma unroll
      for (int q = 0; q < kColumns; ++q)
        if (view.columns >> q & 1) pack<T, kVec>(acc[r][q]).store(columns.at(row, q));
    }
  }
}

// The filter of the lane's channels, by way of shared memory; nothing for a lane beyond the last channel.
template <int kTaps, int kVec, typename Acc>
__device__ __forceinline__ void load_filter(const TokenConvParams& p, int c_first, int channels, Acc* s_filter,
                                            Acc (&r_filter)[kTaps][kVec]) {
  constexpr int kPitch = kVec * kLanes + kVec;
  stage_filter<kTaps, kPitch>(p, c_first, channels, s_filter);
  __syncthreads();
  const int lane = threadIdx.x % kLanes;
  if (lane * kVec >= channels) return;
#pragma unroll
  for (int t = 0; t < kTaps; ++t)
#pragma unroll
    for (int i = 0; i < kVec; ++i) r_filter[t][i] = s_filter[t * kPitch + lane * kVec + i];
}

template <typename Acc, int kVec> __device__ __forceinline__ void load_bias(const TokenConvParams& p, int c, Acc (&bias)[kVec]) {
#pragma unroll
  for (int i = 0; i < kVec; ++i) bias[i] = p.bias ? load_as<Acc>(p.bias, p.bias_dtype, c + i) : Acc(0);
}

template <typename Acc, int kRows, int kColumns, int kVec>
__device__ __forceinline__ void fill(Acc (&acc)[kRows][kColumns][kVec], const Acc (&value)[kVec]) {
#pragma unroll
  for (int r = 0; r < kRows; ++r)
#pragma unroll
    for (int q = 0; q < kColumns; ++q)
#pragma unroll
      for (int i = 0; i < kVec; ++i) acc[r][q][i] = value[i];
}

// acc += input row j of the tile, all taps that reach it. kIn channels of x for kVec of y: as many, or one that all read.
template <typename T, int K, int S, int kVec, int kIn, int kCount, int kColumns>
__device__ __forceinline__ void accumulate_strided(int j, const Pack<T, kIn> (&row)[kCount], const acc_t<T> (&r_filter)[K * K][kVec],
                                                   acc_t<T> (&acc)[kTileH][kColumns][kVec]) {
#pragma unroll
  for (int s = 0; s < kCount; ++s) {
    if (s % S >= K) continue;
    acc_t<T> value[kIn];
    unpack<T, kIn>(row[s], value);
#pragma unroll
    for (int r = 0; r < kTileH; ++r) {
#pragma unroll
      for (int q = 0; q < kColumns; ++q) {
        const int kh = j - r * S, kw = s - q * S;
        if (kh < 0 || kh >= K || kw < 0 || kw >= K) continue;
#pragma unroll
        for (int i = 0; i < kVec; ++i) acc[r][q][i] += value[i % kIn] * r_filter[kh * K + kw][i];
      }
    }
  }
}

template <typename T, int K, int S, int kVec, int kIn>
__global__ void __launch_bounds__(kThreads, resident_conv_blocks(sizeof(T), S))
    token_conv_fwd_tile_kernel(const __grid_constant__ TokenConvArgs a) {
  using Acc = acc_t<T>;
  constexpr int kSlab = kVec * kLanes, kColumns = conv_columns(kVec), kRows = (kTileH - 1) * S + K, kCount = (kColumns - 1) * S + K;
  __shared__ Acc s_filter[K * K * (kSlab + kVec)];
  const TokenConvParams& p = a.p;
  const int group = a.tiling.slabs.div(blockIdx.x), c_first = (blockIdx.x - group * a.tiling.slabs.divisor) * kSlab;
  const int channels = min(static_cast<int>(p.C * p.m) - c_first, kSlab);
  const int lane = threadIdx.x % kLanes, warp = warp_uniform(threadIdx.x / kLanes), c = c_first + lane * kVec;
  Acc r_filter[K * K][kVec], bias[kVec];
  load_filter(p, c_first, channels, s_filter, r_filter);
  if (lane * kVec >= channels) return;
  load_bias(p, c, bias);

  const int H = p.shape.H, W = p.shape.W, rows = p.shape.rows, columns = p.shape.columns;
  const Steps<kCount> x_columns(a.x_token_bytes);
  const Steps<(S > K ? S - K : 0) + 2> x_rows(a.x_row_bytes);
  const Steps<kColumns> y_columns(a.y_token_bytes);
  const Steps<kTileH> y_rows(a.y_row_bytes);
  const T* x_patches = opaque(static_cast<const T*>(a.x_patches) + (kIn == kVec ? c : a.multiplier.div(c)));
  T* y_patches = opaque(static_cast<T*>(a.y_patches) + c);
  int task = group * a.tasks_per_warp * kWarps + warp;
  for (int n = 0; n < a.tasks_per_warp && task < a.tiling.tasks; ++n, task += kWarps) {
    Tile tile = locate_conv_tile(a.tiling, task);
    if (tile.r0 == 0 && tile.q0 == 0) write_prefix<T, kVec>(a, tile.b, kIn == kVec ? x_patches : nullptr, y_patches);
    tile.r0 *= kTileH, tile.q0 *= kColumns;
    const Tile from{tile.b, tile.r0 * S - p.shape.ph, tile.q0 * S - p.shape.pw, 0, 0, false, false};
    const View view = view_from<kRows, kCount>(from.r0, from.q0, H, W);
    const T* row = locate_token(x_patches, from, 0, 0, a.x_image_bytes, a.x_row_bytes, a.x_token_bytes);
    Acc acc[kTileH][kColumns][kVec];
    fill(acc, bias);
    Pack<T, kIn> r_rows[2][kCount];  // the n-th row in use, the next on its way
    auto fetch = [&](int n) {
      if (view.rows >> row_met(n, K, S) & 1) load_view<positions_met(kCount, K, S)>(row, x_columns, view, r_rows[n % 2]);
    };
    fetch(0);
#pragma unroll
    for (int n = 0; n < rows_met(K, S); ++n) {
      const int j = row_met(n, K, S);
      if (n + 1 < rows_met(K, S)) {
        row = opaque(x_rows.at(row, row_met(n + 1, K, S) - j));
        fetch(n + 1);
      }
      if (view.rows >> j & 1) accumulate_strided<T, K, S, kVec, kIn, kCount, kColumns>(j, r_rows[n % 2], r_filter, acc);
    }
    T* y = locate_token(y_patches, tile, 0, 0, a.y_image_bytes, a.y_row_bytes, a.y_token_bytes);
    store_view<T, kVec>(y, view_from<kTileH, kColumns>(tile.r0, tile.q0, rows, columns), y_rows, y_columns, acc);
  }
}

// One output of the forward pass: channel o, coarse place (r, q).
template <typename T> __device__ __forceinline__ acc_t<T> strided_output(const TokenConvParams& p, const T* x, int64_t o, int64_t r, int64_t q) {
  const TokenConvShape& s = p.shape;
  const int64_t taps = static_cast<int64_t>(s.Kh) * s.Kw;
  acc_t<T> sum = 0;
  for (int kh = 0; kh < s.Kh; ++kh) {
    const int64_t row = r * s.sh + kh - s.ph;
    if (row < 0 || row >= s.H) continue;
    for (int kw = 0; kw < s.Kw; ++kw) {
      const int64_t column = q * s.sw + kw - s.pw, t = static_cast<int64_t>(kh) * s.Kw + kw;
      if (column < 0 || column >= s.W) continue;
      sum += to_acc(x[(row * s.W + column) * p.x_stride_n + o / p.m]) *
             load_as<acc_t<T>>(p.weight, p.weight_dtype, o * taps + (p.flip ? taps - 1 - t : t));
    }
  }
  return sum;
}

// One output of the adjoint: channel c, fine place (u, v). Of the taps of its phase those are met whose coarse place exists.
template <typename T> __device__ __forceinline__ acc_t<T> transposed_output(const TokenConvParams& p, const T* x, int64_t c, int64_t u, int64_t v) {
  const TokenConvShape& s = p.shape;
  const int64_t first_row = (u + s.ph) / s.sh, first_column = (v + s.pw) / s.sw;
  const int phase_row = static_cast<int>(u + s.ph - first_row * s.sh), phase_column = static_cast<int>(v + s.pw - first_column * s.sw);
  acc_t<T> sum = 0;
  for (int kh = phase_row; kh < s.Kh; kh += s.sh) {
    const int64_t row = first_row - kh / s.sh;
    if (row < 0 || row >= s.rows) continue;
    for (int kw = phase_column; kw < s.Kw; kw += s.sw) {
      const int64_t column = first_column - kw / s.sw;
      if (column < 0 || column >= s.columns) continue;
      const T* at = x + (row * s.columns + column) * p.x_stride_n;
      for (int64_t o = c * p.m; o < (c + 1) * p.m; ++o)
        sum += to_acc(at[o]) * load_as<acc_t<T>>(p.weight, p.weight_dtype, (o * s.Kh + kh) * s.Kw + kw);
    }
  }
  return sum;
}

// Any kernel, stride, padding, multiplier, both ways, double: one output at a time, every tap a load. Not fast, never wrong.
template <typename T>
__global__ void __launch_bounds__(kThreads) token_conv_any_kernel(const __grid_constant__ TokenConvArgs a) {
  const TokenConvParams& p = a.p;
  const int64_t width = p.transpose ? p.shape.W : p.shape.columns, patches = width * (p.transpose ? p.shape.H : p.shape.rows);
  const int64_t tokens = p.y_prefix + patches, channels = p.transpose ? p.C : p.C * p.m, outputs = p.B * tokens * channels;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < outputs;
       i += static_cast<int64_t>(gridDim.x) * kThreads) {
    const int64_t bn = i / channels, c = i - bn * channels, b = bn / tokens, n = bn - b * tokens - p.y_prefix;
    const T* x = static_cast<const T*>(p.x) + b * p.x_stride_b;
    acc_t<T> sum = 0;
    if (n < 0) {
      if (p.prefix == Prefix::copy) sum = to_acc(x[(n + p.y_prefix) * p.x_stride_n + c]);
    } else {
      const T* first = x + p.x_prefix * p.x_stride_n;
      sum = p.transpose ? transposed_output(p, first, c, n / width, n % width) : strided_output(p, first, c, n / width, n % width);
      if (p.bias) sum += load_as<acc_t<T>>(p.bias, p.bias_dtype, c);
    }
    static_cast<T*>(p.y)[b * p.y_stride_b + (n + p.y_prefix) * p.y_stride_n + c] = from_acc<T>(sum);
  }
}

}  // namespace cuda
}  // namespace lifeops

// SPDX-License-Identifier: Apache-2.0
// What a walk down a strip does with a row before and after the convolution: prologue, epilogue and sums forward, the
// prologue's derivative and sums backward. No torch in here.
#pragma once
#include "moments.cuh"
#include "sweep.cuh"

namespace lifeops {
namespace cuda {

// body(q) for the columns that the strip owns.
template <int kTileW, typename Body> __device__ __forceinline__ void for_owned(const Tile& tile, Body&& body) {
  if (tile.first == 0) {
#pragma unroll
    for (int q = 0; q < kTileW; ++q) body(q);
  } else {
#pragma unroll
    for (int q = 0; q < kTileW; ++q)
      if (q >= tile.first) body(q);
  }
}

template <typename T, int kVec, int kTileW>
__device__ __forceinline__ void store_row(T* row, const Tile& tile, const Steps<kTileW>& columns,
                                          const acc_t<T> (&values)[kTileW][kVec]) {
  for_owned<kTileW>(tile, [&](int q) { pack<T, kVec>(values[q]).store(columns.at(row, q)); });
}

// Statistics of what is stored, row by row: the last column is always owned, so the strip's first value of it is k. Rounds the values
// to what is stored: a second copy of them would not fit the registers.
template <typename T, int kVec, int kTileW>
__device__ __forceinline__ void add_to_sums(const Tile& tile, int row, acc_t<T> (&values)[kTileW][kVec],
                                            acc_t<T> (&sums)[kForwardSums][kVec]) {
#pragma unroll
  for (int q = 0; q < kTileW; ++q) unpack<T, kVec>(pack<T, kVec>(values[q]), values[q]);
  const int owned = kTileW - tile.first;
  const JoinBlock<acc_t<T>> join(row * owned, owned);
#pragma unroll
  for (int i = 0; i < kVec; ++i) {
    if (row == 0) sums[0][i] = zero_unless_finite(values[kTileW - 1][i]);
    const acc_t<T> k = sums[0][i];
    acc_t<T> block = 0, square = 0;
    for_owned<kTileW>(tile, [&](int q) { block += values[q][i] - k; });
    const acc_t<T> mean = block / static_cast<acc_t<T>>(owned);
    for_owned<kTileW>(tile, [&](int q) {
      const acc_t<T> d = values[q][i] - k - mean;
      square += d * d;
    });
    join(block, square, &sums[1][i], &sums[2][i]);
  }
}

// Per-channel constants of a forward pass.
template <typename Acc, int kVec> struct ForwardRow {
  static constexpr int kSums = kForwardSums;
  Affine<Acc, kVec> prologue, epilogue;  // the bias is folded into the epilogue

  __device__ __forceinline__ ForwardRow(const TokenDWConvActArgs& a, int c) : prologue(a.prologue, c), epilogue(a.epilogue, c) {
    if (!a.conv.p.bias) return;
#pragma unroll
    for (int i = 0; i < kVec; ++i)
      epilogue.shift[i] += epilogue.scale[i] * load_as<Acc>(a.conv.p.bias, a.conv.p.bias_dtype, c + i);
  }
  template <typename T, int K, int kTileW>
  __device__ __forceinline__ void convert(const TokenDWConvActArgs& a, const Tile& tile,
                                          const Pack<T, kVec> (&row)[kTileW + K - 1],
                                          Acc (&values)[kTileW + K - 1][kVec]) const {
    convert_row<T, K / 2, kVec, kTileW>(row, tile, a.read_plainly, a.prologue, prologue, values);
  }
  template <typename T, int kTileW>
  __device__ __forceinline__ void prefetch(const TokenDWConvActArgs&, const T*, const Steps<kTileW>&,
                                           Pack<T, kVec> (&)[kTileW]) const {}
  template <typename T, int kTileW>
  __device__ __forceinline__ void finish(const TokenDWConvActArgs& a, const Tile& tile, int row, const T** r,
                                         const Steps<kTileW>& columns, const Pack<T, kVec> (&)[kTileW],
                                         Acc (&values)[kTileW][kVec], Acc (&sums)[kSums][kVec]) const {
    if (!a.finish) return;
    if (a.has_epilogue)
      with_act<false>(a.epilogue.act, [&](auto act) {
#pragma unroll
        for (int q = 0; q < kTileW; ++q)
#pragma unroll
          for (int i = 0; i < kVec; ++i)
            values[q][i] = affine_act<decltype(act)::value>(values[q][i], epilogue.scale[i], epilogue.shift[i]);
      });
    if (a.partial) add_to_sums<T, kVec, kTileW>(tile, row, values, sums);
    if (a.conv.r_patches) {  // loaded here, not ahead: it is x again in the blocks that have one, and near
      Pack<T, kVec> residual[kTileW];
      load_columns<T, kVec, kTileW>(opaque(*r), columns, residual);
      *r = advance(*r, a.conv.r_row_bytes);
#pragma unroll
      for (int q = 0; q < kTileW; ++q) {
        Acc value[kVec];
        unpack<T, kVec>(residual[q], value);
#pragma unroll
        for (int i = 0; i < kVec; ++i) values[q][i] += value[i];
      }
    }
  }
};

// Per-channel constants of an input gradient; `values` is du, the residual the forward pass's x.
template <typename Acc, int kVec> struct GradRow {
  static constexpr int kSums = kGradSums;
  Affine<Acc, kVec> prologue;
  Acc a[kVec], b[kVec];

  __device__ __forceinline__ GradRow(const TokenDWConvActArgs& args, int c) : prologue(args.prologue, c) {
    load_values<Acc, kVec>(args.a, c, 0, a);
    load_values<Acc, kVec>(args.b, c, 0, b);
  }
  template <typename T, int K, int kTileW>
  __device__ __forceinline__ void convert(const TokenDWConvActArgs&, const Tile& tile,
                                          const Pack<T, kVec> (&row)[kTileW + K - 1],
                                          Acc (&values)[kTileW + K - 1][kVec]) const {
    for_columns<K / 2, kTileW>(tile.left, tile.right, [&](int s) { unpack<T, kVec>(row[K / 2 + s], values[K / 2 + s]); });
  }
  template <typename T, int kTileW>
  __device__ __forceinline__ void prefetch(const TokenDWConvActArgs&, const T* r, const Steps<kTileW>& columns,
                                           Pack<T, kVec> (&x)[kTileW]) const {
    load_columns<T, kVec, kTileW>(opaque(r), columns, x);
  }
  template <typename T, int kTileW>
  __device__ __forceinline__ void finish(const TokenDWConvActArgs& args, const Tile& tile, int, const T** r,
                                         const Steps<kTileW>&, Pack<T, kVec> (&x)[kTileW],
                                         Acc (&values)[kTileW][kVec], Acc (&sums)[kSums][kVec]) const {
    *r = advance(*r, args.conv.r_row_bytes);
    if (tile.first > 0) {  // what is not owned is counted by its owner
#pragma unroll
      for (int q = 0; q < kTileW; ++q)
        if (q < tile.first) {
          x[q] = {};  // 0 times an infinity would be NaN
#pragma unroll
          for (int i = 0; i < kVec; ++i) values[q][i] = 0;
        }
    }
    with_act<true>(args.prologue.act, [&](auto act) {
#pragma unroll
      for (int q = 0; q < kTileW; ++q) {
        Acc value[kVec];
        unpack<T, kVec>(x[q], value);
#pragma unroll
        for (int i = 0; i < kVec; ++i) {
          const AffineGrad<Acc> f{prologue.scale[i], prologue.shift[i], a[i], b[i], args.b != nullptr};
          values[q][i] = affine_act_grad<decltype(act)::value>(values[q][i], value[i], f, &sums[0][i], &sums[1][i]);
        }
      }
    });
  }
};

}  // namespace cuda
}  // namespace lifeops

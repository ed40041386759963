// SPDX-License-Identifier: Apache-2.0
// What the kernels with a prologue share: strips of a grid, whose rows a warp walks down. Every row is read once per
// strip and goes through the prologue once, instead of (kTileH + K - 1) / kTileH times as in the tiles of the plain
// kernels; nothing outside the grid is read, so the zero padding needs no thought. No torch in here.
#pragma once
#include "sweep_plan.h"
#include "token_dwconv_fwd.cuh"

namespace lifeops {
namespace cuda {

struct Strip : Tile {
  int height;
};

template <int K, int kTileW>
__device__ __forceinline__ Strip locate_strip(const Strips& a, int task) {
  const int b = a.tiling.tiles.div(task), tile = task - b * a.tiling.tiles.divisor;
  const int strip = a.tiling.segments.div(tile), segment = tile - strip * a.tiling.segments.divisor;
  Strip found;
  static_cast<Tile&>(found) = locate_columns<K, kTileW>(a.tiling, b, strip * a.height, segment, a.W);
  found.height = min(a.height, a.H - found.r0);
  return found;
}

// body(s) for the columns of a row and its halo that exist; s is 0 at the first column of the tile.
template <int kHalo, int kTileW, typename Body>
__device__ __forceinline__ void for_columns(bool left, bool right, Body&& body) {
#pragma unroll
  for (int s = 0; s < kTileW; ++s) body(s);
  if (left) {
#pragma unroll
    for (int s = -kHalo; s < 0; ++s) body(s);
  }
  if (right) {
#pragma unroll
    for (int s = kTileW; s < kTileW + kHalo; ++s) body(s);
  }
}

// A row as loaded, widened and through the prologue. The activation is chosen once per row.
template <typename T, int kHalo, int kVec, int kTileW>
__device__ __forceinline__ void convert_row(const Pack<T, kVec> (&row)[kTileW + 2 * kHalo], const Tile& tile, bool plain,
                                            const AffineAct& f, const Affine<acc_t<T>, kVec>& affine,
                                            acc_t<T> (&values)[kTileW + 2 * kHalo][kVec]) {
  if (plain) {
    for_columns<kHalo, kTileW>(tile.left, tile.right, [&](int s) { unpack<T, kVec>(row[kHalo + s], values[kHalo + s]); });
    return;
  }
  with_act<true>(f.act, [&](auto act) {
    for_columns<kHalo, kTileW>(tile.left, tile.right, [&](int s) {
      acc_t<T>(&value)[kVec] = values[kHalo + s];
      unpack<T, kVec>(row[kHalo + s], value);
#pragma unroll
      for (int i = 0; i < kVec; ++i) value[i] = affine_act<decltype(act)::value>(value[i], affine.scale[i], affine.shift[i]);
    });
  });
}

// A row without its halo.
template <typename T, int kVec, int kTileW>
__device__ __forceinline__ void load_columns(const T* row, const Steps<kTileW>& columns, Pack<T, kVec> (&dst)[kTileW]) {
#pragma unroll
  for (int q = 0; q < kTileW; ++q) dst[q] = Pack<T, kVec>::load(columns.at(row, q));
}

}  // namespace cuda
}  // namespace lifeops

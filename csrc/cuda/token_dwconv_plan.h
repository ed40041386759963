// SPDX-License-Identifier: Apache-2.0
// token_dwconv on CUDA: which kernel runs, over which tiles, with how many blocks. Pure host functions of the problem,
// shared by the launcher and the host tests. No torch in here.
#pragma once
#include <algorithm>
#include <stdexcept>

#include "../dtype.h"
#include "launch.h"

namespace lifeops {
namespace cuda {

constexpr int kTileH = 4;  // rows of a tile: 56 or 64 accumulators at kVec 2, (4 + K - 1) / 4 loads per output row

// Blocks of the forward tile kernel that fit an SM: 4 leave 128 registers per thread, 3 leave 168, 2 leave 255. Floats
// need about 20 more than bf16 for the rows on their way; with a block more they spill up to 364 bytes.
constexpr int resident_blocks(int K, int element) { return K == 7 ? 2 : (K == 3 ? 4 : 3) - (element == 4); }

// How the patch grid is cut into tiles of kTileH x tile_w patches; a task is one tile of one image.
struct Tiling {
  FastDiv slabs, tiles, segments;  // channel slabs; tiles of an image; tiles side by side in a row
  int32_t tasks;
};

struct TokenDWConvFwdArgs {
  TokenDWConvParams p;
  Tiling tiling;
  int32_t tasks_per_warp;
  const void* x_patches;  // the first patch row of x, of the residual, of y
  const void* r_patches;
  void* y_patches;
  uint32_t x_image_bytes, r_image_bytes, y_image_bytes;
  uint32_t x_token_bytes, r_token_bytes, y_token_bytes;
  uint32_t x_row_bytes, r_row_bytes, y_row_bytes;  // a row of the grid: W tokens
};

struct TokenDWConvGradWeightArgs {
  TokenDWConvGradWeightParams p;
  Tiling tiling;
  int32_t taps, chunks, tasks_per_chunk;  // K * K and one more for db; partial sums; tiles, or rows, in each of them
  const void* x_patches;
  const void* dy_patches;
  void* partial;  // (chunks, taps, C) in the accumulator's type, all of it written
  uint32_t x_image_bytes, dy_image_bytes;
  uint32_t x_token_bytes, dy_token_bytes;
  uint32_t x_row_bytes, dy_row_bytes;
};

// vec 0 is the kernel for any K and any grid; else vec channels per thread and tiles of kTileH x tile_w.
struct Variant {
  int vec, tile_w;
};

template <typename Args> struct Plan {
  Args args;
  Variant variant;
  LaunchShape shape;
};

// A tile as wide as the row, or at least a halo narrower: segments can then be laid so that no halo is cut in two.
inline bool can_tile(int64_t W, int tile_w, int K) { return W == tile_w || W >= tile_w + K / 2; }

inline int64_t padded(int64_t W, int tile_w) { return ceil_div(W, tile_w) * tile_w; }

// Two channels per thread if every row of every tensor starts on a pair; 7 columns or 8, whichever wastes less.
inline Variant choose_variant(DType dtype, int K, int64_t W, bool pairs, bool small_strides) {
  if (dtype == DType::f64 || (K != 3 && K != 5 && K != 7) || !small_strides) return {0, 0};
  const int widths[] = {8, 7};
  Variant best{0, 0};
  for (int tile_w : widths)
    if ((pairs || tile_w == 8) && can_tile(W, tile_w, K) && (!best.vec || padded(W, tile_w) < padded(W, best.tile_w)))
      best = {pairs ? 2 : 1, tile_w};
  return best;
}

inline bool is_even(const void* p, int64_t stride_b, int64_t stride_n, int element) {
  return reinterpret_cast<uintptr_t>(p) % (2 * element) == 0 && stride_b % 2 == 0 && stride_n % 2 == 0;
}

// The tile kernels keep the strides of an image, a row and a token in 32 bits; products with them have 64.
inline bool is_small(int64_t stride_b, int64_t stride_n, int64_t W, int element) {
  auto fits = [&](int64_t elements) { return elements >= 0 && elements * element < (1ll << 31); };
  return fits(stride_b) && fits(stride_n * W);
}

inline Tiling make_tiling(int64_t B, int64_t H, int64_t W, int64_t C, const Variant& v, int64_t tile_h) {
  const int64_t segments = ceil_div(W, v.tile_w), tiles = ceil_div(H, tile_h) * segments;
  if (B * tiles >= (1ll << 31)) throw std::length_error("token_dwconv: more than 2^31 tiles");
  return {FastDiv(ceil_div(C, kLanes * v.vec)), FastDiv(tiles), FastDiv(segments), static_cast<int32_t>(B * tiles)};
}

inline uint32_t checked_blocks(int64_t blocks) {
  if (blocks < 1 || blocks >= (1ll << 31)) throw std::length_error("token_dwconv: the grid does not fit 2^31 blocks");
  return static_cast<uint32_t>(blocks);
}

// Everything but the tiling; the byte strides are used where is_small holds.
inline TokenDWConvFwdArgs forward_args(const TokenDWConvParams& p) {
  const int es = element_size(p.dtype);
  TokenDWConvFwdArgs a{};
  a.p = p;
  auto patches = [&](const void* t, int64_t first) { return t ? static_cast<const char*>(t) + first * es : nullptr; };
  a.x_patches = patches(p.x, p.x_prefix * p.x_stride_n);
  a.r_patches = patches(p.residual, p.y_prefix * p.r_stride_n);
  a.y_patches = const_cast<char*>(patches(p.y, p.y_prefix * p.y_stride_n));
  a.x_image_bytes = p.x_stride_b * es, a.y_image_bytes = p.y_stride_b * es;
  a.x_token_bytes = p.x_stride_n * es, a.x_row_bytes = p.x_stride_n * p.W * es;
  a.y_token_bytes = p.y_stride_n * es, a.y_row_bytes = p.y_stride_n * p.W * es;
  if (p.residual) {
    a.r_image_bytes = p.r_stride_b * es, a.r_token_bytes = p.r_stride_n * es;
    a.r_row_bytes = p.r_stride_n * p.W * es;
  }
  return a;
}

// Whether all sequences of the problem start every row on a pair of channels; whether their strides are small.
inline bool all_even(const TokenDWConvParams& p) {
  const int es = element_size(p.dtype);
  return p.C % 2 == 0 && is_even(p.x, p.x_stride_b, p.x_stride_n, es) && is_even(p.y, p.y_stride_b, p.y_stride_n, es) &&
         (!p.residual || is_even(p.residual, p.r_stride_b, p.r_stride_n, es));
}
inline bool all_small(const TokenDWConvParams& p) {
  const int es = element_size(p.dtype);
  return is_small(p.x_stride_b, p.x_stride_n, p.W, es) && is_small(p.y_stride_b, p.y_stride_n, p.W, es) &&
         (!p.residual || is_small(p.r_stride_b, p.r_stride_n, p.W, es));
}

// One wave of blocks that stay: a warp loads its filter once (2 to 7 instructions per element if it did one tile only)
// and then walks over tasks_per_warp tiles. Results do not depend on it.
template <typename Args> LaunchShape one_wave(Args& a, int multiprocessors, int blocks_per_sm) {
  const int64_t resident = static_cast<int64_t>(multiprocessors) * blocks_per_sm * kWarps;
  const int64_t slabs = a.tiling.slabs.divisor;
  a.tasks_per_warp = static_cast<int32_t>(std::max<int64_t>(1, ceil_div(slabs * a.tiling.tasks, resident)));
  const int64_t groups = ceil_div(a.tiling.tasks, static_cast<int64_t>(a.tasks_per_warp) * kWarps);
  return {checked_blocks(slabs * groups), kThreads};
}

inline Plan<TokenDWConvFwdArgs> plan_token_dwconv(const TokenDWConvParams& p, int multiprocessors = 132) {
  Plan<TokenDWConvFwdArgs> plan{};
  plan.variant = choose_variant(p.dtype, p.K, p.W, all_even(p), all_small(p));
  plan.args = forward_args(p);
  if (plan.variant.vec == 0) {
    const int64_t outputs = p.B * (p.y_prefix + p.H * p.W) * p.C;
    plan.shape = {checked_blocks(std::min<int64_t>(ceil_div(outputs, kThreads), 1 << 20)), kThreads};
    return plan;
  }
  plan.args.tiling = make_tiling(p.B, p.H, p.W, p.C, plan.variant, kTileH);
  plan.shape = one_wave(plan.args, multiprocessors, resident_blocks(p.K, element_size(p.dtype)));
  return plan;
}

// Everything but what depends on the kernel.
inline TokenDWConvGradWeightArgs grad_weight_args(const TokenDWConvGradWeightParams& p) {
  const int es = element_size(p.dtype);
  TokenDWConvGradWeightArgs a{};
  a.p = p;
  a.taps = (p.x ? p.K * p.K : 0) + 1;
  a.dy_patches = static_cast<const char*>(p.dy) + p.dy_prefix * p.dy_stride_n * es;
  a.x_patches = p.x ? static_cast<const char*>(p.x) + p.x_prefix * p.x_stride_n * es : nullptr;
  a.x_image_bytes = p.x_stride_b * es, a.dy_image_bytes = p.dy_stride_b * es;
  a.x_token_bytes = p.x_stride_n * es, a.x_row_bytes = p.x_stride_n * p.W * es;
  a.dy_token_bytes = p.dy_stride_n * es, a.dy_row_bytes = p.dy_stride_n * p.W * es;
  return a;
}

inline bool all_even(const TokenDWConvGradWeightParams& p) {
  const int es = element_size(p.dtype);
  return p.C % 2 == 0 && is_even(p.dy, p.dy_stride_b, p.dy_stride_n, es) &&
         (!p.x || is_even(p.x, p.x_stride_b, p.x_stride_n, es));
}
inline bool all_small(const TokenDWConvGradWeightParams& p) {
  const int es = element_size(p.dtype);
  return is_small(p.dy_stride_b, p.dy_stride_n, p.W, es) && is_small(p.x_stride_b, p.x_stride_n, p.W, es);
}

// The kernel for any K sums rows of the grid; -> blocks.
inline int64_t chunk_rows(TokenDWConvGradWeightArgs& a) {
  const int64_t work = a.p.B * a.p.H, slabs = ceil_div(a.p.C, kLanes);
  const int64_t chunks = std::max<int64_t>(1, std::min(ceil_div(work, 64 * kWarps), 512 / slabs));
  a.tasks_per_chunk = static_cast<int32_t>(ceil_div(work, chunks));
  a.chunks = static_cast<int32_t>(ceil_div(work, a.tasks_per_chunk));
  return slabs * a.taps * a.chunks;
}

// The tile kernels sum tiles; -> the launch.
inline LaunchShape chunk_tiles(TokenDWConvGradWeightArgs& a) {
  const int64_t work = a.tiling.tasks, slabs = a.tiling.slabs.divisor;
  const int64_t chunks = std::max<int64_t>(1, std::min(ceil_div(work, 4 * kWarps), 512 / slabs));
  a.tasks_per_chunk = static_cast<int32_t>(ceil_div(work, chunks));
  a.chunks = static_cast<int32_t>(ceil_div(work, a.tasks_per_chunk));
  return {checked_blocks(slabs * a.chunks), kThreads};
}

// The partial sums are a function of the problem alone, never of the device: at most about 512 blocks, and at least
// four tiles, or 64 rows, for each warp.
inline Plan<TokenDWConvGradWeightArgs> plan_token_dwconv_grad_weight(const TokenDWConvGradWeightParams& p) {
  Plan<TokenDWConvGradWeightArgs> plan{};
  if (p.x) plan.variant = choose_variant(p.dtype, p.K, p.W, all_even(p), all_small(p));
  TokenDWConvGradWeightArgs& a = plan.args = grad_weight_args(p);
  if (plan.variant.vec == 0) {
    plan.shape = {checked_blocks(chunk_rows(a)), kThreads};
    return plan;
  }
  a.tiling = make_tiling(p.B, p.H, p.W, p.C, plan.variant, kTileH);
  plan.shape = chunk_tiles(a);
  return plan;
}

}  // namespace cuda
}  // namespace lifeops

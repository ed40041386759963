// SPDX-License-Identifier: Apache-2.0
// token_dwconv with prologue and epilogue on CUDA: which kernel runs, over which strips, with how many blocks. Pure host
// functions of the problem, shared by the launcher and the host tests. No torch in here.
#pragma once
#include "activations.cuh"
#include "token_dwconv_plan.h"

namespace lifeops {
namespace cuda {

// How sequences are cut into tasks: up to `height` rows of one segment of one image, whose rows a warp walks down.
struct Strips {
  Tiling tiling;
  int32_t H, W, height, tile_w, halo;

  // The first column that segment s owns; segments may overlap (see locate_columns).
  __host__ __device__ int first_column(int s) const {
    return s == 0 ? 0 : s * tile_w < W - halo ? s * tile_w : W - halo;
  }
  // Outputs of a task.
  __host__ __device__ int64_t count(int task) const {
    const int tile = task - tiling.tiles.div(task) * tiling.tiles.divisor, strip = tiling.segments.div(tile);
    const int s = tile - strip * tiling.segments.divisor, left = H - strip * height;
    const int end = s + 1 < static_cast<int>(tiling.segments.divisor) ? first_column(s + 1) : W;
    return static_cast<int64_t>(left < height ? left : height) * (end - first_column(s));
  }
};

// A block takes a slab of channels of kWarps tasks, slabs innermost: neighbours read neighbouring channels.
inline LaunchShape one_task_per_warp(const Tiling& tiling) {
  return {checked_blocks(ceil_div(tiling.tasks, kWarps) * tiling.slabs.divisor), kThreads};
}

constexpr int kForwardSums = 3;  // per task and channel, of y as stored: k, sum of y - k, m2 (moments.cuh)
constexpr int kGradSums = 2;     // what affine_act_grad adds up

// Forward, or the input gradient: conv.x is dy then, conv.residual the forward pass's x.
struct TokenDWConvActArgs {
  TokenDWConvFwdArgs conv;
  Strips strips;
  AffineAct prologue, epilogue;
  int32_t read_plainly;          // nothing to do in the prologue
  int32_t finish, has_epilogue;  // anything to do with a finished row before it is stored; bias or epilogue
  const void *a, *b;             // of AffineGrad, or null
  void* partial;                 // (tasks, sums, C) in the accumulator's type, or null
};

struct TokenDWConvActGradWeightArgs {
  TokenDWConvGradWeightArgs conv;
  Strips strips;
  AffineAct prologue;
  int32_t read_plainly;
};

// Blocks of a sweep that fit an SM, as resident_blocks.
constexpr int sweep_blocks(int K, int element, bool grad) { return K == 3 ? (element == 4 || grad ? 3 : 4) : 2 + (K == 5 && element == 2 && !grad); }

// Channels per thread: at K 7 one, since 7 x 7 taps and the sums of 7 rows take most registers. 7 columns or 8.
constexpr int sweep_vec(int K) { return K == 7 ? 1 : 2; }
inline Variant choose_sweep(DType dtype, int K, int64_t W, bool pairs, bool small_strides) {
  const bool one = sweep_vec(K) == 1;
  Variant best = choose_variant(dtype, K, W, pairs || one, small_strides);
  if (best.vec && one) best.vec = 1;
  return best;
}

// Whole columns of the grid where they fill a device; else strips, which read their K - 1 halo rows twice: of 7 rows at
// least, of 4 at least where even those do not fill it. From the problem alone, as the sums depend on it.
inline int64_t choose_height(int64_t B, int64_t H, int64_t segments, int64_t slabs) {
  const int64_t columns = std::max<int64_t>(1, B * segments * slabs), wanted = ceil_div(2048, columns);
  int64_t strips = std::min(wanted, std::max<int64_t>(1, H / 7));
  if (strips < wanted) strips = std::min(wanted, ceil_div(H, 4));
  return ceil_div(H, strips);
}

inline Strips make_strips(int64_t B, int64_t H, int64_t W, int64_t C, int K, const Variant& v) {
  Variant cut = v;
  if (!v.vec) cut = {1, static_cast<int>(W)};  // the kernels for any K take whole rows
  const int64_t segments = ceil_div(W, cut.tile_w), height = choose_height(B, H, segments, ceil_div(C, kLanes * cut.vec));
  return {make_tiling(B, H, W, C, cut, height), static_cast<int32_t>(H), static_cast<int32_t>(W),
          static_cast<int32_t>(height), cut.tile_w, v.vec ? K / 2 : 0};
}

inline Plan<TokenDWConvActArgs> plan_sweep(const TokenDWConvParams& p, int blocks_per_sm, int multiprocessors) {
  Plan<TokenDWConvActArgs> plan{};
  plan.variant = choose_sweep(p.dtype, p.K, p.W, all_even(p), all_small(p));
  TokenDWConvActArgs& a = plan.args;
  a.conv = forward_args(p);
  a.strips = make_strips(p.B, p.H, p.W, p.C, p.K, plan.variant);
  a.conv.tiling = a.strips.tiling;
  plan.shape = plan.variant.vec ? one_wave(a.conv, multiprocessors, blocks_per_sm) : one_task_per_warp(a.strips.tiling);
  return plan;
}

inline Plan<TokenDWConvActArgs> plan_token_dwconv_act(const TokenDWConvParams& p, const AffineAct& prologue,
                                                      const AffineAct& epilogue, bool sums, int multiprocessors = 132) {
  auto plan = plan_sweep(p, sweep_blocks(p.K, element_size(p.dtype), false), multiprocessors);
  plan.args.prologue = prologue, plan.args.epilogue = epilogue;
  plan.args.read_plainly = is_identity(prologue), plan.args.has_epilogue = !is_identity(epilogue) || p.bias;
  plan.args.finish = plan.args.has_epilogue || p.residual || sums;
  return plan;
}

// p.x is dy, p.residual the forward pass's x and p.y dx.
inline Plan<TokenDWConvActArgs> plan_token_dwconv_act_grad_input(const TokenDWConvParams& p, const AffineAct& prologue,
                                                                 const void* a, const void* b, int multiprocessors = 132) {
  auto plan = plan_sweep(p, sweep_blocks(p.K, element_size(p.dtype), true), multiprocessors);
  plan.args.prologue = prologue, plan.args.a = a, plan.args.b = b;
  return plan;
}

// Chunks of strips, as many for each warp of a block; at most about 512 blocks, from the problem alone.
inline Plan<TokenDWConvActGradWeightArgs> plan_token_dwconv_act_grad_weight(const TokenDWConvGradWeightParams& p,
                                                                            const AffineAct& prologue) {
  Plan<TokenDWConvActGradWeightArgs> plan{};
  plan.variant = choose_sweep(p.dtype, p.K, p.W, all_even(p), all_small(p));
  plan.args.prologue = prologue, plan.args.read_plainly = is_identity(prologue);
  TokenDWConvGradWeightArgs& a = plan.args.conv = grad_weight_args(p);
  if (plan.variant.vec == 0) {
    plan.shape = {checked_blocks(chunk_rows(a)), kThreads};
    return plan;
  }
  plan.args.strips = make_strips(p.B, p.H, p.W, p.C, p.K, plan.variant);
  a.tiling = plan.args.strips.tiling;
  const int64_t work = a.tiling.tasks, slabs = a.tiling.slabs.divisor, most = std::max<int64_t>(1, 512 / slabs);
  a.tasks_per_chunk = static_cast<int32_t>(std::max<int64_t>(1, (work + most * kWarps / 2) / (most * kWarps)) * kWarps);
  a.chunks = static_cast<int32_t>(ceil_div(work, a.tasks_per_chunk));
  plan.shape = {checked_blocks(slabs * a.chunks), kThreads};
  return plan;
}

}  // namespace cuda
}  // namespace lifeops

// SPDX-License-Identifier: Apache-2.0
// The channel passes on CUDA: how a sequence is cut and how many channels a thread takes. Pure host functions of the
// problem. No torch in here.
#pragma once
#include "../cpu/channel_act.h"
#include "task_sums_plan.h"

namespace lifeops {
namespace cuda {

constexpr int kTaskTokens = 64;  // of a warp, at most: every image is cut into even parts

struct ChannelActArgs {
  ChannelActParams p;  // values that are absent are null
  Strips parts;        // of the tokens of an image, as rows of a grid one column wide
  int64_t lead;        // rows of the residual in front of its patches
  void* partial;       // (tasks, sums, C) in the accumulator's type, or null
};

inline bool is_aligned(const Rows& r, int element, int vec) {
  return !r.data || (reinterpret_cast<uintptr_t>(r.data) % (vec * element) == 0 && r.stride_b % vec == 0 && r.stride_n % vec == 0);
}

// Four channels per thread if every row of every sequence starts on four.
inline int choose_channel_vec(const ChannelActParams& p) {
  const int es = element_size(p.dtype);
  const bool aligned = is_aligned(p.x, es, 4) && is_aligned(p.dy, es, 4) && is_aligned(p.residual, es, 4) && is_aligned(p.y, es, 4);
  return es < 8 && p.C % 4 == 0 && aligned ? 4 : 1;
}

inline Plan<ChannelActArgs> plan_channel_act(const ChannelActParams& p, int64_t lead) {
  Plan<ChannelActArgs> plan{};
  const int vec = choose_channel_vec(p);
  const int64_t height = ceil_div(p.n, ceil_div(p.n, kTaskTokens));
  plan.variant = {vec, 1};
  plan.args.p = p, plan.args.lead = lead;
  plan.args.parts = {make_tiling(p.B, p.n, 1, p.C, plan.variant, height), static_cast<int32_t>(p.n), 1, static_cast<int32_t>(height), 1, 0};
  plan.shape = one_task_per_warp(plan.args.parts.tiling);
  return plan;
}

}  // namespace cuda
}  // namespace lifeops

// SPDX-License-Identifier: Apache-2.0
// The kernel arguments as the GPU would get them, for counting instructions. -> their size; `out` gets the number of
// blocks, the channels per thread and the width of a tile.
#include "cuda_shim.h"

#include <cstring>

#include "../../csrc/cuda/sweep_plan.h"
#include "../../csrc/cuda/token_conv_plan.h"

namespace {

template <typename Args> int copy_plan(const lifeops::cuda::Plan<Args>& plan, void* args, int* out) {
  std::memcpy(args, &plan.args, sizeof(plan.args));
  out[0] = plan.shape.blocks, out[1] = plan.variant.vec, out[2] = plan.variant.tile_w;
  return sizeof(plan.args);
}

template <typename Args> int copy_plan(const lifeops::cuda::ConvPlan<Args>& plan, void* args, int* out) {
  std::memcpy(args, &plan.args, sizeof(plan.args));
  out[0] = plan.shape.blocks, out[1] = plan.variant.K, out[2] = plan.variant.stride;
  return sizeof(plan.args);
}

}  // namespace

using lifeops::cuda::AffineAct;

extern "C" {

int shim_plan_fwd(const lifeops::TokenDWConvParams* p, void* args, int* out) {
  return copy_plan(lifeops::cuda::plan_token_dwconv(*p), args, out);
}

int shim_plan_bwd_dw(const lifeops::TokenDWConvGradWeightParams* p, void* args, int* out) {
  return copy_plan(lifeops::cuda::plan_token_dwconv_grad_weight(*p), args, out);
}

int shim_plan_act_fwd(const lifeops::TokenDWConvParams* p, const AffineAct* prologue, const AffineAct* epilogue, void* partial,
                      void* args, int* out) {
  auto plan = lifeops::cuda::plan_token_dwconv_act(*p, *prologue, *epilogue, partial);
  plan.args.partial = partial;
  return copy_plan(plan, args, out);
}

int shim_plan_act_bwd_dx(const lifeops::TokenDWConvParams* p, const AffineAct* prologue, const void* a, const void* b,
                         void* partial, void* args, int* out) {
  auto plan = lifeops::cuda::plan_token_dwconv_act_grad_input(*p, *prologue, a, b);
  plan.args.partial = partial;
  return copy_plan(plan, args, out);
}

int shim_plan_act_bwd_dw(const lifeops::TokenDWConvGradWeightParams* p, const AffineAct* prologue, void* args, int* out) {
  return copy_plan(lifeops::cuda::plan_token_dwconv_act_grad_weight(*p, *prologue), args, out);
}

// `out` gets the number of blocks, K and the stride.
int shim_plan_conv(const lifeops::cuda::TokenConvParams* p, void* args, int* out) {
  return copy_plan(lifeops::cuda::plan_token_conv(*p), args, out);
}

int shim_plan_conv_bwd_dw(const lifeops::cuda::TokenConvGradWeightParams* p, void* args, int* out) {
  return copy_plan(lifeops::cuda::plan_token_conv_grad_weight(*p), args, out);
}
}

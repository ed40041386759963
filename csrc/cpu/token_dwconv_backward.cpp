// SPDX-License-Identifier: Apache-2.0
// CPU launcher of the backward pass of an activation behind the convolution. How the work is cut depends on the problem only.
#include "../tensor_args.h"
#include "threads.h"
#include "token_dwconv_pack.h"

namespace lifeops {
namespace {

thread_local Scratch ring_scratch;    // one task's rows
thread_local Scratch shared_scratch;  // the calling thread's packed weights and partial sums, read by all

constexpr int64_t kTasks = 16;  // wanted, for many cores; a row strip sums the z of K - 1 rows once more
constexpr int64_t kGroups = 8;  // of partial sums, at most

template <class A> void run(const BackwardParams& params, const TokenDWConvKernels& kernel) {
  const TokenDWConvParams& p = params.input;
  const int64_t taps = p.K * p.K, blocks = ceil_div(p.C, kBlock), channels = kernel.backward_channels(params), chunks = ceil_div(p.C, channels);
  const int64_t segments = ceil_div(p.W, kSegment), strips = max64(1, min64(kTasks / (p.B * segments * chunks), p.H / (2 * p.K)));
  const int64_t units = p.B * strips * segments, each = ceil_div(units, min64(units, kGroups)), groups = ceil_div(units, each);
  const int64_t size = grad_weight_rows(params.weight) * kBlock, packed = blocks * taps * kBlock;
  A* weight = static_cast<A*>(shared_scratch.get((2 * packed + blocks * kBlock + groups * blocks * size) * int64_t(sizeof(A))));
  A *mirrored = weight + packed, *bias = mirrored + packed, *partials = bias + blocks * kBlock;
  for_each_task(blocks, max64(1, kGrainBytes / (2 * taps * kBlock * int64_t(sizeof(A)))), [&](int64_t block) {
    pack_block(params.forward, block, weight + block * taps * kBlock);
    pack_block(p, block, mirrored + block * taps * kBlock);
  });
  if (params.forward.bias) pack_bias(params.forward, blocks, bias);
  const int64_t scratch = kernel.backward_scratch(params);
  const int64_t task_bytes = max64(1, p.H * p.W * channels * int64_t(sizeof(A)) / (strips * segments)) * each;
  for_each_task(groups * chunks, max64(1, kGrainBytes / task_bytes), [&](int64_t i) {
    const int64_t c0 = i % chunks * channels, group = i / chunks;
    const BackwardTask task{c0, min64(p.C, c0 + channels), group * each, min64((group + 1) * each, units), strips, segments,
                            weight, mirrored, params.forward.bias ? bias : nullptr, partials + (group * blocks + c0 / kBlock) * size};
    kernel.backward(params, task, ring_scratch.get(scratch));
  });
  for_each_task(blocks, max64(1, kGrainBytes / (groups * size * int64_t(sizeof(A)))),
                [&](int64_t block) { reduce_block(params.weight, groups, blocks, block, partials); });
}

void token_dwconv_act_backward(const Tensor& dy, const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, int64_t act,
                               const Tensor& dx, const Tensor& dw, const std::optional<Tensor>& db, int64_t H, int64_t W, int64_t dy_prefix,
                               int64_t x_prefix, int64_t prefix_mode, int64_t isa) {
  STD_TORCH_CHECK(act >= 0 && act <= int64_t(Act::gelu), "lifeops_native: unknown activation ", act);
  const int64_t K = weight.size(weight.dim() - 1);
  const BackwardParams params{forward_params(x, weight, bias, {}, dx, H, W, x_prefix, x_prefix, 1, false),
                              forward_params(dy, weight, {}, {}, dx, H, W, dy_prefix, x_prefix, prefix_mode, true),
                              GradWeightParams(grad_weight_params(dy, x, dw, db, K, H, W, dy_prefix, x_prefix)), Act(act)};
  const TokenDWConvParams& p = params.input;
  STD_TORCH_CHECK(params.forward.B == p.B && params.forward.C == p.C && params.forward.dtype == p.dtype,
                  "lifeops_native: x and dy must agree in batch, channels and dtype");
  if (p.B * H * W * p.C == 0) return;
  p.dtype == DType::f64 ? run<double>(params, kernels(isa)) : run<float>(params, kernels(isa));
}

}  // namespace
}  // namespace lifeops

STABLE_TORCH_LIBRARY_IMPL(lifeops_native, CPU, m) { m.impl("token_dwconv_act_backward", TORCH_BOX(&lifeops::token_dwconv_act_backward)); }

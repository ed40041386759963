// SPDX-License-Identifier: Apache-2.0
// The channel passes on CUDA tensors.
#include "channel_act_launch.h"
#include "values.h"

namespace lifeops {
namespace cuda {
namespace {

// The last `patches` rows of a sequence.
Rows patch_rows(const std::optional<Tensor>& t, const char* name, const ChannelActParams& p, const Tensor& first) {
  if (!t) return {nullptr, 0, 0};
  check_device(name, *t, first);
  STD_TORCH_CHECK(t->dim() == 3 && t->size(1) >= p.n, "lifeops_native: ", name, " has fewer tokens than patches");
  check_sequence(*t, name, p.B, t->size(1), p.C, p.dtype);
  char* data = const_cast<char*>(static_cast<const char*>(t->const_data_ptr()));
  return {data + (t->size(1) - p.n) * t->stride(1) * element_size(p.dtype), t->stride(0), t->stride(1)};
}

void channel_act(int64_t pass, Tensor x, std::optional<Tensor> dy, std::optional<Tensor> scale, std::optional<Tensor> shift,
                 std::optional<Tensor> gate, std::optional<Tensor> pool_grad, std::optional<Tensor> a, std::optional<Tensor> b,
                 std::optional<Tensor> residual, std::optional<Tensor> y, std::optional<Tensor> sums, int64_t act,
                 int64_t patches, int64_t) {
  ChannelActParams p{};
  STD_TORCH_CHECK(pass >= 0 && pass <= 4 && patches >= 0, "lifeops_native: unknown pass ", pass, " or patches ", patches);
  p.pass = ChannelPass(pass), p.dtype = dtype_of(x), p.n = patches;
  STD_TORCH_CHECK(x.dim() == 3, "lifeops_native: x must have three dimensions");
  p.B = x.size(0), p.C = x.size(2);
  const bool writes = p.pass == ChannelPass::act || p.pass == ChannelPass::grad;
  const bool reads_dy = p.pass == ChannelPass::sums || p.pass == ChannelPass::grad;
  STD_TORCH_CHECK(writes == y.has_value() && writes != sums.has_value() && reads_dy == dy.has_value() &&
                      (!residual || p.pass == ChannelPass::act),
                  "lifeops_native: wrong tensors for this pass");
  p.x = patch_rows(x, "x", p, x), p.dy = patch_rows(dy, "dy", p, x), p.y = patch_rows(y, "y", p, x);
  p.residual = patch_rows(residual, "residual", p, x);
  const int64_t lead = residual ? residual->size(1) - p.n : 0;
  STD_TORCH_CHECK(!y || y->size(1) == lead + p.n, "lifeops_native: y must have the residual's rows, or the patches'");
  const AffineAct f = checked_affine(scale, shift, act, int64_t(Act::gelu), p.C, p.dtype, x);
  p.act = f.act, p.scale = f.scale, p.shift = f.shift;
  p.gate = checked_values(gate, "gate", p.B * p.C, p.dtype, x), p.gate_stride = p.C;
  p.pool_grad = checked_values(pool_grad, "pool_grad", p.B * p.C, p.dtype, x), p.pool_grad_stride = p.C;
  p.a = checked_values(a, "a", p.C, p.dtype, x), p.b = checked_values(b, "b", p.C, p.dtype, x);
  const int64_t per_channel = p.pass == ChannelPass::stats ? 2 : channel_sums(p.pass) * p.B;
  void* out = checked_values(sums, "sums", per_channel * p.C, p.dtype, x);
  if (p.B * p.n * p.C == 0) return;
  const int device = x.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  auto plan = plan_channel_act(p, lead);
  TaskSumsArgs of_tasks{};
  std::optional<SumsBuffers> buffers;
  if (sums) {
    of_tasks = plan_task_sums(plan.args.parts, p.B, p.C, static_cast<int>(channel_sums(p.pass)));
    buffers.emplace(of_tasks, p.dtype, x);
    plan.args.partial = buffers->partial();
    buffers->give(of_tasks, out);
  }
  const cudaStream_t stream = current_stream(device);
  const cudaError_t error =
      by_dtype(p.dtype, [&](auto zero) { return launch_channel_act<decltype(zero)>(plan, of_tasks, stream); });
  check_launch("channel_act", error, device);
}

}  // namespace
}  // namespace cuda
}  // namespace lifeops

STABLE_TORCH_LIBRARY_IMPL(lifeops_native, CUDA, m) { m.impl("channel_act", TORCH_BOX(&lifeops::cuda::channel_act)); }

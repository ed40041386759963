// SPDX-License-Identifier: Apache-2.0
// CPU launcher of pooling over the patch tokens. No value depends on how the work is cut.
#include "token_pool.h"

#include "windows_launch.h"

namespace lifeops {
namespace {

thread_local Scratch row_scratch;  // one task's rows

#if defined(__x86_64__)
const TokenPoolKernels& pool_kernels(int64_t isa) { return of_isa(isa, token_pool_baseline, token_pool_avx2, token_pool_avx512); }
#else
const TokenPoolKernels& pool_kernels(int64_t) { return token_pool_baseline; }
#endif

void run_pool(const TokenPoolParams& p, const TokenPoolKernels& kernel) {
  const int64_t element = element_bytes(p.dtype), accumulated = element_bytes(accumulate_dtype(p.dtype));
  const int64_t under = (p.rows.K + p.rows.s) * p.columns.size * element + (p.backward ? most_outputs(p.rows) * p.columns.out * accumulated : 0);
  const VectorPlan plan(p.C, kernel.vector_bytes / accumulated, under);
  const int64_t rows = p.backward ? p.rows.size : p.rows.out, strips = strips_for_threads(rows, p.B * plan.chunks);
  const int64_t scratch = kernel.scratch(p, plan.each), task_bytes = max64(1, p.rows.size * p.columns.size * plan.each * kernel.vector_bytes / strips);
  for_each_task(p.B * strips * plan.chunks, max64(1, kGrainBytes / task_bytes), [&](int64_t i) {  // chunks innermost: neighbours share pages
    const int64_t v0 = i % plan.chunks * plan.each, part = i / plan.chunks, strip = part % strips;
    const TokenPoolTask task{part / strips, v0, min64(plan.vectors, v0 + plan.each), strip * rows / strips, (strip + 1) * rows / strips};
    kernel.run(p, task, row_scratch.get(scratch));
  });
}

// Forward x is the fine side and y the coarse one, backward the other way round; `pooled` is the fine side's.
void token_pool(const Tensor& x, const std::optional<Tensor>& pooled, const Tensor& y, bool max, int64_t Kh, int64_t Kw, int64_t H, int64_t W,
                int64_t out_h, int64_t out_w, int64_t sh, int64_t sw, int64_t ph, int64_t pw, int64_t x_prefix, int64_t y_prefix,
                int64_t prefix_mode, bool count_include_pad, bool backward, int64_t isa) {
  TokenPoolParams p{};
  p.rows = checked_axis(H, out_h, Kh, sh, ph), p.columns = checked_axis(W, out_w, Kw, sw, pw);
  p.dtype = dtype_of(x), p.B = x.size(0), p.C = x.size(2), p.max = max, p.count_include_pad = count_include_pad, p.backward = backward;
  check_sequence(x, "x", p.B, x_prefix + (backward ? out_h * out_w : H * W), p.C, p.dtype);
  check_sequence(y, "y", p.B, y_prefix + (backward ? H * W : out_h * out_w), p.C, p.dtype);
  STD_TORCH_CHECK(pooled.has_value() == (backward && max), "lifeops_native: the input is read in the backward pass of a max, and only there");
  const Prefix prefix = Prefix(prefix_mode);
  STD_TORCH_CHECK(prefix == Prefix::zero || y_prefix == 0 || x_prefix == y_prefix, "lifeops_native: prefix rows can only be copied where x has them");
  if (pooled) {
    const int64_t lead = pooled->size(1) - H * W;
    STD_TORCH_CHECK(lead >= 0, "lifeops_native: pooled has fewer tokens than the grid");
    check_sequence(*pooled, "pooled", p.B, lead + H * W, p.C, p.dtype);
    p.pooled = behind(*pooled, lead, p.dtype), p.pooled_stride_b = pooled->stride(0), p.pooled_stride_n = pooled->stride(1);
  }
  p.x = behind(x, x_prefix, p.dtype), p.y = const_cast<char*>(behind(y, y_prefix, p.dtype));
  p.x_stride_b = x.stride(0), p.x_stride_n = x.stride(1), p.y_stride_b = y.stride(0), p.y_stride_n = y.stride(1);
  if (y.numel() == 0) return;
  write_prefix(x, y, y_prefix, prefix);
  run_pool(p, pool_kernels(isa));
}

}  // namespace
}  // namespace lifeops

STABLE_TORCH_LIBRARY_IMPL(lifeops_native, CPU, m) { m.impl("token_pool", TORCH_BOX(&lifeops::token_pool)); }

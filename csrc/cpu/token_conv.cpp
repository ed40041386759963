// SPDX-License-Identifier: Apache-2.0
// CPU launcher of the strided convolution, its adjoint and its weight gradient: cuts the work into tasks, packs the filters, sums the partial
// gradients. What is summed together depends on the problem only, so results are the same at any thread count.
#include "token_conv.h"

#include "token_dwconv_pack.h"
#include "windows_launch.h"

namespace lifeops {
namespace {

thread_local Scratch row_scratch;     // one task's split rows
thread_local Scratch shared_scratch;  // the calling thread's packed filters or partial sums, read by all

#if defined(__x86_64__)
const TokenConvKernels& conv_kernels(int64_t isa) { return of_isa(isa, token_conv_baseline, token_conv_avx2, token_conv_avx512); }
#else
const TokenConvKernels& conv_kernels(int64_t) { return token_conv_baseline; }
#endif

// Filters as (vectors, m, taps, lanes).
template <class A> void pack_vector(const TokenConvParams& p, int64_t L, int64_t v, A* out) {
  const int64_t taps = p.rows.K * p.columns.K, first = vector_start(p.C, L, v), n = min64(L, p.C);
  for (int64_t j = 0; j < p.m; ++j, out += taps * L)
    for (int64_t l = 0; l < L; ++l) {
      const int64_t from = ((first + l) * p.m + j) * taps;
      if (l >= n) for (int64_t t = 0; t < taps; ++t) out[t * L + l] = 0;
      else if (p.weight_dtype == DType::f32) for (int64_t t = 0; t < taps; ++t) out[t * L + l] = A(static_cast<const float*>(p.weight)[from + t]);
      else for (int64_t t = 0; t < taps; ++t) out[t * L + l] = A(to_double(p.weight, p.weight_dtype, from + t));
    }
}
template <class A> void pack_bias(const TokenConvParams& p, int64_t L, int64_t vectors, A* out) {
  const int64_t planes = p.transpose ? 1 : p.m;
  for (int64_t v = 0; v < vectors; ++v)
    for (int64_t j = 0; j < planes; ++j)
      for (int64_t l = 0; l < L; ++l) *out++ = l < p.C ? A(to_double(p.bias, p.bias_dtype, (vector_start(p.C, L, v) + l) * planes + j)) : A(0);
}

template <class A> void run_conv(const TokenConvParams& p, const TokenConvKernels& kernel) {
  const int64_t element = element_bytes(p.dtype), taps = p.rows.K * p.columns.K;
  const int64_t under = p.transpose ? most_outputs(p.rows) * p.columns.out * p.m : (p.rows.K + p.rows.s) * p.columns.size;
  const VectorPlan plan(p.C, kernel.vector_bytes / int64_t(sizeof(A)), under * element);
  const int64_t L = plan.lanes, packed = plan.vectors * p.m * taps * L;
  A* weight = static_cast<A*>(shared_scratch.get((packed + plan.vectors * p.m * L) * int64_t(sizeof(A))));
  A* bias = p.bias ? weight + packed : nullptr;
  for_each_task(plan.vectors, max64(1, kGrainBytes / (p.m * taps * L * int64_t(sizeof(A)))),
                [&](int64_t v) { pack_vector(p, L, v, weight + v * p.m * taps * L); });
  if (bias) pack_bias(p, L, plan.vectors, bias);
  const int64_t rows = p.transpose ? p.rows.size : p.rows.out, strips = strips_for_threads(rows, p.B * plan.chunks);
  const int64_t scratch = kernel.scratch(p, plan.each);
  const int64_t task_bytes = max64(1, p.rows.size * p.columns.size * plan.each * L * element / strips);
  for_each_task(p.B * strips * plan.chunks, max64(1, kGrainBytes / task_bytes), [&](int64_t i) {  // chunks innermost: neighbours share pages
    const int64_t v0 = i % plan.chunks * plan.each, part = i / plan.chunks, strip = part % strips;
    const TokenConvTask task{part / strips, v0, min64(plan.vectors, v0 + plan.each), strip * rows / strips, (strip + 1) * rows / strips};
    kernel.run(p, weight, bias, task, row_scratch.get(scratch));
  });
}

Axis filter_axis(int64_t size, int64_t out, int64_t K, int64_t s, int64_t p) {
  STD_TORCH_CHECK(K <= kMaxKernel, "lifeops_native: the kernel's sides must be at most 15, got ", K);
  return checked_axis(size, out, K, s, p);
}

void token_conv(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& y, int64_t H, int64_t W, int64_t out_h,
                int64_t out_w, int64_t sh, int64_t sw, int64_t ph, int64_t pw, int64_t x_prefix, int64_t y_prefix, int64_t prefix_mode,
                bool transpose, int64_t isa) {
  TokenConvParams p{};
  STD_TORCH_CHECK(weight.dim() == 4, "lifeops_native: weight must have four dimensions");
  p.rows = filter_axis(H, out_h, weight.size(2), sh, ph), p.columns = filter_axis(W, out_w, weight.size(3), sw, pw);
  const Tensor &fine = transpose ? y : x, &coarse = transpose ? x : y;
  p.dtype = dtype_of(x), p.B = x.size(0), p.C = fine.size(2), p.m = p.C ? coarse.size(2) / p.C : 0, p.transpose = transpose;
  check_sequence(fine, "the fine sequence", p.B, (transpose ? y_prefix : x_prefix) + H * W, p.C, p.dtype);
  check_sequence(coarse, "the coarse sequence", p.B, (transpose ? x_prefix : y_prefix) + out_h * out_w, p.C * p.m, p.dtype);
  check_size(weight, "weight", p.C * p.m * p.rows.K * p.columns.K);
  const Prefix prefix = Prefix(prefix_mode);
  STD_TORCH_CHECK(prefix == Prefix::zero || y_prefix == 0 || (x_prefix == y_prefix && p.m == 1),
                  "lifeops_native: prefix rows can only be copied where x has them, to as many channels");
  p.x = behind(x, x_prefix, p.dtype), p.y = const_cast<char*>(behind(y, y_prefix, p.dtype));
  p.x_stride_b = x.stride(0), p.x_stride_n = x.stride(1), p.y_stride_b = y.stride(0), p.y_stride_n = y.stride(1);
  p.weight = weight.const_data_ptr(), p.weight_dtype = dtype_of(weight);
  if (bias) {
    check_size(*bias, "bias", y.size(2));
    p.bias = bias->const_data_ptr(), p.bias_dtype = dtype_of(*bias);
  }
  if (y.numel() == 0) return;
  write_prefix(x, y, y_prefix, prefix);
  if (p.dtype == DType::f64) run_conv<double>(p, conv_kernels(isa));
  else run_conv<float>(p, conv_kernels(isa));
}

constexpr int64_t kGroups = 8;  // of partial sums, from the problem alone; each is written, and read again, so there are few
constexpr int64_t kTasks = 16;  // wanted, for many cores

template <class A> void run_grad_weight(const TokenConvGradWeightParams& p, const TokenConvKernels& kernel) {
  const int64_t strips = max64(1, min64(ceil_div(kTasks, p.B), p.rows.out / 4)), units = p.B * strips;
  const int64_t per_group = ceil_div(units, min64(units, kGroups)), groups = ceil_div(units, per_group);
  VectorPlan plan(p.C, kernel.vector_bytes / int64_t(sizeof(A)), (p.rows.K + p.rows.s) * p.columns.size * element_bytes(p.dtype));
  const int64_t room = plan.each;  // how many rows are summed together depends on it, and so do the sums: not on the threads
  const int64_t share = ceil_div(plan.vectors, ceil_div(int64_t(torch::stable::get_num_threads()), groups));
  plan.each = min64(plan.each, share), plan.chunks = ceil_div(plan.vectors, plan.each);
  const int64_t L = plan.lanes, taps = p.rows.K * p.columns.K, size = (taps + 1) * L, vector_size = p.m * size;
  A* partials = static_cast<A*>(shared_scratch.get(groups * plan.vectors * vector_size * int64_t(sizeof(A))));
  const int64_t scratch = kernel.grad_weight_scratch(p, room);
  const int64_t task_bytes = max64(1, p.rows.size * p.columns.size * plan.each * L * int64_t(sizeof(A)) / strips * per_group);
  for_each_task(groups * plan.chunks, max64(1, kGrainBytes / task_bytes), [&](int64_t i) {
    const int64_t v0 = i % plan.chunks * plan.each, group = i / plan.chunks, first = group * per_group;
    const TokenConvGradWeightTask task{v0, min64(plan.vectors, v0 + plan.each), first, min64(first + per_group, units), strips, room,
                                       partials + (group * plan.vectors + v0) * vector_size};
    kernel.grad_weight(p, task, row_scratch.get(scratch));
  });
  for_each_task(plan.vectors, max64(1, kGrainBytes / (groups * vector_size * int64_t(sizeof(A)))), [&](int64_t v) {
    A* total = partials + v * vector_size;  // group by group, in order, into the first
    for (int64_t group = 1; group < groups; ++group)
      for (int64_t k = 0; k < vector_size; ++k) total[k] += total[group * plan.vectors * vector_size + k];
    const int64_t skip = vector_skip(p.C, L, v), count = vector_count(p.C, L, v);
    for (int64_t j = 0; j < p.m; ++j, total += size)
      for (int64_t l = skip; l < skip + count; ++l) {
        const int64_t channel = (vector_start(p.C, L, v) + l) * p.m + j;
        for (int64_t t = 0; t < taps; ++t) put(p.dw, p.weight_dtype, channel * taps + t, total[t * L + l]);
        if (p.db) put(p.db, p.bias_dtype, channel, total[taps * L + l]);
      }
  });
}

void token_conv_grad_weight(const Tensor& dy, const Tensor& x, const Tensor& dw, const std::optional<Tensor>& db, int64_t H, int64_t W,
                            int64_t out_h, int64_t out_w, int64_t sh, int64_t sw, int64_t ph, int64_t pw, int64_t dy_prefix, int64_t x_prefix,
                            int64_t isa) {
  TokenConvGradWeightParams p{};
  STD_TORCH_CHECK(dw.dim() == 4, "lifeops_native: dw must have four dimensions");
  p.rows = filter_axis(H, out_h, dw.size(2), sh, ph), p.columns = filter_axis(W, out_w, dw.size(3), sw, pw);
  p.dtype = dtype_of(dy), p.B = x.size(0), p.C = x.size(2), p.m = p.C ? dy.size(2) / p.C : 0;
  check_sequence(x, "x", p.B, x_prefix + H * W, p.C, p.dtype);
  check_sequence(dy, "dy", p.B, dy_prefix + out_h * out_w, p.C * p.m, p.dtype);
  check_size(dw, "dw", p.C * p.m * p.rows.K * p.columns.K);
  p.x = behind(x, x_prefix, p.dtype), p.dy = behind(dy, dy_prefix, p.dtype);
  p.x_stride_b = x.stride(0), p.x_stride_n = x.stride(1), p.dy_stride_b = dy.stride(0), p.dy_stride_n = dy.stride(1);
  p.dw = dw.mutable_data_ptr(), p.weight_dtype = dtype_of(dw);
  if (db) {
    check_size(*db, "db", dy.size(2));
    p.db = db->mutable_data_ptr(), p.bias_dtype = dtype_of(*db);
  }
  if (p.B * out_h * out_w * p.C * p.m == 0) return;
  if (p.dtype == DType::f64) run_grad_weight<double>(p, conv_kernels(isa));
  else run_grad_weight<float>(p, conv_kernels(isa));
}

}  // namespace
}  // namespace lifeops

STABLE_TORCH_LIBRARY_IMPL(lifeops_native, CPU, m) {
  m.impl("token_conv", TORCH_BOX(&lifeops::token_conv));
  m.impl("token_conv_grad_weight", TORCH_BOX(&lifeops::token_conv_grad_weight));
}

// SPDX-License-Identifier: Apache-2.0
// CPU launcher of the roll-out: queries cut into strips, their partial sums added in a fixed order.
#include "rollout_step.h"

#include "../tensor_args.h"
#include "isa.h"
#include "threads.h"

namespace lifeops {
namespace {

const RolloutKernels& kernels_of(int64_t isa) {
#if defined(__x86_64__)
  const Isa chosen = choose_isa(int(isa));
  if (chosen == Isa::avx512) return rollout_step_avx512;
  if (chosen == Isa::avx2) return rollout_step_avx2;
#endif
  return rollout_step_baseline;
}

thread_local Scratch keys_scratch;
thread_local Scratch partial_scratch;
thread_local Scratch task_scratch;

HeadView head_view(const Tensor& t, const char* name, const RolloutParams& p) {
  STD_TORCH_CHECK(t.dim() == 4 && t.size(0) == p.B && t.size(1) == p.h && t.size(2) == p.N && t.size(3) == p.d && dtype_of(t) == p.dtype,
                  "lifeops_native: q and k must have one shape (B, h, N, d) and dtype, got another ", name);
  return {t.const_data_ptr(), t.stride(0), t.stride(1), t.stride(2), t.stride(3)};
}

// How many pieces an image's queries are cut into: depends on its size only, so that neither threads nor the batch change a bit.
// Each piece has partial sums of its own, (R, N).
int64_t strips_of(const RolloutParams& p) {
  const int64_t wanted = p.N / 64, most = p.R < 128 ? 16 : 2048 / p.R > 2 ? 2048 / p.R : 2;
  return wanted < 1 ? 1 : wanted < most ? wanted : most;
}

// Images [b0, b0 + images).
template <class A> void run(const RolloutParams& p, const RolloutKernels& kernels, int64_t b0, int64_t images, A* out) {
  const int64_t row = kernels.row_size(p), strips = strips_of(p), image_keys = p.h * p.d * row, sums = p.R * row;
  A* keys = static_cast<A*>(keys_scratch.get(images * image_keys * int64_t(sizeof(A))));
  A* partial = static_cast<A*>(partial_scratch.get(images * strips * sums * int64_t(sizeof(A))));
  const int64_t pack_grain = kGrainBytes / (p.d * row * int64_t(sizeof(A))) + 1;
  for_each_task(images * p.h, pack_grain, [&](int64_t i) { kernels.pack_keys(p, b0 + i / p.h, i % p.h, keys + i * p.d * row); });
  const int64_t grain = kGrainBytes / (p.N * row * int64_t(sizeof(A)) / strips + 1) + 1, size = kernels.scratch_size(p);
  for_each_task(images * strips, grain, [&](int64_t i) {
    const int64_t b = i / strips, s = i % strips;
    kernels.run(p, RolloutTask{b0 + b, s * p.N / strips, (s + 1) * p.N / strips, keys + b * image_keys, partial + i * sums, task_scratch.get(size)});
  });
  for_each_task(images * p.R, kGrainBytes / (strips * row * int64_t(sizeof(A))) + 1, [&](int64_t i) {
    const A* from = partial + (i / p.R * strips * p.R + i % p.R) * row;
    A* to = out + (b0 * p.R + i) * p.N;
    for (int64_t n = 0; n < p.N; ++n) to[n] = from[n];
    for (int64_t s = 1; s < strips; ++s)
      for (int64_t n = 0; n < p.N; ++n) to[n] += from[s * sums + n];
  });
}

// A few images at a time, so that packed keys and partial sums stay small however large the batch.
template <class A> void run_all(const RolloutParams& p, const RolloutKernels& kernels, A* out) {
  const int64_t strips = strips_of(p), group = (31 + strips) / strips;
  for (int64_t b = 0; b < p.B; b += group) run(p, kernels, b, p.B - b < group ? p.B - b : group, out);
}

void rollout_step(const Tensor& r, const Tensor& q, const Tensor& k, double scale, int64_t fusion, double residual, int64_t dropped,
                  const Tensor& out, int64_t isa) {
  RolloutParams p{};
  STD_TORCH_CHECK(q.dim() == 4 && r.dim() == 3 && fusion >= 0 && fusion <= 2, "lifeops_native: rollout_step: wrong ranks or fusion");
  p.dtype = dtype_of(q), p.fusion = HeadFusion(fusion), p.scale = scale, p.residual = residual;
  p.B = q.size(0), p.h = q.size(1), p.N = q.size(2), p.d = q.size(3), p.R = r.size(1), p.dropped = dropped;
  p.q = head_view(q, "q", p), p.k = head_view(k, "k", p);
  const bool wide = p.dtype == DType::f64;
  check_sequence(r, "r", p.B, p.R, p.N, wide ? DType::f64 : DType::f32);
  check_size(out, "out", p.B * p.R * p.N);
  STD_TORCH_CHECK(dtype_of(out) == dtype_of(r) && dropped >= 0 && (dropped < p.N || p.N == 0), "lifeops_native: rollout_step: wrong out or dropped");
  if (p.B * p.R * p.N * p.h == 0) return;
  p.r = r.const_data_ptr(), p.r_stride_b = r.stride(0), p.r_stride_r = r.stride(1);
  if (wide) run_all(p, kernels_of(isa), static_cast<double*>(out.mutable_data_ptr()));
  else run_all(p, kernels_of(isa), static_cast<float*>(out.mutable_data_ptr()));
}

}  // namespace
}  // namespace lifeops

STABLE_TORCH_LIBRARY_IMPL(lifeops_native, CPU, m) { m.impl("rollout_step", TORCH_BOX(&lifeops::rollout_step)); }

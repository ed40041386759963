// SPDX-License-Identifier: Apache-2.0
// CPU launcher: cuts the work into tasks for torch's thread pool, packs the weights, sums the partial weight gradients.
// How the work is cut depends on the problem only, so results are the same at any thread count.
#include "token_dwconv.h"

#include <memory>
#include <vector>

#include "../tensor_args.h"
#include "isa.h"

namespace lifeops {
namespace {

constexpr int64_t kGrainBytes = 32768;      // less work than this is not worth a second thread

const TokenDWConvKernels& kernels(int64_t isa) {
#if defined(__x86_64__)
  const Isa chosen = choose_isa(int(isa));
  if (chosen == Isa::avx512) return token_dwconv_avx512;
  if (chosen == Isa::avx2) return token_dwconv_avx2;
#endif
  return token_dwconv_baseline;
}

// Cache-line aligned memory that a thread keeps between calls.
class Scratch {
 public:
  void* get(int64_t bytes) {
    if (bytes > int64_t(storage_.size()) - kAlign) storage_ = std::vector<char>(size_t(bytes + kAlign));
    const auto address = reinterpret_cast<uintptr_t>(storage_.data());
    return reinterpret_cast<void*>((address + kAlign - 1) / kAlign * kAlign);
  }

 private:
  static constexpr int64_t kAlign = 64;
  std::vector<char> storage_;
};
thread_local Scratch ring_scratch;    // one task's rows
thread_local Scratch shared_scratch;  // the calling thread's packed weights or partial sums, read by all

double to_double(const void* p, DType dtype, int64_t i) {
  switch (dtype) {
    case DType::f64: return static_cast<const double*>(p)[i];
    case DType::f32: return static_cast<const float*>(p)[i];
    case DType::f16: return float(static_cast<const torch::headeronly::Half*>(p)[i]);
    default: return float(static_cast<const torch::headeronly::BFloat16*>(p)[i]);
  }
}

template <class A> void put(void* p, DType dtype, int64_t i, A value) {
  switch (dtype) {
    case DType::f64: static_cast<double*>(p)[i] = double(value); break;
    case DType::f32: static_cast<float*>(p)[i] = float(value); break;
    case DType::f16: static_cast<torch::headeronly::Half*>(p)[i] = torch::headeronly::Half(float(value)); break;
    default: static_cast<torch::headeronly::BFloat16*>(p)[i] = torch::headeronly::BFloat16(float(value));
  }
}

// Weights of one channel block as (K*K, kBlock), zero-padded, mirrored for the input gradient.
template <class A> void pack_block(const TokenDWConvParams& p, int64_t block, A* out) {
  const int64_t taps = p.K * p.K, c0 = block * kBlock, n = min64(kBlock, p.C - c0);
  for (int64_t t = 0; t < taps; ++t)
    for (int64_t c = n; c < kBlock; ++c) out[t * kBlock + c] = 0;
  for (int64_t c = 0; c < n; ++c) {
    const int64_t first = (c0 + c) * taps;
    if (p.weight_dtype == DType::f32) {  // the common case, without a switch per element
      const float* w = static_cast<const float*>(p.weight) + first;
      for (int64_t t = 0; t < taps; ++t) out[t * kBlock + c] = A(w[p.flip ? taps - 1 - t : t]);
    } else {
      for (int64_t t = 0; t < taps; ++t)
        out[t * kBlock + c] = A(to_double(p.weight, p.weight_dtype, first + (p.flip ? taps - 1 - t : t)));
    }
  }
}

template <class A> const A* pack(const TokenDWConvParams& p, int64_t blocks, const A** bias) {
  const int64_t taps = p.K * p.K, weights = blocks * taps * kBlock;
  A* out = static_cast<A*>(shared_scratch.get((weights + blocks * kBlock) * int64_t(sizeof(A))));
  const int64_t grain = max64(1, kGrainBytes / (taps * kBlock * int64_t(sizeof(A))));
  torch::stable::parallel_for(0, blocks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) pack_block(p, block, out + block * taps * kBlock);
  });
  if (p.bias) {
    A* b = out + weights;
    for (int64_t c = 0; c < blocks * kBlock; ++c) b[c] = c < p.C ? A(to_double(p.bias, p.bias_dtype, c)) : A(0);
    *bias = b;
  }
  return out;
}

// Row strips: one per image unless that leaves too few tasks for many cores; a strip re-reads K - 1 rows.
int64_t row_strips(int64_t H, int64_t K, int64_t tasks) {
  return min64(ceil_div(16, tasks), max64(1, H / (2 * K)));
}

template <class A> void run_forward(const TokenDWConvParams& p, const TokenDWConvKernels& kernel) {
  const A* bias = nullptr;
  const A* weight = pack<A>(p, ceil_div(p.C, kBlock), &bias);
  const int64_t channels = kernel.forward_channels(p), chunks = ceil_div(p.C, channels), segments = ceil_div(p.W, kSegment);
  const int64_t strips = row_strips(p.H, p.K, p.B * chunks * segments);
  const int64_t task_bytes = max64(1, p.H * p.W * channels * int64_t(sizeof(A)) / (strips * segments));
  const int64_t scratch = kernel.forward_scratch(p);
  torch::stable::parallel_for(0, p.B * segments * strips * chunks, max64(1, kGrainBytes / task_bytes), [&](int64_t begin, int64_t end) {
    void* ring = ring_scratch.get(scratch);
    for (int64_t i = begin; i < end; ++i) {  // chunks innermost: neighbours share pages
      const int64_t c0 = i % chunks * channels, strip = i / chunks % strips, segment = i / (chunks * strips) % segments;
      const ForwardTask task{i / (chunks * strips * segments), c0, min64(p.C, c0 + channels), strip * p.H / strips,
                             (strip + 1) * p.H / strips, segment * p.W / segments, (segment + 1) * p.W / segments,
                             strip == 0 && segment == 0};
      kernel.forward(p, weight, bias, task, ring);
    }
  });
}

void token_dwconv(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const std::optional<Tensor>& residual,
                  const Tensor& y, int64_t H, int64_t W, int64_t x_prefix, int64_t y_prefix, int64_t prefix_mode, bool flip,
                  int64_t isa) {
  const TokenDWConvParams p = forward_params(x, weight, bias, residual, y, H, W, x_prefix, y_prefix, prefix_mode, flip);
  if (p.B * p.H * p.W * p.C == 0) return;
  if (p.dtype == DType::f64) run_forward<double>(p, kernels(isa));
  else run_forward<float>(p, kernels(isa));
}

// How the sum is cut: channels into chunks, units (see GradWeightTask) into groups; about 32 tasks, from the problem alone.
struct GradPlan {
  int64_t channels, chunks, blocks, strips, segments, units, units_per_group, groups;

  GradPlan(const TokenDWConvGradWeightParams& p, const TokenDWConvKernels& kernel)
      : channels(kernel.grad_weight_channels(p)), chunks(ceil_div(p.C, channels)), blocks(ceil_div(p.C, kBlock)) {
    segments = ceil_div(p.W, kSegment);
    strips = row_strips(p.H, p.K, p.B * chunks * segments);
    units = p.B * strips * segments;
    units_per_group = ceil_div(units, min64(units, ceil_div(32, chunks)));
    groups = ceil_div(units, units_per_group);
  }
};

template <class A> void reduce_block(const TokenDWConvGradWeightParams& p, const GradPlan& plan, int64_t block, A* partials) {
  const int64_t taps = p.K * p.K, size = (taps + 1) * kBlock, c0 = block * kBlock, n = min64(kBlock, p.C - c0);
  A* total = partials + block * size;  // group by group, in order, into the first
  for (int64_t group = 1; group < plan.groups; ++group)
    for (int64_t k = 0; k < size; ++k) total[k] += total[group * plan.blocks * size + k];
  for (int64_t c = 0; c < n; ++c) {
    const int64_t first = (c0 + c) * taps;
    if (p.dw && p.weight_dtype == DType::f32) {  // the common case, without a switch per element
      float* dw = static_cast<float*>(p.dw) + first;
      for (int64_t t = 0; t < taps; ++t) dw[t] = float(total[t * kBlock + c]);
    } else if (p.dw) {
      for (int64_t t = 0; t < taps; ++t) put(p.dw, p.weight_dtype, first + t, total[t * kBlock + c]);
    }
    if (p.db) put(p.db, p.bias_dtype, c0 + c, total[taps * kBlock + c]);
  }
}

template <class A> void run_grad_weight(const TokenDWConvGradWeightParams& p, const TokenDWConvKernels& kernel) {
  const GradPlan plan(p, kernel);
  const int64_t size = (p.K * p.K + 1) * kBlock, scratch = kernel.grad_weight_scratch(p);
  A* partials = static_cast<A*>(shared_scratch.get(plan.groups * plan.blocks * size * int64_t(sizeof(A))));
  const int64_t unit_bytes = max64(1, p.H * p.W * plan.channels * int64_t(sizeof(A)) / (plan.strips * plan.segments));
  const int64_t grain = max64(1, kGrainBytes / (unit_bytes * plan.units_per_group));
  torch::stable::parallel_for(0, plan.groups * plan.chunks, grain, [&](int64_t begin, int64_t end) {
    void* slab = ring_scratch.get(scratch);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t c0 = i % plan.chunks * plan.channels, group = i / plan.chunks, first = group * plan.units_per_group;
      const GradWeightTask task{c0, min64(p.C, c0 + plan.channels), first, min64(first + plan.units_per_group, plan.units),
                                plan.strips, plan.segments, partials + (group * plan.blocks + c0 / kBlock) * size};
      kernel.grad_weight(p, task, slab);
    }
  });
  torch::stable::parallel_for(0, plan.blocks, max64(1, kGrainBytes / (plan.groups * size * int64_t(sizeof(A)))), [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) reduce_block(p, plan, block, partials);
  });
}

void token_dwconv_grad_weight(const Tensor& dy, const std::optional<Tensor>& x, const std::optional<Tensor>& dw,
                              const std::optional<Tensor>& db, int64_t K, int64_t H, int64_t W, int64_t dy_prefix,
                              int64_t x_prefix, int64_t isa) {
  const TokenDWConvGradWeightParams p = grad_weight_params(dy, x, dw, db, K, H, W, dy_prefix, x_prefix);
  if (p.B * p.H * p.W * p.C == 0) return;
  if (p.dtype == DType::f64) run_grad_weight<double>(p, kernels(isa));
  else run_grad_weight<float>(p, kernels(isa));
}

}  // namespace
}  // namespace lifeops

STABLE_TORCH_LIBRARY_IMPL(lifeops_native, CPU, m) {
  m.impl("token_dwconv", TORCH_BOX(&lifeops::token_dwconv));
  m.impl("token_dwconv_grad_weight", TORCH_BOX(&lifeops::token_dwconv_grad_weight));
}

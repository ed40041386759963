// SPDX-License-Identifier: Apache-2.0
// Attention's kernels of one instruction set, by element type.
#pragma once
#include "local_attention_backward.h"
#include "local_attention_forward.h"

namespace lifeops {
namespace LIFEOPS_ISA {

inline void attention_forward(const AttentionParams& p, const AttentionTask& task, void* scratch) {
  switch (p.dtype) {
    case DType::f64: return attention_forward_of<double>(p, task, scratch);
    case DType::f32: return attention_forward_of<float>(p, task, scratch);
    case DType::f16: return attention_forward_of<f16>(p, task, scratch);
    default: return attention_forward_of<bf16>(p, task, scratch);
  }
}
inline int64_t attention_forward_scratch(const AttentionParams& p) {
  return p.dtype == DType::f64 ? ForwardPlan<double>(p).end * 8 : ForwardPlan<float>(p).end * 4;
}

inline void attention_backward(const AttentionGradParams& p, int64_t b, int64_t h, void* scratch) {
  switch (p.dtype) {
    case DType::f64: return attention_backward_of<double>(p, b, h, scratch);
    case DType::f32: return attention_backward_of<float>(p, b, h, scratch);
    case DType::f16: return attention_backward_of<f16>(p, b, h, scratch);
    default: return attention_backward_of<bf16>(p, b, h, scratch);
  }
}
inline int64_t attention_backward_scratch(const AttentionParams& p) {
  return p.dtype == DType::f64 ? BackwardPlan<double>(p).end * 8 : BackwardPlan<float>(p).end * 4;
}

constexpr AttentionKernels kAttention = {attention_forward, attention_forward_scratch, attention_backward, attention_backward_scratch, LIFEOPS_VEC_BYTES};

}  // namespace LIFEOPS_ISA
}  // namespace lifeops

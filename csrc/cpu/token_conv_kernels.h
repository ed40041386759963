// SPDX-License-Identifier: Apache-2.0
// The strided kernels of one instruction set by element type.
#pragma once
#include "token_conv_grad_weight.h"
#include "token_conv_run.h"

namespace lifeops {
namespace LIFEOPS_ISA {

inline void token_conv_run(const TokenConvParams& p, const void* weight, const void* bias, const TokenConvTask& task, void* scratch) {
  switch (p.dtype) {
    case DType::f64: return TokenConv<double>::run(p, weight, bias, task, scratch);
    case DType::f32: return TokenConv<float>::run(p, weight, bias, task, scratch);
    case DType::f16: return TokenConv<f16>::run(p, weight, bias, task, scratch);
    default: return TokenConv<bf16>::run(p, weight, bias, task, scratch);
  }
}
inline int64_t token_conv_scratch(const TokenConvParams& p, int64_t vectors) {
  return p.dtype == DType::f64 ? TokenConv<double>::scratch(p, vectors) : TokenConv<float>::scratch(p, vectors);
}
inline void token_conv_grad_weight(const TokenConvGradWeightParams& p, const TokenConvGradWeightTask& task, void* scratch) {
  switch (p.dtype) {
    case DType::f64: return TokenConvGradWeight<double>::run(p, task, scratch);
    case DType::f32: return TokenConvGradWeight<float>::run(p, task, scratch);
    case DType::f16: return TokenConvGradWeight<f16>::run(p, task, scratch);
    default: return TokenConvGradWeight<bf16>::run(p, task, scratch);
  }
}
// The scratch of the type itself: a half type's steps have more rows.
inline int64_t token_conv_grad_weight_scratch(const TokenConvGradWeightParams& p, int64_t vectors) {
  switch (p.dtype) {
    case DType::f64: return TokenConvGradWeight<double>::scratch(p, vectors);
    case DType::f32: return TokenConvGradWeight<float>::scratch(p, vectors);
    default: return TokenConvGradWeight<bf16>::scratch(p, vectors);
  }
}
constexpr TokenConvKernels kTokenConv = {token_conv_run, token_conv_scratch, token_conv_grad_weight, token_conv_grad_weight_scratch, LIFEOPS_VEC_BYTES};

}  // namespace LIFEOPS_ISA
}  // namespace lifeops

// SPDX-License-Identifier: Apache-2.0
// The kernels of one instruction set by element type.
#pragma once
#include "token_dwconv_backward.h"

namespace lifeops {
namespace LIFEOPS_ISA {

template <template <class> class Body, class Params, class... Args> auto dispatch(const Params& p, Args... args) {
  switch (p.dtype) {
    case DType::f64: return Body<double>::run(p, args...);
    case DType::f32: return Body<float>::run(p, args...);
    case DType::f16: return Body<f16>::run(p, args...);
    default: return Body<bf16>::run(p, args...);
  }
}

inline void forward(const TokenDWConvParams& p, const void* weight, const void* bias, const ForwardTask& task, void* scratch) {
  dispatch<Forward>(p, weight, bias, task, scratch);
}
inline int64_t forward_scratch(const TokenDWConvParams& p) {
  return p.dtype == DType::f64 ? Forward<double>::scratch(p) : Forward<float>::scratch(p);
}
inline int64_t forward_channels(const TokenDWConvParams& p) {
  return p.dtype == DType::f64 ? Forward<double>::channels(p) : Forward<float>::channels(p);
}
inline void grad_weight(const GradWeightParams& p, const GradWeightTask& task, void* scratch) {
  dispatch<GradWeight>(p, task, scratch);
}
inline int64_t grad_weight_scratch(const GradWeightParams& p) {
  return p.dtype == DType::f64 ? GradWeight<double>::scratch(p) : GradWeight<float>::scratch(p);
}
inline int64_t grad_weight_channels(const GradWeightParams& p) {
  return p.dtype == DType::f64 ? GradWeight<double>::channels(p) : GradWeight<float>::channels(p);
}

inline void backward(const BackwardParams& p, const BackwardTask& task, void* scratch) {
  switch (p.input.dtype) {
    case DType::f64: return Backward<double>::run(p, task, scratch);
    case DType::f32: return Backward<float>::run(p, task, scratch);
    case DType::f16: return Backward<f16>::run(p, task, scratch);
    default: return Backward<bf16>::run(p, task, scratch);
  }
}
inline int64_t backward_scratch(const BackwardParams& p) {
  return p.input.dtype == DType::f64 ? Backward<double>::scratch(p.input) : Backward<float>::scratch(p.input);
}
inline int64_t backward_channels(const BackwardParams& p) {
  return p.input.dtype == DType::f64 ? Backward<double>::channels(p.input) : Backward<float>::channels(p.input);
}

}  // namespace LIFEOPS_ISA
}  // namespace lifeops

// SPDX-License-Identifier: Apache-2.0
// From stable-ABI tensors to the plain parameters. The stable ABI checks no argument types and Python has checked the
// meaning; here only what memory safety needs is checked again.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>

#include "params.h"

namespace lifeops {

using torch::stable::Tensor;

inline DType dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case torch::headeronly::ScalarType::Double: return DType::f64;
    case torch::headeronly::ScalarType::Float: return DType::f32;
    case torch::headeronly::ScalarType::Half: return DType::f16;
    case torch::headeronly::ScalarType::BFloat16: return DType::bf16;
    default: STD_TORCH_CHECK(false, "lifeops_native: dtype must be float64, float32, float16 or bfloat16");
  }
}

inline void check_sequence(const Tensor& t, const char* name, int64_t B, int64_t N, int64_t C, DType dtype) {
  STD_TORCH_CHECK(t.dim() == 3 && t.size(0) == B && t.size(1) == N && t.size(2) == C, "lifeops_native: ", name,
                  " must have shape (", B, ", ", N, ", ", C, ")");
  STD_TORCH_CHECK(C == 1 || t.stride(2) == 1, "lifeops_native: the channels of ", name, " must have stride 1");
  STD_TORCH_CHECK(dtype_of(t) == dtype, "lifeops_native: ", name, " must have the dtype of the first sequence");
}

inline void check_size(const Tensor& t, const char* name, int64_t numel) {
  STD_TORCH_CHECK(t.numel() == numel && t.is_contiguous(), "lifeops_native: ", name, " must be contiguous with ", numel,
                  " elements, got ", t.numel());
}

// What sums and per-channel values are kept in.
inline DType accumulate_dtype(DType dtype) { return dtype == DType::f64 ? DType::f64 : DType::f32; }

inline void check_accumulated(const Tensor& t, const char* name, int64_t numel, DType dtype) {
  check_size(t, name, numel);
  STD_TORCH_CHECK(dtype_of(t) == accumulate_dtype(dtype), "lifeops_native: ", name, " must have the accumulation type");
}

inline int64_t element_bytes(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }

// A sequence's data behind its first `rows` tokens.
inline const char* behind(const Tensor& t, int64_t rows, DType dtype) {
  return static_cast<const char*>(t.const_data_ptr()) + rows * t.stride(1) * element_bytes(dtype);
}

inline void check_kernel(int64_t K) {
  STD_TORCH_CHECK(K % 2 == 1 && K >= 1 && K <= 15, "lifeops_native: K must be odd and at most 15, got ", K);
}

inline TokenDWConvParams forward_params(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                                        const std::optional<Tensor>& residual, const Tensor& y, int64_t H, int64_t W,
                                        int64_t x_prefix, int64_t y_prefix, int64_t prefix_mode, bool flip) {
  TokenDWConvParams p{};
  p.dtype = dtype_of(x);
  p.B = x.size(0), p.H = H, p.W = W, p.C = x.size(2);
  p.K = int32_t(weight.size(weight.dim() - 1));
  check_kernel(p.K);
  check_sequence(x, "x", p.B, x_prefix + H * W, p.C, p.dtype);
  check_sequence(y, "y", p.B, y_prefix + H * W, p.C, p.dtype);
  check_size(weight, "weight", p.C * p.K * p.K);
  const bool copies = prefix_mode == 0 && y_prefix > 0;
  STD_TORCH_CHECK(!copies || x_prefix == y_prefix, "lifeops_native: prefix rows can only be copied where x has them");
  p.x_prefix = int32_t(x_prefix), p.y_prefix = int32_t(y_prefix), p.prefix = Prefix(prefix_mode), p.flip = flip;
  p.x = x.const_data_ptr(), p.weight = weight.const_data_ptr(), p.y = y.mutable_data_ptr();
  p.weight_dtype = dtype_of(weight);
  p.x_stride_b = x.stride(0), p.x_stride_n = x.stride(1), p.y_stride_b = y.stride(0), p.y_stride_n = y.stride(1);
  if (bias) {
    check_size(*bias, "bias", p.C);
    p.bias = bias->const_data_ptr(), p.bias_dtype = dtype_of(*bias);
  }
  if (residual) {
    check_sequence(*residual, "residual", p.B, y_prefix + H * W, p.C, p.dtype);
    p.residual = residual->const_data_ptr(), p.r_stride_b = residual->stride(0), p.r_stride_n = residual->stride(1);
  }
  return p;
}

inline TokenDWConvGradWeightParams grad_weight_params(const Tensor& dy, const std::optional<Tensor>& x,
                                                      const std::optional<Tensor>& dw, const std::optional<Tensor>& db,
                                                      int64_t K, int64_t H, int64_t W, int64_t dy_prefix, int64_t x_prefix) {
  TokenDWConvGradWeightParams p{};
  p.dtype = dtype_of(dy);
  p.B = dy.size(0), p.H = H, p.W = W, p.C = dy.size(2), p.K = int32_t(dw ? K : 1);
  check_kernel(p.K);
  check_sequence(dy, "dy", p.B, dy_prefix + H * W, p.C, p.dtype);
  p.dy = dy.const_data_ptr(), p.dy_stride_b = dy.stride(0), p.dy_stride_n = dy.stride(1);
  p.x_prefix = int32_t(x_prefix), p.dy_prefix = int32_t(dy_prefix);
  STD_TORCH_CHECK(x.has_value() == dw.has_value(), "lifeops_native: dw needs x and x is read for dw only");
  if (dw) {
    check_sequence(*x, "x", p.B, x_prefix + H * W, p.C, p.dtype);
    check_size(*dw, "dw", p.C * K * K);
    p.x = x->const_data_ptr(), p.x_stride_b = x->stride(0), p.x_stride_n = x->stride(1);
    p.dw = dw->mutable_data_ptr(), p.weight_dtype = dtype_of(*dw);
  }
  if (db) {
    check_size(*db, "db", p.C);
    p.db = db->mutable_data_ptr(), p.bias_dtype = dtype_of(*db);
  }
  return p;
}

}  // namespace lifeops

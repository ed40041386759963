// SPDX-License-Identifier: Apache-2.0
// The general token convolution on CUDA tensors: libtorch's stable ABI on one side, the torch-free kernels on the other.
#include "launcher.h"
#include "token_conv_launch.h"

namespace lifeops {
namespace cuda {
namespace {

// What the kernels' arithmetic needs: they skip what lies outside the grids, whatever the sizes are.
TokenConvShape checked_shape(const Tensor& weight, int64_t H, int64_t W, int64_t rows, int64_t columns, int64_t sh, int64_t sw, int64_t ph,
                             int64_t pw) {
  STD_TORCH_CHECK(weight.dim() == 4, "lifeops_native: the filter must have four dimensions");
  const int64_t Kh = weight.size(2), Kw = weight.size(3);
  STD_TORCH_CHECK(Kh >= 1 && Kw >= 1 && Kh <= 15 && Kw <= 15, "lifeops_native: the kernel's sides must be 1 to 15, got ", Kh, " x ", Kw);
  constexpr int64_t most = 1ll << 29;  // sums of them stay in 32 bits
  for (int64_t n : {H, W, rows, columns, sh, sw, ph, pw})
    STD_TORCH_CHECK(n >= 0 && n < most, "lifeops_native: a grid, stride or padding is out of range: ", n);
  STD_TORCH_CHECK(sh >= 1 && sw >= 1 && rows * sh < (1ll << 31) && columns * sw < (1ll << 31), "lifeops_native: strides out of range");
  return {H, W, rows, columns, int32_t(Kh), int32_t(Kw), int32_t(sh), int32_t(sw), int32_t(ph), int32_t(pw)};
}

void token_conv(Tensor x, Tensor weight, std::optional<Tensor> bias, Tensor y, int64_t H, int64_t W, int64_t out_h, int64_t out_w, int64_t sh,
                int64_t sw, int64_t ph, int64_t pw, int64_t x_prefix, int64_t y_prefix, int64_t prefix_mode, bool transpose, int64_t) {
  check_device("x", x, x);
  check_device("weight", weight, x);
  check_device("bias", bias, x);
  check_device("y", y, x);
  TokenConvParams p{};
  p.shape = checked_shape(weight, H, W, out_h, out_w, sh, sw, ph, pw);
  const Tensor &fine = transpose ? y : x, &coarse = transpose ? x : y;
  p.dtype = dtype_of(x), p.B = x.size(0), p.C = fine.size(2), p.m = p.C ? coarse.size(2) / p.C : 0, p.transpose = transpose;
  check_sequence(fine, "the fine sequence", p.B, (transpose ? y_prefix : x_prefix) + H * W, p.C, p.dtype);
  check_sequence(coarse, "the coarse sequence", p.B, (transpose ? x_prefix : y_prefix) + out_h * out_w, p.C * p.m, p.dtype);
  check_size(weight, "weight", p.C * p.m * p.shape.Kh * p.shape.Kw);
  p.x_prefix = int32_t(x_prefix), p.y_prefix = int32_t(y_prefix), p.prefix = Prefix(prefix_mode);
  STD_TORCH_CHECK(p.prefix == Prefix::zero || y_prefix == 0 || (x_prefix == y_prefix && p.m == 1),
                  "lifeops_native: prefix rows can only be copied where x has them, to as many channels");
  p.x = x.const_data_ptr(), p.y = y.mutable_data_ptr(), p.weight = weight.const_data_ptr(), p.weight_dtype = dtype_of(weight);
  p.x_stride_b = x.stride(0), p.x_stride_n = x.stride(1), p.y_stride_b = y.stride(0), p.y_stride_n = y.stride(1);
  if (bias) {
    check_size(*bias, "bias", y.size(2));
    p.bias = bias->const_data_ptr(), p.bias_dtype = dtype_of(*bias);
  }
  if (p.B * p.C * p.m == 0 || H * W == 0 || out_h * out_w == 0) return;
  const int device = x.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const auto plan = plan_token_conv(p, attribute(cudaDevAttrMultiProcessorCount, device));
  const cudaStream_t stream = current_stream(device);
  const cudaError_t error = by_dtype(p.dtype, [&](auto zero) { return launch_token_conv<decltype(zero)>(plan, stream); });
  check_launch("token_conv", error, device);
}

void token_conv_grad_weight(Tensor dy, Tensor x, Tensor dw, std::optional<Tensor> db, int64_t H, int64_t W, int64_t out_h, int64_t out_w,
                            int64_t sh, int64_t sw, int64_t ph, int64_t pw, int64_t dy_prefix, int64_t x_prefix, int64_t) {
  check_device("dy", dy, dy);
  check_device("x", x, dy);
  check_device("dw", dw, dy);
  check_device("db", db, dy);
  TokenConvGradWeightParams p{};
  p.shape = checked_shape(dw, H, W, out_h, out_w, sh, sw, ph, pw);
  p.dtype = dtype_of(dy), p.B = x.size(0), p.C = x.size(2), p.m = p.C ? dy.size(2) / p.C : 0;
  check_sequence(x, "x", p.B, x_prefix + H * W, p.C, p.dtype);
  check_sequence(dy, "dy", p.B, dy_prefix + out_h * out_w, p.C * p.m, p.dtype);
  check_size(dw, "dw", p.C * p.m * p.shape.Kh * p.shape.Kw);
  p.dy = dy.const_data_ptr(), p.x = x.const_data_ptr(), p.dw = dw.mutable_data_ptr(), p.weight_dtype = dtype_of(dw);
  p.x_stride_b = x.stride(0), p.x_stride_n = x.stride(1), p.dy_stride_b = dy.stride(0), p.dy_stride_n = dy.stride(1);
  p.x_prefix = int32_t(x_prefix), p.dy_prefix = int32_t(dy_prefix);
  if (db) {
    check_size(*db, "db", dy.size(2));
    p.db = db->mutable_data_ptr(), p.bias_dtype = dtype_of(*db);
  }
  STD_TORCH_CHECK(p.B * p.C * p.m > 0 && H * W > 0 && out_h * out_w > 0, "lifeops_native: token_conv_grad_weight of nothing");
  const int device = dy.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  auto plan = plan_token_conv_grad_weight(p);
  TokenDWConvGradWeightArgs& sums = plan.args.sums;
  const Tensor partial = torch::stable::new_empty(dy, {sums.chunks, sums.taps, sums.p.C}, accumulator_type(p.dtype));
  sums.partial = partial.mutable_data_ptr();
  const cudaStream_t stream = current_stream(device);
  const cudaError_t error = by_dtype(p.dtype, [&](auto zero) { return launch_token_conv_grad_weight<decltype(zero)>(plan, stream); });
  check_launch("token_conv_grad_weight", error, device);
}

}  // namespace
}  // namespace cuda
}  // namespace lifeops

STABLE_TORCH_LIBRARY_IMPL(lifeops_native, CUDA, m) {
  m.impl("token_conv", TORCH_BOX(&lifeops::cuda::token_conv));
  m.impl("token_conv_grad_weight", TORCH_BOX(&lifeops::cuda::token_conv_grad_weight));
}

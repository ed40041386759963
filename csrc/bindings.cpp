// SPDX-License-Identifier: Apache-2.0
// Schemas of the native operators. Python keeps its own copy and compares the two when it loads this library (native.py).
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(lifeops_native, m) {
  m.def(
      "token_dwconv(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, Tensor(a!) y, int H, int W, int x_prefix, "
      "int y_prefix, int prefix_mode, bool flip, int isa) -> ()");
  m.def(
      "token_dwconv_grad_weight(Tensor dy, Tensor? x, Tensor(a!)? dw, Tensor(b!)? db, int K, int H, int W, int dy_prefix, "
      "int x_prefix, int isa) -> ()");
  m.def(
      "token_dwconv_act(Tensor x, Tensor weight, Tensor? bias, Tensor? scale, Tensor? shift, int act, Tensor? out_scale, "
      "Tensor? out_shift, int out_act, Tensor? residual, Tensor(a!) y, Tensor(b!)? pool, Tensor(c!)? stats, int H, int W, int x_prefix, "
      "int y_prefix, int prefix_mode, int isa) -> ()");
  m.def(
      "token_dwconv_act_grad_input(Tensor dy, Tensor x, Tensor weight, Tensor? scale, Tensor? shift, int act, Tensor? a, "
      "Tensor? b, Tensor(a!) dx, Tensor(b!) sums, int H, int W, int dy_prefix, int x_prefix, int prefix_mode, int isa) -> ()");
  m.def(
      "token_dwconv_act_grad_weight(Tensor dy, Tensor x, Tensor? scale, Tensor? shift, int act, Tensor(a!) dw, Tensor(b!)? db, int K, "
      "int H, int W, int dy_prefix, int x_prefix, int isa) -> ()");
  m.def(
      "token_dwconv_act_backward(Tensor dy, Tensor x, Tensor weight, Tensor? bias, int act, Tensor(a!) dx, Tensor(b!) dw, Tensor(c!)? db, "
      "int H, int W, int dy_prefix, int x_prefix, int prefix_mode, int isa) -> ()");
  m.def(
      "channel_act(int channel_pass, Tensor x, Tensor? dy, Tensor? scale, Tensor? shift, Tensor? gate, Tensor? pool_grad, Tensor? a, "
      "Tensor? b, Tensor? residual, Tensor(a!)? y, Tensor(b!)? sums, int act, int patches, int isa) -> ()");
  m.def(
      "dw_shortcut(Tensor x, Tensor block_output, Tensor weight, Tensor? bias, Tensor? gamma, Tensor? beta, float eps, Tensor(a!) y, "
      "Tensor(b!) mean, Tensor(c!) var, Tensor(d!) affine, int H, int W, int P, int isa) -> ()");
  m.def(
      "dw_shortcut_bwd(Tensor dy, Tensor x, Tensor weight, Tensor mean, Tensor affine, Tensor(a!)? dx, Tensor(b!) dw, "
      "Tensor(c!) dbias, Tensor(d!) dgamma, Tensor(e!) dbeta, int H, int W, int P, int isa) -> ()");
  m.def(
      "dw_shortcut_eval(Tensor x, Tensor block_output, Tensor weight, Tensor? bias, Tensor? mean, Tensor? var, Tensor? gamma, "
      "Tensor? beta, float eps, Tensor(a!) y, int H, int W, int P, int isa) -> ()");
  m.def(
      "rollout_step(Tensor r, Tensor q, Tensor k, float scale, int fusion, float residual, int dropped, Tensor(a!) out, int isa) -> ()");
  m.def(
      "token_conv(Tensor x, Tensor weight, Tensor? bias, Tensor(a!) y, int H, int W, int out_h, int out_w, int sh, int sw, int ph, int pw, "
      "int x_prefix, int y_prefix, int prefix_mode, bool transpose, int isa) -> ()");
  m.def(
      "token_conv_grad_weight(Tensor dy, Tensor x, Tensor(a!) dw, Tensor(b!)? db, int H, int W, int out_h, int out_w, int sh, int sw, int ph, "
      "int pw, int dy_prefix, int x_prefix, int isa) -> ()");
  m.def(
      "token_pool(Tensor x, Tensor? pooled, Tensor(a!) y, bool max, int Kh, int Kw, int H, int W, int out_h, int out_w, int sh, int sw, "
      "int ph, int pw, int x_prefix, int y_prefix, int prefix_mode, bool count_include_pad, bool backward, int isa) -> ()");
  m.def(
      "local_attention(Tensor q, Tensor k, Tensor v, Tensor? weight, Tensor? bias, Tensor? mask, Tensor? key_mask, Tensor(a!) y, "
      "Tensor(b!)? attn, Tensor(c!)? lse, int H, int W, int P, float scale, int isa) -> ()");
  m.def(
      "local_attention_bwd(Tensor dy, Tensor q, Tensor k, Tensor v, Tensor? weight, Tensor attn, Tensor lse, Tensor? mask, Tensor? key_mask, "
      "Tensor(a!) dq, Tensor(b!) dk, Tensor(c!) dv, Tensor(d!)? ds, int H, int W, int P, float scale, int isa) -> ()");
}

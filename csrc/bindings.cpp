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
}

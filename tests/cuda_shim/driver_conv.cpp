// SPDX-License-Identifier: Apache-2.0
// A few tiny problems through the kernels of the general token convolution, for the sanitizers. Buffers are as long as they must be.
#include "driver_tools.h"
#include "token_conv.cpp"

namespace {

// Forward, transpose and weight gradient of one problem with one prefix row; K and s of both axes, coarse sides given.
bool run(int64_t B, int64_t C, int64_t m, const TokenConvShape& s) {
  const int64_t fine = s.H * s.W, coarse = s.rows * s.columns, P = m == 1, taps = s.Kh * s.Kw;
  const int64_t xb = (P + fine) * C, yb = (P + coarse) * C * m;
  const auto x = filled<bf16>(B * xb), weight = filled<bf16>(C * m * taps), bias = filled<bf16>(C * m);
  std::vector<bf16> y(B * yb, static_cast<bf16>(NAN)), dx(B * xb, static_cast<bf16>(NAN));
  std::vector<bf16> dw(weight.size(), static_cast<bf16>(NAN)), db(C * m, static_cast<bf16>(NAN));
  TokenConvParams p{x.data(), weight.data(), bias.data(), y.data(), B, C, m, s, xb, C, yb, C * m, int32_t(P), int32_t(P), Prefix::copy,
                    false, false, DType::bf16, DType::bf16, DType::bf16};
  const int forward = shim_token_conv(&p, 1);
  p.x = y.data(), p.y = dx.data(), p.bias = nullptr, p.transpose = true;
  p.x_stride_b = yb, p.x_stride_n = C * m, p.y_stride_b = xb, p.y_stride_n = C;
  const int transposed = shim_token_conv(&p, 1);
  const TokenConvGradWeightParams g{y.data(), x.data(), dw.data(), db.data(), B, C, m, s, xb, C, yb, C * m, int32_t(P), int32_t(P),
                                    DType::bf16, DType::bf16, DType::bf16};
  const int gradient = shim_token_conv_grad_weight(&g);
  std::printf("%dx%d C %d m %d K %d stride %d: tiles of K %d %d %d\n", int(s.H), int(s.W), int(C), int(m), s.Kh, s.sh, forward,
              transposed, gradient);
  return finite(y) && finite(dx) && finite(dw) && finite(db);
}

}  // namespace

int main() {
  bool good = run(2, 132, 1, {9, 11, 5, 6, 3, 3, 2, 2, 1, 1});
  good &= run(1, 8, 1, {9, 18, 3, 5, 3, 3, 4, 4, 1, 1});
  good &= run(1, 6, 1, {5, 9, 5, 9, 3, 3, 1, 1, 1, 1});
  good &= run(1, 3, 2, {5, 18, 3, 9, 3, 3, 2, 2, 1, 1});
  good &= run(1, 4, 1, {5, 18, 2, 9, 2, 2, 2, 2, 0, 0});
  good &= run(1, 2, 1, {9, 8, 2, 2, 4, 4, 4, 4, 0, 0});
  good &= run(1, 3, 3, {3, 4, 2, 2, 2, 3, 1, 2, 0, 1});
  std::puts(good ? "ok" : "not finite");
  return good ? 0 : 1;
}

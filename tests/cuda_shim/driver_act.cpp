// SPDX-License-Identifier: Apache-2.0
// driver.cpp for the kernels with a prologue and the channel passes.
#include "channel_act.cpp"
#include "driver_tools.h"
#include "token_dwconv_act.cpp"

namespace {

// Forward, gradients and sums of a problem with a prologue of activation `act`.
template <typename T> bool run_act(const Problem& s, DType dtype, Act act) {
  const int64_t N = s.prefix_rows + s.H * s.W, n = s.B * N * s.C, sb = N * s.C, sn = s.C;
  const auto x = filled<T>(n), dy = filled<T>(n), weight = filled<T>(s.C * s.K * s.K), bias = filled<T>(s.C);
  const auto scale = filled<float>(s.C), shift = filled<float>(s.C);
  std::vector<T> y(n, static_cast<T>(NAN)), dx(n, static_cast<T>(NAN)), dw(weight.size(), static_cast<T>(NAN));
  std::vector<float> pool(s.B * s.C, NAN), stats(2 * s.C, NAN), sums(2 * s.C, NAN);
  const AffineAct prologue{scale.data(), shift.data(), act}, epilogue{scale.data(), nullptr, Act::hardswish};
  TokenDWConvParams p{x.data(), weight.data(), bias.data(), dy.data(), y.data(), s.B, s.H, s.W, s.C, sb, sn, sb, sn, sb, sn,
                      s.K, s.prefix_rows, s.prefix_rows, Prefix::copy, false, dtype, dtype, dtype};
  const int vec = shim_token_dwconv_act(&p, &prologue, &epilogue, pool.data(), stats.data(), 1);
  p.x = dy.data(), p.bias = nullptr, p.residual = x.data(), p.y = dx.data(), p.flip = true, p.prefix = Prefix::zero;
  shim_token_dwconv_act_grad_input(&p, &prologue, scale.data(), shift.data(), sums.data(), 1);
  const TokenDWConvGradWeightParams g{dy.data(), x.data(), dw.data(), nullptr, s.B, s.H, s.W, s.C, sb, sn, sb, sn,
                                      s.K, s.prefix_rows, s.prefix_rows, dtype, dtype, dtype};
  shim_token_dwconv_act_grad_weight(&g, &prologue);
  std::printf("act %d vec %d\n", int(act), vec);
  return finite(y) && finite(dx) && finite(dw) && finite(pool) && finite(stats) && finite(sums);
}

// All channel passes over n tokens, the residual one longer.
template <typename T> bool run_channels(int64_t B, int64_t n, int64_t C, DType dtype) {
  bool good = true;
  const auto x = filled<T>(B * n * C), residual = filled<T>(B * (n + 1) * C);
  const auto values = filled<float>(B * C);
  for (int pass = 0; pass < 5; ++pass) {
    std::vector<T> y(B * (n + 1) * C, static_cast<T>(0));
    std::vector<float> out(5 * B * C, 0);
    ChannelActParams p{};
    auto at = [&](const T* t, int64_t rows) { return Rows{const_cast<T*>(t) + (rows - n) * C, rows * C, C}; };
    p.pass = ChannelPass(pass), p.x = at(x.data(), n), p.dy = at(x.data(), n), p.y = at(y.data(), n + (pass == 1));
    if (p.pass == ChannelPass::act) p.residual = at(residual.data(), n + 1);
    p.B = B, p.n = n, p.C = C, p.dtype = dtype, p.act = Act::gelu, p.scale = p.shift = p.a = p.b = values.data();
    p.gate = p.pool_grad = values.data(), p.gate_stride = p.pool_grad_stride = C;
    shim_channel_act(&p, pass == 1, channel_sums(p.pass) ? out.data() : nullptr);
    good &= finite(y) && finite(out);
  }
  return good;
}

}  // namespace

int main() {
  bool good = true;
  for (const Problem& s : {Problem{2, 5, 7, 6, 3, 1}, Problem{1, 6, 17, 34, 3, 2}, Problem{1, 5, 8, 3, 3, 0},
                           Problem{1, 2, 3, 2, 5, 1}}) {
    good &= run_act<bf16>(s, DType::bf16, Act::gelu_first);
  }
  good &= run_act<bf16>({2, 30, 14, 6, 3, 1}, DType::bf16, Act::hardswish);  // several strips
  good &= run_act<bf16>({1, 9, 16, 6, 5, 1}, DType::bf16, Act::relu6);       // the filter in shared memory
  good &= run_act<bf16>({1, 4, 9, 3, 7, 1}, DType::bf16, Act::none);         // no tile fits
  good &= run_channels<bf16>(2, 70, 8, DType::bf16) && run_channels<bf16>(1, 3, 5, DType::bf16);
  std::puts(good ? "ok" : "not finite");
  return good ? 0 : 1;
}

// SPDX-License-Identifier: Apache-2.0
// A few tiny problems through every tile kernel shape, for the sanitizers. Buffers are exactly as long as they must be.
#include "driver_tools.h"
#include "token_dwconv.cpp"

namespace {

template <typename T> bool run(const Problem& s, DType dtype) {
  const int64_t N = s.prefix_rows + s.H * s.W, n = s.B * N * s.C;
  const auto x = filled<T>(n), weight = filled<T>(s.C * s.K * s.K), bias = filled<T>(s.C), residual = filled<T>(n);
  std::vector<T> y(n, static_cast<T>(NAN)), dw(weight.size(), static_cast<T>(NAN)), db(s.C, static_cast<T>(NAN));
  const int64_t sb = N * s.C, sn = s.C;
  const TokenDWConvParams p{x.data(), weight.data(), bias.data(), residual.data(), y.data(), s.B, s.H, s.W, s.C,
                            sb, sn, sb, sn, sb, sn, s.K, s.prefix_rows, s.prefix_rows, Prefix::copy, true,
                            dtype, dtype, dtype};
  const int vec = shim_token_dwconv(&p, 1);
  const TokenDWConvGradWeightParams g{x.data(), y.data(), dw.data(), db.data(), s.B, s.H, s.W, s.C, sb, sn, sb, sn,
                                      s.K, s.prefix_rows, s.prefix_rows, dtype, dtype, dtype};
  shim_token_dwconv_grad_weight(&g);
  std::printf("%dx%d C %d K %d vec %d\n", int(s.H), int(s.W), int(s.C), s.K, vec);
  return finite(y) && finite(dw) && finite(db);
}

}  // namespace

int main() {
  bool good = true;
  for (const Problem& s : {Problem{2, 5, 7, 6, 3, 1}, Problem{1, 6, 17, 34, 3, 2}, Problem{1, 5, 8, 3, 3, 0},
                           Problem{1, 2, 3, 2, 5, 1}}) {
    good &= run<bf16>(s, DType::bf16);
  }
  std::puts(good ? "ok" : "not finite");
  return good ? 0 : 1;
}

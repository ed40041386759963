// SPDX-License-Identifier: Apache-2.0
// What lies between the passes of the DW shortcut on the CPU, and its backward's first stage, behind a C interface for ctypes.
#include "cuda_shim.h"

#include "../../csrc/cuda/channel_act.cuh"
#include "../../csrc/cuda/dw_shortcut.cuh"
#include "../../csrc/cuda/token_dwconv_act.cuh"
#include "shim_tools.h"

using namespace lifeops;
using namespace lifeops::cuda;

namespace lifeops {
namespace cuda {
template <> constexpr bool kSecondStage<ShortcutNormArgs> = true;
}  // namespace cuda
}  // namespace lifeops

namespace {

// Parameters of one type, outputs in the accumulator's.
struct ShimNorm {
  const void *running_mean, *running_var, *gamma, *beta;
  void *mean, *var, *affine;
  double eps, n;
  int64_t C;
  DType parameters;
};
struct ShimGrad {
  const void *weight, *mean, *affine, *x;  // x: the whole sequence
  void *dx, *dbias, *dgamma, *dbeta;
  int32_t multiprocessors;
};

// Counts what it launches.
struct CountingLauncher {
  int* count;

  template <typename Args> void operator()(void (*kernel)(Args), LaunchShape shape, const Args& args) const {
    ++*count;
    Launcher{}(kernel, shape, args);
  }
};

}  // namespace

extern "C" {

// With the pass of `s`, statistics of GELU(x); without, the values in `norm`. -> launches.
int shim_dw_shortcut_norm(const ChannelActParams* s, const ShimNorm* norm, DType dtype) {
  int count = 0;
  by_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    const CountingLauncher launch{&count};
    const auto values = [&](const void* p) { return ChannelValues{p, norm->parameters}; };
    ShortcutNormArgs a{{}, values(norm->running_mean), values(norm->running_var), values(norm->gamma), values(norm->beta),
                       norm->eps, norm->C, norm->n, norm->mean, norm->var, norm->affine};
    if (!s) return run_shortcut_norm<T>(a, launch);
    auto plan = plan_channel_act(*s, 0);
    a.stats = plan_task_sums(plan.args.parts, s->B, s->C, kForwardSums);
    Buffers<acc_t<T>> buffers(a.stats, true);
    plan.args.partial = buffers.partial.data();
    buffers.give(a.stats, nullptr);
    run_channel_act<T>(plan, a.stats, launch);
    run_shortcut_norm<T>(a, launch);
  });
  return count;
}

// -> launches; without dx one fewer.
int shim_dw_shortcut_grad(const TokenDWConvGradWeightParams* g, const ShimGrad* s) {
  int count = 0;
  by_dtype(g->dtype, [&](auto zero) {
    using T = decltype(zero);
    using Acc = acc_t<T>;
    auto plan = plan_token_dwconv_act_grad_weight(*g, {nullptr, nullptr, Act::gelu});
    TokenDWConvGradWeightArgs& conv = plan.args.conv;
    const int64_t C = g->C, taps = g->K * g->K;
    std::vector<Acc> partial(static_cast<size_t>(conv.chunks) * conv.taps * C, Acc(NAN)), total(g->H * g->W * C, Acc(NAN));
    std::vector<Acc> sums(2 * taps * C, Acc(NAN)), ab(2 * C, Acc(NAN));
    conv.partial = partial.data(), conv.p.dw = nullptr;
    ShortcutGradArgs a{};
    char* dy = static_cast<char*>(const_cast<void*>(g->dy)) + g->dy_prefix * g->dy_stride_n * element_size(g->dtype);
    a.dy = {dy, g->dy_stride_b, g->dy_stride_n}, a.B = g->B, a.H = g->H, a.W = g->W, a.C = C, a.K = g->K;
    a.weight = s->weight, a.weight_dtype = g->weight_dtype, a.mean = s->mean, a.affine = s->affine, a.dw = g->dw;
    a.dbias = s->dbias, a.dgamma = s->dgamma, a.dbeta = s->dbeta;
    a.partial = partial.data(), a.chunks = conv.chunks, a.total = total.data(), a.sums = sums.data(), a.ab = ab.data();
    const CountingLauncher launch{&count};
    run_token_dwconv_act_grad_weight<T>(plan, launch);
    run_shortcut_grad<T>(a, g->dtype, launch);
    if (!s->dx) return;
    const int64_t N = g->x_prefix + g->H * g->W;
    const TokenDWConvParams p{g->dy, s->weight, nullptr, s->x, s->dx, g->B, g->H, g->W, C, g->dy_stride_b, g->dy_stride_n, N * C, C,
                              g->x_stride_b, g->x_stride_n, g->K, g->dy_prefix, g->x_prefix, Prefix::zero, true, g->dtype, g->weight_dtype,
                              DType::f32};
    const Acc* affine = static_cast<const Acc*>(s->affine);
    const AffineAct prologue{affine, affine + C, Act::gelu_first};
    const auto of_dx = plan_token_dwconv_act_grad_input(p, prologue, ab.data(), ab.data() + C, s->multiprocessors);
    run_token_dwconv_act_grad_input<T>(of_dx, {}, launch);
  });
  return count;
}
}

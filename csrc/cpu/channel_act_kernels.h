// SPDX-License-Identifier: Apache-2.0
// The passes of channel_act.h for one task. Compiled once per instruction set (see vec.h).
//
// Tokens are read whole, in the order they lie in memory, four at a time: per-channel values and sums, which stay in L1, are then
// touched once for four vectors of tokens.
#pragma once
#include "activations.h"
#include "channel_act.h"

namespace lifeops {
namespace LIFEOPS_ISA {

template <class T, ChannelPass pass, Act act> struct ChannelBody {
  using A = typename AccOf<T>::type;
  using V = vec_t<A>;
  static constexpr int L = Vec<A>::kLanes;
  static constexpr int64_t kTokens = 4, kAhead = 2 * kTokens;  // summed together; asked for ahead

  static const A* values(const void* p) { return static_cast<const A*>(p); }
  static T* rows(const Rows& r, const ChannelTask& task, int64_t token) {
    return static_cast<T*>(r.data) + task.b * r.stride_b + token * r.stride_n;
  }

  // `count` tokens from `token` on, one vector of channels at c of which n are left.
  static inline __attribute__((always_inline)) void vector(const ChannelActParams& p, const ChannelTask& task, int64_t token, int64_t count,
                                                           int64_t c, int64_t n) {
    const V scale = load_n(values(p.scale) + c, n), shift = load_n(values(p.shift) + c, n);
    const T* x = rows(p.x, task, token) + c;
    for (int64_t t = 0; t < count; ++t) {  // the tokens' lines come interleaved, which the hardware does not foresee
      __builtin_prefetch(x + (t + kAhead) * p.x.stride_n);
      if (p.dy.data) __builtin_prefetch(rows(p.dy, task, token + t + kAhead) + c);
    }
    A* partial = static_cast<A*>(task.partial) + c;
    if constexpr (pass == ChannelPass::stats) {
      const V first = token == task.n0 ? activate<act, A>(load_n(x, n)) : load_n(partial, n);
      V sum = token == task.n0 ? V{} : load_n(partial + p.C, n), square = token == task.n0 ? V{} : load_n(partial + 2 * p.C, n);
      for (int64_t t = 0; t < count; ++t) {
        const V value = activate<act, A>(load_n(x + t * p.x.stride_n, n)) - first;
        sum += value, square += value * value;
      }
      store_n(partial, first, n), store_n(partial + p.C, sum, n), store_n(partial + 2 * p.C, square, n);
    } else if constexpr (pass == ChannelPass::act) {
      const V gate = load_n(values(p.gate) + task.b * p.gate_stride + c, n);
      T* y = rows(p.y, task, token) + c;
      const T* residual = p.residual.data ? rows(p.residual, task, token) + c : nullptr;
      for (int64_t t = 0; t < count; ++t) {
        V value = activate<act, A>(scale * load_n(x + t * p.x.stride_n, n) + shift) * gate;
        if (residual) value += load_n(residual + t * p.residual.stride_n, n);
        store_n(y + t * p.y.stride_n, value, n);
      }
    } else if constexpr (pass == ChannelPass::pool) {
      V sum = token == task.n0 ? V{} : load_n(partial, n);
      for (int64_t t = 0; t < count; ++t) sum += activate<act, A>(scale * load_n(x + t * p.x.stride_n, n) + shift);
      store_n(partial, sum, n);
    } else if constexpr (pass == ChannelPass::sums) {
      V sum[5];
      for (int k = 0; k < 5; ++k) sum[k] = token == task.n0 ? V{} : load_n(partial + k * p.C, n);
      const T* dy = rows(p.dy, task, token) + c;
      for (int64_t t = 0; t < count; ++t) {
        const V value = load_n(x + t * p.x.stride_n, n), g = load_n(dy + t * p.dy.stride_n, n), v = scale * value + shift;
        const V slope = derivative<act, A>(v);
        sum[0] += g * activate<act, A>(v), sum[1] += g * slope, sum[2] += g * slope * value;
        sum[3] += slope, sum[4] += slope * value;
      }
      for (int k = 0; k < 5; ++k) store_n(partial + k * p.C, sum[k], n);
    } else {
      const V gate = load_n(values(p.gate) + task.b * p.gate_stride + c, n);
      const V pool_grad = load_n(values(p.pool_grad) + task.b * p.pool_grad_stride + c, n);
      const V a = p.a ? load_n(values(p.a) + c, n) : V{}, b = p.b ? load_n(values(p.b) + c, n) : V{};
      const T* dy = rows(p.dy, task, token) + c;
      T* y = rows(p.y, task, token) + c;
      for (int64_t t = 0; t < count; ++t) {
        const V value = load_n(x + t * p.x.stride_n, n), g = load_n(dy + t * p.dy.stride_n, n);
        V dx = scale * ((g * gate + pool_grad) * derivative<act, A>(scale * value + shift)) + a;
        if (p.b) dx += b * value;
        store_n(y + t * p.y.stride_n, dx, n);
      }
    }
  }

  static void run(const ChannelActParams& p, const ChannelTask& task) {
    for (int64_t token = task.n0; token < task.n1; token += kTokens) {
      const int64_t count = task.n1 - token < kTokens ? task.n1 - token : kTokens;
      const int64_t whole = count == kTokens ? p.C / L * L : 0;
      for (int64_t c = 0; c < whole; c += L) vector(p, task, token, kTokens, c, L);  // constants: no loop, no check
      for (int64_t c = whole; c < p.C; c += L) vector(p, task, token, count, c, p.C - c);
    }
  }
};

template <class T, ChannelPass pass> void channel_pass_of(const ChannelActParams& p, const ChannelTask& task) {
  with_act(p.act, [&](auto act) { ChannelBody<T, pass, decltype(act)::value>::run(p, task); });
}

template <class T> void channel_act_of(const ChannelActParams& p, const ChannelTask& task) {
  switch (p.pass) {
    case ChannelPass::stats: return channel_pass_of<T, ChannelPass::stats>(p, task);
    case ChannelPass::act: return channel_pass_of<T, ChannelPass::act>(p, task);
    case ChannelPass::pool: return channel_pass_of<T, ChannelPass::pool>(p, task);
    case ChannelPass::sums: return channel_pass_of<T, ChannelPass::sums>(p, task);
    default: return channel_pass_of<T, ChannelPass::grad>(p, task);
  }
}

inline void channel_act(const ChannelActParams& p, const ChannelTask& task) {
  switch (p.dtype) {
    case DType::f64: return channel_act_of<double>(p, task);
    case DType::f32: return channel_act_of<float>(p, task);
    case DType::f16: return channel_act_of<f16>(p, task);
    default: return channel_act_of<bf16>(p, task);
  }
}

}  // namespace LIFEOPS_ISA
}  // namespace lifeops

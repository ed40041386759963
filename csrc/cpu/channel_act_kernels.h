// SPDX-License-Identifier: Apache-2.0
// The passes of channel_act.h for one task. Compiled once per instruction set (see vec.h).
//
// Tokens are read whole, in the order they lie in memory, four or eight at a time: per-channel values and sums, which stay in L1, are
// then touched once for as many vectors of tokens.
#pragma once
#include "channel_act.h"
#include "moments.h"

namespace lifeops {
namespace LIFEOPS_ISA {

template <class T, ChannelPass pass, Act act> struct ChannelBody {
  using A = typename AccOf<T>::type;
  using V = vec_t<A>;
  static constexpr int L = Vec<A>::kLanes;
  static constexpr int64_t kTokens = pass == ChannelPass::stats ? 8 : 4, kAhead = 8;  // summed together; asked for ahead
  static constexpr int64_t kSpan = 384;  // channels at a time: eight tokens, the eight that are asked for and the sums stay in L1

  static constexpr bool kReadsDy = pass == ChannelPass::sums || pass == ChannelPass::grad;

  // Tokens of one tensor, from one on.
  template <class U> struct Tokens {
    U* data;
    int64_t stride;
    Tokens(const Rows& r, int64_t b) : data(r.data ? static_cast<U*>(r.data) + b * r.stride_b : nullptr), stride(r.stride_n) {}
    U* at(int64_t token) const { return data + token * stride; }
  };

  // What the loops need of the parameters, in registers: a store might change the parameters themselves, for all the compiler knows.
  const Tokens<const T> x, dy, residual;
  const Tokens<T> y;
  const A *scale, *shift, *gate, *pool_grad, *a, *b;
  A* partial;
  const int64_t C;

  ChannelBody(const ChannelActParams& p, const ChannelTask& task)
      : x(p.x, task.b), dy(p.dy, task.b), residual(p.residual, task.b), y(p.y, task.b), scale(values(p.scale)), shift(values(p.shift)),
        gate(values(p.gate) + task.b * p.gate_stride), pool_grad(values(p.pool_grad) + task.b * p.pool_grad_stride), a(values(p.a)), b(values(p.b)),
        partial(static_cast<A*>(task.partial)), C(p.C) {}
  static const A* values(const void* p) { return static_cast<const A*>(p); }

  // `count` tokens from `token` on, one vector of channels at c of which n are left. `first`: nothing has been summed yet.
  inline __attribute__((always_inline)) void vector(int64_t token, int64_t count, bool first, const JoinBlock<A>& join, int64_t c, int64_t n) const {
    const T *from = x.at(token) + c, *grads = kReadsDy ? dy.at(token) + c : nullptr;
#pragma GCC unroll 8
    for (int64_t t = 0; t < count; ++t) {  // the tokens' lines come interleaved, which the hardware does not foresee
      __builtin_prefetch(from + (t + kAhead) * x.stride);
      if (kReadsDy) __builtin_prefetch(grads + (t + kAhead) * dy.stride);
    }
    const auto value_at = [&](int64_t t) { return load_n(from + t * x.stride, n); };
    const auto grad_at = [&](int64_t t) { return load_n(grads + t * dy.stride, n); };
    const auto constant = [&](const A* of) { return load_n(of + c, n); };
    if constexpr (pass == ChannelPass::stats) {
      V value[8], sum = first ? V{} : load_n(partial + C + c, n), m2 = first ? V{} : load_n(partial + 2 * C + c, n);
#pragma GCC unroll 8
      for (int64_t t = 0; t < 8; ++t) value[t] = t < count ? value_at(t) : V{};
      activate_all<act, A, 4>(value);
      if (count > 4) activate_all<act, A, 4>(value + 4);
      const V k = first ? zero_unless_finite(value[0]) : load_n(partial + c, n);
      if (first) store_n(partial + c, k, n);
      if (count == 8) join_block<A, 8>(value, k, join, &sum, &m2);
      else if (count == 4) join_block<A, 4>(value, k, join, &sum, &m2);
      else join_any<A>(value, count, k, join, &sum, &m2);
      store_n(partial + C + c, sum, n), store_n(partial + 2 * C + c, m2, n);
    } else if constexpr (pass == ChannelPass::act) {
      const V s = constant(scale), m = constant(shift), g = constant(gate);
      T* to = y.at(token) + c;
      V value[4];
#pragma GCC unroll 4
      for (int64_t t = 0; t < 4; ++t) value[t] = t < count ? s * value_at(t) + m : V{};
      activate_all<act, A, 4>(value);
#pragma GCC unroll 4
      for (int64_t t = 0; t < count; ++t) {
        value[t] *= g;
        if (residual.data) value[t] += load_n(residual.at(token + t) + c, n);
        store_n(to + t * y.stride, value[t], n);
      }
    } else if constexpr (pass == ChannelPass::pool) {
      const V s = constant(scale), m = constant(shift);
      V sum = first ? V{} : load_n(partial + c, n);
      for (int64_t t = 0; t < count; ++t) sum += activate<act, A>(s * value_at(t) + m);
      store_n(partial + c, sum, n);
    } else if constexpr (pass == ChannelPass::sums) {
      const V s = constant(scale), m = constant(shift);
      V sum[5];
#pragma GCC unroll 5
      for (int k = 0; k < 5; ++k) sum[k] = first ? V{} : load_n(partial + k * C + c, n);
#pragma GCC unroll 4
      for (int64_t t = 0; t < count; ++t) {
        const V value = value_at(t), g = grad_at(t), v = s * value + m, slope = derivative<act, A>(v);
        sum[0] += g * activate<act, A>(v), sum[1] += g * slope, sum[2] += g * slope * value;
        sum[3] += slope, sum[4] += slope * value;
      }
#pragma GCC unroll 5
      for (int k = 0; k < 5; ++k) store_n(partial + k * C + c, sum[k], n);
    } else {
      const V s = constant(scale), m = constant(shift), g = constant(gate), of_pool = constant(pool_grad);
      const V a0 = a ? constant(a) : V{}, b0 = b ? constant(b) : V{};
      T* to = y.at(token) + c;
      V value[4], slope[4];
#pragma GCC unroll 4
      for (int64_t t = 0; t < 4; ++t) value[t] = t < count ? value_at(t) : V{}, slope[t] = s * value[t] + m;
      derive_all<act, A, 2>(slope), derive_all<act, A, 2>(slope + 2);  // four together spill
#pragma GCC unroll 4
      for (int64_t t = 0; t < count; ++t) {
        V dx = s * ((grad_at(t) * g + of_pool) * slope[t]) + a0;
        if (b) dx += b0 * value[t];
        store_n(to + t * y.stride, dx, n);
      }
    }
  }

  // An infinity that a block started with has made its sum NaN: what a plain sum is, one by one.
  void sum_plainly(const ChannelTask& task, int64_t c, int64_t n) const {
    const V sum = load_n(partial + C + c, n);
    if (!any_set(sum != sum)) return;
    V plain = {};
    for (int64_t token = task.n0; token < task.n1; ++token) plain += activate<act, A>(load_n(x.at(token) + c, n)) - load_n(partial + c, n);
    store_n(partial + C + c, sum == sum ? sum : plain, n);
  }

  static void run(const ChannelActParams& p, const ChannelTask& task) {
    const ChannelBody body(p, task);
    const int64_t span = pass == ChannelPass::stats ? kSpan : body.C;
    for (int64_t c0 = 0; c0 < body.C; c0 += span) body.channels(task, c0, body.C - c0 < span ? body.C : c0 + span);
  }

  inline __attribute__((always_inline)) void channels(const ChannelTask& task, int64_t c0, int64_t c1) const {
    for (int64_t token = task.n0, count; token < task.n1; token += count) {
      const int64_t left = task.n1 - token, whole = left >= 4 ? c0 + (c1 - c0) / L * L : c0;
      count = left >= kTokens ? kTokens : left >= 4 ? 4 : left;
      const bool first = token == task.n0;
      const JoinBlock<A> join(pass == ChannelPass::stats ? token - task.n0 : 0, count);
      if (kTokens == 4 || count == kTokens)  // constants: no loop, no check
        for (int64_t c = c0; c < whole; c += L) vector(token, kTokens, first, join, c, L);
      else
        for (int64_t c = c0; c < whole; c += L) vector(token, 4, first, join, c, L);
      for (int64_t c = whole; c < c1; c += L) vector(token, count, first, join, c, c1 - c);
    }
    if constexpr (pass == ChannelPass::stats)
      for (int64_t c = c0; c < c1; c += L) sum_plainly(task, c, c1 - c);
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

// SPDX-License-Identifier: Apache-2.0
// Where a tile's sums go: to y, through an epilogue, or through a prologue's derivative. Compiled once per instruction set (see vec.h).
#pragma once
#include "moments.h"
#include "rows.h"

namespace lifeops {
namespace LIFEOPS_ISA {

// What happens around the convolution, for one vector of channels of a tile.
template <class T> struct TileExtras {
  const TokenDWConvExtras* steps;
  const T* pre;                   // x of the derivative
  int64_t pre_row, c;             // from row to row; channel of this vector
  typename AccOf<T>::type* sums;  // of the task, at this vector
  int64_t sums_stride;
  bool first;                     // nothing has been summed yet
  JoinBlock<typename AccOf<T>::type> join;  // of this tile's values with the task's
};

// Where one vector of channels of a tile goes.
template <class T> struct TileTarget {
  T* y;
  const T* residual;
  int64_t y_stride, r_stride;  // from token to token
  int64_t y_row, r_row;        // from row to row
  int64_t n;                   // channels left from this vector on
  const TileExtras<T>* extras;  // or null
};

// What T keeps of a value.
template <class T> inline __attribute__((always_inline)) auto rounded(vec_t<typename AccOf<T>::type> value) {
  if constexpr (sizeof(T) == sizeof(typename AccOf<T>::type)) return value;
  T lanes[Vec<typename AccOf<T>::type>::kLanes];
  store(lanes, value);
  return load(lanes);
}

constexpr int kMostTile = 16;  // sums of a tile

// body(Count, t) for [0, width), four at a time where an activation takes as long a chain of instructions as GELU's table.
template <Act act, class Body> inline __attribute__((always_inline)) void in_groups(int width, Body body) {
  constexpr int kTogether = LIFEOPS_VEC_BYTES == 64 && (act == Act::gelu || act == Act::gelu_first) ? 4 : 1;
  int t = 0;
  for (; t + kTogether <= width; t += kTogether) body(Count<kTogether>{}, t);
  if constexpr (kTogether > 1) {
    if (width - t == 3) body(Count<3>{}, t);
    else if (width - t == 2) body(Count<2>{}, t);
    else if (width - t == 1) body(Count<1>{}, t);
  }
}

// The tile's sums through the epilogue, to y; out of line, so that the plain convolution keeps its registers.
template <class T, class A = typename AccOf<T>::type>
__attribute__((noinline)) void store_through_epilogue(const vec_t<A>* acc, int rows, int width, const TileTarget<T>& out) {
  const TileExtras<T>& extras = *out.extras;
  const vec_t<A> one = splat(A(1)), zero = {};
  const ChannelAffine* e = extras.steps->epilogue;
  const vec_t<A> scale = e ? load_n(static_cast<const A*>(e->scale) + extras.c, out.n) : one;
  const vec_t<A> shift = e ? load_n(static_cast<const A*>(e->shift) + extras.c, out.n) : zero;
  vec_t<A> kept[kMostTile];
  with_act(e ? e->act : Act::none, [&](auto act) {
    constexpr Act kAct = decltype(act)::value;
    for (int r = 0; r < rows; ++r)
      in_groups<kAct>(width, [&](auto count, int t0) {
        constexpr int N = decltype(count)::value;
        vec_t<A> value[N];
#pragma GCC unroll 4
        for (int t = 0; t < N; ++t) value[t] = scale * acc[r * width + t0 + t] + shift;
        activate_all<kAct, A, N>(value);
#pragma GCC unroll 4
        for (int t = 0; t < N; ++t) {
          if (extras.steps->sums) kept[r * width + t0 + t] = rounded<T>(value[t]);
          if (out.residual) value[t] = rounded<T>(value[t]) + load_n(out.residual + r * out.r_row + (t0 + t) * out.r_stride, out.n);
          store_n(out.y + r * out.y_row + (t0 + t) * out.y_stride, value[t], out.n);
        }
      });
  });
  if (!extras.steps->sums) return;
  A *sums = extras.sums + extras.sums_stride, *m2s = sums + extras.sums_stride;
  const vec_t<A> k = extras.first ? zero_unless_finite(kept[0]) : load_n(extras.sums, out.n);
  vec_t<A> sum = extras.first ? zero : load_n(sums, out.n), m2 = extras.first ? zero : load_n(m2s, out.n);
  join_any<A>(kept, rows * width, k, extras.join, &sum, &m2);
  store_n(extras.sums, k, out.n), store_n(sums, sum, out.n), store_n(m2s, m2, out.n);
}

// The tile's sums through the prologue's derivative, to dx; kSums: sums of x dv and dv. kFull: all lanes are channels.
template <class T, Act act, bool kFull, bool kSums, class A = typename AccOf<T>::type>
inline __attribute__((always_inline)) void through_derivative(const vec_t<A>* acc, int rows, int width, const TileTarget<T>& out) {
  const TileExtras<T>& extras = *out.extras;
  const TokenDWConvExtras& steps = *extras.steps;
  const int64_t n = kFull ? Vec<A>::kLanes : out.n, pre_stride = steps.pre_stride_n, y_stride = out.y_stride;
  const auto values = [&](const void* p) { return load_n(static_cast<const A*>(p) + extras.c, n); };
  const vec_t<A> scale = values(steps.derivative->scale), shift = values(steps.derivative->shift), a = values(steps.a);
  const vec_t<A> b = steps.b ? values(steps.b) : vec_t<A>{};
  const bool with_b = steps.b;
  vec_t<A> sum_x = {}, sum = {};
  if (kSums && !extras.first) sum_x = load_n(extras.sums, n), sum = load_n(extras.sums + extras.sums_stride, n);
  for (int r = 0; r < rows; ++r) {
    const T* pre = extras.pre + r * extras.pre_row;
    T* y = out.y + r * out.y_row;
    const auto some = [&](auto count, int) {
      constexpr int N = decltype(count)::value;
      vec_t<A> factor[N], slope[N];
#pragma GCC unroll 4
      for (int t = 0; t < N; ++t, pre += pre_stride) factor[t] = load_n(pre, n);
      if constexpr (act == Act::gelu_first) {
        gelu_both<A, N>(factor, slope);
      } else {
#pragma GCC unroll 4
        for (int t = 0; t < N; ++t) slope[t] = scale * factor[t] + shift;
        derive_all<act, A, N>(slope);
      }
#pragma GCC unroll 4
      for (int t = 0; t < N; ++t, y += y_stride) {
        vec_t<A> dv = *acc++;
        if constexpr (act != Act::gelu_first) dv *= slope[t];
        if constexpr (kSums) sum_x += dv * factor[t], sum += dv;
        vec_t<A> dx = scale * dv + (with_b ? b * factor[t] + a : a);
        if constexpr (act == Act::gelu_first) dx *= slope[t];
        store_n(y, dx, n);
      }
    };
    in_groups<act>(width, some);
  }
  if constexpr (kSums) store_n(extras.sums, sum_x, n), store_n(extras.sums + extras.sums_stride, sum, n);
}
template <class T, class A = typename AccOf<T>::type>
__attribute__((noinline)) void store_through_derivative(const vec_t<A>* acc, int rows, int width, const TileTarget<T>& out) {
  with_prologue(out.extras->steps->derivative->act, [&](auto act) {
    constexpr Act kAct = decltype(act)::value;
    const bool full = out.n >= Vec<A>::kLanes, sums = out.extras->sums;
    if (full && sums) through_derivative<T, kAct, true, true>(acc, rows, width, out);
    else if (full) through_derivative<T, kAct, true, false>(acc, rows, width, out);
    else if (sums) through_derivative<T, kAct, false, true>(acc, rows, width, out);
    else through_derivative<T, kAct, false, false>(acc, rows, width, out);
  });
}

// The tile's sums, and the residual, to y.
template <class T, bool kFull, bool kResidual, class A = typename AccOf<T>::type>
inline __attribute__((always_inline)) void store_plainly(const vec_t<A>* acc, int rows, int width, const TileTarget<T>& out, Ahead* ahead) {
  const int64_t n = kFull ? Vec<A>::kLanes : out.n, y_stride = out.y_stride, r_stride = out.r_stride;
  Ahead next = *ahead;
  for (int r = 0; r < rows; ++r) {
    T* y = out.y + r * out.y_row;
    const T* residual = kResidual ? out.residual + r * out.r_row : nullptr;
    for (const vec_t<A>* end = acc + width; acc != end; ++acc, y += y_stride, residual += kResidual ? r_stride : 0) {
      vec_t<A> value = *acc;
      if constexpr (kResidual) value += load_n(residual, n);
      store_n(y, value, n);
      next.fetch<true, kResidual>();
    }
  }
  *ahead = next;
}

// Inlined by name, or gcc keeps `ahead` and `out` in memory.
template <class T, class A = typename AccOf<T>::type>
inline __attribute__((always_inline)) void store_tile(const vec_t<A>* acc, int rows, int width, const TileTarget<T>& out, Ahead* ahead) {
  const bool full = out.n >= Vec<A>::kLanes;
  if (!out.extras) {
    if (!full) return out.residual ? store_plainly<T, false, true>(acc, rows, width, out, ahead) : store_plainly<T, false, false>(acc, rows, width, out, ahead);
    return out.residual ? store_plainly<T, true, true>(acc, rows, width, out, ahead) : store_plainly<T, true, false>(acc, rows, width, out, ahead);
  }
  if (out.extras->steps->derivative) store_through_derivative<T>(acc, rows, width, out);
  else store_through_epilogue<T>(acc, rows, width, out);
  Ahead next = *ahead;
  const bool third = next.c.at != nullptr;
  for (int k = 0; k < rows * width; ++k) third ? next.fetch<true, true>() : next.fetch<true>();
  *ahead = next;
}

}  // namespace LIFEOPS_ISA
}  // namespace lifeops

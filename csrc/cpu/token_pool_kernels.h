// SPDX-License-Identifier: Apache-2.0
// Pooling of one task, and its backward pass. Compiled once per instruction set (see vec.h).
#pragma once
#include "activations.h"
#include "rows.h"
#include "token_conv_planes.h"
#include "token_pool.h"

namespace lifeops {
namespace LIFEOPS_ISA {

template <class T, bool kWhole> struct TokenPool {
  using A = typename AccOf<T>::type;
  using V = vec_t<A>;
  static constexpr int L = Vec<A>::kLanes;

  static constexpr int kLine = LIFEOPS_VEC_BYTES >= 64 ? int(sizeof(A) / sizeof(T)) : 64 / (L * int(sizeof(T)));  // vectors of a cache line

  const TokenPoolParams& p;
  const TokenPoolTask& task;
  A* scratch;

  static inline __attribute__((always_inline)) V read(const T* at, int64_t C) {
    if constexpr (kWhole) return load(at);
    else return load_partial(at, C);
  }
  static const T* row_of(const void* t, int64_t b, int64_t stride_b, int64_t row, int64_t width, int64_t stride_n) {
    return static_cast<const T*>(t) + b * stride_b + row * width * stride_n;
  }
  T* y_row(int64_t row, int64_t width) const { return const_cast<T*>(row_of(p.y, task.b, p.y_stride_b, row, width, p.y_stride_n)); }

  // What the sum of a window is divided by along one axis.
  int64_t counted(const Axis& a, int64_t o) const {
    return p.count_include_pad ? min64(a.K, a.size + a.p - window_start(a, o)) : last_tap(a, o) - first_tap(a, o);
  }

  // The tokens that an output sees: x at the first of them.
  struct Window {
    const T* x;
    int64_t i0, i1, j0, j1, row;
  };
  Window window(const T* image, int64_t stride_n, int64_t r, int64_t q) const {
    const int64_t i0 = first_tap(p.rows, r), j0 = first_tap(p.columns, q), row = p.columns.size * stride_n;
    return {image + (window_start(p.rows, r) + i0) * row + (window_start(p.columns, q) + j0) * stride_n, i0, last_tap(p.rows, r), j0,
            last_tap(p.columns, q), row};
  }
  // body(t, value, tap) in the order of the taps, for N vectors t from `channel` on.
  template <int N, class Body> inline __attribute__((always_inline)) void over(const Window& w, int64_t stride_n, int64_t channel, Body body) const {
    const T* row = w.x + channel;
    for (int64_t i = w.i0; i < w.i1; ++i, row += w.row) {
      const T* x = row;
      for (int64_t j = w.j0; j < w.j1; ++j, x += stride_n)
#pragma GCC unroll 4
        for (int t = 0; t < N; ++t) body(t, read(x + t * L, p.C), i * p.columns.K + j);
    }
  }
  // Asks for what output (r + 1, q) sees and those before it do not.
  template <int N> inline __attribute__((always_inline)) void ask_ahead(const T* image, int64_t stride_n, int64_t r, int64_t q, int64_t channel) const {
    const int64_t rows = min64(p.rows.K, p.rows.s), columns = min64(p.columns.K, p.columns.s);
    const int64_t row = window_start(p.rows, r + 1) + p.rows.K - rows, column = window_start(p.columns, q) + p.columns.K - columns;
    if (r + 1 >= p.rows.out || row + rows > p.rows.size) return;
    const T* from = image + (row * p.columns.size + column) * stride_n + channel;
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < columns; ++j)
        for (int t = 0; t < N; t += kLine) __builtin_prefetch(from + (i * p.columns.size + j) * stride_n + t * L, 0, 2);
  }
  // body(Count, v) for the task's vectors, whole ones four at a time.
  template <class Body> inline __attribute__((always_inline)) void in_fours(Body body) const {
    int64_t v = task.v0;
    if constexpr (kWhole)
      for (; v + 4 <= min64(task.v1, p.C / L); v += 4) body(Count<4>{}, v);
    for (; v < task.v1; ++v) body(Count<1>{}, v);
  }

  void forward() const {
    const T* image = row_of(p.x, task.b, p.x_stride_b, 0, 0, 0);
    for (int64_t r = task.r0; r < task.r1; ++r)
      for (int64_t q = 0; q < p.columns.out; ++q) {
        const Window w = window(image, p.x_stride_n, r, q);
        const V divisor = splat(A(counted(p.rows, r) * counted(p.columns, q)));
        T* y = y_row(r, p.columns.out) + q * p.y_stride_n;
        in_fours([&](auto count, int64_t v) __attribute__((always_inline)) {
          constexpr int N = decltype(count)::value;
          const int64_t channel = vector_start(p.C, L, v);
          V value[N];
#pragma GCC unroll 4
          for (int t = 0; t < N; ++t) value[t] = p.max ? lowest() : V{};
          ask_ahead<N>(image, p.x_stride_n, r, q, channel);
          if (p.max) over<N>(w, p.x_stride_n, channel, [&](int t, V x, int64_t) { value[t] = wins(x, value[t]) ? x : value[t]; });
          else over<N>(w, p.x_stride_n, channel, [&](int t, V x, int64_t) { value[t] += x; });
#pragma GCC unroll 4
          for (int t = 0; t < N; ++t) store_lanes(y + channel + t * L, p.max ? value[t] : value[t] / divisor, Lanes::of<A>(p.C, v + t));
        });
      }
  }
  static V lowest() { return splat(-A(__builtin_inff())); }
  static inline __attribute__((always_inline)) auto wins(V x, V value) { return (x > value) | (x != x); }

  // Scratch of the backward pass: the rows of outputs that a row of positions sees, [column][vector][lane], of the places of the largest, or
  // of dy over what the window's sum is divided by.
  static int64_t row_size(const TokenPoolParams& p, int64_t vectors) { return p.columns.out * vectors * L; }

  void prepare(int64_t o, A* out) const {
    const T *dy = row_of(p.x, task.b, p.x_stride_b, o, p.columns.out, p.x_stride_n), *image = row_of(p.pooled, task.b, p.pooled_stride_b, 0, 0, 0);
    for (int64_t q = 0; q < p.columns.out; ++q, dy += p.x_stride_n) {
      if (!p.max) {
        const V divisor = splat(A(counted(p.rows, o) * counted(p.columns, q)));
        for (int64_t v = task.v0; v < task.v1; ++v, out += L) store(out, read(dy + vector_start(p.C, L, v), p.C) / divisor);
        continue;
      }
      const Window w = window(image, p.pooled_stride_n, o, q);
      in_fours([&](auto count, int64_t v) __attribute__((always_inline)) {
        constexpr int N = decltype(count)::value;
        V value[N], place[N];
#pragma GCC unroll 4
        for (int t = 0; t < N; ++t) value[t] = lowest(), place[t] = splat(A(w.i0 * p.columns.K + w.j0));
        ask_ahead<N>(image, p.pooled_stride_n, o, q, vector_start(p.C, L, v));
        over<N>(w, p.pooled_stride_n, vector_start(p.C, L, v), [&](int t, V x, int64_t tap) {
          const auto larger = wins(x, value[t]);
          value[t] = larger ? x : value[t], place[t] = larger ? splat(A(tap)) : place[t];
        });
#pragma GCC unroll 4
        for (int t = 0; t < N; ++t, out += L) store(out, place[t]);
      });
    }
  }

  void backward() const {
    const int64_t vectors = task.v1 - task.v0, size = row_size(p, vectors), ring = most_outputs(p.rows);
    const T* dy = row_of(p.x, task.b, p.x_stride_b, 0, 0, 0);
    int64_t prepared = first_output(p.rows, task.r0);  // rows before are, or are not wanted
    for (int64_t r = task.r0; r < task.r1; ++r) {
      const int64_t o0 = first_output(p.rows, r), o1 = last_output(p.rows, r);
      for (prepared = max64(prepared, o0); prepared < o1; ++prepared) prepare(prepared, scratch + prepared % ring * size);
      T* dx = y_row(r, p.columns.size);
      for (int64_t c = 0; c < p.columns.size; ++c, dx += p.y_stride_n) {
        const int64_t q0 = first_output(p.columns, c), q1 = last_output(p.columns, c);
        in_fours([&](auto count, int64_t v) __attribute__((always_inline)) {
          constexpr int N = decltype(count)::value;
          const int64_t channel = vector_start(p.C, L, v);
          V sum[N] = {};
          for (int64_t o = o0; o < o1; ++o)
            for (int64_t q = q0; q < q1; ++q) {
              const A* found = scratch + o % ring * size + (q * vectors + v - task.v0) * L;
              if (!p.max) {
#pragma GCC unroll 4
                for (int t = 0; t < N; ++t) sum[t] += load(found + t * L);
                continue;
              }
              const V tap = splat(A((r - window_start(p.rows, o)) * p.columns.K + c - window_start(p.columns, q)));
              const T* grad = dy + (o * p.columns.out + q) * p.x_stride_n + channel;
#pragma GCC unroll 4
              for (int t = 0; t < N; ++t) sum[t] += load(found + t * L) == tap ? read(grad + t * L, p.C) : V{};
            }
#pragma GCC unroll 4
          for (int t = 0; t < N; ++t) store_lanes(dx + channel + t * L, sum[t], Lanes::of<A>(p.C, v + t));
        });
      }
    }
  }

  static void run(const TokenPoolParams& p, const TokenPoolTask& task, void* scratch) {
    const TokenPool body{p, task, static_cast<A*>(scratch)};
    p.backward ? body.backward() : body.forward();
  }
};

template <class T> void token_pool_of(const TokenPoolParams& p, const TokenPoolTask& task, void* scratch) {
  if (p.C >= Vec<typename AccOf<T>::type>::kLanes) TokenPool<T, true>::run(p, task, scratch);
  else TokenPool<T, false>::run(p, task, scratch);
}
inline void token_pool_run(const TokenPoolParams& p, const TokenPoolTask& task, void* scratch) {
  switch (p.dtype) {
    case DType::f64: return token_pool_of<double>(p, task, scratch);
    case DType::f32: return token_pool_of<float>(p, task, scratch);
    case DType::f16: return token_pool_of<f16>(p, task, scratch);
    default: return token_pool_of<bf16>(p, task, scratch);
  }
}
inline int64_t token_pool_scratch(const TokenPoolParams& p, int64_t vectors) {
  return p.backward ? most_outputs(p.rows) * p.columns.out * vectors * LIFEOPS_VEC_BYTES : 0;
}
constexpr TokenPoolKernels kTokenPool = {token_pool_run, token_pool_scratch, LIFEOPS_VEC_BYTES};

}  // namespace LIFEOPS_ISA
}  // namespace lifeops

// SPDX-License-Identifier: Apache-2.0
// Backward of an activation behind the convolution, of one task, in one pass. Compiled once per instruction set (see vec.h).
//
// Two output rows at a time: the rows of x that they see are in a ring; their z is summed again, dz goes into a second ring, from there
// the weight gradient takes it against the first ring, and the rows of dx that now see all of their dz are summed. x and dy are read
// once, dx is written once; z and dz never leave the second-level cache.
#pragma once
#include "token_dwconv_forward.h"
#include "token_dwconv_grad_weight.h"

namespace lifeops {
namespace LIFEOPS_ISA {

// out = act'(z) dy, for a tile of z.
template <class T, Act act, bool kFull, class A = typename AccOf<T>::type>
inline __attribute__((always_inline)) void times_derivative(const vec_t<A>* z, int rows, int width, const T* dy, int64_t dy_row, int64_t dy_stride,
                                                            int64_t channels, A* out, int64_t out_row) {
  constexpr int L = Vec<A>::kLanes;
  const int64_t n = kFull ? L : channels;
  for (int r = 0; r < rows; ++r) {
    const T* from = dy + r * dy_row;
    A* to = out + r * out_row;
    in_groups<act>(width, [&](auto count, int) {
      constexpr int N = decltype(count)::value;
      vec_t<A> slope[N];
#pragma GCC unroll 4
      for (int t = 0; t < N; ++t) slope[t] = *z++;
      derive_all<act, A, N>(slope);
#pragma GCC unroll 4
      for (int t = 0; t < N; ++t, from += dy_stride, to += L) store(to, slope[t] * load_n(from, n));
    });
  }
}
template <class T, class A = typename AccOf<T>::type>
__attribute__((noinline)) void times_derivative_of(Act act, const vec_t<A>* z, int rows, int width, const T* dy, int64_t dy_row, int64_t dy_stride,
                                                   int64_t n, A* out, int64_t out_row) {
  with_act(act, [&](auto chosen) {
    constexpr Act kAct = decltype(chosen)::value;
    if (n >= Vec<A>::kLanes) times_derivative<T, kAct, true>(z, rows, width, dy, dy_row, dy_stride, n, out, out_row);
    else times_derivative<T, kAct, false>(z, rows, width, dy, dy_row, dy_stride, n, out, out_row);
  });
}

template <class T> struct Backward {
  using A = typename AccOf<T>::type;
  using Tiling = typename Forward<T>::Tiling;
  static constexpr int L = Vec<A>::kLanes, kStep = 2;

  // Of both rings: K is odd, so that two rows that are computed together lie side by side.
  static int64_t ring_rows(const TokenDWConvParams& p) { return p.K + kStep - 1; }
  static int64_t x_columns(const TokenDWConvParams& p) { return min64(p.W, kSegment) + 2 * (p.K - 1); }
  static int64_t columns(const TokenDWConvParams& p) { return x_columns(p) + min64(p.W, kSegment) + p.K - 1; }

  // Channels of a task: no more than the rings may hold, and few where there are few images, but two blocks.
  static int64_t channels(const TokenDWConvParams& p) {
    const int64_t block_bytes = ring_rows(p) * columns(p) * kBlock * int64_t(sizeof(A)), blocks = ceil_div(p.C, kBlock);
    const int64_t wanted = max64(2, ceil_div(blocks * p.B * ceil_div(p.W, kSegment), 16));
    const int64_t tasks = ceil_div(blocks, max64(1, min64(wanted, kRingBytes / block_bytes)));
    return ceil_div(blocks, tasks) * kBlock;
  }
  static int64_t scratch(const TokenDWConvParams& p) {
    return (ring_rows(p) * columns(p) * channels(p) + x_columns(p) * L) * int64_t(sizeof(A));
  }

  const BackwardParams& params;
  const TokenDWConvParams& p;  // of dx: its x is dy
  const BackwardTask& task;
  const int64_t n, half;
  A *zeros, *x_ring, *dz_ring, *sums;

  Backward(const BackwardParams& all, const BackwardTask& t, A* memory)
      : params(all), p(all.input), task(t), n(t.c1 - t.c0), half(p.K / 2), zeros(memory), x_ring(zeros + x_columns(p) * L),
        dz_ring(x_ring + ring_rows(p) * x_columns(p) * channels(p)), sums(static_cast<A*>(t.partial)) {}

  static void run(const BackwardParams& params, const BackwardTask& task, void* scratch) {
    const Backward body(params, task, static_cast<A*>(scratch));
    for (int64_t k = 0; k < x_columns(body.p) * L; ++k) body.zeros[k] = 0;
    for (int64_t k = 0; k < ceil_div(body.n, kBlock) * grad_weight_rows(params.weight) * kBlock; ++k) body.sums[k] = 0;
    for (int64_t index = task.unit0; index < task.unit1; ++index) Strip(body, index).run();
  }

  // One row strip and column segment of an image, [r0, r1) x [q0, q1) of dx. The rings' first columns are q0 - 2 half and q0 - half; z
  // is computed for the columns [z0, z1) and the rows [first, last).
  struct Strip {
    const Backward& of;
    const TokenDWConvParams& p;
    const int64_t n, half;
    ForwardTask image;
    int64_t r0, r1, q0, q1, x_cols, dz_cols, z0, z1, first, last;

    Strip(const Backward& body, int64_t index) : of(body), p(body.p), n(body.n), half(body.half) {
      const BackwardTask& t = body.task;
      const int64_t strip = index / t.segments % t.strips, segment = index % t.segments;
      r0 = strip * p.H / t.strips, r1 = (strip + 1) * p.H / t.strips;
      q0 = segment * p.W / t.segments, q1 = (segment + 1) * p.W / t.segments;
      image = {index / (t.strips * t.segments), t.c0, t.c1, r0, r1, q0, q1, strip == 0 && segment == 0, nullptr, nullptr, &image};
      x_cols = q1 - q0 + 2 * (p.K - 1), dz_cols = q1 - q0 + p.K - 1;
      z0 = max64(0, q0 - half), z1 = min64(p.W, q1 + half), first = max64(0, r0 - half), last = min64(p.H, r1 + half);
    }

    int64_t vectors() const { return ceil_div(n, L); }
    A* x_row(int64_t row) const { return of.x_ring + int32_t(row) % int32_t(ring_rows(p)) * x_cols * vectors() * L; }
    A* dz_row(int64_t row) const { return of.dz_ring + int32_t(row - first) % int32_t(ring_rows(p)) * dz_cols * vectors() * L; }
    const T* x_at(int64_t row, int64_t column) const {
      const TokenDWConvParams& f = of.params.forward;
      return static_cast<const T*>(f.x) + image.b * f.x_stride_b + (f.x_prefix + row * p.W + column) * f.x_stride_n + image.c0;
    }
    const T* dy_at(int64_t row, int64_t column) const {
      return static_cast<const T*>(p.x) + image.b * p.x_stride_b + (p.x_prefix + row * p.W + column) * p.x_stride_n + image.c0;
    }

    void run() const {
      if (image.prefix_rows) copy_prefix<T>(p, image, n);
      clear_border();
      const Tiling z_tiles(int(z1 - z0), kTile / kStep), dx_tiles(int(q1 - q0), kTile / kStep);
      int64_t loaded = max64(0, first - half), done = r0;
      for (int64_t r = first; r < last; r += kStep) {
        const int64_t end = min64(last, r + kStep);
        for (; loaded < min64(p.H, end + half); ++loaded)
          load_row<T>(x_at(loaded, 0), of.params.forward.x_stride_n, p.W, q0 - 2 * half, q1 + 2 * half, n, x_row(loaded), x_cols * L);
        add_dz(z_tiles, r, int(end - r));
        add_weight(max64(r, r0), min64(end, r1), loaded, end);
        for (const int64_t ready = end == last ? r1 : end - half; done < ready;) {
          const int height = int(min64(kStep, ready - done));
          write_dx(dx_tiles, done, height);
          done += height;
        }
      }
    }

    // Columns of dz outside the grid, in all rows of the ring.
    void clear_border() const {
      const int64_t before = z0 - (q0 - half), after = z1 - (q0 - half);
      for (int64_t run = 0; run < ring_rows(p) * vectors(); ++run) {
        A* out = of.dz_ring + run * dz_cols * L;
        for (int64_t k = 0; k < before * L; ++k) out[k] = 0;
        for (int64_t k = after * L; k < dz_cols * L; ++k) out[k] = 0;
      }
    }

    // The input rows that `height` output rows from r on see, of K + height - 1.
    int first_tap(int64_t r) const { return int(max64(0, half - r)); }
    int last_tap(int64_t r, int height) const { return int(min64(p.K + height - 1, p.H + half - r)); }
    const A* taps(const void* packed, int64_t c) const {
      return static_cast<const A*>(packed) + (image.c0 + c / kBlock * kBlock) * p.K * p.K + c % kBlock;
    }

    void add_dz(const Tiling& tiling, int64_t r, int height) const {
      const SumTile<A>* tiles = sum_tiles<A>(height, p.K);
      const int k0 = first_tap(r), k1 = last_tap(r, height);
      const A *rows[kMaxKernel + 1], *bias = static_cast<const A*>(of.task.bias);
      for (int k = k0; k < k1; ++k) rows[k] = x_row(r + k - half);
      for (int tile = 0; tile < tiling.count; ++tile) {
        const int64_t t0 = z0 + tiling.start[tile], width = tiling.start[tile + 1] - tiling.start[tile];
        for (int64_t c = 0, v = 0; c < n; c += L, ++v) {
          const A* tile_rows[kMaxKernel + 1];
          for (int k = k0; k < k1; ++k) tile_rows[k] = rows[k] + (v * x_cols + t0 - q0 + half) * L;
          vec_t<A> z[kTile];
          tiles[width - 1](tile_rows, k0, k1, taps(of.task.taps, c), p.K, bias ? load(bias + image.c0 + c) : vec_t<A>{}, z, {});
          times_derivative_of<T>(of.params.act, z, height, int(width), dy_at(r, t0) + c, p.W * p.x_stride_n, p.x_stride_n, n - c,
                                 dz_row(r) + (v * dz_cols + t0 - q0 + half) * L, dz_cols * vectors() * L);
        }
      }
    }

    // dz of the rows [r, end) against x; meanwhile x from row `next_x` on and dy from `next_dy` on are asked for.
    void add_weight(int64_t r, int64_t end, int64_t next_x, int64_t next_dy) const {
      if (r >= end) return;
      const TokenDWConvParams& f = of.params.forward;
      Ahead ahead(x_at(min64(next_x, p.H - 1), q0), f.x_stride_n, dy_at(min64(next_dy, p.H - 1), q0), p.x_stride_n, n, L);
      const int64_t size = grad_weight_rows(of.params.weight) * kBlock, height = end - r;
      for (int64_t c = 0, v = 0; c < n; c += L, ++v) {
        const A* x[kMaxKernel + kStep - 1];
        for (int64_t k = 0; k < height + p.K - 1; ++k) {
          const int64_t row = r + k - half;
          x[k] = row >= 0 && row < p.H ? x_row(row) + (v * x_cols + half) * L : of.zeros;
        }
        A* out = of.sums + c / kBlock * size + c % kBlock;
        vec_t<A> totals[kStep];
        const GradRows<A> rows{dz_row(r) + (v * dz_cols + half) * L, dz_cols * vectors() * L, L, L, x, height, q1 - q0};
        grad_filter_any<A>(p.K, rows, out, totals, &ahead);
        A* db = out + p.K * p.K * kBlock;
        store(db, load(db) + (height == kStep ? totals[0] + totals[1] : totals[0]));
      }
    }

    void write_dx(const Tiling& tiling, int64_t r, int height) const {
      const SumTile<A>* tiles = sum_tiles<A>(height, p.K);
      const int k0 = first_tap(r), k1 = last_tap(r, height);
      const A* rows[kMaxKernel + 1];
      for (int k = k0; k < k1; ++k) rows[k] = dz_row(r + k - half);
      T* y = Forward<T>::y_at(p, image, r);
      const T* next = Forward<T>::y_at(p, image, min64(r + height, p.H - 1));
      Ahead ahead(next, p.y_stride_n, next, p.y_stride_n, n, L);
      for (int tile = 0; tile < tiling.count; ++tile) {
        const int64_t t0 = tiling.start[tile], width = tiling.start[tile + 1] - t0;
        for (int64_t c = 0, v = 0; c < n; c += L, ++v) {
          const A* tile_rows[kMaxKernel + 1];
          for (int k = k0; k < k1; ++k) tile_rows[k] = rows[k] + (v * dz_cols + t0) * L;
          vec_t<A> acc[kTile];
          tiles[width - 1](tile_rows, k0, k1, taps(of.task.mirrored, c), p.K, vec_t<A>{}, acc, {});
          store_tile<T>(acc, height, int(width), TileTarget<T>{y + t0 * p.y_stride_n + c, nullptr, p.y_stride_n, 0, p.W * p.y_stride_n, 0, n - c, nullptr}, &ahead);
        }
      }
    }
  };
};

}  // namespace LIFEOPS_ISA
}  // namespace lifeops

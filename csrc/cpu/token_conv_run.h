// SPDX-License-Identifier: Apache-2.0
// Strided and transposed convolution of one task. Compiled once per instruction set (see vec.h).
//
// Tokens are read where they lie. The outputs of a row are walked in sets whose taps are evenly spaced: one set forward, transposed one
// for each column modulo the stride. Taps outside the grid are left out, not multiplied with zeros. Several coarse channels for each fine
// one are taken apart, into planes of one coarse channel each, before the sums or behind them.
#pragma once
#include "token_conv_sums.h"

namespace lifeops {
namespace LIFEOPS_ISA {

// Outputs of a row whose taps are evenly spaced.
struct Walk {
  int64_t count, first, out_step;  // outputs; input column of the first's first tap; columns from output to output
  int64_t taps, tap0, tap_every;   // of neighbouring columns: their filter columns
  int64_t y0, y_every;             // columns of y

  int64_t column(int64_t u, int64_t k) const { return first + u * out_step + k; }
};

template <class T> struct TokenConv {
  using A = typename AccOf<T>::type;
  static constexpr int L = Vec<A>::kLanes;

  const TokenConvParams& p;
  const TokenConvTask& task;
  const A *weight, *bias;
  A* scratch_;

  // In scratch with several coarse channels for one: a token; forward the planes of a row of y, transposed those of the rows of x that a
  // row of y sees, and where they are.
  static int64_t planes_size(const TokenConvParams& p, int64_t vectors) { return p.m * p.columns.out * vectors * L; }
  static int64_t token_size(const TokenConvParams& p, int64_t vectors) { return (vectors + 1) * p.m * L; }
  static int64_t scratch(const TokenConvParams& p, int64_t vectors) {
    if (p.m == 1) return 0;
    const int64_t rows = p.transpose ? most_outputs(p.rows) : 1;
    return (token_size(p, vectors) + rows * planes_size(p, vectors)) * int64_t(sizeof(A)) + rows * p.m * int64_t(sizeof(RowTaps<A>));
  }

  static void run(const TokenConvParams& p, const void* weight, const void* bias, const TokenConvTask& task, void* scratch) {
    const TokenConv body{p, task, static_cast<const A*>(weight), static_cast<const A*>(bias), static_cast<A*>(scratch)};
    if (p.m == 1) body.plainly();
    else if (p.transpose) body.from_planes();
    else body.to_planes();
  }

  int64_t x_width() const { return p.transpose ? p.columns.out : p.columns.size; }
  const T* x_row(int64_t row) const { return static_cast<const T*>(p.x) + task.b * p.x_stride_b + row * x_width() * p.x_stride_n; }
  T* y_row(int64_t row) const {
    return static_cast<T*>(p.y) + task.b * p.y_stride_b + row * (p.transpose ? p.columns.size : p.columns.out) * p.y_stride_n;
  }
  const A* filter(int64_t j, int64_t row) const { return weight + (j * p.rows.K + row) * p.columns.K * L; }

  // The rows of x under row r of y, in order, at the first channel, and the filter's rows.
  int rows_under(int64_t r, RowTaps<T>* under) const {
    int count = 0;
    if (p.transpose)
      for (int64_t o = first_output(p.rows, r); o < last_output(p.rows, r); ++o) under[count++] = {x_row(o), filter(0, r - window_start(p.rows, o))};
    else
      for (int64_t i = first_tap(p.rows, r); i < last_tap(p.rows, r); ++i) under[count++] = {x_row(window_start(p.rows, r) + i), filter(0, i)};
    return count;
  }

  // The first row of x that the next row of y is the first to see, behind the last that of the next image; null where there is none.
  const T* ahead_of(int64_t r) const {
    if (p.transpose) return nullptr;
    if (r + 1 == p.rows.out) return task.b + 1 < p.B ? x_row(0) + p.x_stride_b : nullptr;
    const int64_t row = window_start(p.rows, r + 1) + max64(0, p.rows.K - p.rows.s);
    return row < 0 || row + min64(p.rows.K, p.rows.s) > p.rows.size ? nullptr : x_row(row);
  }

  // Where a row of sums comes from and goes to: tokens, whose last vector is not a slot of its own, or planes.
  template <class S, class O> struct Row {
    const RowTaps<S>* under;
    int count;
    int64_t x_column;
    bool x_planes;
    const A* bias;
    O* y;
    int64_t y_column;
    bool y_planes;
    const S* ahead;  // the first row that the next row of y is the first to see, or null
  };

  void plainly() const {
    RowTaps<T> under[kMaxKernel];
    for (int64_t r = task.r0; r < task.r1; ++r)
      output_row<T, T>({under, rows_under(r, under), p.x_stride_n, false, bias, y_row(r), p.y_stride_n, false, ahead_of(r)});
  }

  void to_planes() const {
    const int64_t vectors = task.v1 - task.v0, W = p.columns.out, taps = p.rows.K * p.columns.K;
    A* planes = scratch_ + token_size(p, vectors);
    RowTaps<T> under[kMaxKernel];
    for (int64_t r = task.r0; r < task.r1; ++r) {
      const int count = rows_under(r, under);
      for (int64_t j = 0; j < p.m; ++j) {
        output_row<T, A>({under, count, p.x_stride_n, false, bias ? bias + j * L : nullptr, planes + j * W * vectors * L, vectors * L, true,
                          j == 0 ? ahead_of(r) : nullptr});
        for (int k = 0; k < count; ++k) under[k].w += taps * L;
      }
      join_row(planes, W, p.C, p.m, task.v0, task.v1, scratch_, y_row(r), p.y_stride_n);
    }
  }

  void from_planes() const {
    const int64_t vectors = task.v1 - task.v0, W = p.columns.out, size = planes_size(p, vectors), ring = most_outputs(p.rows);
    A* planes = scratch_ + token_size(p, vectors);
    RowTaps<A>* under = reinterpret_cast<RowTaps<A>*>(planes + ring * size);
    int64_t split = first_output(p.rows, task.r0);  // rows before are, or are not wanted
    for (int64_t r = task.r0; r < task.r1; ++r) {
      int count = 0;
      for (int64_t o = first_output(p.rows, r); o < last_output(p.rows, r); ++o) {
        A* row = planes + o % ring * size;
        for (; split <= o; ++split) split_row(x_row(split), p.x_stride_n, W, p.C, p.m, task.v0, task.v1, scratch_, planes + split % ring * size);
        for (int64_t j = 0; j < p.m; ++j) under[count++] = {row + j * W * vectors * L, filter(j, r - window_start(p.rows, o))};
      }
      output_row<A, T>({under, count, vectors * L, true, bias, y_row(r), p.y_stride_n, false, nullptr});
    }
  }

  template <class S, class O> void output_row(const Row<S, O>& row) const {
    const Axis& a = p.columns;
    if (!p.transpose) return walk<S, O>(row, {a.out, -a.p, a.s, a.K, 0, 1, 0, 1});
    for (int64_t phase = 0; phase < min64(a.s, a.size); ++phase) {
      const int64_t tap0 = (phase + a.p) % a.s, taps = tap0 < a.K ? ceil_div(a.K - tap0, a.s) : 0;
      walk<S, O>(row, {ceil_div(a.size - phase, a.s), (phase + a.p) / a.s - taps + 1, 1, taps, tap0 + (taps - 1) * a.s, -a.s, phase, a.s});
    }
  }

  template <class S, class O> void walk(const Row<S, O>& row, const Walk& w) const {
    const auto inside = [&](int64_t u, int64_t k) { return w.column(u, k) >= 0 && w.column(u, k) < x_width(); };
    // Outputs that are summed together: those that miss no tap, or of a window one at the edge of the grid.
    const int64_t missing = w.taps == 3 && w.out_step == 2 && task.v1 * L <= p.C ? 1 : 0;
    const auto together = [&](int64_t u) { return w.taps == 0 || (inside(u, missing) && inside(u, w.taps - 1 - missing)); };
    const auto edge = [&](int64_t u) {
      int64_t k0 = 0, k1;
      while (k0 < w.taps && !inside(u, k0)) ++k0;
      for (k1 = k0; k1 < w.taps && inside(u, k1);) ++k1;
      tile<S, O>(row, w, u, 1, k0, k1);
    };
    int64_t u = 0, end = w.count;
    for (; u < end && !together(u); ++u) edge(u);
    while (end > u && !together(end - 1)) --end;
    const int64_t tiles = ceil_div(end - u, kWidest), first = u;
    for (int64_t t = 0; t < tiles; ++t) {  // even widths
      const int64_t next = first + (t + 1) * (end - first) / tiles;
      tile<S, O>(row, w, u, int(next - u), 0, w.taps);
      u = next;
    }
    for (; u < w.count; ++u) edge(u);
  }

  template <class S, class O> static SumOutputs<S, O> whole_vectors(int width, int64_t taps, int64_t out_step) {
    if (taps == 3 && out_step == 2) return window<S, O, 3, 2>(width);
    if (taps == 3 && out_step == 1) return window<S, O, 3, 1>(width);
    if (taps == 2 && out_step == 1) return window<S, O, 2, 1>(width);
    return any_taps<S, O, Vectors::whole>(width);
  }

  // Outputs [u, u + width) from their taps [k0, k1).
  template <class S, class O> void tile(const Row<S, O>& row, const Walk& w, int64_t u, int width, int64_t k0, int64_t k1) const {
    const int64_t taps = p.rows.K * p.columns.K, seen = k1 - k0, from = w.column(u, k0) * row.x_column, tap = (w.tap0 + k0 * w.tap_every) * L;
    const int64_t n = min64(p.C, L);
    Tile<S, O> tile{row.under, row.count, int(seen), 0, 0, w.out_step * row.x_column, row.x_column, w.tap_every * L, 0, L, p.m * taps * L,
                    (p.transpose ? 1 : p.m) * L, nullptr, nullptr, w.y_every * row.y_column, {}, n, w.column(u, k0) < 0,
                    w.column(u + width - 1, k1 - 1) >= x_width(), nullptr, 0, 0, 0, 0, 0};
    if (p.transpose) {
      tile.y_row = p.columns.size * row.y_column;
    } else if (row.ahead) {
      tile.ahead = row.ahead + from, tile.ahead_rows = min64(p.rows.K, p.rows.s), tile.ahead_row = p.columns.size * row.x_column;
      tile.ahead_columns = min64(p.columns.K, p.columns.s), tile.ahead_column = row.x_column;
    }
    const auto sum = [&](SumOutputs<S, O> sum, int64_t v, int64_t vectors) {
      const int64_t start = vector_start(p.C, L, v), slot = (v - task.v0) * L;
      tile.x_from = from + (row.x_planes ? slot : start), tile.w_from = v * tile.w_vector + tap, tile.vectors = vectors;
      tile.bias = row.bias ? row.bias + v * tile.bias_vector : nullptr;
      tile.y = row.y + (w.y0 + u * w.y_every) * row.y_column + (row.y_planes ? slot : start);
      sum(tile);
    };
    const bool last = task.v1 * L > p.C;  // is not whole
    if (task.v1 - last > task.v0) sum(whole_vectors<S, O>(width, seen, w.out_step), task.v0, task.v1 - last - task.v0);
    if (!last) return;
    tile.lanes = row.y_planes ? Lanes{0, 0, L} : Lanes::of<A>(p.C, task.v1 - 1);
    sum(any_taps<S, O, Vectors::last>(width), task.v1 - 1, 1);
  }
};

}  // namespace LIFEOPS_ISA
}  // namespace lifeops

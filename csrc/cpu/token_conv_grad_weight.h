// SPDX-License-Identifier: Apache-2.0
// Weight and bias gradient of one task of the strided convolution. Compiled once per instruction set (see vec.h).
//
// The outputs are cut into runs of rows and of columns that see the same taps; taps outside the grid are left out.
#pragma once
#include "token_conv.h"
#include "token_conv_planes.h"

namespace lifeops {
namespace LIFEOPS_ISA {

constexpr int kFilterTile = LIFEOPS_VEC_BYTES == 64 ? 16 : 12;  // sums held in registers
constexpr int kFilterSide = 4;                                  // their rows and columns, at most

// One vector of channels of a run of outputs. Strides in elements: of x from output to output and from tap to tap, of dy.
template <class S, class D> struct GradRun {
  const S* x;  // at tap (0, 0) of the first output
  int64_t x_row, x_column, tap_row, tap_column;
  const D* dy;
  int64_t dy_row, dy_column, rows, columns, n;  // n channels, where vectors are not whole
};
template <class S, class D, class A = typename AccOf<S>::type> using GradSum = void (*)(const GradRun<S, D>& run, A* sums, int64_t sums_row);

// sums[i, j] += sum of dy[r, q] * x[r, q, i, j] for kRows x kColumns taps.
template <class S, class D, int kRows, int kColumns, bool kWhole, class A = typename AccOf<S>::type>
void grad_sum(const GradRun<S, D>& run, A* sums, int64_t sums_row) {
  constexpr int L = Vec<A>::kLanes;
  const auto read = [&](const auto* p) { return kWhole ? load(p) : load_n(p, run.n); };
  vec_t<A> acc[kRows][kColumns];
#pragma GCC unroll 4
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < kColumns; ++j) acc[i][j] = load(sums + i * sums_row + j * L);
  for (int64_t r = 0; r < run.rows; ++r) {
    const D* dy = run.dy + r * run.dy_row;
    const S* x[kRows];
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) x[i] = run.x + r * run.x_row + i * run.tap_row;
    for (int64_t q = 0; q < run.columns; ++q, dy += run.dy_column) {
      const vec_t<A> g = read(dy);
#pragma GCC unroll 4
      for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
        for (int j = 0; j < kColumns; ++j) acc[i][j] += g * read(x[i] + j * run.tap_column);
        x[i] += run.x_column;
      }
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < kColumns; ++j) store(sums + i * sums_row + j * L, acc[i][j]);
}

template <class S, class D, int kRows = kFilterSide, int kColumns = kFilterSide> GradSum<S, D> grad_sum_of(int64_t rows, int64_t columns) {
  if constexpr (kColumns > 1)
    if (columns < kColumns) return grad_sum_of<S, D, kRows, kColumns - 1>(rows, columns);
  if constexpr (kRows > 1)
    if (rows < kRows || kRows * kColumns > kFilterTile) return grad_sum_of<S, D, kRows - 1, kColumns>(rows, columns);
  return grad_sum<S, D, kRows, kColumns, true>;
}

template <class T> struct TokenConvGradWeight {
  using A = typename AccOf<T>::type;
  using Params = TokenConvGradWeightParams;
  static constexpr int L = Vec<A>::kLanes;

  const Params& p;
  const TokenConvGradWeightTask& task;
  A *sums, *split, *token;

  // Output rows that are summed together, so that x stays in the second-level cache from vector to vector.
  static int64_t step_rows(const Params& p, int64_t vectors) {
    const int64_t row_bytes = p.rows.s * p.columns.size * vectors * L * int64_t(sizeof(T));
    return max64(1, min64(p.rows.out, kCacheBytes / 2 / max64(1, row_bytes)));
  }
  static int64_t planes_size(const Params& p, int64_t vectors) { return p.m * p.columns.out * vectors * L; }
  // With several coarse channels for one the dy of a step is split.
  static int64_t scratch(const Params& p, int64_t vectors) {
    if (p.m == 1) return 0;
    return (step_rows(p, vectors) * planes_size(p, vectors) + (vectors + 1) * p.m * L) * int64_t(sizeof(A));
  }
  int64_t size() const { return (p.rows.K * p.columns.K + 1) * L; }  // of a plane's sums

  static void run(const Params& p, const TokenConvGradWeightTask& task, void* scratch) {
    const int64_t vectors = task.v1 - task.v0;
    A* split = static_cast<A*>(scratch);
    A* token = p.m == 1 ? nullptr : split + step_rows(p, task.room) * planes_size(p, vectors);
    TokenConvGradWeight body{p, task, static_cast<A*>(task.partial), split, token};
    for (int64_t k = 0; k < vectors * p.m * body.size(); ++k) body.sums[k] = 0;
    for (int64_t unit = task.unit0; unit < task.unit1; ++unit) {
      const int64_t strip = unit % task.strips;
      body.add(unit / task.strips, strip * p.rows.out / task.strips, (strip + 1) * p.rows.out / task.strips);
    }
  }

  const T* dy_row(int64_t b, int64_t r) const {
    return static_cast<const T*>(p.dy) + b * p.dy_stride_b + r * p.columns.out * p.dy_stride_n;
  }

  void add(int64_t b, int64_t r0, int64_t r1) const {
    const int64_t most = step_rows(p, task.room);
    for (int64_t r = r0, end; r < r1; r = end) {
      const int64_t i0 = first_tap(p.rows, r), i1 = last_tap(p.rows, r);
      for (end = r + 1; end < min64(r1, r + most) && first_tap(p.rows, end) == i0 && last_tap(p.rows, end) == i1;) ++end;
      if (p.m == 1) {
        add_rows<T>(b, r, end, i0, i1, dy_row(b, r), p.columns.out * p.dy_stride_n, p.dy_stride_n, [&](int64_t v, int64_t) { return vector_start(p.C, L, v); });
        continue;
      }
      const int64_t row = planes_size(p, task.v1 - task.v0);
      for (int64_t k = r; k < end; ++k) split_row(dy_row(b, k), p.dy_stride_n, p.columns.out, p.C, p.m, task.v0, task.v1, token, split + (k - r) * row);
      add_rows<A>(b, r, end, i0, i1, split, row, (task.v1 - task.v0) * L,
                  [&](int64_t v, int64_t j) { return (j * p.columns.out * (task.v1 - task.v0) + v - task.v0) * L; });
    }
  }

  // Output rows [r, end), whose filter rows [i0, i1) lie inside; offset(v, j) to a vector of dy.
  template <class D, class Offset>
  void add_rows(int64_t b, int64_t r, int64_t end, int64_t i0, int64_t i1, const D* dy, int64_t dy_row, int64_t dy_column, Offset offset) const {
    const Axis &rows = p.rows, &columns = p.columns;
    const int64_t row = columns.size * p.x_stride_n, n = min64(p.C, L);
    const T* x = static_cast<const T*>(p.x) + b * p.x_stride_b + (window_start(rows, r) + i0) * row;
    GradRun<T, D> run{nullptr, rows.s * row, columns.s * p.x_stride_n, row, p.x_stride_n, nullptr, dy_row, dy_column, end - r, 0, n};
    for (int64_t q = 0, next; q < columns.out; q = next) {
      const bool inside = q >= first_inside(columns) && q < last_inside(columns);
      next = inside ? last_inside(columns) : q + 1, run.columns = next - q;
      const int64_t j0 = first_tap(columns, q), j1 = last_tap(columns, q);
      for (int64_t v = task.v0; v < task.v1; ++v)
        for (int64_t j = 0; j < p.m; ++j) {
          A* out = sums + ((v - task.v0) * p.m + j) * size();
          run.x = x + (window_start(columns, q) + j0) * p.x_stride_n + vector_start(p.C, L, v);
          run.dy = dy + q * dy_column + offset(v, j);
          add_taps(run, i1 - i0, j1 - j0, out + (i0 * columns.K + j0) * L);
          if (p.db) add_total(run, out + rows.K * columns.K * L);
        }
    }
  }

  // The first of `rows` x `columns` taps is at out.
  template <class D> void add_taps(GradRun<T, D> run, int64_t rows, int64_t columns, A* out) const {
    const int64_t out_row = p.columns.K * L;
    const T* x = run.x;
    for (int64_t j = 0; j < columns;) {
      const int64_t wide = p.C < L ? 1 : min64(columns - j, kFilterSide), high = p.C < L ? 1 : min64(kFilterSide, kFilterTile / wide);
      const int64_t runs = ceil_div(rows, high);
      for (int64_t k = 0; k < runs; ++k) {  // even shares
        const int64_t i = k * rows / runs, height = (k + 1) * rows / runs - i;
        run.x = x + i * run.tap_row + j * run.tap_column;
        const GradSum<T, D> sum = p.C < L ? grad_sum<T, D, 1, 1, false> : grad_sum_of<T, D>(height, wide);
        sum(run, out + i * out_row + j * L, out_row);
      }
      j += wide;
    }
  }

  template <class D> void add_total(const GradRun<T, D>& run, A* out) const {
    vec_t<A> total = load(out);
    for (int64_t r = 0; r < run.rows; ++r)
      for (int64_t q = 0; q < run.columns; ++q) total += load_n(run.dy + r * run.dy_row + q * run.dy_column, run.n);
    store(out, total);
  }
};

}  // namespace LIFEOPS_ISA
}  // namespace lifeops

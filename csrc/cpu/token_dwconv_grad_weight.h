// SPDX-License-Identifier: Apache-2.0
// Weight and bias gradient of one task. Compiled once per instruction set (see vec.h).
#pragma once
#include "rows.h"

namespace lifeops {
namespace LIFEOPS_ISA {

constexpr int kGradTile = LIFEOPS_VEC_BYTES == 64 ? 28 : 12;  // sums held in registers
constexpr int kNear = 6;  // columns of dy asked for into the first-level cache ahead of the sums: their tokens are far apart

// One vector of channels of a few output rows, and the input rows from the topmost tap down.
template <class A> struct GradRows {
  const A* dy;
  int64_t dy_row, dy_column, n;  // strides of dy in elements; n channels are left from this vector on
  const A* const* x;             // height + K - 1 rows, null outside the grid
  int64_t height, width;
  // For window sums: a row's total is that of the columns [core0, core1), each other column of each row has a place of its own.
  int64_t core0 = 0, core1 = 0;
  vec_t<A>* edges = nullptr;
  int64_t edge_columns() const { return core0 + width - core1; }
  vec_t<A>& edge(int64_t r, int64_t q) const { return edges[r * edge_columns() + (q < core0 ? q : q - core1 + core0)]; }
};

// One column's part of a row's sum.
template <class A> inline void add_column(const GradRows<A>& rows, int64_t r, int64_t q, vec_t<A> dy, vec_t<A>* total) {
  if (q >= rows.core0 && q < rows.core1) *total += dy;
  else rows.edge(r, q) = dy;
}

// acc[i, j] += dy[q] * x[i][q + j] for kColumns neighbouring columns, whose taps overlap: K + kColumns - 1 loads of x for a row.
template <class A, int K, int kRows, int kColumns>
inline __attribute__((always_inline)) void grad_columns(vec_t<A>* acc, const vec_t<A>* dy, const A* const* x, int64_t offset) {
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 16
    for (int k = 0; k < K + kColumns - 1; ++k) {
      const vec_t<A> value = in_register(load(x[i] + offset + k * Vec<A>::kLanes));
#pragma GCC unroll 4
      for (int c = 0; c < kColumns; ++c)
        if (k - c >= 0 && k - c < K) acc[i * K + k - c] += dy[c] * value;
    }
}

enum class Totals { none, all, core };

// Sums of dy[r, q] * x[r + i, q + j] for the filter rows i in [i0, i0 + kRows), and the sum of dy over each output row or over its core
// and the columns beside it.
template <class A, int K, int kRows, Totals kTotals> void grad_taps(const GradRows<A>& rows, int i0, A* sums, vec_t<A>* totals, Ahead* ahead) {
  constexpr int L = Vec<A>::kLanes;
  vec_t<A> acc[kRows * K];
#pragma GCC unroll 32
  for (int k = 0; k < kRows * K; ++k) acc[k] = load(sums + (i0 * K + k) * kBlock);
  Ahead next = *ahead;
  for (int64_t r = 0; r < rows.height; ++r) {
    const A* x[kRows];  // kept apart: base + q + constant is one address, (i * cols + j) is a register of its own
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) x[i] = rows.x[r + i0 + i];
    const A* dy = rows.dy + r * rows.dy_row;
    vec_t<A> total = {};
    int64_t q = 0;
    for (; q + 2 <= rows.width; q += 2, dy += 2 * rows.dy_column) {
      const vec_t<A> g[2] = {load_n(dy, rows.n), load_n(dy + rows.dy_column, rows.n)};
      __builtin_prefetch(dy + kNear * rows.dy_column), __builtin_prefetch(dy + (kNear + 1) * rows.dy_column);
      if (i0 == 0) next.fetch(), next.fetch();
      if (kTotals == Totals::all || (kTotals == Totals::core && q >= rows.core0 && q + 2 <= rows.core1)) total += g[0] + g[1];
      else if (kTotals == Totals::core) add_column(rows, r, q, g[0], &total), add_column(rows, r, q + 1, g[1], &total);
      grad_columns<A, K, kRows, 2>(acc, g, x, q * L);
    }
    if (q < rows.width) {
      const vec_t<A> g = load_n(dy, rows.n);
      if (i0 == 0) next.fetch();
      if (kTotals == Totals::all) total += g;
      else if (kTotals == Totals::core) add_column(rows, r, q, g, &total);
      grad_columns<A, K, kRows, 1>(acc, &g, x, q * L);
    }
    if constexpr (kTotals != Totals::none) totals[r] = total;
  }
  if (i0 == 0) *ahead = next;
#pragma GCC unroll 32
  for (int k = 0; k < kRows * K; ++k) store(sums + (i0 * K + k) * kBlock, acc[k]);
}

// All filter rows, as many at once as the registers hold, the totals with the fewest.
template <class A, int K> void grad_filter(const GradRows<A>& rows, A* sums, vec_t<A>* totals, Ahead* ahead) {
  constexpr int kRows = kGradTile / K < 1 ? 1 : (kGradTile / K > K ? K : kGradTile / K), kLast = (K - 1) % kRows + 1;
  for (int i = 0; i < K - kLast; i += kRows) grad_taps<A, K, kRows, Totals::none>(rows, i, sums, totals, ahead);
  if (rows.edges) return grad_taps<A, K, kLast, Totals::core>(rows, K - kLast, sums, totals, ahead);
  grad_taps<A, K, kLast, Totals::all>(rows, K - kLast, sums, totals, ahead);
}

template <class A> void grad_filter_any(int64_t K, const GradRows<A>& rows, A* sums, vec_t<A>* totals, Ahead* ahead) {
  switch (K) {
    case 1: return grad_filter<A, 1>(rows, sums, totals, ahead);
    case 3: return grad_filter<A, 3>(rows, sums, totals, ahead);
    case 5: return grad_filter<A, 5>(rows, sums, totals, ahead);
    case 7: return grad_filter<A, 7>(rows, sums, totals, ahead);
    case 9: return grad_filter<A, 9>(rows, sums, totals, ahead);
    case 11: return grad_filter<A, 11>(rows, sums, totals, ahead);
    case 13: return grad_filter<A, 13>(rows, sums, totals, ahead);
    default: return grad_filter<A, 15>(rows, sums, totals, ahead);
  }
}

// The totals alone.
template <class A> void grad_totals(const GradRows<A>& rows, vec_t<A>* totals) {
  for (int64_t r = 0; r < rows.height; ++r) {
    vec_t<A> total = {};
    for (int64_t q = 0; q < rows.width; ++q) {
      const vec_t<A> g = load_n(rows.dy + r * rows.dy_row + q * rows.dy_column, rows.n);
      if (rows.edges) add_column(rows, r, q, g, &total);
      else total += g;
    }
    totals[r] = total;
  }
}

// A step sums a few output rows at a time, so that the sums and the K input rows, which pass through a ring, are loaded once for all.
// dy is read where it is, unless it must be converted or is read more than once: then it is copied too, as it lies in memory.
template <class T> struct GradWeight {
  using Params = GradWeightParams;
  using A = typename AccOf<T>::type;
  static constexpr int L = Vec<A>::kLanes;
  // Columns of a step, at most, but for one row: many spare loads of the ring, but where a vector of channels passes through dy itself,
  // the first TLB should hold the pages.
  static constexpr int kLeastColumns = 32, kMostColumns = 96, kStepBytes = 96 * 1024;
  static constexpr int kStepRows = kMostColumns + kMaxKernel - 1;

  static int64_t width(const Params& p) { return min64(p.W, kSegment); }
  static int64_t columns(const Params& p) { return width(p) + p.K - 1; }
  static bool copies_dy(const Params& p) { return (p.K > 5 && p.dy_stride_n >= 256) || p.dtype == DType::f16 || p.dtype == DType::bf16; }
  static int64_t step_rows(const Params& p) {
    const int64_t fit = kStepBytes / max64(1, p.dy_stride_n * int64_t(sizeof(A)));
    const int64_t columns = copies_dy(p) ? kMostColumns : max64(kLeastColumns, min64(kMostColumns, fit));
    return max64(1, min64(p.H, columns / width(p)));
  }
  static int64_t ring_rows(const Params& p) { return step_rows(p) + p.K - 1; }
  // Elements per channel: the ring and a step's dy where it is copied.
  static int64_t ring_size(const Params& p) { return p.x ? ring_rows(p) * columns(p) : 0; }
  static int64_t step_size(const Params& p) { return copies_dy(p) ? step_rows(p) * width(p) : 0; }

  static int64_t channels(const Params& p) {
    const int64_t block_bytes = (ring_size(p) + step_size(p) + p.K * p.K) * kBlock * int64_t(sizeof(A)), blocks = ceil_div(p.C, kBlock);
    const int64_t tasks = ceil_div(blocks, max64(1, kGradRingBytes / block_bytes));
    return ceil_div(blocks, tasks) * kBlock;  // even shares
  }
  static int64_t scratch(const Params& p) {
    return ((ring_size(p) + step_size(p)) * channels(p) + columns(p) * L) * int64_t(sizeof(A));
  }

  // Output rows [r0, r1) and columns [q0, q1) of image b.
  struct Unit {
    int64_t b, r0, r1, q0, q1;
    Unit(const Params& p, const GradWeightTask& task, int64_t index) : b(index / (task.strips * task.segments)) {
      const int64_t strip = index / task.segments % task.strips, segment = index % task.segments;
      r0 = strip * p.H / task.strips, r1 = (strip + 1) * p.H / task.strips;
      q0 = segment * p.W / task.segments, q1 = (segment + 1) * p.W / task.segments;
    }
  };

  const Params& p;
  const GradWeightTask& task;
  const int64_t n, half;
  A *zeros, *step_dy, *ring, *sums;  // [column][lane], twice [row][vector][column][lane], [block][tap][channel]

  GradWeight(const Params& params, const GradWeightTask& t, A* scratch)
      : p(params), task(t), n(t.c1 - t.c0), half(params.K / 2), zeros(scratch),
        step_dy(zeros + columns(params) * L), ring(step_dy + step_size(params) * channels(params)), sums(static_cast<A*>(t.partial)) {}

  static void run(const Params& p, const GradWeightTask& task, void* scratch) {
    GradWeight body(p, task, static_cast<A*>(scratch));
    for (int64_t k = 0; k < columns(p) * L; ++k) body.zeros[k] = 0;
    for (int64_t k = 0; k < ceil_div(body.n, kBlock) * grad_weight_rows(p) * kBlock; ++k) body.sums[k] = 0;
    const int64_t units = p.B * task.strips * task.segments;
    for (int64_t index = task.unit0; index < task.unit1; ++index) {
      const Unit unit(p, task, index), next(p, task, min64(index + 1, units - 1));  // maybe the next task's
      body.add(unit, next);
    }
  }

  const T* x_at(int64_t b, int64_t row, int64_t column) const {
    return static_cast<const T*>(p.x) + b * p.x_stride_b + (p.x_prefix + row * p.W + column) * p.x_stride_n + task.c0;
  }
  const T* dy_at(int64_t b, int64_t row, int64_t column) const {
    return static_cast<const T*>(p.dy) + b * p.dy_stride_b + (p.dy_prefix + row * p.W + column) * p.dy_stride_n + task.c0;
  }
  A* ring_row(const Unit& unit, int64_t row) const {
    return ring + int32_t(row) % int32_t(ring_rows(p)) * (unit.q1 - unit.q0 + p.K - 1) * ceil_div(n, L) * L;
  }
  void load_x(const Unit& unit, int64_t row0, int64_t row1) const {
    const int64_t cols = unit.q1 - unit.q0 + p.K - 1;
    for (int64_t row = max64(0, row0); row < min64(p.H, row1); ++row) {
      const T* x = x_at(unit.b, row, 0);
      A* out = ring_row(unit, row);
      if (task.prologue) load_row_through<T>(*task.prologue, task.c0, x, p.x_stride_n, p.W, unit.q0 - half, unit.q1 + half, n, out, cols * L);
      else load_row<T>(x, p.x_stride_n, p.W, unit.q0 - half, unit.q1 + half, n, out, cols * L);
    }
  }

  GradRows<A> in_place(const Unit& unit, int64_t r) const {
    if constexpr (sizeof(T) != sizeof(A)) return {};
    else return {dy_at(unit.b, r, unit.q0), p.W * p.dy_stride_n, p.dy_stride_n, n, nullptr, 0, 0};
  }
  GradRows<A> copied(const Unit& unit, int64_t r, int64_t end) const {
    const int64_t width = unit.q1 - unit.q0, row_size = ceil_div(n, L) * width * L;
    for (int64_t row = r; row < end; ++row)
      load_row<T>(dy_at(unit.b, row, 0), p.dy_stride_n, p.W, unit.q0, unit.q1, n, step_dy + (row - r) * row_size, width * L);
    return {step_dy, row_size, L, L, nullptr, 0, 0};
  }

  void add(const Unit& unit, const Unit& next) const {
    const int64_t step = step_rows(p);
    if (p.x) load_x(unit, unit.r0 - half, unit.r0 + half);
    for (int64_t r = unit.r0; r < unit.r1; r += step) {
      const int64_t end = min64(unit.r1, r + step), width = unit.q1 - unit.q0;
      if (p.x) load_x(unit, r + half, end + half);
      const GradRows<A> dy = copies_dy(p) ? copied(unit, r, end) : in_place(unit, r);
      const A* x[kStepRows];  // once a step: a division costs as much as two columns
      if (p.x)
        for (int64_t row = r - half; row < end + half; ++row) x[row - r + half] = row >= 0 && row < p.H ? ring_row(unit, row) : nullptr;
      Ahead ahead = end < unit.r1 ? look_ahead(unit, end, end + half) : look_ahead(next, next.r0, next.r0 - half);
      for (int64_t c = 0; c < n; c += L) {
        const bool own = copies_dy(p);
        const A* from = dy.dy + (own ? c * width : c);
        add_vector({from, dy.dy_row, dy.dy_column, own ? int64_t(L) : n - c, x, end - r, width}, c, r, unit.q0, &ahead);
      }
    }
  }

  Ahead look_ahead(const Unit& unit, int64_t dy_row, int64_t x_row) const {
    const T* dy = dy_at(unit.b, dy_row, unit.q0);
    if (!p.x) return Ahead(dy, p.dy_stride_n, dy, p.dy_stride_n, n, L);
    return Ahead(x_at(unit.b, min64(p.H - 1, max64(0, x_row)), unit.q0), p.x_stride_n, dy, p.dy_stride_n, n, L);
  }

  // The output rows start at (r0, q0).
  void add_vector(GradRows<A> rows, int64_t c, int64_t r0, int64_t q0, Ahead* ahead) const {
    const int64_t taps = p.K * p.K, cols = rows.width + p.K - 1;
    A* out = sums + c / kBlock * kBlock * grad_weight_rows(p) + c % kBlock;
    vec_t<A> totals[kStepRows], edges[kMostColumns];  // a step has no more columns, or it is one row
    static_assert(kMostColumns >= kMaxKernel - 1);
    if (p.windows) rows.edges = edges, set_core(rows, q0);
    if (p.x) {
      const A* x[kStepRows];
      for (int64_t i = 0; i < rows.height + p.K - 1; ++i) x[i] = rows.x[i] ? rows.x[i] + c * cols : zeros;
      rows.x = x;
      grad_filter_any<A>(p.K, rows, out, totals, ahead);
    } else {
      grad_totals(rows, totals);
    }
    if (p.db) {
      vec_t<A> sum = sum_rows(totals, 0, rows.height);
      if (rows.edges) sum += sum_rows(edges, 0, rows.height * rows.edge_columns());
      add_to(out + taps * kBlock, sum);
    }
    if (p.windows) sum_windows(rows, totals, r0, q0, out + (taps + 1) * kBlock);
  }

  static vec_t<A> sum_rows(const vec_t<A>* totals, int64_t r0, int64_t r1) {
    vec_t<A> sum = {};
    for (int64_t r = r0; r < r1; ++r) sum += totals[r];
    return sum;
  }
  static void add_to(A* out, vec_t<A> sum) { store(out, load(out) + sum); }

  // The columns that tap column j sees: [first, last).
  int64_t first(const GradRows<A>& rows, int64_t q0, int64_t j) const { return min64(rows.width, max64(0, half - j - q0)); }
  int64_t last(const GradRows<A>& rows, int64_t q0, int64_t j) const {
    return max64(first(rows, q0, j), min64(rows.width, p.W + half - j - q0));
  }
  // Those that every tap sees; none where the filter is wider than the grid.
  void set_core(GradRows<A>& rows, int64_t q0) const {
    rows.core0 = first(rows, q0, 0), rows.core1 = max64(rows.core0, last(rows, q0, p.K - 1));  // both fall with j
  }

  // Each dy counts for the taps that see the grid from there: all but those that reach over its edge. Neighbouring rows whose windows
  // lie inside the grid from top to bottom are summed together, and so are the columns that every tap sees. Nothing is taken off a total:
  // an outlier, or an infinity, reaches the taps that see it and no other.
  void sum_windows(const GradRows<A>& rows, const vec_t<A>* totals, int64_t r0, int64_t q0, A* out) const {
    const auto inside = [&](int64_t row) { return row >= half && row + half < p.H; };
    vec_t<A> edges[kMaxKernel - 1];  // of the rows that are summed together
    for (int64_t r = 0, end; r < rows.height; r = end) {
      for (end = r + 1; inside(r0 + r) && end < rows.height && inside(r0 + end);) ++end;
      const vec_t<A> core = sum_rows(totals, r, end);
      for (int64_t k = 0; k < rows.edge_columns(); ++k) {
        edges[k] = rows.edges[r * rows.edge_columns() + k];
        for (int64_t row = r + 1; row < end; ++row) edges[k] += rows.edges[row * rows.edge_columns() + k];
      }
      for (int64_t j = 0; j < p.K; ++j) {
        vec_t<A> sum = core;
        const int64_t q1 = last(rows, q0, j);
        for (int64_t q = first(rows, q0, j); q < q1; ++q)
          if (q < rows.core0) sum += edges[q];
          else if (q >= rows.core1) sum += edges[rows.core0 + q - rows.core1];
          else q = rows.core1 - 1;
        add_window_row(sum, r0 + r, j, out);
      }
    }
  }
  void add_window_row(vec_t<A> sum, int64_t row, int64_t j, A* out) const {
    if (row >= half && row + half < p.H) return add_to(out + j * kBlock, sum);
    A* taps = out + (p.K + j) * kBlock;
    for (int64_t i = max64(0, half - row); i < min64(p.K, p.H + half - row); ++i) add_to(taps + i * p.K * kBlock, sum);
  }
};

}  // namespace LIFEOPS_ISA
}  // namespace lifeops

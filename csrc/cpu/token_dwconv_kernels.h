// SPDX-License-Identifier: Apache-2.0
// Forward / input gradient and weight gradient of one task. Compiled once per instruction set (see vec.h).
//
// Each input row is read once, converted once and written to a zero-padded ring of K rows [vector][column][lane]: compact, so
// that channel strides such as 4096 bytes cannot collide in L1, and free of column masks. The convolution then reads one ring
// vector per multiply-add, which two loads a cycle keep up with.
#pragma once
#include "token_dwconv.h"
#include "vec.h"

namespace lifeops {
namespace LIFEOPS_ISA {

// Accumulators held in registers: 16 of 32 with AVX-512, 12 of 16 elsewhere; the rest holds the weights and the operands.
constexpr int kTile = LIFEOPS_VEC_BYTES == 64 ? 16 : 12;
constexpr int kGradTile = LIFEOPS_VEC_BYTES == 64 ? 28 : 12;

template <class A> constexpr int64_t vectors() { return kBlock / Vec<A>::kLanes; }

// Tokens of one grid row, columns [q0, q1) of which those outside [0, W) become zeros, channels `n` of a block.
template <class T, class A = typename AccOf<T>::type>
void load_row(const T* row, int64_t stride_n, int64_t W, int64_t q0, int64_t q1, int64_t n, A* out, int64_t vector_stride) {
  constexpr int L = Vec<A>::kLanes;
  const vec_t<A> zero = {};
  for (int64_t q = q0; q < q1; ++q, out += L) {
    if (q < 0 || q >= W) {
      for (int64_t v = 0; v * L < n; ++v) store(out + v * vector_stride, zero);
      continue;
    }
    const T* token = row + q * stride_n;
    for (int64_t v = 0; v * L < n; ++v) store(out + v * vector_stride, load_n(token + v * L, n - v * L));
  }
}

// The lines that are wanted next, asked for one by one between the sums, in the order they lie in memory: the run of one token, then
// the next token. Asked for vector by vector instead, every request of a wide token is another page; asked for in one burst they fill
// the line buffers and the core waits.
struct Ahead {
  const char *a, *b;
  int64_t step, run, left;  // bytes per request; requests per token, and how many of this token are left
  int64_t a_skip, b_skip;   // bytes from the end of a token's run to the start of the next

  // Strides in elements of T, whose vectors have `lanes` elements; n channels.
  template <class T> Ahead(const T* first, int64_t stride, const T* second, int64_t second_stride, int64_t n, int64_t lanes)
      : a(reinterpret_cast<const char*>(first)), b(reinterpret_cast<const char*>(second)), step(lanes * int64_t(sizeof(T))),
        run(ceil_div(n, lanes)), left(run), a_skip((stride - run * lanes) * int64_t(sizeof(T))),
        b_skip((second_stride - run * lanes) * int64_t(sizeof(T))) {}

  template <bool kWrite = false> inline __attribute__((always_inline)) void fetch() {
    __builtin_prefetch(a, 0, 2);
    __builtin_prefetch(b, kWrite, 2);
    a += step, b += step;
    if (--left == 0) left = run, a += a_skip, b += b_skip;
  }
};

// Where one vector of channels of a tile goes.
template <class T> struct TileTarget {
  T* y;
  const T* residual;
  int64_t y_stride, r_stride;  // from token to token
  int64_t y_row, r_row;        // from row to row
  int64_t n;                   // channels left from this vector on
};

// acc[t] += sum over one filter row of tap * x[t + j]; `add_two` does it for two output rows, which share every load of x.
template <int kWidth, class A>
inline __attribute__((always_inline)) void add_one(vec_t<A>* acc, const A* x, const A* w, int K) {
  for (int j = 0; j < K; ++j, x += Vec<A>::kLanes, w += kBlock) {
    const vec_t<A> tap = load(w);
#pragma GCC unroll 16
    for (int t = 0; t < kWidth; ++t) acc[t] += tap * load(x + t * Vec<A>::kLanes);
  }
}
template <int kWidth, class A>
inline __attribute__((always_inline)) void add_two(vec_t<A>* acc, vec_t<A>* below, const A* x, const A* w, const A* w_below, int K) {
  for (int j = 0; j < K; ++j, x += Vec<A>::kLanes, w += kBlock, w_below += kBlock) {
    const vec_t<A> tap = load(w), tap_below = load(w_below);
#pragma GCC unroll 16
    for (int t = 0; t < kWidth; ++t) {
      const vec_t<A> value = load(x + t * Vec<A>::kLanes);
      acc[t] += tap * value;
      below[t] += tap_below * value;
    }
  }
}

template <class T, int kWidth, class A = typename AccOf<T>::type>
inline __attribute__((always_inline)) void store_tile_row(const vec_t<A>* acc, int64_t row, const TileTarget<T>& out, Ahead* ahead) {
  Ahead next = *ahead;
#pragma GCC unroll 16
  for (int t = 0; t < kWidth; ++t) {
    vec_t<A> value = acc[t];
    if (out.residual) value += load_n(out.residual + row * out.r_row + t * out.r_stride, out.n);
    store_n(out.y + row * out.y_row + t * out.y_stride, value, out.n);
    next.fetch<true>();
  }
  *ahead = next;
}

// kRows (1 or 2) x kWidth neighbouring outputs of one vector of channels, from the input rows [k0, k1) of K + kRows - 1.
template <class T, int kRows, int kWidth, class A = typename AccOf<T>::type>
void conv_tile(const A* const* rows, int k0, int k1, const A* weight, int K, vec_t<A> bias, const TileTarget<T>& out,
               Ahead* ahead) {
  vec_t<A> acc[kRows][kWidth];
#pragma GCC unroll 2
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 16
    for (int t = 0; t < kWidth; ++t) acc[r][t] = bias;
  for (int k = k0; k < k1; ++k) {
    const A* w = weight + k * K * kBlock;
    if (kRows == 1 || k == 0) add_one<kWidth, A>(acc[0], rows[k], w, K);
    else if (k == K) add_one<kWidth, A>(acc[kRows - 1], rows[k], w - K * kBlock, K);
    else add_two<kWidth, A>(acc[0], acc[kRows - 1], rows[k], w, w - K * kBlock, K);
  }
#pragma GCC unroll 2
  for (int r = 0; r < kRows; ++r) store_tile_row<T, kWidth>(acc[r], r, out, ahead);
}

template <class T> using ConvTile = void (*)(const typename AccOf<T>::type* const*, int, int, const typename AccOf<T>::type*, int,
                                             vec_t<typename AccOf<T>::type>, const TileTarget<T>&, Ahead*);

// table[width - 1]
template <class T, int kRows, int... kWidths> struct ConvTiles {
  static constexpr ConvTile<T> table[] = {conv_tile<T, kRows, kWidths + 1>...};
};
template <class T, int kRows, int n, int... rest> struct MakeTiles : MakeTiles<T, kRows, n - 1, n - 1, rest...> {};
template <class T, int kRows, int... rest> struct MakeTiles<T, kRows, 0, rest...> { using type = ConvTiles<T, kRows, rest...>; };

template <class T> void copy_prefix(const TokenDWConvParams& p, const ForwardTask& task, int64_t n) {
  using A = typename AccOf<T>::type;
  constexpr int L = Vec<A>::kLanes;
  const T* x = static_cast<const T*>(p.x) + task.b * p.x_stride_b + task.c0;
  T* y = static_cast<T*>(p.y) + task.b * p.y_stride_b + task.c0;
  const T* r = p.residual ? static_cast<const T*>(p.residual) + task.b * p.r_stride_b + task.c0 : nullptr;
  const vec_t<A> zero = {};
  for (int64_t t = 0; t < p.y_prefix; ++t) {
    for (int64_t c = 0; c < n; c += L) {
      vec_t<A> value = p.prefix == Prefix::copy ? load_n(x + t * p.x_stride_n + c, n - c) : zero;
      if (r) value += load_n(r + t * p.r_stride_n + c, n - c);
      store_n(y + t * p.y_stride_n + c, value, n - c);
    }
  }
}

// Two output rows at a time, so that every input row is loaded (K + 1) / 2 times, not K; one where two rows of whole tokens, the two
// that are asked for next and the ring do not fit the second-level cache together.
template <class T> struct Forward {
  using A = typename AccOf<T>::type;
  static constexpr int L = Vec<A>::kLanes;

  static int64_t columns(const TokenDWConvParams& p) { return min64(p.W, kSegment) + p.K - 1; }
  static int64_t step(const TokenDWConvParams& p) {
    return ((p.K + 1) * columns(p) + 6 * min64(p.W, kSegment)) * p.C * int64_t(sizeof(A)) <= kCacheBytes ? 2 : 1;
  }
  static int64_t ring_rows(const TokenDWConvParams& p) { return p.K + step(p) - 1; }

  // Channels of a task: as many blocks as the ring may hold, so that tokens are read and written in long runs.
  static int64_t channels(const TokenDWConvParams& p) {
    const int64_t block_bytes = ring_rows(p) * columns(p) * kBlock * int64_t(sizeof(A)), blocks = ceil_div(p.C, kBlock);
    const int64_t tasks = ceil_div(blocks, max64(1, kRingBytes / block_bytes));
    return ceil_div(blocks, tasks) * kBlock;  // even shares
  }
  static int64_t scratch(const TokenDWConvParams& p) { return ring_rows(p) * columns(p) * channels(p) * int64_t(sizeof(A)); }

  static void run(const TokenDWConvParams& p, const void* weight, const void* bias, const ForwardTask& task, void* scratch) {
    const int64_t n = task.c1 - task.c0;
    if (task.prefix_rows) copy_prefix<T>(p, task, n);
    const int half = p.K / 2;
    const int64_t cols = task.q1 - task.q0 + p.K - 1, row_size = cols * ceil_div(n, L) * L;
    A* ring = static_cast<A*>(scratch);
    const T* x = static_cast<const T*>(p.x) + task.b * p.x_stride_b + p.x_prefix * p.x_stride_n + task.c0;
    const auto ring_row = [&](int64_t row) { return ring + int32_t(row) % int32_t(ring_rows(p)) * row_size; };
    const auto fetch = [&](int64_t row0, int64_t row1) {
      for (int64_t row = max64(0, row0); row < min64(p.H, row1); ++row)
        load_row<T>(x + row * p.W * p.x_stride_n, p.x_stride_n, p.W, task.q0 - half, task.q1 + half, n, ring_row(row), cols * L);
    };
    const A* w = static_cast<const A*>(weight) + task.c0 * p.K * p.K;
    const A* b = bias ? static_cast<const A*>(bias) + task.c0 : nullptr;
    const int most = int(step(p));
    const Tiling tiling(int(task.q1 - task.q0), kTile / most);
    fetch(task.r0 - half, task.r0 + half);
    for (int64_t r = task.r0; r < task.r1; r += most) {
      const int height = int(min64(most, task.r1 - r));
      fetch(r + half, r + half + height);
      const int k0 = int(max64(0, half - r)), k1 = int(min64(p.K + height - 1, p.H + half - r));
      const A* rows[kMaxKernel + 1];
      for (int k = k0; k < k1; ++k) rows[k] = ring_row(r + k - half);
      output_rows(p, task, tiling, r, height, rows, k0, k1, cols, w, b, n);
    }
  }

  // Columns cut into even tiles, at most `widest` wide. Made once a task: a 64-bit division costs as much as ten tiles' taps.
  struct Tiling {
    int count, start[kSegment / (kTile / 2) + 2];
    Tiling(int width, int widest) : count((width + widest - 1) / widest) {
      for (int tile = 0; tile <= count; ++tile) start[tile] = tile * width / count;
    }
  };

  static void output_rows(const TokenDWConvParams& p, const ForwardTask& task, const Tiling& tiling, int64_t r, int height,
                          const A* const* rows, int k0, int k1, int64_t cols, const A* w, const A* b, int64_t n) {
    const ConvTile<T>* tiles = height == 1 ? MakeTiles<T, 1, kTile>::type::table : MakeTiles<T, 2, kTile / 2>::type::table;
    const int64_t token = r * p.W + task.q0 + p.y_prefix;
    T* y = static_cast<T*>(p.y) + task.b * p.y_stride_b + token * p.y_stride_n + task.c0;
    const T* x_next = static_cast<const T*>(p.x) + task.b * p.x_stride_b + task.c0 +
                      (min64(r + p.K / 2 + height, p.H - 1) * p.W + task.q0 + p.x_prefix) * p.x_stride_n;
    Ahead ahead(x_next, p.x_stride_n, static_cast<const T*>(r + height < task.r1 ? y + height * p.W * p.y_stride_n : y), p.y_stride_n, n, L);
    const T* res = p.residual ? static_cast<const T*>(p.residual) + task.b * p.r_stride_b + token * p.r_stride_n + task.c0 : nullptr;
    for (int tile = 0; tile < tiling.count; ++tile) {  // outermost: 32 columns of three tensors are more pages than the first TLB holds
      const int64_t t0 = tiling.start[tile], t1 = tiling.start[tile + 1];
      for (int64_t c = 0, v = 0; c < n; c += L, ++v) {
        const vec_t<A> start = b ? load(b + c) : vec_t<A>{};
        const A* taps = w + c / kBlock * kBlock * p.K * p.K + c % kBlock;
        const A* tile_rows[kMaxKernel + 1];
        for (int k = k0; k < k1; ++k) tile_rows[k] = rows[k] + (v * cols + t0) * L;
        const TileTarget<T> out{y + t0 * p.y_stride_n + c, res ? res + t0 * p.r_stride_n + c : nullptr, p.y_stride_n,
                                p.r_stride_n, p.W * p.y_stride_n, p.W * p.r_stride_n, n - c};
        tiles[t1 - t0 - 1](tile_rows, k0, k1, taps, p.K, start, out, &ahead);
      }
    }
  }
};

// One vector of channels of a few output rows: dy in place, and the input rows from the topmost tap down.
template <class T, class A = typename AccOf<T>::type> struct GradRows {
  const T* dy;
  int64_t dy_row, dy_column, n;  // strides of dy in elements; n channels are left from this vector on
  const A* const* x;             // height + K - 1 rows, null outside the grid
  int64_t height, width;
};

// acc[i, j] += dy[q] * x[i][q + j] for kColumns neighbouring columns, whose taps overlap: K + kColumns - 1 loads of x for a row.
template <class A, int K, int kRows, int kColumns>
inline __attribute__((always_inline)) void grad_columns(vec_t<A>* acc, const vec_t<A>* dy, const A* const* x, int64_t offset) {
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 16
    for (int k = 0; k < K + kColumns - 1; ++k) {
      const vec_t<A> value = load(x[i] + offset + k * Vec<A>::kLanes);
#pragma GCC unroll 4
      for (int c = 0; c < kColumns; ++c)
        if (k - c >= 0 && k - c < K) acc[i * K + k - c] += dy[c] * value;
    }
}

// Sums of dy[r, q] * x[r + i, q + j] for the filter rows i in [i0, i0 + kRows).
template <class T, int K, int kRows, class A = typename AccOf<T>::type>
void grad_taps(const GradRows<T>& rows, int i0, A* sums, Ahead* ahead) {
  constexpr int L = Vec<A>::kLanes;
  vec_t<A> acc[kRows * K];
#pragma GCC unroll 32
  for (int k = 0; k < kRows * K; ++k) acc[k] = load(sums + (i0 * K + k) * kBlock);
  Ahead next = *ahead;
  for (int64_t r = 0; r < rows.height; ++r) {
    const A* x[kRows];  // kept apart: base + q + constant is one address, (i * cols + j) is a register of its own
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) x[i] = rows.x[r + i0 + i];
    const T* dy = rows.dy + r * rows.dy_row;
    int64_t q = 0;
    for (; q + 2 <= rows.width; q += 2, dy += 2 * rows.dy_column) {
      const vec_t<A> g[2] = {load_n(dy, rows.n), load_n(dy + rows.dy_column, rows.n)};
      if (i0 == 0) next.fetch(), next.fetch();
      grad_columns<A, K, kRows, 2>(acc, g, x, q * L);
    }
    if (q < rows.width) {
      const vec_t<A> g = load_n(dy, rows.n);
      if (i0 == 0) next.fetch();
      grad_columns<A, K, kRows, 1>(acc, &g, x, q * L);
    }
  }
  if (i0 == 0) *ahead = next;
#pragma GCC unroll 32
  for (int k = 0; k < kRows * K; ++k) store(sums + (i0 * K + k) * kBlock, acc[k]);
}

// All filter rows, as many at once as the registers hold.
template <class T, int K, class A = typename AccOf<T>::type> void grad_filter(const GradRows<T>& rows, A* sums, Ahead* ahead) {
  constexpr int kRows = kGradTile / K < 1 ? 1 : (kGradTile / K > K ? K : kGradTile / K), kRest = K % kRows, kWhole = K - kRest;
  for (int i = 0; i < kWhole; i += kRows) grad_taps<T, K, kRows>(rows, i, sums, ahead);
  if constexpr (kRest > 0) grad_taps<T, K, kRest>(rows, kWhole, sums, ahead);
}

template <class T, class A = typename AccOf<T>::type> void grad_filter_any(int64_t K, const GradRows<T>& rows, A* sums, Ahead* ahead) {
  switch (K) {
    case 1: return grad_filter<T, 1>(rows, sums, ahead);
    case 3: return grad_filter<T, 3>(rows, sums, ahead);
    case 5: return grad_filter<T, 5>(rows, sums, ahead);
    case 7: return grad_filter<T, 7>(rows, sums, ahead);
    case 9: return grad_filter<T, 9>(rows, sums, ahead);
    case 11: return grad_filter<T, 11>(rows, sums, ahead);
    case 13: return grad_filter<T, 13>(rows, sums, ahead);
    default: return grad_filter<T, 15>(rows, sums, ahead);
  }
}

// A step sums a few output rows at a time, so that the sums and the K input rows, which pass through a ring, are loaded once for all.
template <class T> struct GradWeight {
  using Params = TokenDWConvGradWeightParams;
  using A = typename AccOf<T>::type;
  static constexpr int L = Vec<A>::kLanes;
  static constexpr int kStepColumns = 32;  // of a step, at least, where the grid has them
  static constexpr int kStepRows = kStepColumns + kMaxKernel - 1;

  static int64_t width(const Params& p) { return min64(p.W, kSegment); }
  static int64_t columns(const Params& p) { return width(p) + p.K - 1; }
  static int64_t step_rows(const Params& p) { return min64(p.H, ceil_div(kStepColumns, width(p))); }
  static int64_t ring_rows(const Params& p) { return step_rows(p) + p.K - 1; }
  static int64_t ring_size(const Params& p) { return p.x ? ring_rows(p) * columns(p) : 0; }  // elements per channel

  static int64_t channels(const Params& p) {
    const int64_t block_bytes = (ring_size(p) + p.K * p.K) * kBlock * int64_t(sizeof(A)), blocks = ceil_div(p.C, kBlock);
    const int64_t tasks = ceil_div(blocks, max64(1, kGradRingBytes / block_bytes));
    return ceil_div(blocks, tasks) * kBlock;  // even shares
  }
  static int64_t scratch(const Params& p) {
    return (ring_size(p) * channels(p) + columns(p) * L) * int64_t(sizeof(A));
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
  A *zeros, *ring, *sums;  // [column][lane], [row][vector][column][lane], [block][tap][channel]

  GradWeight(const Params& params, const GradWeightTask& t, A* scratch)
      : p(params), task(t), n(t.c1 - t.c0), half(params.K / 2), zeros(scratch), ring(zeros + columns(params) * L), sums(static_cast<A*>(t.partial)) {}

  static void run(const Params& p, const GradWeightTask& task, void* scratch) {
    GradWeight body(p, task, static_cast<A*>(scratch));
    for (int64_t k = 0; k < columns(p) * L; ++k) body.zeros[k] = 0;
    for (int64_t k = 0; k < ceil_div(body.n, kBlock) * (p.K * p.K + 1) * kBlock; ++k) body.sums[k] = 0;
    for (int64_t index = task.unit0; index < task.unit1; ++index) {
      const Unit unit(p, task, index), next(p, task, min64(index + 1, task.unit1 - 1));
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
    for (int64_t row = max64(0, row0); row < min64(p.H, row1); ++row)
      load_row<T>(x_at(unit.b, row, 0), p.x_stride_n, p.W, unit.q0 - half, unit.q1 + half, n, ring_row(unit, row), cols * L);
  }

  void add(const Unit& unit, const Unit& next) const {
    const int64_t step = step_rows(p);
    if (p.x) load_x(unit, unit.r0 - half, unit.r0 + half);
    for (int64_t r = unit.r0; r < unit.r1; r += step) {
      const int64_t end = min64(unit.r1, r + step), width = unit.q1 - unit.q0;
      if (p.x) load_x(unit, r + half, end + half);
      const A* x[kStepRows];  // once a step: a division costs as much as two columns
      if (p.x)
        for (int64_t row = r - half; row < end + half; ++row) x[row - r + half] = row >= 0 && row < p.H ? ring_row(unit, row) : nullptr;
      Ahead ahead = end < unit.r1 ? look_ahead(unit, end, end + half) : look_ahead(next, next.r0, next.r0 - half);
      for (int64_t c = 0; c < n; c += L) add_vector(GradRows<T>{dy_at(unit.b, r, unit.q0) + c, p.W * p.dy_stride_n, p.dy_stride_n, n - c, x, end - r, width}, c, &ahead);
    }
  }

  Ahead look_ahead(const Unit& unit, int64_t dy_row, int64_t x_row) const {
    const T* dy = dy_at(unit.b, dy_row, unit.q0);
    if (!p.x) return Ahead(dy, p.dy_stride_n, dy, p.dy_stride_n, n, L);
    return Ahead(x_at(unit.b, min64(p.H - 1, max64(0, x_row)), unit.q0), p.x_stride_n, dy, p.dy_stride_n, n, L);
  }

  void add_vector(GradRows<T> rows, int64_t c, Ahead* ahead) const {
    const int64_t taps = p.K * p.K, cols = rows.width + p.K - 1;
    A* out = sums + c / kBlock * kBlock * (taps + 1) + c % kBlock;
    if (p.db) sum_rows(rows, out + taps * kBlock);
    if (!p.x) return;
    const A* x[kStepRows];
    for (int64_t i = 0; i < rows.height + p.K - 1; ++i) x[i] = rows.x[i] ? rows.x[i] + c * cols : zeros;
    rows.x = x;
    grad_filter_any<T>(p.K, rows, out, ahead);
  }

  static void sum_rows(const GradRows<T>& rows, A* out) {
    vec_t<A> total = load(out);
    for (int64_t r = 0; r < rows.height; ++r)
      for (int64_t q = 0; q < rows.width; ++q) total += load_n(rows.dy + r * rows.dy_row + q * rows.dy_column, rows.n);
    store(out, total);
  }
};

template <template <class> class Body, class Params, class... Args> auto dispatch(const Params& p, Args... args) {
  switch (p.dtype) {
    case DType::f64: return Body<double>::run(p, args...);
    case DType::f32: return Body<float>::run(p, args...);
    case DType::f16: return Body<f16>::run(p, args...);
    default: return Body<bf16>::run(p, args...);
  }
}

inline void forward(const TokenDWConvParams& p, const void* weight, const void* bias, const ForwardTask& task, void* scratch) {
  dispatch<Forward>(p, weight, bias, task, scratch);
}
inline int64_t forward_scratch(const TokenDWConvParams& p) {
  return p.dtype == DType::f64 ? Forward<double>::scratch(p) : Forward<float>::scratch(p);
}
inline int64_t forward_channels(const TokenDWConvParams& p) {
  return p.dtype == DType::f64 ? Forward<double>::channels(p) : Forward<float>::channels(p);
}
inline void grad_weight(const TokenDWConvGradWeightParams& p, const GradWeightTask& task, void* scratch) {
  dispatch<GradWeight>(p, task, scratch);
}
inline int64_t grad_weight_scratch(const TokenDWConvGradWeightParams& p) {
  return p.dtype == DType::f64 ? GradWeight<double>::scratch(p) : GradWeight<float>::scratch(p);
}
inline int64_t grad_weight_channels(const TokenDWConvGradWeightParams& p) {
  return p.dtype == DType::f64 ? GradWeight<double>::channels(p) : GradWeight<float>::channels(p);
}

}  // namespace LIFEOPS_ISA
}  // namespace lifeops

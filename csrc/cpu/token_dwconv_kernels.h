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

// Accumulators held in registers: 16 of 32 with AVX-512, 12 of 16 elsewhere; the rest holds the weight and the operands.
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

// Where one vector of channels of a row goes. `x_ahead` and `y_ahead` are the same columns of the input row that is read next
// and of the output row that is written next: asking for their lines between the stores hides memory behind arithmetic
// (asked for in one burst they fill the line buffers and the core waits: 30 % of the time at C 768).
template <class T> struct RowTarget {
  T* y;
  const T* residual;
  const T* x_ahead;
  T* y_ahead;
  int64_t x_stride, y_stride, r_stride, n;  // n channels are left from this vector on
};

// kWidth neighbouring outputs of one vector of channels: the sum over the filter rows [i0, i1).
template <class T, int kWidth, class A = typename AccOf<T>::type>
void conv_tile(const A* const* rows, const A* weight, int i0, int i1, int K, vec_t<A> bias, const RowTarget<T>& out) {
  constexpr int L = Vec<A>::kLanes;
  vec_t<A> acc[kWidth];
#pragma GCC unroll 16
  for (int t = 0; t < kWidth; ++t) acc[t] = bias;
  for (int i = i0; i < i1; ++i) {
    const A* x = rows[i];
    const A* w = weight + i * K * kBlock;
    for (int j = 0; j < K; ++j, x += L, w += kBlock) {
      const vec_t<A> tap = load(w);
#pragma GCC unroll 16
      for (int t = 0; t < kWidth; ++t) acc[t] += tap * load(x + t * L);
    }
  }
#pragma GCC unroll 16
  for (int t = 0; t < kWidth; ++t) {
    if (out.residual) acc[t] += load_n(out.residual + t * out.r_stride, out.n);
    store_n(out.y + t * out.y_stride, acc[t], out.n);
    __builtin_prefetch(out.x_ahead + t * out.x_stride, 0, 2);
    __builtin_prefetch(out.y_ahead + t * out.y_stride, 1, 2);
  }
}

template <class T> using ConvTile = void (*)(const typename AccOf<T>::type* const*, const typename AccOf<T>::type*, int, int, int,
                                             vec_t<typename AccOf<T>::type>, const RowTarget<T>&);

template <class T, int... kWidths> struct ConvTiles {
  static constexpr ConvTile<T> table[] = {conv_tile<T, kWidths + 1>...};
};
template <class T, int n, int... rest> struct MakeTiles : MakeTiles<T, n - 1, n - 1, rest...> {};
template <class T, int... rest> struct MakeTiles<T, 0, rest...> { using type = ConvTiles<T, rest...>; };

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

template <class T> struct Forward {
  using A = typename AccOf<T>::type;
  static constexpr int L = Vec<A>::kLanes;

  static int64_t columns(const TokenDWConvParams& p) { return min64(p.W, kSegment) + p.K - 1; }

  // Channels of a task: as many blocks as the ring may hold, so that tokens are read and written in long runs.
  static int64_t channels(const TokenDWConvParams& p) {
    const int64_t block_bytes = p.K * columns(p) * kBlock * int64_t(sizeof(A)), blocks = ceil_div(p.C, kBlock);
    const int64_t tasks = ceil_div(blocks, max64(1, kRingBytes / block_bytes));
    return ceil_div(blocks, tasks) * kBlock;  // even shares
  }
  static int64_t scratch(const TokenDWConvParams& p) { return p.K * columns(p) * channels(p) * int64_t(sizeof(A)); }

  static void run(const TokenDWConvParams& p, const void* weight, const void* bias, const ForwardTask& task, void* scratch) {
    const int64_t n = task.c1 - task.c0;
    if (task.prefix_rows) copy_prefix<T>(p, task, n);
    const int half = p.K / 2;
    const int64_t cols = task.q1 - task.q0 + p.K - 1, row_size = cols * ceil_div(n, L) * L;
    A* ring = static_cast<A*>(scratch);
    const T* x = static_cast<const T*>(p.x) + task.b * p.x_stride_b + p.x_prefix * p.x_stride_n + task.c0;
    const auto fetch = [&](int64_t row) {
      load_row<T>(x + row * p.W * p.x_stride_n, p.x_stride_n, p.W, task.q0 - half, task.q1 + half, n,
                  ring + int32_t(row) % p.K * row_size, cols * L);
    };
    const A* w = static_cast<const A*>(weight) + task.c0 * p.K * p.K;
    const A* b = bias ? static_cast<const A*>(bias) + task.c0 : nullptr;
    const Tiling tiling(int(task.q1 - task.q0));
    for (int64_t row = max64(0, task.r0 - half); row < min64(p.H, task.r0 + half); ++row) fetch(row);
    for (int64_t r = task.r0; r < task.r1; ++r) {
      if (r + half < p.H) fetch(r + half);
      const int i0 = int(max64(0, half - r)), i1 = int(min64(p.K, p.H + half - r));
      const A* rows[kMaxKernel];
      for (int i = i0; i < i1; ++i) rows[i] = ring + int32_t(r + i - half) % p.K * row_size;
      output_row(p, task, tiling, r, rows, i0, i1, cols, w, b, n);
    }
  }

  // Columns cut into even tiles, at most kTile wide. Made once a task: a 64-bit division costs as much as ten tiles' taps.
  struct Tiling {
    int count, start[kSegment / kTile + 2];
    explicit Tiling(int width) : count((width + kTile - 1) / kTile) {
      for (int tile = 0; tile <= count; ++tile) start[tile] = tile * width / count;
    }
  };

  static void output_row(const TokenDWConvParams& p, const ForwardTask& task, const Tiling& tiling, int64_t r,
                         const A* const* rows, int i0, int i1, int64_t cols, const A* w, const A* b, int64_t n) {
    using Tiles = typename MakeTiles<T, kTile>::type;
    const int64_t token = r * p.W + task.q0 + p.y_prefix;
    T* y = static_cast<T*>(p.y) + task.b * p.y_stride_b + token * p.y_stride_n + task.c0;
    const T* x_ahead = static_cast<const T*>(p.x) + task.b * p.x_stride_b + task.c0 +
                       (min64(r + p.K / 2 + 1, p.H - 1) * p.W + task.q0 + p.x_prefix) * p.x_stride_n;
    T* y_ahead = r + 1 < task.r1 ? y + p.W * p.y_stride_n : y;
    const T* res = p.residual ? static_cast<const T*>(p.residual) + task.b * p.r_stride_b + token * p.r_stride_n + task.c0 : nullptr;
    for (int tile = 0; tile < tiling.count; ++tile) {  // outermost: 32 columns of three tensors are more pages than the first TLB holds
      const int64_t t0 = tiling.start[tile], t1 = tiling.start[tile + 1];
      for (int64_t c = 0, v = 0; c < n; c += L, ++v) {
        const vec_t<A> start = b ? load(b + c) : vec_t<A>{};
        const A* taps = w + c / kBlock * kBlock * p.K * p.K + c % kBlock;
        const A* tile_rows[kMaxKernel];
        for (int i = i0; i < i1; ++i) tile_rows[i] = rows[i] + (v * cols + t0) * L;
        const RowTarget<T> out{y + t0 * p.y_stride_n + c, res ? res + t0 * p.r_stride_n + c : nullptr,
                               x_ahead + t0 * p.x_stride_n + c, y_ahead + t0 * p.y_stride_n + c,
                               p.x_stride_n, p.y_stride_n, p.r_stride_n, n - c};
        Tiles::table[t1 - t0 - 1](tile_rows, taps, i0, i1, p.K, start, out);
      }
    }
  }
};

// The tokens that are converted next: asked for one by one between the sums (see RowTarget).
struct Ahead {
  const char *x, *dy;
  int64_t x_stride, dy_stride;  // bytes
};

// Sums over `height` rows of dy[q] * x[q + j] for kRows filter rows at once; x starts at the first of them.
template <class A, int K, int kRows>
void grad_taps(const A* dy, const A* x, int64_t height, int64_t width, int64_t cols, A* sums, Ahead ahead) {
  constexpr int L = Vec<A>::kLanes;
  vec_t<A> acc[kRows * K];
#pragma GCC unroll 32
  for (int k = 0; k < kRows * K; ++k) acc[k] = vec_t<A>{};
  for (int64_t r = 0; r < height; ++r, x += cols * L, dy += width * L) {
    const A* rows[kRows];  // kept apart: base + q + constant is one address, (i * cols + j) is a register of its own
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) rows[i] = x + i * cols * L;
    for (int64_t q = 0; q < width * L; q += L) {
      const vec_t<A> g = load(dy + q);
      __builtin_prefetch(ahead.x, 0, 2);
      __builtin_prefetch(ahead.dy, 0, 2);
      ahead.x += ahead.x_stride, ahead.dy += ahead.dy_stride;
#pragma GCC unroll 16
      for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 16
        for (int j = 0; j < K; ++j) acc[i * K + j] += g * load(rows[i] + q + j * L);
    }
  }
#pragma GCC unroll 32
  for (int k = 0; k < kRows * K; ++k) store(sums + k * kBlock, load(sums + k * kBlock) + acc[k]);
}

// The filter rows of one vector of channels, as many at once as the registers hold.
template <class A, int K>
void grad_filter(const A* dy, const A* x, int64_t height, int64_t width, int64_t cols, A* sums, const Ahead& ahead) {
  constexpr int L = Vec<A>::kLanes, kRows = kGradTile / K < 1 ? 1 : (kGradTile / K > K ? K : kGradTile / K);
  constexpr int kRest = K % kRows, kWhole = K - kRest;
  for (int i = 0; i < kWhole; i += kRows)
    grad_taps<A, K, kRows>(dy, x + i * cols * L, height, width, cols, sums + i * K * kBlock, ahead);
  if constexpr (kRest > 0) grad_taps<A, K, kRest>(dy, x + kWhole * cols * L, height, width, cols, sums + kWhole * K * kBlock, ahead);
}

template <class A>
void grad_filter_any(int K, const A* dy, const A* x, int64_t h, int64_t w, int64_t cols, A* sums, const Ahead& ahead) {
  switch (K) {
    case 1: return grad_filter<A, 1>(dy, x, h, w, cols, sums, ahead);
    case 3: return grad_filter<A, 3>(dy, x, h, w, cols, sums, ahead);
    case 5: return grad_filter<A, 5>(dy, x, h, w, cols, sums, ahead);
    case 7: return grad_filter<A, 7>(dy, x, h, w, cols, sums, ahead);
    case 9: return grad_filter<A, 9>(dy, x, h, w, cols, sums, ahead);
    case 11: return grad_filter<A, 11>(dy, x, h, w, cols, sums, ahead);
    case 13: return grad_filter<A, 13>(dy, x, h, w, cols, sums, ahead);
    default: return grad_filter<A, 15>(dy, x, h, w, cols, sums, ahead);
  }
}

template <class T> struct GradWeight {
  using A = typename AccOf<T>::type;
  static constexpr int L = Vec<A>::kLanes;

  static int64_t scratch(const TokenDWConvGradWeightParams& p, int64_t strip_rows) {
    const int64_t x_rows = p.x ? (strip_rows + p.K - 1) * (p.W + p.K - 1) : 0;
    return (x_rows + strip_rows * p.W) * kBlock * int64_t(sizeof(A));
  }

  static void run(const TokenDWConvGradWeightParams& p, const GradWeightTask& task, void* scratch) {
    A* sums = static_cast<A*>(task.partial);
    for (int64_t k = 0; k < (p.K * p.K + 1) * kBlock; ++k) sums[k] = 0;
    for (int64_t unit = task.unit0; unit < task.unit1; ++unit) {
      const int64_t next = min64(unit + 1, task.unit1 - 1), next_row = next % task.strips * task.strip_rows;
      const Ahead ahead{address(x_at(p, next / task.strips, next_row) + task.c0), address(dy_at(p, next / task.strips, next_row) + task.c0),
                        p.x_stride_n * int64_t(sizeof(T)), p.dy_stride_n * int64_t(sizeof(T))};
      const int64_t r0 = unit % task.strips * task.strip_rows;
      strip(p, unit / task.strips, task.c0, r0, min64(p.H, r0 + task.strip_rows), sums, static_cast<A*>(scratch), ahead);
    }
  }

  static const char* address(const T* p) { return reinterpret_cast<const char*>(p); }
  static const T* dy_at(const TokenDWConvGradWeightParams& p, int64_t b, int64_t row) {
    return static_cast<const T*>(p.dy) + b * p.dy_stride_b + (p.dy_prefix + row * p.W) * p.dy_stride_n;
  }
  static const T* x_at(const TokenDWConvGradWeightParams& p, int64_t b, int64_t row) {
    return static_cast<const T*>(p.x) + b * p.x_stride_b + (p.x_prefix + row * p.W) * p.x_stride_n;
  }

  static void strip(const TokenDWConvGradWeightParams& p, int64_t b, int64_t c0, int64_t r0, int64_t r1, A* sums, A* scratch,
                    const Ahead& ahead) {
    const int64_t n = min64(kBlock, p.C - c0), height = r1 - r0, half = p.K / 2;
    const T* dy = dy_at(p, b, 0) + c0;
    const int64_t dy_vector = height * p.W * L;  // [vector][row][column][lane]
    for (int64_t r = r0; r < r1; ++r)
      load_row<T>(dy + r * p.W * p.dy_stride_n, p.dy_stride_n, p.W, 0, p.W, n, scratch + (r - r0) * p.W * L, dy_vector);
    for (int64_t v = 0; v * L < n; ++v) sum_rows(scratch + v * dy_vector, height * p.W, sums + p.K * p.K * kBlock + v * L);
    if (!p.x) return;
    A* slab = scratch + height * p.W * kBlock;
    const int64_t cols = p.W + p.K - 1, slab_vector = (height + p.K - 1) * cols * L;
    const T* x = x_at(p, b, 0) + c0;
    for (int64_t r = r0 - half; r < r1 + half; ++r) {
      const bool inside = r >= 0 && r < p.H;  // rows outside the grid: a width of 0 writes zeros only
      load_row<T>(inside ? x + r * p.W * p.x_stride_n : x, p.x_stride_n, inside ? p.W : 0, -half, p.W + half, n,
                  slab + (r - r0 + half) * cols * L, slab_vector);
    }
    for (int64_t v = 0; v * L < n; ++v) {
      const int64_t bytes = v * L * int64_t(sizeof(T));
      const Ahead part{ahead.x + bytes, ahead.dy + bytes, ahead.x_stride, ahead.dy_stride};
      grad_filter_any<A>(p.K, scratch + v * dy_vector, slab + v * slab_vector, height, p.W, cols, sums + v * L, part);
    }
  }

  static void sum_rows(const A* values, int64_t count, A* out) {
    vec_t<A> total = {};
    for (int64_t t = 0; t < count; ++t) total += load(values + t * L);
    store(out, load(out) + total);
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
inline int64_t grad_weight_scratch(const TokenDWConvGradWeightParams& p, int64_t strip_rows) {
  return p.dtype == DType::f64 ? GradWeight<double>::scratch(p, strip_rows) : GradWeight<float>::scratch(p, strip_rows);
}

}  // namespace LIFEOPS_ISA
}  // namespace lifeops

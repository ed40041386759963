// SPDX-License-Identifier: Apache-2.0
// Forward and input gradient of one task. Compiled once per instruction set (see vec.h).
#pragma once
#include "token_dwconv_store.h"

namespace lifeops {
namespace LIFEOPS_ISA {

// Accumulators held in registers: 16 of 32 with AVX-512, 12 of 16 elsewhere; the rest holds the weights and the operands.
constexpr int kTile = LIFEOPS_VEC_BYTES == 64 ? 16 : 12;

// Where the columns under a filter row are: in a ring, or where the tokens lie, without those outside the grid. `stride` leads from
// column to column; column m is `t` of them behind x.
template <class A> struct InRing {
  static constexpr int stride = Vec<A>::kLanes;
  inline __attribute__((always_inline)) vec_t<A> column(const A* x, int t, int) const { return load(x + t * stride); }
};
template <class A> struct InPlace {
  int64_t stride;
  inline __attribute__((always_inline)) vec_t<A> column(const A* x, int t, int) const { return load(x + t * stride); }
};
template <class A> struct InPlaceAtEdge {
  int64_t stride, q0, q1;  // the grid's columns
  inline __attribute__((always_inline)) vec_t<A> column(const A* x, int t, int m) const {
    return m >= q0 && m < q1 ? load(x + t * stride) : vec_t<A>{};
  }
};

// acc[t] += sum over one filter row of tap * x[t + j]; `add_two` does it for two output rows, which share every load of x.
template <int kWidth, class A, class At>
inline __attribute__((always_inline)) void add_one(vec_t<A>* acc, const A* x, At at, const A* w, int K) {
  for (int j = 0; j < K; ++j, x += at.stride, w += kBlock) {
    const vec_t<A> tap = load(w);
#pragma GCC unroll 16
    for (int t = 0; t < kWidth; ++t) acc[t] += tap * at.column(x, t, j + t);
  }
}
template <int kWidth, class A, class At>
inline __attribute__((always_inline)) void add_two(vec_t<A>* acc, vec_t<A>* below, const A* x, At at, const A* w, const A* w_below, int K) {
  for (int j = 0; j < K; ++j, x += at.stride, w += kBlock, w_below += kBlock) {
    const vec_t<A> tap = load(w), tap_below = load(w_below);
#pragma GCC unroll 16
    for (int t = 0; t < kWidth; ++t) {
      const vec_t<A> value = in_register(at.column(x, t, j + t));
      acc[t] += tap * value;
      below[t] += tap_below * value;
    }
  }
}

// The same for kTaps taps that all stay in registers: every x is loaded once.
template <int kWidth, int kTaps, class A, class At>
inline __attribute__((always_inline)) void add_one_window(vec_t<A>* acc, const A* x, At at, const A* w) {
  vec_t<A> tap[kTaps];
#pragma GCC unroll 8
  for (int j = 0; j < kTaps; ++j) tap[j] = load(w + j * kBlock);
#pragma GCC unroll 16
  for (int m = 0; m < kWidth + kTaps - 1; ++m) {
    const vec_t<A> value = in_register(at.column(x, m, m));
#pragma GCC unroll 8
    for (int j = 0; j < kTaps; ++j)
      if (m >= j && m - j < kWidth) acc[m - j] += tap[j] * value;
  }
}
template <int kWidth, int kTaps, class A, class At>
inline __attribute__((always_inline)) void add_two_window(vec_t<A>* acc, vec_t<A>* below, const A* x, At at, const A* w, const A* w_below) {
  vec_t<A> tap[kTaps], tap_below[kTaps];
#pragma GCC unroll 8
  for (int j = 0; j < kTaps; ++j) tap[j] = load(w + j * kBlock), tap_below[j] = load(w_below + j * kBlock);
#pragma GCC unroll 16
  for (int m = 0; m < kWidth + kTaps - 1; ++m) {
    const vec_t<A> value = in_register(at.column(x, m, m));
#pragma GCC unroll 8
    for (int j = 0; j < kTaps; ++j)
      if (m >= j && m - j < kWidth) acc[m - j] += tap[j] * value, below[m - j] += tap_below[j] * value;
  }
}

// kRows (1 or 2) x kWidth neighbouring outputs of one vector of channels, from the input rows [k0, k1) of K + kRows - 1. kTaps: K where
// all taps of a filter row fit the registers, else 0.
template <class A, int kTaps, int kRows, int kWidth, class At>
inline __attribute__((always_inline)) void sum_tile_at(At at, const A* const* rows, int k0, int k1, const A* weight, int K, vec_t<A> bias, vec_t<A>* sums) {
  vec_t<A> acc[kRows][kWidth];
#pragma GCC unroll 2
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 16
    for (int t = 0; t < kWidth; ++t) acc[r][t] = bias;
  if constexpr (kTaps > 0) K = kTaps;
  for (int k = k0; k < k1; ++k) {
    const A *w = weight + k * K * kBlock, *w_below = w - K * kBlock;
    const bool first = kRows == 1 || k == 0, last = kRows == 2 && k == K;  // each reads rows[k] itself: gcc would load a whole row before it asks
    if constexpr (kTaps > 0) {
      if (first) add_one_window<kWidth, kTaps, A>(acc[0], rows[k], at, w);
      else if (last) add_one_window<kWidth, kTaps, A>(acc[kRows - 1], rows[k], at, w_below);
      else add_two_window<kWidth, kTaps, A>(acc[0], acc[kRows - 1], rows[k], at, w, w_below);
    } else {
      if (first) add_one<kWidth, A>(acc[0], rows[k], at, w, K);
      else if (last) add_one<kWidth, A>(acc[kRows - 1], rows[k], at, w_below, K);
      else add_two<kWidth, A>(acc[0], acc[kRows - 1], rows[k], at, w, w_below, K);
    }
  }
#pragma GCC unroll 2
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 16
    for (int t = 0; t < kWidth; ++t) sums[r * kWidth + t] = acc[r][t];
}
enum class Columns { ring, place, edge };
template <class A, int kTaps, int kRows, int kWidth, Columns kColumns>
void sum_tile(const A* const* rows, int k0, int k1, const A* weight, int K, vec_t<A> bias, vec_t<A>* sums, const InPlaceAtEdge<A>& at) {
  if constexpr (kColumns == Columns::ring) sum_tile_at<A, kTaps, kRows, kWidth>(InRing<A>{}, rows, k0, k1, weight, K, bias, sums);
  else if constexpr (kColumns == Columns::place) sum_tile_at<A, kTaps, kRows, kWidth>(InPlace<A>{at.stride}, rows, k0, k1, weight, K, bias, sums);
  else sum_tile_at<A, kTaps, kRows, kWidth>(at, rows, k0, k1, weight, K, bias, sums);
}

template <class A> using SumTile = void (*)(const A* const*, int, int, const A*, int, vec_t<A>, vec_t<A>*, const InPlaceAtEdge<A>&);

// table[width - 1]; narrow tiles, which only narrow grids have, are left to the general code.
template <class A, int kTaps, int kRows, Columns kColumns, int... kWidths> struct SumTiles {
  static constexpr SumTile<A> table[] = {sum_tile<A, (kWidths < 3 ? 0 : kTaps), kRows, kWidths + 1, kColumns>...};
};
template <class A, int kTaps, int kRows, Columns kColumns, int n, int... rest>
struct MakeTiles : MakeTiles<A, kTaps, kRows, kColumns, n - 1, n - 1, rest...> {};
template <class A, int kTaps, int kRows, Columns kColumns, int... rest>
struct MakeTiles<A, kTaps, kRows, kColumns, 0, rest...> { using type = SumTiles<A, kTaps, kRows, kColumns, rest...>; };

// Whether the taps of a filter row stay in registers, so that two output rows load every x once a tile.
template <class A> constexpr bool kWindows = LIFEOPS_VEC_BYTES == 64 && sizeof(A) == 4;
template <class A> bool has_windows(int64_t K) { return kWindows<A> && (K == 3 || K == 5 || K == 7); }

// The tiles of one or two output rows.
template <class A, Columns kColumns = Columns::ring> const SumTile<A>* sum_tiles(int height, int K) {
  if (height == 1) return MakeTiles<A, 0, 1, kColumns, kTile>::type::table;
  if constexpr (kWindows<A>) {
    if (K == 3) return MakeTiles<A, 3, 2, kColumns, kTile / 2>::type::table;
    if (K == 5) return MakeTiles<A, 5, 2, kColumns, kTile / 2>::type::table;
    if (K == 7) return MakeTiles<A, 7, 2, kColumns, kTile / 2>::type::table;
  }
  return MakeTiles<A, 0, 2, kColumns, kTile / 2>::type::table;
}

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

  // Tokens are read where they lie where that is no conversion and every value is loaded once a tile; the second load, from the next
  // two rows, costs less than the ring. Not so where values are loaded K times: at strides such as 4096 bytes they collide in L1.
  static bool reads_in_place(const TokenDWConvParams& p, const ForwardTask& task) {
    if (task.extras && task.extras->prologue) return false;
    return sizeof(T) == sizeof(A) && has_windows<A>(p.K) && step(p) == 2 && (task.c1 - task.c0) % L == 0;
  }

  // Where a task's tiles find their input rows, each from the first column on that its outputs see.
  struct Source {
    bool in_place;
    int64_t column, vector;  // elements from one column, or vector of channels, to the next
    const A* rows[kMaxKernel + 1];
  };

  static void run(const TokenDWConvParams& p, const void* weight, const void* bias, const ForwardTask& task, void* scratch) {
    const int64_t n = task.c1 - task.c0;
    if (task.prefix_rows) copy_prefix<T>(p, task, n);
    const int half = p.K / 2;
    const int64_t cols = task.q1 - task.q0 + p.K - 1, row_size = cols * ceil_div(n, L) * L;
    A* ring = static_cast<A*>(scratch);
    const ChannelAffine* prologue = task.extras ? task.extras->prologue : nullptr;
    const T* x = static_cast<const T*>(p.x) + task.b * p.x_stride_b + p.x_prefix * p.x_stride_n + task.c0;
    const bool in_place = reads_in_place(p, task);
    Source source{in_place, in_place ? p.x_stride_n : L, in_place ? L : cols * L, {}};
    const auto ring_row = [&](int64_t row) { return ring + int32_t(row) % int32_t(ring_rows(p)) * row_size; };
    const auto fetch = [&](int64_t row0, int64_t row1) {
      for (int64_t row = max64(0, row0); row < min64(p.H, row1); ++row) {
        const T* tokens = x + row * p.W * p.x_stride_n;
        if (prologue) load_row_through<T>(*prologue, task.c0, tokens, p.x_stride_n, p.W, task.q0 - half, task.q1 + half, n, ring_row(row), cols * L);
        else load_row<T>(tokens, p.x_stride_n, p.W, task.q0 - half, task.q1 + half, n, ring_row(row), cols * L);
      }
    };
    const auto find = [&](int64_t row) -> const A* {
      if constexpr (sizeof(T) == sizeof(A))
        if (in_place) return x + (row * p.W + task.q0 - half) * p.x_stride_n;  // not read where it lies before the grid
      return ring_row(row);
    };
    const A* w = static_cast<const A*>(weight) + task.c0 * p.K * p.K;
    const A* b = bias ? static_cast<const A*>(bias) + task.c0 : nullptr;
    const int most = int(step(p));
    const Tiling tiling(int(task.q1 - task.q0), kTile / most);
    if (!in_place) fetch(task.r0 - half, task.r0 + half);
    for (int64_t r = task.r0; r < task.r1; r += most) {
      const int height = int(min64(most, task.r1 - r));
      if (!in_place) fetch(r + half, r + half + height);
      const int k0 = int(max64(0, half - r)), k1 = int(min64(p.K + height - 1, p.H + half - r));
      for (int k = k0; k < k1; ++k) source.rows[k] = find(r + k - half);
      output_rows(p, task, tiling, r, height, source, k0, k1, w, b, n);
    }
  }

  // Columns cut into even tiles, at most `widest` wide. Made once a task: a 64-bit division costs as much as ten tiles' taps.
  struct Tiling {
    int count, start[kSegment / (kTile / 2) + 2];
    Tiling(int width, int widest) : count((width + widest - 1) / widest) {
      for (int tile = 0; tile <= count; ++tile) start[tile] = tile * width / count;
    }
  };

  // Nothing but a prologue, if anything.
  static bool stored_plainly(const ForwardTask& task) {
    const TokenDWConvExtras* e = task.extras;
    return !e || !(e->epilogue || e->sums || e->derivative);
  }
  static TileExtras<T> tile_extras(const TokenDWConvParams& p, const ForwardTask& task, const T* pre, int64_t t0, int64_t c, bool first, const JoinBlock<A>& join) {
    const TokenDWConvExtras& e = *task.extras;
    A* sums = task.sums ? static_cast<A*>(task.sums) + task.c0 + c : nullptr;
    return {&e, pre ? pre + t0 * e.pre_stride_n + c : nullptr, p.W * e.pre_stride_n, task.c0 + c, sums, p.C, first, join};
  }

  // What lies at a task's first column of row r; null where there is none.
  static const T* x_at(const TokenDWConvParams& p, const ForwardTask& task, int64_t r) {
    return static_cast<const T*>(p.x) + task.b * p.x_stride_b + (r * p.W + task.q0 + p.x_prefix) * p.x_stride_n + task.c0;
  }
  static T* y_at(const TokenDWConvParams& p, const ForwardTask& task, int64_t r) {
    return static_cast<T*>(p.y) + task.b * p.y_stride_b + (r * p.W + task.q0 + p.y_prefix) * p.y_stride_n + task.c0;
  }
  static const T* residual_at(const TokenDWConvParams& p, const ForwardTask& task, int64_t r) {
    if (!p.residual) return nullptr;
    return static_cast<const T*>(p.residual) + task.b * p.r_stride_b + (r * p.W + task.q0 + p.y_prefix) * p.r_stride_n + task.c0;
  }
  static const T* pre_at(const TokenDWConvParams& p, const ForwardTask& task, int64_t r) {  // x of a derivative
    const TokenDWConvExtras* e = task.extras;
    if (!e || !e->pre) return nullptr;
    return static_cast<const T*>(e->pre) + task.b * e->pre_stride_b + (r * p.W + task.q0) * e->pre_stride_n + task.c0;
  }

  // What output row r reads and writes, or behind the last row what the first of the next task does.
  static Ahead look_ahead(const TokenDWConvParams& p, const ForwardTask& current, int64_t r, int64_t n) {
    const bool inside = r < current.r1;
    const ForwardTask& task = inside ? current : *current.next;
    const int64_t row = inside ? r : task.r0, x_row = inside ? min64(r + p.K / 2, p.H - 1) : row;
    const T *pre = pre_at(p, task, row), *residual = residual_at(p, task, row);
    return Ahead(x_at(p, task, x_row), p.x_stride_n, static_cast<const T*>(y_at(p, task, row)), p.y_stride_n, n, L,
                 pre ? pre : residual, pre ? task.extras->pre_stride_n : p.r_stride_n);
  }

  // The tiles whose first column is q, where the leftmost tap's may lie before the grid.
  static const SumTile<A>* tiles_at(const TokenDWConvParams& p, const Source& source, int height, int64_t q, int64_t width) {
    if constexpr (kWindows<A>)
      if (source.in_place) {
        const bool inside = q >= p.K / 2 && q + width + p.K / 2 <= p.W;
        return inside ? sum_tiles<A, Columns::place>(height, p.K) : sum_tiles<A, Columns::edge>(height, p.K);
      }
    return sum_tiles<A>(height, p.K);
  }

  static void output_rows(const TokenDWConvParams& p, const ForwardTask& task, const Tiling& tiling, int64_t r, int height,
                          const Source& source, int k0, int k1, const A* w, const A* b, int64_t n) {
    const bool plain = stored_plainly(task);
    T* y = y_at(p, task, r);
    const T *res = residual_at(p, task, r), *pre = pre_at(p, task, r);
    Ahead ahead = look_ahead(p, task, r + height, n);
    for (int tile = 0; tile < tiling.count; ++tile) {  // outermost: 32 columns of three tensors are more pages than the first TLB holds
      const int64_t t0 = tiling.start[tile], t1 = tiling.start[tile + 1], seen = (r - task.r0) * (task.q1 - task.q0) + height * t0;
      const JoinBlock<A> join = plain || task.extras->derivative ? JoinBlock<A>() : JoinBlock<A>(seen, height * (t1 - t0));
      const SumTile<A> sum_tile = tiles_at(p, source, height, task.q0 + t0, t1 - t0)[t1 - t0 - 1];
      const int64_t first = task.q0 + t0 - p.K / 2;
      const A* tile_rows[kMaxKernel + 1];
      const InPlaceAtEdge<A> at{source.column, -first, p.W - first};
      for (int64_t c = 0, v = 0; c < n; c += L, ++v) {
        const vec_t<A> start = b ? load(b + c) : vec_t<A>{};
        const A* taps = w + c / kBlock * kBlock * p.K * p.K + c % kBlock;
        const int64_t from = v * source.vector + t0 * source.column;
        for (int k = k0; k < k1; ++k) tile_rows[k] = source.rows[k] + from;
        TileTarget<T> out{y + t0 * p.y_stride_n + c, res ? res + t0 * p.r_stride_n + c : nullptr, p.y_stride_n,
                          p.r_stride_n, p.W * p.y_stride_n, p.W * p.r_stride_n, n - c, nullptr};
        const TileExtras<T> extras = plain ? TileExtras<T>{} : tile_extras(p, task, pre, t0, c, seen == 0, join);
        if (!plain) out.extras = &extras;
        vec_t<A> sums[kTile];
        sum_tile(tile_rows, k0, k1, taps, p.K, start, sums, at);
        store_tile<T>(sums, height, int(t1 - t0), out, &ahead);
      }
    }
  }
};

}  // namespace LIFEOPS_ISA
}  // namespace lifeops

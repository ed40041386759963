// SPDX-License-Identifier: Apache-2.0
// Sums of neighbouring outputs of the strided convolution. Compiled once per instruction set (see vec.h).
#pragma once
#include "token_conv.h"
#include "token_conv_planes.h"

namespace lifeops {
namespace LIFEOPS_ISA {

constexpr int kWidest = 8;  // outputs summed together: as many chains as two multiply-adds of four cycles a cycle need

// One input row under the outputs: x at the first tap of the first output, w at that tap.
template <class S> struct RowTaps {
  const S* x;
  const typename AccOf<S>::type* w;
};

// Neighbouring outputs of neighbouring vectors of channels, from values of type S to y of type O. Steps are in elements.
template <class S, class O> struct Tile {
  using A = typename AccOf<S>::type;
  const RowTaps<S>* rows;
  int count, taps;                   // rows, and taps of each
  int64_t x_from, w_from;            // to the first vector
  int64_t x_output, x_tap, w_tap;    // from output to output and from tap to tap
  int64_t vectors, x_vector, w_vector, bias_vector;
  const A* bias;                     // or null
  O* y;
  int64_t y_output;                  // vectors lie side by side
  Lanes lanes;                       // of the only vector, where it is not whole
  int64_t n;                         // its channels in x
  bool no_first, no_last;            // the first, the last column lies outside the grid: of sum_window alone
  // Asked for ahead, since the tokens under a tile are runs that no hardware foresees: the rows of x that the next row of outputs is the
  // first to see, and what it writes. Rows or a step of 0 ask for nothing.
  const S* ahead;
  int64_t ahead_rows, ahead_row, ahead_columns, ahead_column, y_row;
};
template <class S, class O> using SumOutputs = void (*)(const Tile<S, O>&);

template <class S, class O, int kWidth> inline __attribute__((always_inline)) void ask_ahead(const Tile<S, O>& tile, int64_t channel) {
  const S* row = tile.ahead + channel;
  for (int64_t r = 0; r < tile.ahead_rows; ++r, row += tile.ahead_row)
    for (int64_t k = 0; k < tile.ahead_columns; ++k)
#pragma GCC unroll 8
      for (int t = 0; t < kWidth; ++t) __builtin_prefetch(row + k * tile.ahead_column + t * tile.x_output, 0, 2);
}

enum class Vectors { whole, last };

template <class S, class O, int kWidth, Vectors kVectors, class Add> inline __attribute__((always_inline)) void sum_vectors(const Tile<S, O>& tile, Add add) {
  using A = typename AccOf<S>::type;
  constexpr int L = Vec<A>::kLanes;
  O* y = tile.y;
  const int64_t y_output = tile.y_output, y_row = tile.y_row;
  const RowTaps<S>* end = tile.rows + tile.count;
  int64_t x_from = tile.x_from, w_from = tile.w_from;
  for (int64_t v = 0; v < tile.vectors; ++v, y += L, x_from += tile.x_vector, w_from += tile.w_vector) {
    if (v * L * int64_t(sizeof(S)) % 64 == 0) ask_ahead<S, O, kWidth>(tile, v * L);
    const vec_t<A> start = tile.bias ? load(tile.bias + v * tile.bias_vector) : vec_t<A>{};
    vec_t<A> acc[kWidth];
#pragma GCC unroll 8
    for (int t = 0; t < kWidth; ++t) acc[t] = start;
    for (const RowTaps<S>* row = tile.rows; row != end; ++row) add(row->x + x_from, row->w + w_from, acc);
#pragma GCC unroll 8
    for (int t = 0; t < kWidth; ++t) {
      if (y_row) __builtin_prefetch(y + t * y_output + y_row, 1, 2);
      if constexpr (kVectors == Vectors::whole) store(y + t * y_output, acc[t]);
      else store_lanes(y + t * y_output, acc[t], tile.lanes);
    }
  }
}

template <class S, class O, int kWidth, Vectors kVectors> void sum_any(const Tile<S, O>& tile) {
  using A = typename AccOf<S>::type;
  const int64_t x_output = tile.x_output, x_tap = tile.x_tap, w_tap = tile.w_tap, n = tile.n;
  sum_vectors<S, O, kWidth, kVectors>(tile, [&, taps = tile.taps](const S* x, const A* w, vec_t<A>* acc) __attribute__((always_inline)) {
    for (int k = 0; k < taps; ++k, x += x_tap, w += w_tap) {
      const vec_t<A> tap = load(w);
#pragma GCC unroll 8
      for (int t = 0; t < kWidth; ++t) acc[t] += tap * (kVectors == Vectors::whole ? load(x + t * x_output) : load_n(x + t * x_output, n));
    }
  });
}

// The same for kTaps neighbouring columns, outputs kStep columns apart: every column is loaded, and converted, once a row.
template <class S, class O, int kWidth, int kTaps, int kStep> void sum_window(const Tile<S, O>& tile) {
  using A = typename AccOf<S>::type;
  constexpr int kColumns = (kWidth - 1) * kStep + kTaps;
  const int64_t x_tap = tile.x_tap, w_tap = tile.w_tap;
  const bool no_first = tile.no_first, no_last = tile.no_last;
  sum_vectors<S, O, kWidth, Vectors::whole>(tile, [&](const S* x, const A* w, vec_t<A>* acc) __attribute__((always_inline)) {
    vec_t<A> tap[kTaps];
#pragma GCC unroll 4
    for (int k = 0; k < kTaps; ++k) tap[k] = load(w + k * w_tap);
#pragma GCC unroll 32
    for (int column = 0; column < kColumns; ++column, x += x_tap) {
      if ((column == 0 && no_first) || (column == kColumns - 1 && no_last)) continue;
      const vec_t<A> value = in_register(load(x));
#pragma GCC unroll 4
      for (int k = 0; k < kTaps; ++k)
        if (column >= k && (column - k) % kStep == 0 && (column - k) / kStep < kWidth) acc[(column - k) / kStep] += tap[k] * value;
    }
  });
}

template <class S, class O, Vectors kVectors, int kWidth = kWidest> SumOutputs<S, O> any_taps(int width) {
  if constexpr (kWidth > 1)
    if (width < kWidth) return any_taps<S, O, kVectors, kWidth - 1>(width);
  return sum_any<S, O, kWidth, kVectors>;
}
template <class S, class O, int kTaps, int kStep, int kWidth = kWidest> SumOutputs<S, O> window(int width) {
  if constexpr (kWidth > 1)
    if (width < kWidth) return window<S, O, kTaps, kStep, kWidth - 1>(width);
  return sum_window<S, O, kWidth, kTaps, kStep>;
}

}  // namespace LIFEOPS_ISA
}  // namespace lifeops

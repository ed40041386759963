// SPDX-License-Identifier: Apache-2.0
// Vectors of channels in memory: several coarse channels for each fine one, and the last vector. Compiled once per instruction set (see vec.h).
#pragma once
#include "vec.h"
#include "windows.h"

namespace lifeops {
namespace LIFEOPS_ISA {

// One vector of fine channels of C: where it starts, and which lanes are its own (see vector_start).
struct Lanes {
  int64_t at, skip, count;
  template <class A> static Lanes of(int64_t C, int64_t v) {
    constexpr int L = Vec<A>::kLanes;
    return {vector_start(C, L, v), vector_skip(C, L, v), vector_count(C, L, v)};
  }
};

// y points at the vector's first channel.
template <class T, class V> inline __attribute__((always_inline)) void store_lanes(T* y, V value, const Lanes& lanes) {
  constexpr int L = Vec<typename AccOf<T>::type>::kLanes;
  if (lanes.count == L) return store(y, value);
  T all[L];
  store(all, value);
  __builtin_memcpy(y + lanes.skip, all + lanes.skip, lanes.count * int64_t(sizeof(T)));
}

// Two vectors' lanes taken in turns, and the way back; loops that compilers turn into shuffles.
template <class A> inline void split_pairs(const A* __restrict from, A* __restrict even, A* __restrict odd) {
  for (int l = 0; l < Vec<A>::kLanes; ++l) even[l] = from[2 * l], odd[l] = from[2 * l + 1];
}
template <class A> inline void join_pairs(const A* __restrict even, const A* __restrict odd, A* __restrict to) {
  for (int l = 0; l < Vec<A>::kLanes; ++l) to[2 * l] = even[l], to[2 * l + 1] = odd[l];
}

// Planes [j][column][vector][lane] of W tokens of C m channels, for vectors [v0, v1) of C channels; `token` holds (v1 - v0) m vectors.
template <class T, class A = typename AccOf<T>::type>
void split_row(const T* row, int64_t stride_n, int64_t W, int64_t C, int64_t m, int64_t v0, int64_t v1, A* token, A* planes) {
  constexpr int L = Vec<A>::kLanes;
  const int64_t first = vector_start(C, L, v0) * m, end = min64(C, v1 * L) * m, vectors = v1 - v0, lanes = min64(L, C);
  for (int64_t q = 0; q < W; ++q, row += stride_n) {
    for (int64_t c = first; c < end; c += L) store(token + c - first, load_n(row + c, end - c));
    for (int64_t v = v0; v < v1; ++v) {
      const A* from = token + vector_start(C, L, v) * m - first;
      A* to = planes + (q * vectors + v - v0) * L;
      if (m == 2 && lanes == L) {
        split_pairs(from, to, to + W * vectors * L);
        continue;
      }
      for (int64_t j = 0; j < m; ++j, to += W * vectors * L)
        for (int l = 0; l < L; ++l) to[l] = l < lanes ? from[l * m + j] : A(0);
    }
  }
}
// The way back.
template <class T, class A = typename AccOf<T>::type>
void join_row(const A* planes, int64_t W, int64_t C, int64_t m, int64_t v0, int64_t v1, A* token, T* row, int64_t stride_n) {
  constexpr int L = Vec<A>::kLanes;
  const int64_t first = v0 * L * m, end = min64(C, v1 * L) * m, vectors = v1 - v0;
  for (int64_t q = 0; q < W; ++q, row += stride_n) {
    for (int64_t v = v0; v < v1; ++v) {
      A* to = token + (v - v0) * L * m;
      const int64_t skip = vector_skip(C, L, v), count = vector_count(C, L, v);
      const A* from = planes + (q * vectors + v - v0) * L + skip;
      if (m == 2 && count == L) {
        join_pairs(from, from + W * vectors * L, to);
        continue;
      }
      for (int64_t j = 0; j < m; ++j, from += W * vectors * L)
        for (int64_t l = 0; l < count; ++l) to[l * m + j] = from[l];
    }
    for (int64_t c = first; c < end; c += L) store_n(row + c, load(token + c - first), end - c);
  }
}

}  // namespace LIFEOPS_ISA
}  // namespace lifeops

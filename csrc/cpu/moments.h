// SPDX-License-Identifier: Apache-2.0
// Mean and m2 of a task's values, summed block by block. Compiled once per instruction set (see vec.h).
//
// A task keeps of every channel k, its first value (0 where that is not finite), sum = Σ (y - k) and m2 = Σ (y - mean)². A block of c
// values behind n others is joined with Chan's formula: m2 += m2 of the block + (mean of the block - mean so far)² n c / (n + c).
//
// Error: with u = 2^-24, y - k is off by u |y - k|, and since k is one of the values, (mean - k)² <= m2: by Cauchy and Schwarz this is
// 3 sqrt(n) u of m2 at most, whatever the mean and wherever outliers lie; the blocks that a task adds up (128 at most in a channel pass, of
// a convolution an image's or a strip's tiles) cost what rounding adds to their sum, some sqrt(blocks) u. Tasks are joined in double. Tests
// hold m2 to 2 sqrt(n) 2^-23, relative.
#pragma once
#include "activations.h"

namespace lifeops {
namespace LIFEOPS_ISA {

template <class V> inline __attribute__((always_inline)) V zero_unless_finite(V v) { return v - v == V{} ? v : V{}; }

// How c values are joined with the n before them.
template <class A> struct JoinBlock {
  A ratio = 0, weight = 0;  // c / n, n / (c (n + c)); 0 where nothing came before
  JoinBlock() = default;
  JoinBlock(int64_t n, int64_t c) {
    if (n > 0) ratio = A(c) / A(n), weight = A(n) / (A(c) * A(n + c));
  }
  // A block's Σ (y - k) and m2.
  inline __attribute__((always_inline)) void operator()(vec_t<A> block_sum, vec_t<A> block_m2, vec_t<A>* sum, vec_t<A>* m2) const {
    const vec_t<A> gap = block_sum - *sum * ratio;  // c times the distance of the means
    *m2 += gap * (gap * weight) + block_m2;
    *sum += block_sum;
  }
};

// N values, from the first of them: Σ (y - mean)² = Σ d² - (Σ d)² / N with d = y - first loses a factor of N at most.
template <class A, int N>
inline __attribute__((always_inline)) void join_block(const vec_t<A>* v, vec_t<A> k, const JoinBlock<A>& join, vec_t<A>* sum, vec_t<A>* m2) {
  vec_t<A> d = v[1] - v[0], all = d, squares = d * d;
#pragma GCC unroll 8
  for (int i = 2; i < N; ++i) d = v[i] - v[0], all += d, squares += d * d;
  join(all + (v[0] - k) * A(N), squares - all * (all * A(1.0 / N)), sum, m2);
}

template <class V, class F> inline __attribute__((always_inline)) V sum_of(int64_t count, F f) {  // two chains
  V even = {}, odd = {};
  int64_t i = 0;
  for (; i + 2 <= count; i += 2) even += f(i), odd += f(i + 1);
  if (i < count) even += f(i);
  return even + odd;
}

// Any number of values, which become y - k.
template <class A>
inline __attribute__((always_inline)) void join_any(vec_t<A>* v, int64_t count, vec_t<A> k, const JoinBlock<A>& join, vec_t<A>* sum, vec_t<A>* m2) {
  const vec_t<A> block = sum_of<vec_t<A>>(count, [&](int64_t i) { return v[i] -= k; }), mean = block * (1 / A(count));
  join(block, sum_of<vec_t<A>>(count, [&](int64_t i) { return (v[i] - mean) * (v[i] - mean); }), sum, m2);
}

}  // namespace LIFEOPS_ISA
}  // namespace lifeops

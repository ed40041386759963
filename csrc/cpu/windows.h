// SPDX-License-Identifier: Apache-2.0
// Where the windows of a strided filter lie, one axis at a time, and how channels are cut into vectors. No torch in here.
#pragma once
#include <cstdint>

#include "token_dwconv.h"

namespace lifeops {

// Output o sees the positions [o s - p, o s - p + K); those outside [0, size) do not exist.
struct Axis {
  int64_t size, out, K, s, p;
};

// static: see ceil_div.
static inline int64_t window_start(const Axis& a, int64_t o) { return o * a.s - a.p; }
// The taps of output o that lie inside: [first, last), maybe none.
static inline int64_t first_tap(const Axis& a, int64_t o) { return min64(a.K, max64(0, -window_start(a, o))); }
static inline int64_t last_tap(const Axis& a, int64_t o) { return max64(first_tap(a, o), min64(a.K, a.size - window_start(a, o))); }
// The outputs that see position i: [first, last), maybe none.
static inline int64_t first_output(const Axis& a, int64_t i) { return i + a.p < a.K ? 0 : min64(a.out, (i + a.p - a.K) / a.s + 1); }
static inline int64_t last_output(const Axis& a, int64_t i) { return min64(a.out, (i + a.p) / a.s + 1); }
// More outputs than this never see one position.
static inline int64_t most_outputs(const Axis& a) { return ceil_div(a.K, a.s); }
// The outputs whose window lies inside: [first, last), maybe none.
static inline int64_t first_inside(const Axis& a) { return min64(a.out, ceil_div(a.p, a.s)); }
static inline int64_t last_inside(const Axis& a) {
  return a.size + a.p < a.K ? first_inside(a) : max64(first_inside(a), min64(a.out, (a.size + a.p - a.K) / a.s + 1));
}

// C channels in vectors of L: the last begins early enough to be read whole, if there are that many, and its first lanes are another's.
static inline int64_t vector_start(int64_t C, int64_t L, int64_t v) { return max64(0, min64(v * L, C - L)); }
static inline int64_t vector_skip(int64_t C, int64_t L, int64_t v) { return v * L - vector_start(C, L, v); }  // lanes that are another's
static inline int64_t vector_count(int64_t C, int64_t L, int64_t v) { return min64(L, C - v * L); }           // lanes behind those

}  // namespace lifeops

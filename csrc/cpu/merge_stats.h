// SPDX-License-Identifier: Apache-2.0
// Mean and m2 of a batch from its tasks' shifted sums.
#pragma once
#include <cstdint>

namespace lifeops {

// `partial` (tasks, 3, C): k, sum of y - k, sum of (y - k)². `count(i)` values went into task i. out (2, C). Merged in order, in
// double (Chan, Golub, LeVeque 1983), so that neither a large mean nor the number of threads matters.
template <class A, class Count> void merge_stats(const A* partial, int64_t tasks, int64_t C, Count count, A* out) {
  for (int64_t c = 0; c < C; ++c) {
    double mean = 0, m2 = 0, seen = 0;
    for (int64_t i = 0; i < tasks; ++i) {
      const A* task = partial + i * 3 * C + c;
      const double n = double(count(i)), s1 = double(task[C]), s2 = double(task[2 * C]);
      const double delta = double(task[0]) + s1 / n - mean, total = seen + n;
      m2 += s2 - s1 * s1 / n + delta * delta * seen * n / total;
      mean += delta * n / total, seen = total;
    }
    out[c] = A(mean), out[C + c] = A(m2 > 0 ? m2 : 0);
  }
}

}  // namespace lifeops

// SPDX-License-Identifier: Apache-2.0
// Mean and m2 of a batch from its tasks' (see moments.h).
#pragma once
#include <cstdint>
#include <limits>
#include <vector>

namespace lifeops {

// `partial` (tasks, 3, C): k, sum of y - k, m2 of y. `count(i)` values went into task i. out (2, C). Merged in order, in double (Chan,
// Golub, LeVeque 1983), so that neither a large mean nor the number of threads matters. An infinity makes the mean what a plain sum
// would be, and m2 NaN.
template <class A, class Count> void merge_stats(const A* partial, int64_t tasks, int64_t C, Count count, A* out) {
  std::vector<double> merged(size_t(2 * C));
  double *mean = merged.data(), *m2 = mean + C, seen = 0;
  for (int64_t i = 0; i < tasks; ++i) {
    const A *k = partial + 3 * C * i, *sum = k + C, *task_m2 = sum + C;
    const double n = double(count(i)), total = seen + n, share = n / total, between = seen * share, each = 1 / n;
    for (int64_t c = 0; c < C; ++c) {  // innermost, so that compilers vectorise it
      const double delta = double(k[c]) + double(sum[c]) * each - mean[c];
      m2[c] += double(task_m2[c]) + delta * delta * between;
      mean[c] += delta * share;
    }
    seen = total;
  }
  for (int64_t c = 0; c < C; ++c) {
    const bool finite = mean[c] - mean[c] == 0;
    double plain = 0;
    for (int64_t i = 0; !finite && i < tasks; ++i) plain += double(count(i)) * double(partial[3 * C * i + c]) + double(partial[3 * C * i + C + c]);
    out[c] = A(finite ? mean[c] : plain / seen);
    out[C + c] = finite ? A(m2[c]) : std::numeric_limits<A>::quiet_NaN();
  }
}

}  // namespace lifeops

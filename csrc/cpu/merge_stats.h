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
  std::vector<double> merged(size_t(3 * C));
  double *mean = merged.data(), *m2 = mean + C, *sum = m2 + C, seen = 0;
  for (int64_t i = 0; i < tasks; ++i, partial += 3 * C) {
    const double n = double(count(i)), total = seen + n, share = n / total, between = seen * share, each = 1 / n;
    for (int64_t c = 0; c < C; ++c) {  // innermost, so that compilers vectorise it
      const double k = double(partial[c]), s = double(partial[C + c]), delta = k + s * each - mean[c];
      m2[c] += double(partial[2 * C + c]) + delta * delta * between;
      mean[c] += delta * share, sum[c] += n * k + s;
    }
    seen = total;
  }
  for (int64_t c = 0; c < C; ++c) {
    const bool finite = mean[c] - mean[c] == 0;
    out[c] = A(finite ? mean[c] : sum[c] / seen);
    out[C + c] = finite ? A(m2[c]) : std::numeric_limits<A>::quiet_NaN();
  }
}

}  // namespace lifeops

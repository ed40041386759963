// SPDX-License-Identifier: Apache-2.0
// Mean and m2 of a batch from its tasks' shifted sums.
#pragma once
#include <cstdint>
#include <vector>

namespace lifeops {

// `partial` (tasks, 3, C): k, sum of y - k, sum of (y - k)². `count(i)` values went into task i. out (2, C). Merged in order, in
// double (Chan, Golub, LeVeque 1983), so that neither a large mean nor the number of threads matters.
template <class A, class Count> void merge_stats(const A* partial, int64_t tasks, int64_t C, Count count, A* out) {
  std::vector<double> merged(size_t(2 * C));
  double *mean = merged.data(), *m2 = mean + C, seen = 0;
  for (int64_t i = 0; i < tasks; ++i, partial += 3 * C) {
    const double n = double(count(i)), total = seen + n, share = n / total, between = seen * share, each = 1 / n;
    for (int64_t c = 0; c < C; ++c) {  // innermost, so that compilers vectorise it
      const double s1 = double(partial[C + c]), shift = s1 * each, delta = double(partial[c]) + shift - mean[c];
      m2[c] += double(partial[2 * C + c]) - s1 * shift + delta * delta * between;
      mean[c] += delta * share;
    }
    seen = total;
  }
  for (int64_t c = 0; c < C; ++c) out[c] = A(mean[c]), out[C + c] = A(m2[c] > 0 ? m2[c] : 0);
}

}  // namespace lifeops

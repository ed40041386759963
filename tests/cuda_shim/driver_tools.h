// SPDX-License-Identifier: Apache-2.0
// What the sanitizers' programs share.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <vector>

struct Problem {
  int64_t B, H, W, C;
  int32_t K, prefix_rows;
};

template <typename T> std::vector<T> filled(int64_t n) {
  std::vector<T> v(n);
  for (int64_t i = 0; i < n; ++i) v[i] = static_cast<T>(static_cast<float>(i * 7 % 5 - 2));
  return v;
}

template <typename T> bool finite(const std::vector<T>& v) {
  for (const T& e : v)
    if (!std::isfinite(static_cast<float>(e))) return false;
  return true;
}

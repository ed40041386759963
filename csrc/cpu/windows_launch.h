// SPDX-License-Identifier: Apache-2.0
// What launchers of strided windows share: the cut into tasks, the prefix rows, the choice of an instruction set.
#pragma once
#include <cstring>

#include "../tensor_args.h"
#include "isa.h"
#include "threads.h"
#include "windows.h"

namespace lifeops {

template <class Kernels> const Kernels& of_isa(int64_t isa, const Kernels& baseline, const Kernels& avx2, const Kernels& avx512) {
  const Isa chosen = choose_isa(int(isa));
  return chosen == Isa::avx512 ? avx512 : chosen == Isa::avx2 ? avx2 : baseline;
}

// Channels in vectors, and those in tasks: as many as let `row_bytes` of each channel stay in the second-level cache.
struct VectorPlan {
  int64_t lanes, vectors, each, chunks;
  VectorPlan(int64_t C, int64_t lanes, int64_t row_bytes) : lanes(lanes), vectors(ceil_div(C, lanes)) {
    const int64_t fit = max64(1, kCacheBytes / max64(1, row_bytes * kBlock)) * kBlock / lanes;
    each = ceil_div(vectors, ceil_div(vectors, fit)), chunks = ceil_div(vectors, each);
  }
};

// Strips of rows: no more than the threads can use, since neighbours read rows twice.
inline int64_t strips_for_threads(int64_t rows, int64_t tasks) {
  const int64_t threads = int64_t(torch::stable::get_num_threads());
  return threads > 1 ? max64(1, min64(ceil_div(2 * threads, tasks), rows / 4)) : 1;
}

// The rows in front of the patches: copied, or zeros.
inline void write_prefix(const Tensor& x, const Tensor& y, int64_t rows, Prefix prefix) {
  const int64_t size = element_bytes(dtype_of(x)), channels = y.size(2);
  for (int64_t b = 0; b < y.size(0); ++b)
    for (int64_t t = 0; t < rows; ++t) {
      char* to = static_cast<char*>(y.mutable_data_ptr()) + (b * y.stride(0) + t * y.stride(1)) * size;
      if (prefix == Prefix::zero) std::memset(to, 0, size_t(channels * size));
      else std::memcpy(to, static_cast<const char*>(x.const_data_ptr()) + (b * x.stride(0) + t * x.stride(1)) * size, size_t(channels * size));
    }
}

inline Axis checked_axis(int64_t size, int64_t out, int64_t K, int64_t s, int64_t p) {
  STD_TORCH_CHECK(size >= 0 && out >= 0 && K >= 1 && s >= 1 && p >= 0,
                  "lifeops_native: the grid and the padding must not be negative, kernel and stride at least 1");
  return {size, out, K, s, p};
}

}  // namespace lifeops

// SPDX-License-Identifier: Apache-2.0
// What every CUDA kernel of lifeops needs around its arithmetic: launch shape, division by a run-time constant,
// and the few places where device code differs from its host twin. No torch in here.
#pragma once
#include <cstdint>

namespace lifeops {
namespace cuda {

constexpr int kLanes = 32;
constexpr int kWarps = 4;  // per block: 168 registers leave three such blocks per SM, 228 two
constexpr int kThreads = kWarps * kLanes;

struct LaunchShape {
  uint32_t blocks, threads;
};

// n / divisor for n < 2^31 in a multiply and a shift; the compiler's own 32-bit division takes about 20 instructions.
struct FastDiv {
  uint32_t divisor, multiplier, shift;

  FastDiv() : FastDiv(1) {}
  explicit FastDiv(uint32_t d) : divisor(d), shift(31) {
    while ((1ull << (shift - 31)) < d) ++shift;  // 2^31 * d <= 2^shift keeps the rounding error below 1/d
    multiplier = static_cast<uint32_t>(((1ull << shift) + d - 1) / d);
  }
  __host__ __device__ uint32_t div(uint32_t n) const {
    return static_cast<uint32_t>((static_cast<uint64_t>(n) * multiplier) >> shift);
  }
};

// The same value in all lanes, told to the compiler: conditions on it become plain branches without reconvergence.
__device__ __forceinline__ int warp_uniform(int value) {
#ifdef __CUDACC__
  return __shfl_sync(0xffffffffu, value, 0);
#else
  return value;
#endif
}

template <typename T> __device__ __forceinline__ const T* advance(const T* base, int64_t bytes) {
  return reinterpret_cast<const T*>(reinterpret_cast<const char*>(base) + bytes);
}
template <typename T> __device__ __forceinline__ T* advance(T* base, int64_t bytes) {
  return reinterpret_cast<T*>(reinterpret_cast<char*>(base) + bytes);
}
// Where a value came from is forgotten here. Addresses: left alone, the compiler re-derives every column of a tile from
// the tensor's base, two or three instructions each; from a row pointer, a stride and a count that it cannot see
// through, a column costs one wide multiply-add. 2 instructions per element less at K 3.
template <typename T> __device__ __forceinline__ T* opaque(T* pointer) {
#ifdef __CUDACC__
  asm volatile("" : "+l"(pointer));
  __builtin_assume(__isGlobal(pointer));  // this is not forgotten: LDG, not LD
#endif
  return pointer;
}
__device__ __forceinline__ uint32_t opaque(uint32_t value) {
#ifdef __CUDACC__
  asm volatile("" : "+r"(value));
#endif
  return value;
}

// base + i * stride for i < kCount: the columns of a row, the rows of a tile.
template <int kCount> struct Steps {
  uint32_t stride_bytes, n[kCount];

  __device__ __forceinline__ explicit Steps(uint32_t stride) : stride_bytes(opaque(stride)) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) n[i] = opaque(static_cast<uint32_t>(i));
  }
  template <typename T> __device__ __forceinline__ T* at(T* base, int i) const {
    return i == 0 ? base : advance(base, static_cast<uint64_t>(n[i]) * stride_bytes);
  }
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace cuda
}  // namespace lifeops

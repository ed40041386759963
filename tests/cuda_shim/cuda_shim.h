// SPDX-License-Identifier: Apache-2.0
// Runs CUDA kernels on the CPU: enough of the language for our torch-free .cuh files to compile with a host compiler.
// One std::thread per CUDA thread of a block, blocks in turn, __syncthreads a std::barrier: so ThreadSanitizer sees the
// races and AddressSanitizer the stray accesses the GPU would have. `sequential` runs the threads of a block one after
// the other instead, for kernels without a barrier: no thread to start, a hundred times faster.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <barrier>
#include <cmath>
#include <cstdint>
#include <optional>
#include <thread>
#include <vector>

#undef __global__
#undef __device__
#undef __host__
#undef __shared__
#undef __forceinline__
#undef __launch_bounds__
#undef __grid_constant__
#define __global__ static
#define __device__
#define __host__
#define __shared__ static  // one block at a time
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__

inline thread_local uint3 threadIdx{}, blockIdx{};
inline thread_local dim3 blockDim{}, gridDim{};
inline std::optional<std::barrier<>> block_barrier;

// A block of one (sequential) has nothing to wait for, which is wrong if the kernel needed it: tests run both ways.
inline void __syncthreads() {
  if (block_barrier) block_barrier->arrive_and_wait();
}

using std::max;
using std::min;
inline int64_t min(int64_t a, int b) { return a < b ? a : b; }
inline int64_t min(int a, int64_t b) { return a < b ? a : b; }

namespace cuda_shim {

inline void enter(uint32_t thread, uint32_t block, uint32_t threads, uint32_t blocks) {
  threadIdx = {thread, 0, 0};
  blockIdx = {block, 0, 0};
  blockDim = dim3(threads);
  gridDim = dim3(blocks);
}

template <typename Kernel, typename Args>
void launch(Kernel kernel, uint32_t blocks, uint32_t threads, const Args& args, bool sequential) {
  if (sequential) {
    for (uint32_t block = 0; block < blocks; ++block)
      for (uint32_t thread = 0; thread < threads; ++thread) {
        enter(thread, block, threads, blocks);
        kernel(args);
      }
    return;
  }
  block_barrier.emplace(threads);
  std::barrier<> next_block(threads);
  std::vector<std::thread> pool;
  for (uint32_t thread = 0; thread < threads; ++thread)
    pool.emplace_back([&, thread] {
      for (uint32_t block = 0; block < blocks; ++block) {
        enter(thread, block, threads, blocks);
        kernel(args);
        next_block.arrive_and_wait();
      }
    });
  for (std::thread& t : pool) t.join();
  block_barrier.reset();
}

}  // namespace cuda_shim

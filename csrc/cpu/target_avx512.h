// SPDX-License-Identifier: Apache-2.0
// AVX-512 F, BW, VL, DQ. The first thing that a file of kernels includes: what follows is compiled for it, in its namespace.
#pragma once
#include <cstdint>
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")
#endif
#define LIFEOPS_ISA avx512
#define LIFEOPS_VEC_BYTES 64

// SPDX-License-Identifier: Apache-2.0
// AVX2 with FMA and F16C. The first thing that a file of kernels includes: what follows is compiled for it, in its namespace.
#pragma once
#include <cstdint>
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif
#define LIFEOPS_ISA avx2
#define LIFEOPS_VEC_BYTES 32

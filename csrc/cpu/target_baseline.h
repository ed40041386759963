// SPDX-License-Identifier: Apache-2.0
// The compiler's default instruction set (SSE2 or NEON). The first thing that a file of kernels includes: what follows is compiled for it, in its namespace.
#pragma once
#include <cstdint>
#if defined(__aarch64__)
#include <arm_neon.h>
#endif
#define LIFEOPS_ISA baseline
#define LIFEOPS_VEC_BYTES 16

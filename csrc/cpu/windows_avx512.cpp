// SPDX-License-Identifier: Apache-2.0
// AVX-512 F, BW, VL, DQ.
#if defined(__x86_64__)
#include "target_avx512.h"

#include "token_conv_kernels.h"
#include "token_pool_kernels.h"

namespace lifeops {
const TokenConvKernels token_conv_avx512 = avx512::kTokenConv;
const TokenPoolKernels token_pool_avx512 = avx512::kTokenPool;
}  // namespace lifeops
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif

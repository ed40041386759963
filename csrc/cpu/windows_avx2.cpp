// SPDX-License-Identifier: Apache-2.0
// AVX2 with FMA and F16C.
#if defined(__x86_64__)
#include "target_avx2.h"

#include "token_conv_kernels.h"
#include "token_pool_kernels.h"

namespace lifeops {
const TokenConvKernels token_conv_avx2 = avx2::kTokenConv;
const TokenPoolKernels token_pool_avx2 = avx2::kTokenPool;
}  // namespace lifeops
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif

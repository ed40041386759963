// SPDX-License-Identifier: Apache-2.0
// The compiler's default instruction set (SSE2 or NEON).
#include "target_baseline.h"

#include "token_conv_kernels.h"
#include "token_pool_kernels.h"

namespace lifeops {
const TokenConvKernels token_conv_baseline = baseline::kTokenConv;
const TokenPoolKernels token_pool_baseline = baseline::kTokenPool;
}  // namespace lifeops

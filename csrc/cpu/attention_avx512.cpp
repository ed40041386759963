// SPDX-License-Identifier: Apache-2.0
// AVX-512 F, BW, VL, DQ.
#if defined(__x86_64__)
#include <cmath>
#include <limits>
#include <type_traits>
#include <utility>

#include "target_avx512.h"

#include "local_attention_kernels.h"

namespace lifeops {
const AttentionKernels attention_avx512 = avx512::kAttention;
}  // namespace lifeops
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif

// SPDX-License-Identifier: Apache-2.0
// AVX2 with FMA and F16C.
#if defined(__x86_64__)
#include <cmath>
#include <limits>
#include <type_traits>
#include <utility>

#include "target_avx2.h"

#include "local_attention_kernels.h"

namespace lifeops {
const AttentionKernels attention_avx2 = avx2::kAttention;
}  // namespace lifeops
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif

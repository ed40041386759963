// SPDX-License-Identifier: Apache-2.0
// The compiler's default instruction set (SSE2 or NEON).
#include <cmath>
#include <limits>
#include <type_traits>
#include <utility>

#include "target_baseline.h"

#include "local_attention_kernels.h"

namespace lifeops {
const AttentionKernels attention_baseline = baseline::kAttention;
}  // namespace lifeops

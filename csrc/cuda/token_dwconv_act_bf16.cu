// SPDX-License-Identifier: Apache-2.0
#include "token_dwconv_act_launch.cuh"

LIFEOPS_TOKEN_DWCONV_ACT_OF(lifeops::bf16)

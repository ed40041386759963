// SPDX-License-Identifier: Apache-2.0
#include "token_dwconv_launch.cuh"

LIFEOPS_TOKEN_DWCONV_OF(lifeops::f16)

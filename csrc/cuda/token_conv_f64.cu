// SPDX-License-Identifier: Apache-2.0
#include "token_conv_launch.cuh"

LIFEOPS_TOKEN_CONV_OF(double)

// SPDX-License-Identifier: Apache-2.0
#include "channel_act_launch.cuh"

LIFEOPS_CHANNEL_ACT_OF(float)

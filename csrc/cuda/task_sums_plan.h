// SPDX-License-Identifier: Apache-2.0
// How the sums of a sweep's tasks are added. Pure host functions of the problem. No torch in here.
#pragma once
#include "sweep_plan.h"

namespace lifeops {
namespace cuda {

struct TaskSumsArgs {
  Strips strips;
  int64_t B, C;
  const void* partial;  // (tasks, sums, C) in the accumulator's type
  double* merged;       // (chunks, sums + 1, C)
  void* out;            // in the accumulator's type: (2, C), for a pool (sums, B, C)
  int32_t sums, tasks_per_chunk, chunks;
};

inline TaskSumsArgs plan_task_sums(const Strips& strips, int64_t B, int64_t C, int sums) {
  TaskSumsArgs a{};
  a.strips = strips, a.B = B, a.C = C, a.sums = sums;
  int64_t root = 1;
  while (root * root < strips.tiling.tasks) ++root;
  a.tasks_per_chunk = static_cast<int32_t>(std::max<int64_t>(root, 16));
  a.chunks = static_cast<int32_t>(ceil_div(strips.tiling.tasks, a.tasks_per_chunk));
  return a;
}

inline LaunchShape one_thread_each(int64_t count) { return {checked_blocks(ceil_div(count, kThreads)), kThreads}; }

}  // namespace cuda
}  // namespace lifeops

// SPDX-License-Identifier: Apache-2.0
// Per-channel values, activations and sums of the operators with a prologue: from optional tensors to plain pointers.
#pragma once
#include "activations.cuh"
#include "launcher.h"
#include "task_sums_plan.h"

namespace lifeops {
namespace cuda {

// `numel` values of the accumulator's type on the device of `first`, or null.
inline void* checked_values(const std::optional<Tensor>& t, const char* name, int64_t numel, DType dtype, const Tensor& first) {
  if (!t) return nullptr;
  check_device(name, *t, first);
  check_size(*t, name, numel);
  STD_TORCH_CHECK(t->scalar_type() == accumulator_type(dtype), "lifeops_native: ", name, " must have the accumulation type");
  return t->mutable_data_ptr();
}

// gelu_first is for prologues.
inline AffineAct checked_affine(const std::optional<Tensor>& scale, const std::optional<Tensor>& shift, int64_t act, int64_t most,
                                int64_t C, DType dtype, const Tensor& first) {
  STD_TORCH_CHECK(act >= 0 && act <= most, "lifeops_native: unknown activation ", act);
  return {checked_values(scale, "scale", C, dtype, first), checked_values(shift, "shift", C, dtype, first), Act(act)};
}

// Room for the sums of all tasks and of their chunks, for as long as this lives; the caching allocator keeps the memory in
// the order of the stream.
class SumsBuffers {
 public:
  SumsBuffers(const TaskSumsArgs& a, DType dtype, const Tensor& like)
      : partial_(torch::stable::new_empty(like, {a.strips.tiling.tasks, a.sums, a.C}, accumulator_type(dtype))),
        merged_(torch::stable::new_empty(like, {a.chunks, a.sums + 1, a.C}, torch::headeronly::ScalarType::Double)) {}

  void* partial() const { return partial_.mutable_data_ptr(); }
  void give(TaskSumsArgs& a, void* out) const {
    a.partial = partial(), a.merged = static_cast<double*>(merged_.mutable_data_ptr()), a.out = out;
  }

 private:
  Tensor partial_, merged_;
};

}  // namespace cuda
}  // namespace lifeops

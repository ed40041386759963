// SPDX-License-Identifier: Apache-2.0
// CPU launcher: cuts the work into tasks for torch's thread pool, packs the weights, sums the partial weight gradients.
// How the work is cut depends on the problem only, so results are the same at any thread count.
#include <memory>

#include "../tensor_args.h"
#include "merge_stats.h"
#include "launch.h"
#include "token_dwconv_pack.h"
#include "threads.h"

namespace lifeops {
namespace {

thread_local Scratch ring_scratch;    // one task's rows
thread_local Scratch shared_scratch;  // the calling thread's packed weights or partial sums, read by all

template <class A> A* pack(const TokenDWConvParams& p, int64_t blocks, const A** bias) {
  const int64_t taps = p.K * p.K, weights = blocks * taps * kBlock;
  A* out = static_cast<A*>(shared_scratch.get((weights + blocks * kBlock) * int64_t(sizeof(A))));
  const int64_t grain = max64(1, kGrainBytes / (taps * kBlock * int64_t(sizeof(A))));
  for_each_task(blocks, grain, [&](int64_t block) { pack_block(p, block, out + block * taps * kBlock); });
  if (p.bias) {
    pack_bias(p, blocks, out + weights);
    *bias = out + weights;
  }
  return out;
}

// Row strips: one per image unless that leaves too few tasks; a strip re-reads K - 1 rows.
constexpr int64_t kTasks = 16;  // wanted, for many cores
int64_t row_strips(int64_t H, int64_t K, int64_t tasks, int64_t wanted = kTasks) {
  return min64(ceil_div(wanted, tasks), max64(1, H / (2 * K)));
}

// How the output is cut. Sums depend on it, the output itself does not: without them there are no more strips than the threads need.
struct ForwardPlan {
  int64_t channels, chunks, segments, strips;
  ForwardPlan(const TokenDWConvParams& p, const TokenDWConvKernels& kernel, bool sums)
      : channels(kernel.forward_channels(p)), chunks(ceil_div(p.C, channels)), segments(ceil_div(p.W, kSegment)),
        strips(row_strips(p.H, p.K, p.B * chunks * segments, sums ? kTasks : tasks_of_threads())) {}
  static int64_t tasks_of_threads() {
    const int64_t threads = int64_t(torch::stable::get_num_threads());
    return threads > 1 ? min64(kTasks, 2 * threads) : 1;
  }
  int64_t parts() const { return segments * strips; }  // of an image
  // Output positions of part i of all images' parts, numbered as run_forward numbers them.
  int64_t positions(const TokenDWConvParams& p, int64_t i) const {
    const int64_t strip = i % strips, segment = i / strips % segments;
    return ((strip + 1) * p.H / strips - strip * p.H / strips) * ((segment + 1) * p.W / segments - segment * p.W / segments);
  }
};

// Whether what is added is the input itself, which one more on every filter's centre does too.
bool adds_input(const TokenDWConvParams& p) {
  const bool same = p.residual == p.x && p.r_stride_b == p.x_stride_b && p.r_stride_n == p.x_stride_n && p.x_prefix == p.y_prefix;
  return same && (p.prefix == Prefix::zero || p.y_prefix == 0);
}

// `sums`: (images' parts, kTaskSums, C), or null.
template <class A>
void run_forward(TokenDWConvParams p, const TokenDWConvKernels& kernel, const TokenDWConvExtras* extras = nullptr, A* sums = nullptr) {
  const A* bias = nullptr;
  A* weight = pack<A>(p, ceil_div(p.C, kBlock), &bias);
  if (!extras && adds_input(p)) {
    const int64_t taps = p.K * p.K;
    for (int64_t c = 0; c < p.C; ++c) weight[(c / kBlock * taps + taps / 2) * kBlock + c % kBlock] += 1;
    p.residual = nullptr, p.prefix = Prefix::copy;
  }
  const ForwardPlan plan(p, kernel, sums != nullptr);
  const int64_t task_bytes = max64(1, p.H * p.W * plan.channels * int64_t(sizeof(A)) / plan.parts()), scratch = kernel.forward_scratch(p);
  const bool backwards = extras && extras->backwards;
  const int64_t tasks = p.B * plan.parts() * plan.chunks;
  const auto task_at = [&](int64_t i) {  // chunks innermost: neighbours share pages
    const int64_t c0 = i % plan.chunks * plan.channels, part = i / plan.chunks, strip = part % plan.strips;
    const int64_t segment = part / plan.strips % plan.segments;
    return ForwardTask{part / plan.parts(), c0, min64(p.C, c0 + plan.channels), strip * p.H / plan.strips,
                       (strip + 1) * p.H / plan.strips, segment * p.W / plan.segments, (segment + 1) * p.W / plan.segments,
                       strip == 0 && segment == 0, extras, sums ? sums + part * kTaskSums * p.C : nullptr, nullptr};
  };
  for_each_task(tasks, max64(1, kGrainBytes / task_bytes), [&](int64_t i) {
    const ForwardTask next = task_at(backwards ? max64(0, i - 1) : min64(tasks - 1, i + 1));
    ForwardTask task = task_at(i);
    task.next = &next;
    kernel.forward(p, weight, bias, task, ring_scratch.get(scratch));
  }, backwards);
}

void token_dwconv(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const std::optional<Tensor>& residual,
                  const Tensor& y, int64_t H, int64_t W, int64_t x_prefix, int64_t y_prefix, int64_t prefix_mode, bool flip,
                  int64_t isa) {
  const TokenDWConvParams p = forward_params(x, weight, bias, residual, y, H, W, x_prefix, y_prefix, prefix_mode, flip);
  if (p.B * p.H * p.W * p.C == 0) return;
  if (p.dtype == DType::f64) run_forward<double>(p, kernels(isa));
  else run_forward<float>(p, kernels(isa));
}

// How the sum is cut: units (see GradWeightTask) into groups, from the problem alone; each group's sums are written, and read again,
// so there are few. Channels into chunks, as many as there are threads for: no sum depends on them.
constexpr int64_t kGroups = 8;
struct GradPlan {
  int64_t blocks, strips, segments, units, units_per_group, groups, channels, chunks;

  GradPlan(const GradWeightParams& p, const TokenDWConvKernels& kernel) : blocks(ceil_div(p.C, kBlock)), segments(ceil_div(p.W, kSegment)) {
    strips = row_strips(p.H, p.K, p.B * segments);
    units = p.B * strips * segments;
    units_per_group = ceil_div(units, min64(units, kGroups));
    groups = ceil_div(units, units_per_group);
    const int64_t share = ceil_div(blocks, ceil_div(int64_t(torch::stable::get_num_threads()), groups)) * kBlock;
    channels = min64(share, kernel.grad_weight_channels(p));
    chunks = ceil_div(p.C, channels);
  }
};

template <class A>
void run_grad_weight(const GradWeightParams& p, const TokenDWConvKernels& kernel, const ChannelAffine* prologue = nullptr) {
  const GradPlan plan(p, kernel);
  const int64_t size = grad_weight_rows(p) * kBlock, scratch = kernel.grad_weight_scratch(p);
  A* partials = static_cast<A*>(shared_scratch.get(plan.groups * plan.blocks * size * int64_t(sizeof(A))));
  const int64_t unit_bytes = max64(1, p.H * p.W * plan.channels * int64_t(sizeof(A)) / (plan.strips * plan.segments));
  const int64_t grain = max64(1, kGrainBytes / (unit_bytes * plan.units_per_group));
  for_each_task(plan.groups * plan.chunks, grain, [&](int64_t i) {
    const int64_t c0 = i % plan.chunks * plan.channels, group = i / plan.chunks, first = group * plan.units_per_group;
    const GradWeightTask task{c0, min64(p.C, c0 + plan.channels), first, min64(first + plan.units_per_group, plan.units),
                              plan.strips, plan.segments, partials + (group * plan.blocks + c0 / kBlock) * size, prologue};
    kernel.grad_weight(p, task, ring_scratch.get(scratch));
  });
  for_each_task(plan.blocks, max64(1, kGrainBytes / (plan.groups * size * int64_t(sizeof(A)))), [&](int64_t block) { reduce_block(p, plan.groups, plan.blocks, block, partials); });
}

void token_dwconv_grad_weight(const Tensor& dy, const std::optional<Tensor>& x, const std::optional<Tensor>& dw,
                              const std::optional<Tensor>& db, int64_t K, int64_t H, int64_t W, int64_t dy_prefix,
                              int64_t x_prefix, int64_t isa) {
  const GradWeightParams p = grad_weight_params(dy, x, dw, db, K, H, W, dy_prefix, x_prefix);
  if (p.B * p.H * p.W * p.C == 0) return;
  if (p.dtype == DType::f64) run_grad_weight<double>(p, kernels(isa));
  else run_grad_weight<float>(p, kernels(isa));
}

// ---- with a prologue and an epilogue

// C values, or `filled` with a constant where there are none.
template <class A>
const void* channel_values(const std::optional<Tensor>& t, const char* name, A otherwise, int64_t C, DType dtype, std::vector<A>& filled) {
  if (!t) return filled.assign(size_t(C), otherwise), filled.data();
  check_accumulated(*t, name, C, dtype);
  return t->const_data_ptr();
}

// f(scale * value + shift) with what is absent filled in.
template <class A> class AffineValues {
 public:
  AffineValues(const std::optional<Tensor>& scale, const std::optional<Tensor>& shift, int64_t act, int64_t C, DType dtype) {
    STD_TORCH_CHECK(act >= 0 && act <= int64_t(Act::gelu_first), "lifeops_native: unknown activation ", act);
    affine_ = {channel_values(scale, "scale", A(1), C, dtype, ones_), channel_values(shift, "shift", A(0), C, dtype, zeros_), Act(act)};
    plain_ = !scale && !shift && affine_.act == Act::none;
  }
  const ChannelAffine* get() const { return &affine_; }
  const ChannelAffine* unless_plain() const { return plain_ ? nullptr : &affine_; }

 private:
  std::vector<A> ones_, zeros_;
  ChannelAffine affine_;
  bool plain_;
};

template <class A> A* sums_out(const std::optional<Tensor>& t, const char* name, int64_t numel, DType dtype) {
  if (!t) return nullptr;
  check_accumulated(*t, name, numel, dtype);
  return static_cast<A*>(t->mutable_data_ptr());
}

template <class A>
void forward_act(const TokenDWConvParams& p, const TokenDWConvKernels& kernel, const AffineValues<A>& prologue, const AffineValues<A>& epilogue,
                 A* pool, A* stats) {
  const ForwardPlan plan(p, kernel, pool || stats);
  std::vector<A> sums(pool || stats ? size_t(p.B * plan.parts() * kTaskSums * p.C) : 0);
  const TokenDWConvExtras extras{prologue.unless_plain(), epilogue.unless_plain(), nullptr, nullptr, nullptr, nullptr, 0, 0, !sums.empty()};
  run_forward<A>(p, kernel, &extras, sums.empty() ? nullptr : sums.data());
  const auto positions = [&](int64_t i) { return plan.positions(p, i); };
  if (stats) merge_stats(sums.data(), p.B * plan.parts(), p.C, positions, stats);
  for (int64_t i = 0; pool && i < p.B * plan.parts(); ++i) {
    A* total = pool + i / plan.parts() * p.C;
    const A *first = sums.data() + i * kTaskSums * p.C, *rest = first + p.C, n = A(positions(i));
    for (int64_t c = 0; c < p.C; ++c) total[c] = (i % plan.parts() ? total[c] : 0) + n * first[c] + rest[c];
  }
}

void token_dwconv_act(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const std::optional<Tensor>& scale,
                      const std::optional<Tensor>& shift, int64_t act, const std::optional<Tensor>& out_scale,
                      const std::optional<Tensor>& out_shift, int64_t out_act, const std::optional<Tensor>& residual, const Tensor& y,
                      const std::optional<Tensor>& pool, const std::optional<Tensor>& stats, int64_t H, int64_t W, int64_t x_prefix,
                      int64_t y_prefix, int64_t prefix_mode, int64_t isa) {
  const TokenDWConvParams p = forward_params(x, weight, bias, residual, y, H, W, x_prefix, y_prefix, prefix_mode, false);
  if (p.B * p.H * p.W * p.C == 0) return;
  const auto run = [&](auto zero) {
    using A = decltype(zero);
    forward_act<A>(p, kernels(isa), AffineValues<A>(scale, shift, act, p.C, p.dtype), AffineValues<A>(out_scale, out_shift, out_act, p.C, p.dtype),
                   sums_out<A>(pool, "pool", p.B * p.C, p.dtype), sums_out<A>(stats, "stats", 2 * p.C, p.dtype));
  };
  p.dtype == DType::f64 ? run(double{}) : run(float{});
}

// dx, and sums (2, C): of x dv and of dv.
void token_dwconv_act_grad_input(const Tensor& dy, const Tensor& x, const Tensor& weight, const std::optional<Tensor>& scale,
                                 const std::optional<Tensor>& shift, int64_t act, const std::optional<Tensor>& a,
                                 const std::optional<Tensor>& b, const Tensor& dx, const Tensor& sums, int64_t H, int64_t W,
                                 int64_t dy_prefix, int64_t x_prefix, int64_t prefix_mode, int64_t isa) {
  const TokenDWConvParams p = forward_params(dy, weight, {}, {}, dx, H, W, dy_prefix, x_prefix, prefix_mode, true);
  check_sequence(x, "x", p.B, x_prefix + H * W, p.C, p.dtype);
  if (p.B * p.H * p.W * p.C == 0) return;
  const auto run = [&](auto zero) {
    using A = decltype(zero);
    const TokenDWConvKernels& kernel = kernels(isa);
    const int64_t parts = ForwardPlan(p, kernel, true).parts() * p.B;
    const AffineValues<A> affine(scale, shift, act, p.C, p.dtype);
    std::vector<A> zeros;
    const TokenDWConvExtras extras{nullptr, nullptr, affine.get(), channel_values(a, "a", A(0), p.C, p.dtype, zeros),
                                   b ? channel_values(b, "b", A(0), p.C, p.dtype, zeros) : nullptr, behind(x, x_prefix, p.dtype),
                                   x.stride(0), x.stride(1), true, false};
    std::vector<A> partial(size_t(parts * kTaskSums * p.C));
    run_forward<A>(p, kernel, &extras, partial.data());
    A* out = sums_out<A>(sums, "sums", 2 * p.C, p.dtype);
    std::vector<double> total(size_t(2 * p.C));
    for (int64_t i = 0; i < parts; ++i)
      for (int64_t c = 0; c < 2 * p.C; ++c) total[size_t(c)] += double(partial[size_t(i * kTaskSums * p.C + c)]);
    for (int64_t c = 0; c < 2 * p.C; ++c) out[c] = A(total[size_t(c)]);
  };
  p.dtype == DType::f64 ? run(double{}) : run(float{});
}

void token_dwconv_act_grad_weight(const Tensor& dy, const Tensor& x, const std::optional<Tensor>& scale, const std::optional<Tensor>& shift,
                                  int64_t act, const Tensor& dw, const std::optional<Tensor>& db, int64_t K, int64_t H, int64_t W,
                                  int64_t dy_prefix, int64_t x_prefix, int64_t isa) {
  const GradWeightParams p = grad_weight_params(dy, x, dw, db, K, H, W, dy_prefix, x_prefix);
  if (p.B * p.H * p.W * p.C == 0) return;
  const auto run = [&](auto zero) {
    using A = decltype(zero);
    run_grad_weight<A>(p, kernels(isa), AffineValues<A>(scale, shift, act, p.C, p.dtype).unless_plain());
  };
  p.dtype == DType::f64 ? run(double{}) : run(float{});
}

}  // namespace

void launch_forward(const TokenDWConvParams& p, const TokenDWConvExtras& extras, int64_t isa) {
  const TokenDWConvKernels& kernel = kernels(isa);
  const auto run = [&](auto zero) {
    std::vector<decltype(zero)> sums(size_t(extras.sums ? ForwardPlan(p, kernel, true).parts() * p.B * kTaskSums * p.C : 0), zero);
    run_forward(p, kernel, &extras, sums.empty() ? nullptr : sums.data());
  };
  p.dtype == DType::f64 ? run(double{}) : run(float{});
}

void launch_grad_weight(const GradWeightParams& p, const ChannelAffine& prologue, int64_t isa) {
  p.dtype == DType::f64 ? run_grad_weight<double>(p, kernels(isa), &prologue) : run_grad_weight<float>(p, kernels(isa), &prologue);
}

}  // namespace lifeops

STABLE_TORCH_LIBRARY_IMPL(lifeops_native, CPU, m) {
  m.impl("token_dwconv", TORCH_BOX(&lifeops::token_dwconv));
  m.impl("token_dwconv_grad_weight", TORCH_BOX(&lifeops::token_dwconv_grad_weight));
  m.impl("token_dwconv_act", TORCH_BOX(&lifeops::token_dwconv_act));
  m.impl("token_dwconv_act_grad_input", TORCH_BOX(&lifeops::token_dwconv_act_grad_input));
  m.impl("token_dwconv_act_grad_weight", TORCH_BOX(&lifeops::token_dwconv_act_grad_weight));
}

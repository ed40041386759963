// SPDX-License-Identifier: Apache-2.0
// CPU launcher of the channel passes: images cut into strips of tokens, partial sums merged in a fixed order.
#include "channel_act.h"

#include <algorithm>
#include <cstring>

#include "../tensor_args.h"
#include "isa.h"
#include "launch.h"
#include "merge_stats.h"
#include "threads.h"

namespace lifeops {
namespace {

ChannelActKernel kernel_of(int64_t isa) {
#if defined(__x86_64__)
  const Isa chosen = choose_isa(int(isa));
  if (chosen == Isa::avx512) return channel_act_avx512;
  if (chosen == Isa::avx2) return channel_act_avx2;
#endif
  return channel_act_baseline;
}

thread_local Scratch constants_scratch;
thread_local Scratch partial_scratch;
thread_local Scratch strip_scratch;  // of one image's strip

// The last `patches` rows of a sequence.
Rows patch_rows(const Tensor& t, const char* name, const ChannelActParams& p) {
  const int64_t lead = t.size(1) - p.n;
  STD_TORCH_CHECK(lead >= 0, "lifeops_native: ", name, " has fewer tokens than patches");
  check_sequence(t, name, p.B, lead + p.n, p.C, p.dtype);
  return {const_cast<char*>(behind(t, lead, p.dtype)), t.stride(0), t.stride(1)};
}

const void* values(const std::optional<Tensor>& t, const char* name, int64_t numel, const ChannelActParams& p, const void* otherwise) {
  if (!t) return otherwise;
  check_accumulated(*t, name, numel, p.dtype);
  return t->const_data_ptr();
}

constexpr int64_t kTasks = 16;  // wanted, for many cores

bool of_images(const ChannelActParams& p) { return p.pass == ChannelPass::pool || p.pass == ChannelPass::sums; }

// None of more than 1024 tokens, whose float sums would lose too much. An image's own sums are cut by its size alone, so that they are the
// same in any batch; elsewhere there are few tasks when there are many images. The number of threads never matters.
int64_t strips_of(const ChannelActParams& p) {
  const int64_t most = std::max<int64_t>(1, p.n / (of_images(p) ? 128 : 16)), tasks = of_images(p) ? kTasks : (kTasks + p.B - 1) / p.B;
  return std::min(most, std::max(tasks, (p.n + 1023) / 1024));
}

// Strips of an image start at multiples of eight tokens, which are summed together.
int64_t start_of(const ChannelActParams& p, int64_t strip, int64_t strips) { return strip < strips ? strip * p.n / strips / 8 * 8 : p.n; }

// Add one strip's sums (k, C) to those of image b: out[k][b][c]. The first strip's are added to zero.
template <class A> void add_strip(const ChannelActParams& p, int64_t b, bool first, const A* strip, A* out) {
  for (int64_t k = 0; k < channel_sums(p.pass); ++k, strip += p.C) {
    A* const total = out + (k * p.B + b) * p.C;
    if (first) std::fill(total, total + p.C, A(0));
    for (int64_t c = 0; c < p.C; ++c) total[c] += strip[c];
  }
}

// Rows of the residual in front of its patches.
void copy_lead(const ChannelActParams& p, const Tensor& residual, const Tensor& y) {
  const int64_t lead = residual.size(1) - p.n, size = element_bytes(p.dtype);
  for (int64_t b = 0; b < p.B; ++b)
    for (int64_t t = 0; t < lead; ++t)
      std::memcpy(static_cast<char*>(y.mutable_data_ptr()) + (b * y.stride(0) + t * y.stride(1)) * size,
                  static_cast<const char*>(residual.const_data_ptr()) + (b * residual.stride(0) + t * residual.stride(1)) * size, p.C * size);
}

template <class A> void run(const ChannelActParams& p, ChannelActKernel kernel, A* out) {
  const int64_t strips = strips_of(p), sums = channel_sums(p.pass) * p.C;
  const auto task_of = [&](int64_t b, int64_t s, A* partial) { return ChannelTask{b, start_of(p, s, strips), start_of(p, s + 1, strips), partial}; };
  const int64_t strip_bytes = p.n * p.C * int64_t(sizeof(A)) / strips + 1;
  if (of_images(p) && p.B >= kTasks) {  // images are tasks enough: each adds up its own strips
    for_each_task(p.B, kGrainBytes / (strip_bytes * strips) + 1, [&](int64_t b) {
      A* const partial = static_cast<A*>(strip_scratch.get(sums * int64_t(sizeof(A))));
      for (int64_t s = 0; s < strips; ++s) kernel(p, task_of(b, s, partial)), add_strip(p, b, s == 0, partial, out);
    });
    return;
  }
  A* const partial = static_cast<A*>(partial_scratch.get(p.B * strips * sums * int64_t(sizeof(A))));
  for_each_task(p.B * strips, kGrainBytes / strip_bytes + 1, [&](int64_t i) { kernel(p, task_of(i / strips, i % strips, partial + i * sums)); });
  const auto count = [&](int64_t i) { return start_of(p, i % strips + 1, strips) - start_of(p, i % strips, strips); };
  if (p.pass == ChannelPass::stats) merge_stats(partial, p.B * strips, p.C, count, out);
  else if (sums)
    for (int64_t i = 0; i < p.B * strips; ++i) add_strip(p, i / strips, i % strips == 0, partial + i * sums, out);
}

// Per-channel ones, and zeros behind them.
const void* constants(int64_t C, bool wide) {
  const int64_t size = wide ? 8 : 4;
  char* ones = static_cast<char*>(constants_scratch.get(2 * C * size));
  for (int64_t c = 0; c < C; ++c) wide ? reinterpret_cast<double*>(ones)[c] = 1 : reinterpret_cast<float*>(ones)[c] = 1;
  std::memset(ones + C * size, 0, C * size);
  return ones;
}

void channel_act(int64_t pass, const Tensor& x, const std::optional<Tensor>& dy, const std::optional<Tensor>& scale,
                 const std::optional<Tensor>& shift, const std::optional<Tensor>& gate, const std::optional<Tensor>& pool_grad,
                 const std::optional<Tensor>& a, const std::optional<Tensor>& b, const std::optional<Tensor>& residual,
                 const std::optional<Tensor>& y, const std::optional<Tensor>& sums, int64_t act, int64_t patches, int64_t isa) {
  ChannelActParams p{};
  STD_TORCH_CHECK(pass >= 0 && pass <= 4 && act >= 0 && act <= int64_t(Act::gelu), "lifeops_native: unknown pass or activation");
  p.pass = ChannelPass(pass), p.act = Act(act), p.dtype = dtype_of(x), p.B = x.size(0), p.n = patches, p.C = x.size(2);
  if (p.B * p.n * p.C == 0) return;
  const bool writes = p.pass == ChannelPass::act || p.pass == ChannelPass::grad;
  const bool reads_dy = p.pass == ChannelPass::sums || p.pass == ChannelPass::grad;
  STD_TORCH_CHECK(writes == y.has_value() && writes != sums.has_value() && reads_dy == dy.has_value(), "lifeops_native: wrong tensors for this pass");
  p.x = patch_rows(x, "x", p);
  if (dy) p.dy = patch_rows(*dy, "dy", p);
  if (y) p.y = patch_rows(*y, "y", p);
  if (residual) {
    p.residual = patch_rows(*residual, "residual", p);
    STD_TORCH_CHECK(y && y->size(1) == residual->size(1), "lifeops_native: y must have the residual's rows");
  }
  const bool wide = p.dtype == DType::f64;
  const int64_t size = wide ? 8 : 4;
  const void *ones = constants(p.C, wide), *zeros = static_cast<const char*>(ones) + p.C * size;
  p.scale = values(scale, "scale", p.C, p, ones), p.shift = values(shift, "shift", p.C, p, zeros);
  p.gate = values(gate, "gate", p.B * p.C, p, ones), p.gate_stride = gate ? p.C : 0;
  p.pool_grad = values(pool_grad, "pool_grad", p.B * p.C, p, zeros), p.pool_grad_stride = pool_grad ? p.C : 0;
  p.a = values(a, "a", p.C, p, nullptr), p.b = values(b, "b", p.C, p, nullptr);
  void* out = nullptr;
  if (sums) {
    check_accumulated(*sums, "sums", p.pass == ChannelPass::stats ? 2 * p.C : channel_sums(p.pass) * p.B * p.C, p.dtype);
    out = sums->mutable_data_ptr();
  }
  if (residual) copy_lead(p, *residual, *y);
  if (wide) run(p, kernel_of(isa), static_cast<double*>(out));
  else run(p, kernel_of(isa), static_cast<float*>(out));
}

}  // namespace

void launch_channel_stats(const Rows& x, int64_t B, int64_t n, int64_t C, DType dtype, Act act, int64_t isa, void* out) {
  ChannelActParams p{};
  p.pass = ChannelPass::stats, p.act = act, p.dtype = dtype, p.x = x, p.B = B, p.n = n, p.C = C;
  const bool wide = dtype == DType::f64;
  p.scale = constants(C, wide), p.shift = static_cast<const char*>(p.scale) + C * (wide ? 8 : 4);
  if (wide) run(p, kernel_of(isa), static_cast<double*>(out));
  else run(p, kernel_of(isa), static_cast<float*>(out));
}

}  // namespace lifeops

STABLE_TORCH_LIBRARY_IMPL(lifeops_native, CPU, m) { m.impl("channel_act", TORCH_BOX(&lifeops::channel_act)); }

// SPDX-License-Identifier: Apache-2.0
// CPU launcher of attention with a local term. A task is one head of one image, or a share of its queries where there are few heads; no
// value depends on the cut.
#include "local_attention.h"

#include "../tensor_args.h"
#include "isa.h"
#include "threads.h"
#include "token_dwconv_pack.h"

namespace lifeops {
namespace {

thread_local Scratch head_scratch;    // one task's packed keys and values, scores
thread_local Scratch weight_scratch;  // of the local term, packed

const AttentionKernels& attention_kernels(int64_t isa) {
#if defined(__x86_64__)
  const Isa chosen = choose_isa(int(isa));
  if (chosen == Isa::avx512) return attention_avx512;
  if (chosen == Isa::avx2) return attention_avx2;
#endif
  return attention_baseline;
}

Heads heads_of(const Tensor& t, const char* name, const AttentionParams& p) {
  STD_TORCH_CHECK(t.dim() == 4 && t.size(0) == p.B && t.size(1) == p.h && t.size(2) == p.N && t.size(3) == p.d, "lifeops_native: ", name,
                  " must have q's shape");
  STD_TORCH_CHECK(p.d == 1 || t.stride(3) == 1, "lifeops_native: the channels of ", name, " must have stride 1");
  STD_TORCH_CHECK(dtype_of(t) == p.dtype, "lifeops_native: ", name, " must have q's dtype");
  return {t.const_data_ptr(), t.stride(0), t.stride(1), t.stride(2)};
}

void take_masks(const std::optional<Tensor>& mask, const std::optional<Tensor>& key_mask, AttentionParams& p) {
  if (mask) {
    const bool shared_b = mask->size(0) == 1, shared_h = mask->size(1) == 1;
    STD_TORCH_CHECK(mask->dim() == 4 && (shared_b || mask->size(0) == p.B) && (shared_h || mask->size(1) == p.h) && mask->size(2) == p.N &&
                        mask->size(3) == p.N && (p.N == 1 || mask->stride(3) == 1),
                    "lifeops_native: mask must have shape (B or 1, h or 1, N, N) and columns of stride 1");
    p.mask_bool = mask->scalar_type() == torch::headeronly::ScalarType::Bool;
    STD_TORCH_CHECK(p.mask_bool || dtype_of(*mask) == accumulate_dtype(p.dtype), "lifeops_native: mask must be bool or of the accumulation type");
    p.mask = {mask->const_data_ptr(), shared_b ? 0 : mask->stride(0), shared_h ? 0 : mask->stride(1), mask->stride(2)};
  }
  if (key_mask) {
    check_size(*key_mask, "key_mask", p.B * p.N);
    STD_TORCH_CHECK(key_mask->scalar_type() == torch::headeronly::ScalarType::Bool, "lifeops_native: key_mask must be bool");
    p.key_mask = static_cast<const uint8_t*>(key_mask->const_data_ptr());
  }
}

// (K * K, h, padded d) from (C, K, K), and the bias behind it.
template <class A> void pack_local(const Tensor& weight, const std::optional<Tensor>& bias, bool mirrored, int64_t padded_d, AttentionParams& p) {
  const int64_t taps = p.K * p.K, padded = p.h * padded_d;
  const DType dtype = dtype_of(weight);
  A* const out = static_cast<A*>(weight_scratch.get((taps + 1) * padded * int64_t(sizeof(A))));
  const void* const from = weight.const_data_ptr();
  for (int64_t i = 0; i < (taps + 1) * padded && padded_d != p.d; ++i) out[i] = 0;
  for (int64_t h = 0; h < p.h; ++h)
    for (int64_t c = 0; c < p.d; ++c)
      for (int64_t t = 0; t < taps; ++t) {
        const int64_t i = (h * p.d + c) * taps + (mirrored ? taps - 1 - t : t);
        out[t * padded + h * padded_d + c] = dtype == DType::f32 ? A(static_cast<const float*>(from)[i]) : A(to_double(from, dtype, i));
      }
  p.weight = out;
  if (!bias) return;
  check_size(*bias, "bias", p.h * p.d);
  for (int64_t h = 0; h < p.h; ++h)
    for (int64_t c = 0; c < p.d; ++c) out[taps * padded + h * padded_d + c] = A(to_double(bias->const_data_ptr(), dtype_of(*bias), h * p.d + c));
  p.bias = out + taps * padded;
}

void take_local(const Tensor& weight, const std::optional<Tensor>& bias, bool mirrored, const AttentionKernels& kernels, AttentionParams& p) {
  p.K = weight.size(weight.dim() - 1);
  check_kernel(p.K), check_size(weight, "weight", p.h * p.d * p.K * p.K);
  const int64_t lanes = kernels.vector_bytes / element_bytes(accumulate_dtype(p.dtype)), padded_d = ceil_div(p.d, lanes) * lanes;
  if (p.dtype == DType::f64) pack_local<double>(weight, bias, mirrored, padded_d, p);
  else pack_local<float>(weight, bias, mirrored, padded_d, p);
}

void take_heads(const Tensor& q, const Tensor& k, const Tensor& v, int64_t H, int64_t W, int64_t P, double scale, AttentionParams& p) {
  STD_TORCH_CHECK(q.dim() == 4, "lifeops_native: q must have four dimensions");
  p.dtype = dtype_of(q), p.B = q.size(0), p.h = q.size(1), p.N = q.size(2), p.d = q.size(3), p.H = H, p.W = W, p.P = P, p.scale = scale;
  p.q = heads_of(q, "q", p), p.k = heads_of(k, "k", p), p.v = heads_of(v, "v", p);
  STD_TORCH_CHECK(H >= 0 && W >= 0 && P >= 0 && P + H * W == p.N, "lifeops_native: the grid and its prefix must have N tokens");
}

void* output(const Tensor& t, const char* name, DType dtype, int64_t numel) {
  check_size(t, name, numel);
  STD_TORCH_CHECK(dtype_of(t) == dtype, "lifeops_native: ", name, " has the wrong dtype");
  return t.mutable_data_ptr();
}

// A (B, N, h * d) tensor by heads.
Heads by_heads(const Tensor& t, const char* name, const AttentionParams& p) {
  check_sequence(t, name, p.B, p.N, p.h * p.d, p.dtype);
  return {t.const_data_ptr(), t.stride(0), p.d, t.stride(1)};
}

// What the products of a head cost, in bytes that would take as long to move.
int64_t work_of(const AttentionParams& p) { return p.N * p.N * p.d / 8; }

// Into how many shares the queries of a head are cut: the fewest that leave no thread idle for long; each share packs the keys again.
int64_t shares_of(const AttentionParams& p) {
  const int64_t threads = int64_t(torch::stable::get_num_threads()), heads = p.B * p.h, most = ceil_div(p.N, kQueryRows);
  int64_t shares = 1;
  while (shares < most && 8 * heads * shares < 7 * threads * ceil_div(heads * shares, threads)) ++shares;
  return shares;
}

void local_attention(const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
                     const std::optional<Tensor>& mask, const std::optional<Tensor>& key_mask, const Tensor& y, const std::optional<Tensor>& attn,
                     const std::optional<Tensor>& lse, int64_t H, int64_t W, int64_t P, double scale, int64_t isa) {
  AttentionParams p{};
  take_heads(q, k, v, H, W, P, scale, p);
  const int64_t numel = p.B * p.N * p.h * p.d;
  p.y = output(y, "y", p.dtype, numel);
  if (attn) p.attn = output(*attn, "attn", p.dtype, numel);
  if (lse) p.lse = output(*lse, "lse", accumulate_dtype(p.dtype), p.B * p.h * p.N);
  if (numel == 0) return;
  const AttentionKernels& kernels = attention_kernels(isa);
  take_masks(mask, key_mask, p);
  if (weight) take_local(*weight, bias, false, kernels, p);
  const int64_t shares = shares_of(p), blocks = ceil_div(p.N, kQueryRows), scratch = kernels.forward_scratch(p);
  for_each_task(p.B * p.h * shares, ceil_div(kGrainBytes, max64(1, work_of(p) / shares)), [&](int64_t i) {
    const int64_t head = i / shares, share = i % shares, n0 = share * blocks / shares * kQueryRows, n1 = (share + 1) * blocks / shares * kQueryRows;
    const int64_t next = min64(i + 1, p.B * p.h * shares - 1) / shares;
    kernels.forward(p, {head / p.h, head % p.h, n0, min64(p.N, n1), next / p.h, next % p.h}, head_scratch.get(scratch));
  });
}

void local_attention_bwd(const Tensor& dy, const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& weight, const Tensor& attn,
                         const Tensor& lse, const std::optional<Tensor>& mask, const std::optional<Tensor>& key_mask, const Tensor& dq, const Tensor& dk,
                         const Tensor& dv, const std::optional<Tensor>& ds, int64_t H, int64_t W, int64_t P, double scale, int64_t isa) {
  AttentionGradParams p{};
  take_heads(q, k, v, H, W, P, scale, p);
  p.dy = by_heads(dy, "dy", p), p.out = by_heads(attn, "attn", p);
  check_accumulated(lse, "lse", p.B * p.h * p.N, p.dtype);
  p.lse = const_cast<void*>(lse.const_data_ptr());  // read alone
  const int64_t numel = p.B * p.N * p.h * p.d;
  p.dq = output(dq, "dq", p.dtype, numel), p.dk = output(dk, "dk", p.dtype, numel), p.dv = output(dv, "dv", p.dtype, numel);
  if (ds) p.ds = output(*ds, "ds", accumulate_dtype(p.dtype), p.B * p.h * p.N * p.N);
  if (numel == 0) return;
  const AttentionKernels& kernels = attention_kernels(isa);
  take_masks(mask, key_mask, p);
  if (weight) take_local(*weight, std::nullopt, true, kernels, p);
  const int64_t scratch = kernels.backward_scratch(p);
  for_each_task(p.B * p.h, ceil_div(kGrainBytes, max64(1, 2 * work_of(p))), [&](int64_t i) {
    kernels.backward(p, i / p.h, i % p.h, head_scratch.get(scratch));
  });
}

}  // namespace
}  // namespace lifeops

STABLE_TORCH_LIBRARY_IMPL(lifeops_native, CPU, m) { 
  m.impl("local_attention", TORCH_BOX(&lifeops::local_attention));
  m.impl("local_attention_bwd", TORCH_BOX(&lifeops::local_attention_bwd));
}

// SPDX-License-Identifier: Apache-2.0
// What the three instruction-set builds of attention offer, and how the work is cut. No torch in here.
#pragma once
#include <cstdint>

#include "token_dwconv.h"

namespace lifeops {

// A (B, h, N, d) tensor whose channels lie beside each other; strides in elements.
struct Heads {
  const void* data;
  int64_t stride_b, stride_h, stride_n;
};

// s = scale q kᵀ (+ mask), p = exp(s - lse), attn = p v, y = attn + [0 for the first P tokens ; DW_K(v) + bias for the H x W behind them].
// A is the arithmetic type: double for double, else float.
struct AttentionParams {
  Heads q, k, v;
  Heads mask;               // (B, h, N, N), its columns beside each other, strides of 0 where it is shared; A, or bytes (0: hidden) if mask_bool
  const uint8_t* key_mask;  // (B, N), 0 for tokens that nobody attends to, or null
  const void* weight;       // A, (K * K, h, d padded to whole vectors), or null: no local term
  const void* bias;         // A, (h, padded d), or null
  void *y, *attn;           // (B, N, h * d), contiguous; attn null where y is all that is wanted
  void* lse;                // A, (B, h, N), or null
  int64_t B, h, N, d, H, W, P, K;
  double scale;
  bool mask_bool;
  DType dtype;
};

// dv = pᵀ dy + DW_K(dy), whose weight is mirrored, ds = p (dy vᵀ - rowsum(dy * attn)), dq = scale ds k, dk = scale dsᵀ q. lse is read; y, attn
// and bias are null.
struct AttentionGradParams : AttentionParams {
  Heads dy, out;        // out: attn
  void *dq, *dk, *dv;   // (B, N, h, d), contiguous
  void* ds;             // A, (B, h, N, N), contiguous, or null
};

// Query rows [n0, n1) of one head, and the head that this thread probably takes up behind it.
struct AttentionTask {
  int64_t b, h, n0, n1, next_b, next_h;
};

struct AttentionKernels {
  void (*forward)(const AttentionParams&, const AttentionTask&, void* scratch);
  int64_t (*forward_scratch)(const AttentionParams&);  // bytes that a task needs
  void (*backward)(const AttentionGradParams&, int64_t b, int64_t h, void* scratch);
  int64_t (*backward_scratch)(const AttentionParams&);
  int64_t vector_bytes;
};

constexpr int64_t kQueryRows = 24;  // worked on together; tasks are cut between multiples of it

extern const AttentionKernels attention_baseline;
#if defined(__x86_64__)
extern const AttentionKernels attention_avx2;
extern const AttentionKernels attention_avx512;
#endif

}  // namespace lifeops

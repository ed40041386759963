// SPDX-License-Identifier: Apache-2.0
// What the three instruction-set builds of the CPU kernels offer, and how the work is cut. No torch in here.
#pragma once
#include "../params.h"

namespace lifeops {

// Channels per block of packed weights and of a weight-gradient task: 64 floats are four cache lines of a token.
constexpr int64_t kBlock = 64;
// What a task may keep in the second-level cache (1 MB where this was tuned): all it touches between two visits of a row; its ring
// of converted input rows, where more channels mean longer runs of every token; the weight gradient's ring and sums.
constexpr int64_t kCacheBytes = 768 * 1024;
constexpr int64_t kRingBytes = 384 * 1024;
constexpr int64_t kGradRingBytes = 512 * 1024;
// Columns per task, so that the ring of a very wide grid still fits the second-level cache.
constexpr int64_t kSegment = 128;
constexpr int kMaxKernel = 15;

// static: each instruction set's build must keep its own copy, or the linker may hand AVX-512 code to an old CPU.
static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
static inline int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }

// f(scale[c] * value + shift[c]), with gelu_first scale[c] * gelu(value) + shift[c]; the values are in the accumulation type and never null.
struct ChannelAffine {
  const void *scale, *shift;
  Act act;
};

// What happens around the convolution. Forward: `prologue` on x, `epilogue` on the sums. Input gradient: `derivative` is the prologue
// of the forward pass and `pre` says where its x is; the result is scale f'(scale x + shift) sum + a + b x, with gelu_first
// gelu'(x) (scale sum + a + b gelu(x)).
struct TokenDWConvExtras {
  const ChannelAffine *prologue, *epilogue, *derivative;  // any may be null
  const void *a, *b;                                      // beside a derivative; a is never null, b is where 0 x may not be added
  const void* pre;                                        // x, at its first patch
  int64_t pre_stride_b, pre_stride_n;
  bool sums;
  bool backwards;  // the images were read just before, in order
};
// Values per channel that a task with sums writes: forward (k, sum of y - k, m2 of y), see moments.h, input gradient (sum of x dv, sum of
// dv, unused), with gelu_first (sum of gelu(x) du, sum of du, unused).
constexpr int64_t kTaskSums = 3;

// Output rows [r0, r1), columns [q0, q1) and channels [c0, c1) of image b.
struct ForwardTask {
  int64_t b, c0, c1, r0, r1, q0, q1;
  bool prefix_rows;                 // this task also writes the prefix rows of its channels
  const TokenDWConvExtras* extras;  // or null
  void* sums;                       // (kTaskSums, C) of this task, at channel 0
  const ForwardTask* next;          // what this thread probably takes up behind it
};

// windows[c, i, j], beside dw: what dw would be if every x were 1.
struct GradWeightParams : TokenDWConvGradWeightParams {
  GradWeightParams(const TokenDWConvGradWeightParams& p) : TokenDWConvGradWeightParams(p) {}
  void* windows = nullptr;  // (C, K, K) in the accumulation type, or null
};

// Rows of a block of partial sums: the taps, db, and with windows one per filter column from output rows whose window lies inside the
// grid from top to bottom, then the taps from all other rows.
static inline int64_t grad_weight_rows(const GradWeightParams& p) { return p.K * p.K + 1 + (p.windows ? p.K + p.K * p.K : 0); }

// A fixed share of the sum over images, row strips and column segments, for channels [c0, c1).
struct GradWeightTask {
  int64_t c0, c1, unit0, unit1;  // unit = (image * strips + strip) * segments + segment
  int64_t strips, segments;
  void* partial;  // (blocks, grad_weight_rows, kBlock) sums in the accumulation type
  const ChannelAffine* prologue;  // of x, or null
};

// Backward of y = act(DW(x) + bias) in one pass: with z = DW(x) + bias computed again, dz = act'(z) dy, dx = DWᵀ(dz), dw = corr(dz, x),
// db = sum dz.
struct BackwardParams {
  TokenDWConvParams forward, input;  // of z, whose y nothing is written to, and of dx, whose x is dy
  GradWeightParams weight;
  Act act;
};
struct BackwardTask {
  int64_t c0, c1, unit0, unit1, strips, segments;  // as in GradWeightTask
  const void *taps, *mirrored, *bias;              // packed as for `forward`
  void* partial;
};

struct TokenDWConvKernels {
  // `weight` is packed (blocks, K*K, kBlock) in the accumulation type, `bias` (blocks, kBlock) or null.
  void (*forward)(const TokenDWConvParams&, const void* weight, const void* bias, const ForwardTask&, void* scratch);
  int64_t (*forward_scratch)(const TokenDWConvParams&);   // bytes
  int64_t (*forward_channels)(const TokenDWConvParams&);  // channels a task takes, a multiple of kBlock
  void (*grad_weight)(const GradWeightParams&, const GradWeightTask&, void* scratch);
  int64_t (*grad_weight_scratch)(const GradWeightParams&);   // bytes
  int64_t (*grad_weight_channels)(const GradWeightParams&);  // channels a task takes, a multiple of kBlock
  void (*backward)(const BackwardParams&, const BackwardTask&, void* scratch);
  int64_t (*backward_scratch)(const BackwardParams&);   // bytes
  int64_t (*backward_channels)(const BackwardParams&);  // channels a task takes, a multiple of kBlock
};

extern const TokenDWConvKernels token_dwconv_baseline;
#if defined(__x86_64__)
extern const TokenDWConvKernels token_dwconv_avx2;
extern const TokenDWConvKernels token_dwconv_avx512;
#endif

}  // namespace lifeops

// SPDX-License-Identifier: Apache-2.0
// What launchers of the convolution share: the kernels of an instruction set, packed weights, and the sum of partial weight gradients.
#pragma once
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "isa.h"
#include "token_dwconv.h"

namespace lifeops {

inline const TokenDWConvKernels& kernels(int64_t isa) {
#if defined(__x86_64__)
  const Isa chosen = choose_isa(int(isa));
  if (chosen == Isa::avx512) return token_dwconv_avx512;
  if (chosen == Isa::avx2) return token_dwconv_avx2;
#endif
  return token_dwconv_baseline;
}

inline double to_double(const void* p, DType dtype, int64_t i) {
  switch (dtype) {
    case DType::f64: return static_cast<const double*>(p)[i];
    case DType::f32: return static_cast<const float*>(p)[i];
    case DType::f16: return float(static_cast<const torch::headeronly::Half*>(p)[i]);
    default: return float(static_cast<const torch::headeronly::BFloat16*>(p)[i]);
  }
}

template <class A> void put(void* p, DType dtype, int64_t i, A value) {
  switch (dtype) {
    case DType::f64: static_cast<double*>(p)[i] = double(value); break;
    case DType::f32: static_cast<float*>(p)[i] = float(value); break;
    case DType::f16: static_cast<torch::headeronly::Half*>(p)[i] = torch::headeronly::Half(float(value)); break;
    default: static_cast<torch::headeronly::BFloat16*>(p)[i] = torch::headeronly::BFloat16(float(value));
  }
}

// Weights of one channel block as (K*K, kBlock), zero-padded, mirrored for the input gradient.
template <class A> void pack_block(const TokenDWConvParams& p, int64_t block, A* out) {
  const int64_t taps = p.K * p.K, c0 = block * kBlock, n = min64(kBlock, p.C - c0);
  for (int64_t t = 0; t < taps; ++t)
    for (int64_t c = n; c < kBlock; ++c) out[t * kBlock + c] = 0;
  for (int64_t c = 0; c < n; ++c) {
    const int64_t first = (c0 + c) * taps;
    if (p.weight_dtype == DType::f32) {  // the common case, without a switch per element
      const float* w = static_cast<const float*>(p.weight) + first;
      for (int64_t t = 0; t < taps; ++t) out[t * kBlock + c] = A(w[p.flip ? taps - 1 - t : t]);
    } else {
      for (int64_t t = 0; t < taps; ++t)
        out[t * kBlock + c] = A(to_double(p.weight, p.weight_dtype, first + (p.flip ? taps - 1 - t : t)));
    }
  }
}

template <class A> void pack_bias(const TokenDWConvParams& p, int64_t blocks, A* out) {
  for (int64_t c = 0; c < blocks * kBlock; ++c) out[c] = c < p.C ? A(to_double(p.bias, p.bias_dtype, c)) : A(0);
}

// The groups' sums of one block, in order, into the first of them, and from there to dw, db and windows.
template <class A> void reduce_block(const GradWeightParams& p, int64_t groups, int64_t blocks, int64_t block, A* partials) {
  const int64_t taps = p.K * p.K, size = grad_weight_rows(p) * kBlock, c0 = block * kBlock, n = min64(kBlock, p.C - c0);
  A* total = partials + block * size;  // group by group, in order, into the first
  for (int64_t group = 1; group < groups; ++group)
    for (int64_t k = 0; k < size; ++k) total[k] += total[group * blocks * size + k];
  for (int64_t c = 0; c < n; ++c) {
    const int64_t first = (c0 + c) * taps;
    if (p.dw && p.weight_dtype == DType::f32) {  // the common case, without a switch per element
      float* dw = static_cast<float*>(p.dw) + first;
      for (int64_t t = 0; t < taps; ++t) dw[t] = float(total[t * kBlock + c]);
    } else if (p.dw) {
      for (int64_t t = 0; t < taps; ++t) put(p.dw, p.weight_dtype, first + t, total[t * kBlock + c]);
    }
    if (p.db) put(p.db, p.bias_dtype, c0 + c, total[taps * kBlock + c]);
    if (!p.windows) continue;
    A* windows = static_cast<A*>(p.windows) + first;
    const A *columns = total + (taps + 1) * kBlock + c, *rest = columns + p.K * kBlock;
    for (int64_t i = 0; i < p.K; ++i, rest += p.K * kBlock)
      for (int64_t j = 0; j < p.K; ++j) *windows++ = columns[j * kBlock] + rest[j * kBlock];
  }
}

}  // namespace lifeops

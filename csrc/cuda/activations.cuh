// SPDX-License-Identifier: Apache-2.0
// Activations, their derivatives, and the affine step before or after them, on single values. No torch in here.
#pragma once
#include "../dtype.h"

namespace lifeops {
namespace cuda {

// f(scale[c] * value + shift[c]) as the launcher passes it; null means ones, zeros.
struct AffineAct {
  const void *scale, *shift;
  Act act;
};
inline bool is_identity(const AffineAct& f) { return !f.scale && !f.shift && f.act == Act::none; }

// min(max(v, 0), 1): free in the instruction that makes v.
__device__ __forceinline__ float saturate(float v) {
#ifdef __CUDACC__
  return __saturatef(v);
#else
  return v > 0 ? (v < 1 ? v : 1) : 0;
#endif
}
__device__ __forceinline__ double saturate(double v) { return v > 0 ? (v < 1 ? v : 1) : 0; }

// max(v, 0); NaN stays, which fmax would drop. One instruction from compute capability 8.0 on, as with it.
__device__ __forceinline__ float clamp0(float v) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  float result;
  asm("max.NaN.f32 %0, %1, 0f00000000;" : "=f"(result) : "f"(v));
  return result;
#else
  return v < 0 ? 0 : v;
#endif
}
__device__ __forceinline__ double clamp0(double v) { return v < 0 ? 0 : v; }

// min(max(v, 0), 6), likewise in two.
__device__ __forceinline__ float clamp6(float v) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  float result = clamp0(v);
  asm("min.NaN.f32 %0, %1, 0f40C00000;" : "=f"(result) : "f"(result));
  return result;
#else
  return v < 0 ? 0 : v > 6 ? 6 : v;
#endif
}
__device__ __forceinline__ double clamp6(double v) { return v < 0 ? 0 : v > 6 ? 6 : v; }

// 2^v and 1/v in one instruction each, relative error 2^-22; 2^v below 2^-126 is 0.
__device__ __forceinline__ float fast_exp2(float v) {
#ifdef __CUDACC__
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(v));
  return result;
#else
  return std::exp2(v);
#endif
}
__device__ __forceinline__ float fast_reciprocal(float v) {
#ifdef __CUDACC__
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(v));
  return result;
#else
  return 1 / v;
#endif
}

// The normal distribution, cdf = (1 + erf(v / sqrt 2)) / 2. In float it is logistic, 1 / (1 + 2^(v Q(v²))), with Q fitted
// so that the error of v cdf(v) is below 7e-8 before rounding, relative to cdf(v) where v is small. Eleven instructions
// against 15 for an erfc of the same error (Abramowitz and Stegun 7.1.26 with as many coefficients), and no branch.
__device__ __forceinline__ float normal_cdf(float v) {
  const float s = v * v;
  float q = -5.2099094e-09f;
  q = q * s + 3.85045e-07f;
  q = q * s - 1.145243e-05f;
  q = q * s + 1.5938941e-04f;
  q = q * s + 9.559293e-05f;
  q = q * s - 0.10483858f;
  q = q * s - 2.3022072f;
  return fast_reciprocal(1.0f + fast_exp2(v * q));
}
__device__ __forceinline__ double normal_cdf(double v) { return 0.5 * erfc(-0.70710678118654752440 * v); }

// exp(-v² / 2) / sqrt(2 pi)
__device__ __forceinline__ float normal_pdf(float v) {
  return 0.39894228f * fast_exp2(v * v * -0.72134752f);
}
__device__ __forceinline__ double normal_pdf(double v) { return 0.39894228040143267794 * exp(-0.5 * v * v); }

// f(v). h-swish is v * clamp(v / 6 + 1/2, 0, 1): two instructions. NaN stays; h-swish and GELU are NaN at -inf, as torch's.
template <Act act, typename Acc> __device__ __forceinline__ Acc activate(Acc v) {
  if constexpr (act == Act::relu) return clamp0(v);
  if constexpr (act == Act::relu6) return clamp6(v);
  if constexpr (act == Act::hardswish) return v * saturate(v * Acc(1.0 / 6) + Acc(0.5));
  if constexpr (act == Act::gelu || act == Act::gelu_first) return v * normal_cdf(v);
  return v;
}

// f'(v); at the kinks what torch's own backward takes.
template <Act act, typename Acc> __device__ __forceinline__ Acc derivative(Acc v) {
  if constexpr (act == Act::relu) return v <= 0 ? Acc(0) : Acc(1);  // 1 at NaN
  if constexpr (act == Act::relu6) return v > 0 && v < 6 ? Acc(1) : Acc(0);
  if constexpr (act == Act::hardswish) return v <= -3 || v >= 3 ? saturate(v) : v * Acc(1.0 / 3) + Acc(0.5);
  if constexpr (act == Act::gelu || act == Act::gelu_first) return v * normal_pdf(v) + normal_cdf(v);
  return Acc(1);
}

// u of the forward pass.
template <Act act, typename Acc> __device__ __forceinline__ Acc affine_act(Acc x, Acc scale, Acc shift) {
  if constexpr (act == Act::gelu_first) return scale * activate<act>(x) + shift;
  return activate<act>(scale * x + shift);
}

// What the gradient adds to a batch norm's own: per-channel constants.
template <typename Acc> struct AffineGrad {
  Acc scale, shift, a, b;
  bool has_b;
};

// dx of one element from du = dL/du, and what it adds to the sums: affine first dv x and dv, gelu first du gelu(x) and du.
template <Act act, typename Acc>
__device__ __forceinline__ Acc affine_act_grad(Acc du, Acc x, const AffineGrad<Acc>& f, Acc* sum_x, Acc* sum) {
  if constexpr (act == Act::gelu_first) {
    const Acc cdf = normal_cdf(x), value = x * cdf;
    *sum_x += du * value, *sum += du;
    Acc dx = f.scale * du + f.a;
    if (f.has_b) dx += f.b * value;
    return dx * (x * normal_pdf(x) + cdf);
  } else {
    const Acc dv = du * derivative<act>(f.scale * x + f.shift);
    *sum_x += dv * x, *sum += dv;
    Acc dx = f.scale * dv + f.a;
    if (f.has_b) dx += f.b * x;
    return dx;
  }
}

// Calls body with the activation as a compile-time constant; compared one by one, since a jump table cannot be followed
// when instructions are counted.
template <Act act> struct ActConstant { static constexpr Act value = act; };
template <bool kPrologue, typename Body> __device__ __forceinline__ void with_act(Act act, Body&& body) {
  if (act >= Act::gelu) {
    if (kPrologue && act == Act::gelu_first)
      body(ActConstant<Act::gelu_first>{});
    else
      body(ActConstant<Act::gelu>{});
  } else if (act == Act::hardswish) {
    body(ActConstant<Act::hardswish>{});
  } else if (act == Act::relu6) {
    body(ActConstant<Act::relu6>{});
  } else if (act == Act::relu) {
    body(ActConstant<Act::relu>{});
  } else {
    body(ActConstant<Act::none>{});
  }
}

// Per-channel values of the accumulator's type, `otherwise` where there are none.
template <typename Acc, int kVec>
__device__ __forceinline__ void load_values(const void* values, int64_t c, Acc otherwise, Acc (&out)[kVec]) {
#pragma unroll
  for (int i = 0; i < kVec; ++i) out[i] = values ? static_cast<const Acc*>(values)[c + i] : otherwise;
}

template <typename Acc, int kVec> struct Affine {
  Acc scale[kVec], shift[kVec];

  __device__ __forceinline__ Affine(const AffineAct& f, int64_t c) {
    load_values<Acc, kVec>(f.scale, c, 1, scale);
    load_values<Acc, kVec>(f.shift, c, 0, shift);
  }
};

}  // namespace cuda
}  // namespace lifeops

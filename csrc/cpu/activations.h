// SPDX-License-Identifier: Apache-2.0
// Activations and their derivatives on vectors. Compiled once per instruction set (see vec.h).
#pragma once
#include "vec.h"

namespace lifeops {
namespace LIFEOPS_ISA {

template <class A> inline __attribute__((always_inline)) vec_t<A> splat(A value) { return value - vec_t<A>{}; }
template <class V> inline __attribute__((always_inline)) V vmin(V a, V b) { return a < b ? a : b; }
template <class V> inline __attribute__((always_inline)) V vmax(V a, V b) { return a > b ? a : b; }

// exp(x) for x <= 0; 0 below -87. x = n ln 2 + r: 2^n is built from its bits, exp(r) is Taylor's sum, |r| <= 0.35: error 2e-8.
inline __attribute__((always_inline)) vec_t<float> exp_negative(vec_t<float> x) {
  const vec_t<float> bounded = vmax(x, splat(-87.0f));
  const vec_t<float> shifted = bounded * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the integer part ends in the low bits
  const vec_t<float> n = shifted - 12582912.0f;
  const vec_t<float> r = (bounded - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts
  vec_t<float> e = splat(1.0f / 5040);
  e = e * r + 1.0f / 720;
  e = e * r + 1.0f / 120;
  e = e * r + 1.0f / 24;
  e = e * r + 1.0f / 6;
  e = e * r + 0.5f;
  e = e * r + 1.0f;
  e = e * r + 1.0f;
  vu32 bits;
  __builtin_memcpy(&bits, &shifted, sizeof(bits));
  bits = (bits + 127) << 23;  // the exponent of 2^n
  vec_t<float> power;
  __builtin_memcpy(&power, &bits, sizeof(power));
  return x < splat(-87.0f) ? vec_t<float>{} : e * power;
}

// Normal distribution: `cdf` = (1 + erf(v / sqrt 2)) / 2, `bell` = exp(-v² / 2).
// erfc(z) = exp(-z²) P(t), t = 1 / (1 + 0.47047 z), z >= 0: the form of Abramowitz and Stegun 7.1.26 with seven coefficients fitted
// to erfcx, error of erf 5e-9 before rounding.
inline __attribute__((always_inline)) void normal(vec_t<float> v, vec_t<float>* cdf, vec_t<float>* bell) {
  const vec_t<float> z = (v < vec_t<float>{} ? -v : v) * 0.70710678f;
  const vec_t<float> t = 1.0f / (1.0f + 0.47047f * z);
  vec_t<float> p = splat(0.0851910535f);
  p = p * t - 0.403479091f;
  p = p * t + 0.571344272f;
  p = p * t - 0.0880144341f;
  p = p * t + 0.314043623f;
  p = p * t + 0.255237854f;
  p = p * t + 0.265676727f;
  *bell = exp_negative(v * v * -0.5f);
  const vec_t<float> tail = 0.5f * p * t * *bell;
  *cdf = v < vec_t<float>{} ? tail : 1.0f - tail;
}
inline void normal(vec_t<double> v, vec_t<double>* cdf, vec_t<double>* bell) {
  for (int l = 0; l < Vec<double>::kLanes; ++l) {
    (*cdf)[l] = 0.5 * __builtin_erfc(-v[l] * 0.70710678118654752440);
    (*bell)[l] = __builtin_exp(-0.5 * v[l] * v[l]);
  }
}

template <Act act, class A> inline __attribute__((always_inline)) vec_t<A> activate(vec_t<A> v) {
  const vec_t<A> zero = {};
  if constexpr (act == Act::relu6) return vmin(vmax(v, zero), splat(A(6)));
  if constexpr (act == Act::hardswish) return v * vmin(vmax(v + A(3), zero), splat(A(6))) * A(1.0 / 6);
  if constexpr (act == Act::gelu) {
    vec_t<A> cdf, bell;
    normal(v, &cdf, &bell);
    return v * cdf;
  }
  return v;
}

template <Act act, class A> inline __attribute__((always_inline)) vec_t<A> derivative(vec_t<A> v) {
  const vec_t<A> zero = {}, one = splat(A(1));
  if constexpr (act == Act::relu6) return v > zero ? (v < splat(A(6)) ? one : zero) : zero;
  if constexpr (act == Act::hardswish) return v > splat(A(-3)) ? (v < splat(A(3)) ? v * A(1.0 / 3) + A(0.5) : one) : zero;
  if constexpr (act == Act::gelu) {
    vec_t<A> cdf, bell;
    normal(v, &cdf, &bell);
    return cdf + v * bell * A(0.39894228040143267794);
  }
  return one;
}

// f(x) and f'(x) of GELU, which share the exponential.
template <class A> inline __attribute__((always_inline)) void gelu_both(vec_t<A> x, vec_t<A>* value, vec_t<A>* slope) {
  vec_t<A> cdf, bell;
  normal(x, &cdf, &bell);
  *value = x * cdf, *slope = cdf + x * bell * A(0.39894228040143267794);
}

// A prologue.
template <Act act, class A> inline __attribute__((always_inline)) vec_t<A> through(vec_t<A> scale, vec_t<A> shift, vec_t<A> x) {
  if constexpr (act == Act::gelu_first) return scale * activate<Act::gelu, A>(x) + shift;
  return activate<act, A>(scale * x + shift);
}

// Calls body with the activation as a compile-time constant.
template <Act act> struct ActConstant { static constexpr Act value = act; };
template <class Body> inline __attribute__((always_inline)) auto with_act(Act act, Body body) {
  switch (act) {
    case Act::relu6: return body(ActConstant<Act::relu6>{});
    case Act::hardswish: return body(ActConstant<Act::hardswish>{});
    case Act::gelu: return body(ActConstant<Act::gelu>{});
    default: return body(ActConstant<Act::none>{});
  }
}
template <class Body> inline __attribute__((always_inline)) auto with_prologue(Act act, Body body) {
  return act == Act::gelu_first ? body(ActConstant<Act::gelu_first>{}) : with_act(act, body);
}

}  // namespace LIFEOPS_ISA
}  // namespace lifeops

// SPDX-License-Identifier: Apache-2.0
// Activations and their derivatives on vectors. Compiled once per instruction set (see vec.h).
#pragma once
#include "gelu_table.h"
#include "vec.h"

namespace lifeops {
namespace LIFEOPS_ISA {

template <class A> inline __attribute__((always_inline)) vec_t<A> splat(A value) { return value - vec_t<A>{}; }
// The smaller and the larger; the second where one is NaN.
template <class V> inline __attribute__((always_inline)) V vmin(V a, V b) { return a < b ? a : b; }
template <class V> inline __attribute__((always_inline)) V vmax(V a, V b) { return a > b ? a : b; }
#if LIFEOPS_VEC_BYTES == 64  // compilers make two instructions of the above
inline __attribute__((always_inline)) vec_t<float> vmin(vec_t<float> a, vec_t<float> b) { return (vec_t<float>)_mm512_min_ps((__m512)a, (__m512)b); }
inline __attribute__((always_inline)) vec_t<float> vmax(vec_t<float> a, vec_t<float> b) { return (vec_t<float>)_mm512_max_ps((__m512)a, (__m512)b); }
#elif LIFEOPS_VEC_BYTES == 32
inline __attribute__((always_inline)) vec_t<float> vmin(vec_t<float> a, vec_t<float> b) { return (vec_t<float>)_mm256_min_ps((__m256)a, (__m256)b); }
inline __attribute__((always_inline)) vec_t<float> vmax(vec_t<float> a, vec_t<float> b) { return (vec_t<float>)_mm256_max_ps((__m256)a, (__m256)b); }
#endif

// Whether a comparison holds for any lane.
template <class M> inline __attribute__((always_inline)) bool any_set(M mask) {
#if LIFEOPS_VEC_BYTES == 64
  return _mm512_test_epi64_mask(load_bits<__m512i>(&mask), load_bits<__m512i>(&mask)) != 0;
#elif LIFEOPS_VEC_BYTES == 32
  return !_mm256_testz_si256(load_bits<__m256i>(&mask), load_bits<__m256i>(&mask));
#else
  uint64_t words[LIFEOPS_VEC_BYTES / 8];
  __builtin_memcpy(words, &mask, sizeof(words));
  return (words[0] | words[1]) != 0;
#endif
}

// 2^q for -126 <= q <= 0: the integer part becomes the exponent's bits, the rest goes through a minimax polynomial, error 8e-8.
inline __attribute__((always_inline)) vec_t<float> exp2_negative(vec_t<float> q) {
  const vec_t<float> shifted = q + 12582912.0f;  // 1.5 * 2^23: the integer part ends in the low bits
  const vec_t<float> r = q - (shifted - 12582912.0f);
  const vec_t<float> r2 = r * r;
  const vec_t<float> e = ((r * 0.00132764714f + 0.00967554157f) * r2 + (r * 0.0555071328f + 0.240221197f)) * r2 + (r * 0.693146967f + 1.00000007f);
  const vu32 bits = load_bits<vu32>(&e) + (load_bits<vu32>(&shifted) << 23);  // e is between 0.7 and 1.42
  return load_bits<vec_t<float>>(&bits);
}

// GELU is v Φ(v) = max(v, 0) - a Φ(-a) with a = |v|, and log2 Φ(-a) is so nearly a parabola that a polynomial Q of degree 8, fitted to
// the least error of a Φ(-a), leaves 9e-9: 2^Q(a) needs no division and its derivative 2^Q(a) Q'(a) ln 2 no second exponential (error
// of GELU' 2e-7). `slope`, if wanted, is Q'(a) ln 2.
inline __attribute__((always_inline)) vec_t<float> lower_tail(vec_t<float> a, vec_t<float>* slope) {
  const vec_t<float> a2 = a * a, a4 = a2 * a2;  // by pairs: a chain of eight would leave the units waiting
  const vec_t<float> low = (a * -0.0526358001f - 0.459157318f) * a2 + (a * -1.15111244f - 0.999999821f);
  const vec_t<float> high = (a * 2.7811071e-05f - 0.00013004143f) * a2 + (a * -0.000276501078f + 0.00725329714f);
  const vec_t<float> q = (a4 * -1.88478896e-06f + high) * a4 + low;
  if (slope)
    *slope = ((a * -1.04514893e-05f + 0.000134940157f) * a2 + (a * -0.00054082711f - 0.000958279707f)) * a4 +
             ((a * 0.0201104097f - 0.109453067f) * a2 + (a * -0.636527181f - 0.797890365f));
  return exp2_negative(q);
}
inline vec_t<double> lower_tail(vec_t<double> a, vec_t<double>* slope) {
  vec_t<double> tail;
  for (int l = 0; l < Vec<double>::kLanes; ++l) {
    tail[l] = 0.5 * __builtin_erfc(a[l] * 0.70710678118654752440);
    if (slope) (*slope)[l] = -0.39894228040143267794 * __builtin_exp(-0.5 * a[l] * a[l]) / tail[l];
  }
  return tail;
}

inline __attribute__((always_inline)) vec_t<float> absolute(vec_t<float> v) {
  const vu32 bits = load_bits<vu32>(&v) & 0x7fffffffu;
  return load_bits<vec_t<float>>(&bits);
}
inline __attribute__((always_inline)) vec_t<double> absolute(vec_t<double> v) { return v < vec_t<double>{} ? -v : v; }

// max(v, 0), and NaN where v is -inf: what GELU is where its tail is 0, since torch's -inf * Φ(-inf) is NaN.
template <class V> inline __attribute__((always_inline)) V positive_part(V v) { return v - vmin(V{}, v); }

// |v|, at most where the tail is all but 0: infinities stay out of the products, NaN goes through.
template <class A> inline __attribute__((always_inline)) vec_t<A> bounded_abs(vec_t<A> v, A bound = sizeof(A) == 8 ? 37 : 10.25) {
  return vmin(splat(bound), absolute(v));
}

#if LIFEOPS_VEC_BYTES == 64
// a Φ(-a) from a table that fits the registers' permutations: half the instructions of the exponential. Several vectors go step by step
// together: one after another, their long chains fill the scheduler before the next vector's gets in.
constexpr float kTableBound = 31.4f * kGeluStep;

// a * b + c; asked for by name, since gcc makes two instructions of it where it unrolls late (1.2 times the time of GELU).
inline __attribute__((always_inline)) vec_t<float> fused(vec_t<float> a, vec_t<float> b, vec_t<float> c) {
  return (vec_t<float>)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
}

// min(|v|, bound) in one instruction; the bound where v is NaN, which positive_part lets through.
inline __attribute__((always_inline)) vec_t<float> bounded_abs_or_bound(vec_t<float> v, float bound) {
  return (vec_t<float>)_mm512_range_ps((__m512)v, _mm512_set1_ps(bound), 0b1010);  // the smaller magnitude, its sign cleared
}

template <int N> struct TailPieces {
  __m512i k[N];
  vec_t<float> r[N];
  explicit inline __attribute__((always_inline)) TailPieces(const vec_t<float>* v) {
#pragma GCC unroll 4
    for (int t = 0; t < N; ++t) {
      const vec_t<float> a = bounded_abs_or_bound(v[t], kTableBound), shifted = a * (1 / kGeluStep) + 12582912.0f;  // as in exp2_negative
      k[t] = _mm512_castps_si512((__m512)shifted);  // of which the permutation reads five bits
      r[t] = a * (1 / kGeluStep) - (shifted - 12582912.0f);
    }
  }
  inline __attribute__((always_inline)) vec_t<float> at(int t, const float* coefficients) const {
    return (vec_t<float>)_mm512_permutex2var_ps(_mm512_load_ps(coefficients), k[t], _mm512_load_ps(coefficients + 16));
  }
};

template <int N> inline __attribute__((always_inline)) void gelu_by_table(vec_t<float>* v) {
  const TailPieces<N> pieces(v);
  vec_t<float> tail[N];
#pragma GCC unroll 4
  for (int t = 0; t < N; ++t) tail[t] = pieces.at(t, kGeluTail4[4]);
#pragma GCC unroll 4
  for (int i = 3; i >= 0; --i)
#pragma GCC unroll 4
    for (int t = 0; t < N; ++t) tail[t] = fused(tail[t], pieces.r[t], pieces.at(t, kGeluTail4[i]));
#pragma GCC unroll 4
  for (int t = 0; t < N; ++t) v[t] = positive_part(v[t]) - tail[t];
}

// And its derivative, by Horner's scheme for both.
template <int N> inline __attribute__((always_inline)) void gelu_both_by_table(vec_t<float>* v, vec_t<float>* slope) {
  const TailPieces<N> pieces(v);
  vec_t<float> tail[N], change[N];
#pragma GCC unroll 4
  for (int t = 0; t < N; ++t) change[t] = pieces.at(t, kGeluTail5[5]), tail[t] = fused(change[t], pieces.r[t], pieces.at(t, kGeluTail5[4]));
#pragma GCC unroll 4
  for (int i = 3; i >= 0; --i)
#pragma GCC unroll 4
    for (int t = 0; t < N; ++t)
      change[t] = fused(change[t], pieces.r[t], tail[t]), tail[t] = fused(tail[t], pieces.r[t], pieces.at(t, kGeluTail5[i]));
#pragma GCC unroll 4
  for (int t = 0; t < N; ++t) {
    const vec_t<float> half = v[t] * 0.0f + 0.5f, upper = 0.5f - change[t] * (1 / kGeluStep);  // NaN at the infinities, as torch's
    slope[t] = half + (vec_t<float>)_mm512_ternarylogic_epi32((__m512i)upper, (__m512i)v[t], _mm512_set1_epi32(int(0x80000000)), 0x78);  // v's sign
    v[t] = positive_part(v[t]) - tail[t];
  }
}
#endif

// GELU of N vectors, and its derivative.
template <class A, int N> inline __attribute__((always_inline)) void gelu_both(vec_t<A>* v, vec_t<A>* slope) {
#if LIFEOPS_VEC_BYTES == 64
  if constexpr (sizeof(A) == 4) return gelu_both_by_table<N>(v, slope);
#endif
#pragma GCC unroll 4
  for (int t = 0; t < N; ++t) {
    const vec_t<A> a = bounded_abs<A>(v[t]);
    vec_t<A> log_slope;
    const vec_t<A> tail = lower_tail(a, &log_slope), change = tail * (a * log_slope + A(1));
    slope[t] = (v[t] < vec_t<A>{} ? change : A(1) - change) + v[t] * A(0);  // NaN at the infinities, as torch's
    v[t] = positive_part(v[t]) - a * tail;
  }
}

template <Act act, class A> inline __attribute__((always_inline)) vec_t<A> activate(vec_t<A> v) {
  const vec_t<A> zero = {};
  if constexpr (act == Act::relu) return vmax(zero, v);  // NaN goes through
  if constexpr (act == Act::relu6) return vmin(splat(A(6)), vmax(zero, v));
  if constexpr (act == Act::hardswish) return v * vmin(splat(A(1)), vmax(zero, v * A(1.0 / 6) + A(0.5)));
  if constexpr (act == Act::gelu) {
#if LIFEOPS_VEC_BYTES == 64
    if constexpr (sizeof(A) == 4) return gelu_by_table<1>(&v), v;
#endif
    const vec_t<A> a = bounded_abs<A>(v);
    return positive_part(v) - a * lower_tail(a, static_cast<vec_t<A>*>(nullptr));
  }
  return v;
}
// N vectors at once.
template <Act act, class A, int N> inline __attribute__((always_inline)) void activate_all(vec_t<A>* v) {
#if LIFEOPS_VEC_BYTES == 64
  if constexpr (act == Act::gelu && sizeof(A) == 4) return gelu_by_table<N>(v);
#endif
#pragma GCC unroll 4
  for (int t = 0; t < N; ++t) v[t] = activate<act, A>(v[t]);
}

template <Act act, class A> inline __attribute__((always_inline)) vec_t<A> derivative(vec_t<A> v) {
  const vec_t<A> zero = {}, one = splat(A(1));
  if constexpr (act == Act::relu) return v <= zero ? zero : one;  // 1 at NaN, as torch's
  if constexpr (act == Act::relu6) return v > zero ? (v < splat(A(6)) ? one : zero) : zero;
  if constexpr (act == Act::hardswish) return v <= splat(A(-3)) ? zero : v >= splat(A(3)) ? one : v * A(1.0 / 3) + A(0.5);
  if constexpr (act == Act::gelu) {
    vec_t<A> slope;
    gelu_both<A, 1>(&v, &slope);
    return slope;
  }
  return one;
}

// Of N vectors, in place.
template <Act act, class A, int N> inline __attribute__((always_inline)) void derive_all(vec_t<A>* v) {
  if constexpr (act == Act::gelu) {
    vec_t<A> value[N];
#pragma GCC unroll 4
    for (int t = 0; t < N; ++t) value[t] = v[t];
    return gelu_both<A, N>(value, v);
  }
#pragma GCC unroll 4
  for (int t = 0; t < N; ++t) v[t] = derivative<act, A>(v[t]);
}

// A prologue, of N vectors.
template <Act act, class A, int N> inline __attribute__((always_inline)) void through(const vec_t<A>* scale, const vec_t<A>* shift, vec_t<A>* x) {
  if constexpr (act == Act::gelu_first) activate_all<Act::gelu, A, N>(x);
#pragma GCC unroll 4
  for (int t = 0; t < N; ++t) x[t] = scale[t] * x[t] + shift[t];
  if constexpr (act != Act::gelu_first) activate_all<act, A, N>(x);
}

// Calls body with the activation as a compile-time constant.
template <Act act> struct ActConstant { static constexpr Act value = act; };
template <class Body> inline __attribute__((always_inline)) auto with_act(Act act, Body body) {
  switch (act) {
    case Act::relu: return body(ActConstant<Act::relu>{});
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

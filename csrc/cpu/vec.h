// SPDX-License-Identifier: Apache-2.0
// Vectors of one instruction set, written with the compiler's vector extensions (gcc, clang). Included once per translation
// unit that defines LIFEOPS_ISA (the namespace) and LIFEOPS_VEC_BYTES, after all standard headers and the target pragma.
#pragma once
#include "../params.h"

namespace lifeops {
namespace LIFEOPS_ISA {

// Storage types of the two half formats; the arithmetic is float.
struct bf16 { uint16_t bits; };
struct f16 { uint16_t bits; };

template <class T> struct AccOf { using type = float; };
template <> struct AccOf<double> { using type = double; };

template <class A> struct Vec {
  static constexpr int kLanes = LIFEOPS_VEC_BYTES / sizeof(A);
  typedef A type __attribute__((vector_size(LIFEOPS_VEC_BYTES)));
};
template <class A> using vec_t = typename Vec<A>::type;

typedef uint32_t vu32 __attribute__((vector_size(LIFEOPS_VEC_BYTES)));
typedef uint16_t vu16 __attribute__((vector_size(LIFEOPS_VEC_BYTES / 2)));

template <class V, class P> inline __attribute__((always_inline)) V load_bits(const P* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof(V));
  return v;
}

inline __attribute__((always_inline)) vec_t<float> load(const float* p) { return load_bits<vec_t<float>>(p); }
inline __attribute__((always_inline)) vec_t<double> load(const double* p) { return load_bits<vec_t<double>>(p); }
// 16-bit lanes as 32-bit ones and back, one instruction each: of convertvector gcc makes two halves and five more.
inline __attribute__((always_inline)) vu32 widen(vu16 v) {
#if LIFEOPS_VEC_BYTES == 64
  return (vu32)_mm512_cvtepu16_epi32((__m256i)v);
#elif LIFEOPS_VEC_BYTES == 32
  return (vu32)_mm256_cvtepu16_epi32((__m128i)v);
#else
  return __builtin_convertvector(v, vu32);
#endif
}
inline __attribute__((always_inline)) vu16 narrow(vu32 v) {
#if LIFEOPS_VEC_BYTES == 64
  return (vu16)_mm512_cvtepi32_epi16((__m512i)v);
#else
  return __builtin_convertvector(v, vu16);
#endif
}

inline __attribute__((always_inline)) vec_t<float> load(const bf16* p) {
  const vu32 wide = widen(load_bits<vu16>(p)) << 16;
  return load_bits<vec_t<float>>(&wide);
}

// Loaded here and once: gcc would otherwise read memory again at every use.
template <class V> inline __attribute__((always_inline)) V in_register(V v) {
#if LIFEOPS_VEC_BYTES == 64
  asm("" : "+v"(v));
#elif LIFEOPS_VEC_BYTES == 32
  asm("" : "+x"(v));
#endif
  return v;
}

template <class V, class P> inline __attribute__((always_inline)) void store_bits(P* p, V v) {
  __builtin_memcpy(p, &v, sizeof(V));
}
inline __attribute__((always_inline)) void store(float* p, vec_t<float> v) { store_bits(p, v); }
inline __attribute__((always_inline)) void store(double* p, vec_t<double> v) { store_bits(p, v); }
inline __attribute__((always_inline)) void store(bf16* p, vec_t<float> v) {
  const vu32 bits = load_bits<vu32>(&v);
  // Round to nearest even: add half an ulp, one less where the kept part is even. NaN would carry into infinity.
  const vu32 rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const vu32 is_nan = (vu32)(v != v);
  store_bits(p, narrow((rounded & ~is_nan) | (is_nan & 0x7fc0)));
}

inline float half_to_float(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000) << 16;
  uint32_t bits = h & 0x7fff;
  if (bits >= 0x7c00) {
    bits = 0x7f800000 | ((bits & 0x3ff) << 13);  // infinity, NaN
  } else if (bits >= 0x400) {
    bits = (bits << 13) + 0x38000000;  // normal: exponent bias 15 to 127
  } else {
    float value = float(bits) * 5.9604644775390625e-8f;  // subnormal: multiples of 2^-24
    __builtin_memcpy(&bits, &value, 4);
  }
  bits |= sign;
  float f;
  __builtin_memcpy(&f, &bits, 4);
  return f;
}

inline uint16_t float_to_half(float f) {
  uint32_t bits;
  __builtin_memcpy(&bits, &f, 4);
  const uint16_t sign = uint16_t((bits >> 16) & 0x8000);
  bits &= 0x7fffffff;
  if (bits > 0x7f800000) return sign | 0x7e00;
  if (bits >= 0x477ff000) return sign | 0x7c00;  // rounds to 65536 or more
  if (bits < 0x38800000) {                         // below 2^-14: subnormal, rounded by an exact power-of-two addition
    float magnitude;
    __builtin_memcpy(&magnitude, &bits, 4);
    magnitude += 0.5f;  // ulp of [0.5, 1) is 2^-24, the subnormal step
    __builtin_memcpy(&bits, &magnitude, 4);
    return uint16_t(sign | (bits - 0x3f000000));
  }
  bits += 0xfff + ((bits >> 13) & 1);
  return uint16_t(sign | ((bits - 0x38000000) >> 13));
}

#if LIFEOPS_VEC_BYTES == 64
inline __attribute__((always_inline)) vec_t<float> load(const f16* p) {
  return (vec_t<float>)_mm512_cvtph_ps(load_bits<__m256i>(p));
}
inline __attribute__((always_inline)) void store(f16* p, vec_t<float> v) {
  store_bits(p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
}
#elif LIFEOPS_VEC_BYTES == 32
inline __attribute__((always_inline)) vec_t<float> load(const f16* p) {
  return (vec_t<float>)_mm256_cvtph_ps(load_bits<__m128i>(p));
}
inline __attribute__((always_inline)) void store(f16* p, vec_t<float> v) {
  store_bits(p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
}
#elif defined(__aarch64__)  // one instruction for four values; what follows takes some twenty for each
inline __attribute__((always_inline)) vec_t<float> load(const f16* p) { return (vec_t<float>)vcvt_f32_f16(load_bits<float16x4_t>(p)); }
inline __attribute__((always_inline)) void store(f16* p, vec_t<float> v) { store_bits(p, vcvt_f16_f32((float32x4_t)v)); }
#else
inline vec_t<float> load(const f16* p) {
  vec_t<float> v;
  for (int l = 0; l < Vec<float>::kLanes; ++l) v[l] = half_to_float(p[l].bits);
  return v;
}
inline void store(f16* p, vec_t<float> v) {
  for (int l = 0; l < Vec<float>::kLanes; ++l) p[l].bits = float_to_half(v[l]);
}
#endif

// The first n lanes (n may be 0), zeros behind them; and the matching store.
template <class T> inline auto load_partial(const T* p, int64_t n) {
  T lanes[Vec<typename AccOf<T>::type>::kLanes];
  __builtin_memset(lanes, 0, sizeof(lanes));
  __builtin_memcpy(lanes, p, n * sizeof(T));
  return load(lanes);
}
template <class T, class V> inline void store_partial(T* p, V v, int64_t n) {
  T lanes[Vec<typename AccOf<T>::type>::kLanes];
  store(lanes, v);
  __builtin_memcpy(p, lanes, n * sizeof(T));
}
template <class T> inline __attribute__((always_inline)) auto load_n(const T* p, int64_t n) {
  return n >= Vec<typename AccOf<T>::type>::kLanes ? load(p) : load_partial(p, n);
}
template <class T, class V> inline __attribute__((always_inline)) void store_n(T* p, V v, int64_t n) {
  if (n >= Vec<typename AccOf<T>::type>::kLanes) store(p, v);
  else store_partial(p, v, n);
}

}  // namespace LIFEOPS_ISA
}  // namespace lifeops

// SPDX-License-Identifier: Apache-2.0
// The pieces of attention that do arithmetic: exp2, transposition, and products of a few rows with a panel of vectors.
#pragma once
#include "vec.h"

namespace lifeops {
namespace LIFEOPS_ISA {

#define LIFEOPS_INLINE inline __attribute__((always_inline))

constexpr int kTileRows = 6;                                   // by
constexpr int kTileVectors = LIFEOPS_VEC_BYTES == 64 ? 4 : 2;  // vectors: as many sums as registers hold beside their operands

template <class V> struct Element { using type = std::remove_cv_t<std::remove_reference_t<decltype(V{}[0])>>; };
template <class A> using vec_int = decltype(vec_t<A>{} < vec_t<A>{});

// ------------------------------------------------------------------------------------------------ exp2

// Of x <= 0; 0 for -inf, NaN for NaN. Minimax polynomials of 2^f, |f| <= 1/2: relative errors 2e-9 and 3e-18.
template <class A> struct Exp2;
template <> struct Exp2<float> {
  static constexpr float kLowest = -160, kMagic = 12582912;  // below: 0; 1.5 * 2^23
  static constexpr int kBits = 23, kBias = 127;
  static constexpr float c[] = {1.0000000005541648f,     0.693147205737195751f,   0.240226468906455207f,  0.055503287771053248f,
                                0.00961848895633118162f, 0.0013399931177239738f, 0.000153458121613116298f};
};
template <> struct Exp2<double> {
  static constexpr double kLowest = -1100, kMagic = 6755399441055744;
  static constexpr int kBits = 52, kBias = 1023;
  static constexpr double c[] = {1,
                                 0.69314718055994533,
                                 0.240226506959101562,
                                 0.0555041086648199216,
                                 0.00961812910758833524,
                                 0.00133335581467899217,
                                 0.000154035304625144321,
                                 0.0000152527334899885256,
                                 1.32154330896763992e-6,
                                 1.01781980216719308e-7,
                                 7.0741056135081428e-9,
                                 4.43528270695727715e-10};
};

template <class A> LIFEOPS_INLINE vec_t<A> exp2_polynomial(vec_t<A> f) {
  using E = Exp2<A>;
  constexpr int n = sizeof(E::c) / sizeof(A);
  vec_t<A> p = vec_t<A>{} + E::c[n - 1];
#pragma GCC unroll 16
  for (int i = n - 2; i >= 0; --i) p = p * f + E::c[i];
  return p;
}

#if LIFEOPS_VEC_BYTES == 64
LIFEOPS_INLINE vec_t<float> exp2_of(vec_t<float> x) {
  const __m512 bounded = _mm512_max_ps(_mm512_set1_ps(Exp2<float>::kLowest), (__m512)x);  // its second operand where one is NaN
  const __m512 whole = _mm512_roundscale_ps(bounded, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  return (vec_t<float>)_mm512_scalef_ps((__m512)exp2_polynomial<float>((vec_t<float>)bounded - (vec_t<float>)whole), whole);
}
LIFEOPS_INLINE vec_t<double> exp2_of(vec_t<double> x) {
  const __m512d bounded = _mm512_max_pd(_mm512_set1_pd(Exp2<double>::kLowest), (__m512d)x);
  const __m512d whole = _mm512_roundscale_pd(bounded, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  return (vec_t<double>)_mm512_scalef_pd((__m512d)exp2_polynomial<double>((vec_t<double>)bounded - (vec_t<double>)whole), whole);
}
#else
// By the bits of the exponent: results below the smallest normal number are 0.
template <class A> LIFEOPS_INLINE vec_t<A> exp2_bits(vec_t<A> x) {
  using E = Exp2<A>;
  const vec_t<A> least = vec_t<A>{} + A(1 - E::kBias);
  const vec_int<A> tiny = x < least;
  const vec_t<A> bounded = tiny ? least : x, shifted = bounded + E::kMagic;
  const vec_t<A> whole = shifted - E::kMagic;
  const vec_t<A> p = exp2_polynomial<A>(bounded - whole);
  const vec_int<A> power = load_bits<vec_int<A>>(&shifted) << E::kBits;  // the magic number's own bits are shifted out
  const vec_int<A> scaled = load_bits<vec_int<A>>(&p) + power;
  const vec_t<A> value = load_bits<vec_t<A>>(&scaled);
  return tiny ? vec_t<A>{} : (x != x ? x : value);
}
LIFEOPS_INLINE vec_t<float> exp2_of(vec_t<float> x) { return exp2_bits<float>(x); }
LIFEOPS_INLINE vec_t<double> exp2_of(vec_t<double> x) { return exp2_bits<double>(x); }
#endif

template <class A, int N> LIFEOPS_INLINE void exp2_of_all(vec_t<A>* x) {
#pragma GCC unroll 6
  for (int i = 0; i < N; ++i) x[i] = exp2_of(x[i]);
}

// The larger of each pair; b where one is NaN.
template <class A> LIFEOPS_INLINE vec_t<A> larger(vec_t<A> a, vec_t<A> b) { return a > b ? a : b; }
#if LIFEOPS_VEC_BYTES == 64
template <> LIFEOPS_INLINE vec_t<float> larger<float>(vec_t<float> a, vec_t<float> b) { return (vec_t<float>)_mm512_max_ps((__m512)a, (__m512)b); }
template <> LIFEOPS_INLINE vec_t<double> larger<double>(vec_t<double> a, vec_t<double> b) { return (vec_t<double>)_mm512_max_pd((__m512d)a, (__m512d)b); }
#endif

// Functions of two vectors, as types: gcc compiles a lambda that returns a vector for the default instruction set.
struct Larger { template <class V> LIFEOPS_INLINE V operator()(V a, V b) const { return larger<typename Element<V>::type>(a, b); } };
struct Sum { template <class V> LIFEOPS_INLINE V operator()(V a, V b) const { return a + b; } };

// ------------------------------------------------------------------------------------------------ lanes

// Lanes of two vectors as the indices say.
template <class A, int... at> LIFEOPS_INLINE vec_t<A> pick(vec_t<A> a, vec_t<A> b, std::integer_sequence<int, at...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, at...);
#else
  return __builtin_shuffle(a, b, vec_int<A>{at...});
#endif
}
// Step s of a transposition exchanges, of two vectors that lie s apart, lanes whose number has bit s with lanes whose number has not.
template <int s, int L, int... l> constexpr auto lower_lanes(std::integer_sequence<int, l...>) {
  return std::integer_sequence<int, (l & s ? L + l - s : l)...>{};
}
template <int s, int L, int... l> constexpr auto upper_lanes(std::integer_sequence<int, l...>) {
  return std::integer_sequence<int, (l & s ? L + l : l + s)...>{};
}

template <class A, int s = 1> LIFEOPS_INLINE void transpose(vec_t<A>* rows) {
  constexpr int L = Vec<A>::kLanes;
  using Lanes = std::make_integer_sequence<int, L>;
#pragma GCC unroll 16
  for (int i = 0; i < L; ++i) {
    if (i & s) continue;
    const vec_t<A> a = rows[i], b = rows[i + s];
    rows[i] = pick<A>(a, b, lower_lanes<s, L>(Lanes{})), rows[i + s] = pick<A>(a, b, upper_lanes<s, L>(Lanes{}));
  }
  if constexpr (2 * s < L) transpose<A, 2 * s>(rows);
}

// All lanes combined, by halves.
template <class A, int s = Vec<A>::kLanes / 2, class F> LIFEOPS_INLINE A across(vec_t<A> v, F f) {
  using Lanes = std::make_integer_sequence<int, Vec<A>::kLanes>;
  const vec_t<A> both = f(v, pick<A>(v, v, upper_lanes<s, Vec<A>::kLanes>(Lanes{})));
  if constexpr (s > 1) return across<A, s / 2>(both, f);
  else return both[0];
}

// ------------------------------------------------------------------------------------------------ products

template <class A, int W> struct Tile { vec_t<A> sum[kTileRows][W]; };

// sum[i][w] += Σ_k a[i * row + k * step] b[k * b_step + w * lanes]
template <class A, int W> LIFEOPS_INLINE void multiply(Tile<A, W>& tile, const A* a, int64_t row, int64_t step, const A* b, int64_t b_step, int64_t n) {
  for (int64_t k = 0; k < n; ++k, a += step, b += b_step) {
    vec_t<A> column[W];
#pragma GCC unroll 4
    for (int w = 0; w < W; ++w) column[w] = in_register(load(b + w * Vec<A>::kLanes));
#pragma GCC unroll 6
    for (int i = 0; i < kTileRows; ++i) {
      const vec_t<A> x = vec_t<A>{} + a[i * row];
#pragma GCC unroll 4
      for (int w = 0; w < W; ++w) tile.sum[i][w] += x * column[w];
    }
  }
}

// out[i][w] = scale Σ a b, of kTileRows rows.
template <class A, int W> __attribute__((noinline)) void scaled_tile(const A* a, int64_t row, const A* b, int64_t n, A scale, A* out, int64_t out_row) {
  Tile<A, W> tile = {};
  multiply<A, W>(tile, a, row, 1, b, W * Vec<A>::kLanes, n);
#pragma GCC unroll 6
  for (int i = 0; i < kTileRows; ++i)
#pragma GCC unroll 4
    for (int w = 0; w < W; ++w) store(out + i * out_row + w * Vec<A>::kLanes, tile.sum[i][w] * scale);
}

// out[i][w] += Σ a b, or = where `first`.
template <class A, int W>
__attribute__((noinline)) void added_tile(const A* a, int64_t row, int64_t step, const A* b, int64_t b_step, int64_t n, bool first, A* out, int64_t out_row) {
  Tile<A, W> tile = {};
  if (!first)
#pragma GCC unroll 6
    for (int i = 0; i < kTileRows; ++i)
#pragma GCC unroll 4
      for (int w = 0; w < W; ++w) tile.sum[i][w] = load(out + i * out_row + w * Vec<A>::kLanes);
  if (step == 1) multiply<A, W>(tile, a, row, 1, b, b_step, n);
  else multiply<A, W>(tile, a, 1, step, b, b_step, n);
#pragma GCC unroll 6
  for (int i = 0; i < kTileRows; ++i)
#pragma GCC unroll 4
    for (int w = 0; w < W; ++w) store(out + i * out_row + w * Vec<A>::kLanes, tile.sum[i][w]);
}

template <int n> struct Wide { static constexpr int value = n; };
// f(Wide<w>) of a run-time width.
template <class F> LIFEOPS_INLINE void with_width(int64_t w, F f) {
  if constexpr (kTileVectors == 4) {
    if (w == 4) return f(Wide<4>{});
    if (w == 3) return f(Wide<3>{});
  }
  if (w == 2) return f(Wide<2>{});
  f(Wide<1>{});
}

}  // namespace LIFEOPS_ISA
}  // namespace lifeops

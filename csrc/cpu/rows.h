// SPDX-License-Identifier: Apache-2.0
// Rows of tokens: how a task reads them once, and asks ahead for the next.
//
// Unless it can be read where it lies (see Forward), each input row is read once, converted once and written to a zero-padded ring of
// rows [vector][column][lane]: compact, so that channel strides such as 4096 bytes cannot collide in L1, and free of column masks. The
// sums then read one ring vector per multiply-add, which two loads a cycle keep up with.
#pragma once
#include "activations.h"
#include "token_dwconv.h"

namespace lifeops {
namespace LIFEOPS_ISA {

template <int n> struct Count { static constexpr int value = n; };

// Tokens of one grid row, columns [q0, q1) of which those outside [0, W) become zeros, `n` channels; convert<N>(values, c, n) of N vectors
// inside, c their first channel and n the channels left from there on.
template <bool kFull, class T, class Convert, class A = typename AccOf<T>::type>
inline __attribute__((always_inline)) void load_row_as(const T* row, int64_t stride_n, int64_t W, int64_t q0, int64_t q1, int64_t n, A* out,
                                                       int64_t vector_stride, Convert convert) {
  constexpr int L = Vec<A>::kLanes, kTogether = LIFEOPS_VEC_BYTES == 64 ? 4 : 1;
  const vec_t<A> zero = {};
  for (int64_t q = q0; q < q1; ++q, out += L) {
    A* to = out;
    if (q < 0 || q >= W) {
      for (int64_t c = 0; c < n; c += L, to += vector_stride) store(to, zero);
      continue;
    }
    const T* token = row + q * stride_n;
    const auto some = [&](auto count, int64_t c, int64_t left) {
      constexpr int N = decltype(count)::value;
      vec_t<A> value[N];
#pragma GCC unroll 4
      for (int t = 0; t < N; ++t) value[t] = load_n(token + c + t * L, left);
      convert(count, value, c, left);
#pragma GCC unroll 4
      for (int t = 0; t < N; ++t, to += vector_stride) store(to, value[t]);
    };
    int64_t c = 0;
    if constexpr (kFull && kTogether > 1)
      for (; c + kTogether * L <= n; c += kTogether * L) some(Count<kTogether>{}, c, L);
    for (; c < n; c += L) some(Count<1>{}, c, kFull ? int64_t(L) : n - c);
  }
}
template <class T, class Convert, class A = typename AccOf<T>::type>
inline __attribute__((always_inline)) void load_row_as(const T* row, int64_t stride_n, int64_t W, int64_t q0, int64_t q1, int64_t n, A* out,
                                                       int64_t vector_stride, Convert convert) {
  if (n % Vec<A>::kLanes == 0) load_row_as<true>(row, stride_n, W, q0, q1, n, out, vector_stride, convert);
  else load_row_as<false>(row, stride_n, W, q0, q1, n, out, vector_stride, convert);
}

template <class T, class A = typename AccOf<T>::type>
void load_row(const T* row, int64_t stride_n, int64_t W, int64_t q0, int64_t q1, int64_t n, A* out, int64_t vector_stride) {
  load_row_as(row, stride_n, W, q0, q1, n, out, vector_stride, [](auto, vec_t<A>*, int64_t, int64_t) {});
}

// The same through a prologue, whose values start at this task's first channel.
template <class T, class A = typename AccOf<T>::type>
void load_row_through(const ChannelAffine& prologue, int64_t c0, const T* row, int64_t stride_n, int64_t W, int64_t q0, int64_t q1, int64_t n,
                      A* out, int64_t vector_stride) {
  const A *scale = static_cast<const A*>(prologue.scale) + c0, *shift = static_cast<const A*>(prologue.shift) + c0;
  with_prologue(prologue.act, [&](auto act) {
    load_row_as(row, stride_n, W, q0, q1, n, out, vector_stride, [&](auto count, vec_t<A>* values, int64_t c, int64_t left) {
      constexpr int N = decltype(count)::value;
      vec_t<A> scales[N], shifts[N];
#pragma GCC unroll 4
      for (int t = 0; t < N; ++t) scales[t] = load_n(scale + c + t * Vec<A>::kLanes, left), shifts[t] = load_n(shift + c + t * Vec<A>::kLanes, left);
      through<decltype(act)::value, A, N>(scales, shifts, values);
    });
  });
}

// The lines that are wanted next, asked for one by one between the sums, in the order they lie in memory: the run of one token, then
// the next token. Asked for vector by vector instead, every request of a wide token is another page; asked for in one burst they fill
// the line buffers and the core waits.
struct Ahead {
  struct Lines {
    const char* at;
    int64_t skip;  // bytes from the end of a token's run to the start of the next
  };
  Lines a, b, c;            // c only where asked for
  int64_t step, run, left;  // bytes per request; requests per token, and how many of this token are left

  // Strides in elements of T, whose vectors have `lanes` elements; n channels.
  template <class T> Ahead(const T* first, int64_t stride, const T* second, int64_t second_stride, int64_t n, int64_t lanes,
                           const T* third = nullptr, int64_t third_stride = 0)
      : step(lanes * int64_t(sizeof(T))), run(ceil_div(n, lanes)), left(run) {
    const auto lines = [&](const T* at, int64_t tokens) { return Lines{reinterpret_cast<const char*>(at), tokens * int64_t(sizeof(T)) - run * step}; };
    a = lines(first, stride), b = lines(second, second_stride), c = lines(third, third_stride);
  }

  // kWrite: b is to be written. kThird: c too.
  template <bool kWrite = false, bool kThird = false> inline __attribute__((always_inline)) void fetch() {
    __builtin_prefetch(a.at, 0, 2);
    __builtin_prefetch(b.at, kWrite, 2);
    if constexpr (kThird) __builtin_prefetch(c.at, 0, 2);
    a.at += step, b.at += step;
    if constexpr (kThird) c.at += step;
    if (--left > 0) return;
    left = run, a.at += a.skip, b.at += b.skip;
    if constexpr (kThird) c.at += c.skip;
  }
};

}  // namespace LIFEOPS_ISA
}  // namespace lifeops

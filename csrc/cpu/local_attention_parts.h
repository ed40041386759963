// SPDX-License-Identifier: Apache-2.0
// What attention's forward and backward pass share: packing, what a query may see, and the local term.
#pragma once
#include <cmath>
#include <limits>
#include <utility>

#include "local_attention.h"
#include "local_attention_tiles.h"

namespace lifeops {
namespace LIFEOPS_ISA {

constexpr int64_t kKeysAtOnce = 800, kKeyBlock = 512;  // more keys than the first are seen in blocks of about the second
constexpr int64_t kChunkBytes = 24576;                 // of rows that a product walks through: half of a first-level cache
constexpr int kRowsAtOnce = 3;                         // whose exponentials are taken together; a divisor of kTileRows

template <class A> constexpr A kNone = -std::numeric_limits<A>::infinity();
template <class A> constexpr A kLog2e = A(1.44269504088896340736);

// How n vectors are cut into panels.
struct Panels {
  int64_t vectors, count;
  explicit Panels(int64_t n) : vectors(n), count(ceil_div(n, kTileVectors)) {}
  int64_t start(int64_t panel) const { return panel * vectors / count; }
  int64_t width(int64_t panel) const { return start(panel + 1) - start(panel); }
};

// Sizes that both passes cut their work by, and how they give out a task's memory.
template <class A> struct AttentionSizes {
  static constexpr int64_t L = Vec<A>::kLanes, kBehind = (kTileRows + L - 1) / L;  // vectors behind a block's keys, where a group of them may end
  Panels keys, channels;
  int64_t padded_d, blocks, row, chunk, end = 0;  // row: of scores; chunk: tokens whose rows are walked through together

  explicit AttentionSizes(const AttentionParams& p) : keys(ceil_div(p.N, L)), channels(ceil_div(p.d, L)), padded_d(channels.vectors * L) {
    blocks = p.N <= kKeysAtOnce ? 1 : ceil_div(p.N, kKeyBlock);
    row = (ceil_div(keys.count, blocks) * kTileVectors + kBehind) * L;
    if (row * int64_t(sizeof(A)) % 512 == 0) row += L;  // rows of a tile would meet in the same lines of the cache
    chunk = max64(16, kChunkBytes / (min64(channels.vectors, kTileVectors) * LIFEOPS_VEC_BYTES));
  }
  int64_t block_start(int64_t block) const { return block * keys.count / blocks; }  // in panels
  int64_t take(int64_t elements) {
    const int64_t found = end;
    end += ceil_div(elements, L) * L;
    return found;
  }
};

template <class T> const T* head_of(const Heads& t, int64_t b, int64_t h) { return static_cast<const T*>(t.data) + b * t.stride_b + h * t.stride_h; }
// Of a contiguous (B, N, h, d) tensor.
template <class T> T* token_of(const AttentionParams& p, void* t, int64_t b, int64_t h, int64_t n) {
  return static_cast<T*>(t) + ((b * p.N + n) * p.h + h) * p.d;
}

// Asks for the rows [n0, n1) of a head. Behind a long stride no prefetcher of the machine would: the head's part of a token is short.
template <class T> void fetch_rows(const Heads& t, int64_t b, int64_t h, int64_t n0, int64_t n1, int64_t d) {
  for (int64_t n = n0; n < n1; ++n) {
    const T* row = head_of<T>(t, b, h) + n * t.stride_n;
    for (int64_t c = 0; c < d; c += 64 / int64_t(sizeof(T))) __builtin_prefetch(row + c, 0, 2);
  }
}

// Rows of d values, transposed, as [panel][channel][row of the panel]; zeros behind the last.
template <class T, class A> void pack_panels(const T* from, int64_t stride, int64_t N, int64_t d, const Panels& panels, A* out) {
  constexpr int64_t L = Vec<A>::kLanes;
  for (int64_t panel = 0; panel < panels.count; ++panel) {
    const int64_t start = panels.start(panel), width = panels.width(panel);
    for (int64_t v = 0; v < width; ++v) {
      const int64_t j0 = (start + v) * L, rows = min64(L, N - j0);
      for (int64_t c0 = 0; c0 < d; c0 += L) {
        vec_t<A> tile[L];
        const T* x = from + j0 * stride + c0;
        const bool whole = rows == L && c0 + L <= d;
        if (whole) {
#pragma GCC unroll 16
          for (int64_t i = 0; i < L; ++i) tile[i] = load(x + i * stride);
        } else {
          for (int64_t i = 0; i < L; ++i) tile[i] = i < rows ? load_n(x + i * stride, d - c0) : vec_t<A>{};
        }
        transpose<A>(tile);
        A* to = out + (start * d + c0 * width + v) * L;
        if (whole) {
#pragma GCC unroll 16
          for (int64_t i = 0; i < L; ++i) store(to + i * width * L, tile[i]);
        } else {
          for (int64_t i = 0; i < min64(L, d - c0); ++i) store(to + i * width * L, tile[i]);
        }
      }
    }
  }
}

// Rows of d values as rows of whole vectors; whether all are finite.
template <class T, class A> bool pack_rows(const T* from, int64_t stride, int64_t rows, int64_t d, int64_t padded_d, A* out) {
  constexpr int64_t L = Vec<A>::kLanes;
  vec_t<A> zeros = {};
  for (int64_t n = 0; n < rows; ++n, from += stride, out += padded_d)
    for (int64_t c = 0; c < d; c += L) {
      const vec_t<A> value = load_n(from + c, d - c);
      zeros += value * A(0);
      store(out + c, value);
    }
  return across<A>(zeros, Sum{}) == 0;
}

template <class T, class A> void unpack_rows(const A* from, int64_t padded_d, int64_t rows, int64_t d, T* to, int64_t stride) {
  for (int64_t n = 0; n < rows; ++n, from += padded_d, to += stride)
    for (int64_t c = 0; c < d; c += Vec<A>::kLanes) store_n(to + c, load(from + c), d - c);
}

// out[i] += Σ_j a[i][j] rows[j] for i < groups * kTileRows and j < n, rows of whole vectors; = instead of += where `first`.
template <class A> void multiply_rows(const AttentionSizes<A>& sizes, const A* a, int64_t groups, const A* rows, int64_t n, bool first, A* out) {
  const int64_t padded_d = sizes.padded_d, chunks = ceil_div(n, sizes.chunk);
  for (int64_t panel = 0; panel < sizes.channels.count; ++panel) {
    const int64_t c = sizes.channels.start(panel) * Vec<A>::kLanes;
    with_width(sizes.channels.width(panel), [&](auto width) {
      for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        const int64_t j0 = chunk * n / chunks, j1 = (chunk + 1) * n / chunks;
        for (int64_t g = 0; g < groups; ++g)
          added_tile<A, decltype(width)::value>(a + g * kTileRows * sizes.row + j0, sizes.row, 1, rows + j0 * padded_d + c, padded_d, j1 - j0,
                                                first && chunk == 0, out + g * kTileRows * padded_d + c, padded_d);
      }
    });
  }
}

// out[i][j] = scale Σ_c a[i][c] rows[j][c], panels [first, last) of packed rows.
template <class A>
void multiply_panels(const AttentionSizes<A>& sizes, const A* a, int64_t groups, const A* packed, int64_t d, int64_t first, int64_t last, A scale, A* out) {
  constexpr int64_t L = Vec<A>::kLanes;
  for (int64_t panel = first; panel < last; ++panel) {
    const int64_t start = sizes.keys.start(panel);
    A* const to = out + (start - sizes.keys.start(first)) * L;
    with_width(sizes.keys.width(panel), [&](auto width) {
      for (int64_t g = 0; g < groups; ++g)
        scaled_tile<A, decltype(width)::value>(a + g * kTileRows * sizes.padded_d, sizes.padded_d, packed + start * L * d, d, scale,
                                               to + g * kTileRows * sizes.row, sizes.row);
    });
  }
}

// ------------------------------------------------------------------------------------------------ what a query may see

template <class A> struct Visible {
  static constexpr int64_t L = Vec<A>::kLanes;
  const AttentionParams& p;
  int64_t b, h;
  A* hidden;  // of each key, in whole vectors: 0, or -inf where it does not exist

  Visible(const AttentionParams& p, int64_t b, int64_t h, A* hidden) : p(p), b(b), h(h), hidden(hidden) {
    const int64_t padded = ceil_div(p.N, L) * L;
    for (int64_t j = 0; j < padded; ++j) hidden[j] = j < p.N && (!p.key_mask || p.key_mask[b * p.N + j]) ? A(0) : kNone<A>;
  }

  bool masked() const { return p.key_mask || p.mask.data; }

  bool seen_by_any(int64_t j) const {
    if (hidden[j] != 0 || !p.mask.data) return hidden[j] == 0;
    for (int64_t n = 0; n < p.N; ++n)
      if (p.mask_bool ? head_of<uint8_t>(p.mask, b, h)[n * p.mask.stride_n + j] != 0 : head_of<A>(p.mask, b, h)[n * p.mask.stride_n + j] != kNone<A>)
        return true;
    return false;
  }

  // What lies in a key or a value that no query sees reaches nothing; 0 times NaN would.
  void clear_unseen(A* rows, int64_t padded_d) const {
    for (int64_t j = 0; j < p.N; ++j)
      if (!seen_by_any(j)) __builtin_memset(rows + j * padded_d, 0, size_t(padded_d) * sizeof(A));
  }

  // Adds the mask's row of query n to its scores of the vectors [v0, v1); -inf where a key is hidden.
  void add(int64_t n, int64_t v0, int64_t v1, A* s) const {
    if (!p.mask.data) {
      for (int64_t v = v0; v < v1; ++v, s += L) hide(v, load(s), s);
    } else if (p.mask_bool) {
      const uint8_t* see = head_of<uint8_t>(p.mask, b, h) + n * p.mask.stride_n;
      for (int64_t v = v0; v < v1; ++v, s += L) {
        const vec_t<A> none = vec_t<A>{} + kNone<A>;
        hide(v, bytes(see + v * L, p.N - v * L) != 0 ? load(s) : none, s);
      }
    } else {
      const A* mask = head_of<A>(p.mask, b, h) + n * p.mask.stride_n;
      for (int64_t v = v0; v < v1; ++v, s += L) {
        const vec_t<A> added = load_n(mask + v * L, p.N - v * L), sum = load(s) + added;
        hide(v, added == kNone<A> ? added : sum, s);
      }
    }
  }
  // The first n bytes, at most one for each lane; zeros behind them.
  static LIFEOPS_INLINE vec_int<A> bytes(const uint8_t* from, int64_t n) {
    typedef uint8_t Bytes __attribute__((vector_size(L)));
    Bytes found = {};
    if (n >= L) __builtin_memcpy(&found, from, sizeof(found));
    else __builtin_memcpy(&found, from, size_t(n));
    return __builtin_convertvector(found, vec_int<A>);
  }

  void hide(int64_t v, vec_t<A> score, A* s) const {
    const vec_t<A> none = load(hidden + v * L);
    store(s, none == 0 ? score : none);
  }

  // The same where nothing is masked: only the last vector has lanes without a key.
  void add_to_rows(int64_t n, int64_t rows, int64_t v0, int64_t v1, A* s, int64_t row) const {
    for (int64_t r = 0; r < rows; ++r, s += row) {
      if (masked()) add(min64(n + r, p.N - 1), v0, v1, s);
      else if (v1 * L > p.N) hide(v1 - 1, load(s + (v1 - v0 - 1) * L), s + (v1 - v0 - 1) * L);
    }
  }
};

// ------------------------------------------------------------------------------------------------ the local term

// sums[t] += DW_K(x)[t] + bias over the patches, one head's channels; x and sums as rows of whole vectors. All nine weights of K = 3 stay in registers.
template <class A> struct LocalTerm {
  static constexpr int64_t L = Vec<A>::kLanes;
  const AttentionParams& p;
  int64_t padded_d, step;  // step: from one tap's weights to the next
  const A *weight, *bias, *x;

  LocalTerm(const AttentionParams& p, int64_t padded_d, int64_t h, const A* x)
      : p(p), padded_d(padded_d), step(p.h * padded_d), weight(static_cast<const A*>(p.weight) + h * padded_d),
        bias(p.bias ? static_cast<const A*>(p.bias) + h * padded_d : nullptr), x(x) {}

  // Of the vector at channel c of token n, patch (r, q).
  LIFEOPS_INLINE vec_t<A> taps(vec_t<A> sum, int64_t n, int64_t r, int64_t q, int64_t c) const {
    const int64_t half = p.K / 2, i0 = max64(0, half - r), i1 = min64(p.K, p.H - r + half), j0 = max64(0, half - q), j1 = min64(p.K, p.W - q + half);
    for (int64_t i = i0; i < i1; ++i)
      for (int64_t j = j0; j < j1; ++j) sum += load(weight + (i * p.K + j) * step + c) * load(x + (n + (i - half) * p.W + j - half) * padded_d + c);
    return sum;
  }

  // `count` tokens from n on, in grid row r, from column q on. Filter rows [i0, i1) exist; none: any K.
  template <int i0, int i1> void run(int64_t n, int64_t count, int64_t r, int64_t q, int64_t c, A* sums) const {
    const vec_t<A> added = bias ? load(bias + c) : vec_t<A>{};
    const int64_t up = p.W * padded_d;
    const A* at = x + n * padded_d + c;
    vec_t<A> w[3][3];
#pragma GCC unroll 3
    for (int t = i0; t < i1; ++t)
#pragma GCC unroll 3
      for (int u = 0; u < 3; ++u) w[t][u] = load(weight + (t * 3 + u) * step + c);
    const auto nine = [&](auto from, auto to) {  // columns of the filter
      vec_t<A> sum = load(sums) + added;
#pragma GCC unroll 3
      for (int t = i0; t < i1; ++t)
#pragma GCC unroll 3
        for (int u = decltype(from)::value; u < decltype(to)::value; ++u) sum += w[t][u] * load(at + (t - 1) * up + (u - 1) * padded_d);
      store(sums, sum);
    };
    for (int64_t k = 0; k < count; ++k, at += padded_d, sums += padded_d) {
      if (i0 == i1) store(sums, taps(load(sums) + added, n + k, r, q + k, c));
      else if (q + k == 0) nine(Wide<1>{}, Wide<3>{});
      else if (q + k == p.W - 1) nine(Wide<0>{}, Wide<2>{});
      else nine(Wide<0>{}, Wide<3>{});
    }
  }

  // Tokens [n, n + count), whose rows `sums` has.
  void add(int64_t n, int64_t count, A* sums) const {
    for (int64_t i = max64(0, p.P - n); i < count;) {
      const int64_t r = (n + i - p.P) / p.W, q = (n + i - p.P) % p.W, length = min64(count - i, p.W - q);
      for (int64_t c = 0; c < p.d; c += L) {
        A* const to = sums + i * padded_d + c;
        if (p.K != 3 || p.H == 1 || p.W == 1) run<0, 0>(n + i, length, r, q, c, to);
        else if (r == 0) run<1, 3>(n + i, length, r, q, c, to);
        else if (r == p.H - 1) run<0, 2>(n + i, length, r, q, c, to);
        else run<0, 3>(n + i, length, r, q, c, to);
      }
      i += length;
    }
  }
};

}  // namespace LIFEOPS_ISA
}  // namespace lifeops

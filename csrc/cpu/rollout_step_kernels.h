// SPDX-License-Identifier: Apache-2.0
// The roll-out of rollout_step.h for one task. Compiled once per instruction set (see vec.h).
//
// A block of queries meets all keys of a head at once, so that q kᵀ is computed a single time: the block's scores, (kBlock, N), stay in
// the second-level cache through softmax, fusion and the sums into r. Keys are packed once per image as (panel, d, kWidth).
#pragma once
#include "activations.h"
#include "rollout_step.h"
#include "token_dwconv.h"  // ceil_div

namespace lifeops {
namespace LIFEOPS_ISA {

// exp(x) for x <= 0; 0 below -87 and at -inf, NaN stays. x = n ln 2 + r: 2^n is built from its bits, exp(r) is Taylor's sum, |r| <= 0.35: error 2e-8.
inline __attribute__((always_inline)) vec_t<float> exp_shifted(vec_t<float> x) {
  const vec_t<float> bounded = vmax(splat(-87.0f), x);
  const vec_t<float> shifted = bounded * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the integer part ends in the low bits
  const vec_t<float> n = shifted - 12582912.0f;
  const vec_t<float> r = (bounded - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts
  vec_t<float> e = r * (1.0f / 5040) + 1.0f / 720;
  e = e * r + 1.0f / 120;
  e = e * r + 1.0f / 24;
  e = e * r + 1.0f / 6;
  e = e * r + 0.5f;
  e = e * r + 1.0f;
  e = e * r + 1.0f;
  const vu32 bits = (load_bits<vu32>(&shifted) + 127) << 23;  // the exponent of 2^n
  return x < splat(-87.0f) ? vec_t<float>{} : e * load_bits<vec_t<float>>(&bits);
}
inline vec_t<double> exp_shifted(vec_t<double> x) {
  for (int l = 0; l < Vec<double>::kLanes; ++l) x[l] = __builtin_exp(x[l]);
  return x;
}

// Non-negative values of a row are ordered as their bits are.
template <class A> struct BitsOf;
template <> struct BitsOf<float> { using type = uint32_t; static constexpr int kTop = 30; };
template <> struct BitsOf<double> { using type = uint64_t; static constexpr int kTop = 62; };

template <class T> struct RolloutBody {
  using A = typename AccOf<T>::type;
  using V = vec_t<A>;
  static constexpr int L = Vec<A>::kLanes;
  static constexpr int kRows = LIFEOPS_VEC_BYTES == 64 ? 8 : 4, kVecs = 3, kWidth = kVecs * L;  // 24 or 12 sums in registers
  static constexpr int kBlockBytes = 1 << 18, kMostRows = 64;

  static int64_t row_size(const RolloutParams& p) { return ceil_div(p.N, kWidth) * kWidth; }
  static int64_t block_rows(const RolloutParams& p) {
    const int64_t rows = kBlockBytes / (row_size(p) * int64_t(sizeof(A))) / kRows * kRows;
    return rows < kRows ? kRows : rows > kMostRows ? kMostRows : rows;
  }

  // Scores and fused rows of a block, its packed queries, and the weights of its rows in r.
  struct Memory {
    A *scores, *fused, *queries, *weights;
    int64_t* rows;

    static int64_t bytes(const RolloutParams& p) {
      const int64_t block = block_rows(p);
      return block * (2 * row_size(p) + p.d + p.R) * int64_t(sizeof(A)) + p.N * int64_t(sizeof(int64_t));
    }
    Memory(const RolloutParams& p, void* memory) {
      const int64_t block = block_rows(p), row = row_size(p);
      scores = static_cast<A*>(memory), fused = scores + block * row, queries = fused + block * row;
      weights = queries + block * p.d;
      rows = reinterpret_cast<int64_t*>((reinterpret_cast<uintptr_t>(weights + block * p.R) + 7) / 8 * 8);
    }
  };

  // The first n of L channels from c on of one token, in the accumulation type.
  static inline void channels(const T* token, int64_t stride, int64_t c, int64_t n, A* out) {
    T values[L] = {};
    const T* from = stride == 1 ? token + c : values;
    if (stride != 1)
      for (int64_t i = 0; i < n; ++i) values[i] = token[(c + i) * stride];
    store(out, load_n(from, n));
  }

  static const T* head_of(const HeadView& t, int64_t b, int64_t head) {
    return static_cast<const T*>(t.data) + b * t.stride_b + head * t.stride_h;
  }

  // out[(n / kWidth) * d + c][n % kWidth] = k[n][c], zeros behind the last key.
  static void pack_keys(const RolloutParams& p, int64_t b, int64_t head, void* memory) {
    const T* keys = head_of(p.k, b, head);
    A* out = static_cast<A*>(memory);
    A values[L];
    for (int64_t n = 0; n < row_size(p); ++n) {
      A* column = out + n / kWidth * p.d * kWidth + n % kWidth;
      for (int64_t c = 0; c < p.d; c += L) {
        const int64_t count = p.d - c < L ? p.d - c : L;
        if (n < p.N) channels(keys + n * p.k.stride_n, p.k.stride_d, c, count, values);
        else store(values, V{});
        for (int64_t i = 0; i < count; ++i) column[(c + i) * kWidth] = values[i];
      }
    }
  }

  // out[(i / kRows) * d + c][i % kRows] = scale * q[rows[i]][c], zeros behind the last row.
  static void pack_queries(const RolloutParams& p, const T* queries, const int64_t* rows, int64_t count, A* out) {
    A values[L];
    for (int64_t i = 0; i < ceil_div(count, kRows) * kRows; ++i) {
      A* column = out + i / kRows * p.d * kRows + i % kRows;
      for (int64_t c = 0; c < p.d; c += L) {
        const int64_t n = p.d - c < L ? p.d - c : L;
        if (i < count) channels(queries + rows[i] * p.q.stride_n, p.q.stride_d, c, n, values);
        else store(values, V{});
        for (int64_t j = 0; j < n; ++j) column[(c + j) * kRows] = A(p.scale) * values[j];
      }
    }
  }

  // scores (kRows, kWidth) = queries · keys.
  static inline __attribute__((always_inline)) void tile(const A* queries, const A* keys, int64_t d, A* scores, int64_t row) {
    V sums[kRows][kVecs] = {};
    for (int64_t c = 0; c < d; ++c, queries += kRows, keys += kWidth) {
      V key[kVecs];
#pragma GCC unroll 8
      for (int v = 0; v < kVecs; ++v) key[v] = load(keys + v * L);
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 8
        for (int v = 0; v < kVecs; ++v) sums[i][v] += queries[i] * key[v];
    }
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 8
      for (int v = 0; v < kVecs; ++v) store(scores + i * row + v * L, sums[i][v]);
  }

  static void multiply(const RolloutParams& p, const A* queries, const A* keys, int64_t count, A* scores) {
    const int64_t row = row_size(p);
    for (int64_t n = 0; n < row; n += kWidth)
      for (int64_t i = 0; i < count; i += kRows) tile(queries + i * p.d, keys + n * p.d, p.d, scores + i * row + n, row);
  }

  static A largest(V v) {
    A m = v[0];
    for (int l = 1; l < L; ++l) m = v[l] > m ? v[l] : m;
    return m;
  }
  static A total(V v) {
    A s = 0;
    for (int l = 0; l < L; ++l) s += v[l];
    return s;
  }

  // scores = exp(scores - their maximum); returns the sum. What lies behind N becomes 0.
  static A exponentials(A* scores, int64_t N, int64_t row) {
    for (int64_t n = N; n < row; ++n) scores[n] = -A(__builtin_inf());
    V most = load(scores), sum = {};
    for (int64_t n = L; n < row; n += L) most = vmax(most, load(scores + n));
    const V shift = splat(largest(most));
    for (int64_t n = 0; n < row; n += L) {
      const V e = exp_shifted(load(scores + n) - shift);
      store(scores + n, e), sum += e;
    }
    return total(sum);
  }

  // A NaN among the scores of a head has made all of its row NaN, which then stays: vmax and vmin keep their second operand's.
  static void fuse(HeadFusion fusion, bool first, A factor, const A* scores, A* fused, int64_t row) {
    if (first || factor != factor)
      for (int64_t n = 0; n < row; n += L) store(fused + n, load(scores + n) * factor);
    else if (fusion == HeadFusion::mean)
      for (int64_t n = 0; n < row; n += L) store(fused + n, load(fused + n) + load(scores + n) * factor);
    else if (fusion == HeadFusion::max)
      for (int64_t n = 0; n < row; n += L) store(fused + n, vmax(load(scores + n) * factor, load(fused + n)));
    else
      for (int64_t n = 0; n < row; n += L) store(fused + n, vmin(load(scores + n) * factor, load(fused + n)));
  }

  // Zeroes the entries below the (dropped + 1)-th smallest of N, whose bits are found one by one: the largest value that at most
  // `dropped` entries lie below. Entries equal to it stay.
  static void discard(A* fused, int64_t N, int64_t row, int64_t dropped) {
    using Bits = typename BitsOf<A>::type;
    for (int64_t n = N; n < row; ++n) fused[n] = A(2);  // attention is at most 1
    Bits bits = 0;
    A threshold = 0;
    for (int bit = BitsOf<A>::kTop; bit >= 0; --bit) {
      const Bits candidate = bits | Bits(1) << bit;
      A value;
      __builtin_memcpy(&value, &candidate, sizeof(A));
      const V limit = splat(value);
      decltype(limit < limit) below = {};
      for (int64_t n = 0; n < row; n += L) below += load(fused + n) < limit;  // -1 where true
      int64_t count = 0;
      for (int l = 0; l < L; ++l) count -= below[l];
      if (count <= dropped) bits = candidate, threshold = value;
    }
    const V limit = splat(threshold);
    for (int64_t n = 0; n < row; n += L) {
      const V value = load(fused + n);
      store(fused + n, value < limit ? V{} : value);
    }
    for (int64_t n = N; n < row; ++n) fused[n] = 0;
  }

  // What r's weight of a row is divided by.
  static A row_sum(const RolloutParams& p, const A* fused, int64_t row) {
    if (p.fusion == HeadFusion::mean && p.dropped == 0) return 1;
    V sum = {};
    for (int64_t n = 0; n < row; n += L) sum += load(fused + n);
    const A s = A(1 - p.residual) * total(sum) + A(p.residual), least = sizeof(A) == 8 ? A(1e-300) : A(1e-37);
    return s < least ? least : s;
  }

  // out (kMaps, row) += weights (kMaps, count) · fused (count, row).
  template <int kMaps>
  static void add_rows(const A* weights, int64_t weight_stride, const A* fused, int64_t count, int64_t row, A* out) {
    for (int64_t n = 0; n < row; n += L) {
      V sums[kMaps];
#pragma GCC unroll 8
      for (int m = 0; m < kMaps; ++m) sums[m] = load(out + m * row + n);
      for (int64_t i = 0; i < count; ++i) {
        const V value = load(fused + i * row + n);
#pragma GCC unroll 8
        for (int m = 0; m < kMaps; ++m) sums[m] += weights[m * weight_stride + i] * value;
      }
#pragma GCC unroll 8
      for (int m = 0; m < kMaps; ++m) store(out + m * row + n, sums[m]);
    }
  }

  static void accumulate(const RolloutParams& p, const RolloutTask& task, const Memory& memory, const int64_t* rows, int64_t count) {
    const int64_t row = row_size(p), block = block_rows(p);
    A* out = static_cast<A*>(task.partial);
    for (int64_t i = 0; i < count; ++i) {
      if (p.dropped) discard(memory.fused + i * row, p.N, row, p.dropped);
      const A sum = row_sum(p, memory.fused + i * row, row);
      for (int64_t m = 0; m < p.R; ++m) {
        const A share = static_cast<const A*>(p.r)[task.b * p.r_stride_b + m * p.r_stride_r + rows[i]] / sum;
        memory.weights[m * block + i] = A(1 - p.residual) * share;
        out[m * row + rows[i]] += A(p.residual) * share;
      }
    }
    int64_t m = 0;
    for (; m + 8 <= p.R; m += 8) add_rows<8>(memory.weights + m * block, block, memory.fused, count, row, out + m * row);
    for (; m + 4 <= p.R; m += 4) add_rows<4>(memory.weights + m * block, block, memory.fused, count, row, out + m * row);
    for (; m < p.R; ++m) add_rows<1>(memory.weights + m * block, block, memory.fused, count, row, out + m * row);
  }

  // Queries that no map gives any weight add nothing: a single output token needs one row of the last layer.
  static int64_t wanted_rows(const RolloutParams& p, const RolloutTask& task, int64_t* rows) {
    int64_t count = 0;
    for (int64_t n = task.n0; n < task.n1; ++n) {
      const A* r = static_cast<const A*>(p.r) + task.b * p.r_stride_b + n;
      bool wanted = false;
      for (int64_t m = 0; m < p.R && !wanted; ++m) wanted = r[m * p.r_stride_r] != 0;
      if (wanted) rows[count++] = n;
    }
    return count;
  }

  static void run(const RolloutParams& p, const RolloutTask& task) {
    const Memory memory(p, task.scratch);
    const int64_t row = row_size(p), block = block_rows(p), wanted = wanted_rows(p, task, memory.rows);
    __builtin_memset(task.partial, 0, p.R * row * sizeof(A));
    for (int64_t first = 0; first < wanted; first += block) {
      const int64_t* rows = memory.rows + first;
      const int64_t count = wanted - first < block ? wanted - first : block;
      for (int64_t head = 0; head < p.h; ++head) {
        pack_queries(p, head_of(p.q, task.b, head), rows, count, memory.queries);
        multiply(p, memory.queries, static_cast<const A*>(task.keys) + head * p.d * row, count, memory.scores);
        for (int64_t i = 0; i < count; ++i) {
          const A sum = exponentials(memory.scores + i * row, p.N, row);
          const A factor = 1 / (p.fusion == HeadFusion::mean ? sum * A(p.h) : sum);
          fuse(p.fusion, head == 0, factor, memory.scores + i * row, memory.fused + i * row, row);
        }
      }
      accumulate(p, task, memory, rows, count);
    }
  }
};

template <class Body> inline auto with_rollout_body(DType dtype, Body body) {
  switch (dtype) {
    case DType::f64: return body(RolloutBody<double>{});
    case DType::f32: return body(RolloutBody<float>{});
    case DType::f16: return body(RolloutBody<f16>{});
    default: return body(RolloutBody<bf16>{});
  }
}

inline int64_t rollout_row_size(const RolloutParams& p) {
  return with_rollout_body(p.dtype, [&](auto body) { return decltype(body)::row_size(p); });
}
inline int64_t rollout_scratch_size(const RolloutParams& p) {
  return with_rollout_body(p.dtype, [&](auto body) { return decltype(body)::Memory::bytes(p); });
}
inline void rollout_pack_keys(const RolloutParams& p, int64_t b, int64_t head, void* out) {
  with_rollout_body(p.dtype, [&](auto body) { decltype(body)::pack_keys(p, b, head, out); });
}
inline void rollout_run(const RolloutParams& p, const RolloutTask& task) {
  with_rollout_body(p.dtype, [&](auto body) { decltype(body)::run(p, task); });
}

}  // namespace LIFEOPS_ISA
}  // namespace lifeops

// SPDX-License-Identifier: Apache-2.0
// One head's gradients, by blocks of kGradRows queries: scores and probabilities are computed again from the log-sum-exp, dk and dv are
// added up over the blocks in order. One task does a whole head, so that no sum depends on the number of threads.
#pragma once
#include "local_attention_parts.h"

namespace lifeops {
namespace LIFEOPS_ISA {

constexpr int64_t kGradRows = 54;  // a window of 7 x 7 at once; a multiple of kTileRows

template <class A> struct BackwardPlan : AttentionSizes<A> {
  int64_t key, key_rows, value, value_rows, dy, dk, dv, hidden, query, dq, score, slope, lse, less;

  explicit BackwardPlan(const AttentionParams& p) : AttentionSizes<A>(p) {
    const int64_t d = this->padded_d, panels = this->keys.vectors * Vec<A>::kLanes * p.d, rows = p.N * d, block = kGradRows * d;
    const int64_t sums = (p.N + kTileRows) * d, scores = kGradRows * this->row;  // the last group of keys may reach behind them
    key = this->take(panels), key_rows = this->take(rows), value = this->take(panels), dy = this->take((p.N + kTileRows) * d);
    dk = this->take(sums), dv = this->take(sums), value_rows = dv;  // read before anything is added up
    hidden = this->take(this->keys.vectors * Vec<A>::kLanes), query = this->take(block), dq = this->take(block);
    score = this->take(scores), slope = this->take(scores), lse = this->take(kGradRows), less = this->take(kGradRows);
  }
};

template <class T, class A> struct BackwardHead {
  static constexpr int64_t L = Vec<A>::kLanes;
  const AttentionGradParams& p;
  const BackwardPlan<A>& plan;
  const int64_t b, h;
  A *const key, *const key_rows, *const value, *const dy, *const dk, *const dv, *const query, *const dq, *const score, *const slope, *const lse, *const less;
  const Visible<A> visible;

  BackwardHead(const AttentionGradParams& p, const BackwardPlan<A>& plan, int64_t b, int64_t h, A* at)
      : p(p), plan(plan), b(b), h(h), key(at + plan.key), key_rows(at + plan.key_rows), value(at + plan.value), dy(at + plan.dy), dk(at + plan.dk),
        dv(at + plan.dv), query(at + plan.query), dq(at + plan.dq), score(at + plan.score), slope(at + plan.slope), lse(at + plan.lse),
        less(at + plan.less), visible(p, b, h, at + plan.hidden) {
    A* const value_rows = at + plan.value_rows;
    const bool finite_k = pack_rows(head_of<T>(p.k, b, h), p.k.stride_n, p.N, p.d, plan.padded_d, key_rows);
    const bool finite_v = pack_rows(head_of<T>(p.v, b, h), p.v.stride_n, p.N, p.d, plan.padded_d, value_rows);
    if (visible.masked() && !(finite_k && finite_v)) visible.clear_unseen(key_rows, plan.padded_d), visible.clear_unseen(value_rows, plan.padded_d);
    pack_panels(key_rows, plan.padded_d, p.N, p.d, plan.keys, key);
    pack_panels(value_rows, plan.padded_d, p.N, p.d, plan.keys, value);
    pack_rows(head_of<T>(p.dy, b, h), p.dy.stride_n, p.N, p.d, plan.padded_d, dy);
    __builtin_memset(dy + p.N * plan.padded_d, 0, size_t(kTileRows * plan.padded_d) * sizeof(A));
  }

  // Of queries [n, n + count): their log-sum-exp, and rowsum(dy * attn). Rows behind them get no probability.
  void take_rows(int64_t n, int64_t count, int64_t padded) {
    pack_rows(head_of<T>(p.q, b, h) + n * p.q.stride_n, p.q.stride_n, count, p.d, plan.padded_d, query);
    __builtin_memset(query + count * plan.padded_d, 0, size_t((padded - count) * plan.padded_d) * sizeof(A));
    for (int64_t i = 0; i < padded; ++i) {
      vec_t<A> sum = {};
      const T* attn = head_of<T>(p.out, b, h) + (n + i) * p.out.stride_n;
      if (i < count)
        for (int64_t c = 0; c < p.d; c += L) sum += load(dy + (n + i) * plan.padded_d + c) * load_n(attn + c, p.d - c);
      less[i] = across<A>(sum, Sum{});
      lse[i] = i < count ? static_cast<const A*>(p.lse)[(b * p.h + h) * p.N + n + i] : A(0);
    }
  }

  // score := p = exp(score - lse), slope := p (slope - less), kRowsAtOnce rows from i on; lanes behind the last key are 0.
  void slopes(int64_t n, int64_t i, int64_t v0, int64_t v1) {
    constexpr int R = kRowsAtOnce;
    const int64_t row = plan.row;
    A *const s = score + i * row, *const g = slope + i * row;
    visible.add_to_rows(n, R, v0, v1, s, row);
    for (int64_t v = 0; v < v1 - v0; ++v) {
      vec_t<A> e[R];
#pragma GCC unroll 3
      for (int r = 0; r < R; ++r) e[r] = (load(s + r * row + v * L) - lse[i + r]) * kLog2e<A>;
      exp2_of_all<A, R>(e);
#pragma GCC unroll 3
      for (int r = 0; r < R; ++r) store(s + r * row + v * L, e[r]), store(g + r * row + v * L, e[r] * (load(g + r * row + v * L) - less[i + r]));
    }
    for (int r = 0; r < R; ++r)
      for (int64_t v = v1 - v0; v < v1 - v0 + plan.kBehind; ++v) store(s + r * row + v * L, vec_t<A>{}), store(g + r * row + v * L, vec_t<A>{});
  }

  // sums[j] += Σ_i a[i][j] rows[i], keys [0, n) of a block, count rows; = where `first`. The last group may reach into keys behind them, whose
  // a is 0 and which are first written after this block's.
  void add_transposed(const A* a, const A* rows, int64_t count, int64_t n, bool first, A* sums) {
    for (int64_t panel = 0; panel < plan.channels.count; ++panel) {
      const int64_t c = plan.channels.start(panel) * L;
      with_width(plan.channels.width(panel), [&](auto width) {
        for (int64_t j = 0; j < n; j += kTileRows)
          added_tile<A, decltype(width)::value>(a + j, 1, plan.row, rows + c, plan.padded_d, count, first, sums + j * plan.padded_d + c, plan.padded_d);
      });
    }
  }

  // Queries [n, n + count), at most kGradRows.
  void rows(int64_t n, int64_t count) {
    const int64_t groups = ceil_div(count, kTileRows);
    take_rows(n, count, groups * kTileRows);
    for (int64_t block = 0; block < plan.blocks; ++block) {
      const int64_t first = plan.block_start(block), last = plan.block_start(block + 1), v0 = plan.keys.start(first), v1 = plan.keys.start(last);
      const int64_t j0 = v0 * L, keys = min64(p.N, v1 * L) - j0;
      multiply_panels(plan, query, groups, key, p.d, first, last, A(p.scale), score);
      multiply_panels(plan, dy + n * plan.padded_d, groups, value, p.d, first, last, A(1), slope);
      for (int64_t i = 0; i < count; i += kRowsAtOnce) slopes(n + i, i, v0, v1);
      multiply_rows(plan, slope, groups, key_rows + j0 * plan.padded_d, keys, block == 0, dq);
      add_transposed(score, dy + n * plan.padded_d, count, keys, n == 0, dv + j0 * plan.padded_d);
      add_transposed(slope, query, count, keys, n == 0, dk + j0 * plan.padded_d);
      if (p.ds)
        for (int64_t i = 0; i < count; ++i)
          __builtin_memcpy(static_cast<A*>(p.ds) + ((b * p.h + h) * p.N + n + i) * p.N + j0, slope + i * plan.row, size_t(keys) * sizeof(A));
    }
    scale_rows(dq, count);
    unpack_rows(dq, plan.padded_d, count, p.d, token_of<T>(p, p.dq, b, h, n), p.h * p.d);
  }

  void scale_rows(A* rows, int64_t count) const {
    for (int64_t i = 0; i < count * plan.padded_d; i += L) store(rows + i, load(rows + i) * A(p.scale));
  }

  void run() {
    for (int64_t n = 0; n < p.N; n += kGradRows) rows(n, min64(p.N - n, kGradRows));
    scale_rows(dk, p.N);
    unpack_rows(dk, plan.padded_d, p.N, p.d, token_of<T>(p, p.dk, b, h, 0), p.h * p.d);
    if (p.weight) LocalTerm<A>(p, plan.padded_d, h, dy).add(0, p.N, dv);
    unpack_rows(dv, plan.padded_d, p.N, p.d, token_of<T>(p, p.dv, b, h, 0), p.h * p.d);
  }
};

template <class T> void attention_backward_of(const AttentionGradParams& p, int64_t b, int64_t h, void* scratch) {
  using A = typename AccOf<T>::type;
  const BackwardPlan<A> plan(p);
  BackwardHead<T, A>(p, plan, b, h, static_cast<A*>(scratch)).run();
}

}  // namespace LIFEOPS_ISA
}  // namespace lifeops

// SPDX-License-Identifier: Apache-2.0
// One head's attention. Its keys are packed transposed, in panels of a few vectors, its values as rows of whole vectors; then kQueryRows
// queries at a time see all keys, or, of long sequences, blocks of them with a running maximum. What a row gets depends on nothing but
// the row: neither on the rows beside it nor on the cut into tasks.
#pragma once
#include "local_attention_parts.h"

namespace lifeops {
namespace LIFEOPS_ISA {

template <class A> struct ForwardPlan : AttentionSizes<A> {
  int64_t key, value, attended, hidden, query, score, out, most, total;

  explicit ForwardPlan(const AttentionParams& p) : AttentionSizes<A>(p) {
    const int64_t L = Vec<A>::kLanes, rows = p.N * this->padded_d, block = kQueryRows * this->padded_d;
    key = this->take(this->keys.vectors * L * p.d), value = this->take(rows), attended = p.mask.data || p.key_mask ? this->take(rows) : value;
    hidden = this->take(this->keys.vectors * L), query = this->take(block), score = this->take(kQueryRows * this->row), out = this->take(block);
    most = this->take(kQueryRows), total = this->take(kQueryRows);
  }
};

template <class T, class A> struct ForwardHead {
  static constexpr int64_t L = Vec<A>::kLanes;
  const AttentionParams& p;
  const ForwardPlan<A>& plan;
  const int64_t b, h;
  A *const key, *const value, *attended, *const query, *const score, *const out, *const most, *const total;
  const Visible<A> visible;

  ForwardHead(const AttentionParams& p, const ForwardPlan<A>& plan, int64_t b, int64_t h, A* at)
      : p(p), plan(plan), b(b), h(h), key(at + plan.key), value(at + plan.value), attended(value), query(at + plan.query), score(at + plan.score),
        out(at + plan.out), most(at + plan.most), total(at + plan.total), visible(p, b, h, at + plan.hidden) {
    pack_panels(head_of<T>(p.k, b, h), p.k.stride_n, p.N, p.d, plan.keys, key);
    const bool finite = pack_rows(head_of<T>(p.v, b, h), p.v.stride_n, p.N, p.d, plan.padded_d, value);
    if (finite || !visible.masked()) return;
    attended = at + plan.attended;  // the local term sees what attention does not
    __builtin_memcpy(attended, value, size_t(p.N * plan.padded_d) * sizeof(A));
    visible.clear_unseen(attended, plan.padded_d);
  }

  // Scores of kRowsAtOnce queries from row i of the block on, keys of the vectors [v0, v1), to exp(score - most), with the most so far.
  void exponentials(int64_t n, int64_t i, int64_t v0, int64_t v1, bool first) {
    constexpr int R = kRowsAtOnce;
    const int64_t vectors = v1 - v0, row = plan.row;
    A* const s = score + i * row;
    visible.add_to_rows(n, R, v0, v1, s, row);
    vec_t<A> top[R], sum[R];
    A from[R];
#pragma GCC unroll 3
    for (int r = 0; r < R; ++r) top[r] = load(s + r * row);
    for (int64_t v = 1; v < vectors; ++v)
#pragma GCC unroll 3
      for (int r = 0; r < R; ++r) top[r] = larger<A>(load(s + r * row + v * L), top[r]);
#pragma GCC unroll 3
    for (int r = 0; r < R; ++r) {
      const A here = across<A>(top[r], Larger{}), before = most[i + r];
      const A now = first || here > before ? here : before;
      most[i + r] = now, from[r] = now == kNone<A> ? A(0) : now, sum[r] = vec_t<A>{};
      if (!first && now != before) rescale(i + r, std::exp(before - from[r]));
    }
    for (int64_t v = 0; v < vectors; ++v) {
      vec_t<A> e[R];
#pragma GCC unroll 3
      for (int r = 0; r < R; ++r) e[r] = (load(s + r * row + v * L) - from[r]) * kLog2e<A>;
      exp2_of_all<A, R>(e);
#pragma GCC unroll 3
      for (int r = 0; r < R; ++r) store(s + r * row + v * L, e[r]), sum[r] += e[r];
    }
#pragma GCC unroll 3
    for (int r = 0; r < R; ++r) {
      const A added = across<A>(sum[r], Sum{});
      total[i + r] = first ? added : total[i + r] + added;
    }
  }

  void rescale(int64_t i, A factor) {
    total[i] *= factor;
    for (int64_t c = 0; c < plan.padded_d; c += L) store(out + i * plan.padded_d + c, load(out + i * plan.padded_d + c) * factor);
  }

  // Lines that are written when the products are done.
  void fetch(void* tensor, int64_t n, int64_t count) const {
    for (int64_t i = 0; i < count; ++i)
      for (int64_t c = 0; c < p.d; c += 64 / int64_t(sizeof(T))) __builtin_prefetch(token_of<T>(p, tensor, b, h, n + i) + c, 1);
  }

  void write(int64_t n, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
      const A from = most[i], sum = total[i], inverse = sum == 0 ? A(0) : A(1) / sum;
      if (p.lse)
        static_cast<A*>(p.lse)[(b * p.h + h) * p.N + n + i] = sum == 0 ? A(0) : from == std::numeric_limits<A>::infinity() ? from : from + std::log(sum);
      A* const row = out + i * plan.padded_d;
      for (int64_t c = 0; c < plan.padded_d; c += L) store(row + c, load(row + c) * inverse);
    }
    if (p.attn) unpack_rows(out, plan.padded_d, count, p.d, token_of<T>(p, p.attn, b, h, n), p.h * p.d);
    if (p.weight) LocalTerm<A>(p, plan.padded_d, h, value).add(n, count, out);
    unpack_rows(out, plan.padded_d, count, p.d, token_of<T>(p, p.y, b, h, n), p.h * p.d);
  }

  // Queries [n, n + count), at most kQueryRows.
  void rows(int64_t n, int64_t count) {
    const int64_t groups = ceil_div(count, kTileRows), padded = groups * kTileRows - count;
    fetch(p.y, n, count);
    if (p.attn) fetch(p.attn, n, count);
    pack_rows(head_of<T>(p.q, b, h) + n * p.q.stride_n, p.q.stride_n, count, p.d, plan.padded_d, query);
    __builtin_memset(query + count * plan.padded_d, 0, size_t(padded * plan.padded_d) * sizeof(A));
    for (int64_t block = 0; block < plan.blocks; ++block) {
      const int64_t first = plan.block_start(block), last = plan.block_start(block + 1), v0 = plan.keys.start(first), v1 = plan.keys.start(last);
      multiply_panels(plan, query, groups, key, p.d, first, last, A(p.scale), score);
      for (int64_t i = 0; i < count; i += kRowsAtOnce) exponentials(n + i, i, v0, v1, block == 0);
      multiply_rows(plan, score, groups, attended + v0 * L * plan.padded_d, min64(p.N, v1 * L) - v0 * L, block == 0, out);
    }
    write(n, count);
  }
};

template <class T> void attention_forward_of(const AttentionParams& p, const AttentionTask& task, void* scratch) {
  using A = typename AccOf<T>::type;
  const ForwardPlan<A> plan(p);
  ForwardHead<T, A> head(p, plan, task.b, task.h, static_cast<A*>(scratch));
  const bool other = task.next_b != task.b || task.next_h != task.h;
  for (int64_t n = task.n0; n < task.n1; n += kQueryRows) {
    const int64_t count = min64(task.n1 - n, kQueryRows);
    if (other)
      for (const Heads* t : {&p.q, &p.k, &p.v}) fetch_rows<T>(*t, task.next_b, task.next_h, n, n + count, p.d);
    head.rows(n, count);
  }
}

}  // namespace LIFEOPS_ISA
}  // namespace lifeops

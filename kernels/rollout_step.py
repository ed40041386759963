"""One layer of attention roll-out in Triton: two or three passes over q kᵀ, tile by tile, of which nothing is kept but row statistics.

    rollout_stats_kernel   lse[b, h, i] = log sum_j exp(scale q_i k_j)
    rollout_sums_kernel    inverse[b, i] = 1 / row sum of Â, where that is not 1; threshold[b, i], below which entries are discarded
    rollout_step_kernel    out[b, :, j] = sum_i r[b, :, i] Â_ij

In the last a program owns its keys, so that nothing is added atomically. A tile is (BLOCK_M queries, BLOCK_N keys), its d summed in
pieces of BLOCK_D; float32 products are split in three TF32 ones (on AMD they are float32's own).
"""

import torch
import triton
import triton.language as tl

from lifeops import registry
from lifeops.kernels import _tile
from lifeops.kernels._tile import interpreted, store_block
from lifeops.ops.rollout_step import dropped_entries

BELOW = 1 - 2.0**-18  # of the threshold: another kernel may round the entry that the threshold came from differently
LEAST = {torch.float64: 1e-300, torch.float32: 1e-37}


@triton.jit
def head_rows(p, first, o, o_d, stride_n, N, D: tl.constexpr, EVEN: tl.constexpr, WIDE: tl.constexpr):
    """Tokens first + o of one head, channels o_d, zeros outside. Offsets are 32-bit behind the block's first token."""
    p_b = p + first.to(tl.int64) * stride_n + (o[:, None] * stride_n + o_d[None, :])
    m = (o < N - first)[:, None]
    b = tl.load(p_b, mask=m if EVEN else m & (o_d < D)[None, :], other=0.0)
    return b.to(tl.float32) if WIDE else b


@triton.jit
def tile_scores(
    p_q, p_k, first_m, first_n, stride_qn, stride_kn, N, SCALE: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """scale q kᵀ, (queries, keys); -inf behind the last key."""
    b_s = tl.zeros([BLOCK_M, BLOCK_N], dtype=ACC)
    for d in range(0, D, BLOCK_D):
        o_d = d + tl.arange(0, BLOCK_D)
        b_q = head_rows(p_q, first_m, tl.arange(0, BLOCK_M), o_d, stride_qn, N, D, D % BLOCK_D == 0, WIDE)
        b_k = head_rows(p_k, first_n, tl.arange(0, BLOCK_N), o_d, stride_kn, N, D, D % BLOCK_D == 0, WIDE)
        b_s = tl.dot(b_q, tl.trans(b_k), b_s, input_precision=PRECISION, out_dtype=ACC)
    return tl.where((tl.arange(0, BLOCK_N) < N - first_n)[None, :], b_s * SCALE, float("-inf"))


@triton.jit
def fused_tile(
    p_q, p_k, p_lse, first_m, first_n, stride_qh, stride_qn, stride_kh, stride_kn, N, heads, FUSION: tl.constexpr,
    SCALE: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ACC: tl.constexpr,
    PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """fuse_h softmax(scale q kᵀ) of one tile; a row past the last query holds whatever zeros give."""
    b_f = tl.full([BLOCK_M, BLOCK_N], 2.0 if FUSION == "min" else 0.0, dtype=ACC)
    o_m = first_m + tl.arange(0, BLOCK_M)
    for _ in range(heads):
        b_s = tile_scores(p_q, p_k, first_m, first_n, stride_qn, stride_kn, N, SCALE, D, BLOCK_D, BLOCK_M, BLOCK_N, ACC, PRECISION, WIDE)
        b_a = tl.exp(b_s - tl.load(p_lse + o_m, mask=o_m < N, other=0.0)[:, None])
        if FUSION == "mean":
            b_f += b_a
        elif FUSION == "max":
            b_f = tl.maximum(b_f, b_a, propagate_nan=tl.PropagateNan.ALL)
        else:
            b_f = tl.minimum(b_f, b_a, propagate_nan=tl.PropagateNan.ALL)
        p_q, p_k, p_lse = p_q + stride_qh, p_k + stride_kh, p_lse + N
    if FUSION == "mean":
        b_f = b_f / heads
    return b_f


@triton.jit
def discard(b_f, p_threshold, o_m, N):
    """Entries below the thresholds of their rows become zeros."""
    if p_threshold is not None:
        b_threshold = tl.load(p_threshold + o_m, mask=o_m < N, other=0.0)
        b_f = tl.where(b_f < b_threshold[:, None], 0.0, b_f)
    return b_f


@triton.jit(do_not_specialize=["N", "heads"])
def rollout_stats_kernel(
    q_ptr, k_ptr, lse_ptr,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, N, heads,
    SCALE: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ACC: tl.constexpr,
    PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """lse of BLOCK_M queries of one head."""
    blocks = tl.cdiv(N, BLOCK_M)
    i_bh, first_m = (tl.program_id(0) // blocks).to(tl.int64), (tl.program_id(0) % blocks) * BLOCK_M
    i_b, i_h = i_bh // heads, i_bh % heads
    p_q, p_k = q_ptr + i_b * stride_qb + i_h * stride_qh, k_ptr + i_b * stride_kb + i_h * stride_kh
    b_most = tl.full([BLOCK_M], float("-inf"), dtype=ACC)
    b_sum = tl.zeros([BLOCK_M], dtype=ACC)
    for i in range(0, tl.cdiv(N, BLOCK_N)):
        first_n = tl.full([], BLOCK_N, tl.int32) * i
        b_s = tile_scores(p_q, p_k, first_m, first_n, stride_qn, stride_kn, N, SCALE, D, BLOCK_D, BLOCK_M, BLOCK_N, ACC, PRECISION, WIDE)
        b_new = tl.maximum(b_most, tl.max(b_s, 1))
        b_off = tl.where(b_new == float("-inf"), 0.0, b_new)  # scores of -inf so far
        b_sum = b_sum * tl.exp(b_most - b_off) + tl.sum(tl.exp(b_s - b_off[:, None]), 1)
        b_most = b_new
    o_m = first_m + tl.arange(0, BLOCK_M)
    tl.store(lse_ptr + i_bh * N + o_m, b_most + tl.log(b_sum), mask=o_m < N)


@triton.jit(do_not_specialize=["N", "heads", "dropped"])
def rollout_sums_kernel(
    q_ptr, k_ptr, lse_ptr, inverse_ptr, threshold_ptr,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, N, heads, dropped,
    SCALE: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ACC: tl.constexpr,
    PRECISION: tl.constexpr, WIDE: tl.constexpr,
    FUSION: tl.constexpr, RESIDUAL: tl.constexpr, LEAST: tl.constexpr, BELOW: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """1 / ((1 - RESIDUAL) sum_j F_ij + RESIDUAL) of BLOCK_M queries and, if asked for, the (dropped + 1)-th smallest F_ij.

    Values >= 0 are ordered as their bits are. The threshold is the largest number that at most ``dropped`` entries lie below: it is
    built two bits at a time, each time over all keys.
    """
    blocks = tl.cdiv(N, BLOCK_M)
    i_b, first_m = (tl.program_id(0) // blocks).to(tl.int64), (tl.program_id(0) % blocks) * BLOCK_M
    p_q, p_k, p_lse = q_ptr + i_b * stride_qb, k_ptr + i_b * stride_kb, lse_ptr + i_b * heads * N
    o_m = first_m + tl.arange(0, BLOCK_M)
    if threshold_ptr is not None:
        WORD: tl.constexpr = tl.uint32 if BITS == 32 else tl.uint64
        b_bits = tl.zeros([BLOCK_M], dtype=WORD)
        unit = tl.full([], 1, dtype=WORD) << (BITS - 2)
        for _ in range(BITS // 2):
            b_1, b_2, b_3 = (tl.zeros([BLOCK_M], dtype=tl.int32),) * 3
            for i in range(0, tl.cdiv(N, BLOCK_N)):
                first_n = tl.full([], BLOCK_N, tl.int32) * i
                b_f = fused_tile(p_q, p_k, p_lse, first_m, first_n, stride_qh, stride_qn, stride_kh, stride_kn, N, heads, FUSION,
                                 SCALE, D, BLOCK_D, BLOCK_M, BLOCK_N, ACC, PRECISION, WIDE)  # fmt: skip
                b_word = tl.where((tl.arange(0, BLOCK_N) < N - first_n)[None, :], b_f, 2.0).to(WORD, bitcast=True)
                b_1 += tl.sum((b_word < (b_bits + unit)[:, None]).to(tl.int32), 1)
                b_2 += tl.sum((b_word < (b_bits + 2 * unit)[:, None]).to(tl.int32), 1)
                b_3 += tl.sum((b_word < (b_bits + 3 * unit)[:, None]).to(tl.int32), 1)
            b_bits += ((b_1 <= dropped).to(WORD) + (b_2 <= dropped).to(WORD) + (b_3 <= dropped).to(WORD)) * unit
            unit = unit >> 2
        tl.store(threshold_ptr + i_b * N + o_m, b_bits.to(ACC, bitcast=True) * BELOW, mask=o_m < N)
        tl.debug_barrier()  # the thresholds are read again below, by other threads
    b_sum = tl.zeros([BLOCK_M], dtype=ACC)
    for i in range(0, tl.cdiv(N, BLOCK_N)):
        b_f = fused_tile(p_q, p_k, p_lse, first_m, tl.full([], BLOCK_N, tl.int32) * i, stride_qh, stride_qn, stride_kh, stride_kn, N,
                         heads, FUSION, SCALE, D, BLOCK_D, BLOCK_M, BLOCK_N, ACC, PRECISION, WIDE)  # fmt: skip
        if threshold_ptr is not None:
            b_f = discard(b_f, threshold_ptr + i_b * N, o_m, N)
        b_sum += tl.sum(b_f, 1)
    b_sum = (1 - RESIDUAL) * b_sum + RESIDUAL
    tl.store(inverse_ptr + i_b * N + o_m, 1 / tl.maximum(b_sum, LEAST, propagate_nan=tl.PropagateNan.ALL), mask=o_m < N)


@triton.jit(do_not_specialize=["N", "heads", "maps"])
def rollout_step_kernel(
    r_ptr, q_ptr, k_ptr, lse_ptr, inverse_ptr, threshold_ptr, out_ptr, stride_rb, stride_rr,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, N, heads, maps,
    SCALE: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ACC: tl.constexpr,
    PRECISION: tl.constexpr, WIDE: tl.constexpr,
    FUSION: tl.constexpr, RESIDUAL: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """BLOCK_R maps of the layer's input over BLOCK_N tokens. One map is summed in place of its tiles, more are a product."""
    blocks, map_blocks = tl.cdiv(N, BLOCK_N), tl.cdiv(maps, BLOCK_R)
    i_b = (tl.program_id(0) // (blocks * map_blocks)).to(tl.int64)
    i_r, first_n = (tl.program_id(0) // blocks) % map_blocks, (tl.program_id(0) % blocks) * BLOCK_N
    o_r = i_r * BLOCK_R + tl.arange(0, BLOCK_R)
    p_r = r_ptr + i_b * stride_rb + o_r.to(tl.int64)[:, None] * stride_rr
    acc = tl.zeros([BLOCK_M if BLOCK_R == 1 else BLOCK_R, BLOCK_N], dtype=ACC)
    for i in range(0, tl.cdiv(N, BLOCK_M)):
        first_m = tl.full([], BLOCK_M, tl.int32) * i
        o_m = first_m + tl.arange(0, BLOCK_M)
        b_f = fused_tile(
            q_ptr + i_b * stride_qb, k_ptr + i_b * stride_kb, lse_ptr + i_b * heads * N, first_m, first_n,
            stride_qh, stride_qn, stride_kh, stride_kn, N, heads, FUSION, SCALE, D, BLOCK_D, BLOCK_M, BLOCK_N, ACC, PRECISION, WIDE,
        )  # fmt: skip
        if threshold_ptr is not None:
            b_f = discard(b_f, threshold_ptr + i_b * N, o_m, N)
        b_r = tl.load(p_r + o_m[None, :], mask=(o_r < maps)[:, None] & (o_m < N)[None, :], other=0.0)
        m_wanted = tl.max((b_r != 0.0).to(tl.int32), 0) != 0
        b_f = tl.where(m_wanted[:, None], b_f, 0.0)  # a query without weight adds nothing, NaN neither
        if inverse_ptr is not None:
            b_r = b_r * tl.load(inverse_ptr + i_b * N + o_m, mask=m_wanted & (o_m < N), other=0.0)[None, :]
        if BLOCK_R == 1:
            acc += tl.reshape(b_r, [BLOCK_M, 1]) * b_f
        else:
            acc = tl.dot(b_r, b_f, acc, input_precision=PRECISION, out_dtype=ACC)
    if BLOCK_R == 1:
        acc = tl.sum(acc, 0)[None, :]
    o_n = first_n + tl.arange(0, BLOCK_N)
    m_out = (o_r < maps)[:, None] & (o_n < N)[None, :]
    b_own = tl.load(p_r + o_n[None, :], mask=m_out, other=0.0)
    if inverse_ptr is not None:
        b_inverse = tl.load(inverse_ptr + i_b * N + o_n, mask=o_n < N, other=0.0)[None, :]
        b_own = tl.where(b_own == 0.0, 0.0, b_own * b_inverse)
    p_out = out_ptr + (i_b * maps + o_r.to(tl.int64)[:, None]) * N + o_n[None, :]
    store_block(p_out, (1 - RESIDUAL) * acc + RESIDUAL * b_own, m_out, True)


def blocks_of(d: int, R: int, dtype: torch.dtype) -> dict:
    """Tile sizes: a pure function of the problem. Wider heads are read in pieces of BLOCK_D, which divides d where it can."""
    half = dtype in (torch.float16, torch.bfloat16)
    block_d = max(16, triton.next_power_of_2(d))
    while block_d > (64 if half else 16 if dtype == torch.float64 else 32) or (block_d > 16 and d % block_d and d % 16 == 0):
        block_d //= 2
    m, n = (64, 32) if half else (32, 16) if dtype == torch.float64 else (32, 32)
    return {"D": d, "BLOCK_D": block_d, "BLOCK_M": m, "BLOCK_N": n, "BLOCK_R": 1 if R == 1 else 16}


def precision(dtype: torch.dtype, hip: bool = torch.version.hip is not None) -> str:
    """Of the products: three TF32 ones for float32, which AMD's gfx950 does not have."""
    return "ieee" if dtype == torch.float64 or hip else "tf32x3"


def _read_in_place(t: torch.Tensor) -> bool:
    """Whether ``head_rows`` can: channels side by side, and the tokens of a block within 32 bits."""
    return (t.stride(3) == 1 or t.shape[3] == 1) and t.stride(2) * 64 + t.shape[3] < 2**31


def launches(r, q, k, scale, head_fusion, residual, dropped, out):
    """(kernel, programs, arguments) of the passes, in order."""
    (B, h, N, d), R = q.shape, r.shape[1]
    q, k = (t if _read_in_place(t) else t.contiguous() for t in (q, k))
    strides = {f"stride_{t}{n}": s for t, tensor in (("q", q), ("k", k)) for n, s in zip("bhn", tensor.stride())}
    blocks = blocks_of(d, R, q.dtype)
    maps = {"BLOCK_R": blocks.pop("BLOCK_R"), "maps": R, "out_ptr": out, "r_ptr": r, "stride_rb": r.stride(0), "stride_rr": r.stride(1)}
    lse = torch.empty((B, h, N), dtype=r.dtype, device=r.device)
    inverse, threshold = (torch.empty((B, N), dtype=r.dtype, device=r.device) for _ in range(2))
    inverse, threshold = inverse if dropped or head_fusion != "mean" else None, threshold if dropped else None
    wide = q.dtype == torch.bfloat16 and interpreted(rollout_step_kernel)  # the interpreter has no bfloat16 products
    common = {"q_ptr": q, "k_ptr": k, "lse_ptr": lse, **strides, "N": N, "heads": h, "SCALE": scale, **blocks,
              "ACC": _tile.accumulator(q.dtype), "PRECISION": precision(r.dtype), "WIDE": wide,
              "num_stages": 2}  # fmt: skip
    if r.dtype == torch.float64 and torch.version.hip is None:
        common["maxnreg"] = 255  # unasked, ptxas gives up registers for occupancy and puts a double on the stack
    fused = {"inverse_ptr": inverse, "threshold_ptr": threshold, "RESIDUAL": residual, "FUSION": head_fusion}
    rows, columns = triton.cdiv(N, blocks["BLOCK_M"]), triton.cdiv(N, blocks["BLOCK_N"])
    sums = {"LEAST": LEAST[r.dtype], "dropped": dropped, "BELOW": BELOW, "BITS": 64 if r.dtype == torch.float64 else 32}
    passes = [(rollout_stats_kernel, B * h * rows, common)]
    if inverse is not None:
        passes.append((rollout_sums_kernel, B * rows, {**common, **fused, **sums}))
    return [*passes, (rollout_step_kernel, B * columns * triton.cdiv(R, maps["BLOCK_R"]), {**common, **fused, **maps})]


def rollout_step(r, q, k, scale, head_fusion, residual, discard_ratio, backend):
    out = torch.empty(r.shape, dtype=r.dtype, device=r.device)
    for kernel, programs, arguments in launches(r, q, k, scale, head_fusion, residual, dropped_entries(discard_ratio, r.shape[2]), out):
        _tile.launch(kernel, programs, out, arguments)
    return out


def supports(problem) -> list[str]:
    return _tile.unsupported(problem, rollout_step_kernel, 0)


registry.register("rollout_step", "triton", rollout_step, supports=supports, priority=10)

"""Weight and bias gradients of token_dwconv in Triton: one pass over dy and x, partial sums, then an ordered sum.

    dw[c, i, j] = sum_{b,r,q} dy[b, r, q, c] * x[b, r + i - K//2, q + j - K//2, c]        db[c] = sum_{b,r,q} dy[b, r, q, c]

A program keeps the K² sums of its channels in registers over many jobs (ROWS rows x SEGMENT columns of one image), with K
columns of dy in a ring, and writes one partial sum per tap. How many partial sums there are depends on the problem only,
and the second kernel adds them in a fixed order: results are the same bit for bit, run after run and on every GPU.
For K >= 9 a program takes one row of taps, so that x and dy are read K times.
"""
# ruff: noqa: RUF005  (Triton compiles no starred tuples)

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl

from lifeops import registry
from lifeops.kernels import _tile
from lifeops.kernels._activations import through
from lifeops.kernels._tile import divide, inside, load_block, per_channel, row_offset, strides
from lifeops.kernels.token_dwconv import MAX_KERNEL, segments

PROGRAMS = 768  # of the first stage, about: over one wave of 132 SMs x 4; at K 3 and C 384 the partial sums are 4 MB
SUM_ROWS = tl.constexpr(16)  # partial sums added side by side in the second stage


@triton.jit
def _add_job(acc, dy, x, m_dy, m_x, prologue, o_q, W, b_zero, K: tl.constexpr, TAP_ROWS: tl.constexpr, ROWS: tl.constexpr,
             SEGMENT: tl.constexpr, WHOLE: tl.constexpr, BIAS: tl.constexpr, ACC: tl.constexpr, ACT: tl.constexpr):  # fmt: skip
    """Add one job to the sums ``acc``: TAP_ROWS * K taps, then the bias.

    While column ``col`` of x is added, slot k of the ring is column col + k - K // 2 of dy.
    """
    HP: tl.constexpr = K // 2
    ring = (b_zero,) * (K * ROWS)
    for col in tl.static_range(-HP, SEGMENT + HP):
        ring = ring[ROWS:]
        for r in tl.static_range(ROWS):
            if col + HP < SEGMENT:
                p_dy = dy[0] + r * dy[1] + (col + HP) * dy[2]
                if WHOLE:
                    b_dy = load_block(p_dy, m_dy[r], True, ACC)
                else:
                    b_dy = load_block(p_dy, m_dy[r] & inside(o_q + (col + HP), W), True, ACC)
                ring = ring + (b_dy,)
                if BIAS:
                    acc = acc[: TAP_ROWS * K] + (acc[TAP_ROWS * K] + b_dy,)
            else:
                ring = ring + (b_zero,)
        if (not WHOLE) or (col >= 0 and col < SEGMENT):
            for j in tl.static_range(TAP_ROWS + ROWS - 1):
                p_x = x[0] + j * x[1] + col * x[2]
                m = m_x[j]
                if not WHOLE:
                    m = m & inside(o_q + col, W)
                b_x = load_block(p_x, m, True, ACC)
                if ACT != "":
                    b_x = tl.where(m, through(b_x, prologue[0], prologue[1], ACT), 0.0)
                new = ()
                for i in tl.static_range(TAP_ROWS):
                    for s in tl.static_range(K):
                        if j >= i and j < i + ROWS and col + HP >= s and col + HP < s + SEGMENT:
                            new = new + (tl.fma(b_x, ring[(K - 1 - s) * ROWS + j - i], acc[i * K + s]),)
                        else:
                            new = new + (acc[i * K + s],)
                acc = new + acc[TAP_ROWS * K :]
    return acc


@triton.jit(do_not_specialize=["B", "H", "W", "x_prefix", "dy_prefix", "iterations",
                               "stride_dyb", "stride_dyn", "stride_xb", "stride_xn"])  # fmt: skip
def token_dwconv_bwd_dw_kernel(
    dy_ptr, x_ptr, scale_ptr, shift_ptr, partial_ptr,
    B, H, W, x_prefix, dy_prefix, iterations, stride_dyb, stride_dyn, stride_xb, stride_xn,
    C: tl.constexpr, K: tl.constexpr, TAP_ROWS: tl.constexpr, ROWS: tl.constexpr, BIAS: tl.constexpr,
    SEGMENT: tl.constexpr, WHOLE: tl.constexpr, DY_STRIDE_N: tl.constexpr, X_STRIDE_N: tl.constexpr,
    ALIGN: tl.constexpr, ACC: tl.constexpr, ACT: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Partial sums (parts, K² + BIAS, C) over ``iterations`` tiles of BLOCK_R jobs each. ACT: prologue of x, "" for none."""
    BLOCKS_C: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    GROUPS: tl.constexpr = K // TAP_ROWS
    SUMS: tl.constexpr = TAP_ROWS * K + BIAS
    HP: tl.constexpr = K // 2
    o_c = ((tl.program_id(0) % BLOCKS_C) * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    m_c = o_c < C
    i_tap = (tl.program_id(0) // BLOCKS_C) % GROUPS * TAP_ROWS
    i_part = tl.program_id(0) // (BLOCKS_C * GROUPS)
    stride_dyb, dy_col = strides(stride_dyb, stride_dyn, DY_STRIDE_N, ALIGN)
    stride_xb, x_col = strides(stride_xb, stride_xn, X_STRIDE_N, ALIGN)
    strips = (H + ROWS - 1) // ROWS
    jobs = B * strips
    b_zero = tl.zeros([BLOCK_R, BLOCK_C], dtype=ACC)
    acc = (b_zero,) * SUMS
    prologue = (per_channel(scale_ptr, o_c, m_c, 1.0, ACC), per_channel(shift_ptr, o_c, m_c, 0.0, ACC))
    for i in range(iterations):
        i_tile = i_part * iterations + i
        o_q = tl.zeros([BLOCK_R], dtype=tl.int32)
        if not WHOLE:
            i_tile, i_segment = divide(i_tile, (W + SEGMENT - 1) // SEGMENT)
            o_q += i_segment * SEGMENT
        o_job = i_tile * BLOCK_R + tl.arange(0, BLOCK_R)
        m_job = inside(o_job, jobs)
        if C % BLOCK_C != 0:
            m_job = m_job & m_c
        o_b, o_r = divide(tl.minimum(o_job, jobs - 1), strips)
        o_r = o_r * ROWS
        m_dy = ()
        for r in tl.static_range(ROWS):
            m_dy = m_dy + (inside(o_r + r, H) & m_job,)
        m_x = ()
        for j in tl.static_range(TAP_ROWS + ROWS - 1):
            m_x = m_x + (inside(o_r + i_tap + (j - HP), H) & m_job,)
        o_dy = row_offset(o_b, dy_prefix + o_r * W + o_q, stride_dyb, dy_col)
        o_x = row_offset(o_b, x_prefix + (o_r + i_tap - HP) * W + o_q, stride_xb, x_col)
        dy = (dy_ptr + (o_dy[:, None] + o_c), W.to(tl.int64) * dy_col, dy_col)
        x = (x_ptr + (o_x[:, None] + o_c), W.to(tl.int64) * x_col, x_col)
        acc = _add_job(acc, dy, x, m_dy, m_x, prologue, o_q, W, b_zero, K, TAP_ROWS, ROWS, SEGMENT, WHOLE, BIAS, ACC, ACT)
    o_c = tl.reshape(o_c, [BLOCK_C])
    p_sum = partial_ptr + (i_part * (K * K + BIAS) + i_tap * K) * C + o_c
    for t in tl.static_range(TAP_ROWS * K):
        tl.store(p_sum + t * C, tl.sum(acc[t], 0), mask=o_c < C)
    if BIAS:
        if i_tap == 0:
            tl.store(p_sum + K * K * C, tl.sum(acc[TAP_ROWS * K], 0), mask=o_c < C)


@triton.jit(do_not_specialize=["B", "patches", "dy_prefix", "iterations", "stride_dyb", "stride_dyn"])
def token_dwconv_bwd_db_kernel(
    dy_ptr, partial_ptr, B, patches, dy_prefix, iterations, stride_dyb, stride_dyn,
    C: tl.constexpr, DY_STRIDE_N: tl.constexpr, ALIGN: tl.constexpr, ACC: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Partial sums (parts, 1, C) over ``iterations`` tiles of BLOCK_R patch rows each."""
    BLOCKS_C: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    o_c = ((tl.program_id(0) % BLOCKS_C) * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    i_part = tl.program_id(0) // BLOCKS_C
    stride_dyb, dy_col = strides(stride_dyb, stride_dyn, DY_STRIDE_N, ALIGN)
    b_sum = tl.zeros([BLOCK_R, BLOCK_C], dtype=ACC)
    for i in range(iterations):
        o_row = (i_part * iterations + i) * BLOCK_R + tl.arange(0, BLOCK_R)
        o_b, o_n = divide(o_row, patches)
        o_dy = row_offset(o_b, dy_prefix + o_n, stride_dyb, dy_col)
        b_sum += load_block(dy_ptr + (o_dy[:, None] + o_c), inside(o_b, B) & (o_c < C), True, ACC)
    o_c = tl.reshape(o_c, [BLOCK_C])
    tl.store(partial_ptr + i_part * C + o_c, tl.sum(b_sum, 0), mask=o_c < C)


@triton.jit(do_not_specialize=["parts"])
def token_dwconv_sum_kernel(partial_ptr, dw_ptr, db_ptr, parts,
                            C: tl.constexpr, TAPS: tl.constexpr, SUMS: tl.constexpr, ACC: tl.constexpr,
                            BLOCK_C: tl.constexpr):  # fmt: skip
    """Add the partial sums (parts, SUMS, C), in order, into dw (C, TAPS) and, behind the taps, db (C,)."""
    BLOCKS_C: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    o_c = (tl.program_id(0) % BLOCKS_C) * BLOCK_C + tl.arange(0, BLOCK_C)
    i_sum = tl.program_id(0) // BLOCKS_C
    b_sum = tl.zeros([SUM_ROWS, BLOCK_C], dtype=ACC)
    for i in range(0, parts, SUM_ROWS):
        o_part = i + tl.arange(0, SUM_ROWS)
        p = partial_ptr + (o_part[:, None] * SUMS + i_sum) * C + o_c[None, :]
        b_sum += tl.load(p, mask=inside(o_part, parts) & (o_c < C)[None, :], other=0.0)
    b_total = tl.sum(b_sum, 0)
    if TAPS > 0:
        if i_sum < TAPS:
            tl.store(dw_ptr + o_c * TAPS + i_sum, b_total.to(dw_ptr.dtype.element_ty), mask=o_c < C)
    if SUMS > TAPS:
        if i_sum == TAPS:
            tl.store(db_ptr + o_c, b_total.to(db_ptr.dtype.element_ty), mask=o_c < C)


@dataclass(frozen=True)
class Config:
    """Constants a kernel is compiled with, for one shape class; chosen by a pure function, never by timing."""

    TAP_ROWS: int
    ROWS: int
    SEGMENT: int
    WHOLE: bool
    BLOCK_R: int
    BLOCK_C: int


@lru_cache(4096)
def grad_config(H: int, W: int, C: int, K: int, dtype: torch.dtype) -> Config:
    """Two channels per lane also at K 3: all loads of a job are issued first, and four took 243 registers instead of 128
    for 1 instruction per element less, in a kernel that has 27 to spend. At K 7 one row per job for the same reason.
    """
    channels = min(2, _tile.channels_per_lane(K, dtype))
    block_c = _tile.block_of_channels(C, 32 * channels)
    rows = 2 if K <= 5 else 1
    return Config(K if K <= 7 else 1, rows, *segments(H, W, K), _tile.WARPS * 32 * channels // block_c, block_c)


def split(tiles: int, programs_each: int) -> tuple[int, int]:
    """(parts, iterations): ``tiles`` over as many parts as make about PROGRAMS programs. Depends on the problem only."""
    iterations = -(-tiles // max(1, PROGRAMS // programs_each))
    return -(-tiles // iterations), iterations


def grad_launch(dy, x, K, H, W, dy_prefix, x_prefix, with_bias, scale=None, shift=None, act=""):
    """(number of programs, arguments) of ``token_dwconv_bwd_dw_kernel``, its partial sums among them."""
    B, _, C = x.shape
    config = grad_config(H, W, C, K, x.dtype)
    tiles = -(-B * -(-H // config.ROWS) // config.BLOCK_R) * -(-W // config.SEGMENT)
    programs_each = -(-C // config.BLOCK_C) * (K // config.TAP_ROWS)
    parts, iterations = split(tiles, programs_each)
    partial = partial_sums(parts, K * K + with_bias, x)
    align = _tile.alignment(C, *dy.stride()[:2], *x.stride()[:2])
    arguments = dict(
        dy_ptr=dy, x_ptr=x, scale_ptr=scale, shift_ptr=shift, partial_ptr=partial,
        B=B, H=H, W=W, x_prefix=x_prefix, dy_prefix=dy_prefix, iterations=iterations,
        stride_dyb=dy.stride(0) // align, stride_dyn=dy.stride(1) // align,
        stride_xb=x.stride(0) // align, stride_xn=x.stride(1) // align,
        C=C, K=K, BIAS=int(with_bias), DY_STRIDE_N=_tile.common_stride(dy.stride(1), C), X_STRIDE_N=_tile.common_stride(x.stride(1), C),
        ALIGN=align, ACC=_tile.accumulator(x.dtype), ACT=act, **vars(config),
    )  # fmt: skip
    return parts * programs_each, arguments


def partial_sums(parts: int, sums: int, like: torch.Tensor) -> torch.Tensor:
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    return torch.empty((parts, sums, like.shape[2]), dtype=dtype, device=like.device)


def finish(partial, dw, db):
    """Second stage: dw and db (either may be None) from the partial sums."""
    parts, sums, C = partial.shape
    taps = sums - (db is not None)
    block_c = _tile.block_of_channels(C, 128)
    arguments = dict(partial_ptr=partial, dw_ptr=dw, db_ptr=db, parts=parts, C=C, TAPS=taps, SUMS=sums,
                     ACC=_tile.accumulator(partial.dtype), BLOCK_C=block_c)  # fmt: skip
    _tile.launch(token_dwconv_sum_kernel, -(-C // block_c) * sums, partial, arguments)


def grad_weight(dy, x, K, H, W, P, prefix, weight_dtype, bias_dtype, *prologue):
    C, with_bias = x.shape[2], bias_dtype is not None
    dw = torch.empty((C, 1, K, K), dtype=weight_dtype, device=x.device)
    db = torch.empty((C,), dtype=bias_dtype, device=x.device) if with_bias else None
    programs, arguments = grad_launch(dy, x, K, H, W, 0 if prefix == "drop" else P, P, with_bias, *prologue)
    _tile.launch(token_dwconv_bwd_dw_kernel, programs, x, arguments)
    finish(arguments["partial_ptr"], dw, db)
    return dw, x.new_empty((0,)) if db is None else db


def token_dwconv_bwd_dw(dy, x, K, H, W, P, prefix, weight_dtype, bias_dtype, backend):
    return grad_weight(dy, x, K, H, W, P, prefix, weight_dtype, bias_dtype)


def token_dwconv_bwd_db(dy, H, W, P, prefix, bias_dtype, backend):
    B, _, C = dy.shape
    block_c = _tile.block_of_channels(C, 128)
    block_r = 4096 // block_c  # 32 values per thread: enough loads in flight for a plain sum
    blocks_c, tiles = -(-C // block_c), -(-B * H * W // block_r)
    parts, iterations = split(tiles, blocks_c)
    partial = partial_sums(parts, 1, dy)
    align = _tile.alignment(C, *dy.stride()[:2])
    arguments = dict(
        dy_ptr=dy, partial_ptr=partial, B=B, patches=H * W, dy_prefix=0 if prefix == "drop" else P, iterations=iterations,
        stride_dyb=dy.stride(0) // align, stride_dyn=dy.stride(1) // align, C=C, DY_STRIDE_N=_tile.common_stride(dy.stride(1), C),
        ALIGN=align, ACC=_tile.accumulator(dy.dtype), BLOCK_R=block_r, BLOCK_C=block_c,
    )  # fmt: skip
    _tile.launch(token_dwconv_bwd_db_kernel, parts * blocks_c, dy, arguments)
    db = torch.empty((C,), dtype=bias_dtype, device=dy.device)
    finish(partial, None, db)
    return db


def supports(problem) -> list[str]:
    return _tile.unsupported(problem, token_dwconv_bwd_dw_kernel, MAX_KERNEL)


registry.register("token_dwconv_bwd_dw", "triton", token_dwconv_bwd_dw, supports=supports, priority=10)
registry.register("token_dwconv_bwd_db", "triton", token_dwconv_bwd_db, supports=supports, priority=10)

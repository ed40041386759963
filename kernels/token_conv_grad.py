"""Weight and bias gradients of the strided token convolution in Triton: one pass over dy and x, partial sums, then an ordered sum.

    dw[c*M + j, i, k] = sum_{b,r,q} dy[b, r, q, c*M + j] * x[b, r*SH + i - ph, q*SW + k - pw, c]        db[o] = sum_{b,r,q} dy[b, r, q, o]

A program keeps the sums of its channels in registers over many jobs, a job being SEGMENT outputs of a row: their dy, and every column of
x that they see, for one row of taps after the other. Of kernels with more than 25 taps it takes one row, so that x and dy are read KH
times. The second stage is that of token_dwconv: how many partial sums there are, and their order, depends on the problem only.
"""
# ruff: noqa: RUF005  (Triton compiles no starred tuples)

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl

from lifeops import registry
from lifeops.geometry import filtered_grid
from lifeops.kernels import _tile
from lifeops.kernels._tile import divide, inside, load_block, row_mask, row_offset, strides
from lifeops.kernels.token_conv import MAX_KERNEL, add_product, load_spread, spread
from lifeops.kernels.token_dwconv_grad import finish, partial_sums, split

SUMS = 25  # taps whose sums a program holds: with two channels per lane 50 registers


@triton.jit
def _add_row(acc, dy, p_x, x_col, m_row, o_first, W, first: tl.constexpr, KW: tl.constexpr, SW: tl.constexpr, SEGMENT: tl.constexpr,
             SPREAD: tl.constexpr, ACC: tl.constexpr):  # fmt: skip
    """acc[first + k] += sum_q dy[q] * x[q*SW + k]; ``o_first`` is the grid's column of x[0]."""
    for col in tl.static_range((SEGMENT - 1) * SW + KW):
        if col % SW < KW:
            b_x = load_spread(p_x + col * x_col, m_row & inside(o_first + col, W), SPREAD, ACC)
            for k in tl.static_range(KW):
                if (col - k) % SW == 0 and col >= k and col - k < SEGMENT * SW:
                    acc = add_product(acc, first + k, b_x, dy[(col - k) // SW])
    return acc


@triton.jit(do_not_specialize=["B", "H", "W", "rows", "columns", "ph", "pw", "x_prefix", "dy_prefix", "iterations",
                               "stride_dyb", "stride_dyn", "stride_xb", "stride_xn"])  # fmt: skip
def token_dwconv_strided_bwd_dw_kernel(
    dy_ptr, x_ptr, partial_ptr,
    B, H, W, rows, columns, ph, pw, x_prefix, dy_prefix, iterations, stride_dyb, stride_dyn, stride_xb, stride_xn,
    C: tl.constexpr, M: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    TAP_ROWS: tl.constexpr, BIAS: tl.constexpr, SEGMENT: tl.constexpr, SPREAD: tl.constexpr, DY_STRIDE_N: tl.constexpr,
    X_STRIDE_N: tl.constexpr, ALIGN: tl.constexpr, ACC: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Partial sums (parts, KH*KW + BIAS, C*M) over ``iterations`` tiles of BLOCK_R jobs each."""
    OUT: tl.constexpr = C * M
    BLOCKS_C: tl.constexpr = (OUT + BLOCK_C - 1) // BLOCK_C
    GROUPS: tl.constexpr = KH // TAP_ROWS
    TAPS: tl.constexpr = TAP_ROWS * KW
    o_c = ((tl.program_id(0) % BLOCKS_C) * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    o_in = ((tl.program_id(0) % BLOCKS_C) * (BLOCK_C >> SPREAD) + tl.arange(0, BLOCK_C >> SPREAD))[None, :]
    m_in = o_in < OUT >> SPREAD
    o_in = o_in // (M >> SPREAD)
    i_tap = (tl.program_id(0) // BLOCKS_C) % GROUPS * TAP_ROWS
    i_part = tl.program_id(0) // (BLOCKS_C * GROUPS)
    stride_dyb, dy_col = strides(stride_dyb, stride_dyn, DY_STRIDE_N, ALIGN)
    stride_xb, x_col = strides(stride_xb, stride_xn, X_STRIDE_N, ALIGN)
    x_row = W.to(tl.int64) * x_col
    acc = (tl.zeros([BLOCK_R, BLOCK_C], dtype=ACC),) * (TAPS + BIAS)
    for i in range(iterations):
        i_tile, i_cut = divide(i_part * iterations + i, (columns + SEGMENT - 1) // SEGMENT)
        o_q = tl.zeros([BLOCK_R], dtype=tl.int32) + i_cut * SEGMENT
        o_job = i_tile * BLOCK_R + tl.arange(0, BLOCK_R)
        m_dy = row_mask(o_job, B * rows, o_c < OUT, OUT % BLOCK_C != 0)
        m_x = row_mask(o_job, B * rows, m_in, OUT % BLOCK_C != 0)
        o_b, o_r = divide(tl.minimum(o_job, B * rows - 1), rows)
        o_row = o_r * SH - ph + i_tap
        o_first = o_q * SW - pw
        p_dy = dy_ptr + (row_offset(o_b, dy_prefix + o_r * columns + o_q, stride_dyb, dy_col)[:, None] + o_c)
        p_x = x_ptr + (row_offset(o_b, x_prefix + o_row * W + o_first, stride_xb, x_col)[:, None] + o_in)
        dy = ()
        for q in tl.static_range(SEGMENT):
            dy = dy + (load_block(p_dy + q * dy_col, m_dy & inside(o_q + q, columns), True, ACC),)
            if BIAS:
                acc = acc[:TAPS] + (acc[TAPS] + dy[q],)
        for r in tl.static_range(TAP_ROWS):
            acc = _add_row(acc, dy, p_x + r * x_row, x_col, inside(o_row + r, H) & m_x, o_first, W, r * KW, KW, SW, SEGMENT,
                           SPREAD, ACC)  # fmt: skip
    o_c = tl.reshape(o_c, [BLOCK_C])
    p_sum = partial_ptr + (i_part * (KH * KW + BIAS) + i_tap * KW) * OUT + o_c
    for t in tl.static_range(TAPS):
        tl.store(p_sum + t * OUT, tl.sum(acc[t], 0), mask=o_c < OUT)
    if BIAS:
        if i_tap == 0:
            tl.store(p_sum + KH * KW * OUT, tl.sum(acc[TAPS], 0), mask=o_c < OUT)


@dataclass(frozen=True)
class Config:
    """Constants a kernel is compiled with, for one shape class; chosen by a pure function, never by timing."""

    TAP_ROWS: int
    SEGMENT: int
    BLOCK_R: int
    BLOCK_C: int


@lru_cache(4096)
def grad_config(channels: int, KH: int, KW: int, dtype: torch.dtype) -> Config:
    """Two channels per lane and segments of 8 leave the loads of a whole job in registers. ``channels`` are those of dy."""
    each = min(2, _tile.channels_per_lane(max(KH, KW), dtype))
    block_c = _tile.block_of_channels(channels, 32 * each)
    return Config(KH if KH * KW <= SUMS else 1, 8, _tile.WARPS * 32 * each // block_c, block_c)


def grad_launch(dy, x, KH, KW, H, W, rows, columns, dy_prefix, x_prefix, stride, padding, with_bias):
    """(number of programs, arguments) of ``token_dwconv_strided_bwd_dw_kernel``, its partial sums among them."""
    (B, _, C), OUT = x.shape, dy.shape[2]
    config = grad_config(OUT, KH, KW, x.dtype)
    tiles = -(-B * rows // config.BLOCK_R) * -(-columns // config.SEGMENT)
    programs_each = -(-OUT // config.BLOCK_C) * (KH // config.TAP_ROWS)
    parts, iterations = split(tiles, programs_each)
    align = _tile.alignment(C, OUT, *dy.stride()[:2], *x.stride()[:2])
    arguments = dict(
        dy_ptr=dy, x_ptr=x, partial_ptr=partial_sums(parts, KH * KW + with_bias, dy), B=B, H=H, W=W, rows=rows, columns=columns,
        ph=padding[0], pw=padding[1], x_prefix=x_prefix, dy_prefix=dy_prefix, iterations=iterations,
        stride_dyb=dy.stride(0) // align, stride_dyn=dy.stride(1) // align, stride_xb=x.stride(0) // align, stride_xn=x.stride(1) // align,
        C=C, M=OUT // C, SPREAD=spread(OUT // C), KH=KH, KW=KW, SH=stride[0], SW=stride[1], BIAS=int(with_bias),
        DY_STRIDE_N=_tile.common_stride(dy.stride(1), OUT), X_STRIDE_N=_tile.common_stride(x.stride(1), C),
        ALIGN=align, ACC=_tile.accumulator(x.dtype), **vars(config),
    )  # fmt: skip
    return parts * programs_each, arguments


def token_dwconv_strided_bwd_dw(dy, x, Kh, Kw, H, W, P, sh, sw, ph, pw, prefix, weight_dtype, bias_dtype, backend):
    channels, with_bias = dy.shape[2], bias_dtype is not None
    rows, columns = filtered_grid("token_dwconv_strided_bwd_dw", H, W, (Kh, Kw), (sh, sw), (ph, pw))
    dw = torch.empty((channels, 1, Kh, Kw), dtype=weight_dtype, device=x.device)
    db = torch.empty((channels,), dtype=bias_dtype, device=x.device) if with_bias else None
    place = H, W, rows, columns, 0 if prefix == "drop" else P, P, (sh, sw), (ph, pw), with_bias
    programs, arguments = grad_launch(dy, x, Kh, Kw, *place)
    _tile.launch(token_dwconv_strided_bwd_dw_kernel, programs, x, arguments)
    finish(arguments["partial_ptr"], dw, db)
    return dw, x.new_empty((0,)) if db is None else db


def supports(problem) -> list[str]:
    return _tile.unsupported(problem, token_dwconv_strided_bwd_dw_kernel) + _tile.too_large((problem.Kh, problem.Kw), MAX_KERNEL)


registry.register("token_dwconv_strided_bwd_dw", "triton", token_dwconv_strided_bwd_dw, supports=supports, priority=10)

"""The general token convolution in Triton: strided forward, and its adjoint as a gather.

    strided     y[r, q, c*M + j] = bias[c*M + j] + sum_{i,k} w[c*M + j, i, k] * x[r*SH + i - ph, q*SW + k - pw, c]
    transpose   dx[r, q, c] = bias[c] + sum_j sum_{t,s} w[c*M + j, f + SH*t, g + SW*s] * dy[u - t, v - s, c*M + j],
                with r + ph = u*SH + f and q + pw = v*SW + g: a phase (f, g) has the taps f, f + SH, ... of each axis

A program owns BLOCK_R jobs x BLOCK_C channels of the result. A job of the forward pass is SEGMENT outputs of a row; one of the adjoint
is one phase of rows, SEGMENT cells of SW columns each. Rows of taps are met in turn, every input column is loaded once for a row of taps
and added wherever it belongs. Where it lies outside the grid it is zero, and so is the tap that a phase does not have.

Compiled variants depend on C, M, the kernel size, the strides, dtypes and SEGMENT, never on B, H, W or the padding.
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
from lifeops.kernels._tile import divide, inside, load_block, prefix_rows, row_mask, row_offset, store_block, strides

MAX_KERNEL = 15
LOADS = 180  # of x in a job of the forward pass: the time to compile grows with their square
HELD = tl.constexpr(25)  # taps that a program keeps in registers
UNROLLED = tl.constexpr(4)  # rows of taps of a phase: a loop over more of them keeps code and registers as small as with one


@triton.jit
def _taps(p_w, m, KW: tl.constexpr, ACC: tl.constexpr):
    """A row of taps of every channel, a tuple of (1, BLOCK_C)."""
    taps = ()
    for k in tl.static_range(KW):
        taps = taps + (load_block(p_w + k, m, True, ACC),)
    return taps


@triton.jit
def add_product(acc, at: tl.constexpr, b_a, b_b):
    """The tuple ``acc`` with ``b_a * b_b`` added to entry ``at``."""
    return acc[:at] + (tl.fma(b_a, b_b, acc[at]),) + acc[at + 1 :]


@triton.jit
def load_spread(p, m, SPREAD: tl.constexpr, ACC: tl.constexpr):
    """A block in which every channel of memory stands 2**SPREAD times: doubled in registers, where a gather would load it again."""
    b = load_block(p, m, True, ACC)
    for _ in tl.static_range(SPREAD):
        b = tl.interleave(b, b)
    return b


@triton.jit
def _store_column(acc, y, m_y, o_q, q: tl.constexpr, columns, ROWS: tl.constexpr, SEGMENT: tl.constexpr):
    for r in tl.static_range(ROWS):
        store_block(y[0] + r * y[1] + q * y[2], acc[r * SEGMENT + q], m_y[r] & inside(o_q + q, columns), True)


@triton.jit
def _strided_window(x, p_w, y, b_bias, o_row, o_first, H, W, o_r, o_q, rows, columns, m_c, m_in, KH: tl.constexpr, KW: tl.constexpr,
                    SH: tl.constexpr, SW: tl.constexpr, ROWS: tl.constexpr, SEGMENT: tl.constexpr, SPREAD: tl.constexpr,
                    TAIL: tl.constexpr, ACC: tl.constexpr):  # fmt: skip
    """All taps are held; an output is stored when its last column has been added."""
    taps = _taps(p_w, m_c, KH * KW, ACC)
    m_rows, m_y = (), ()
    for j in tl.static_range((ROWS - 1) * SH + KH):
        m_rows = m_rows + (row_mask(o_row + j, H, m_in, TAIL),)
    for r in tl.static_range(ROWS):
        m_y = m_y + (row_mask(o_r + r, rows, m_c, TAIL),)
    acc = (b_bias,) * (ROWS * SEGMENT)
    for col in tl.static_range((SEGMENT - 1) * SW + KW):
        if col % SW < KW:
            m_col = inside(o_first + col, W)
            for j in tl.static_range((ROWS - 1) * SH + KH):
                if j % SH < KH:
                    b_x = load_spread(x[0] + j * x[1] + col * x[2], m_rows[j] & m_col, SPREAD, ACC)
                    for r in tl.static_range(ROWS):
                        if j >= r * SH and j < r * SH + KH:
                            for k in tl.static_range(KW):
                                if (col - k) % SW == 0 and col >= k and col - k < SEGMENT * SW:
                                    acc = add_product(acc, r * SEGMENT + (col - k) // SW, b_x, taps[(j - r * SH) * KW + k])
            if (col - KW + 1) % SW == 0 and col >= KW - 1:
                _store_column(acc, y, m_y, o_q, (col - KW + 1) // SW, columns, ROWS, SEGMENT)


@triton.jit
def _strided_row(acc, p_x, x_col, m_row, o_first, W, taps, KW: tl.constexpr, SW: tl.constexpr, SEGMENT: tl.constexpr,
                 SPREAD: tl.constexpr, ACC: tl.constexpr):  # fmt: skip
    """acc[q] += sum_k taps[k] * x[q*SW + k]; ``o_first`` is the grid's column of x[0]."""
    for col in tl.static_range((SEGMENT - 1) * SW + KW):
        if col % SW < KW:
            b_x = load_spread(p_x + col * x_col, m_row & inside(o_first + col, W), SPREAD, ACC)
            for k in tl.static_range(KW):
                if (col - k) % SW == 0 and col >= k and col - k < SEGMENT * SW:
                    acc = add_product(acc, (col - k) // SW, b_x, taps[k])
    return acc


@triton.jit
def _strided_rows(x, p_w, y, b_bias, o_row, o_first, H, W, o_r, o_q, rows, columns, m_c, m_in, KH: tl.constexpr, KW: tl.constexpr,
                  SW: tl.constexpr, SEGMENT: tl.constexpr, SPREAD: tl.constexpr, TAIL: tl.constexpr, ACC: tl.constexpr):  # fmt: skip
    """One row of outputs and of taps at a time."""
    acc = (b_bias,) * SEGMENT
    p_x = x[0]
    for i in tl.range(KH):
        taps = _taps(p_w + i * KW, m_c, KW, ACC)
        acc = _strided_row(acc, p_x, x[2], row_mask(o_row + i, H, m_in, TAIL), o_first, W, taps, KW, SW, SEGMENT, SPREAD, ACC)
        p_x += x[1]
    m_y = row_mask(o_r, rows, m_c, TAIL)
    for q in tl.static_range(SEGMENT):
        store_block(y[0] + q * y[2], acc[q], m_y & inside(o_q + q, columns), True)


@triton.jit(do_not_specialize=["B", "H", "W", "rows", "columns", "ph", "pw", "x_prefix", "y_prefix", "copied", "conv_tiles",
                               "stride_xb", "stride_xn"])  # fmt: skip
def token_dwconv_strided_kernel(
    x_ptr, weight_ptr, bias_ptr, y_ptr,
    B, H, W, rows, columns, ph, pw, x_prefix, y_prefix, copied, conv_tiles, stride_xb, stride_xn,
    C: tl.constexpr, M: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    ROWS: tl.constexpr, SEGMENT: tl.constexpr, SPREAD: tl.constexpr, X_STRIDE_N: tl.constexpr, ALIGN: tl.constexpr, ACC: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """y (B, y_prefix + rows*columns, C*M) of one tile from x on an H x W grid; tiles from ``conv_tiles`` on write the prefix rows of
    BLOCK_R images, those of x for the first ``copied`` images (all or none) and zero for the others. Strides come in units of ALIGN.
    """
    OUT: tl.constexpr = C * M
    BLOCKS_C: tl.constexpr = (OUT + BLOCK_C - 1) // BLOCK_C
    TAIL: tl.constexpr = OUT % BLOCK_C != 0
    i_tile = tl.program_id(0) // BLOCKS_C
    o_c = ((tl.program_id(0) % BLOCKS_C) * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    m_c = o_c < OUT
    o_in = ((tl.program_id(0) % BLOCKS_C) * (BLOCK_C >> SPREAD) + tl.arange(0, BLOCK_C >> SPREAD))[None, :]
    m_in = o_in < OUT >> SPREAD
    o_in = o_in // (M >> SPREAD)
    stride_xb, x_col = strides(stride_xb, stride_xn, X_STRIDE_N, ALIGN)
    stride_yb = (y_prefix + rows * columns).to(tl.int64) * OUT
    if i_tile >= conv_tiles:
        o_b = (i_tile - conv_tiles) * BLOCK_R + tl.arange(0, BLOCK_R)
        p_x = x_ptr + ((o_b.to(tl.int64) * stride_xb)[:, None] + o_c)
        p_y = y_ptr + ((o_b.to(tl.int64) * stride_yb)[:, None] + o_c)
        prefix_rows(p_x, None, p_y, row_mask(o_b, copied, m_c, TAIL), row_mask(o_b, B, m_c, TAIL), y_prefix, x_col, 0, OUT, ACC)
    else:
        i_tile, i_cut = divide(i_tile, (columns + SEGMENT - 1) // SEGMENT)
        o_q = tl.zeros([BLOCK_R], dtype=tl.int32) + i_cut * SEGMENT
        # The last tile repeats its last job rather than mask what is left over.
        jobs = (rows + ROWS - 1) // ROWS
        o_b, o_r = divide(tl.minimum(i_tile * BLOCK_R + tl.arange(0, BLOCK_R), B * jobs - 1), jobs)
        o_r *= ROWS
        o_row = o_r * SH - ph
        o_first = o_q * SW - pw
        o_x = row_offset(o_b, x_prefix + o_row * W + o_first, stride_xb, x_col)
        x = (x_ptr + (o_x[:, None] + o_in), W.to(tl.int64) * x_col, x_col)
        y = (y_ptr + (row_offset(o_b, y_prefix + o_r * columns + o_q, stride_yb, OUT)[:, None] + o_c), columns.to(tl.int64) * OUT, OUT)
        b_bias = tl.zeros([BLOCK_R, BLOCK_C], dtype=ACC)
        if bias_ptr is not None:
            b_bias += load_block(bias_ptr + o_c, m_c, TAIL, ACC)
        p_w = weight_ptr + o_c * (KH * KW)
        if KH * KW <= HELD:
            _strided_window(x, p_w, y, b_bias, o_row, o_first, H, W, o_r, o_q, rows, columns, m_c, m_in, KH, KW, SH, SW, ROWS, SEGMENT,
                            SPREAD, TAIL, ACC)  # fmt: skip
        else:
            _strided_rows(x, p_w, y, b_bias, o_row, o_first, H, W, o_r, o_q, rows, columns, m_c, m_in, KH, KW, SW, SEGMENT, SPREAD, TAIL,
                          ACC)  # fmt: skip


@triton.jit
def _transpose_row(acc, p_x, x_col, m_row, o_cell, columns, taps, KW: tl.constexpr, SW: tl.constexpr, SEGMENT: tl.constexpr,
                   ACC: tl.constexpr):  # fmt: skip
    """acc[v*SW + g] += sum_s taps[g + SW*s] * dy[v - s], v counted from ``o_cell``; p_x points at column v = 0."""
    REACH: tl.constexpr = (KW - 1) // SW
    for col in tl.static_range(-REACH, SEGMENT):
        b_x = load_block(p_x + col * x_col, m_row & inside(o_cell + col, columns), True, ACC)
        for k in tl.static_range(KW):
            if col + k // SW >= 0 and col + k // SW < SEGMENT:
                acc = add_product(acc, (col + k // SW) * SW + k % SW, b_x, taps[k])
    return acc


@triton.jit(do_not_specialize=["B", "H", "W", "rows", "columns", "ph", "pw", "x_prefix", "y_prefix", "copied", "conv_tiles", "cells",
                               "cuts", "stride_xb", "stride_xn"])  # fmt: skip
def token_dwconv_transpose_kernel(
    x_ptr, weight_ptr, bias_ptr, y_ptr,
    B, H, W, rows, columns, ph, pw, x_prefix, y_prefix, copied, conv_tiles, cells, cuts, stride_xb, stride_xn,
    C: tl.constexpr, M: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    SEGMENT: tl.constexpr, X_STRIDE_N: tl.constexpr, ALIGN: tl.constexpr, ACC: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """y (B, y_prefix + H*W, C) of one tile from x on the coarse grid, rows x columns and C*M channels; prefix rows as above.

    ``cells`` is how many rows of cells (u above) an image has, ``cuts`` how many segments a row of them.
    """
    BLOCKS_C: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    TAIL: tl.constexpr = C % BLOCK_C != 0
    STEPS: tl.constexpr = (KH + SH - 1) // SH
    i_tile = tl.program_id(0) // BLOCKS_C
    o_c = ((tl.program_id(0) % BLOCKS_C) * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    m_c = o_c < C
    stride_xb, x_col = strides(stride_xb, stride_xn, X_STRIDE_N, ALIGN)
    stride_yb = (y_prefix + H * W).to(tl.int64) * C
    if i_tile >= conv_tiles:
        o_b = (i_tile - conv_tiles) * BLOCK_R + tl.arange(0, BLOCK_R)
        p_x = x_ptr + ((o_b.to(tl.int64) * stride_xb)[:, None] + o_c)
        p_y = y_ptr + ((o_b.to(tl.int64) * stride_yb)[:, None] + o_c)
        prefix_rows(p_x, None, p_y, row_mask(o_b, copied, m_c, TAIL), row_mask(o_b, B, m_c, TAIL), y_prefix, x_col, 0, C, ACC)
    else:
        i_tile, i_cut = divide(i_tile, cuts)
        i_phase = i_tile % SH
        i_tile = i_tile // SH
        o_phase = tl.zeros([1], dtype=tl.int32) + i_phase
        o_b, o_u = divide(tl.minimum(i_tile * BLOCK_R + tl.arange(0, BLOCK_R), B * cells - 1), cells)
        o_u += ph // SH
        o_cell = tl.zeros([BLOCK_R], dtype=tl.int32) + (pw // SW + i_cut * SEGMENT)
        p_x = x_ptr + (row_offset(o_b, x_prefix + o_u * columns + o_cell, stride_xb, x_col)[:, None] + o_c * M)
        x_row = columns.to(tl.int64) * x_col
        b_bias = tl.zeros([BLOCK_R, BLOCK_C], dtype=ACC)
        if bias_ptr is not None:
            b_bias += load_block(bias_ptr + o_c, m_c, TAIL, ACC)
        acc = (b_bias,) * (SEGMENT * SW)
        p_w = weight_ptr + o_c * (M * KH * KW)
        if STEPS * M <= UNROLLED:
            for t in tl.static_range(STEPS):
                m_tap = inside(o_phase + t * SH, KH)
                for j in tl.static_range(M):
                    taps = _taps(p_w + (j * KH + i_phase + t * SH) * KW, m_c & m_tap, KW, ACC)
                    m_row = row_mask(o_u - t, rows, m_c, TAIL) & m_tap
                    acc = _transpose_row(acc, p_x + j - t * x_row, x_col, m_row, o_cell, columns, taps, KW, SW, SEGMENT, ACC)
        else:
            for t in tl.range(STEPS):
                m_tap = inside(o_phase + t * SH, KH)
                for j in tl.range(M):
                    taps = _taps(p_w + (j * KH + i_phase + t * SH) * KW, m_c & m_tap, KW, ACC)
                    m_row = row_mask(o_u - t, rows, m_c, TAIL) & m_tap
                    acc = _transpose_row(acc, p_x + j, x_col, m_row, o_cell, columns, taps, KW, SW, SEGMENT, ACC)
                p_x -= x_row
        o_r = o_u * SH + i_phase - ph
        o_q = o_cell * SW - pw
        p_y = y_ptr + (row_offset(o_b, y_prefix + o_r * W + o_q, stride_yb, C)[:, None] + o_c)
        m_y = row_mask(o_r, H, m_c, TAIL)
        for q in tl.static_range(SEGMENT * SW):
            store_block(p_y + q * C, acc[q], m_y & inside(o_q + q, W), True)


@dataclass(frozen=True)
class Config:
    """Constants a kernel is compiled with, for one shape class; chosen by a pure function, never by timing."""

    SEGMENT: int
    BLOCK_R: int
    BLOCK_C: int


@dataclass(frozen=True)
class StridedConfig(Config):
    ROWS: int  # of outputs in a job


@lru_cache(4096)
def strided_config(columns: int, channels: int, KH: int, KW: int, SH: int, SW: int, dtype: torch.dtype) -> StridedConfig:
    """``channels`` of the result, ``columns`` of its grid. Two rows of outputs where they share rows of x and all taps are held;
    of the segments whose code is not too long, the one that loads the fewest columns.
    """
    rows = 2 if KH * KW <= HELD.value and KH > SH else 1
    high = rows * min(KH, SH) + max(KH - SH, 0) if KH * KW <= HELD.value else 1

    def loads(segment):
        return segment * min(KW, SW) + max(KW - SW, 0)

    fitting = [n for n in (16, 8) if high * loads(n) <= LOADS] or [4]
    segment = min(fitting, key=lambda n: -(-columns // n) * loads(n))
    each = _tile.channels_per_lane(max(KH, KW), dtype)
    block_c = _tile.block_of_channels(channels, 32 * each)
    return StridedConfig(segment, _tile.WARPS * 32 * each // block_c, block_c, rows)


@lru_cache(4096)
def transpose_config(channels: int, M: int, KH: int, KW: int, SW: int, dtype: torch.dtype) -> Config:
    """Segments of about 16 outputs, whole cells. Channels of x that are M apart come one by one: with four per lane they spill."""
    each = min(4 if M == 1 else 2, _tile.channels_per_lane(max(KH, KW), dtype))
    block_c = _tile.block_of_channels(channels, 32 * each)
    return Config(max(1, 16 // SW), _tile.WARPS * 32 * each // block_c, block_c)


def spread(m: int) -> int:
    """How often a program doubles the channels that it loads, for a channel multiplier m; what is left of m is gathered."""
    return 2 if m % 4 == 0 else 1 if m % 2 == 0 else 0


def _tensors(x, weight, bias, y, align):
    return dict(
        x_ptr=x, weight_ptr=weight.contiguous(), bias_ptr=_tile.contiguous(bias), y_ptr=y, B=x.shape[0],
        stride_xb=x.stride(0) // align, stride_xn=x.stride(1) // align, ALIGN=align, ACC=_tile.accumulator(x.dtype),
        X_STRIDE_N=_tile.common_stride(x.stride(1), x.shape[2]),
    )  # fmt: skip


def strided_launch(x, weight, bias, y, H, W, rows, columns, x_prefix, y_prefix, copy_prefix, stride, padding):
    """(number of programs, arguments) of ``token_dwconv_strided_kernel``."""
    (B, _, C), (KH, KW) = x.shape, weight.shape[-2:]
    config = strided_config(columns, weight.shape[0], KH, KW, *stride, x.dtype)
    conv_tiles = -(-B * -(-rows // config.ROWS) // config.BLOCK_R) * -(-columns // config.SEGMENT)
    prefix_tiles = -(-B // config.BLOCK_R) if y_prefix else 0
    arguments = dict(
        H=H, W=W, rows=rows, columns=columns, ph=padding[0], pw=padding[1], x_prefix=x_prefix, y_prefix=y_prefix,
        copied=B if copy_prefix else 0, conv_tiles=conv_tiles, C=C, M=weight.shape[0] // C, SPREAD=spread(weight.shape[0] // C),
        KH=KH, KW=KW, SH=stride[0], SW=stride[1],
        **_tensors(x, weight, bias, y, _tile.alignment(C, *x.stride()[:2])), **vars(config),
    )  # fmt: skip
    return (conv_tiles + prefix_tiles) * -(-weight.shape[0] // config.BLOCK_C), arguments


def transpose_launch(x, weight, bias, y, H, W, rows, columns, x_prefix, y_prefix, copy_prefix, stride, padding):
    """(number of programs, arguments) of ``token_dwconv_transpose_kernel``."""
    B, C, (KH, KW), (SH, SW), (ph, pw) = x.shape[0], y.shape[2], weight.shape[-2:], stride, padding
    config = transpose_config(C, x.shape[2] // C, KH, KW, SW, x.dtype)
    cells, across = (-(-(size + pad) // s) - pad // s for size, pad, s in ((H, ph, SH), (W, pw, SW)))
    cuts = -(-across // config.SEGMENT)
    conv_tiles = -(-B * cells // config.BLOCK_R) * SH * cuts
    prefix_tiles = -(-B // config.BLOCK_R) if y_prefix else 0
    arguments = dict(
        H=H, W=W, rows=rows, columns=columns, ph=ph, pw=pw, x_prefix=x_prefix, y_prefix=y_prefix, copied=B if copy_prefix else 0,
        conv_tiles=conv_tiles, cells=cells, cuts=cuts, C=C, M=x.shape[2] // C, KH=KH, KW=KW, SH=SH, SW=SW,
        **_tensors(x, weight, bias, y, _tile.alignment(x.shape[2], *x.stride()[:2])), **vars(config),
    )  # fmt: skip
    return (conv_tiles + prefix_tiles) * -(-C // config.BLOCK_C), arguments


def token_dwconv_strided(x, weight, bias, H, W, P, sh, sw, ph, pw, prefix, backend):
    y_prefix = 0 if prefix == "drop" else P
    rows, columns = filtered_grid("token_dwconv_strided", H, W, weight.shape[2:], (sh, sw), (ph, pw))
    y = torch.empty((x.shape[0], y_prefix + rows * columns, weight.shape[0]), dtype=x.dtype, device=x.device)
    place = H, W, rows, columns, P, y_prefix, prefix == "keep", (sh, sw), (ph, pw)
    programs, arguments = strided_launch(x, weight, bias, y, *place)
    _tile.launch(token_dwconv_strided_kernel, programs, y, arguments)
    return y


def token_dwconv_transpose(x, weight, bias, m, H, W, P, sh, sw, ph, pw, prefix, backend):
    rows, columns = filtered_grid("token_dwconv_transpose", H, W, weight.shape[2:], (sh, sw), (ph, pw))
    y = torch.empty((x.shape[0], P + H * W, x.shape[2] // m), dtype=x.dtype, device=x.device)
    place = H, W, rows, columns, 0 if prefix == "drop" else P, P, prefix == "keep", (sh, sw), (ph, pw)
    programs, arguments = transpose_launch(x, weight, bias, y, *place)
    _tile.launch(token_dwconv_transpose_kernel, programs, y, arguments)
    return y


def supports(problem) -> list[str]:
    return _tile.unsupported(problem, token_dwconv_strided_kernel) + _tile.too_large((problem.Kh, problem.Kw), MAX_KERNEL)


registry.register("token_dwconv_strided", "triton", token_dwconv_strided, supports=supports, priority=10)
registry.register("token_dwconv_transpose", "triton", token_dwconv_transpose, supports=supports, priority=10)

"""token_dwconv in Triton: forward and dX, one kernel (dX mirrors the filter and has other prefix rows).

A program owns BLOCK_R jobs x BLOCK_C channels; a job is two output rows of one image, SEGMENT columns wide. Its code is
straight-line and every value of x is loaded once per job into registers:

    K <= 5   all taps are held; an input column (K + 1 rows) is scattered into a ring of K output columns, of which the
             oldest is then finished and stored.
    K >= 7   a loop over the K + 1 input rows holds two rows of taps and the two output rows. Unrolled like the above,
             K = 7 takes 168 registers instead of 128 and half a minute to compile, for 3 % fewer instructions.

Compiled variants depend on C, K, dtypes and on how W is cut into segments, never on B, H or W.
"""
# ruff: noqa: RUF005  (Triton compiles no starred tuples)

from dataclasses import asdict, dataclass
from functools import cache

import torch
import triton
import triton.language as tl

from lifeops import registry
from lifeops.kernels import _tile
from lifeops.kernels._tile import divide, inside, load_block, row_offset, store_block, strides

MAX_KERNEL = 15
ROWS = 2  # output rows per job: more would save loads, but 14 rows are seven pairs and not whole fours


@triton.jit
def _load_taps(p_w, first, m_c, COUNT: tl.constexpr, K: tl.constexpr, FLIP: tl.constexpr, TAIL: tl.constexpr, ACC: tl.constexpr):
    """Taps first .. first + COUNT - 1 of every channel, a tuple of (1, BLOCK_C)."""
    taps = ()
    for t in tl.static_range(COUNT):
        if FLIP:
            taps = taps + (load_block(p_w + (K * K - 1 - t - first), m_c, TAIL, ACC),)
        else:
            taps = taps + (load_block(p_w + (t + first), m_c, TAIL, ACC),)
    return taps


@triton.jit
def _row_mask(o_r, H, m_c, TAIL: tl.constexpr):
    """Whether each job's row exists, and its channels if the last block of channels is not full."""
    m = inside(o_r, H)
    if TAIL:
        m = m & m_c
    return m


@triton.jit
def _store_output(y, residual, b_y, m, r: tl.constexpr, q: tl.constexpr, MASKED: tl.constexpr, ACC: tl.constexpr):
    """Output row ``r``, column ``q`` of every job."""
    if residual is not None:
        b_y += load_block(residual[0] + r * residual[1] + q * residual[2], m, MASKED, ACC)
    store_block(y[0] + r * y[1] + q * y[2], b_y, m, MASKED)


@triton.jit
def _window(x, p_w, y, residual, b_bias, o_r, o_q, H, W, m_c, K: tl.constexpr, FLIP: tl.constexpr, ROWS: tl.constexpr,
            SEGMENT: tl.constexpr, WHOLE: tl.constexpr, TAIL: tl.constexpr, ACC: tl.constexpr):  # fmt: skip
    """K <= 5. While input column ``col`` is added, slot s of the ring is output column col + s - K // 2."""
    HP: tl.constexpr = K // 2
    taps = _load_taps(p_w, 0, m_c, K * K, K, FLIP, TAIL, ACC)
    m_rows = ()
    for j in tl.static_range(K + ROWS - 1):
        m_rows = m_rows + (_row_mask(o_r + (j - HP), H, m_c, TAIL),)
    acc = (b_bias,) * (K * ROWS)
    for col in tl.static_range(-HP, SEGMENT + HP):
        if (not WHOLE) or (col >= 0 and col < SEGMENT):
            for j in tl.static_range(K + ROWS - 1):
                p_x = x[0] + j * x[1] + col * x[2]
                if WHOLE:
                    b_x = load_block(p_x, m_rows[j], TAIL or j < HP or j >= HP + ROWS, ACC)
                else:
                    b_x = load_block(p_x, m_rows[j] & inside(o_q + col, W), True, ACC)
                new = ()
                for s in tl.static_range(K):
                    for r in tl.static_range(ROWS):
                        if j >= r and j < r + K and col + s >= HP and col + s < HP + SEGMENT:
                            new = new + (tl.fma(b_x, taps[(j - r) * K + (K - 1 - s)], acc[s * ROWS + r]),)
                        else:
                            new = new + (acc[s * ROWS + r],)
                acc = new
        if col >= HP:
            for r in tl.static_range(ROWS):
                if WHOLE:
                    _store_output(y, residual, acc[r], m_rows[HP + r], r, col - HP, TAIL, ACC)
                else:
                    _store_output(y, residual, acc[r], m_rows[HP + r] & inside(o_q + (col - HP), W), r, col - HP, True, ACC)
        acc = acc[ROWS:] + (b_bias,) * ROWS


@triton.jit
def _load_row(x, m, o_q, W, b_none, HP: tl.constexpr, SEGMENT: tl.constexpr, WHOLE: tl.constexpr, ACC: tl.constexpr):
    """One input row and its halo. The halo of a WHOLE row is never read: ``b_none`` stands for it."""
    row = ()
    for col in tl.static_range(-HP, SEGMENT + HP):
        if not WHOLE:
            row = row + (load_block(x[0] + col * x[2], m & inside(o_q + col, W), True, ACC),)
        elif col >= 0 and col < SEGMENT:
            row = row + (load_block(x[0] + col * x[2], m, True, ACC),)
        else:
            row = row + (b_none,)
    return row


@triton.jit
def _add_row(acc, row, taps, K: tl.constexpr, SEGMENT: tl.constexpr, WHOLE: tl.constexpr):
    """acc[q] += sum_s taps[s] * row[q + s], for every q."""
    HP: tl.constexpr = K // 2
    new = ()
    for q in tl.static_range(SEGMENT):
        one = (acc[q],)
        for s in tl.static_range(K):
            if (not WHOLE) or (q + s >= HP and q + s < HP + SEGMENT):
                one = (tl.fma(row[q + s], taps[s], one[0]),)
        new = new + one
    return new


@triton.jit
def _rolling(x, p_w, y, residual, b_bias, o_r, o_q, H, W, m_c, K: tl.constexpr, FLIP: tl.constexpr, ROWS: tl.constexpr,
             SEGMENT: tl.constexpr, WHOLE: tl.constexpr, TAIL: tl.constexpr, ACC: tl.constexpr):  # fmt: skip
    """K >= 7. Input row j meets row j of the taps for the upper output row and row j - 1 for the lower one."""
    HP: tl.constexpr = K // 2
    taps = _load_taps(p_w, 0, m_c, K, K, FLIP, TAIL, ACC)
    row = _load_row(x, _row_mask(o_r - HP, H, m_c, TAIL), o_q, W, b_bias, HP, SEGMENT, WHOLE, ACC)
    upper = _add_row((b_bias,) * SEGMENT, row, taps, K, SEGMENT, WHOLE)
    lower = (b_bias,) * SEGMENT
    p_x = x[0]
    for j in tl.range(1, K):
        p_x += x[1]
        row = _load_row((p_x, x[1], x[2]), _row_mask(o_r + (j - HP), H, m_c, TAIL), o_q, W, b_bias, HP, SEGMENT, WHOLE, ACC)
        lower = _add_row(lower, row, taps, K, SEGMENT, WHOLE)
        taps = _load_taps(p_w, j * K, m_c, K, K, FLIP, TAIL, ACC)
        upper = _add_row(upper, row, taps, K, SEGMENT, WHOLE)
    p_x += x[1]
    row = _load_row((p_x, x[1], x[2]), _row_mask(o_r + (K - HP), H, m_c, TAIL), o_q, W, b_bias, HP, SEGMENT, WHOLE, ACC)
    acc = upper + _add_row(lower, row, taps, K, SEGMENT, WHOLE)
    for r in tl.static_range(ROWS):
        m = _row_mask(o_r + r, H, m_c, TAIL)
        for q in tl.static_range(SEGMENT):
            if WHOLE:
                _store_output(y, residual, acc[r * SEGMENT + q], m, r, q, TAIL, ACC)
            else:
                _store_output(y, residual, acc[r * SEGMENT + q], m & inside(o_q + q, W), r, q, True, ACC)


@triton.jit
def _prefix_rows(p_x, p_r, p_y, m_x, m_y, rows, x_col, r_col, y_col, ACC: tl.constexpr):
    """Copy or clear the prefix rows of some images, and add the residual's."""
    for _ in range(rows):
        b_y = load_block(p_x, m_x, True, ACC)
        p_x += x_col
        if p_r is not None:
            b_y += load_block(p_r, m_y, True, ACC)
            p_r += r_col
        store_block(p_y, b_y, m_y, True)
        p_y += y_col


@triton.jit(do_not_specialize=["B", "H", "W", "x_prefix", "y_prefix", "copied", "pairs", "conv_tiles",
                               "stride_xb", "stride_xn", "stride_rb", "stride_rn"])  # fmt: skip
def token_dwconv_fwd_kernel(
    x_ptr, weight_ptr, bias_ptr, residual_ptr, y_ptr,
    B, H, W, x_prefix, y_prefix, copied, pairs, conv_tiles, stride_xb, stride_xn, stride_rb, stride_rn,
    C: tl.constexpr, K: tl.constexpr, FLIP: tl.constexpr, ROWS: tl.constexpr, SEGMENT: tl.constexpr, WHOLE: tl.constexpr,
    X_STRIDE_N: tl.constexpr, R_STRIDE_N: tl.constexpr, ALIGN: tl.constexpr, ACC: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """y of one tile; tiles from ``conv_tiles`` on write the prefix rows of BLOCK_R images,
    which are those of x for the first ``copied`` images (all or none) and zero for the others.

    WHOLE: a segment is a whole row (W = SEGMENT) and H >= 2. Columns outside are then known at compile time, and an odd
    last row is computed twice with its neighbour (the same values, written twice) instead of masking every load.
    ``pairs`` is the number of row pairs, ceil(H / 2).
    Strides come in units of ALIGN elements.
    """
    BLOCKS_C: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    TAIL: tl.constexpr = C % BLOCK_C != 0
    i_tile = tl.program_id(0) // BLOCKS_C
    i_c = tl.program_id(0) % BLOCKS_C
    o_c = (i_c * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    m_c = o_c < C
    stride_xb, x_col = strides(stride_xb, stride_xn, X_STRIDE_N, ALIGN)
    stride_rb, r_col = strides(stride_rb, stride_rn, R_STRIDE_N, ALIGN)
    stride_yb = (y_prefix + H * W).to(tl.int64) * C
    if i_tile >= conv_tiles:
        o_b = (i_tile - conv_tiles) * BLOCK_R + tl.arange(0, BLOCK_R)
        p_x = x_ptr + ((o_b.to(tl.int64) * stride_xb)[:, None] + o_c)
        p_y = y_ptr + ((o_b.to(tl.int64) * stride_yb)[:, None] + o_c)
        p_r = None
        if residual_ptr is not None:
            p_r = residual_ptr + ((o_b.to(tl.int64) * stride_rb)[:, None] + o_c)
        m_x = _row_mask(o_b, copied, m_c, TAIL)
        m_y = _row_mask(o_b, B, m_c, TAIL)
        _prefix_rows(p_x, p_r, p_y, m_x, m_y, y_prefix, x_col, r_col, C, ACC)
    else:
        o_q = tl.zeros([BLOCK_R], dtype=tl.int32)
        if not WHOLE:
            i_tile, i_segment = divide(i_tile, (W + SEGMENT - 1) // SEGMENT)
            o_q += i_segment * SEGMENT
        # The last tile repeats its last job rather than mask what is left over.
        o_b, o_r = divide(tl.minimum(i_tile * BLOCK_R + tl.arange(0, BLOCK_R), B * pairs - 1), pairs)
        o_r = o_r * ROWS
        if WHOLE:
            o_r = tl.minimum(o_r, H - ROWS)
        o_n = o_r * W + o_q
        o_x = row_offset(o_b, x_prefix + o_n - (K // 2) * W, stride_xb, x_col)
        x = (x_ptr + (o_x[:, None] + o_c), W.to(tl.int64) * x_col, x_col)
        y = (y_ptr + (row_offset(o_b, y_prefix + o_n, stride_yb, C)[:, None] + o_c), W.to(tl.int64) * C, C)
        residual = None
        if residual_ptr is not None:
            o_y = row_offset(o_b, y_prefix + o_n, stride_rb, r_col)
            residual = (residual_ptr + (o_y[:, None] + o_c), W.to(tl.int64) * r_col, r_col)
        b_bias = tl.zeros([BLOCK_R, BLOCK_C], dtype=ACC)
        if bias_ptr is not None:
            b_bias += load_block(bias_ptr + o_c, m_c, TAIL, ACC)
        p_w = weight_ptr + o_c * (K * K)
        if K <= 5:
            _window(x, p_w, y, residual, b_bias, o_r, o_q, H, W, m_c, K, FLIP, ROWS, SEGMENT, WHOLE, TAIL, ACC)
        else:
            _rolling(x, p_w, y, residual, b_bias, o_r, o_q, H, W, m_c, K, FLIP, ROWS, SEGMENT, WHOLE, TAIL, ACC)


@dataclass(frozen=True)
class Config:
    """Constants a kernel is compiled with, for one shape class; chosen by a pure function, never by timing."""

    SEGMENT: int  # columns per job
    WHOLE: bool  # a segment is a whole row, and there is a pair of rows
    BLOCK_R: int
    BLOCK_C: int


@cache
def segments(H: int, W: int, K: int) -> tuple[int, bool]:
    """(SEGMENT, WHOLE). Four variants serve every grid: whole rows of 14 and 16 without column masks, else masked
    segments of 8 or 16, whichever loads fewer columns (8 for windows of 7 and 8).
    """
    if W in (14, 16) and H >= ROWS:
        return W, True
    return min((16, 8), key=lambda segment: -(-W // segment) * (segment + K - 1)), False


@cache
def forward_config(H: int, W: int, C: int, K: int, dtype: torch.dtype) -> Config:
    """K 3 reads 8 bytes of bfloat16 per lane (80 registers). K 5 and 7 hold too much for four channels per lane."""
    channels = _tile.channels_per_lane(K, dtype)
    block_c = _tile.block_of_channels(C, 32 * channels)
    return Config(*segments(H, W, K), _tile.WARPS * 32 * channels // block_c, block_c)


def forward_launch(x, weight, bias, residual, y, H, W, x_prefix, y_prefix, copy_prefix, flip):
    """(number of programs, arguments) of ``token_dwconv_fwd_kernel``."""
    B, _, C = x.shape
    K = weight.shape[-1]
    config = forward_config(H, W, C, K, x.dtype)
    blocks_c = -(-C // config.BLOCK_C)
    pairs, cuts = -(-H // ROWS), -(-W // config.SEGMENT)
    conv_tiles = -(-B * pairs // config.BLOCK_R) * cuts
    prefix_tiles = -(-B // config.BLOCK_R) if y_prefix else 0
    stride_rb, stride_rn = (0, 0) if residual is None else residual.stride()[:2]
    align = _tile.alignment(C, x.stride(0), x.stride(1), stride_rb, stride_rn)
    arguments = dict(
        x_ptr=x, weight_ptr=weight.contiguous(), bias_ptr=bias, residual_ptr=residual, y_ptr=y,
        B=B, H=H, W=W, x_prefix=x_prefix, y_prefix=y_prefix, copied=B if copy_prefix else 0, pairs=pairs,
        conv_tiles=conv_tiles, stride_xb=x.stride(0) // align, stride_xn=x.stride(1) // align,
        stride_rb=stride_rb // align, stride_rn=stride_rn // align,
        C=C, K=K, FLIP=flip, ROWS=ROWS, X_STRIDE_N=_tile.common_stride(x.stride(1), C), R_STRIDE_N=_tile.common_stride(stride_rn, C),
        ALIGN=align, ACC=_tile.accumulator(x.dtype), **asdict(config),
    )  # fmt: skip
    return (conv_tiles + prefix_tiles) * blocks_c, arguments


def _forward(x, weight, bias, residual, H, W, x_prefix, y_prefix, copy_prefix, flip):
    y = torch.empty((x.shape[0], y_prefix + H * W, x.shape[2]), dtype=x.dtype, device=x.device)
    programs, arguments = forward_launch(x, weight, bias, residual, y, H, W, x_prefix, y_prefix, copy_prefix, flip)
    _tile.launch(token_dwconv_fwd_kernel, programs, y, arguments)
    return y


def token_dwconv(x, weight, bias, residual, H, W, P, prefix, backend):
    return _forward(x, weight, bias, residual, H, W, P, 0 if prefix == "drop" else P, prefix == "keep", flip=False)


def token_dwconv_bwd_dx(dy, weight, H, W, P, prefix, backend):
    return _forward(dy, weight, None, None, H, W, 0 if prefix == "drop" else P, P, prefix == "keep", flip=True)


def supports(problem) -> list[str]:
    return _tile.unsupported(problem, token_dwconv_fwd_kernel, MAX_KERNEL)


registry.register("token_dwconv", "triton", token_dwconv, supports=supports, priority=10)
registry.register("token_dwconv_bwd_dx", "triton", token_dwconv_bwd_dx, supports=supports, priority=10)

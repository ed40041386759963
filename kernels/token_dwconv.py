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

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl

from lifeops import registry
from lifeops.kernels import _tile
from lifeops.kernels._activations import activate, derivative, through
from lifeops.kernels._tile import divide, inside, load_block, per_channel, prefix_rows, row_mask, row_offset, store_block, strides

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
def _load_input(p_x, m, around, MASKED: tl.constexpr, ZERO: tl.constexpr, ACC: tl.constexpr, ACT: tl.constexpr, DERIVATIVE: tl.constexpr):
    """One block of x through the prologue. ZERO: what lies outside the grid is 0 after it, too."""
    b_x = load_block(p_x, m, MASKED, ACC)
    if ACT != "" and not DERIVATIVE:
        b_x = through(b_x, around[0], around[1], ACT)
        if ZERO:
            b_x = tl.where(m, b_x, 0.0)
    return b_x


@triton.jit
def _store_output(y, residual, around, sums, b_y, m, r: tl.constexpr, q: tl.constexpr, MASKED: tl.constexpr,
                  ACC: tl.constexpr, ACT: tl.constexpr, OUT_ACT: tl.constexpr, DERIVATIVE: tl.constexpr, SUMS: tl.constexpr):  # fmt: skip
    """Output row ``r``, column ``q`` of every job through the epilogue; returns the sums with it.

    Sums of a job: forward k, its first output (0 where it is not finite), and for each row the sum of y - k and m2 of y, value by value
    (csrc/cpu/moments.h says why): columns that do not exist are the last. Input gradient: for each row, behind nothing, the sum of dv
    and that of dv x, with gelu_first of du and du gelu(x). It has a and b where the forward has the epilogue's values.
    """
    if DERIVATIVE:
        b_x = load_block(around[4] + r * around[5] + q * around[6], m, MASKED, ACC)
        b_factor, b_slope = b_x, b_x
        if ACT == "gelu_first":
            b_factor, b_slope = activate(b_x, "gelu"), derivative(b_x, "gelu")
        else:
            b_y = b_y * derivative(around[0] * b_x + around[1], ACT)
        b_counted = b_y
        if MASKED:
            b_counted = tl.where(m, b_y, 0.0)
        sums = sums[: 1 + 2 * r] + (sums[1 + 2 * r] + b_counted, tl.fma(b_counted, b_factor, sums[2 + 2 * r])) + sums[3 + 2 * r :]
        b_y = around[0] * b_y
        if OUT_ACT == "none":
            b_y += around[2] * b_factor + around[3]
        elif OUT_ACT == "shift":  # 0 times an infinite factor would be NaN
            b_y += around[3]
        if ACT == "gelu_first":
            b_y = b_y * b_slope
    else:
        if OUT_ACT != "":
            b_y = activate(around[2] * b_y + around[3], OUT_ACT)
        if SUMS:
            b_stored = b_y.to(y[0].dtype.element_ty).to(ACC)
            if r == 0 and q == 0:
                sums = (tl.where(b_stored - b_stored == 0.0, b_stored, 0.0),) + sums[1:]
            b_d, b_m2 = b_stored - sums[0], sums[2 + 2 * r]
            b_sum = sums[1 + 2 * r] + b_d
            if q > 0:
                b_gap = b_d - sums[1 + 2 * r] * (1 / q)
                b_m2 = tl.fma(b_gap * (q / (q + 1)), b_gap, b_m2)
            if MASKED:
                b_sum, b_m2 = tl.where(m, b_sum, sums[1 + 2 * r]), tl.where(m, b_m2, sums[2 + 2 * r])
            sums = sums[: 1 + 2 * r] + (b_sum, b_m2) + sums[3 + 2 * r :]
    if residual is not None:
        b_y += load_block(residual[0] + r * residual[1] + q * residual[2], m, MASKED, ACC)
    store_block(y[0] + r * y[1] + q * y[2], b_y, m, MASKED)
    return sums


@triton.jit
def _no_sums(b_none):
    """What a job's sums start from, see _store_output."""
    b_zero = tl.zeros(b_none.shape, b_none.dtype)
    return (b_zero,) * 5


@triton.jit
def _joined(sums, m_first, m_second, n, MOMENTS: tl.constexpr):
    """The sums of both rows of a job where they count; MOMENTS: (k, sum, m2) of n values each."""
    b_first = tl.where(m_first, sums[1], 0.0) + tl.where(m_second, sums[3], 0.0)
    b_second = tl.where(m_first, sums[2], 0.0) + tl.where(m_second, sums[4], 0.0)
    if MOMENTS:
        b_gap = sums[1] - sums[3]
        b_second += tl.where(m_first & m_second, b_gap * b_gap * (0.5 / n), 0.0)
    return sums[0], b_first, b_second


@triton.jit
def _window(x, p_w, y, residual, around, b_bias, o_r, o_q, H, W, m_c, K: tl.constexpr, FLIP: tl.constexpr, ROWS: tl.constexpr,
            SEGMENT: tl.constexpr, WHOLE: tl.constexpr, TAIL: tl.constexpr, ACC: tl.constexpr,
            ACT: tl.constexpr, OUT_ACT: tl.constexpr, DERIVATIVE: tl.constexpr, SUMS: tl.constexpr):  # fmt: skip
    """K <= 5. While input column ``col`` is added, slot s of the ring is output column col + s - K // 2."""
    HP: tl.constexpr = K // 2
    taps = _load_taps(p_w, 0, m_c, K * K, K, FLIP, TAIL, ACC)
    m_rows = ()
    for j in tl.static_range(K + ROWS - 1):
        m_rows = m_rows + (row_mask(o_r + (j - HP), H, m_c, TAIL),)
    acc = (b_bias,) * (K * ROWS)
    sums = _no_sums(b_bias)
    for col in tl.static_range(-HP, SEGMENT + HP):
        if (not WHOLE) or (col >= 0 and col < SEGMENT):
            for j in tl.static_range(K + ROWS - 1):
                p_x = x[0] + j * x[1] + col * x[2]
                if WHOLE:
                    b_x = _load_input(
                        p_x, m_rows[j], around, TAIL or j < HP or j >= HP + ROWS, j < HP or j >= HP + ROWS, ACC, ACT, DERIVATIVE
                    )
                else:
                    b_x = _load_input(p_x, m_rows[j] & inside(o_q + col, W), around, True, True, ACC, ACT, DERIVATIVE)
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
                    sums = _store_output(
                        y, residual, around, sums, acc[r], m_rows[HP + r], r, col - HP, TAIL, ACC, ACT, OUT_ACT, DERIVATIVE, SUMS
                    )
                else:
                    m = m_rows[HP + r] & inside(o_q + (col - HP), W)
                    sums = _store_output(y, residual, around, sums, acc[r], m, r, col - HP, True, ACC, ACT, OUT_ACT, DERIVATIVE, SUMS)
        acc = acc[ROWS:] + (b_bias,) * ROWS
    return sums


@triton.jit
def _load_row(x, m, around, o_q, W, b_none, HP: tl.constexpr, SEGMENT: tl.constexpr, WHOLE: tl.constexpr,
              ACC: tl.constexpr, ACT: tl.constexpr, DERIVATIVE: tl.constexpr):  # fmt: skip
    """One input row and its halo. The halo of a WHOLE row is never read: ``b_none`` stands for it."""
    row = ()
    for col in tl.static_range(-HP, SEGMENT + HP):
        if not WHOLE:
            row = row + (_load_input(x[0] + col * x[2], m & inside(o_q + col, W), around, True, True, ACC, ACT, DERIVATIVE),)
        elif col >= 0 and col < SEGMENT:
            row = row + (_load_input(x[0] + col * x[2], m, around, True, True, ACC, ACT, DERIVATIVE),)
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
def _rolling(x, p_w, y, residual, around, b_bias, o_r, o_q, H, W, m_c, K: tl.constexpr, FLIP: tl.constexpr, ROWS: tl.constexpr,
             SEGMENT: tl.constexpr, WHOLE: tl.constexpr, TAIL: tl.constexpr, ACC: tl.constexpr,
             ACT: tl.constexpr, OUT_ACT: tl.constexpr, DERIVATIVE: tl.constexpr, SUMS: tl.constexpr):  # fmt: skip
    """K >= 7. Input row j meets row j of the taps for the upper output row and row j - 1 for the lower one."""
    HP: tl.constexpr = K // 2
    taps = _load_taps(p_w, 0, m_c, K, K, FLIP, TAIL, ACC)
    row = _load_row(x, row_mask(o_r - HP, H, m_c, TAIL), around, o_q, W, b_bias, HP, SEGMENT, WHOLE, ACC, ACT, DERIVATIVE)
    upper = _add_row((b_bias,) * SEGMENT, row, taps, K, SEGMENT, WHOLE)
    lower = (b_bias,) * SEGMENT
    p_x = x[0]
    for j in tl.range(1, K):
        p_x += x[1]
        row = _load_row(
            (p_x, x[1], x[2]), row_mask(o_r + (j - HP), H, m_c, TAIL), around, o_q, W, b_bias, HP, SEGMENT, WHOLE, ACC, ACT, DERIVATIVE
        )
        lower = _add_row(lower, row, taps, K, SEGMENT, WHOLE)
        taps = _load_taps(p_w, j * K, m_c, K, K, FLIP, TAIL, ACC)
        upper = _add_row(upper, row, taps, K, SEGMENT, WHOLE)
    p_x += x[1]
    row = _load_row(
        (p_x, x[1], x[2]), row_mask(o_r + (K - HP), H, m_c, TAIL), around, o_q, W, b_bias, HP, SEGMENT, WHOLE, ACC, ACT, DERIVATIVE
    )
    acc = upper + _add_row(lower, row, taps, K, SEGMENT, WHOLE)
    sums = _no_sums(b_bias)
    for r in tl.static_range(ROWS):
        m = row_mask(o_r + r, H, m_c, TAIL)
        for q in tl.static_range(SEGMENT):
            if WHOLE:
                sums = _store_output(y, residual, around, sums, acc[r * SEGMENT + q], m, r, q, TAIL, ACC, ACT, OUT_ACT, DERIVATIVE, SUMS)
            else:
                sums = _store_output(
                    y, residual, around, sums, acc[r * SEGMENT + q], m & inside(o_q + q, W), r, q, True, ACC, ACT, OUT_ACT, DERIVATIVE, SUMS
                )
    return sums


@triton.jit(do_not_specialize=["B", "H", "W", "x_prefix", "y_prefix", "copied", "pairs", "conv_tiles",
                               "stride_xb", "stride_xn", "stride_rb", "stride_rn", "pre_prefix", "stride_pb", "stride_pn"])  # fmt: skip
def token_dwconv_fwd_kernel(
    x_ptr, weight_ptr, bias_ptr, residual_ptr, y_ptr, scale_ptr, shift_ptr, out_scale_ptr, out_shift_ptr, pre_ptr, sums_ptr,
    B, H, W, x_prefix, y_prefix, copied, pairs, conv_tiles, stride_xb, stride_xn, stride_rb, stride_rn, pre_prefix, stride_pb, stride_pn,
    C: tl.constexpr, K: tl.constexpr, FLIP: tl.constexpr, ROWS: tl.constexpr, SEGMENT: tl.constexpr, WHOLE: tl.constexpr,
    X_STRIDE_N: tl.constexpr, R_STRIDE_N: tl.constexpr, P_STRIDE_N: tl.constexpr, ALIGN: tl.constexpr, ACC: tl.constexpr,
    ACT: tl.constexpr, OUT_ACT: tl.constexpr, DERIVATIVE: tl.constexpr, SUMS: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """y of one tile; tiles from ``conv_tiles`` on write the prefix rows of BLOCK_R images,
    which are those of x for the first ``copied`` images (all or none) and zero for the others.

    WHOLE: a segment is a whole row (W = SEGMENT) and H >= 2. Columns outside are then known at compile time, and an odd
    last row is computed twice with its neighbour (the same values, written twice) instead of masking every load.
    ``pairs`` is the number of row pairs, ceil(H / 2).
    ACT, OUT_ACT: activations of prologue and epilogue, "" where there is none; DERIVATIVE: the prologue's derivative at ``pre_ptr``
    multiplies the result instead, and with OUT_ACT "none" b x + a is added, b being out_scale and a out_shift. ``sums_ptr``
    (B, pairs, segments, 3, C) takes the sums of every job, see _store_output.
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
        m_x = row_mask(o_b, copied, m_c, TAIL)
        m_y = row_mask(o_b, B, m_c, TAIL)
        prefix_rows(p_x, p_r, p_y, m_x, m_y, y_prefix, x_col, r_col, C, ACC)
    else:
        o_q = tl.zeros([BLOCK_R], dtype=tl.int32)
        i_cut = 0
        if not WHOLE:
            i_tile, i_cut = divide(i_tile, (W + SEGMENT - 1) // SEGMENT)
            o_q += i_cut * SEGMENT
        # The last tile repeats its last job rather than mask what is left over.
        o_job = i_tile * BLOCK_R + tl.arange(0, BLOCK_R)
        o_b, o_r = divide(tl.minimum(o_job, B * pairs - 1), pairs)
        o_r = o_r * ROWS
        o_pair = o_r
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
        p_pre, pre_row, pre_col = x_ptr, 0, 0
        if DERIVATIVE:
            pre_image, pre_col = strides(stride_pb, stride_pn, P_STRIDE_N, ALIGN)
            p_pre = pre_ptr + (row_offset(o_b, pre_prefix + o_n, pre_image, pre_col)[:, None] + o_c)
            pre_row = W.to(tl.int64) * pre_col
        # an overlapping last pair counts its lower row alone, a repeated last job nothing
        counted = ((o_job < B * pairs)[:, None],)
        for _ in tl.static_range(1, ROWS):
            counted = counted + (counted[0],)
        if WHOLE:
            counted = ((o_r >= o_pair)[:, None] & counted[0],) + counted[1:]
        around = (
            per_channel(scale_ptr, o_c, m_c, 1.0, ACC), per_channel(shift_ptr, o_c, m_c, 0.0, ACC),
            per_channel(out_scale_ptr, o_c, m_c, 1.0, ACC), per_channel(out_shift_ptr, o_c, m_c, 0.0, ACC),
            p_pre, pre_row, pre_col,
        )  # fmt: skip
        p_w = weight_ptr + o_c * (K * K)
        if K <= 5:
            sums = _window(x, p_w, y, residual, around, b_bias, o_r, o_q, H, W, m_c, K, FLIP, ROWS, SEGMENT, WHOLE, TAIL, ACC,
                           ACT, OUT_ACT, DERIVATIVE, SUMS)  # fmt: skip
        else:
            sums = _rolling(x, p_w, y, residual, around, b_bias, o_r, o_q, H, W, m_c, K, FLIP, ROWS, SEGMENT, WHOLE, TAIL, ACC,
                            ACT, OUT_ACT, DERIVATIVE, SUMS)  # fmt: skip
        if SUMS:
            n = tl.minimum(W - o_q, SEGMENT).to(ACC)[:, None]
            sums = _joined(sums, counted[0] & inside(o_r, H), counted[1] & inside(o_r + 1, H), n, not DERIVATIVE)
            o_sum = o_job.to(tl.int64) * tl.cdiv(W, SEGMENT) + i_cut
            p_sum = sums_ptr + (o_sum * (3 * C))[:, None] + o_c
            m = (o_job < B * pairs)[:, None] & m_c
            for k in tl.static_range(3):
                tl.store(p_sum + k * C, sums[k], mask=m)


@dataclass(frozen=True)
class Config:
    """Constants a kernel is compiled with, for one shape class; chosen by a pure function, never by timing."""

    SEGMENT: int  # columns per job
    WHOLE: bool  # a segment is a whole row, and there is a pair of rows
    BLOCK_R: int
    BLOCK_C: int


@lru_cache(4096)
def segments(H: int, W: int, K: int) -> tuple[int, bool]:
    """(SEGMENT, WHOLE). Four variants serve every grid: whole rows of 14 and 16 without column masks, else masked
    segments of 8 or 16, whichever loads fewer columns (8 for windows of 7 and 8).
    """
    if W in (14, 16) and H >= ROWS:
        return W, True
    return min((16, 8), key=lambda segment: -(-W // segment) * (segment + K - 1)), False


@lru_cache(4096)
def forward_config(H: int, W: int, C: int, K: int, dtype: torch.dtype) -> Config:
    """K 3 reads 8 bytes of bfloat16 per lane (80 registers). K 5 and 7 hold too much for four channels per lane."""
    channels = _tile.channels_per_lane(K, dtype)
    block_c = _tile.block_of_channels(C, 32 * channels)
    return Config(*segments(H, W, K), _tile.WARPS * 32 * channels // block_c, block_c)


PLAIN = dict(
    scale_ptr=None, shift_ptr=None, out_scale_ptr=None, out_shift_ptr=None, pre_ptr=None, sums_ptr=None, pre_prefix=0,
    ACT="", OUT_ACT="", DERIVATIVE=False, SUMS=False,
)  # fmt: skip
"""The kernel's arguments where nothing happens around the convolution."""


def forward_launch(x, weight, bias, residual, y, H, W, x_prefix, y_prefix, copy_prefix, flip, around=PLAIN):
    """(number of programs, arguments) of ``token_dwconv_fwd_kernel``."""
    B, _, C = x.shape
    K = weight.shape[-1]
    config = forward_config(H, W, C, K, x.dtype)
    blocks_c = -(-C // config.BLOCK_C)
    pairs, cuts = -(-H // ROWS), -(-W // config.SEGMENT)
    conv_tiles = -(-B * pairs // config.BLOCK_R) * cuts
    prefix_tiles = -(-B // config.BLOCK_R) if y_prefix else 0
    stride_rb, stride_rn = (0, 0) if residual is None else residual.stride()[:2]
    stride_pb, stride_pn = (0, 0) if around["pre_ptr"] is None else around["pre_ptr"].stride()[:2]
    align = _tile.alignment(C, x.stride(0), x.stride(1), stride_rb, stride_rn, stride_pb, stride_pn)
    arguments = dict(
        x_ptr=x, weight_ptr=weight.contiguous(), bias_ptr=_tile.contiguous(bias), residual_ptr=residual, y_ptr=y,
        B=B, H=H, W=W, x_prefix=x_prefix, y_prefix=y_prefix, copied=B if copy_prefix else 0, pairs=pairs,
        conv_tiles=conv_tiles, stride_xb=x.stride(0) // align, stride_xn=x.stride(1) // align,
        stride_rb=stride_rb // align, stride_rn=stride_rn // align, stride_pb=stride_pb // align, stride_pn=stride_pn // align,
        C=C, K=K, FLIP=flip, ROWS=ROWS, X_STRIDE_N=_tile.common_stride(x.stride(1), C), R_STRIDE_N=_tile.common_stride(stride_rn, C),
        P_STRIDE_N=_tile.common_stride(stride_pn, C), ALIGN=align, ACC=_tile.accumulator(x.dtype), **vars(config), **around,
    )  # fmt: skip
    return (conv_tiles + prefix_tiles) * blocks_c, arguments


def forward(x, weight, bias, residual, H, W, x_prefix, y_prefix, copy_prefix, flip, around=PLAIN):
    y = torch.empty((x.shape[0], y_prefix + H * W, x.shape[2]), dtype=x.dtype, device=x.device)
    programs, arguments = forward_launch(x, weight, bias, residual, y, H, W, x_prefix, y_prefix, copy_prefix, flip, around)
    _tile.launch(token_dwconv_fwd_kernel, programs, y, arguments)
    return y


def token_dwconv(x, weight, bias, residual, H, W, P, prefix, backend):
    return forward(x, weight, bias, residual, H, W, P, 0 if prefix == "drop" else P, prefix == "keep", flip=False)


def token_dwconv_bwd_dx(dy, weight, H, W, P, prefix, backend):
    return forward(dy, weight, None, None, H, W, 0 if prefix == "drop" else P, P, prefix == "keep", flip=True)


def supports(problem) -> list[str]:
    return _tile.unsupported(problem, token_dwconv_fwd_kernel, MAX_KERNEL)


registry.register("token_dwconv", "triton", token_dwconv, supports=supports, priority=10)
registry.register("token_dwconv_bwd_dx", "triton", token_dwconv_bwd_dx, supports=supports, priority=10)

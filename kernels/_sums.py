"""Second stages: partial sums that lie behind one another, added in float64 and in a fixed order, a launch for all of them."""

import torch
import triton
import triton.language as tl

from lifeops.kernels import _tile
from lifeops.kernels._tile import inside, load_block, per_channel

BLOCK_C, ROWS = 8, 256  # 32 bytes of a row; 16 loads of a thread are on their way at once


@triton.jit
def _size(o_row, cuts, segments, H, W, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    """Values behind each partial sum, of a grid cut into pieces of HEIGHT x WIDTH, ``cuts`` to an image."""
    o_cut = o_row % cuts
    rows, columns = H - o_cut // segments * HEIGHT, W - o_cut % segments * WIDTH
    return (tl.minimum(rows, HEIGHT) * tl.minimum(columns, WIDTH)).to(tl.float64)[:, None]


@triton.jit
def joined_moments(partial_ptr, o_c, m_c, rows, cuts, segments, H, W, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
                   C: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr):  # fmt: skip
    """(n, mean, m2) of the values behind partial statistics (rows, 3, C): k, sum of y - k, m2."""
    n = (rows // cuts).to(tl.float64) * H.to(tl.float64) * W.to(tl.float64)
    b_sum = tl.zeros([ROWS, BLOCK_C], dtype=tl.float64)
    for i in range(0, rows, ROWS):
        o_row = i + tl.arange(0, ROWS)
        m = inside(o_row, rows) & m_c
        p = partial_ptr + (o_row.to(tl.int64) * (3 * C))[:, None] + o_c
        b_n = _size(o_row, cuts, segments, H, W, HEIGHT, WIDTH)
        b_sum += load_block(p, m, True, tl.float64) * b_n + load_block(p + C, m, True, tl.float64)
    b_mean = (tl.sum(b_sum, 0) / n)[None, :]
    b_sum = tl.zeros([ROWS, BLOCK_C], dtype=tl.float64)
    for i in range(0, rows, ROWS):
        o_row = i + tl.arange(0, ROWS)
        m = inside(o_row, rows) & m_c
        p = partial_ptr + (o_row.to(tl.int64) * (3 * C))[:, None] + o_c
        b_n = _size(o_row, cuts, segments, H, W, HEIGHT, WIDTH)
        b_gap = load_block(p, m, True, tl.float64) + load_block(p + C, m, True, tl.float64) / b_n - b_mean
        b_sum += tl.where(m, load_block(p + 2 * C, m, True, tl.float64) + b_n * b_gap * b_gap, 0.0)
    return n, b_mean, tl.sum(b_sum, 0)[None, :]


@triton.jit
def store_affine(out_ptr, gamma_ptr, beta_ptr, b_mean, b_var, o_c, m_c, C: tl.constexpr, EPS: tl.constexpr):
    """Scale, shift and rstd of a norm to rows 0 to 2 of (…, C)."""
    ACC: tl.constexpr = out_ptr.dtype.element_ty
    b_rstd = 1.0 / tl.sqrt(b_var + EPS)
    b_scale = per_channel(gamma_ptr, o_c, m_c, 1.0, tl.float64) * b_rstd
    b_shift = per_channel(beta_ptr, o_c, m_c, 0.0, tl.float64) - b_mean * b_scale
    tl.store(out_ptr + o_c, b_scale.to(ACC), mask=m_c)
    tl.store(out_ptr + C + o_c, b_shift.to(ACC), mask=m_c)
    tl.store(out_ptr + 2 * C + o_c, b_rstd.to(ACC), mask=m_c)


@triton.jit(do_not_specialize=["rows", "cuts", "segments", "H", "W"])
def moments_kernel(partial_ptr, mean_ptr, m2_ptr, rows, cuts, segments, H, W, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
                   C: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr):  # fmt: skip
    o_c = (tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    m_c = o_c < C
    _, b_mean, b_m2 = joined_moments(partial_ptr, o_c, m_c, rows, cuts, segments, H, W, HEIGHT, WIDTH, C, ROWS, BLOCK_C)
    tl.store(mean_ptr + o_c, b_mean.to(mean_ptr.dtype.element_ty), mask=m_c)
    tl.store(m2_ptr + o_c, b_m2.to(m2_ptr.dtype.element_ty), mask=m_c)


@triton.jit(do_not_specialize=["rows"])
def row_sums_kernel(partial_ptr, out_ptr, last_ptr, rows, C: tl.constexpr, SUMS: tl.constexpr, FIRST: tl.constexpr,
                    ROWS: tl.constexpr, BLOCK_C: tl.constexpr):  # fmt: skip
    """out (SUMS - FIRST, groups, C) from partial (groups, rows, SUMS, C), the sums before FIRST left out; the last one goes to
    ``last_ptr`` if there is one.
    """
    BLOCKS_C: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    o_c = ((tl.program_id(0) % BLOCKS_C) * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    i_sum = FIRST + tl.program_id(0) // BLOCKS_C % (SUMS - FIRST)
    i_group, groups = tl.program_id(0) // (BLOCKS_C * (SUMS - FIRST)), tl.num_programs(0) // (BLOCKS_C * (SUMS - FIRST))
    b_sum = tl.zeros([ROWS, BLOCK_C], dtype=tl.float64)
    for i in range(0, rows, ROWS):
        o_row = i + tl.arange(0, ROWS)
        o_p = ((i_group.to(tl.int64) * rows + o_row) * SUMS + i_sum) * C
        b_sum += load_block(partial_ptr + o_p[:, None] + o_c, inside(o_row, rows) & (o_c < C), True, tl.float64)
    o_c = tl.reshape(o_c, [BLOCK_C])
    p_out = out_ptr + ((i_sum - FIRST).to(tl.int64) * groups + i_group) * C
    if last_ptr is not None:
        if i_sum == SUMS - 1:
            p_out = last_ptr + i_group.to(tl.int64) * C
    tl.store(p_out + o_c, tl.sum(b_sum, 0).to(out_ptr.dtype.element_ty), mask=o_c < C)


def cut(rows: int, H: int, W: int, height: int, width: int) -> dict:
    """What joined_moments is told of ``rows`` partial statistics of a grid."""
    segments = -(-W // width)
    return dict(rows=rows, cuts=-(-H // height) * segments, segments=segments, H=H, W=W, HEIGHT=height, WIDTH=width)


def moments(partial, H, W, height, width):
    """(mean, m2) from statistics (…, 3, C) of pieces of height x width."""
    C = partial.shape[-1]
    mean, m2 = (torch.empty((C,), dtype=partial.dtype, device=partial.device) for _ in range(2))
    where = cut(partial.numel() // (3 * C), H, W, height, width)
    arguments = dict(partial_ptr=partial, mean_ptr=mean, m2_ptr=m2, **where, C=C, ROWS=ROWS, BLOCK_C=BLOCK_C)
    _tile.launch(moments_kernel, -(-C // BLOCK_C), partial, arguments)
    return mean, m2


def row_sums(partial, first: int = 0, two: bool = False):
    """(sums - first, groups, C) of partial (groups, rows, sums, C); or the last two sums, (groups, C) each."""
    groups, rows, sums, C = partial.shape
    out = torch.empty((sums - first - two, groups, C), dtype=partial.dtype, device=partial.device)
    last = torch.empty((groups, C), dtype=partial.dtype, device=partial.device) if two else None
    few = triton.next_power_of_2(max(1, rows))
    block_r = min(few, ROWS)
    block_c = min(triton.next_power_of_2(C), ROWS * BLOCK_C // block_r, 256)
    arguments = dict(partial_ptr=partial, out_ptr=out, last_ptr=last, rows=rows, C=C, SUMS=sums, FIRST=first, ROWS=block_r, BLOCK_C=block_c)
    _tile.launch(row_sums_kernel, groups * (sums - first) * -(-C // block_c), partial, arguments)
    return (out[0], last) if two else out

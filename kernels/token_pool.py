"""token_pool in Triton: the maximum or the mean of each window, and its gradient as a gather.

    y[r, q, c] = max or mean over i, k of x[r*SH + i - ph, q*SW + k - pw, c]        what lies outside the grid is left out

A program owns BLOCK_R tokens x BLOCK_C channels of the result. The gradient of a maximum finds its places again: one pass notes for
every window which of its taps won (one byte), another gathers for every token of x the windows that it won. NaN wins, and among
equals the first, as in torch.nn.functional.max_pool2d.

Compiled variants depend on C, the kernel size, the strides and dtypes, never on B, H, W or the padding.
"""

import torch
import triton
import triton.language as tl

from lifeops import registry
from lifeops.geometry import filtered_grid
from lifeops.kernels import _tile
from lifeops.kernels._tile import divide, inside, load_block, prefix_rows, row_mask, row_offset, store_block, strides

MAX_KERNEL = 15  # 225 taps: one fits a byte
LANE_BYTES = 16  # what a lane loads of a token at once


@triton.jit
def _overlap(o_first, size, pad, K: tl.constexpr, COUNT_PAD: tl.constexpr):
    """How many of the K places from ``o_first`` count: those on the grid, with COUNT_PAD also those in its padding."""
    if COUNT_PAD:
        return tl.minimum(o_first + K, size + pad) - o_first
    else:
        return tl.minimum(o_first + K, size) - tl.maximum(o_first, 0)


@triton.jit
def _share(o_row, o_column, m, H, W, ph, pw, KH: tl.constexpr, KW: tl.constexpr, COUNT_PAD: tl.constexpr, ACC: tl.constexpr):
    """One over the number of places that each window counts, (BLOCK_R, 1); where ``m`` is false there is no window."""
    o_places = _overlap(o_row, H, ph, KH, COUNT_PAD) * _overlap(o_column, W, pw, KW, COUNT_PAD)
    o_places = tl.where(m, o_places[:, None], 1).to(ACC)
    if ACC == tl.float64:
        return 1.0 / o_places
    else:
        return tl.div_rn(tl.full(o_places.shape, 1.0, ACC), o_places)


@triton.jit
def _load_largest(p, m, ACC: tl.constexpr):
    """A block in the accumulator's dtype, minus infinity where ``m`` is false."""
    b = tl.load(p, mask=m, other=float("-inf"))
    if b.dtype == tl.bfloat16 and ACC == tl.float32:
        return (b.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return b.to(ACC)


@triton.jit(do_not_specialize=["B", "H", "W", "rows", "columns", "ph", "pw", "x_prefix", "y_prefix", "copied", "tiles",
                               "stride_xb", "stride_xn"])  # fmt: skip
def token_pool_kernel(
    x_ptr, y_ptr,
    B, H, W, rows, columns, ph, pw, x_prefix, y_prefix, copied, tiles, stride_xb, stride_xn,
    C: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    MODE: tl.constexpr, COUNT_PAD: tl.constexpr, X_STRIDE_N: tl.constexpr, ALIGN: tl.constexpr, ACC: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """y (B, y_prefix + rows*columns, C) of one tile; tiles from ``tiles`` on write the prefix rows of BLOCK_R images, those of x for the
    first ``copied`` images (all or none) and zero for the others. MODE "place": the number of the tap that "max" takes.
    """
    BLOCKS_C: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    TAIL: tl.constexpr = C % BLOCK_C != 0
    i_tile = tl.program_id(0) // BLOCKS_C
    o_c = ((tl.program_id(0) % BLOCKS_C) * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    m_c = o_c < C
    stride_xb, x_col = strides(stride_xb, stride_xn, X_STRIDE_N, ALIGN)
    stride_yb = (y_prefix + rows * columns).to(tl.int64) * C
    if i_tile >= tiles:
        o_b = (i_tile - tiles) * BLOCK_R + tl.arange(0, BLOCK_R)
        p_x = x_ptr + ((o_b.to(tl.int64) * stride_xb)[:, None] + o_c)
        p_y = y_ptr + ((o_b.to(tl.int64) * stride_yb)[:, None] + o_c)
        prefix_rows(p_x, None, p_y, row_mask(o_b, copied, m_c, TAIL), row_mask(o_b, B, m_c, TAIL), y_prefix, x_col, 0, C, ACC)
    else:
        o_b, o_n = divide(i_tile * BLOCK_R + tl.arange(0, BLOCK_R), rows * columns)
        o_r, o_q = divide(o_n, columns)
        o_row, o_column = o_r * SH - ph, o_q * SW - pw
        m_y = row_mask(o_b, B, m_c, TAIL)
        p_x = x_ptr + (row_offset(o_b, x_prefix + o_row * W + o_column, stride_xb, x_col)[:, None] + o_c)
        x_row = W.to(tl.int64) * x_col
        b_y = tl.full([BLOCK_R, BLOCK_C], 0.0 if MODE == "avg" else float("-inf"), ACC)
        o_tap = tl.maximum(-o_row, 0) * KW + tl.maximum(-o_column, 0)  # the first one on the grid
        b_tap = tl.zeros([BLOCK_R, BLOCK_C], tl.int32) + o_tap[:, None]
        for i in tl.range(KH):
            m_row = inside(o_row + i, H) & m_y
            for k in tl.static_range(KW):
                m = m_row & inside(o_column + k, W)
                if MODE == "avg":
                    b_y += load_block(p_x + k * x_col, m, True, ACC)
                else:
                    b_x = _load_largest(p_x + k * x_col, m, ACC)
                    if MODE == "place":
                        m_new = (b_x > b_y) | (b_x != b_x)
                        b_tap = tl.where(m_new, i * KW + k, b_tap)
                        b_y = tl.where(m_new, b_x, b_y)
                    else:
                        b_y = tl.maximum(b_y, b_x, propagate_nan=tl.PropagateNan.ALL)
            p_x += x_row
        if MODE == "avg":
            b_y *= _share(o_row, o_column, inside(o_b, B), H, W, ph, pw, KH, KW, COUNT_PAD, ACC)
        p_y = y_ptr + (row_offset(o_b, y_prefix + o_n, stride_yb, C)[:, None] + o_c)
        if MODE == "place":
            tl.store(p_y, b_tap.to(tl.uint8), mask=m_y)
        else:
            store_block(p_y, b_y, m_y, True)


@triton.jit(do_not_specialize=["B", "H", "W", "rows", "columns", "ph", "pw", "dy_prefix", "dx_prefix", "copied", "tiles",
                               "stride_dyb", "stride_dyn"])  # fmt: skip
def token_pool_bwd_kernel(
    dy_ptr, place_ptr, dx_ptr,
    B, H, W, rows, columns, ph, pw, dy_prefix, dx_prefix, copied, tiles, stride_dyb, stride_dyn,
    C: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    COUNT_PAD: tl.constexpr, DY_STRIDE_N: tl.constexpr, ALIGN: tl.constexpr, ACC: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dx (B, dx_prefix + H*W, C) of one tile, prefix rows as above: a token's share of every window that it lies in. ``place_ptr``
    (B, rows*columns, C) is None for the mean.
    """
    BLOCKS_C: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    TAIL: tl.constexpr = C % BLOCK_C != 0
    i_tile = tl.program_id(0) // BLOCKS_C
    o_c = ((tl.program_id(0) % BLOCKS_C) * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    m_c = o_c < C
    stride_dyb, dy_col = strides(stride_dyb, stride_dyn, DY_STRIDE_N, ALIGN)
    stride_dxb = (dx_prefix + H * W).to(tl.int64) * C
    if i_tile >= tiles:
        o_b = (i_tile - tiles) * BLOCK_R + tl.arange(0, BLOCK_R)
        p_dy = dy_ptr + ((o_b.to(tl.int64) * stride_dyb)[:, None] + o_c)
        p_dx = dx_ptr + ((o_b.to(tl.int64) * stride_dxb)[:, None] + o_c)
        prefix_rows(p_dy, None, p_dx, row_mask(o_b, copied, m_c, TAIL), row_mask(o_b, B, m_c, TAIL), dx_prefix, dy_col, 0, C, ACC)
    else:
        o_b, o_n = divide(i_tile * BLOCK_R + tl.arange(0, BLOCK_R), H * W)
        o_r, o_q = divide(o_n, W)
        # the last window over each token, and the token's tap in it
        o_u, o_v = (o_r + ph) // SH, (o_q + pw) // SW
        o_i, o_k = o_r + ph - o_u * SH, o_q + pw - o_v * SW
        p_dy = dy_ptr + (row_offset(o_b, dy_prefix + o_u * columns + o_v, stride_dyb, dy_col)[:, None] + o_c)
        dy_row = columns.to(tl.int64) * dy_col
        p_place = None
        if place_ptr is not None:
            p_place = place_ptr + (row_offset(o_b, o_u * columns + o_v, (rows * columns).to(tl.int64) * C, C)[:, None] + o_c)
        b_dx = tl.zeros([BLOCK_R, BLOCK_C], ACC)
        for t in tl.range((KH + SH - 1) // SH):
            m_row = inside(o_u - t, rows) & inside(o_i + t * SH, KH) & inside(o_b, B)
            for s in tl.static_range((KW + SW - 1) // SW):
                m_window = m_row & inside(o_v - s, columns) & inside(o_k + s * SW, KW)
                m = m_window
                if TAIL:
                    m = m & m_c
                b_dy = load_block(p_dy - (t * dy_row + s * dy_col), m, True, ACC)
                if place_ptr is None:
                    b_share = _share((o_u - t) * SH - ph, (o_v - s) * SW - pw, m_window, H, W, ph, pw, KH, KW, COUNT_PAD, ACC)
                    b_dx = tl.fma(b_dy, tl.broadcast_to(b_share, b_dx.shape), b_dx)
                else:
                    b_place = tl.load(p_place - (t * columns + s).to(tl.int64) * C, mask=m, other=255).to(tl.int32)
                    b_dx += tl.where(b_place == ((o_i + t * SH) * KW + o_k + s * SW)[:, None], b_dy, 0.0)
        p_dx = dx_ptr + (row_offset(o_b, dx_prefix + o_n, stride_dxb, C)[:, None] + o_c)
        store_block(p_dx, b_dx, row_mask(o_b, B, m_c, TAIL), True)


def _common(t, tokens, prefix, copy_prefix, kernel, stride, padding):
    """(number of programs, the arguments that both kernels name alike) of a pass over B * ``tokens`` of the result; t is what it reads."""
    B, _, C = t.shape
    each = LANE_BYTES // t.element_size()
    block_c = _tile.block_of_channels(C, 32 * each)
    block_r = _tile.WARPS * 32 * each // block_c
    tiles, prefix_tiles = -(-B * tokens // block_r), -(-B // block_r) if prefix else 0
    arguments = dict(
        B=B, ph=padding[0], pw=padding[1], copied=B if copy_prefix else 0, tiles=tiles, C=C, KH=kernel[0], KW=kernel[1],
        SH=stride[0], SW=stride[1], ALIGN=_tile.alignment(C, *t.stride()[:2]), ACC=_tile.accumulator(t.dtype),
        BLOCK_R=block_r, BLOCK_C=block_c,
    )  # fmt: skip
    return (tiles + prefix_tiles) * -(-C // block_c), arguments


def pool_launch(x, y, mode, H, W, rows, columns, x_prefix, y_prefix, copy_prefix, kernel, stride, padding, count_pad):
    """(number of programs, arguments) of ``token_pool_kernel``."""
    programs, arguments = _common(x, rows * columns, y_prefix, copy_prefix, kernel, stride, padding)
    align = arguments["ALIGN"]
    return programs, arguments | dict(
        x_ptr=x, y_ptr=y, H=H, W=W, rows=rows, columns=columns, x_prefix=x_prefix, y_prefix=y_prefix, MODE=mode, COUNT_PAD=count_pad,
        stride_xb=x.stride(0) // align, stride_xn=x.stride(1) // align, X_STRIDE_N=_tile.common_stride(x.stride(1), x.shape[2]),
    )  # fmt: skip


def bwd_launch(dy, place, dx, H, W, rows, columns, dy_prefix, dx_prefix, copy_prefix, kernel, stride, padding, count_pad):
    """(number of programs, arguments) of ``token_pool_bwd_kernel``."""
    programs, arguments = _common(dy, H * W, dx_prefix, copy_prefix, kernel, stride, padding)
    align = arguments["ALIGN"]
    return programs, arguments | dict(
        dy_ptr=dy, place_ptr=place, dx_ptr=dx, H=H, W=W, rows=rows, columns=columns, dy_prefix=dy_prefix, dx_prefix=dx_prefix,
        COUNT_PAD=count_pad, stride_dyb=dy.stride(0) // align, stride_dyn=dy.stride(1) // align,
        DY_STRIDE_N=_tile.common_stride(dy.stride(1), dy.shape[2]),
    )  # fmt: skip


def token_pool(x, mode, Kh, Kw, H, W, P, sh, sw, ph, pw, prefix, ceil_mode, count_include_pad, backend):
    kernel = Kh, Kw
    rows, columns = filtered_grid("token_pool", H, W, kernel, (sh, sw), (ph, pw), ceil_mode)
    y_prefix = 0 if prefix == "drop" else P
    y = torch.empty((x.shape[0], y_prefix + rows * columns, x.shape[2]), dtype=x.dtype, device=x.device)
    place = H, W, rows, columns, P, y_prefix, prefix == "keep", kernel, (sh, sw), (ph, pw), count_include_pad
    programs, arguments = pool_launch(x, y, mode, *place)
    _tile.launch(token_pool_kernel, programs, y, arguments)
    return y


def token_pool_bwd(dy, x, mode, Kh, Kw, H, W, P, sh, sw, ph, pw, prefix, ceil_mode, count_include_pad, backend):
    kernel = Kh, Kw
    rows, columns = filtered_grid("token_pool_bwd", H, W, kernel, (sh, sw), (ph, pw), ceil_mode)
    around = kernel, (sh, sw), (ph, pw), count_include_pad
    won = None
    if mode == "max":
        won = torch.empty((dy.shape[0], rows * columns, dy.shape[2]), dtype=torch.uint8, device=dy.device)
        programs, arguments = pool_launch(x, won, "place", H, W, rows, columns, P, 0, False, *around)
        _tile.launch(token_pool_kernel, programs, won, arguments)
    dx = torch.empty((dy.shape[0], P + H * W, dy.shape[2]), dtype=dy.dtype, device=dy.device)
    place = H, W, rows, columns, 0 if prefix == "drop" else P, P, prefix == "keep"
    programs, arguments = bwd_launch(dy, won, dx, *place, *around)
    _tile.launch(token_pool_bwd_kernel, programs, dx, arguments)
    return dx


def supports(problem) -> list[str]:
    return _tile.unsupported(problem, token_pool_kernel) + _tile.too_large((problem.Kh, problem.Kw), MAX_KERNEL)


registry.register("token_pool", "triton", token_pool, supports=supports, priority=10)
registry.register("token_pool_bwd", "triton", token_pool_bwd, supports=supports, priority=10)

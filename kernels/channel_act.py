"""The channel passes in Triton: one reading of the sequences each; sums go through partial sums that are added in a fixed order."""

import torch
import triton
import triton.language as tl

from lifeops import registry
from lifeops.kernels import _tile
from lifeops.kernels._activations import activate, derivative
from lifeops.kernels._sums import moments, row_sums
from lifeops.kernels._tile import load_block, per_channel, row_offset, store_block
from lifeops.ops.channel.act import accumulate_dtype

ROWS = 4  # tokens of a tile; a tile is 4 x 64 to 4 x 256 values, 8 per thread at most
SUM_TOKENS = 64  # tokens of one partial sum: fixed, so that results do not depend on the GPU


@triton.jit(do_not_specialize=["tiles", "patches", "lead", "x_first", "dy_first", "stride_xb", "stride_xn", "stride_db", "stride_dn",
                               "stride_rb", "stride_rn"])  # fmt: skip
def channel_map_kernel(
    x_ptr, dy_ptr, scale_ptr, shift_ptr, gate_ptr, pool_ptr, a_ptr, b_ptr, residual_ptr, y_ptr,
    tiles, patches, lead, x_first, dy_first, stride_xb, stride_xn, stride_db, stride_dn, stride_rb, stride_rn,
    C: tl.constexpr, ACT: tl.constexpr, ACC: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """y of ROWS tokens: f(v) gate + residual, or with dy its gradient. The first ``lead`` rows of y are the residual's."""
    BLOCKS_C: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    o_c = ((tl.program_id(0) % BLOCKS_C) * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    m_c = o_c < C
    i_tile = tl.program_id(0) // BLOCKS_C
    i_b = (i_tile // tiles).to(tl.int64)
    o_n = (i_tile % tiles) * ROWS + tl.arange(0, ROWS)
    m_y = (o_n < lead + patches)[:, None] & m_c
    m_x = (o_n >= lead)[:, None] & m_y
    b_scale = per_channel(scale_ptr, o_c, m_c, 1.0, ACC)
    b_x = load_block(x_ptr + row_offset(i_b, x_first + o_n - lead, stride_xb, stride_xn)[:, None] + o_c, m_x, True, ACC)
    b_v = b_scale * b_x + per_channel(shift_ptr, o_c, m_c, 0.0, ACC)
    if dy_ptr is None:
        b_y = activate(b_v, ACT)
        if gate_ptr is not None:
            b_y = b_y * load_block(gate_ptr + i_b * C + o_c, m_c, True, ACC)
        if residual_ptr is not None:
            b_y = tl.where(m_x, b_y, 0.0)
            b_y += load_block(residual_ptr + row_offset(i_b, o_n, stride_rb, stride_rn)[:, None] + o_c, m_y, True, ACC)
    else:
        b_y = load_block(dy_ptr + row_offset(i_b, dy_first + o_n, stride_db, stride_dn)[:, None] + o_c, m_x, True, ACC)
        if gate_ptr is not None:
            b_y = b_y * load_block(gate_ptr + i_b * C + o_c, m_c, True, ACC)
        if pool_ptr is not None:
            b_y = b_y + load_block(pool_ptr + i_b * C + o_c, m_c, True, ACC)
        b_y = b_scale * (b_y * derivative(b_v, ACT)) + per_channel(a_ptr, o_c, m_c, 0.0, ACC)
        if b_ptr is not None:
            b_y += load_block(b_ptr + o_c, m_c, True, ACC) * b_x
    store_block(y_ptr + row_offset(i_b, o_n, (lead + patches).to(tl.int64) * C, C)[:, None] + o_c, b_y, m_y, True)


@triton.jit(do_not_specialize=["parts", "patches", "x_first", "dy_first", "stride_xb", "stride_xn", "stride_db", "stride_dn"])
def channel_sums_kernel(
    x_ptr, dy_ptr, scale_ptr, shift_ptr, partial_ptr, parts, patches, x_first, dy_first, stride_xb, stride_xn, stride_db, stride_dn,
    C: tl.constexpr, SUMS: tl.constexpr, ACT: tl.constexpr, ACC: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Partial sums (B, parts, SUMS, C) over TOKENS tokens: SUMS 1 the pool, 5 the backward sums, 3 the statistics: k = f of the
    part's first token (0 where it is not finite), the sum of f - k and m2 of f. Each row of the tile joins its values one by one, then
    the rows are joined (csrc/cpu/moments.h says why).
    """
    BLOCKS_C: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    o_c = ((tl.program_id(0) % BLOCKS_C) * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    m_c = o_c < C
    i_part = tl.program_id(0) // BLOCKS_C
    i_b = (i_part // parts).to(tl.int64)
    first = (i_part % parts) * TOKENS
    b_scale, b_shift = per_channel(scale_ptr, o_c, m_c, 1.0, ACC), per_channel(shift_ptr, o_c, m_c, 0.0, ACC)
    b_zero = tl.zeros([ROWS, BLOCK_C], dtype=ACC)
    acc = (b_zero,) * SUMS
    if SUMS == 3:
        b_first = activate(load_block(x_ptr + row_offset(i_b, x_first + first, stride_xb, stride_xn) + o_c, m_c, True, ACC), ACT)
        b_first = tl.where(b_first - b_first == 0.0, b_first, 0.0)
    for i in range(0, TOKENS, ROWS):
        o_n = first + i + tl.arange(0, ROWS)
        m = (o_n < patches)[:, None] & m_c
        b_x = load_block(x_ptr + row_offset(i_b, x_first + o_n, stride_xb, stride_xn)[:, None] + o_c, m, True, ACC)
        if SUMS == 3:
            n = tl.full([], 1.0 / ROWS, ACC) * i  # values that each row has seen
            b_d = activate(b_x, ACT) - b_first
            b_gap = b_d - acc[1] * tl.where(n > 0.0, 1.0 / tl.maximum(n, 1.0), 0.0)
            acc = (acc[0], acc[1] + tl.where(m, b_d, 0.0), acc[2] + tl.where(m, b_gap * b_gap * (n / (n + 1.0)), 0.0))
        else:
            b_v = b_scale * b_x + b_shift
            b_f = tl.where(m, activate(b_v, ACT), 0.0)
            if SUMS == 1:
                acc = (acc[0] + b_f,)
            else:
                b_dy = load_block(dy_ptr + row_offset(i_b, dy_first + o_n, stride_db, stride_dn)[:, None] + o_c, m, True, ACC)
                b_df = tl.where(m, derivative(b_v, ACT), 0.0)
                acc = (acc[0] + b_dy * b_f, acc[1] + b_dy * b_df, acc[2] + b_dy * b_df * b_x, acc[3] + b_df, acc[4] + b_df * b_x)
    if SUMS == 3:
        b_n = ((patches - first - tl.arange(0, ROWS) + ROWS - 1) // ROWS).to(ACC)[:, None]
        b_n = tl.minimum(tl.maximum(b_n, 0.0), TOKENS // ROWS)
        b_gap = acc[1] - b_n * (tl.sum(acc[1], 0) / tl.sum(b_n, 0))[None, :]
        acc = (acc[0], acc[1], acc[2] + b_gap * b_gap / tl.maximum(b_n, 1.0))
    o_c = tl.reshape(o_c, [BLOCK_C])
    for k in tl.static_range(SUMS):
        b_sum = tl.sum(acc[k], 0)
        if SUMS == 3 and k == 0:
            b_sum = tl.reshape(b_first, [BLOCK_C])
        tl.store(partial_ptr + (i_part.to(tl.int64) * SUMS + k) * C + o_c, b_sum, mask=o_c < C)


def _place(t, patches):
    """Strides and the row of the first patch."""
    return (0, 0, 0) if t is None else (*t.stride()[:2], t.shape[1] - patches)


def _map(x, dy, scale, shift, gate, pool_grad, a, b, residual, act, patches):
    (B, _, C), lead = x.shape, 0 if residual is None else residual.shape[1] - patches
    y = x.new_empty((B, lead + patches, C))
    values = map(_tile.contiguous, (scale, shift, gate, pool_grad, a, b))
    (xb, xn, x_first), (db, dn, dy_first), (rb, rn, _) = (_place(t, patches) for t in (x, dy, residual))
    block_c, tiles = _tile.block_of_channels(C, 256), -(-(lead + patches) // ROWS)
    names = "scale_ptr", "shift_ptr", "gate_ptr", "pool_ptr", "a_ptr", "b_ptr"
    arguments = dict(
        x_ptr=x, dy_ptr=dy, **dict(zip(names, values, strict=True)), residual_ptr=residual, y_ptr=y,
        tiles=tiles, patches=patches, lead=lead, x_first=x_first, dy_first=dy_first, stride_xb=xb, stride_xn=xn, stride_db=db, stride_dn=dn,
        stride_rb=rb, stride_rn=rn, C=C, ACT=act, ACC=_tile.accumulator(x.dtype), ROWS=ROWS, BLOCK_C=block_c,
    )  # fmt: skip
    _tile.launch(channel_map_kernel, B * tiles * -(-C // block_c), y, arguments)
    return y


def _sums(x, dy, scale, shift, act, patches, sums):
    """Partial sums (B, parts, sums, C)."""
    (B, _, C), parts = x.shape, -(-patches // SUM_TOKENS)
    partial = torch.empty((B, parts, sums, C), dtype=accumulate_dtype(x.dtype), device=x.device)
    (xb, xn, x_first), (db, dn, dy_first) = (_place(t, patches) for t in (x, dy))
    block_c = _tile.block_of_channels(C, 128)
    arguments = dict(
        x_ptr=x, dy_ptr=dy, scale_ptr=_tile.contiguous(scale), shift_ptr=_tile.contiguous(shift), partial_ptr=partial,
        parts=parts, patches=patches, x_first=x_first, dy_first=dy_first, stride_xb=xb, stride_xn=xn, stride_db=db, stride_dn=dn,
        C=C, SUMS=sums, ACT=act, ACC=_tile.accumulator(x.dtype), ROWS=ROWS, TOKENS=SUM_TOKENS, BLOCK_C=block_c,
    )  # fmt: skip
    _tile.launch(channel_sums_kernel, B * parts * -(-C // block_c), x, arguments)
    return partial


def channel_stats_parts(x, act, patches):
    """Statistics (B, parts, 3, C) of SUM_TOKENS tokens each, see channel_sums_kernel."""
    return _sums(x, None, None, None, act, patches, 3)


def channel_stats(x, act, patches, backend):
    return moments(channel_stats_parts(x, act, patches), patches, 1, SUM_TOKENS, 1)


def channel_act(x, scale, shift, gate, residual, act, patches, backend):
    return _map(x, None, scale, shift, gate, None, None, None, residual, act, patches)


def channel_act_pool(x, scale, shift, act, patches, backend):
    return row_sums(_sums(x, None, scale, shift, act, patches, 1))[0]


def channel_act_sums(dy, x, scale, shift, act, patches, backend):
    return row_sums(_sums(x, dy, scale, shift, act, patches, 5))


def channel_act_grad(dy, x, scale, shift, gate, pool_grad, a, b, act, patches, backend):
    return _map(x, dy, scale, shift, gate, pool_grad, a, b, None, act, patches)


def supports(problem) -> list[str]:
    return _tile.unsupported(problem, channel_map_kernel, 0)


for _fn in (channel_stats, channel_act, channel_act_pool, channel_act_sums, channel_act_grad):
    registry.register(_fn.__name__, "triton", _fn, supports=supports, priority=10)

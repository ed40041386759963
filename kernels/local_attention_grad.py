"""Attention of local_attention in Triton, backward: three kernels without atomics, so that every sum has one fixed order.

    p = exp(s - lse)    ds = p (dp - D)    dq = scale ds k    dk = scale dsᵀ q    dv = dropout(p)ᵀ dy    dmask = sum of ds

The dq kernel goes first: it reads dy and the attention anyway and writes D = rowsum(dy * attn), the local term left out. The dk, dv
kernel owns a block of keys, and the mask's gradient, summed over the images and heads that share a mask, a tile of the mask.
"""

import torch
import triton
import triton.language as tl

from lifeops.kernels._attention import (
    LOG2E,
    backward_config,
    dot,
    drop,
    head_base,
    head_seed,
    mask_config,
    read_keys,
    rows,
    scores,
    store_rows,
)
from lifeops.kernels._tile import divide
from lifeops.kernels.local_attention import DTYPES, attention, mask_arguments, precision, run, strides, supports
from lifeops.ops.local_attention.formula import heads
from lifeops.ops.local_attention.spec import register_attention


@triton.jit
def _grad_scores(b_s, b_dp, b_lse, b_delta, o_i, o_j, N, seed, dropout_p, DROPOUT: tl.constexpr):
    """(dropout(p), ds) from scores and dp; a masked score has ds = 0 whatever dp is."""
    b_p = tl.exp2(b_s - b_lse)
    b_dropped = b_p
    if DROPOUT:
        b_dropped = drop(b_p, o_i, o_j, N, seed, dropout_p)
        b_dp = drop(b_dp, o_i, o_j, N, seed, dropout_p)
    return b_dropped, tl.where(b_s == float("-inf"), 0.0, b_p * (b_dp - b_delta))


_UNSPECIALISED = [
    "h", "N", "scale", "dropout_p", "stride_qb", "stride_qh", "stride_qn", "stride_kb", "stride_kh", "stride_kn", "stride_vb", "stride_vh",
    "stride_vn", "stride_yb", "stride_yh", "stride_yn", "stride_ab", "stride_ah", "stride_an", "stride_mb", "stride_mh", "stride_mi",
    "stride_mj", "batches", "shared_heads", "mask_heads",
]  # fmt: skip


@triton.jit(do_not_specialize=_UNSPECIALISED[:23])
def local_attention_bwd_dq_kernel(
    q_ptr, k_ptr, v_ptr, dy_ptr, attn_ptr, lse_ptr, mask_ptr, key_ptr, seed_ptr, dq_ptr, delta_ptr,
    h, N, scale, dropout_p, stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_yb, stride_yh, stride_yn, stride_ab, stride_ah, stride_an, stride_mb, stride_mh, stride_mi, stride_mj,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, ALIGN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq (B, N, h*D) and D (B, h, N) of BLOCK_M queries of one head."""
    i_bh, i_m = divide(tl.program_id(0), tl.cdiv(N, BLOCK_M))
    i_b, i_h = divide(i_bh, h)
    o_i = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    b_q = rows(head_base(q_ptr, i_b, i_h, stride_qb, stride_qh, ALIGN), o_i, N, stride_qn, D, BLOCK_D, ALIGN)
    b_dy = rows(head_base(dy_ptr, i_b, i_h, stride_yb, stride_yh, ALIGN), o_i, N, stride_yn, D, BLOCK_D, ALIGN)
    b_attn = rows(head_base(attn_ptr, i_b, i_h, stride_ab, stride_ah, ALIGN), o_i, N, stride_an, D, BLOCK_D, ALIGN)
    b_delta = tl.sum(b_dy.to(tl.float32) * b_attn.to(tl.float32), 1)
    o_row = i_bh.to(tl.int64) * N + o_i
    tl.store(delta_ptr + o_row, b_delta, mask=o_i < N)
    b_lse = tl.load(lse_ptr + o_row, mask=o_i < N, other=0.0) * LOG2E
    p_k = head_base(k_ptr, i_b, i_h, stride_kb, stride_kh, ALIGN)
    p_v = head_base(v_ptr, i_b, i_h, stride_vb, stride_vh, ALIGN)
    masks = (mask_ptr, head_base(0, i_b, i_h, stride_mb, stride_mh, 1), stride_mi, stride_mj, key_ptr, i_b.to(tl.int64) * N)
    seed = head_seed(seed_ptr, i_bh)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for j in range(0, N, BLOCK_N):
        o_j = j + tl.arange(0, BLOCK_N)
        b_k = rows(p_k, o_j, N, stride_kn, D, BLOCK_D, ALIGN)
        b_v = rows(p_v, o_j, N, stride_vn, D, BLOCK_D, ALIGN)
        b_s = scores(b_q, b_k, o_i[:, None], o_j[None, :], N, scale, *masks, PRECISION)
        b_dp = dot(b_dy, tl.trans(b_v), None, PRECISION)
        _, b_ds = _grad_scores(b_s, b_dp, b_lse[:, None], b_delta[:, None], o_i[:, None], o_j[None, :], N, seed, dropout_p,
                               seed_ptr is not None)  # fmt: skip
        b_k = read_keys(b_k, b_s, mask_ptr is not None)
        acc = dot(b_ds.to(b_k.dtype), b_k, acc, PRECISION)
    store_rows(dq_ptr + i_b.to(tl.int64) * N * h * D + i_h * D, acc * (scale / LOG2E), o_i, N, h * D, D, BLOCK_D)


@triton.jit(do_not_specialize=[n for n in _UNSPECIALISED[:23] if not n.startswith("stride_a")])
def local_attention_bwd_dkv_kernel(
    q_ptr, k_ptr, v_ptr, dy_ptr, lse_ptr, delta_ptr, mask_ptr, key_ptr, seed_ptr, dk_ptr, dv_ptr,
    h, N, scale, dropout_p, stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_yb, stride_yh, stride_yn, stride_mb, stride_mh, stride_mi, stride_mj,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, ALIGN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv (B, N, h*D) of BLOCK_N keys of one head. Scores are transposed: a row is a key."""
    i_bh, i_n = divide(tl.program_id(0), tl.cdiv(N, BLOCK_N))
    i_b, i_h = divide(i_bh, h)
    o_j = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    b_k = rows(head_base(k_ptr, i_b, i_h, stride_kb, stride_kh, ALIGN), o_j, N, stride_kn, D, BLOCK_D, ALIGN)
    b_v = rows(head_base(v_ptr, i_b, i_h, stride_vb, stride_vh, ALIGN), o_j, N, stride_vn, D, BLOCK_D, ALIGN)
    p_q = head_base(q_ptr, i_b, i_h, stride_qb, stride_qh, ALIGN)
    p_dy = head_base(dy_ptr, i_b, i_h, stride_yb, stride_yh, ALIGN)
    masks = (mask_ptr, head_base(0, i_b, i_h, stride_mb, stride_mh, 1), stride_mi, stride_mj, key_ptr, i_b.to(tl.int64) * N)
    seed = head_seed(seed_ptr, i_bh)
    acc_k = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    acc_v = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for i in range(0, N, BLOCK_M):
        o_i = i + tl.arange(0, BLOCK_M)
        o_row = i_bh.to(tl.int64) * N + o_i
        b_lse = tl.load(lse_ptr + o_row, mask=o_i < N, other=0.0) * LOG2E
        b_delta = tl.load(delta_ptr + o_row, mask=o_i < N, other=0.0)
        b_q = rows(p_q, o_i, N, stride_qn, D, BLOCK_D, ALIGN)
        b_dy = rows(p_dy, o_i, N, stride_yn, D, BLOCK_D, ALIGN)
        b_s = scores(b_k, b_q, o_i[None, :], o_j[:, None], N, scale, *masks, PRECISION)
        b_dp = dot(b_v, tl.trans(b_dy), None, PRECISION)
        b_p, b_ds = _grad_scores(b_s, b_dp, b_lse[None, :], b_delta[None, :], o_i[None, :], o_j[:, None], N, seed, dropout_p,
                                 seed_ptr is not None)  # fmt: skip
        acc_v = dot(b_p.to(b_dy.dtype), b_dy, acc_v, PRECISION)
        acc_k = dot(b_ds.to(b_q.dtype), b_q, acc_k, PRECISION)
    o_head = i_b.to(tl.int64) * N * h * D + i_h * D
    store_rows(dk_ptr + o_head, acc_k * (scale / LOG2E), o_j, N, h * D, D, BLOCK_D)
    store_rows(dv_ptr + o_head, acc_v, o_j, N, h * D, D, BLOCK_D)


@triton.jit(do_not_specialize=[n for n in _UNSPECIALISED if not n.startswith("stride_a")])
def local_attention_bwd_mask_kernel(
    q_ptr, k_ptr, v_ptr, dy_ptr, lse_ptr, delta_ptr, mask_ptr, key_ptr, seed_ptr, dmask_ptr,
    h, N, scale, dropout_p, stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_yb, stride_yh, stride_yn, stride_mb, stride_mh, stride_mi, stride_mj, batches, shared_heads, mask_heads,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, ALIGN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of dmask (B or 1, h or 1, N, N), summed over the ``batches`` images and ``shared_heads`` heads that share the mask."""
    i_mask, i_tile = divide(tl.program_id(0), tl.cdiv(N, BLOCK_M) * tl.cdiv(N, BLOCK_N))
    i_m, i_n = divide(i_tile, tl.cdiv(N, BLOCK_N))
    i_first, i_head = divide(i_mask, mask_heads)
    o_i = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_j = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for o_b in range(batches):
        for o_h in range(shared_heads):
            i_b, i_h = i_first + o_b, i_head + o_h
            i_bh = i_b * h + i_h
            masks = (mask_ptr, head_base(0, i_b, i_h, stride_mb, stride_mh, 1), stride_mi, stride_mj, key_ptr, i_b.to(tl.int64) * N)
            seed = head_seed(seed_ptr, i_bh)
            b_q = rows(head_base(q_ptr, i_b, i_h, stride_qb, stride_qh, ALIGN), o_i, N, stride_qn, D, BLOCK_D, ALIGN)
            b_k = rows(head_base(k_ptr, i_b, i_h, stride_kb, stride_kh, ALIGN), o_j, N, stride_kn, D, BLOCK_D, ALIGN)
            b_s = scores(b_q, b_k, o_i[:, None], o_j[None, :], N, scale, *masks, PRECISION)
            b_v = rows(head_base(v_ptr, i_b, i_h, stride_vb, stride_vh, ALIGN), o_j, N, stride_vn, D, BLOCK_D, ALIGN)
            b_dy = rows(head_base(dy_ptr, i_b, i_h, stride_yb, stride_yh, ALIGN), o_i, N, stride_yn, D, BLOCK_D, ALIGN)
            b_dp = dot(b_dy, tl.trans(b_v), None, PRECISION)
            o_row = i_bh.to(tl.int64) * N + o_i
            b_lse = tl.load(lse_ptr + o_row, mask=o_i < N, other=0.0) * LOG2E
            b_delta = tl.load(delta_ptr + o_row, mask=o_i < N, other=0.0)
            _, b_ds = _grad_scores(b_s, b_dp, b_lse[:, None], b_delta[:, None], o_i[:, None], o_j[None, :], N, seed, dropout_p,
                                   seed_ptr is not None)  # fmt: skip
            acc += b_ds
    p_dmask = dmask_ptr + i_mask.to(tl.int64) * N * N + (o_i.to(tl.int64) * N)[:, None] + o_j[None, :]
    tl.store(p_dmask, acc.to(dmask_ptr.dtype.element_ty), mask=(o_i < N)[:, None] & (o_j < N)[None, :])


def backward_arguments(dy, q, k, v, attn, lse, attn_mask, key_mask, seed, scale, dropout_p):
    """(config, arguments all three kernels share, those of the dq kernel alone)."""
    _, h, N, d = q.shape
    config = backward_config(N, d, q.dtype, attn_mask is not None or seed is not None)
    place = strides(q=q, k=k, v=v, y=dy, a=attn)
    own = {"attn_ptr": attn, **{name: place.pop(name) for name in ("stride_ab", "stride_ah", "stride_an")}}
    shared = dict(
        q_ptr=q, k_ptr=k, v_ptr=v, dy_ptr=dy, lse_ptr=lse, delta_ptr=torch.empty_like(lse), h=h, N=N, D=d, BLOCK_M=config.BLOCK_M,
        BLOCK_N=config.BLOCK_N, BLOCK_D=config.BLOCK_D, PRECISION=precision(q.dtype), **place,
        **mask_arguments(attn_mask, key_mask, seed, scale, dropout_p),
    )  # fmt: skip
    return config, shared, own


def mask_launch(q, attn_mask, shared):
    """(number of programs, config, arguments) of ``local_attention_bwd_mask_kernel``."""
    B, h, N, d = q.shape
    config = mask_config(d, q.dtype)
    dmask = torch.empty(attn_mask.shape, dtype=attn_mask.dtype, device=q.device)
    batches, shared_heads = B // attn_mask.shape[0], h // attn_mask.shape[1]
    programs = attn_mask.shape[0] * attn_mask.shape[1] * -(-N // config.BLOCK_M) * -(-N // config.BLOCK_N)
    own = dict(
        dmask_ptr=dmask, batches=batches, shared_heads=shared_heads, mask_heads=attn_mask.shape[1], BLOCK_M=config.BLOCK_M,
        BLOCK_N=config.BLOCK_N,
    )  # fmt: skip
    return programs, config, shared | own


def attention_bwd(dy, q, k, v, attn, lse, attn_mask, key_mask, seed, scale, dropout_p, mask_grad):
    from lifeops import torchlib

    q, k, v = torchlib.contiguous_channels(q, k, v)
    B, h, N, d = q.shape
    dy, attn = heads(dy, h), heads(attn, h)
    config, shared, own = backward_arguments(dy, q, k, v, attn, lse.contiguous(), attn_mask, key_mask, seed, scale, dropout_p)
    dq, dk, dv = (torch.empty((B, N, h * d), dtype=q.dtype, device=q.device) for _ in range(3))
    tiles = B * h * -(-N // config.BLOCK_M)
    run(local_attention_bwd_dq_kernel, tiles, q, config, shared | own | {"dq_ptr": dq})
    run(local_attention_bwd_dkv_kernel, B * h * -(-N // config.BLOCK_N), q, config, shared | {"dk_ptr": dk, "dv_ptr": dv})
    dmask = None
    if mask_grad:
        programs, config, arguments = mask_launch(q, attn_mask, shared)
        run(local_attention_bwd_mask_kernel, programs, q, config, arguments)
        dmask = arguments["dmask_ptr"]
    return *(heads(t, h) for t in (dq, dk, dv)), dmask


register_attention("triton", attention, attention_bwd, supports, DTYPES)

"""Attention of local_attention in Triton, forward. The local term is token_dwconv with the attention as its residual.

A program owns BLOCK_M queries of one head. Up to 256 tokens its scores against all keys are in registers at once: one maximum, one
exp2 per score, nothing rescaled. More tokens stream through blocks of BLOCK_N keys. Results do not depend on the batch.
"""
# ruff: noqa: RUF005  (Triton compiles no starred tuples)

import torch
import triton
import triton.language as tl

from lifeops.kernels import _tile
from lifeops.kernels._attention import (
    LN2,
    LOG2E,
    MAX_DROPOUT_TOKENS,
    MAX_WIDTH,
    dot,
    drop,
    forward_config,
    head_base,
    head_seed,
    read_keys,
    rows,
    scores,
    store_rows,
)  # fmt: skip
from lifeops.kernels._tile import divide
from lifeops.kernels.token_dwconv import MAX_KERNEL

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LEAST_CAPABILITY = (8, 0)  # before it products of matrices go through registers, 64 of which leave the forward pass 7 KB on the stack


@triton.jit
def _all_keys(b_q, k, v, masks, o_i, N, scale, seed, dropout_p, BLOCK_M: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
              KEYS: tl.constexpr, ALIGN: tl.constexpr, MASKED: tl.constexpr, DROPOUT: tl.constexpr,
              PRECISION: tl.constexpr):  # fmt: skip
    """(attention, log2 of the sum) of the queries; keys in whole blocks of 64 and one smaller block behind them."""
    b_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    s = ()
    for j in tl.static_range(0, KEYS, 64):
        o_j = j + tl.arange(0, 64 if KEYS - j >= 64 else KEYS - j)
        b_s = scores(b_q, rows(k[0], o_j, N, k[1], D, BLOCK_D, ALIGN), o_i[:, None], o_j[None, :], N, scale, *masks, PRECISION)
        b_max = tl.maximum(b_max, tl.max(b_s, 1))
        s = s + (b_s,)
    b_max = tl.where(b_max == float("-inf"), 0.0, b_max)
    b_sum = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for j in tl.static_range(0, KEYS, 64):
        o_j = j + tl.arange(0, 64 if KEYS - j >= 64 else KEYS - j)
        b_p = tl.exp2(s[j // 64] - b_max[:, None])
        b_sum += tl.sum(b_p, 1)
        if DROPOUT:
            b_p = drop(b_p, o_i[:, None], o_j[None, :], N, seed, dropout_p)
        b_v = read_keys(rows(v[0], o_j, N, v[1], D, BLOCK_D, ALIGN), s[j // 64], MASKED)
        acc = dot(b_p.to(b_v.dtype), b_v, acc, PRECISION)
    b_sum1 = tl.where(b_sum == 0.0, 1.0, b_sum)
    return acc / b_sum1[:, None], b_max + tl.log2(b_sum1)


@triton.jit
def _stream(b_q, k, v, masks, o_i, N, scale, seed, dropout_p, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, D: tl.constexpr,
            BLOCK_D: tl.constexpr, ALIGN: tl.constexpr, MASKED: tl.constexpr, DROPOUT: tl.constexpr,
            PRECISION: tl.constexpr):  # fmt: skip
    """The same over blocks of BLOCK_N keys, what has been summed rescaled where the maximum grows."""
    b_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for j in range(0, N, BLOCK_N):
        o_j = j + tl.arange(0, BLOCK_N)
        b_s = scores(b_q, rows(k[0], o_j, N, k[1], D, BLOCK_D, ALIGN), o_i[:, None], o_j[None, :], N, scale, *masks, PRECISION)
        b_new = tl.maximum(b_max, tl.max(b_s, 1))
        b_safe = tl.where(b_new == float("-inf"), 0.0, b_new)
        b_p = tl.exp2(b_s - b_safe[:, None])
        b_shrink = tl.exp2(b_max - b_safe)
        b_sum = b_sum * b_shrink + tl.sum(b_p, 1)
        acc = acc * b_shrink[:, None]
        if DROPOUT:
            b_p = drop(b_p, o_i[:, None], o_j[None, :], N, seed, dropout_p)
        b_v = read_keys(rows(v[0], o_j, N, v[1], D, BLOCK_D, ALIGN), b_s, MASKED)
        acc = dot(b_p.to(b_v.dtype), b_v, acc, PRECISION)
        b_max = b_new
    b_safe = tl.where(b_max == float("-inf"), 0.0, b_max)
    b_sum1 = tl.where(b_sum == 0.0, 1.0, b_sum)
    return acc / b_sum1[:, None], b_safe + tl.log2(b_sum1)


@triton.jit(do_not_specialize=["h", "N", "scale", "dropout_p", "stride_qb", "stride_qh", "stride_qn", "stride_kb", "stride_kh",
                               "stride_kn", "stride_vb", "stride_vh", "stride_vn", "stride_mb", "stride_mh", "stride_mi",
                               "stride_mj"])  # fmt: skip
def local_attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, key_ptr, seed_ptr, y_ptr, lse_ptr,
    h, N, scale, dropout_p, stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_mb, stride_mh, stride_mi, stride_mj,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, KEYS: tl.constexpr, ALIGN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """y (B, N, h*D) and lse (B, h, N) of BLOCK_M queries of one head. Strides of q, k, v in units of ALIGN elements."""
    i_bh, i_m = divide(tl.program_id(0), tl.cdiv(N, BLOCK_M))
    i_b, i_h = divide(i_bh, h)
    o_i = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    b_q = rows(head_base(q_ptr, i_b, i_h, stride_qb, stride_qh, ALIGN), o_i, N, stride_qn, D, BLOCK_D, ALIGN)
    k = (head_base(k_ptr, i_b, i_h, stride_kb, stride_kh, ALIGN), stride_kn)
    v = (head_base(v_ptr, i_b, i_h, stride_vb, stride_vh, ALIGN), stride_vn)
    masks = (mask_ptr, head_base(0, i_b, i_h, stride_mb, stride_mh, 1), stride_mi, stride_mj, key_ptr, i_b.to(tl.int64) * N)
    seed = head_seed(seed_ptr, i_bh)
    MASKED: tl.constexpr = mask_ptr is not None
    DROPOUT: tl.constexpr = seed_ptr is not None
    if KEYS > 0:
        acc, b_lse = _all_keys(b_q, k, v, masks, o_i, N, scale, seed, dropout_p, BLOCK_M, D, BLOCK_D, KEYS, ALIGN, MASKED, DROPOUT,
                               PRECISION)  # fmt: skip
    else:
        acc, b_lse = _stream(b_q, k, v, masks, o_i, N, scale, seed, dropout_p, BLOCK_M, BLOCK_N, D, BLOCK_D, ALIGN, MASKED, DROPOUT,
                             PRECISION)  # fmt: skip
    tl.store(lse_ptr + i_bh.to(tl.int64) * N + o_i, b_lse * LN2, mask=o_i < N)
    store_rows(y_ptr + i_b.to(tl.int64) * N * h * D + i_h * D, acc, o_i, N, h * D, D, BLOCK_D)


def strides(**tensors) -> dict:
    """(ALIGN and) the strides of (B, h, N, d) tensors under the kernels' names, in units of ALIGN elements."""
    align = _tile.alignment(*(s for t in tensors.values() for s in t.stride()[:3]))
    names = {f"stride_{name}{dim}": s // align for name, t in tensors.items() for dim, s in zip("bhn", t.stride()[:3], strict=True)}
    return {"ALIGN": align, **names}


def mask_arguments(attn_mask, key_mask, seed, scale, dropout_p) -> dict:
    """What the kernels take for masks and dropout; a dimension of size 1 has stride 0."""
    mb = mh = mi = mj = 0
    if attn_mask is not None:
        mb, mh, mi, mj = (0 if n == 1 else s for n, s in zip(attn_mask.shape, attn_mask.stride(), strict=True))
        attn_mask = attn_mask.view(torch.uint8) if attn_mask.dtype == torch.bool else attn_mask
    return dict(
        mask_ptr=attn_mask, key_ptr=None if key_mask is None else key_mask.contiguous().view(torch.uint8), seed_ptr=seed,
        scale=scale * LOG2E.value, dropout_p=dropout_p, stride_mb=mb, stride_mh=mh, stride_mi=mi, stride_mj=mj,
    )  # fmt: skip


def precision(dtype: torch.dtype) -> str:
    """float32 products in float32: tf32 would miss the library's tolerance. "ieee" says nothing of the other dtypes, and unlike "tf32"
    every architecture takes it.
    """
    return "widened" if dtype == torch.bfloat16 and _tile.interpreted(local_attention_fwd_kernel) else "ieee"


def run(kernel, programs: int, on: torch.Tensor, config, arguments: dict) -> None:
    with _tile.on_device(on, kernel):
        kernel[(programs,)](**arguments, num_warps=config.warps, num_stages=config.stages, enable_fp_fusion=True)


def forward_launch(q, k, v, attn_mask, key_mask, seed, scale, dropout_p, attn, lse):
    """(number of programs, config, arguments) of ``local_attention_fwd_kernel``."""
    B, h, N, d = q.shape
    config = forward_config(N, d, q.dtype, attn_mask is not None or seed is not None)
    arguments = dict(
        q_ptr=q, k_ptr=k, v_ptr=v, y_ptr=attn, lse_ptr=lse, h=h, N=N, D=d, BLOCK_M=config.BLOCK_M, BLOCK_N=config.BLOCK_N,
        BLOCK_D=config.BLOCK_D, KEYS=config.KEYS, PRECISION=precision(q.dtype), **strides(q=q, k=k, v=v),
        **mask_arguments(attn_mask, key_mask, seed, scale, dropout_p),
    )  # fmt: skip
    return B * h * -(-N // config.BLOCK_M), config, arguments


def attention(q, k, v, attn_mask, key_mask, seed, scale, dropout_p):
    from lifeops import torchlib

    q, k, v = torchlib.contiguous_channels(q, k, v)
    B, h, N, d = q.shape
    attn = torch.empty((B, N, h * d), dtype=q.dtype, device=q.device)
    lse = torch.empty((B, h, N), dtype=torch.float32, device=q.device)
    programs, config, arguments = forward_launch(q, k, v, attn_mask, key_mask, seed, scale, dropout_p, attn, lse)
    run(local_attention_fwd_kernel, programs, q, config, arguments)
    return attn, lse


def supports(problem) -> list[str]:
    """Every reason why Triton cannot run ``problem``."""
    reasons = _tile.unsupported(problem, local_attention_fwd_kernel, MAX_KERNEL)
    if problem.dtype != torch.bfloat16:  # which asks for it itself
        reasons += _tile.below(LEAST_CAPABILITY, problem.device, "attention")
    if problem.dtype == torch.float64:
        reasons.append("dtype must be float32, float16 or bfloat16, got torch.float64")
    if problem.d > MAX_WIDTH:
        reasons.append(f"heads must be at most {MAX_WIDTH} wide, got d = {problem.d}")
    if problem.dropout and problem.N > MAX_DROPOUT_TOKENS:
        reasons.append(f"dropout needs N <= {MAX_DROPOUT_TOKENS}, got {problem.N}")
    return reasons

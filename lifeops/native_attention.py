"""The compiled attention with its local term, forward and backward: what ops/local_attention/cpu.py calls where it is built."""

from __future__ import annotations

import torch

from lifeops.native_args import contiguous, isa
from lifeops.ops.channel.act import accumulate_dtype

SCHEMAS = {
    "local_attention": "lifeops_native::local_attention(Tensor q, Tensor k, Tensor v, Tensor? weight, Tensor? bias, Tensor? mask,"
    " Tensor? key_mask, Tensor(a!) y, Tensor(b!)? attn, Tensor(c!)? lse, int H, int W, int P, float scale, int isa) -> ()",
    "local_attention_bwd": "lifeops_native::local_attention_bwd(Tensor dy, Tensor q, Tensor k, Tensor v, Tensor? weight, Tensor attn,"
    " Tensor lse, Tensor? mask, Tensor? key_mask, Tensor(a!) dq, Tensor(b!) dk, Tensor(c!) dv, Tensor(d!)? ds, int H, int W, int P,"
    " float scale, int isa) -> ()",
}


def _columns_together(mask):
    """A mask as the kernel reads it: its columns lie beside each other, everything else may be shared."""
    return mask if mask is None or mask.stride(-1) == 1 or mask.shape[-1] == 1 else mask.contiguous()


def local_attention(q, k, v, weight, bias, attn_mask, key_mask, H, W, P, scale, keep):
    """(y, attn, lse); without ``keep`` the latter two are empty. Channels of q, k and v have stride 1, a floating-point ``attn_mask`` has
    the dtype of the scores.
    """
    B, h, N, d = q.shape
    y = q.new_empty((B, N, h * d))
    apart = keep and weight is not None  # otherwise y is the attention
    attn = q.new_empty(y.shape if apart else (0,))
    lse = q.new_empty((B, h, N) if keep else (0,), dtype=accumulate_dtype(q.dtype))
    local = contiguous(weight), contiguous(bias)
    masks, outputs = (_columns_together(attn_mask), contiguous(key_mask)), (attn if apart else None, lse if keep else None)
    torch.ops.lifeops_native.local_attention(q, k, v, *local, *masks, y, *outputs, H, W, P, scale, isa())
    return y, attn, lse


def local_attention_bwd(dy, q, k, v, weight, attn, lse, attn_mask, key_mask, H, W, P, scale, scores_grad):
    """(dq, dk, dv, the gradient of the scores (B, h, N, N) or None); dy, q, k, v and attn with channels of stride 1."""
    B, h, N, d = q.shape
    grads = [q.new_empty((B, N, h, d)) for _ in range(3)]
    ds = lse.new_empty((B, h, N, N)) if scores_grad else None
    masks = _columns_together(attn_mask), contiguous(key_mask)
    args = dy, q, k, v, contiguous(weight), attn, contiguous(lse), *masks, *grads, ds
    torch.ops.lifeops_native.local_attention_bwd(*args, H, W, P, scale, isa())
    return *(g.transpose(1, 2) for g in grads), ds

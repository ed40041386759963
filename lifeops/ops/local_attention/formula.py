"""Attention in plain PyTorch, forward and backward: the specification behind local_attention, and what runs where no kernel does."""

from __future__ import annotations

import torch

from lifeops.ops.channel.act import accumulate_dtype
from lifeops.ops.full_precision import full_precision

FAR = 2**10  # above it float32's lse is off by more than 3e-5, and its exponential as much


def sequence(t: torch.Tensor) -> torch.Tensor:
    """(B, h, N, d) as (B, N, h*d): a view where heads lie beside each other."""
    return t.transpose(1, 2).flatten(2)


def heads(t: torch.Tensor, h: int) -> torch.Tensor:
    """(B, N, h*d) as (B, h, N, d), a view."""
    return t.unflatten(2, (h, t.shape[2] // h)).transpose(1, 2)


def causal_mask(N: int, device) -> torch.Tensor:
    """(1, 1, N, N) bool: every query sees itself and the tokens before it."""
    return torch.ones((1, 1, N, N), dtype=torch.bool, device=device).tril()


def visible(attn_mask: torch.Tensor) -> torch.Tensor:
    """Where a query may look, bool. NaN does not hide a key: it shows."""
    return attn_mask if attn_mask.dtype == torch.bool else attn_mask != -torch.inf


def in_dtype(attn_mask, dtype):
    """A floating-point mask in ``dtype``, which scores are added up in: float64 beside float32 q is fine. Others as they are."""
    return attn_mask if attn_mask is None or attn_mask.dtype == torch.bool else attn_mask.to(dtype)


def unread(k, v, attn_mask):
    """k and v with zeros where attn_mask hides a key from every query, so that what lies there (NaN) cannot reach a sum."""
    seen = visible(attn_mask).any(-2).unsqueeze(-1)
    return torch.where(seen, k, 0), torch.where(seen, v, 0)


def scores(q, k, attn_mask, key_mask, scale):
    """scale q kᵀ (+ attn_mask), -inf where masked."""
    s = (q @ k.transpose(-1, -2)) * scale
    attn_mask = in_dtype(attn_mask, s.dtype)
    if attn_mask is not None:
        if attn_mask.dtype != torch.bool:
            s = s + attn_mask
        s = torch.where(visible(attn_mask), s, -torch.inf)
    return s if key_mask is None else s.masked_fill(~key_mask[:, None, None], -torch.inf)


def log_sum_exp(s):
    """Of every row; 0 for a row of -inf, of which exp(s - lse) then is 0."""
    lse = s.logsumexp(-1)
    return lse.masked_fill(lse == -torch.inf, 0)


def probabilities(s, lse):
    """exp(s - lse); over their sum where scores lie so far from 0 that lse has no digits left for its logarithm (a row of finfo.min)."""
    p = (s - lse.unsqueeze(-1)).exp()
    total = p.sum(-1, keepdim=True)
    return torch.where((lse.abs() > FAR).unsqueeze(-1) & total.isfinite(), p / total, p)


def kept(s, seed, dropout_p):
    """What dropout multiplies every probability with, drawn from ``seed`` alone."""
    generator = torch.Generator(s.device).manual_seed(int(seed.item()))
    keep = torch.rand(s.shape, generator=generator, device=s.device) >= dropout_p
    return keep.to(s.dtype) / (1 - dropout_p)


def _wide(*tensors):
    return (t.to(accumulate_dtype(t.dtype)) for t in tensors)


def _inputs(q, k, v, attn_mask):
    """q, k, v and the mask as the formulas take them."""
    attn_mask = in_dtype(attn_mask, accumulate_dtype(q.dtype))
    if attn_mask is not None:
        k, v = unread(k, v, attn_mask)
    return *_wide(q, k, v), attn_mask


@full_precision
def attend(q, k, v, attn_mask, key_mask, seed, scale, dropout_p):
    """(attn (B, N, h*d), lse (B, h, N))."""
    dtype = q.dtype
    q, k, v, attn_mask = _inputs(q, k, v, attn_mask)
    s = scores(q, k, attn_mask, key_mask, scale)
    lse = log_sum_exp(s)
    p = probabilities(s, lse)
    if seed is not None:
        p = p * kept(s, seed, dropout_p)
    return sequence((p @ v).to(dtype)).contiguous(), lse


@full_precision
def attend_bwd(dy, q, k, v, attn, lse, attn_mask, key_mask, seed, scale, dropout_p, mask_grad):
    """(dq, dk, dv, dmask or None, in the mask's own dtype and shape); D = rowsum(dy * attn)."""
    dtype, h, mask_like = q.dtype, q.shape[1], attn_mask
    dy, attn = (heads(t, h) for t in _wide(dy, attn))
    q, k, v, attn_mask = _inputs(q, k, v, attn_mask)
    p = probabilities(scores(q, k, attn_mask, key_mask, scale), lse)
    dp, dropped = dy @ v.transpose(-1, -2), p
    if seed is not None:
        keep = kept(p, seed, dropout_p)
        dp, dropped = dp * keep, p * keep
    ds = p * (dp - (dy * attn).sum(-1, keepdim=True))
    grads = (ds @ k) * scale, (ds.transpose(-1, -2) @ q) * scale, dropped.transpose(-1, -2) @ dy
    dmask = ds.sum_to_size(mask_like.shape).to(mask_like.dtype) if mask_grad else None
    return *(by_token(g.to(dtype)) for g in grads), dmask


def by_token(t):
    """(B, h, N, d) laid out as (B, N, h, d) in memory."""
    return t.transpose(1, 2).contiguous().transpose(1, 2)

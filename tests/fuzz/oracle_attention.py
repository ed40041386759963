"""Attention, its gradients and its roll-out as :mod:`fuzz.oracle` has the rest: in plain float64, apart from the library."""

import math

import torch

from fuzz.oracle import Magnitude, none, token_dwconv, token_dwconv_bwd_dx


def _visible(shape, attn_mask, key_mask):
    """Which keys a query sees, (B, h, N, N)."""
    see = torch.ones(shape, dtype=torch.bool)
    if attn_mask is not None:
        see = see & (attn_mask if attn_mask.dtype == torch.bool else attn_mask != -torch.inf)
    return see if key_mask is None else see & key_mask[:, None, None]


def scores(q, k, attn_mask, key_mask, scale):
    see = _visible((*q.shape[:3], q.shape[2]), attn_mask, key_mask)
    s = scale * q @ k.transpose(-1, -2)
    s = s if attn_mask is None or attn_mask.dtype == torch.bool else s + attn_mask
    return torch.where(see, s, -torch.inf), see


def score_sizes(q, k, attn_mask, scale):
    s = abs(scale) * q.abs() @ k.abs().transpose(-1, -2)
    if attn_mask is not None and attn_mask.dtype != torch.bool:
        s = s + torch.where(attn_mask.isinf(), 0, attn_mask.abs())
    return s


def kept(shape, seed, dropout_p):
    """Dropout's factors, drawn from the seed alone."""
    keep = torch.rand(shape, generator=torch.Generator().manual_seed(int(seed.item()))) >= dropout_p
    return keep.double() / (1 - dropout_p)


def heads(t, h):
    return t.unflatten(2, (h, t.shape[2] // h)).transpose(1, 2)


def local_attention(o, q, k, v, weight, bias, attn_mask, key_mask, seed, H, W, P, scale, dropout_p, keep, backend):
    s, see = scores(q, k, attn_mask, key_mask, scale)
    lse = torch.logsumexp(s, -1)
    lse = torch.where(see.any(-1), lse, 0.0)
    p = torch.where(see, (s - lse[..., None]).exp(), 0.0)
    p = p if seed is None else p * kept(p.shape, seed, dropout_p)
    sizes = score_sizes(q, k, attn_mask, scale) if o is Magnitude else None
    if o is Magnitude:
        most = sizes.amax(-1, keepdim=True) if sizes.numel() else sizes
        p, lse = p * (1 + sizes + most), lse.abs() + 1 + (most[..., 0] if sizes.numel() else 0)
    attn = (p @ o.size(v)).transpose(1, 2).flatten(2)
    y = (attn,) if weight is None else token_dwconv(o, v.transpose(1, 2).flatten(2), weight, bias, attn, H, W, P, "zero", "")
    return *y, none(q) if weight is None or not keep else attn, lse if keep else none(lse)


def local_attention_bwd(o, dy, q, k, v, weight, attn, lse, attn_mask, key_mask, seed, H, W, P, scale, dropout_p, mask_grad, backend):
    h = q.shape[1]
    s, see = scores(q, k, attn_mask, key_mask, scale)
    p = torch.where(see, (s - lse[..., None]).exp(), 0.0)
    p = p * (2 + score_sizes(q, k, attn_mask, scale) + lse.abs()[..., None]) if o is Magnitude else p
    keep = 1.0 if seed is None else kept(p.shape, seed, dropout_p)
    dout, attn = heads(o.size(dy), h), heads(o.size(attn), h)
    ds = p * o.less((dout @ o.size(v).transpose(-1, -2)) * keep, (dout * attn).sum(-1, keepdim=True))
    k, q, scale = o.size(k), o.size(q), abs(scale) if o is Magnitude else scale
    dv = (p * keep).transpose(-1, -2) @ dout
    if weight is not None:
        moved = token_dwconv_bwd_dx(o, dy, weight, H, W, P, "zero", "")[0]
        dv = dv + heads(moved, h)
    return scale * ds @ k, scale * ds.transpose(-1, -2) @ q, dv, ds.sum_to_size(attn_mask.shape) if mask_grad else none(q)


# ------------------------------------------------------------------------------------------------ rollout_step


def rollout_rows(q, k, scale, head_fusion, discard_ratio):
    """(fused rows with the smallest entries gone, how close, relatively, an entry comes to the threshold)."""
    a = (scale * q @ k.transpose(-1, -2)).softmax(-1)
    fused = {"mean": lambda t: t.mean(1), "max": lambda t: t.amax(1), "min": lambda t: t.amin(1)}[head_fusion](a)
    dropped = min(math.floor(discard_ratio * q.shape[2] + 1e-9), q.shape[2] - 1)
    if dropped <= 0 or not fused.numel():
        return fused, torch.inf
    ordered = fused.sort(-1).values
    threshold, below = ordered[..., dropped], ordered[..., dropped - 1]
    close = ((threshold - below) / threshold.clamp_min(1e-300)).min().item()
    return torch.where(fused < threshold[..., None], 0.0, fused), close


def rollout_step(o, r, q, k, scale, head_fusion, residual, discard_ratio, backend):
    rows, _ = rollout_rows(q, k, scale, head_fusion, discard_ratio)
    rows = torch.where((r != 0).any(1)[..., None], rows, 0.0)  # a query without weight adds nothing, whatever lies in it
    own = o.size(r)
    if head_fusion != "mean" or discard_ratio > 0:
        own = own / ((1 - residual) * rows.sum(-1) + residual).clamp_min(1e-37)[:, None]
    if o is Magnitude and q.numel():
        own = own * (1 + 2 * score_sizes(q, k, None, scale).amax((1, 3)))[:, None]
    return ((1 - residual) * (own @ rows) + residual * own,)


ORACLES = {f.__name__: f for f in (local_attention, local_attention_bwd, rollout_step)}

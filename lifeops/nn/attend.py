"""Attention over a module's queries, keys and values, with its ``attn_drop`` and, if it has one, its local term."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from lifeops import config, torchlib
from lifeops.nn.embedded_grid import plain
from lifeops.nn.maps import call, to_maps, to_tokens
from lifeops.nn.plain import depthwise, exactly, is_plain
from lifeops.ops.local_attention.formula import causal_mask, sequence
from lifeops.ops.local_attention.function import local_attention

DROPOUT = exactly(nn.Dropout, nn.Identity)
LANES = 16  # at most, of a vector of float32


def attend(module, q, k, v, attn_mask, is_causal, local=None, *, grid, num_prefix_tokens, fused):
    """softmax(q kᵀ / sqrt(d) + attn_mask) v (+ the convolution ``local`` of the values), (B, N, C); q, k, v (B, h, N, d).

    ``fused``: ``attn_drop`` and ``local`` are what the op computes; else each is called where the op cannot stand for it. There are no
    CUDA C++ kernels of it: who asks for them gets the best. Without a local term other devices than the CPU take torch's own attention,
    which measured kernels have yet to beat there.
    """
    if is_causal:
        if attn_mask is not None:
            raise ValueError(f"{type(module).__name__}: attn_mask must be None where is_causal is set")
        attn_mask = causal_mask(q.shape[2], q.device)
    drop = module.attn_drop
    everything = drop.training and getattr(drop, "p", 0.0) >= 1  # which torch's dropout takes, and the op refuses
    if everything or (not fused and not is_plain(drop, DROPOUT)):
        y, own = sequence(_by_layer(drop, q, k, v, attn_mask)), False
    else:
        own = local is not None and fused
        y = _by_op(q, k, v, local if own else None, attn_mask, getattr(drop, "p", 0.0) if drop.training else 0.0, grid, num_prefix_tokens)
    if local is None or own:
        return y
    term = to_tokens(call(f"{type(module).__name__}: local", local, to_maps(sequence(v)[:, num_prefix_tokens:], grid), depthwise))
    return y + F.pad(term, (0, 0, num_prefix_tokens, 0))


def attend_keys(module, q, k, v, *, scale, fused):
    """softmax(scale q kᵀ) v with ``module.attn_drop``, (B, N, C), for q (B, h, N, d) and as many k and v (B, h, N', d) as there are."""
    drop = module.attn_drop
    if (drop.training and getattr(drop, "p", 0.0) >= 1) or (not fused and not is_plain(drop, DROPOUT)):
        return sequence(_by_layer(drop, q, k, v, None, scale))
    dropout_p = getattr(drop, "p", 0.0) if drop.training else 0.0
    return sequence(fused_attention(q, k, v, dropout_p=dropout_p, scale=scale))


def fused_attention(q, k, v, bias=None, dropout_p: float = 0.0, scale: float | None = None):
    """softmax(scale q kᵀ + bias) v, (B, h, n, d), by torch's kernel; a query of NaN gives NaN.

    Without a mask, and for fewer keys than a vector has lanes, torch's on CPU (2.13) takes such a query for one that sees no key, and
    gives 0: a mask of zeros goes with few keys. findings/cpu_attention_nan_of_few_keys.sh.
    """
    if bias is None and q.device.type == "cpu" and not torchlib.captured() and 0 < k.shape[-2] < LANES:
        bias = q.new_zeros((*(1 for _ in q.shape[:-1]), k.shape[-2]))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout_p, scale=scale)


def attend_tokens(q, k, v, scale: float, bias=None):
    """softmax(scale q kᵀ + bias) v as tokens (B, N, h d), for q, k and v (B, h, N, d); ``bias`` (1 or W, h, N, N) of all or of each of
    the W windows of an image.

    On CPU by :func:`lifeops.local_attention` without a local term: windows, and heads of a few hundred tokens, take 0.5 to 0.8 of the
    time that torch's attention takes, with a gradient of ``bias`` and without.
    """
    if bias is not None:
        bias = bias.to(q.dtype)
        bias = bias if bias.shape[0] == 1 else bias.repeat(q.shape[0] // bias.shape[0], 1, 1, 1)
    return _by_op(q, k.to(q.dtype), v.to(q.dtype), None, bias, 0.0, plain((1, q.shape[2])), 0, scale)


def _by_op(q, k, v, local, attn_mask, drop, grid, num_prefix_tokens, scale=None):
    request = config.requested_backend("local_attention", None)
    if local is None and q.device.type != "cpu" and request in ("", "cuda"):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, dropout_p=drop, scale=scale).transpose(1, 2).flatten(2)
    parameters = (None, None) if local is None else (local.weight, local.bias)
    place = {"grid": grid, "num_prefix_tokens": num_prefix_tokens, "backend": "" if request == "cuda" else None}
    return local_attention(q, k, v, *parameters, scale=scale, attn_mask=attn_mask, dropout_p=drop, **place)


def _by_layer(drop, q, k, v, attn_mask, scale=None):
    """With the probabilities (B, h, N, N) written out and ``drop`` called on them."""
    s = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if attn_mask is not None:
        s = s.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else s + attn_mask
        nothing = (s == -torch.inf).all(-1, keepdim=True)
        return drop(s.masked_fill(nothing, 0).softmax(-1).masked_fill(nothing, 0).to(v.dtype)) @ v
    return drop(s.softmax(-1).to(v.dtype)) @ v


def split_heads(qkv, num_heads: int, parts: int = 3):
    """q, k, v (B, h, N, d), views of a projection (B, N, 3 h d) (two of ``parts`` 2): their gradients are joined by one copy."""
    return (t.transpose(1, 2) for t in qkv.unflatten(2, (parts, num_heads, -1)).unbind(2))


def attend_biased(q, k, v, bias, scale: float):
    """softmax(scale q kᵀ + bias) v, (B, h, n, d) of any numbers of queries and keys, or (B, W, h, n, d) in W windows of every image;
    ``bias`` (1 or W, h, n, n) broadcasts to their scores, or is None.

    Where a gradient of ``bias`` is asked for the scores are written out: torch's fused attention has none on CPU, and takes longer.
    """
    if bias is None or not (torch.is_grad_enabled() and bias.requires_grad):
        return _attend_fused(q, k, v, bias, scale)
    scores = (q * scale) @ k.transpose(-1, -2)
    bias = bias.to(scores.dtype)
    # what a transform batches alone cannot be added in place
    scores = scores + bias if torch._C._are_functorch_transforms_active() else scores.add_(bias)
    return scores.softmax(-1).to(v.dtype) @ v


def _attend_fused(q, k, v, bias, scale):
    """By torch's kernel, which takes four dimensions of everything and composes, twice as slowly, of what has three or five:
    findings/cpu_attention_three_dimensional_mask.sh.
    """
    images = q.shape[:-3]
    if len(images) == 2:
        q, k, v = (t.flatten(0, 1) for t in (q, k, v))
        bias = bias if bias is None else bias.expand(*images, *bias.shape[1:]).flatten(0, 1)
    y = fused_attention(q, k, v, bias, scale=scale)
    return y.unflatten(0, images) if len(images) == 2 else y

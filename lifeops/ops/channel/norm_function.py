"""Batch norm of the patch rows of a sequence as one autograd Function over the channel ops; prefix rows pass untouched.

    y[b, P + p, c] = gamma (x[b, P + p, c] - mean) rstd + beta        rstd = 1 / sqrt(var + eps), statistics over B and the patches

Kept for backward: x and per-channel values. Backward: batch_norm.py.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from lifeops import torchlib
from lifeops.ops.channel import act as rows
from lifeops.ops.channel.batch_norm import Affine, affine_of, merge, norm_backward

_stats, _act, _sums, _grad = map(torchlib.caller, (rows.stats_op, rows.act_op, rows.sums_op, rows.grad_op))
_once = torchlib.once_differentiable("batch norm", "for one, use torch.func, under which the layers are called one by one")


class Config(NamedTuple):
    """What is not a tensor. ``group``: the process group whose statistics are shared, or None."""

    patches: int
    eps: float
    group: Any
    backend: str


def _patches(t, cfg: Config):
    return t[:, t.shape[1] - cfg.patches :]


def _behind(prefix, patch_rows):
    """``patch_rows`` behind the prefix rows of a sequence that is as long or longer."""
    P = prefix.shape[1] - patch_rows.shape[1]
    return torch.cat((prefix[:, :P], patch_rows), 1) if P else patch_rows


class TokenBatchNorm(torch.autograd.Function):
    """(y, mean, unbiased variance) of x (B, P + patches, C) by the statistics of its patches; gamma and beta (C,). Differentiable once."""

    @staticmethod
    def forward(ctx, cfg: Config, x, gamma, beta):
        n, patches = x.shape[0] * cfg.patches, _patches(x, cfg)
        mean, m2 = _stats(patches, "none", cfg.patches, cfg.backend)
        if cfg.group is not None:
            mean, m2, n = merge(mean, m2, n, cfg.group)
        affine, unbiased = affine_of(mean, m2 / n, gamma, beta, cfg.eps), m2 / max(1, n - 1)
        ctx.cfg, ctx.n, ctx.dtypes = cfg, n, (gamma.dtype, beta.dtype)
        ctx.save_for_backward(x, *affine, gamma, beta)
        ctx.mark_non_differentiable(mean, unbiased)
        return _behind(x, _act(patches, affine.scale, affine.shift, None, None, "none", cfg.patches, cfg.backend)), mean, unbiased

    @staticmethod
    @_once
    def backward(ctx, dy, *_):
        x, *affine = ctx.saved_tensors[:5]
        cfg, affine = ctx.cfg, Affine(*affine)
        g, patches = _patches(dy, cfg), _patches(x, cfg)
        _, dshift, dscale, _, _ = _sums(g, patches, None, None, "none", cfg.patches, cfg.backend).sum(1)
        dgamma, dbeta, a, b = norm_backward(affine, dscale, dshift, True, ctx.n, cfg.group)
        dx = None
        if ctx.needs_input_grad[1]:
            dx = _behind(dy, _grad(g, patches, affine.scale, None, None, None, a, b, "none", cfg.patches, cfg.backend))
        grads = None, dx, dgamma.to(ctx.dtypes[0]), dbeta.to(ctx.dtypes[1])
        return tuple(grad if need else None for grad, need in zip(grads, ctx.needs_input_grad, strict=True))

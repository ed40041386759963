"""Batch norm as one multiply-add per channel: v = scale * z + shift, statistics over the processes of a group, backward.

With dscale = sum dv z and dshift = sum dv over the n values of a channel that the statistics were taken of:

    dgamma = rstd (dscale - mean dshift)      dbeta = dshift      dz = scale dv + a + b z
    b = -scale rstd dgamma / n                a = -scale dshift / n - b mean
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Affine(NamedTuple):
    """A norm as scale * z + shift, and what its backward needs."""

    scale: torch.Tensor | None = None
    shift: torch.Tensor | None = None
    mean: torch.Tensor | None = None
    rstd: torch.Tensor | None = None


def affine_of(mean, var, gamma, beta, eps) -> Affine:
    """The norm with this mean and (biased) variance, in their dtype."""
    rstd = (var + eps).rsqrt()
    scale = rstd if gamma is None else gamma.to(rstd.dtype) * rstd
    return Affine(scale, -mean * scale if beta is None else torch.addcmul(beta.to(rstd.dtype), mean, scale, value=-1), mean, rstd)


def merge(mean, m2, n, group):
    """Statistics of all processes of ``group`` from each one's (Chan's formula)."""
    world = torch.distributed.get_world_size(group)
    mine = torch.cat((mean, m2, mean.new_tensor([n])))
    every = [torch.empty_like(mine) for _ in range(world)]
    torch.distributed.all_gather(every, mine, group=group)
    means, m2s, counts = torch.stack(every).split((len(mean), len(m2), 1), 1)
    total = counts.sum()
    mean = (means * counts).sum(0) / total
    return mean, m2s.sum(0) + (counts * (means - mean).square()).sum(0), int(total)


def norm_backward(affine: Affine, dscale, dshift, batch, n, group):
    """(dgamma, dbeta, a, b) of one norm."""
    dgamma = affine.rstd * (dscale - affine.mean * dshift)
    if not batch:
        return dgamma, dshift, None, None
    total, total_shift = dgamma, dshift
    if group is not None:
        both = torch.stack((dgamma, dshift))
        torch.distributed.all_reduce(both, group=group)
        total, total_shift = both
    b = -affine.scale * affine.rstd * total / n
    return dgamma, dshift, -affine.scale * total_shift / n - b * affine.mean, b

"""What lifeops is measured against, in one place, as people write it.

``eager``: slice the patches, view them as a map, conv2d, view back, cat the prefix (modules: the authors' code). ``onednn``
(``cudnn`` on a GPU): the bare convolution on a ready channels-last map, a floor without any token handling. ``compiled``:
torch.compile of ``eager``; ``compiled_shifts``: of the unrolled shift-and-add. ``plain_linear``, ``plain_conv1x1``: the ordinary
C -> 3C projection, ``mlp``, ``block``, ``plain``: the plain Transformer's layer, block and model, the price of locality.
``products``: life_qkv without its depth-wise steps, the floor of every way to write it on these products.
``sdpa``: torch's attention without a local term. ``clone``: a copy of the bytes the problem has to move.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F

from bench.problems import Problem

SAME_WORK = ("eager", "compiled", "compiled_shifts", "onednn", "cudnn", "naive", "lifeops_")


def does_same_work(variant: str) -> bool:
    """Whether losing to it is losing; the others compute less."""
    return variant.startswith(SAME_WORK)


def to_map(x: torch.Tensor, p: Problem) -> torch.Tensor:
    """The patches of (B, P + H*W, C) as (B, C, H, W)."""
    return x[:, p.P :].transpose(1, 2).reshape(x.shape[0], x.shape[2], p.H, p.W)


def eager_dwconv(x, w, p: Problem):
    y = F.conv2d(to_map(x, p), w, padding=p.K // 2, groups=w.shape[0])
    return torch.cat((x[:, : p.P], y.flatten(2).transpose(1, 2)), 1)


def shift_and_add(x, w, p: Problem):
    """The unrolled convolution that torch.compile fuses into one kernel: K² shifted multiply-adds on padded maps."""
    half = p.K // 2
    maps = F.pad(x[:, p.P :].unflatten(1, (p.H, p.W)), (0, 0, half, half, half, half))
    taps = w.flatten(1).T
    y = sum(maps[:, i : i + p.H, j : j + p.W] * taps[i * p.K + j] for i in range(p.K) for j in range(p.K))
    return torch.cat((x[:, : p.P], y.flatten(1, 2)), 1)


def attention(q, k, v):
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def naive_rollout(r, q, k):
    """One layer of roll-out as one would write it: softmax(q kᵀ) of all heads, their mean, r times it."""
    matrix = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1).mean(1)
    return (r @ matrix.to(r.dtype) + r) / 2


def mlp(dim: int) -> torch.nn.Module:
    layers = torch.nn.LayerNorm(dim), torch.nn.Linear(dim, 4 * dim), torch.nn.GELU(), torch.nn.Linear(4 * dim, dim)
    return torch.nn.Sequential(*layers)


def compiled(fn):
    """torch.compile of a function, or of a copy of a module; its own buffers survive a second backward through one graph."""
    import torch._functorch.config

    torch._functorch.config.donated_buffer = False
    return torch.compile(copy.deepcopy(fn) if isinstance(fn, torch.nn.Module) else fn)

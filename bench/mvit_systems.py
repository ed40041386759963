"""MViT: the pooling of q, k and v of one qkv projection, and MViTv2-T whole, beside the authors' computation."""

from __future__ import annotations

import torch
from torch import nn

from bench import whole
from bench.case import Case, of_module
from bench.op_systems import _view, _wide
from bench.problems import Problem
from lifeops.geometry import conv_grid
from lifeops.models import mvitv2
from lifeops.nn import PoolingAttention
from lifeops.nn.attend import split_heads
from lifeops.nn.eager_mvit import EagerMaxPool, EagerPoolingAttention, pooled

HEAD, CLASSES = 96, 100


class _Pools(nn.Module):
    """q, k and v (B, h, N', d) of qkv (B, N, 3 h d), pooled and normed."""

    def __init__(self, attention: PoolingAttention, eager: bool):
        super().__init__()
        self.attention, self.eager = attention, eager

    def forward(self, qkv, grid):
        m = self.attention
        if not self.eager:
            return [m._pool(part, t, grid, True)[0] for part, t in zip("qkv", split_heads(qkv, m.num_heads), strict=True)]
        parts = zip("qkv", qkv.reshape(*qkv.shape[:2], 3, m.num_heads, HEAD).permute(2, 0, 3, 1, 4), strict=True)
        return [pooled(t, getattr(m, f"pool_{part}"), getattr(m, f"norm_{part}"), grid, 0)[0] for part, t in parts]


def mvit_pool(p: Problem, compile: bool) -> Case:
    """K: the stride of keys and values (0: as 1); queries keep the grid, or lose every second row where a stage begins (28 x 28)."""
    dtype, heads, grid = getattr(torch, p.dtype), p.C // HEAD, (p.H, p.W)
    stride_q, stride_kv = 2 if p.H == 28 else 1, max(p.K, 1)
    attention = PoolingAttention(p.C, heads, stride_q=stride_q, stride_kv=stride_kv).to(dtype)
    for name in ("qkv", "proj"):  # not run, so they get no gradients
        attention.get_submodule(name).requires_grad_(False)

    def call(m, i):
        return m(_view(i["x"]), grid)

    def draw():
        sizes = [conv_grid(grid, 3, stride) for stride in (stride_q, stride_kv, stride_kv)]
        dy = [torch.randn(p.B, heads, H * W, HEAD).to(dtype) for H, W in sizes]
        return {"x": torch.randn(p.B, p.H * p.W, 3 * p.C).to(dtype), "dy": dy}

    ours, eager = (_Pools(attention, how) for how in (False, True))
    oracle = _wide(eager, call)
    return Case(p, draw, {"lifeops": of_module(ours, call, truth=oracle), "eager": of_module(eager, call, truth=oracle)})


def _authors(parent: nn.Module, name: str, child: nn.Module) -> nn.Module | None:
    """The authors' counterpart of an attention or a shortcut; None for any other module."""
    if isinstance(child, PoolingAttention):
        return EagerPoolingAttention(child)
    if isinstance(child, nn.MaxPool2d) and not isinstance(parent, PoolingAttention):
        return EagerMaxPool(child.kernel_size, child.stride, child.padding)
    return None


def as_authors(model: nn.Module) -> nn.Module:
    """A copy of ``model`` whose attention and shortcuts run as the authors run them."""
    return whole.exchanged(model, _authors)


def mvitv2_tiny(p: Problem, compile: bool) -> Case:
    ours = mvitv2("tiny", img_size=16 * p.H, num_classes=CLASSES).to(getattr(torch, p.dtype)).train(p.mode != "fwd")
    for name, parameter in ours.named_parameters():  # softmax takes what all keys have in common away: their gradient is rounding alone
        parameter.requires_grad_(not name.endswith("norm_k.bias"))
    return whole.case(p, ours, as_authors(ours), CLASSES)


BUILDERS = {"mvit_pool": mvit_pool, "mvitv2_tiny": mvitv2_tiny}

"""Variants of convolutions and poolings that change the grid: stride 2, twice the channels, K = stride on the way back, MViT's q, k, v.

``eager`` is what people write: slice the patches, view them as a map, torch's operator, view back, cat the prefix; for q, k, v once for
each, on the heads as a batch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

import lifeops
from bench.case import Case, Variant
from bench.op_systems import _some_channels, _some_images, tokens
from bench.problems import Problem
from lifeops import registry

HEAD = 32


def _eager(x, p: Problem, call, prefix: int, grid):
    """``call`` on the map of x's patches, behind its prefix rows."""
    map_ = call(x[:, prefix:].transpose(1, 2).reshape(x.shape[0], x.shape[2], *grid))
    patches = map_.flatten(2).transpose(1, 2)
    return torch.cat((x[:, :prefix], patches), 1) if prefix else patches


def _reference(op, *args):
    return registry.ops[op].reference(*args, "")


def _case(p: Problem, ours, eager, reference, *, of: tuple[int, int], to: tuple[int, int], filters: int = 0) -> Case:
    """``ours``, ``eager`` and ``reference`` of (x, w), from grid ``of`` to ``to``; w are so many filters a channel, of a pooling none."""
    dtype = getattr(torch, p.dtype)

    def draw():
        x, dy = tokens(p._replace(H=of[0], W=of[1])), tokens(p._replace(H=to[0], W=to[1]), p.C * max(1, filters))
        return {"x": x, "dy": dy} | ({"w": torch.randn(p.C * filters, 1, p.K, p.K).to(dtype) / p.K} if filters else {})

    def variant(fn, **options):
        return Variant(lambda i: fn(i["x"], i.get("w")), ("x", "w") if filters else ("x",), **options)

    oracle = variant(reference)
    variants = {"lifeops": variant(ours, truth=oracle), "eager": variant(eager, truth=oracle)}
    narrow = [_some_channels(p), _some_images] if filters < 2 else []
    return Case(p, draw, variants, narrow, True, lambda name: p.B * to[0] * to[1] if name == "w" else 1)


def token_dwconv_strided(p: Problem, compile: bool, multiplier: int = 1) -> Case:
    grid, half = (p.H, p.W), p.K // 2
    steps = (*grid, p.P, 2, 2, half, half, "keep")

    def eager(x, w):
        return _eager(x, p, lambda m: F.conv2d(m, w, stride=2, padding=half, groups=m.shape[1]), p.P, grid)

    def ours(x, w):
        return lifeops.token_dwconv(x, w, grid=grid, num_prefix_tokens=p.P, stride=2)

    def reference(x, w):
        return _reference("token_dwconv_strided", x, w, None, *steps)

    return _case(p, ours, eager, reference, of=grid, to=lifeops.conv_grid(grid, p.K, 2), filters=multiplier)


def token_dwconv_multiplied(p: Problem, compile: bool) -> Case:
    """Two output channels for each, as RegionViT goes from stage to stage."""
    return token_dwconv_strided(p, compile, multiplier=2)


def token_dwconv_transpose(p: Problem, compile: bool) -> Case:
    """H and W are the result's."""
    fine, coarse = (p.H, p.W), (p.H // p.K, p.W // p.K)
    steps = (1, *fine, p.P, p.K, p.K, 0, 0, "keep")

    def eager(x, w):
        return _eager(x, p, lambda m: F.conv_transpose2d(m, w, stride=p.K, groups=m.shape[1]), p.P, coarse)

    def ours(x, w):
        return lifeops.token_dwconv_transpose(x, w, grid=coarse, num_prefix_tokens=p.P, stride=p.K)

    return _case(p, ours, eager, lambda x, w: _reference("token_dwconv_transpose", x, w, None, *steps), of=coarse, to=fine, filters=1)


def token_pool(p: Problem, compile: bool) -> Case:
    """The largest of K x K at stride 2."""
    grid, half = (p.H, p.W), p.K // 2
    window = ("max", p.K, p.K, *grid, p.P, 2, 2, half, half, "keep", False, True)

    def eager(x, w):
        return _eager(x, p, lambda m: F.max_pool2d(m, p.K, 2, half), p.P, grid)

    def ours(x, w):
        return lifeops.token_pool(x, p.K, grid=grid, num_prefix_tokens=p.P, stride=2, padding=half)

    to = lifeops.conv_grid(grid, p.K, 2)
    return _case(p, ours, eager, lambda x, w: _reference("token_pool", x, *window), of=grid, to=to)


def pool_qkv(p: Problem, compile: bool) -> Case:
    """MViT's pooling of q (stride 1), k and v (stride K) from one qkv, with 3 x 3 filters that the heads share; outputs side by side."""
    grid, heads, dtype = (p.H, p.W), p.C // HEAD, getattr(torch, p.dtype)
    strides, n = (1, p.K, p.K), p.P + p.H * p.W
    sizes = [p.P + h * w for h, w in (lifeops.conv_grid(grid, 3, s) for s in strides)]

    def draw():
        filters = {f"w{i}": torch.randn(HEAD, 1, 3, 3).to(dtype) / 3 for i in range(3)}
        return {
            "x": torch.randn(p.B, n, 3 * p.C).to(dtype),
            **filters,
            "dy": [torch.randn(p.B, heads, size, HEAD).to(dtype) for size in sizes],
        }

    def parts(x):
        return x.reshape(*x.shape[:2], 3, heads, HEAD).permute(2, 0, 3, 1, 4).unbind(0)

    def ours(i):
        each = zip(parts(i["x"]), (i["w0"], i["w1"], i["w2"]), strides, strict=True)
        return tuple(lifeops.token_dwconv(t, w, grid=grid, num_prefix_tokens=p.P, stride=s) for t, w, s in each)

    def eager(i):
        found = []
        for t, w, s in zip(parts(i["x"]), (i["w0"], i["w1"], i["w2"]), strides, strict=True):
            map_ = t[:, :, p.P :].reshape(-1, *grid, HEAD).permute(0, 3, 1, 2)
            y = F.conv2d(map_.contiguous(), w, stride=s, padding=1, groups=HEAD).flatten(2).transpose(1, 2)
            found.append(torch.cat((t[:, :, : p.P], y.unflatten(0, (-1, heads))), 2))
        return tuple(found)

    reads = ("x", "w0", "w1", "w2")
    oracle = Variant(eager, reads)
    return Case(p, draw, {"lifeops": Variant(ours, reads, truth=oracle), "eager": Variant(eager, reads, truth=oracle)})


BUILDERS = {
    "token_dwconv_strided": token_dwconv_strided, "token_dwconv_multiplied": token_dwconv_multiplied,
    "token_dwconv_transpose": token_dwconv_transpose, "token_pool": token_pool, "pool_qkv": pool_qkv,
}  # fmt: skip

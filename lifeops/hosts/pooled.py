"""Attention whose queries, keys and values are pooled on their grid first (MViTv2): how it is read, and which tokens each one was made of.

    q = norm(pool(W_q x)), k and v alike;  A = softmax(scale q kᵀ + q·R_row + q·R_column);  out = A v, + q where ``residual_pooling``

timm's, and lifeops' own.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lifeops.hosts.heads import Bias, Call, Heads, of_axes
from lifeops.hosts.host import pair
from lifeops.hosts.projections import heads_of, thirds
from lifeops.nn.relative import distances, resized, table_rows

POOLED = frozenset({"qkv", "proj", "pool_q", "pool_k", "pool_v", "norm_q", "norm_k", "norm_v", "rel_pos_h", "rel_pos_w"})
_POOLS = (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d)


class Window(NamedTuple):
    """What one pooled token was made of: (rows, columns) each."""

    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)

    def grid(self, grid: tuple[int, int]) -> tuple[int, int]:
        """Of the pooled tokens."""
        return tuple((n + 2 * p - k) // s + 1 for n, k, s, p in zip(grid, self.kernel, self.stride, self.padding, strict=True))

    def spread(self, r: Tensor, grid: tuple[int, int]) -> Tensor:
        """The weights r (B, R, h*w) of the pooled tokens, each shared alike by those of ``grid`` that its window reads: (B, R, H*W)."""
        if self == Window():
            return r
        rows, columns = (_means(*each, like=r) for each in zip(grid, self.kernel, self.stride, self.padding, strict=True))
        return (rows.T @ r.unflatten(-1, self.grid(grid)) @ columns).flatten(-2)


def _means(size: int, kernel: int, stride: int, padding: int, like: Tensor) -> Tensor:
    """(pooled, size): each row the mean over the places of an axis that a window reads, without its padding."""
    first = torch.arange((size + 2 * padding - kernel) // stride + 1, device=like.device)[:, None] * stride - padding
    place = torch.arange(size, device=like.device)
    inside = ((place >= first) & (place < first + kernel)).to(like.dtype)
    return inside / inside.sum(1, keepdim=True)


def window_of(op: str, path: str, pool: nn.Module | None) -> Window:
    """ValueError for what is no plain convolution or pooling."""
    if pool is None:
        return Window()
    plain = type(pool) in _POOLS and not isinstance(pool.padding, str) and not getattr(pool, "ceil_mode", False)
    if not plain or pair(getattr(pool, "dilation", 1)) != (1, 1):
        raise ValueError(f"{op}: {path} pools by {pool}, looked for Conv2d, MaxPool2d or AvgPool2d without dilation and ceil_mode")
    return Window(pair(pool.kernel_size), pair(pool.stride), pair(pool.padding))


class PoolWindows(NamedTuple):
    """Those of the queries, of keys and values, and of the skip connection beside the attention."""

    queries: Window
    keys: Window
    skip: Window


def pool_windows(op: str, path: str, block: nn.Module, attention: nn.Module) -> PoolWindows:
    q, k, v = (window_of(op, f"{path}.pool_{name}", getattr(attention, f"pool_{name}")) for name in "qkv")
    if k != v:
        raise ValueError(f"{op}: {path} pools its keys by {k} and its values by {v}, looked for the same windows")
    return PoolWindows(q, k, window_of(op, f"{path}, its skip connection,", getattr(block, "shortcut_pool_attn", None)))


def prefix_of(attention: nn.Module) -> int:
    """How many tokens before the patches are not pooled."""
    return int(getattr(attention, "num_prefix_tokens", getattr(attention, "has_cls_token", 0)))


# ------------------------------------------------------------------------------------------------ reading


def matches(module: nn.Module) -> bool:
    return all(hasattr(module, name) for name in ("pool_q", "pool_k", "pool_v", "norm_q", "norm_k", "norm_v", "residual_pooling"))


def _pool(module: nn.Module, name: str, t: Tensor, grid: tuple[int, int]) -> tuple[Tensor, tuple[int, int]]:
    """t (b, h, P + H*W, d) pooled and normed, and its grid."""
    pool, norm, P = getattr(module, f"pool_{name}"), getattr(module, f"norm_{name}"), prefix_of(module)
    if pool is not None:
        maps = pool(t[:, :, P:].flatten(0, 1).transpose(1, 2).unflatten(2, grid))
        grid = tuple(maps.shape[2:])
        t = torch.cat((t[:, :, :P], maps.flatten(2).transpose(1, 2).unflatten(0, t.shape[:2])), 2)
    return (t if norm is None else norm(t)), grid


def _relative(module: nn.Module, q: Tensor, q_grid: tuple[int, int], k_grid: tuple[int, int]) -> Bias:
    """The product of a patch's query with a vector per row distance and one per column distance; nothing for other tokens."""
    P, width = prefix_of(module), q_grid[1]
    resize = getattr(module, "rel_pos_resize", None)  # timm's models do not resize
    tables = []
    for table, queries, keys in zip((module.rel_pos_h, module.rel_pos_w), q_grid, k_grid, strict=True):
        table = table if resize is None else resized(table, table_rows(queries, keys), resize)
        tables.append(table.to(q.dtype)[distances(queries, keys, q.device)])

    def bias(rows):
        at = torch.arange(P + math.prod(q_grid), device=q.device)[rows] - P
        patch = at.clamp_min(0)
        added = of_axes(q[:, :, rows], tables, (patch // width, patch % width))
        return F.pad(added.masked_fill((at < 0)[:, None], 0), (P, 0))

    return bias


def read(call: Call, values: bool) -> Heads:
    module, grid = call.module, call.grid
    q, k, v = (t.unflatten(2, (heads_of(module), -1)).transpose(1, 2) for t in thirds(module, call.x))
    (q, q_grid), (k, k_grid) = _pool(module, "q", q, grid), _pool(module, "k", k, grid)
    v = _pool(module, "v", v, grid)[0] if values else None
    bias = () if getattr(module, "rel_pos_h", None) is None else (_relative(module, q, q_grid, k_grid),)
    first = 0 if getattr(module, "residual_prefix", True) else prefix_of(module)
    return Heads(q, k, v, module.scale, bias, plus_q=first if module.residual_pooling else None)

"""MViT's attention (arXiv 2104.11227, 2112.01526): queries, keys and values pooled on their grid; state-dict keys are the authors'."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from lifeops import geometry
from lifeops.arguments import check_choice, check_factory, check_flags, check_int, check_number
from lifeops.nn.attend import attend_biased, split_heads
from lifeops.nn.grids import GridHolder
from lifeops.nn.inputs import check_input, check_like
from lifeops.nn.plain import is_fused, pool
from lifeops.nn.pooling import pool_tokens, pooled_grid
from lifeops.nn.relative import RESIZES, relative_bias, table_rows
from lifeops.nn.scripting import NotScripted
from lifeops.ops.local_attention.formula import heads
from lifeops.options import Pair, Pooling, Resize
from lifeops.told import ToldInMetadata

MODES = ("conv", "max", "avg", "conv_unshared")


def _pooling(mode: str, width: int, kernel: tuple, stride: tuple, dd: dict) -> nn.Module | None:
    """The layer of one of q, k and v; None for a window of one token at stride 1."""
    if kernel == stride == (1, 1):
        return None
    padding = tuple(k // 2 for k in kernel)
    if mode in ("max", "avg"):
        return (nn.MaxPool2d if mode == "max" else nn.AvgPool2d)(kernel, stride, padding)
    return nn.Conv2d(width, width, kernel, stride, padding, groups=width, bias=False, **dd)


def _by_token(norm: nn.Module, t: torch.Tensor) -> torch.Tensor:
    """``norm`` of tokens, or of heads (B, h, N, d), which the ops leave side by side in memory, (B, N, h, d): read without a copy."""
    if t.dim() == 3:
        return norm(t)
    tokens = t.transpose(1, 2)
    return norm(tokens).transpose(1, 2) if tokens.is_contiguous() else norm(t)


class PoolingAttention(NotScripted, ToldInMetadata):
    """Multi-head attention of pooled queries to pooled keys: (B, P + H*W, dim) tokens to (B, P + H'*W', dim_out), on the queries' grid.

    ``proj(softmax(q kᵀ / sqrt(d) + bias) v + q)`` with q = norm(pool(W_q x)), k and v alike; P prefix tokens are normed, not pooled.
    ``bias[q, k] = q·R_h[row] + q·R_w[row]`` between patches (:mod:`lifeops.nn.relative`) where there are tables; ``+ q`` is residual
    pooling. Norms are LayerNorms of a head's width where a convolution pools, else there are none.

    Args:
        dim, num_heads: C, and the heads of ``dim_out`` (None: dim) channels.
        num_prefix_tokens: P. grid: (H, W) for every call, or None: then ``forward`` must be given it.
        mode: "conv": depth-wise filters shared by the heads; "max", "avg" (zeros of the padding count); "conv_unshared": filters for all
            channels of x, needs ``pool_first``.
        kernel_q, kernel_kv, stride_q, stride_kv: ints or pairs, padding is kernel // 2; (1, 1) at stride 1 is no pooling and no norm.
        pool_first: pool x, then project by three layers q, k, v.
        residual_pooling: add q to the patch rows of what is attended; residual_prefix: to the prefix rows, too (timm's models, and the
            authors' image models).
        rel_pos: the grid (H, W) of x that tables of relative positions are made for, or None: no tables.
        rel_pos_resize: how tables serve another grid: "interpolate" or "middle", see :func:`lifeops.nn.relative.resized`.
        qkv_bias, norm_eps: as usual.

    Raises ValueError where sizes do not fit.
    """

    needs_grid = True
    told = "num_heads", "stride_kv", "residual_pooling", "residual_prefix"

    def __init__(
        self, dim: int, num_heads: int = 8, num_prefix_tokens: int = 0, *, dim_out: int | None = None, grid: tuple[int, int] | None = None,
        mode: Pooling = "conv", kernel_q: int = 3, kernel_kv: int = 3, stride_q: Pair = 1, stride_kv: Pair = 1, pool_first: bool = False,
        residual_pooling: bool = True, residual_prefix: bool = False, rel_pos: tuple[int, int] | None = None,
        rel_pos_resize: Resize = "interpolate", qkv_bias: bool = True, norm_eps: float = 1e-6,
        device: torch.device | str | int | None = None, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        name = "PoolingAttention"
        dim, num_heads = check_int(name, "dim", dim, 1), check_int(name, "num_heads", num_heads, 1)
        dim_out = dim if dim_out is None else check_int(name, "dim_out", dim_out, 1)
        num_prefix_tokens = check_int(name, "num_prefix_tokens", num_prefix_tokens, 0)
        check_choice(name, "mode", mode, MODES), check_choice(name, "rel_pos_resize", rel_pos_resize, RESIZES)
        flags = {"residual_pooling": residual_pooling, "residual_prefix": residual_prefix, "qkv_bias": qkv_bias}
        check_flags(name, pool_first=pool_first, **flags)
        check_number(name, "norm_eps", norm_eps, "finite and not negative", lambda v: v >= 0)
        sizes = {"kernel_q": kernel_q, "kernel_kv": kernel_kv, "stride_q": stride_q, "stride_kv": stride_kv}
        kernel_q, kernel_kv, stride_q, stride_kv = (geometry.pair(name, what, value, 1) for what, value in sizes.items())
        grid, dd = geometry.fixed_grid(name, grid, num_prefix_tokens), check_factory(name, device, dtype)
        if dim_out % num_heads or (pool_first and dim % num_heads):
            raise ValueError(f"{name}: dim and dim_out must be multiples of num_heads {num_heads}, got {dim} and {dim_out}")
        if mode == "conv_unshared" and not pool_first:
            raise ValueError(f"{name}: mode='conv_unshared' needs pool_first=True: its filters are those of x's channels")
        self.dim, self.dim_out, self.num_heads, self.num_prefix_tokens = dim, dim_out, num_heads, num_prefix_tokens
        self.head_dim, self.mode, self.pool_first = dim_out // num_heads, mode, bool(pool_first)
        self.scale = self.head_dim**-0.5
        self.residual_pooling, self.residual_prefix = bool(residual_pooling), bool(residual_prefix and num_prefix_tokens)
        self.stride_kv, self.rel_pos_resize = stride_kv, rel_pos_resize
        for part in "qkv" if pool_first else ("qkv",):
            setattr(self, part, nn.Linear(dim, dim_out * len(part), bias=qkv_bias, **dd))
        width = dim if mode == "conv_unshared" else (dim if pool_first else dim_out) // num_heads
        for part, kernel, stride in (("q", kernel_q, stride_q), ("k", kernel_kv, stride_kv), ("v", kernel_kv, stride_kv)):
            layer = _pooling(mode, width, kernel, stride, dd)
            normed = isinstance(layer, nn.Conv2d)
            setattr(self, f"pool_{part}", layer)
            setattr(self, f"norm_{part}", nn.LayerNorm(width, eps=norm_eps, **dd) if normed else None)
        self.proj = nn.Linear(dim_out, dim_out, **dd)
        self.rel_pos_h, self.rel_pos_w = self._tables(name, rel_pos, dd)
        self.grid_holder = GridHolder(grid)

    def _tables(self, name, rel_pos, dd):
        if rel_pos is None:
            return None, None
        grid = geometry.pair(name, "rel_pos", rel_pos, 1)
        grids = (pooled_grid(layer, grid) for layer in (self.pool_q, self.pool_k))
        rows = [table_rows(queries, keys) for queries, keys in zip(*grids, strict=True)]
        return tuple(nn.Parameter(nn.init.trunc_normal_(torch.empty(n, self.head_dim, **dd), std=0.02)) for n in rows)

    def queries_grid(self, grid: tuple[int, int]) -> tuple[int, int]:
        """(H', W') of the result for tokens of ``grid``."""
        return pooled_grid(self.pool_q, grid)

    def fused_layers(self):
        return [(f"pool_{part}", pool) for part in "qkv" if self._modules.get(f"pool_{part}") is not None]

    # ------------------------------------------------------------------------------------------------ steps

    def _pool(self, part, t, grid, fused):
        """(pooled and normed, its grid)."""
        layer, norm = getattr(self, f"pool_{part}"), getattr(self, f"norm_{part}")
        t, grid = pool_tokens(f"PoolingAttention: pool_{part}", layer, t, grid, self.num_prefix_tokens, fused)
        return (t if norm is None else _by_token(norm, t)), grid

    def pooled_heads(self, x: torch.Tensor, grid: tuple[int, int]):
        """(q, k, v), each (B, h, P + h*w, d), and (their three grids): what an attention map is computed from."""
        fused = is_fused(self)
        if not self.pool_first:
            parts = split_heads(self.qkv(x), self.num_heads)
            return zip(*(self._pool(part, t, grid, fused) for part, t in zip("qkv", parts, strict=True)), strict=True)
        found = []
        for part in "qkv":
            t, new = self._pool(part, x if self.mode == "conv_unshared" else heads(x, self.num_heads), grid, fused)
            t = t if t.dim() == 3 else t.transpose(1, 2).flatten(2)
            found.append((heads(getattr(self, part)(t), self.num_heads), new))
        return zip(*found, strict=True)

    def _attend(self, q, k, v, q_grid, k_grid):
        """softmax(q kᵀ / sqrt(d) + bias) v, (B, h, N, d)."""
        P, bias = self.num_prefix_tokens, None
        if self.rel_pos_h is not None:
            bias = relative_bias(q[:, :, P:], (self.rel_pos_h, self.rel_pos_w), q_grid, k_grid, self.rel_pos_resize)
            bias = F.pad(bias, (P, 0, P, 0)) if P else bias
        return attend_biased(q, k, v, bias, self.scale)

    def forward(self, x: torch.Tensor, grid: tuple[int, int] | None = None) -> torch.Tensor:
        """x (B, P + H*W, dim), grid (H, W) -> (B, P + H'*W', dim_out), H' x W' the queries' grid."""
        name, P = "PoolingAttention", self.num_prefix_tokens
        grid = check_input(name, x, self.dim, self.grid_holder.of(name, grid), P)
        if 0 in grid:
            raise ValueError(f"{name}: grid must have patches, got {grid}")
        check_like(name, "x", x, self.q if self.pool_first else self.qkv)
        (q, k, v), (q_grid, k_grid, v_grid) = self.pooled_heads(x, grid)
        if k_grid != v_grid:
            raise ValueError(f"{name}: keys and values must lie on one grid, pool_k makes {k_grid} and pool_v {v_grid}")
        y = self._attend(q, k, v, q_grid, k_grid)
        if self.residual_pooling:
            whole = self.residual_prefix or P == 0
            y = y + q if whole else torch.cat((y[:, :, :P], y[:, :, P:] + q[:, :, P:]), 2)
        return self.proj(y.transpose(1, 2).flatten(2))

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, num_prefix_tokens={self.num_prefix_tokens}, mode={self.mode!r}"

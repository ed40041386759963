"""MViT's pooling attention as its authors run it: maps copied for each pooling, one operator after another. The baseline, not for use.

A transcription of the computation in github.com/facebookresearch/mvit, not of its code. Here the tables of relative positions must be of
the map's own size, and q is added to the prefix rows as :class:`lifeops.nn.PoolingAttention` is told.
"""

from __future__ import annotations

import torch
from torch import nn

from lifeops.nn.pooling_attention import PoolingAttention


def pooled(t, pool, norm, grid, P):
    """t (B, h, P + H*W, d) by way of contiguous maps."""
    if pool is None:
        return t, grid
    prefix, t = t[:, :, :P], t[:, :, P:]
    B, h, _, d = t.shape
    maps = pool(t.reshape(B * h, *grid, d).permute(0, 3, 1, 2).contiguous())
    t = maps.reshape(B, h, d, -1).transpose(2, 3)
    if P:
        t = torch.cat((prefix, t), 2)
    return (t if norm is None else norm(t)), tuple(maps.shape[2:])


def _rows(queries, keys, device):
    along, stretch = max(queries / keys, 1.0), max(keys / queries, 1.0)
    rows = torch.arange(queries, device=device)[:, None] * stretch - torch.arange(keys, device=device) * along
    return (rows + (keys - 1) * along).long()


class EagerPoolingAttention(nn.Module):
    """The layers of ``ours``, a PoolingAttention that projects first, called as the authors call them."""

    needs_grid = True

    def __init__(self, ours: PoolingAttention):
        super().__init__()
        if ours.pool_first:
            raise ValueError("EagerPoolingAttention: pool_first must be False, got True")
        names = "num_heads", "num_prefix_tokens", "scale", "dim", "dim_out", "residual_pooling", "residual_prefix"
        for name in names:
            setattr(self, name, getattr(ours, name))
        for name in ("qkv", "pool_q", "pool_k", "pool_v", "norm_q", "norm_k", "norm_v", "rel_pos_h", "rel_pos_w", "proj"):
            setattr(self, name, getattr(ours, name))

    def forward(self, x: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """x (B, P + H*W, dim), grid (H, W) -> (B, P + H'*W', dim_out)."""
        (B, N, _), P = x.shape, self.num_prefix_tokens
        q, k, v = self.qkv(x).reshape(B, N, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        q, q_grid = pooled(q, self.pool_q, self.norm_q, grid, P)
        k, k_grid = pooled(k, self.pool_k, self.norm_k, grid, P)
        v, _ = pooled(v, self.pool_v, self.norm_v, grid, P)
        scores = (q * self.scale) @ k.transpose(-2, -1)
        if self.rel_pos_h is not None:
            self._add_positions(scores, q[:, :, P:], q_grid, k_grid)
        y = scores.softmax(-1) @ v
        if self.residual_pooling and (self.residual_prefix or not P):
            y = y + q
        elif self.residual_pooling:
            y[:, :, P:] += q[:, :, P:]
        return self.proj(y.transpose(1, 2).reshape(B, -1, self.dim_out))

    def _add_positions(self, scores, q, q_grid, k_grid):
        P, (rows, columns) = self.num_prefix_tokens, q_grid
        down = self.rel_pos_h[_rows(rows, k_grid[0], q.device)]
        across = self.rel_pos_w[_rows(columns, k_grid[1], q.device)]
        q = q.reshape(*q.shape[:2], rows, columns, -1)
        down = torch.einsum("bhyxd,yid->bhyxi", q, down)
        across = torch.einsum("bhyxd,xjd->bhyxj", q, across)
        patches = scores[:, :, P:, P:]
        added = patches.view(*q.shape[:4], *k_grid) + down[..., :, None] + across[..., None, :]
        scores[:, :, P:, P:] = added.view(patches.shape)


class EagerMaxPool(nn.MaxPool2d):
    """A maximum over contiguous maps: not read by the block around it, which calls it."""

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        return super().forward(maps.contiguous())

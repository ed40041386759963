"""Attention with pooled queries and keys as a map between the grids before and behind it, walked back from the coarser to the finer one.

    Â = (1 - ρ) fuse_h(A) S_k + ρ S_skip

A (Nq, Nk) is the attention of the pooled queries to the pooled keys; S_k (Nk, N) says which tokens a pooled key was made of, S_skip (Nq, N)
which ones the skip connection hands on: the mean over the window that each reads. Rows sum to 1; tokens before the patches are not pooled.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lifeops import torchlib
from lifeops.attention_maps.global_layers import GlobalLayer
from lifeops.attention_maps.protocol import Options, Tokens
from lifeops.hosts.attention import Kind
from lifeops.hosts.heads import Call
from lifeops.hosts.pooled import Window, pool_windows, prefix_of
from lifeops.ops.channel.act import accumulate_dtype
from lifeops.ops.rollout_step import blocks, shares


class PooledLayer(GlobalLayer):
    """``block``: the one around the attention, which holds the skip connection's pooling."""

    def __init__(self, path: str, kind: Kind, call: Call, block: nn.Module):
        super().__init__(path, kind, call, block)
        self.windows, grid, P = pool_windows("rollout", path, block, call.module), call.grid, prefix_of(call.module)
        queries, skip = self.windows.queries.grid(grid), self.windows.skip.grid(grid)
        if queries != skip:
            raise ValueError(f"rollout: {path} makes {queries} queries of a {grid} grid, beside a skip connection of {skip}")
        self.reads, self.gives = Tokens(P, grid), Tokens(P, queries)

    def back(self, r: Tensor, options: Options) -> Tensor:
        [heads], (fusion, residual, discard_ratio, _) = self.heads(), options
        r = r.to(accumulate_dtype(heads.q.dtype))
        own, given = torch.zeros_like(r), r.new_zeros(*r.shape[:2], heads.k.shape[2])
        with torchlib.without_autocast(r):
            for rows in blocks(r.shape[2], heads.q.shape[:2].numel() * heads.k.shape[2]):
                wanted = (r[..., rows] != 0).any(1)[:, None, :, None]
                attention = torch.where(wanted, heads.weights(heads.scores(rows)), 0)
                own[..., rows], shared = shares(r[..., rows], attention, fusion, residual, discard_ratio)
                given += shared
            return self._spread(self.windows.keys, given) + residual * self._spread(self.windows.skip, own)

    def _spread(self, window: Window, r: Tensor) -> Tensor:
        P, grid = self.reads
        return torch.cat((r[..., :P], window.spread(r[..., P:], grid)), -1)

"""Bootstrapping ViTs' agent block as its authors run it: one-hot attention written out. The baseline, not for use.

A transcription of the computation in github.com/zhfeing/Bootstrapping-ViTs-pytorch, not of its code.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lifeops.nn.shared_conv import SharedConvAttention


class EagerSharedConv(nn.Module):
    """Tokens (B, H*W, C), grid (H, W) to (B, H*W, C), with the layers and the offsets of ``ours``."""

    needs_grid = True

    def __init__(self, ours: SharedConvAttention):
        super().__init__()
        self.qkv, self.out, self.offsets = ours._qkv, ours._out, ours.offsets
        self.phi: dict[tuple[int, int], Tensor] = {}

    def one_hot(self, grid: tuple[int, int]) -> Tensor:
        """Φ (N, h N): for every patch and head a one where the head looks."""
        if grid not in self.phi:
            H, W = grid
            phi = torch.zeros(H * W, len(self.offsets), H * W, dtype=self.out.weight.dtype)
            for n in range(H * W):
                for head, (dy, dx) in enumerate(self.offsets):
                    row, column = n // W + dy, n % W + dx
                    if 0 <= row < H and 0 <= column < W:
                        phi[n, head, row * W + column] = 1
            self.phi[grid] = phi.flatten(1)
        return self.phi[grid]

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        B, N, _ = x.shape
        heads = len(self.offsets)
        values = self.qkv.weight.chunk(3)[2].unflatten(0, (heads, -1))
        outputs = self.out.weight.unflatten(1, (heads, -1)).transpose(0, 1)
        weights = torch.bmm(outputs, values)
        y = nn.functional.linear(x, weights.flatten(0, 1)).view(B, N, heads, -1).permute(0, 2, 1, 3).flatten(1, 2)
        return torch.einsum("nm,bmc->bnc", self.one_hot(grid), y) + self.out.bias

"""Curriculum by Smoothing as its authors run it: a frozen depth-wise convolution of the map. The baseline, not for use.

A transcription of the computation in github.com/pairlab/CBS, not of its code, around which tokens are rearranged to maps and back.
"""

from __future__ import annotations

import torch
from torch import nn


class EagerSmoothing(nn.Module):
    """Tokens (B, P + H*W, C), grid (H, W) to (B, P + H'*W', C)."""

    needs_grid = True

    def __init__(self, dim: int, sigma: float, kernel_size: int, num_prefix_tokens: int = 0, padding: int | None = None):
        super().__init__()
        self.num_prefix_tokens = num_prefix_tokens
        places = torch.arange(kernel_size) - (kernel_size - 1) / 2
        square = places[:, None] ** 2 + places[None, :] ** 2
        weight = torch.exp(-square / (2 * sigma**2))
        self.conv = nn.Conv2d(
            dim, dim, kernel_size, padding=kernel_size // 2 if padding is None else padding, groups=dim, bias=False
        ).requires_grad_(False)
        self.conv.weight.copy_((weight / weight.sum()).expand(dim, 1, -1, -1))

    def forward(self, x: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        P = self.num_prefix_tokens
        maps = x[:, P:].transpose(1, 2).reshape(x.shape[0], x.shape[2], *grid)
        y = self.conv(maps).flatten(2).transpose(1, 2)
        return torch.cat((x[:, :P], y), 1) if P else y

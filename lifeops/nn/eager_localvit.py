"""LocalViT's feed-forward as its authors run it: on maps, one torch operator after another. The baseline, not for use.

A transcription of the computation in github.com/ofsoundof/LocalViT, not of its code; the state dict is that of
:class:`lifeops.nn.LocalityFeedForward`. Here prefix tokens may be any number and the grid any rectangle.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from lifeops.nn.grids import GridHolder


class HSwish(nn.Module):
    """x * relu6(x + 3) / 6, three elementwise operators."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * F.relu6(x + 3, inplace=True) / 6


class EagerSELayer(nn.Module):
    """Squeeze and excitation of maps (B, C, H, W)."""

    def __init__(self, channels: int, reduction: int):
        super().__init__()
        width = channels // reduction
        self.fc = nn.Sequential(nn.Linear(channels, width), nn.ReLU(inplace=True), nn.Linear(width, channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        s = F.relu6(self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1)) + 3, inplace=True) / 6
        return x * s[:, :, None, None]


class EagerLocalityFeedForward(nn.Module):
    """x + [0 | conv(map of the patches)] with h-swish and squeeze and excitation."""

    needs_grid = True

    def __init__(self, dim: int, expand_ratio: float = 4.0, reduction: int = 4, num_prefix_tokens: int = 1):
        super().__init__()
        hidden = int(dim * expand_ratio)
        self.num_prefix_tokens = num_prefix_tokens
        self.conv = nn.Sequential(
            nn.Conv2d(dim, hidden, 1, bias=False), nn.BatchNorm2d(hidden), HSwish(),
            nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden, bias=False), nn.BatchNorm2d(hidden), HSwish(),
            EagerSELayer(hidden, reduction), nn.Conv2d(hidden, dim, 1, bias=False), nn.BatchNorm2d(dim),
        )  # fmt: skip
        self.grid_holder = GridHolder()

    def forward(self, x: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """x (B, P + H*W, C), grid (H, W) -> (B, P + H*W, C)."""
        prefix, patches = x[:, : self.num_prefix_tokens], x[:, self.num_prefix_tokens :]
        maps = patches.transpose(1, 2).reshape(x.shape[0], x.shape[2], *grid)
        maps = maps + self.conv(maps)
        return torch.cat((prefix, maps.flatten(2).transpose(1, 2)), 1)

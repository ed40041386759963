"""PVTv2's feed-forward as its authors run it: to a map and back around the convolution. The baseline, not for use.

A transcription of the computation in github.com/whai362/PVT, not of its code; the state dict is that of
:class:`lifeops.nn.ConvFeedForward`. Prefix tokens, which the authors have none of, are cut off around the convolution.
"""

from __future__ import annotations

import torch
from torch import nn

from lifeops.nn.conv_ffn import DWConv


class EagerConvFeedForward(nn.Module):
    """Tokens (B, P + H*W, C), grid (H, W) to (B, P + H*W, C)."""

    needs_grid = True

    def __init__(self, dim: int, mlp_ratio: float = 4.0, num_prefix_tokens: int = 0):
        super().__init__()
        hidden, self.num_prefix_tokens = int(dim * mlp_ratio), num_prefix_tokens
        self.fc1, self.dwconv, self.act, self.fc2 = nn.Linear(dim, hidden), DWConv(hidden, 3), nn.GELU(), nn.Linear(hidden, dim)

    def forward(self, x: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        P, h = self.num_prefix_tokens, self.fc1(x)
        maps = self.dwconv(h[:, P:].transpose(1, 2).reshape(h.shape[0], -1, *grid))
        patches = maps.flatten(2).transpose(1, 2)
        return self.fc2(self.act(torch.cat((h[:, :P], patches), 1) if P else patches))

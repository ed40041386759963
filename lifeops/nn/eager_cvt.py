"""CvT's attention as its authors run it: to a map and back, one torch operator after another. The baseline, not for use.

A transcription of the computation in github.com/microsoft/CvT, not of its code; the state dict is that of
:class:`lifeops.nn.ConvProjectionAttention`. Here prefix tokens may be any number and the grid any rectangle.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import nn

from lifeops.nn.grids import GridHolder


class EagerConvProjectionAttention(nn.Module):
    """Tokens (B, P + H*W, C), grid (H, W) to (B, P + H*W, C)."""

    needs_grid = True

    def __init__(self, dim: int, num_heads: int, num_prefix_tokens: int = 1, method: str = "dw_bn", kernel_size=3, stride_kv=2):
        super().__init__()
        self.num_heads, self.num_prefix_tokens, self.scale = num_heads, num_prefix_tokens, dim**-0.5
        padding = kernel_size // 2

        def convolution(stride):
            conv = nn.Conv2d(dim, dim, kernel_size, stride, padding, groups=dim, bias=False)
            return nn.Sequential(OrderedDict(conv=conv, bn=nn.BatchNorm2d(dim)))

        def average():
            return nn.Sequential(OrderedDict(avg=nn.AvgPool2d(kernel_size, stride_kv, padding, ceil_mode=True)))

        self.conv_proj_q = convolution(1) if method == "dw_bn" else None
        self.conv_proj_k, self.conv_proj_v = (convolution(stride_kv) if method == "dw_bn" else average() for _ in range(2))
        self.proj_q, self.proj_k, self.proj_v, self.proj = (nn.Linear(dim, dim) for _ in range(4))
        self.grid_holder = GridHolder()

    def projected(self, x: torch.Tensor, grid: tuple[int, int]) -> list[torch.Tensor]:
        """What the Linears of q, k and v read."""
        prefix, patches = x[:, : self.num_prefix_tokens], x[:, self.num_prefix_tokens :]
        maps = patches.transpose(1, 2).reshape(x.shape[0], x.shape[2], *grid)
        found = []
        for layer in (self.conv_proj_q, self.conv_proj_k, self.conv_proj_v):
            t = patches if layer is None else layer(maps).flatten(2).transpose(1, 2)
            found.append(torch.cat((prefix, t), 1) if self.num_prefix_tokens else t)
        return found

    def forward(self, x: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        layers = self.proj_q, self.proj_k, self.proj_v
        q, k, v = (
            layer(t).unflatten(2, (self.num_heads, -1)).transpose(1, 2) for t, layer in zip(self.projected(x, grid), layers, strict=True)
        )
        attn = torch.einsum("bhlk,bhtk->bhlt", q, k).mul(self.scale).softmax(-1)
        return self.proj(torch.einsum("bhlt,bhtv->bhlv", attn, v).transpose(1, 2).flatten(2))

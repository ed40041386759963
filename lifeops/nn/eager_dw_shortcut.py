"""The DW shortcut as its authors run it: on maps, one torch operator after another. The baseline, not for use.

A transcription of the computation in github.com/ZTX-100/Efficient_ViT_with_DW, not of its code; the state dict is that of
:class:`lifeops.nn.DWShortcut`. Here prefix tokens may be any number, the grid any rectangle and the kernels several; parallel
kernels have a GELU and a batch norm each, as in the paper's figure. The zeros of the prefix have torch's default dtype, as the
authors', so that a bfloat16 model gets float32 tokens back.
"""

from __future__ import annotations

import torch
from torch import nn


class EagerDWShortcut(nn.Module):
    """block_output + [0 | sum over the kernels of DW_K(BN(GELU(map of the patches)))]."""

    def __init__(self, dim: int, kernel_size: int | tuple[int, ...] = 3, num_prefix_tokens: int = 1):
        super().__init__()
        sizes = (kernel_size,) if isinstance(kernel_size, int) else tuple(kernel_size)
        self.num_prefix_tokens = num_prefix_tokens
        self.gelu = nn.GELU()
        self.convs = nn.ModuleList(nn.Conv2d(dim, dim, k, padding=k // 2, groups=dim) for k in sizes)
        self.batchnorms = nn.ModuleList(nn.BatchNorm2d(dim) for _ in sizes)

    def forward(self, x: torch.Tensor, block_output: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """x, block_output (B, P + H*W, C), grid (H, W) -> (B, P + H*W, C)."""
        B, _, C = x.shape
        y = block_output
        for conv, norm in zip(self.convs, self.batchnorms, strict=True):
            maps = x[:, self.num_prefix_tokens :].transpose(1, 2).reshape(B, C, *grid)
            s = conv(norm(self.gelu(maps))).flatten(2).transpose(1, 2)
            if self.num_prefix_tokens:
                s = torch.cat((torch.zeros(B, self.num_prefix_tokens, C, device=s.device), s), 1)
            y = s + y
        return y

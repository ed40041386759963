"""The DW shortcut folded for inference: what :func:`lifeops.fuse_` leaves of its batch norms, and the merging of parallel kernels.

With v_k = scale_k * g + shift_k on the grid and 0 around it, and sums over the kernels k,

    sum DW_k(v_k) + b_k = DW(sum scale_k W_k)(g) + sum b_k + DW(sum shift_k W_k)(1 on the grid, 0 around it)

The last term does not depend on the input, but on the position: near the border some taps fall outside. A constant bias in its
place is right inside and wrong by O(1) at the border.
"""

from __future__ import annotations

import torch
from torch import nn

from lifeops.nn.batch_norm import constants
from lifeops.ops.channel.act import accumulate_dtype
from lifeops.ops.dw_shortcut.function import border_bias, merged_filter


class ChannelAffine(nn.Module):
    """scale * u + shift per channel: what ``fuse_`` leaves of the batch norm in front of a single kernel."""

    def __init__(self, scale: torch.Tensor, shift: torch.Tensor):
        super().__init__()
        self.scale, self.shift = nn.Parameter(scale), nn.Parameter(shift)

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        """On maps (B, C, H, W)."""
        return (maps * self.scale[:, None, None] + self.shift[:, None, None]).to(maps.dtype)


class BorderBias(nn.Module):
    """What ``fuse_`` leaves of several batch norms: the sum over the kernels of DW_k(shift_k on the grid, 0 around it).

    ``weight`` (C, 1, K, K) is the sum of shift_k * W_k, the smaller kernels centred. Only its taps inside the grid count, so the
    term is a constant inside and another one at every distance from the border.
    """

    def __init__(self, weight: torch.Tensor):
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, grid: tuple[int, int]) -> torch.Tensor:
        """(H*W, C) in the accumulation dtype."""
        weight = self.weight.to(accumulate_dtype(self.weight.dtype))
        if grid[0] * grid[1] == 0:
            return weight.new_zeros(0, len(weight))
        return border_bias([weight], [weight.new_ones(len(weight))], [None], grid)


@torch.no_grad()
def merged(convs, norms):
    """One convolution of the largest size and the module that stands for the norms; sums in float64."""
    affine, like = [constants(norm, torch.float64) for norm in norms], convs[0].weight
    wide = accumulate_dtype(like.dtype)
    if len(convs) == 1:
        return convs[0], ChannelAffine(*(t.to(wide) for t in affine[0])).train(convs[0].training)
    weight, border = (merged_filter([conv.weight for conv in convs], values) for values in zip(*affine, strict=True))
    bias = sum((conv.bias.double() for conv in convs if conv.bias is not None), weight.new_zeros(len(like)))
    K = weight.shape[-1]
    new = nn.Conv2d(len(like), len(like), K, padding=K // 2, groups=len(like), device=like.device, dtype=like.dtype)
    new.weight.copy_(weight)
    new.bias.copy_(bias)
    return new.train(convs[0].training), BorderBias(border.to(wide)).train(convs[0].training)

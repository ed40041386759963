"""Dense relative localisation as its authors run it: on the map, one torch operator after another. The baseline, not for use.

A transcription of the computation in github.com/yhlleo/VTs-Drloc, not of its code, with the rows of a map as long as they are.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lifeops.losses.relative_localization import RelativeLocalizationHead


def eager_relative_localization(
    tokens: Tensor, grid: tuple[int, int], num_prefix_tokens: int, head: RelativeLocalizationHead, pairs: tuple[Tensor, Tensor]
) -> Tensor:
    """Mode "l1" with absolute offsets divided by the grid's sides."""
    maps = tokens[:, num_prefix_tokens:].transpose(1, 2).reshape(len(tokens), -1, *grid)
    features = [collected(maps, points) for points in pairs]
    found = head.layers(torch.cat(features, 1).transpose(1, 2).reshape(-1, 2 * maps.shape[1]))
    offsets = (pairs[0] - pairs[1]).abs().to(found.dtype) / torch.tensor(grid, device=found.device)
    return F.l1_loss(found, offsets.reshape(-1, 2))


def collected(maps: Tensor, points: Tensor) -> Tensor:
    """(B, C, m): the features of the points (B, m, 2), all images side by side."""
    B, C, H, W = maps.shape
    flat = maps.reshape(B, C, -1).permute(1, 0, 2).reshape(C, -1)
    places = points[:, :, 0] * W + points[:, :, 1] + torch.arange(B, device=points.device)[:, None] * H * W
    return flat[:, places.reshape(-1)].view(C, B, -1).permute(1, 0, 2)

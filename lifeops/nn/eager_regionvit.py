"""RegionViT's parts as its authors run them: maps, unfolded into windows and folded back, norms written out. The baseline, not for use.

A transcription of the computation in github.com/IBM/RegionViT, not of its code. Made of the layers of ours.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lifeops.nn.downsampling import LayerNorm2d, TwoGridDownsampling
from lifeops.nn.regional_attention import RegionalAttention, padding_mask


class EagerLayerNorm2d(LayerNorm2d):
    """Mean, variance, quotient and affine map, one operator each."""

    def forward(self, maps: Tensor) -> Tensor:
        mean = maps.mean(1, keepdim=True)
        std = torch.sqrt(maps.var(1, unbiased=False, keepdim=True) + self.eps)
        return (maps - mean) / std * self.weight + self.bias


class EagerRegionalAttention(nn.Module):
    """The layers of ``ours``, with the scores written out and the bias gathered by an index of all pairs."""

    def __init__(self, ours: RegionalAttention):
        super().__init__()
        self.dim, self.num_heads, self.window_size, self.scale = ours.dim, ours.num_heads, ours.window_size, ours.scale
        self.qkv, self.proj, self.rel_pos = ours.qkv, ours.proj, ours.rel_pos
        w = self.window_size
        at = torch.stack(torch.meshgrid(torch.arange(w), torch.arange(w), indexing="ij")).flatten(1)
        rows, columns = (at[:, None] - at[:, :, None] + w // 2) % (2 * w - 1)
        self.index = (rows * (2 * w - 1) + columns).flatten()

    def forward(self, x: Tensor, windows: bool = False, mask: Tensor | None = None) -> Tensor:
        B, N, C = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, self.num_heads, C // self.num_heads).permute(2, 0, 3, 1, 4)
        scores = (q @ k.transpose(-2, -1)) * self.scale
        if windows:
            bias = self.rel_pos[:, self.index.to(x.device)].reshape(self.num_heads, N - 1, N - 1)
            scores[:, :, 1:, 1:] = scores[:, :, 1:, 1:] + bias
        if mask is not None:
            mask = mask.expand(-1, N, N).repeat(B // mask.shape[0], 1, 1)[:, None]
            scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        return self.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(B, N, C))


class EagerTwoGridDownsampling(nn.Module):
    """The layers of ``ours``, the norm exchanged for an :class:`EagerLayerNorm2d`, on maps: to be called on both grids."""

    def __init__(self, ours: TwoGridDownsampling):
        super().__init__()
        norm = EagerLayerNorm2d(ours.dim, ours.proj[0].eps)
        norm.weight, norm.bias = ours.proj[0].weight, ours.proj[0].bias
        self.proj = nn.Sequential(norm, *ours.proj[1:])

    def forward(self, regions: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.proj(regions), self.proj(x)


def _unfolded(regions, x, window):
    """Maps of both grids as windows (B * gh * gw, 1 + window², C)."""
    (C, H, W), (gh, gw) = x.shape[1:], regions.shape[2:]
    x = F.pad(x, (0, gw * window - W, 0, gh * window - H))
    x = F.unfold(x, window, stride=window).transpose(1, 2).reshape(-1, C, window * window).transpose(-2, -1)
    regions = regions.flatten(2).transpose(-2, -1).reshape(-1, 1, C)
    return torch.cat((regions, x), 1)


def _folded(t, images, region_grid, grid, window):
    """The inverse."""
    (gh, gw), C = region_grid, t.shape[-1]
    regions = t[:, :1].reshape(images, -1, C).transpose(-2, -1).reshape(images, C, gh, gw)
    x = t[:, 1:].transpose(1, 2).reshape(images, -1, window * window * C).transpose(1, 2)
    return regions, F.fold(x, (gh * window, gw * window), window, stride=window)[:, :, : grid[0], : grid[1]]


class EagerRegionStage(nn.Module):
    """The layers of ``ours``, a stage of RegionViT, on maps inside; tokens of both grids before and behind it, as views."""

    def __init__(self, ours):
        super().__init__()
        first, *blocks = ours.block
        for block in blocks:
            block.attn = EagerRegionalAttention(block.attn)
        if isinstance(first, TwoGridDownsampling):
            first = EagerTwoGridDownsampling(first)
        self.block, self.peg = nn.ModuleList([first, *blocks]), ours.peg
        self.window_size, self.corner_mask = ours.window_size, ours.corner_mask

    def forward(self, regions: Tensor, region_grid, x: Tensor, grid):
        w, B = self.window_size, x.shape[0]
        regions, x = (t.transpose(1, 2).unflatten(2, g) for t, g in ((regions, region_grid), (x, grid)))
        first, *blocks = self.block
        if isinstance(first, EagerTwoGridDownsampling):
            regions, x = first(regions, x)
        region_grid, grid = tuple(regions.shape[2:]), tuple(x.shape[2:])
        mask, t = padding_mask(region_grid, w, grid, self.corner_mask, x.device), _unfolded(regions, x, w)
        for i, block in enumerate(blocks):
            t = block(t, B, mask)
            if self.peg is not None and i == 0:
                t = _unfolded(*(m + self.peg(m) for m in _folded(t, B, region_grid, grid, w)), w)
        regions, x = _folded(t, B, region_grid, grid, w)
        return regions.flatten(2).transpose(1, 2), region_grid, x.flatten(2).transpose(1, 2), grid

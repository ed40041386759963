"""EdgeViT's block as its authors run it: on maps and back, one torch operator after another. The baseline, not for use.

A transcription of the computation in github.com/saic-fi/edgevit, not of its code; the state dicts are those of
:class:`lifeops.nn.LocalAgg`, :class:`lifeops.nn.GlobalSparseAttention` and the blocks of ``lifeops.models.edgevit``. Here prefix tokens may
be any number and the grid any rectangle of multiples of r.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import nn


def _maps(t: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """(B, H*W, C) to (B, C, H, W)."""
    return t.transpose(1, 2).reshape(t.shape[0], t.shape[2], *grid)


class EagerConvMlp(nn.Module):
    def __init__(self, dim: int, hidden_dim: int):
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Conv2d(dim, hidden_dim, 1), nn.GELU(), nn.Conv2d(hidden_dim, dim, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.act(self.fc1(x)))


class EagerLocalAgg(nn.Module):
    """Tokens (B, P + H*W, C), grid (H, W) to (B, P + H*W, C); between blocks the authors' are maps, as ``on_maps`` takes them."""

    needs_grid = True

    def __init__(self, dim: int, mlp_ratio: float = 4.0, num_prefix_tokens: int = 0):
        super().__init__()
        self.num_prefix_tokens = num_prefix_tokens
        self.pos_embed = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.norm1, self.conv1, self.conv2 = nn.BatchNorm2d(dim), nn.Conv2d(dim, dim, 1), nn.Conv2d(dim, dim, 1)
        self.attn = nn.Conv2d(dim, dim, 5, padding=2, groups=dim)
        self.norm2, self.mlp = nn.BatchNorm2d(dim), EagerConvMlp(dim, int(dim * mlp_ratio))

    def on_maps(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.pos_embed(x)
        x = x + self.conv2(self.attn(self.conv1(self.norm1(x))))
        return x + self.mlp(self.norm2(x))

    def forward(self, x: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        P = self.num_prefix_tokens
        y = self.on_maps(_maps(x[:, P:], grid)).flatten(2).transpose(1, 2)
        return torch.cat((x[:, :P], y), 1) if P else y


class EagerSparseAttention(nn.Module):
    """Tokens (B, P + H*W, C), grid (H, W) to (B, P + H*W, C)."""

    needs_grid = True

    def __init__(self, dim: int, num_heads: int, sr_ratio: int = 1, num_prefix_tokens: int = 0):
        super().__init__()
        self.num_heads, self.sr_ratio, self.num_prefix_tokens, self.scale = (
            num_heads,
            sr_ratio,
            num_prefix_tokens,
            (dim // num_heads) ** -0.5,
        )
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        if sr_ratio > 1:
            self.sampler = nn.AvgPool2d(1, sr_ratio)
            self.LocalProp = nn.ConvTranspose2d(dim, dim, sr_ratio, sr_ratio, groups=dim)
            self.norm = nn.LayerNorm(dim)

    def forward(self, x: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        B, _, C = x.shape
        P, r = self.num_prefix_tokens, self.sr_ratio
        s = x
        if r > 1:
            s = self.sampler(_maps(x[:, P:], grid)).flatten(2).transpose(1, 2)
            s = torch.cat((x[:, :P], s), 1) if P else s
        q, k, v = self.qkv(s).reshape(B, -1, 3, self.num_heads, C // self.num_heads).permute(2, 0, 3, 1, 4)
        y = ((q @ k.transpose(-2, -1)) * self.scale).softmax(-1) @ v
        y = y.transpose(1, 2).reshape(B, -1, C)
        if r > 1:
            t = self.LocalProp(_maps(y[:, P:], (grid[0] // r, grid[1] // r))).reshape(B, C, -1).permute(0, 2, 1)
            y = self.norm(torch.cat((y[:, :P], t), 1) if P else t)
        return self.proj(y)


class EagerSelfAttn(nn.Module):
    """Position, attention and feed-forward: prefix tokens (B, P, C) and maps (B, C, H, W) to tokens."""

    def __init__(self, dim: int, num_heads: int, sr_ratio: int = 1, num_prefix_tokens: int = 0, mlp_ratio: float = 4.0):
        super().__init__()
        self.pos_embed = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn = EagerSparseAttention(dim, num_heads, sr_ratio, num_prefix_tokens)
        hidden = int(dim * mlp_ratio)
        self.mlp = nn.Sequential(OrderedDict(fc1=nn.Linear(dim, hidden), act=nn.GELU(), fc2=nn.Linear(hidden, dim)))

    def forward(self, prefix: torch.Tensor, maps: torch.Tensor) -> torch.Tensor:
        grid, maps = tuple(maps.shape[2:]), maps + self.pos_embed(maps)
        x = maps.flatten(2).transpose(1, 2)
        x = torch.cat((prefix, x), 1) if prefix.shape[1] else x
        x = x + self.attn(self.norm1(x), grid)
        return x + self.mlp(self.norm2(x))


class EagerLGLBlock(nn.Module):
    """Both; tokens (B, P + H*W, C) and grid to tokens. ``contiguous``: the maps are made so first, as the authors' patch embedding does."""

    contiguous = False

    def __init__(self, dim: int, num_heads: int, sr_ratio: int = 1, num_prefix_tokens: int = 0, mlp_ratio: float = 4.0):
        super().__init__()
        self.num_prefix_tokens = num_prefix_tokens
        self.LocalAgg = EagerLocalAgg(dim, mlp_ratio, num_prefix_tokens) if sr_ratio > 1 else None
        self.SelfAttn = EagerSelfAttn(dim, num_heads, sr_ratio, num_prefix_tokens, mlp_ratio)

    def forward(self, x: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        P = self.num_prefix_tokens
        maps = _maps(x[:, P:], grid)
        maps = maps.contiguous() if self.contiguous else maps
        return self.SelfAttn(x[:, :P], maps if self.LocalAgg is None else self.LocalAgg.on_maps(maps))

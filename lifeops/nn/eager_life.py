"""LIFE attention as its authors execute it, in eager PyTorch: the baseline that ``lifeops.nn.LifeAttention`` is timed against.

It follows their order of operations, copies included (patches to a map and back, one concatenation per scale group,
explicit softmax), so that a comparison with it is a comparison with what people run today. Use ``LifeAttention`` to train.
Two things differ: any number of prefix tokens works (they are transposed, a view would scramble more than one), and the
prefix key comes from all three scales unless ``aux_key="scale1"`` asks for the authors' published behaviour.

Source: LIFE (arXiv 2305.08551; Pattern Recognition 2024).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lifeops.geometry import check_tokens, to_grid

AUX_KEYS = ("multiscale", "scale1")


class DepthwiseSeparable(nn.Module):
    """Depth-wise K x K, then point-wise convolution on a map (B, C, H, W), zero 'same' padding, no bias."""

    def __init__(self, dim: int, kernel_size: int):
        super().__init__()
        self.depthwise = nn.Conv2d(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim, bias=False)
        self.pointwise = nn.Conv2d(dim, dim, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.pointwise(self.depthwise(x))


class EagerLifeQKV(nn.Module):
    """Multi-scale queries, keys and values: tokens (B, P + H*W, C) and ``grid`` (H, W) to q, k, v, each (B, P + H*W, C).

    z1 = W1 x + b1, z2 = P2 DW3(z1), z3 = P3 DW5(z2); prefix tokens skip the depth-wise steps. q, k and v are the first,
    second and last third of the channels of z1 | z2 | z3, and then share one LayerNorm if ``qkv_norm``.

    Raises ValueError if ``dim`` is no multiple of 3, ``aux_key`` is unknown or ``x`` does not have P + H*W tokens.
    """

    def __init__(self, dim: int, num_prefix_tokens: int = 1, qkv_norm: bool = False, aux_key: str = "multiscale"):
        super().__init__()
        if dim % 3:
            raise ValueError(f"EagerLifeQKV: dim must be a multiple of 3 (one third per scale), got {dim}")
        if aux_key not in AUX_KEYS:
            raise ValueError(f"EagerLifeQKV: aux_key must be one of {', '.join(map(repr, AUX_KEYS))}, got {aux_key!r}")
        self.num_prefix_tokens, self.aux_key = num_prefix_tokens, aux_key
        self.scale1 = nn.Linear(dim, dim)
        self.scale2 = DepthwiseSeparable(dim, 3)
        self.scale3 = DepthwiseSeparable(dim, 5)
        self.norm = nn.LayerNorm(dim) if qkv_norm else nn.Identity()

    def forward(self, x: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
        P = self.num_prefix_tokens
        g = to_grid("EagerLifeQKV", grid, P)
        check_tokens("EagerLifeQKV", "x", x.shape[1], g.height, g.width, P)
        z1 = self.scale1(x)
        patches = self._patch_scales(z1[:, P:], g.height, g.width)
        prefix = self._prefix_scales(z1[:, :P]) if P else None
        return tuple(self.norm(self._gather(part, patches, prefix)) for part in range(3))

    def _patch_scales(self, z1: Tensor, height: int, width: int) -> list[Tensor]:
        """Patch tokens (B, H*W, C) of the first scale to those of all three."""
        B, _, C = z1.shape
        scale1 = z1.permute(0, 2, 1).reshape(B, C, height, width)
        scale2 = self.scale2(scale1)
        scale3 = self.scale3(scale2)
        return [s.reshape(B, C, height * width).permute(0, 2, 1) for s in (scale1, scale2, scale3)]

    def _prefix_scales(self, z1: Tensor) -> list[Tensor]:
        """Prefix tokens (B, P, C): only the point-wise convolutions apply."""
        B, P, C = z1.shape
        scale1 = z1.transpose(1, 2).reshape(B, C, P, 1)
        scale2 = self.scale2.pointwise(scale1)
        scale3 = self.scale3.pointwise(scale2)
        return [s.reshape(B, C, P).transpose(1, 2) for s in (scale1, scale2, scale3)]

    def _gather(self, part: int, patches: list[Tensor], prefix: list[Tensor] | None) -> Tensor:
        """q (part 0), k (1) or v (2): that third of the channels of every scale, prefix tokens first."""
        third = patches[0].shape[-1] // 3
        channels = slice(part * third, (part + 1) * third)
        out = torch.cat([s[..., channels] for s in patches], dim=-1)
        if prefix is None:
            return out
        if part == 1 and self.aux_key == "scale1":
            prefix = [prefix[0]] * 3
        return torch.cat([torch.cat([s[..., channels] for s in prefix], dim=-1), out], dim=1)


class EagerLifeAttention(nn.Module):
    """Multi-head attention over LIFE's queries, keys and values: tokens (B, P + H*W, C), ``grid`` (H, W) to (B, P + H*W, C)."""

    needs_grid = True

    def __init__(
        self,
        dim: int,
        num_heads: int,
        num_prefix_tokens: int = 1,
        *,
        qkv_norm: bool = False,
        aux_key: str = "multiscale",
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"EagerLifeAttention: dim must be a multiple of num_heads {num_heads}, got {dim}")
        self.num_heads, self.scale = num_heads, (dim // num_heads) ** -0.5
        self.qkv = EagerLifeQKV(dim, num_prefix_tokens, qkv_norm, aux_key)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        B, N, C = x.shape
        qkv = torch.cat(self.qkv(x, grid), dim=-1)
        q, k, v = qkv.reshape(B, N, 3, self.num_heads, C // self.num_heads).permute(2, 0, 3, 1, 4)
        attn = self.attn_drop(((q @ k.transpose(-2, -1)) * self.scale).softmax(dim=-1))
        x = (attn @ v).transpose(1, 2).reshape(B, N, C)
        return self.proj_drop(self.proj(x))

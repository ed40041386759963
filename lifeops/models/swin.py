"""The Swin host of the DW shortcut (arXiv 2407.19394) in its authors' key layout, which is Microsoft's with convs and batchnorms.

A stage is windowed-attention blocks on (B, H*W, C) tokens, each (or every few) with a shortcut on the full-resolution map, then
patch merging. Source: Liu et al., "Swin Transformer: Hierarchical Vision Transformer using Shifted Windows", arXiv 2103.14030.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lifeops.arguments import check_callable
from lifeops.models.blocks import ConvFactory
from lifeops.models.deit import DropPath, Mlp, NormedPatchEmbed
from lifeops.models.inputs import check_rates, check_sizes, check_stages, to_pair
from lifeops.nn.attend import attend_tokens
from lifeops.nn.dense import linears, multiplier
from lifeops.nn.dw_shortcut import ShortcutModule, check_every
from lifeops.nn.inputs import kernel_sizes as check_kernel_sizes
from lifeops.options import Pair


def windows(x: Tensor, size: int) -> Tensor:
    """Maps (B, H, W, C) to windows (B * nW, size * size, C), row-major."""
    B, H, W, C = x.shape
    return x.view(B, H // size, size, W // size, size, C).transpose(2, 3).reshape(-1, size * size, C)


def from_windows(x: Tensor, size: int, H: int, W: int) -> Tensor:
    """The inverse of :func:`windows`."""
    return x.view(-1, H // size, W // size, size, size, x.shape[-1]).transpose(2, 3).reshape(-1, H, W, x.shape[-1])


def relative_position_index(size: int) -> Tensor:
    """(n, n) for n = size * size tokens: the row of the bias table for each pair, by its offset in rows and columns."""
    at = torch.stack(torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")).flatten(1)
    rows, columns = at[:, :, None] - at[:, None, :] + size - 1
    return rows * (2 * size - 1) + columns


def _shift_mask(H: int, W: int, size: int, shift: int) -> Tensor:
    """(nW, n, n): -100 between tokens that a cyclic shift brought into one window from different places."""

    def bands(length):
        return torch.cat([torch.full((n,), i) for i, n in enumerate((length - size, size - shift, shift))])

    regions = windows((3 * bands(H)[:, None] + bands(W))[None, :, :, None], size)[:, :, 0]
    return (regions[:, None] != regions[:, :, None]) * -100.0


class WindowAttention(nn.Module):
    """Attention inside windows with a bias per head and relative position."""

    def __init__(self, dim: int, size: int, num_heads: int, qkv_bias: bool):
        super().__init__()
        self.num_heads, self.scale = num_heads, (dim // num_heads) ** -0.5
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * size - 1) ** 2, num_heads))
        self.register_buffer("relative_position_index", relative_position_index(size))
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)

    def fused_layers(self):
        return linears("qkv", "proj")

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """x (B * nW, n, C), mask (nW, n, n) or None."""
        multiply = multiplier(self)
        q, k, v = multiply(x, self.qkv).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        bias = self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1)[None]  # (1, h, n, n)
        bias = bias if mask is None else bias + mask[:, None].to(bias.dtype)
        return multiply(attend_tokens(q, k, v, self.scale, bias), self.proj)


class WindowedBlock(nn.Module):
    """What blocks with attention in windows, shifted by ``shift`` where the map is larger than one, have in common.

    ``attn``: called as ``attn(size)``, gives the attention for windows of size x size; ``model`` says what does not fit.
    """

    no_rollout = "whose windows are not known there: it reads those of timm's and transformers' Swin"

    def __init__(self, resolution: tuple[int, int], size: int, shift: int, attn: Callable[[int], nn.Module], model: str):
        super().__init__()
        if min(resolution) <= size:
            size, shift = min(resolution), 0
        if any(n % size for n in resolution):
            raise ValueError(f"{model}: every stage's grid must be a multiple of its window {size}, got {resolution}")
        self.resolution, self.size, self.shift = resolution, size, shift
        self.attn = attn(size)
        self.register_buffer("attn_mask", _shift_mask(*resolution, size, shift) if shift else None)

    def windowed(self, x: Tensor) -> Tensor:
        """``attn`` of the tokens x (B, H*W, C) inside their windows."""
        (H, W), s = self.resolution, self.shift
        t = x.unflatten(1, (H, W))
        t = torch.roll(t, (-s, -s), (1, 2)) if s else t
        t = from_windows(self.attn(windows(t, self.size), self.attn_mask), self.size, H, W)
        t = torch.roll(t, (s, s), (1, 2)) if s else t
        return t.flatten(1, 2)


class SwinBlock(WindowedBlock):
    """Pre-norm block. ``conv``: called as ``module(x, resolution)`` on the tokens of the whole map, instead of x + mlp(norm2(x))."""

    def __init__(self, dim, resolution, num_heads, size, shift, mlp_ratio, qkv_bias, drop_path, conv=None):
        super().__init__(resolution, size, shift, lambda size: WindowAttention(dim, size, num_heads, qkv_bias), "SwinTransformer")
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim) if conv is None else None
        self.mlp = Mlp(dim, int(dim * mlp_ratio)) if conv is None else None
        self.conv, self.drop_path = conv, DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.windowed(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x))) if self.conv is None else self.conv(x, self.resolution)


class PatchMerging(nn.Module):
    """Tokens of an (H, W) map to those of an (H/2, W/2) map of twice the width, normalised before the projection or (V2) behind it."""

    def __init__(self, dim: int, resolution: tuple[int, int], model: str = "SwinTransformer", post_norm: bool = False):
        super().__init__()
        if any(n % 2 for n in resolution):
            raise ValueError(f"{model}: the grid of a stage before the last must be even, got {resolution}")
        self.resolution, self.post_norm = resolution, post_norm
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)
        self.norm = nn.LayerNorm((2 if post_norm else 4) * dim)

    def forward(self, x: Tensor) -> Tensor:
        B, (H, W) = x.shape[0], self.resolution
        x = x.view(B, H // 2, 2, W // 2, 2, -1).permute(0, 1, 3, 4, 2, 5).reshape(B, H * W // 4, -1)  # column offset before row offset
        return self.norm(self.reduction(x)) if self.post_norm else self.reduction(self.norm(x))


class SwinStage(ShortcutModule):
    """Blocks, a shortcut around every ``every`` of them (None: none), patch merging."""

    def __init__(
        self, blocks, dim: int, resolution: tuple[int, int], merge: bool, every: int | None, kernel_sizes, grad_checkpointing: bool
    ):
        blocks = list(blocks)
        if every is not None:
            check_every("SwinTransformer", every, len(blocks))
        super().__init__(dim, 0 if every is None else len(blocks) // every, kernel_sizes)
        self.resolution, self.every, self.grad_checkpointing = resolution, every, grad_checkpointing
        self.blocks = nn.ModuleList(blocks)
        self.downsample = PatchMerging(dim, resolution) if merge else None

    def forward(self, x: Tensor) -> Tensor:
        start = x
        for i, block in enumerate(self.blocks, 1):
            x = checkpoint(block, x, use_reentrant=False) if self.grad_checkpointing else block(x)
            if self.every and i % self.every == 0:
                x = start = self.add_shortcut(i // self.every - 1, start, x, self.resolution, 0)
        return x if self.downsample is None else self.downsample(x)


class SwinTransformer(nn.Module):
    """Images (B, in_chans, H, W) to logits (B, num_classes).

    Args:
        depths, num_heads: blocks and heads of each stage. window_size: one number; stages no larger than it have one window.
        every, kernel_sizes: a shortcut around every so many blocks of a stage (None: no shortcuts), its kernel sizes.
        grad_checkpointing: blocks are run again in backward; the shortcuts, which keep next to nothing, are not.
        conv: called as ``conv(dim, mlp_ratio, 0)`` once per block, gives what stands in the place of the second LayerNorm and the MLP
            (:class:`lifeops.nn.LocalityFeedForward`, on the whole map); None: they themselves.

    ``num_classes=0`` leaves the head out: the features (B, C) come out. Raises ValueError where sizes do not fit each other.
    """

    def __init__(
        self, img_size: Pair = 224, patch_size: int = 4, in_chans: int = 3, num_classes: int = 1000, embed_dim: int = 96,
        depths: tuple[int, ...] = (2, 2, 6, 2), num_heads: tuple[int, ...] = (3, 6, 12, 24), window_size: int = 7, mlp_ratio: float = 4.0,
        qkv_bias: bool = True, drop_path_rate: float = 0.0, every: int | None = 1, kernel_sizes: int | tuple[int, ...] = 3,
        grad_checkpointing: bool = False, conv: ConvFactory | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        name = type(self).__name__
        check_sizes(name, in_chans=in_chans, num_classes=num_classes, embed_dim=embed_dim, window_size=window_size)
        check_stages(name, depths=depths, num_heads=num_heads)
        flags = {"qkv_bias": qkv_bias, "grad_checkpointing": grad_checkpointing}
        check_rates(name, mlp_ratio=mlp_ratio, drop=("drop_path_rate", drop_path_rate), **flags)
        check_kernel_sizes(name, "kernel_sizes", kernel_sizes), check_callable(name, "conv", conv)
        if len(depths) != len(num_heads):
            raise ValueError(f"{name}: depths and num_heads must have one number per stage, got {depths} and {num_heads}")
        sizes = to_pair(name, "img_size", img_size), to_pair(name, "patch_size", patch_size)
        self.patch_embed = NormedPatchEmbed(*sizes, in_chans, embed_dim, name)
        rates = iter(torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist())

        def stage(s, depth, heads):
            dim, resolution = embed_dim * 2**s, tuple(n // 2**s for n in self.patch_embed.grid_size)
            if dim % heads:
                raise ValueError(f"{name}: the width {dim} of stage {s} must be a multiple of its {heads} heads")
            shifts = [window_size // 2 * (i % 2) for i in range(depth)]
            sizes = dim, resolution, heads, window_size
            convs = [None if conv is None else conv(dim, mlp_ratio, 0) for _ in shifts]
            parts = zip(shifts, convs, strict=True)
            blocks = [SwinBlock(*sizes, shift, mlp_ratio, qkv_bias, next(rates), feed_forward) for shift, feed_forward in parts]
            return SwinStage(blocks, dim, resolution, s + 1 < len(depths), every, kernel_sizes, grad_checkpointing)

        self.layers = nn.ModuleList(stage(s, *sizes) for s, sizes in enumerate(zip(depths, num_heads, strict=True)))
        width = embed_dim * 2 ** (len(depths) - 1)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, num_classes) if num_classes else nn.Identity()
        for m in self.modules():
            if isinstance(m, nn.Linear):
                nn.init.trunc_normal_(m.weight, std=0.02)
                if m.bias is not None:
                    nn.init.zeros_(m.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x)
        for stage in self.layers:
            x = stage(x)
        return self.head(self.norm(x).mean(1))

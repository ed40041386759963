"""RegionViT (arXiv 2106.02689): a coarse grid of regions beside the grid of patches; state-dict keys are the authors'."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lifeops.arguments import check_choice, check_flags, check_tensor, under
from lifeops.models.deit import DropPath, Mlp
from lifeops.models.inputs import check_images, check_rates, check_sizes, check_stages, to_pair
from lifeops.nn.downsampling import LayerNorm2d, TwoGridDownsampling
from lifeops.nn.maps import on_patches
from lifeops.nn.plain import depthwise, is_fused
from lifeops.nn.regional_attention import CORNER_MASKS, RegionalAttention, padding_mask
from lifeops.nn.scripting import NotScripted
from lifeops.ops.token_dwconv.public import token_dwconv
from lifeops.options import CornerMask, Pair, Stem
from lifeops.told import ToldInMetadata

STEMS = ("3conv", "1conv")


def to_windows(regions: Tensor, region_grid, x: Tensor, grid, window: int) -> Tensor:
    """Tokens of the regions (B, gh * gw, C) and of the patches (B, H * W, C) as windows (B * gh * gw, 1 + window², C), the region's token
    first; zeros where the map ends before the windows do, below and on the right.
    """
    (gh, gw), (H, W) = region_grid, grid
    maps = F.pad(x.unflatten(1, grid), (0, 0, 0, gw * window - W, 0, gh * window - H))
    inside = maps.unflatten(2, (gw, window)).unflatten(1, (gh, window)).transpose(2, 3).flatten(3, 4).flatten(0, 2)
    return torch.cat((regions.flatten(0, 1)[:, None], inside), 1)


def from_windows(t: Tensor, region_grid, grid, window: int) -> tuple[Tensor, Tensor]:
    """The inverse of :func:`to_windows`: (regions, patches)."""
    regions = t[:, 0].unflatten(0, (-1, region_grid[0] * region_grid[1]))
    maps = t[:, 1:].unflatten(1, (window, window)).unflatten(0, (-1, *region_grid)).transpose(2, 3).flatten(3, 4).flatten(1, 2)
    return regions, maps[:, : grid[0], : grid[1]].flatten(1, 2)


class RegionalToLocalBlock(nn.Module):
    """On windows: r + attn(norm0(r)) over the regions of an image, then t + attn(norm1(t)) in each window, then t + mlp(norm2(t))."""

    def __init__(self, dim: int, num_heads: int, window_size: int, mlp_ratio=4.0, qkv_bias=True, norm_eps=1e-6, drop_path=0.0):
        super().__init__()
        self.norm0 = nn.LayerNorm(dim, eps=norm_eps)
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps)
        self.attn = RegionalAttention(dim, num_heads, window_size, qkv_bias)
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path)

    def forward(self, t: Tensor, images: int, mask: Tensor | None = None) -> Tensor:
        """t (images * regions, 1 + w*w, C) -> the same. ``mask``: :func:`lifeops.nn.regional_attention.padding_mask`."""
        regions = t[:, 0].unflatten(0, (images, -1))
        regions = regions + self.drop_path(self.attn(self.norm0(regions)))
        t = torch.cat((regions.flatten(0, 1)[:, None], t[:, 1:]), 1)
        t = t + self.drop_path(self.attn(self.norm1(t), True, mask))
        return t + self.drop_path(self.mlp(self.norm2(t)))


class RegionStage(NotScripted, nn.Module):
    """A step to the next grids (``block.0``, if there is one), then blocks; behind the first of them, with ``peg``, x + DW3(x) on both."""

    def __init__(self, downsampling: TwoGridDownsampling | None, blocks, peg: bool, corner_mask: str):
        super().__init__()
        blocks = list(blocks)
        self.block = nn.ModuleList([nn.Identity() if downsampling is None else downsampling, *blocks])
        attn = blocks[0].attn
        self.window_size, self.corner_mask = attn.window_size, corner_mask
        self.peg = nn.Conv2d(attn.dim, attn.dim, 3, padding=1, groups=attn.dim, bias=False) if peg else None

    def fused_layers(self):
        return [("peg", depthwise)] if self.peg is not None else []

    def _with_positions(self, x, grid):
        if is_fused(self):
            return token_dwconv(x, self.peg.weight, self.peg.bias, grid=grid, residual=x)
        return x + on_patches("RegionStage: peg", self.peg, x, grid, 0, depthwise)

    def forward(self, regions: Tensor, region_grid, x: Tensor, grid):
        """regions (B, gh * gw, C), x (B, H * W, C) and their grids -> the same behind the stage."""
        first, *blocks = self.block
        if not isinstance(first, nn.Identity):
            regions, region_grid, x, grid = first(regions, region_grid, x, grid)
        with under("RegionStage"):
            mask = padding_mask(region_grid, self.window_size, grid, self.corner_mask, x.device)
        B, t = x.shape[0], to_windows(regions, region_grid, x, grid, self.window_size)
        for i, block in enumerate(blocks):
            t = block(t, B, mask)
            if self.peg is not None and i == 0:
                regions, x = from_windows(t, region_grid, grid, self.window_size)
                regions, x = self._with_positions(regions, region_grid), self._with_positions(x, grid)
                t = to_windows(regions, region_grid, x, grid, self.window_size)
        regions, x = from_windows(t, region_grid, grid, self.window_size)
        return regions, region_grid, x, grid


class _Stem(nn.Module):
    """Images to maps with a patch for every ``size`` x ``size`` pixels: by three convolutions, or by one that reads twice as far."""

    def __init__(self, in_chans: int, dim: int, stem: str, size: int):
        super().__init__()
        conv = nn.Conv2d
        if stem == "1conv":
            self.proj = conv(in_chans, dim, 2 * size, stride=size, padding=size - 1)
            return
        widths = in_chans, dim // 4, dim // 2
        halves = [[conv(a, b, 3, stride=2, padding=1), LayerNorm2d(b), nn.GELU()] for a, b in itertools.pairwise(widths)]
        self.proj = nn.Sequential(*halves[0], *halves[1], conv(dim // 2, dim, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


class _RegionTokens(nn.Module):
    """Images to maps with a token for every ``side`` x ``side`` pixels; what is missing of the last ones is padded, half on each side."""

    def __init__(self, in_chans: int, dim: int, side: int, corner_mask: str):
        super().__init__()
        self.side, self.corner_mask = side, corner_mask
        self.proj = nn.Conv2d(in_chans, dim, side, stride=side)

    def forward(self, x: Tensor) -> Tensor:
        missing = [-n % self.side for n in x.shape[2:]]
        if any(missing):
            if self.corner_mask == "authors":  # who pad by a whole region where only the other side has a rest
                missing = [n or self.side for n in missing]
            below, beside = missing
            x = F.pad(x, (beside // 2, beside - beside // 2, below // 2, below - below // 2))
        return self.proj(x)


class RegionViT(ToldInMetadata):
    """RegionViT: images (B, in_chans, H, W) of any size to logits (B, num_classes), from the mean of the regions' normed tokens.

    Args:
        img_size: of the images it is meant for; nothing depends on it. patch_size: pixels per side of a patch; "3conv" makes 4.
        embed_dim, depths, num_heads: of each stage. window_size: patches per side of a region.
        stem: "3conv" or "1conv", the patch embedding. peg: a depth-wise convolution behind the first block of each stage.
        corner_mask: what is attended to where the regions' windows end behind the map, which is where a side of the images is no multiple
            of patch_size * window_size: "fixed", no padding anywhere. "authors": as the authors' code has it, in whose last window
            padding is attended to; for their weights at such sizes. At multiples, as 224, both are the same.
        num_classes 0: features (B, C) come out.

    Raises ValueError where sizes do not fit each other.
    """

    told = ("corner_mask",)

    def __init__(
        self, img_size: Pair = 224, patch_size: int = 4, in_chans: int = 3, num_classes: int = 1000,
        embed_dim: int | tuple[int, ...] = (64, 128, 256, 512), depths: tuple[int, ...] = (2, 2, 8, 2),
        num_heads: tuple[int, ...] = (2, 4, 8, 16), window_size: int = 7, mlp_ratio: float = 4.0, stem: Stem = "3conv", peg: bool = False,
        corner_mask: CornerMask = "fixed", qkv_bias: bool = True, norm_eps: float = 1e-6, drop_path_rate: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__()
        name = "RegionViT"
        check_sizes(name, in_chans=in_chans, num_classes=num_classes, window_size=window_size, patch_size=patch_size)
        check_stages(name, embed_dim=embed_dim, depths=depths, num_heads=num_heads)
        check_choice(name, "stem", stem, STEMS), check_choice(name, "corner_mask", corner_mask, CORNER_MASKS)
        check_rates(name, mlp_ratio=mlp_ratio, drop=("drop_path_rate", drop_path_rate), eps=norm_eps, peg=peg, qkv_bias=qkv_bias)
        if not len(embed_dim) == len(depths) == len(num_heads):
            given = f"{embed_dim}, {depths} and {num_heads}"
            raise ValueError(f"{name}: embed_dim, depths and num_heads must have one number per stage, got {given}")
        if stem == "3conv" and patch_size != 4:
            raise ValueError(f"{name}: patch_size must be 4 with stem='3conv', got {patch_size}")
        if embed_dim[0] % 4 or any(b % a for a, b in itertools.pairwise(embed_dim)):
            raise ValueError(f"{name}: embed_dim must be multiples, of 4 and of the stage before, got {embed_dim}")
        self.img_size, self.num_classes, self.corner_mask = to_pair(name, "img_size", img_size), num_classes, corner_mask
        self.patch_embed = _Stem(in_chans, embed_dim[0], stem, patch_size)
        self.cls_token = _RegionTokens(in_chans, embed_dim[0], patch_size * window_size, corner_mask)
        rates = iter(torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist())
        stages = []
        for s, (dim, depth, heads) in enumerate(zip(embed_dim, depths, num_heads, strict=True)):
            with under(name):
                blocks = [
                    RegionalToLocalBlock(dim, heads, window_size, mlp_ratio, qkv_bias, norm_eps, next(rates)) for _ in range(depth)
                ]
            step = TwoGridDownsampling(embed_dim[s - 1], dim) if s else None
            stages.append(RegionStage(step, blocks, peg, corner_mask))
        self.layers = nn.ModuleList(stages)
        self.norm = nn.LayerNorm(embed_dim[-1], eps=norm_eps)
        self.head = nn.Linear(embed_dim[-1], num_classes) if num_classes else nn.Identity()
        for m in self.modules():
            if isinstance(m, nn.Linear):
                nn.init.trunc_normal_(m.weight, std=0.02)
                if m.bias is not None:
                    nn.init.zeros_(m.bias)

    def forward_features(self, x: Tensor) -> Tensor:
        """Images to the regions' normed tokens (B, gh * gw, C) of the last grid."""
        check_tensor("RegionViT", "x", x)
        check_images("RegionViT", x, self.cls_token.proj.in_channels, tuple(x.shape[-2:]), self.cls_token.proj)
        maps, regions = self.patch_embed(x), self.cls_token(x)
        state = *_tokens(regions), *_tokens(maps)
        for stage in self.layers:
            state = stage(*state)
        return self.norm(state[0])

    def forward_head(self, x: Tensor) -> Tensor:
        return self.head(x.mean(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def _tokens(maps: Tensor) -> tuple[Tensor, tuple[int, int]]:
    return maps.flatten(2).transpose(1, 2), tuple(maps.shape[2:])


class Variant(NamedTuple):
    embed_dim: tuple[int, ...]
    depths: tuple[int, ...]
    num_heads: tuple[int, ...]
    stem: str


VARIANTS = {
    "tiny": Variant((64, 128, 256, 512), (2, 2, 8, 2), (2, 4, 8, 16), "3conv"),  # 13,842,676 parameters with 1000 classes
    "small": Variant((96, 192, 384, 768), (2, 2, 8, 2), (3, 6, 12, 24), "3conv"),  # 30,586,618; w14 31,354,714, with peg 31,367,674
    "medium": Variant((96, 192, 384, 768), (2, 2, 14, 2), (3, 6, 12, 24), "1conv"),  # 41,215,906
    "base": Variant((128, 256, 512, 1024), (2, 2, 14, 2), (4, 8, 16, 32), "1conv"),  # 72,747,232; w14 73,825,120, with peg 73,842,400
}


@under("regionvit")
def regionvit(variant: str = "tiny", *, w14: bool = False, peg: bool = False, **host: object) -> RegionViT:
    """RegionViT of the authors' sizes "tiny", "small", "medium" or "base".

    ``w14``: regions of 14 x 14 patches instead of 7 x 7; ``peg``: convolutions as position encoding (the authors have both of "small" and
    "base"). ``host``: what :class:`lifeops.models.RegionViT` takes (img_size, num_classes, corner_mask, …), instead of the variant's own;
    ``corner_mask="authors"`` is for the authors' weights on images whose sides are no multiples of 28 (``w14``: 56).
    Raises ValueError for an unknown variant or sizes that do not fit.
    """
    check_choice("regionvit", "variant", variant, VARIANTS)
    check_flags("regionvit", w14=w14, peg=peg)
    return RegionViT(**{**VARIANTS[variant]._asdict(), "window_size": 14 if w14 else 7, "peg": bool(peg), **host})

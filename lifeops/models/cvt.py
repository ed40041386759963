"""CvT (arXiv 2103.15808): convolutional token embeddings and attention over convolutional projections; state-dict keys are the authors'.

A stage is an overlapping convolution of the map with a LayerNorm (``patch_embed``) and pre-norm blocks on (B, P + H*W, C) tokens. There
is no position embedding, so images may be of any size that leaves a map. The last stage alone has a class token.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from lifeops import geometry
from lifeops.arguments import check_choice, under
from lifeops.models.deit import Block, DropPath, _init_linear
from lifeops.models.inputs import check_counts, check_images, check_rates, check_sizes, to_pair
from lifeops.nn.conv_ffn import OverlapPatchEmbed
from lifeops.nn.conv_projection import ConvProjectionAttention
from lifeops.nn.embedded_grid import plain
from lifeops.nn.feed_forward import quick_feed_forward
from lifeops.nn.maps import to_maps
from lifeops.options import Pair

NAME = "CvT"


class Variant(NamedTuple):
    embed_dims: tuple[int, ...]
    depths: tuple[int, ...]
    num_heads: tuple[int, ...]
    img_size: int


VARIANTS = {
    "13": Variant((64, 192, 384), (1, 2, 10), (1, 3, 6), 224),  # 19,997,480 parameters with 1000 classes
    "21": Variant((64, 192, 384), (1, 4, 16), (1, 3, 6), 224),  # 31,622,696
    "w24": Variant((192, 768, 1024), (2, 2, 20), (3, 12, 16), 384),  # 277,196,392
}


class Stage(nn.Module):
    """``patch_embed``, then ``blocks``, with a class token in front of the patches if there is one."""

    def __init__(self, patch_embed: OverlapPatchEmbed, blocks, class_token: bool):
        super().__init__()
        self.patch_embed = patch_embed
        self.cls_token = nn.Parameter(torch.zeros(1, 1, patch_embed.proj.out_channels)) if class_token else None
        self.blocks = nn.ModuleList(blocks)

    def forward(self, maps: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Maps to tokens (B, P + H'*W', C) and their grid."""
        x, grid = self.patch_embed(maps)
        if self.cls_token is not None:
            x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1).to(x.dtype), x), 1)
        for block in self.blocks:
            x = block(x, grid)
        return x, grid


class CvT(nn.Module):
    """Images (B, in_chans, H, W) to logits (B, num_classes).

    Args:
        img_size: what commands and examples feed it; the model takes images of any size that leaves every stage a map.
        embed_dims, depths, num_heads: channels, blocks and heads of each stage, as many as there are.
        patch_size, patch_stride, patch_padding: of each stage's embedding.
        mlp_ratio: hidden width of the feed-forward / channels. class_token: of the last stage; without it the head reads the mean token.
        drop_path_rate: stochastic depth of the last block, rising from 0 over all of them.
        attention: everything else :class:`lifeops.nn.ConvProjectionAttention` takes (method, kernel_size, stride_kv, qkv_bias, …).

    ``num_classes=0`` leaves the head out: the features (B, C) come out. Raises ValueError where sizes do not fit each other.
    """

    def __init__(
        self, img_size: Pair = 224, in_chans: int = 3, num_classes: int = 1000, embed_dims: tuple[int, ...] = (64, 192, 384),
        depths: tuple[int, ...] = (1, 2, 10), num_heads: tuple[int, ...] = (1, 3, 6), patch_size: tuple[int, ...] = (7, 3, 3),
        patch_stride: tuple[int, ...] = (4, 2, 2), patch_padding: tuple[int, ...] = (2, 1, 1), mlp_ratio: float = 4.0,
        class_token: bool = True, drop_path_rate: float = 0.0, **attention: object,
    ) -> None:  # fmt: skip
        super().__init__()
        check_sizes(NAME, in_chans=in_chans, num_classes=num_classes)
        check_rates(NAME, mlp_ratio=mlp_ratio, drop=("drop_path_rate", drop_path_rate), class_token=class_token)
        stages = {"embed_dims": embed_dims, "depths": depths, "num_heads": num_heads}
        check_counts(NAME, **stages, patch_size=patch_size, patch_stride=patch_stride)
        check_counts(NAME, 0, embed_dims=embed_dims, patch_padding=patch_padding)
        self.in_chans, self.num_classes, self.num_stages = in_chans, num_classes, len(embed_dims)
        self.windows = tuple(zip(patch_size, patch_stride, patch_padding, strict=True))
        self.img_size = to_pair(NAME, "img_size", img_size)
        self.grid_sizes(self.img_size)
        rates = iter(torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist())

        def block(dim, heads, prefix):
            attn = ConvProjectionAttention(dim, heads, prefix, **attention)
            return Block(dim, attn, mlp_ratio, 1e-5, DropPath(next(rates)), quick_feed_forward)

        for s, (dim, depth, heads) in enumerate(zip(*stages.values(), strict=True)):
            embed = OverlapPatchEmbed(embed_dims[s - 1] if s else in_chans, dim, *self.windows[s])
            prefix = int(class_token and s + 1 == self.num_stages)
            self.add_module(f"stage{s}", Stage(embed, [block(dim, heads, prefix) for _ in range(depth)], bool(prefix)))
        self.norm = nn.LayerNorm(embed_dims[-1])
        self.head = nn.Linear(embed_dims[-1], num_classes) if num_classes else nn.Identity()
        self.apply(_init_linear)
        if class_token:
            nn.init.trunc_normal_(self.stages[-1].cls_token, std=0.02)

    @property
    def patch_embed(self) -> OverlapPatchEmbed:
        """What reads the images."""
        return self.stage0.patch_embed

    @property
    def stages(self) -> list[Stage]:
        return [self._modules[f"stage{s}"] for s in range(self.num_stages)]

    def grid_sizes(self, img_size: tuple[int, int]) -> list[tuple[int, int]]:
        """(H, W) of every stage for images of a size. Raises ValueError where that leaves a stage no map."""
        grids = [img_size]
        for window in self.windows:
            grids.append(geometry.filtered_grid(NAME, *grids[-1], *((n, n) for n in window)))
        return grids[1:]

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) to the last stage's tokens (B, P + H'*W', C), before ``norm``."""
        check_images(NAME, x, self.in_chans, None, self.stage0.patch_embed.proj)
        self.grid_sizes(plain(x.shape[2:]))
        for stage in self.stages:
            tokens, grid = stage(x)
            x = to_maps(tokens, grid) if stage.cls_token is None else None
        return tokens

    def forward_head(self, x: Tensor) -> Tensor:
        """Tokens (B, P + H'*W', C) to logits (B, num_classes): of the class token, or of the mean of all."""
        cls = self.stages[-1].cls_token is not None
        return self.head(self.norm(x[:, 0]) if cls else self.norm(x).mean(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


@under("cvt")
def cvt(variant: str = "13", **options: object) -> CvT:
    """CvT by its authors' sizes: "13", "21", or "w24", which is made for images of 384 x 384.

    Args:
        variant: which. options: everything :class:`lifeops.models.cvt.CvT` takes (img_size, num_classes, …), instead of the variant's.

    Raises ValueError for an unknown variant or sizes that do not fit.
    """
    check_choice("cvt", "variant", variant, VARIANTS)
    return CvT(**{**VARIANTS[variant]._asdict(), **options})

"""Self-slimmed ViT (arXiv 2111.12624): an LV-ViT whose patch tokens grow fewer; state-dict keys are the authors'.

``patch_embed`` is a stem of four or six 3x3 convolutions with batch norms, to 1/16 of the image; behind stages of ``blocks`` a ``tsm``
joins the patch tokens to half as many. The class token passes them all, and the head reads it.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lifeops.arguments import check_choice, check_flags, check_positive, got, under
from lifeops.models.deit import Attention, Block, DropPath, _init_linear
from lifeops.models.inputs import check_images, check_rates, check_sizes, check_stages, grid_of, to_pair
from lifeops.nn.feed_forward import FeedForward
from lifeops.nn.maps import to_tokens
from lifeops.nn.token_slimming import ReverseTokenSlimming, TokenSlimming
from lifeops.options import Pair
from lifeops.told import ToldInMetadata

NAME = "SiT"
PATCH = 16
STEMS = {4: ((8, 2), (4, 2), (2, 2), (1, 2)), 6: ((8, 2), (8, 1), (8, 1), (4, 2), (2, 2), (1, 2))}
"""By the number of convolutions, of each what the width is divided by, and the stride."""


class Variant(NamedTuple):
    embed_dim: int
    num_heads: int
    stage_blocks: tuple[int, ...]
    stem: int = 4
    skip: float = 2.0
    img_size: int = 224


VARIANTS = {
    "tiny": Variant(320, 5, (1, 1, 1, 11)),  # 15,872,934 parameters with 1000 classes
    "xsmall": Variant(384, 6, (1, 1, 1, 13)),  # 25,625,774
    "small": Variant(384, 6, (9, 3, 2, 2)),  # 25,625,774
    "medium": Variant(512, 8, (10, 4, 3, 3)),  # 55,642,302
    "large": Variant(768, 12, (10, 4, 3, 7), 6, 3.0, 288),  # 148,168,398
}


class PatchEmbed(nn.Module):
    """Images (B, in_chans, H, W) to patch tokens (B, H/16 * W/16, C): ``conv{i}`` without biases, ``bn{i}``, GELU between them."""

    def __init__(self, img_size: tuple[int, int], in_chans: int, embed_dim: int, stem: int):
        super().__init__()
        self.grid_size, self.img_size, self.depth = grid_of(NAME, img_size, (PATCH, PATCH)), img_size, stem
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        for i, (part, stride) in enumerate(STEMS[stem], 1):
            width = embed_dim // part
            self.add_module(f"conv{i}", nn.Conv2d(in_chans, width, 3, stride, 1, bias=False))
            self.add_module(f"bn{i}", nn.BatchNorm2d(width))
            in_chans = width
        self.gelu = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        for i in range(1, self.depth + 1):
            x = self._modules[f"bn{i}"](self._modules[f"conv{i}"](x))
            x = self.gelu(x) if i < self.depth else x
        return to_tokens(x)


class ScaledBlock(Block):
    """x + attn(norm1(x)) / skip, then x + mlp(norm2(x)) / skip, on tokens of any number."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, qkv_bias: bool, drop_path: nn.Module, skip: float):
        super().__init__(dim, Attention(dim, num_heads, qkv_bias), mlp_ratio, 1e-5, drop_path, FeedForward)
        self.skip = skip

    def forward(self, x: Tensor) -> Tensor:
        x = torch.add(x, self.drop_path(self.attn(self.norm1(x))), alpha=1 / self.skip)
        return torch.add(x, self.drop_path(self.mlp(self.norm2(x))), alpha=1 / self.skip)


class SiT(ToldInMetadata):
    """Images (B, in_chans, H, W) of one size to logits (B, num_classes).

    Args:
        img_size: a multiple of 16. embed_dim, num_heads: C, a multiple of 8, and h.
        stage_blocks: blocks of each stage. Before each stage but the first a :class:`lifeops.nn.TokenSlimming` joins the patch tokens to
            ``int(N * keep_ratio ** stage)`` of N; one stage slims nothing: that is LV-ViT, the teacher.
        num_tokens: instead of that, how many each stage but the first has.
        stem: 4 or 6 convolutions. skip: what every residual branch is divided by.
        mlp_ratio: hidden width of the feed-forward / C. qkv_bias: of attention. drop_path_rate: of the last block, rising from 0.
        distill: with ``rtsm``, by which :meth:`forward_tokens` makes all N patch tokens of the joined ones; a state dict of the authors'
            training has them, inference does not need them.

    ``aux_head`` is LV-ViT's for token labelling, frozen here and read by nothing, but part of the published sizes and files.
    ``num_classes=0`` leaves the heads out: the features (B, C) come out. Raises ValueError where sizes do not fit, and where a stage
    would have no patch token left (the authors' code goes on with the class token alone).
    """

    told = "stage_blocks", "skip"

    def __init__(
        self, img_size: Pair = 224, in_chans: int = 3, num_classes: int = 1000, embed_dim: int = 320, num_heads: int = 5,
        stage_blocks: tuple[int, ...] = (1, 1, 1, 11), mlp_ratio: float = 3.0, keep_ratio: float = 0.5,
        num_tokens: tuple[int, ...] | None = None, stem: int = 4, skip: float = 2.0, qkv_bias: bool = False, drop_path_rate: float = 0.0,
        distill: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        check_sizes(NAME, in_chans=in_chans, num_classes=num_classes, embed_dim=embed_dim, num_heads=num_heads)
        check_rates(NAME, mlp_ratio=mlp_ratio, drop=("drop_path_rate", drop_path_rate), qkv_bias=qkv_bias)
        check_flags(NAME, distill=distill)
        check_stages(NAME, stage_blocks=stage_blocks)
        if embed_dim % 8 or embed_dim % num_heads:
            raise ValueError(f"{NAME}: embed_dim must be a multiple of 8 and of num_heads {num_heads}, got {embed_dim}")
        if isinstance(stem, bool) or stem not in (4, 6):
            raise ValueError(f"{NAME}: stem must be 4 or 6 convolutions, got {got(stem)}")
        self.in_chans, self.num_classes, self.img_size = in_chans, num_classes, to_pair(NAME, "img_size", img_size)
        self.stage_blocks, self.skip = tuple(stage_blocks), float(check_positive(NAME, "skip", skip))
        self.patch_embed = PatchEmbed(self.img_size, in_chans, embed_dim, stem)
        patches, depth = self.patch_embed.num_patches, sum(stage_blocks)
        self.num_tokens = _tokens(self.img_size, patches, len(stage_blocks), check_positive(NAME, "keep_ratio", keep_ratio), num_tokens)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + patches, embed_dim))
        rates = torch.linspace(0, drop_path_rate, depth, device="cpu").tolist()
        self.blocks = nn.ModuleList(ScaledBlock(embed_dim, num_heads, mlp_ratio, qkv_bias, DropPath(r), self.skip) for r in rates)
        self.tsm = nn.ModuleList(TokenSlimming(embed_dim, K, 1) for K in self.num_tokens[1:])
        if distill:
            before = [K for K, count in zip(self.num_tokens, self.stage_blocks, strict=True) for _ in range(count)]
            behind = *before[1:], before[-1]
            self.rtsm = nn.ModuleList(ReverseTokenSlimming(embed_dim, K, patches) if patches > K else nn.Identity() for K in behind)
        self.norm = nn.LayerNorm(embed_dim)
        self.head, self.aux_head = (nn.Linear(embed_dim, num_classes) if num_classes else nn.Identity() for _ in range(2))
        self.aux_head.requires_grad_(False)
        self.apply(_init_linear)
        for token in (self.cls_token, self.pos_embed):
            nn.init.trunc_normal_(token, std=0.02)

    def _embedded(self, x: Tensor) -> Tensor:
        """Images to tokens (B, 1 + N, C)."""
        check_images(NAME, x, self.in_chans, self.img_size, self.patch_embed.conv1)
        x = self.patch_embed(x)
        return torch.cat((self.cls_token.expand(x.shape[0], -1, -1).to(x.dtype), x), 1) + self.pos_embed

    def _steps(self) -> list[tuple[nn.Module, nn.Module | None]]:
        """Every block and what slims the tokens behind it, if anything does."""
        slims = dict(zip(itertools.accumulate(self.stage_blocks[:-1]), self.tsm, strict=True))
        return [(block, slims.get(i)) for i, block in enumerate(self.blocks, 1)]

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) to the last stage's tokens (B, 1 + K, C), before ``norm``."""
        x = self._embedded(x)
        for block, slim in self._steps():
            x = block(x) if slim is None else slim(block(x))
        return x

    def forward_tokens(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """(logits, the patch tokens (B, N, C) behind every block): joined ones made N again by ``rtsm``, with ``distill``.

        What :func:`lifeops.losses.feature_recycling_distillation` takes of the student and of the teacher.
        """
        if self.tsm and not hasattr(self, "rtsm"):
            raise ValueError(f"{NAME}: forward_tokens needs distill=True: joined tokens cannot be held against a teacher's")
        x, found = self._embedded(x), []
        reverse = getattr(self, "rtsm", [nn.Identity()] * len(self.blocks))
        for (block, slim), recover in zip(self._steps(), reverse, strict=True):
            x = block(x) if slim is None else slim(block(x))
            found.append(recover(x[:, 1:]))
        return self.forward_head(x), found

    def forward_head(self, x: Tensor) -> Tensor:
        """Tokens (B, 1 + K, C) to logits (B, num_classes)."""
        return self.head(self.norm(x[:, 0]))

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def _tokens(img_size, patches: int, stages: int, keep_ratio: float, num_tokens) -> tuple[int, ...]:
    """Patch tokens of every stage."""
    if num_tokens is None:
        found = [int(patches * keep_ratio**stage) for stage in range(stages)]
        if 0 in found or any(n > patches for n in found):
            what = f"{found} patch tokens in the stages of images {img_size}"
            raise ValueError(f"{NAME}: img_size and keep_ratio must leave every stage 1 to {patches} patch tokens, got {what}")
        return tuple(found)
    if not isinstance(num_tokens, (tuple, list)) or len(num_tokens) != stages - 1:
        raise ValueError(f"{NAME}: num_tokens must be {stages - 1} ints, one for each stage behind the first, got {got(num_tokens)}")
    check_sizes(NAME, **{f"num_tokens[{i}]": n for i, n in enumerate(num_tokens)})
    if max(num_tokens, default=0) > patches:
        raise ValueError(f"{NAME}: num_tokens must be at most the {patches} patches of images {img_size}, got {got(num_tokens)}")
    return patches, *num_tokens


@under("sit")
def sit(variant: str = "tiny", **options: object) -> SiT:
    """Self-slimmed ViT by its authors' sizes: "tiny", "xsmall", "small", "medium", or "large", which is made for 288 x 288 images.

    Args:
        variant: which. options: everything :class:`lifeops.models.sit.SiT` takes (img_size, num_classes, distill, …), in its place.

    Raises ValueError for an unknown variant or sizes that do not fit.
    """
    check_choice("sit", "variant", variant, VARIANTS)
    return SiT(**{**VARIANTS[variant]._asdict(), **options})

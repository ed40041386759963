"""EdgeViT (arXiv 2205.03436): local aggregation, then attention over every r-th token; state-dict keys are the authors'.

A stage is a non-overlapping convolution with a LayerNorm (``patch_embed{s}``) and ``blocks{s}`` on (B, H*W, C) tokens. There is neither
a position embedding nor a class token: images may be of any size whose grids are multiples of the stages' r.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from lifeops import torchlib
from lifeops.arguments import check_choice, under
from lifeops.config import requested_backend
from lifeops.models.deit import DropPath, _init_linear
from lifeops.models.inputs import check_counts, check_images, check_rates, check_sizes, to_pair
from lifeops.nn.batch_norm import Fusible, check_constant, check_readable, folded_into, normalise
from lifeops.nn.embedded_grid import plain
from lifeops.nn.feed_forward import FeedForward
from lifeops.nn.global_sparse import GlobalSparseAttention
from lifeops.nn.local_agg import LocalAgg
from lifeops.nn.maps import call, to_maps, to_tokens, written_down
from lifeops.nn.plain import batch_norm, depthwise, exactly, is_fused
from lifeops.nn.scripting import NotScripted
from lifeops.ops.token_dwconv.public import token_dwconv
from lifeops.options import Pair

NAME = "EdgeViT"


class Variant(NamedTuple):
    embed_dims: tuple[int, ...]
    depths: tuple[int, ...]
    num_heads: tuple[int, ...]


VARIANTS = {
    "xxs": Variant((36, 72, 144, 288), (1, 1, 3, 2), (1, 2, 4, 8)),  # 4,067,704 parameters with 1000 classes
    "xs": Variant((48, 96, 240, 384), (1, 1, 3, 1), (1, 2, 5, 8)),  # 6,770,056
    "s": Variant((48, 96, 240, 384), (1, 2, 5, 3), (1, 2, 5, 8)),  # 13,108,168
}


class SelfAttn(NotScripted, nn.Module):
    """x + DW3(x) on the patches, then x + attn(norm1(x)), then x + mlp(norm2(x))."""

    def __init__(self, dim, num_heads, sr_ratio, num_prefix_tokens, mlp_ratio, qkv_bias, drop_path):
        super().__init__()
        self.num_prefix_tokens = num_prefix_tokens
        self.pos_embed = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = GlobalSparseAttention(dim, num_heads, sr_ratio, num_prefix_tokens, qkv_bias=qkv_bias)
        self.drop_path = drop_path
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = FeedForward(dim, int(dim * mlp_ratio))

    def fused_layers(self):
        return [("pos_embed", depthwise)]

    def _placed(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        P, conv = self.num_prefix_tokens, self.pos_embed
        if is_fused(self):
            return token_dwconv(x, conv.weight, conv.bias, grid=grid, num_prefix_tokens=P, prefix="zero", residual=x)
        placed = x[:, P:] + to_tokens(call(f"{NAME}: pos_embed", conv, to_maps(x[:, P:], grid), depthwise))
        return torch.cat((x[:, :P], placed), 1) if P else placed

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        x = self._placed(x, grid)
        x = x + self.drop_path(self.attn(self.norm1(x), grid))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class LGLBlock(nn.Module):
    """``LocalAgg``, if tokens are left out (r > 1), then ``SelfAttn``, on (B, P + H*W, C) tokens."""

    def __init__(
        self, dim: int, num_heads: int, sr_ratio: int = 1, num_prefix_tokens: int = 0, mlp_ratio: float = 4.0, qkv_bias: bool = True,
        drop_path: nn.Module | None = None,
    ):  # fmt: skip
        super().__init__()
        drop_path = nn.Identity() if drop_path is None else drop_path
        self.LocalAgg = LocalAgg(dim, mlp_ratio, num_prefix_tokens, drop_path=drop_path) if sr_ratio > 1 else None
        self.SelfAttn = SelfAttn(dim, num_heads, sr_ratio, num_prefix_tokens, mlp_ratio, qkv_bias, drop_path)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        return self.SelfAttn(x if self.LocalAgg is None else self.LocalAgg(x, grid), grid)


class PatchEmbed(nn.Module):
    """Maps (B, C_in, H, W) to normalised tokens (B, H/p * W/p, C)."""

    def __init__(self, in_chans: int, embed_dim: int, patch_size: int):
        super().__init__()
        self.proj = nn.Conv2d(in_chans, embed_dim, patch_size, patch_size)
        self.norm = nn.LayerNorm(embed_dim)

    def forward(self, maps: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """The tokens and their grid."""
        maps = self.proj(written_down(maps))
        return self.norm(to_tokens(maps)), plain(maps.shape[2:])


class EdgeViT(Fusible, NotScripted, nn.Module):
    """Images (B, in_chans, H, W) to logits (B, num_classes): of the mean of the last stage's tokens, batch-normalised.

    Args:
        img_size: what commands and examples feed it; the model takes images of any size whose grids are multiples of each stage's r.
        embed_dims, depths, num_heads: channels, blocks and heads of each stage, as many as there are.
        sr_ratios: r of each stage. patch_size: of each stage's embedding.
        mlp_ratio: hidden width of the feed-forwards / channels. qkv_bias: of attention.
        drop_path_rate: stochastic depth of the last block, rising from 0 over all of them.

    ``num_classes=0`` leaves the head out: the features (B, C) come out. Raises ValueError where sizes do not fit each other.
    """

    def __init__(
        self, img_size: Pair = 224, in_chans: int = 3, num_classes: int = 1000, embed_dims: tuple[int, ...] = (48, 96, 240, 384),
        depths: tuple[int, ...] = (1, 1, 3, 1), num_heads: tuple[int, ...] = (1, 2, 5, 8), sr_ratios: tuple[int, ...] = (4, 2, 2, 1),
        patch_size: tuple[int, ...] = (4, 2, 2, 2), mlp_ratio: float = 4.0, qkv_bias: bool = True, drop_path_rate: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__()
        check_sizes(NAME, in_chans=in_chans, num_classes=num_classes)
        check_rates(NAME, mlp_ratio=mlp_ratio, drop=("drop_path_rate", drop_path_rate), qkv_bias=qkv_bias)
        stages = {"embed_dims": embed_dims, "depths": depths, "num_heads": num_heads, "sr_ratios": sr_ratios, "patch_size": patch_size}
        check_counts(NAME, **stages)
        self.in_chans, self.num_classes, self.num_stages = in_chans, num_classes, len(embed_dims)
        self.patch_sizes, self.sr_ratios = tuple(patch_size), tuple(sr_ratios)
        self.img_size = to_pair(NAME, "img_size", img_size)
        self.grid_sizes(self.img_size)
        rates = iter(torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist())
        for s, (dim, depth, heads, r, patch) in enumerate(zip(*stages.values(), strict=True)):
            self.add_module(f"patch_embed{s + 1}", PatchEmbed(embed_dims[s - 1] if s else in_chans, dim, patch))
            blocks = [LGLBlock(dim, heads, r, 0, mlp_ratio, qkv_bias, DropPath(next(rates))) for _ in range(depth)]
            self.add_module(f"blocks{s + 1}", nn.ModuleList(blocks))
        self.norm = nn.BatchNorm2d(embed_dims[-1])
        self.head = nn.Linear(embed_dims[-1], num_classes) if num_classes else nn.Identity()
        self.apply(_init_linear)

    @property
    def patch_embed(self) -> PatchEmbed:
        """What reads the images."""
        return self.patch_embed1

    def grid_sizes(self, img_size: tuple[int, int]) -> list[tuple[int, int]]:
        """(H, W) of every stage for images of a size. Raises ValueError where a grid is no multiple of the stage's r."""
        grids, size = [], img_size
        for s, (patch, r) in enumerate(zip(self.patch_sizes, self.sr_ratios, strict=True), 1):
            if any(n % (patch * r) for n in size):
                what = f"the {size[0]} x {size[1]} {'pixels' if s == 1 else 'tokens'} that stage {s} gets"
                raise ValueError(
                    f"{NAME}: {what} must be multiples of its patch_size {patch} times its sr_ratio {r}; images are {img_size}"
                )
            size = size[0] // patch, size[1] // patch
            grids.append(size)
        return grids

    def fused_layers(self):
        return [("norm", batch_norm)]

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) to the last stage's tokens (B, H'*W', C), before ``norm``."""
        check_images(NAME, x, self.in_chans, None, self.patch_embed1.proj)
        self.grid_sizes(plain(x.shape[2:]))
        for s in range(1, self.num_stages + 1):
            tokens, grid = self._modules[f"patch_embed{s}"](x)
            for block in self._modules[f"blocks{s}"]:
                tokens = block(tokens, grid)
            x = to_maps(tokens, grid)
        return tokens

    def _normalised(self, x: Tensor) -> Tensor:
        fast = x.numel() > 0 and not torchlib.calls_layers()
        if fast and is_fused(self):
            return normalise(NAME, self.norm, x, x.shape[1], requested_backend(NAME, None))
        return to_tokens(call(f"{NAME}: norm", self.norm, to_maps(x, (x.shape[1], 1)), batch_norm))

    def forward_head(self, x: Tensor) -> Tensor:
        """Tokens (B, H'*W', C) to logits (B, num_classes)."""
        return self.head(self._normalised(x).mean(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def fold_batch_norms_(self, check: bool) -> None:
        """Fold the last norm into the head, if there is one, or only ``check`` that it can be done."""
        if isinstance(self.head, nn.Linear) and isinstance(self.norm, nn.modules.batchnorm._BatchNorm):
            check_constant("norm", self.norm)
            check_readable("head", self.head, exactly(nn.Linear))
            check_readable("norm", self.norm, batch_norm)
            if not check:
                self.head, self.norm = folded_into(self.norm, self.head), nn.Identity()


@under("edgevit")
def edgevit(variant: str = "xs", **options: object) -> EdgeViT:
    """EdgeViT by its authors' sizes: "xxs", "xs" or "s".

    Args:
        variant: which. options: everything :class:`lifeops.models.edgevit.EdgeViT` takes (img_size, num_classes, …), in its place.

    Raises ValueError for an unknown variant or sizes that do not fit.
    """
    check_choice("edgevit", "variant", variant, VARIANTS)
    return EdgeViT(**{**VARIANTS[variant]._asdict(), **options})

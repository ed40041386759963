"""MViTv2 (arXiv 2112.01526) on PoolingAttention, in timm's key layout; the blocks of MViT (arXiv 2104.11227), too."""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lifeops.arguments import check_choice, check_rate, check_tensor, under
from lifeops.models.deit import DropPath, Mlp
from lifeops.models.inputs import check_images, check_rates, check_sizes, check_stages, to_pair
from lifeops.nn.inputs import check_input, check_like
from lifeops.nn.plain import is_fused, pool
from lifeops.nn.pooling import pool_tokens
from lifeops.nn.pooling_attention import PoolingAttention
from lifeops.nn.scripting import NotScripted
from lifeops.options import Pair, Pooling, Resize


def _skip(stride: tuple[int, int]) -> nn.MaxPool2d | None:
    """The maximum over windows as wide as the step and one more; None where every token stays."""
    kernel = tuple(s + 1 if s > 1 else 1 for s in stride)
    return None if stride == (1, 1) else nn.MaxPool2d(kernel, stride, tuple(k // 2 for k in kernel))


class MultiscaleBlock(NotScripted, nn.Module):
    """skip(x) + attn(norm1(x)), then y + mlp(norm2(y)): (B, P + H*W, dim) tokens to (B, P + H'*W', dim_out) on the queries' grid.

    ``skip`` takes the maximum over the windows of the queries' stride. Where channels grow, the shortcut is a projection of the normed
    tokens: in the attention (its ``dim_out`` is the block's) or in the MLP.
    """

    def __init__(self, attn: PoolingAttention, dim_out: int, mlp_ratio: float = 4.0, norm_eps: float = 1e-6, drop_path: float = 0.0):
        super().__init__()
        dim, width = attn.dim, attn.dim_out
        if width not in (dim, dim_out):
            raise ValueError(f"MultiscaleBlock: attn.dim_out must be its dim {dim} or the block's {dim_out}, got {width}")
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps)
        self.shortcut_proj_attn = nn.Linear(dim, width) if dim != width else None
        self.shortcut_pool_attn = None if attn.pool_q is None else _skip(tuple(attn.pool_q.stride))
        self.attn = attn
        self.norm2 = nn.LayerNorm(width, eps=norm_eps)
        self.shortcut_proj_mlp = nn.Linear(width, dim_out) if width != dim_out else None
        self.mlp = Mlp(width, int(width * mlp_ratio), dim_out)
        self.drop_path = DropPath(drop_path)

    def fused_layers(self):
        return [("shortcut_pool_attn", pool)] if self.shortcut_pool_attn is not None else []

    def forward(self, x: Tensor, grid: tuple[int, int]) -> tuple[Tensor, tuple[int, int]]:
        """x (B, P + H*W, dim), grid (H, W) -> the tokens and their grid."""
        name, P = "MultiscaleBlock", self.attn.num_prefix_tokens
        grid = check_input(name, x, self.attn.dim, grid, P)
        check_like(name, "x", x, self.norm1, any_dtype=True)
        normed = self.norm1(x)
        skip = x if self.shortcut_proj_attn is None else self.shortcut_proj_attn(normed)
        skip, new = pool_tokens(f"{name}: shortcut_pool_attn", self.shortcut_pool_attn, skip, grid, P, is_fused(self))
        x = skip + self.drop_path(self.attn(normed, grid))
        normed = self.norm2(x)
        skip = x if self.shortcut_proj_mlp is None else self.shortcut_proj_mlp(normed)
        return skip + self.drop_path(self.mlp(normed)), new


class MultiscaleStage(nn.Module):
    """Blocks one after another."""

    def __init__(self, blocks):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> tuple[Tensor, tuple[int, int]]:
        for block in self.blocks:
            x, grid = block(x, grid)
        return x, grid


class OverlappingPatches(nn.Module):
    """Images (B, in_chans, H, W) to tokens of a quarter of their height and width, rounded up, and that grid."""

    def __init__(self, in_chans: int, dim: int):
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, 7, stride=4, padding=3)

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        maps = self.proj(x)
        return maps.flatten(2).transpose(1, 2), tuple(maps.shape[2:])


class MViT(nn.Module):
    """MViTv2: images (B, in_chans, H, W) to logits (B, num_classes); the authors' own evaluation gives their softmax.

    Args:
        img_size: what the tables of relative positions are made for. Images of any other size (no more than a few pixels too small for a
            window) are taken: see ``rel_pos_resize``.
        embed_dim, num_heads: of the first stage; doubled from stage to stage. depths: blocks of each stage.
        class_token: a token in front that the logits are read from, else from the mean of the patches.
        expand_attn: channels grow in the attention of a stage's first block, else in the MLP of the last block before.
        stride_kv: of keys and values in the first stage, halved from stage to stage, as the queries' grid is.
        mode, kernel, residual_pooling, residual_prefix, rel_pos_resize, qkv_bias: of :class:`lifeops.nn.PoolingAttention`; the authors'
            image models add q to the class token, too. rel_pos: whether there are relative positions.
        drop_rate: dropout before the classifier. num_classes 0: features (B, C) come out.

    Raises ValueError where sizes do not fit each other.
    """

    def __init__(
        self, img_size: Pair = 224, in_chans: int = 3, num_classes: int = 1000, embed_dim: int = 96, depths: tuple[int, ...] = (1, 2, 5, 2),
        num_heads: int = 1, mlp_ratio: float = 4.0, class_token: bool = False, expand_attn: bool = True, mode: Pooling = "conv",
        kernel: int = 3, stride_kv: int = 4, residual_pooling: bool = True, residual_prefix: bool = True, rel_pos: bool = True,
        rel_pos_resize: Resize = "interpolate", qkv_bias: bool = True, norm_eps: float = 1e-6, drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__()
        name = "MViT"
        check_sizes(name, in_chans=in_chans, num_classes=num_classes, embed_dim=embed_dim, num_heads=num_heads, stride_kv=stride_kv)
        check_stages(name, depths=depths)
        flags = {"class_token": class_token, "expand_attn": expand_attn, "rel_pos": rel_pos, "qkv_bias": qkv_bias}
        check_rates(name, mlp_ratio=mlp_ratio, drop=("drop_path_rate", drop_path_rate), eps=norm_eps, **flags)
        check_rate(name, "drop_rate", drop_rate)
        self.img_size, self.num_classes, self.embed_dim = to_pair(name, "img_size", img_size), num_classes, embed_dim
        self.num_prefix_tokens = P = int(class_token)
        self.patch_embed = OverlappingPatches(in_chans, embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim)) if class_token else None
        rates = iter(torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist())
        options = {"mode": mode, "kernel_q": kernel, "kernel_kv": kernel, "qkv_bias": qkv_bias, "norm_eps": norm_eps}
        options |= {"residual_pooling": residual_pooling, "residual_prefix": residual_prefix, "rel_pos_resize": rel_pos_resize}
        dim, grid, stages = embed_dim, tuple(-(-n // 4) for n in self.img_size), []
        for s, depth in enumerate(depths):
            blocks, own, after = [], embed_dim << s, embed_dim << min(s + 1, len(depths) - 1)
            for i in range(depth):
                strides = {"stride_q": 2 if s and not i else 1, "stride_kv": max(stride_kv >> s, 1)}
                width = own if expand_attn else dim
                with under(name):
                    attn = PoolingAttention(
                        dim, num_heads << s, P, dim_out=width, rel_pos=grid if rel_pos else None, **strides, **options
                    )
                last = width if expand_attn or i + 1 < depth else after
                blocks.append(MultiscaleBlock(attn, last, mlp_ratio, norm_eps, next(rates)))
                dim, grid = last, attn.queries_grid(grid)
            stages.append(MultiscaleStage(blocks))
        self.stages = nn.ModuleList(stages)
        self.norm = nn.LayerNorm(dim, eps=norm_eps)
        fc = nn.Linear(dim, num_classes) if num_classes else nn.Identity()
        self.head = nn.Sequential(OrderedDict(drop=nn.Dropout(drop_rate), fc=fc))
        for m in self.modules():
            if isinstance(m, nn.Linear):
                nn.init.trunc_normal_(m.weight, std=0.02)
                if m.bias is not None:
                    nn.init.zeros_(m.bias)
        if class_token:
            nn.init.trunc_normal_(self.cls_token, std=0.02)

    def forward_features(self, x: Tensor) -> Tensor:
        """Images to normed tokens of the last grid (B, P + H*W, C)."""
        check_tensor("MViT", "x", x)
        check_images("MViT", x, self.patch_embed.proj.in_channels, tuple(x.shape[-2:]), self.patch_embed.proj)
        x, grid = self.patch_embed(x)
        if self.cls_token is not None:
            x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), 1)
        for stage in self.stages:
            x, grid = stage(x, grid)
        return self.norm(x)

    def forward_head(self, x: Tensor) -> Tensor:
        return self.head(x.mean(1) if self.cls_token is None else x[:, 0])

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


class Variant(NamedTuple):
    depths: tuple[int, ...]
    embed_dim: int = 96
    num_heads: int = 1
    expand_attn: bool = True


VARIANTS = {
    "tiny": Variant((1, 2, 5, 2)),  # 24,173,320 parameters with 1000 classes
    "small": Variant((1, 2, 11, 2)),  # 34,870,216
    "base": Variant((2, 3, 16, 3)),  # 51,472,744
    "large": Variant((2, 6, 36, 4), 144, 2, False),  # 217,992,952
}


@under("mvitv2")
def mvitv2(variant: str = "tiny", **host: object) -> MViT:
    """MViTv2 of the authors' sizes "tiny", "small", "base" or "large"; timm's state dicts of ``mvitv2_<variant>`` are its own.

    ``host``: what :class:`lifeops.models.MViT` takes (img_size, num_classes, class_token, drop_path_rate, …), instead of the variant's own.
    Raises ValueError for an unknown variant or sizes that do not fit.
    """
    check_choice("mvitv2", "variant", variant, VARIANTS)
    return MViT(**{**VARIANTS[variant]._asdict(), **host})

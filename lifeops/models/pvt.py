"""PVT (arXiv 2102.12122): stages of blocks whose keys and values lie on a coarser grid; state-dict keys are the authors'."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lifeops.arguments import check_callable, check_positive, got
from lifeops.models.blocks import ConvFactory, pre_norm_block
from lifeops.models.deit import DropPath, NormedPatchEmbed, _init_linear
from lifeops.models.inputs import check_counts, check_rates, check_sizes, to_pair
from lifeops.nn.attend import fused_attention, split_heads
from lifeops.nn.dense import linears, multiplier
from lifeops.nn.inputs import check_heads
from lifeops.nn.maps import on_patches, to_maps, written_down
from lifeops.options import Pair
from lifeops.told import ToldInMetadata

NAME = "PyramidVisionTransformer"


class SpatialReductionAttention(ToldInMetadata):
    """softmax(q kᵀ / sqrt(d)) v, then ``proj``; k and v of the patches' map as a convolution ``sr`` of kernel and stride r leaves it.

    Behind ``sr`` there is a LayerNorm; with r = 1 there is neither, and prefix tokens are keys as they are. (B, P + H*W, C) tokens.
    """

    needs_grid = True

    def __init__(self, dim: int, num_heads: int, sr_ratio: int, num_prefix_tokens: int = 0, qkv_bias: bool = True):
        super().__init__()
        dim, self.num_heads = check_heads(NAME, dim, num_heads)
        self.num_prefix_tokens, self.sr_ratio = num_prefix_tokens, sr_ratio
        self.q = nn.Linear(dim, dim, bias=qkv_bias)
        self.kv = nn.Linear(dim, 2 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        if sr_ratio > 1:
            self.sr = nn.Conv2d(dim, dim, sr_ratio, stride=sr_ratio)
            self.norm = nn.LayerNorm(dim)
        self.no_rollout = None if sr_ratio == 1 else "whose keys and values lie on a coarser grid: convolutions of the tokens, not tokens"

    def fused_layers(self):
        return linears("q", "kv", "proj")

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        keys, multiply = x, multiplier(self)
        if self.sr_ratio > 1:
            keys = self.norm(on_patches(f"{NAME}: sr", self.sr, x, grid, self.num_prefix_tokens))
        q = multiply(x, self.q).unflatten(2, (self.num_heads, -1)).transpose(1, 2)
        k, v = split_heads(multiply(keys, self.kv), self.num_heads, 2)
        return multiply(fused_attention(q, k, v).transpose(1, 2).flatten(2), self.proj)


class PyramidVisionTransformer(nn.Module):
    """PVT: images (B, in_chans, H, W) to logits (B, num_classes), read from the class token, which joins before the last stage.

    Args:
        embed_dims, depths, num_heads, mlp_ratios, sr_ratios: of every stage, as many as there are; keys and values lie on a grid
            ``sr_ratio`` times as coarse as the stage's. A stage's grid is half as fine as the one before.
        conv: called as ``conv(dim, mlp_ratio, num_prefix_tokens)`` once per block, gives what stands in the place of the second
            LayerNorm and the MLP (:class:`lifeops.nn.LocalityFeedForward`); None: they themselves.
        norm_eps: of the blocks' norms and the last; the others' is 1e-5, as the authors'.

    ``num_classes=0`` leaves the head out: the features (B, C) come out. Raises ValueError where sizes do not fit each other.
    """

    def __init__(
        self, img_size: Pair = 224, patch_size: int = 4, in_chans: int = 3, num_classes: int = 1000,
        embed_dims: tuple[int, ...] = (64, 128, 320, 512), depths: tuple[int, ...] = (2, 2, 2, 2),
        num_heads: tuple[int, ...] = (1, 2, 5, 8), mlp_ratios: tuple[float, ...] = (8, 8, 4, 4), sr_ratios: tuple[int, ...] = (8, 4, 2, 1),
        qkv_bias: bool = True, norm_eps: float = 1e-6, drop_path_rate: float = 0.0, conv: ConvFactory | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        check_sizes(NAME, in_chans=in_chans, num_classes=num_classes)
        check_counts(NAME, embed_dims=embed_dims, depths=depths, num_heads=num_heads, sr_ratios=sr_ratios)
        if not isinstance(mlp_ratios, (tuple, list)) or len(mlp_ratios) != len(depths):
            raise ValueError(f"{NAME}: mlp_ratios must be one number for each of the {len(depths)} stages, got {got(mlp_ratios)}")
        for s, ratio in enumerate(mlp_ratios):
            check_positive(NAME, f"mlp_ratios[{s}]", ratio)
        check_rates(NAME, mlp_ratio=mlp_ratios[0], drop=("drop_path_rate", drop_path_rate), eps=norm_eps, qkv_bias=qkv_bias)
        check_callable(NAME, "conv", conv)
        self.num_classes, self.num_stages, self.img_size = num_classes, len(depths), to_pair(NAME, "img_size", img_size)
        rates = iter(torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist())
        size, patch = self.img_size, to_pair(NAME, "patch_size", patch_size)
        stages = zip((in_chans, *embed_dims[:-1]), embed_dims, depths, num_heads, mlp_ratios, sr_ratios, strict=True)
        for s, (chans, dim, depth, heads, mlp_ratio, sr_ratio) in enumerate(stages, 1):
            embed, prefix = NormedPatchEmbed(size, patch, chans, dim, NAME), int(s == self.num_stages)

            def block(dim=dim, heads=heads, mlp_ratio=mlp_ratio, sr_ratio=sr_ratio, prefix=prefix):
                attn = SpatialReductionAttention(dim, heads, sr_ratio, prefix, qkv_bias)
                return pre_norm_block(dim, attn, mlp_ratio, norm_eps, DropPath(next(rates)), conv, prefix)

            self.add_module(f"patch_embed{s}", embed)
            self.register_parameter(f"pos_embed{s}", nn.Parameter(torch.zeros(1, prefix + embed.num_patches, dim)))
            self.add_module(f"block{s}", nn.ModuleList(block() for _ in range(depth)))
            size, patch = embed.grid_size, (2, 2)
        self.norm = nn.LayerNorm(embed_dims[-1], eps=norm_eps)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dims[-1]))
        self.head = nn.Linear(embed_dims[-1], num_classes) if num_classes else nn.Identity()
        self.apply(_init_linear)
        for position in (self.cls_token, *(self._parameters[f"pos_embed{s + 1}"] for s in range(self.num_stages))):
            nn.init.trunc_normal_(position, std=0.02)

    @property
    def patch_embed(self) -> NormedPatchEmbed:
        """What reads the images."""
        return self.patch_embed1

    def position_grids(self) -> dict[str, tuple[int, int]]:
        """The grid that each position embedding is of."""
        return {f"pos_embed{s}": self._modules[f"patch_embed{s}"].grid_size for s in range(1, self.num_stages + 1)}

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) to the last stage's normalised tokens (B, 1 + H'*W', C)."""
        for s in range(1, self.num_stages + 1):
            embed, position = self._modules[f"patch_embed{s}"], self._parameters[f"pos_embed{s}"]
            grid, x = embed.grid_size, embed(x)
            if s == self.num_stages:
                x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1).to(x.dtype), x), 1)
            x = x + position
            for block in self._modules[f"block{s}"]:
                x = block(x, grid)
            if s < self.num_stages:
                x = written_down(to_maps(x, grid))
        return self.norm(x)

    def forward_head(self, x: Tensor) -> Tensor:
        """Tokens (B, 1 + H'*W', C) to logits (B, num_classes)."""
        return self.head(x[:, 0])

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

"""TNT (arXiv 2103.00112): Transformer blocks over patches, each fed by one over the pixels inside; state-dict keys are the authors'."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lifeops.arguments import check_callable
from lifeops.models.blocks import ConvFactory
from lifeops.models.deit import DropPath, _init_linear
from lifeops.models.inputs import check_images, check_rates, check_sizes, grid_of, to_pair
from lifeops.models.swin import windows
from lifeops.nn.attend import attend_tokens, split_heads
from lifeops.nn.dense import linears, multiplier
from lifeops.nn.feed_forward import FeedForward
from lifeops.nn.inputs import check_heads
from lifeops.options import Pair
from lifeops.told import ToldInMetadata

NAME = "TNT"
_STRIDE = 4  # of the convolution that makes pixels


class SplitAttention(ToldInMetadata):
    """softmax(q kᵀ / sqrt(d)) v, then ``proj``: tokens (B, N, C), q and k of one projection, v of another."""

    no_rollout = "one of the two in a block of TNT: what its tokens draw on is also what their pixels do"

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool = False):
        super().__init__()
        dim, self.num_heads = check_heads(NAME, dim, num_heads)
        self.scale = (dim // num_heads) ** -0.5
        self.qk = nn.Linear(dim, 2 * dim, bias=qkv_bias)
        self.v = nn.Linear(dim, dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def fused_layers(self):
        return linears("qk", "v", "proj")

    def forward(self, x: Tensor) -> Tensor:
        multiply = multiplier(self)
        q, k = split_heads(multiply(x, self.qk), self.num_heads, 2)
        v = multiply(x, self.v).unflatten(2, (self.num_heads, -1)).transpose(1, 2)
        return multiply(attend_tokens(q, k, v, self.scale), self.proj)


class TNTBlock(nn.Module):
    """Pixels (B*N, n, c) and patches (B, P + N, C) to such: a block over the n pixels of every patch, whose outputs are normalised and
    projected onto the patch; then a block over the patches, whose feed-forward ``conv`` may give (:class:`lifeops.models.tnt.TNT`).
    """

    def __init__(
        self, dim: int, in_dim: int, num_pixels: int, num_heads: int, in_num_heads: int, mlp_ratio: float, num_prefix_tokens: int = 1,
        qkv_bias: bool = False, norm_eps: float = 1e-5, drop_path: float = 0.0, conv: ConvFactory | None = None,
    ):  # fmt: skip
        super().__init__()
        self.num_prefix_tokens = num_prefix_tokens

        def norm(width):
            return nn.LayerNorm(width, eps=norm_eps)

        self.norm_in, self.attn_in = norm(in_dim), SplitAttention(in_dim, in_num_heads, qkv_bias)
        self.norm_mlp_in, self.mlp_in = norm(in_dim), FeedForward(in_dim, 4 * in_dim)
        self.norm1_proj, self.proj = norm(in_dim), nn.Linear(in_dim * num_pixels, dim)
        self.norm_out, self.attn_out = norm(dim), SplitAttention(dim, num_heads, qkv_bias)
        self.conv = None if conv is None else conv(dim, mlp_ratio, num_prefix_tokens)
        self.norm_mlp = norm(dim) if conv is None else None
        self.mlp = FeedForward(dim, int(dim * mlp_ratio)) if conv is None else None
        self.drop_path = DropPath(drop_path)

    def forward(self, pixels: Tensor, patches: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        P = self.num_prefix_tokens
        pixels = pixels + self.drop_path(self.attn_in(self.norm_in(pixels)))
        pixels = pixels + self.drop_path(self.mlp_in(self.norm_mlp_in(pixels)))
        inside = self.proj(self.norm1_proj(pixels).reshape(patches.shape[0], grid[0] * grid[1], -1))
        patches = torch.cat((patches[:, :P], patches[:, P:] + inside), 1)
        patches = patches + self.drop_path(self.attn_out(self.norm_out(patches)))
        if self.conv is not None:
            return pixels, self.conv(patches, grid)
        return pixels, patches + self.drop_path(self.mlp(self.norm_mlp(patches)))


class PixelEmbed(nn.Module):
    """Images (B, in_chans, H, W) to the pixels (B * H/p * W/p, n, c) of every patch: a 7 x 7 convolution of stride 4, n = (p / 4)²."""

    def __init__(self, img_size: tuple[int, int], patch_size: int, in_chans: int, in_dim: int):
        super().__init__()
        self.img_size, self.patch_size, self.grid_size = img_size, (patch_size,) * 2, grid_of(NAME, img_size, (patch_size,) * 2)
        self.side = patch_size // _STRIDE
        self.proj = nn.Conv2d(in_chans, in_dim, 7, stride=_STRIDE, padding=3)

    def forward(self, x: Tensor) -> Tensor:
        check_images(NAME, x, self.proj.in_channels, self.img_size, self.proj)
        return windows(self.proj(x).permute(0, 2, 3, 1), self.side)


class TNT(nn.Module):
    """Transformer in Transformer: images (B, in_chans, H, W) to logits (B, num_classes), read from the class token.

    Args:
        patch_size: a multiple of 4. embed_dim, num_heads, mlp_ratio: of the patches. in_dim, in_num_heads: of the pixels.
        conv: called as ``conv(dim, mlp_ratio, 1)`` once per block, gives what stands in the place of the patches' second LayerNorm
            and MLP (:class:`lifeops.nn.LocalityFeedForward`); None: they themselves.

    ``num_classes=0`` leaves the head out: the features (B, C) come out. Raises ValueError where sizes do not fit each other.
    """

    def __init__(
        self, img_size: Pair = 224, patch_size: int = 16, in_chans: int = 3, num_classes: int = 1000, embed_dim: int = 192,
        in_dim: int = 12, depth: int = 12, num_heads: int = 3, in_num_heads: int = 3, mlp_ratio: float = 4.0, qkv_bias: bool = False,
        norm_eps: float = 1e-5, drop_path_rate: float = 0.0, conv: ConvFactory | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        sizes = {"embed_dim": embed_dim, "in_dim": in_dim, "depth": depth, "num_heads": num_heads, "in_num_heads": in_num_heads}
        check_sizes(NAME, in_chans=in_chans, num_classes=num_classes, patch_size=patch_size, **sizes)
        check_rates(NAME, mlp_ratio=mlp_ratio, drop=("drop_path_rate", drop_path_rate), eps=norm_eps, qkv_bias=qkv_bias)
        check_callable(NAME, "conv", conv)
        if patch_size % _STRIDE:
            raise ValueError(f"{NAME}: patch_size must be a multiple of {_STRIDE}, got {patch_size}")
        self.num_classes, self.img_size, self.num_prefix_tokens = num_classes, to_pair(NAME, "img_size", img_size), 1
        self.pixel_embed = PixelEmbed(self.img_size, patch_size, in_chans, in_dim)
        (H, W), side = self.pixel_embed.grid_size, self.pixel_embed.side
        num_pixels = side * side
        self.norm1_proj = nn.LayerNorm(num_pixels * in_dim, eps=norm_eps)
        self.proj = nn.Linear(num_pixels * in_dim, embed_dim)
        self.norm2_proj = nn.LayerNorm(embed_dim, eps=norm_eps)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.patch_pos = nn.Parameter(torch.zeros(1, 1 + H * W, embed_dim))
        self.pixel_pos = nn.Parameter(torch.zeros(1, in_dim, side, side))
        rates = torch.linspace(0, drop_path_rate, depth, device="cpu").tolist()
        widths = embed_dim, in_dim, num_pixels, num_heads, in_num_heads, mlp_ratio
        self.blocks = nn.ModuleList(TNTBlock(*widths, 1, qkv_bias, norm_eps, rate, conv) for rate in rates)
        self.norm = nn.LayerNorm(embed_dim, eps=norm_eps)
        self.head = nn.Linear(embed_dim, num_classes) if num_classes else nn.Identity()
        self.apply(_init_linear)
        for position in (self.cls_token, self.patch_pos, self.pixel_pos):
            nn.init.trunc_normal_(position, std=0.02)

    def position_grids(self) -> dict[str, tuple[int, int]]:
        """The grid that each position embedding is of."""
        return {"patch_pos": self.pixel_embed.grid_size}

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) to the patches' normalised tokens (B, 1 + H*W, C)."""
        grid = self.pixel_embed.grid_size
        pixels = self.pixel_embed(x) + self.pixel_pos.flatten(2).transpose(1, 2)
        patches = self.norm2_proj(self.proj(self.norm1_proj(pixels.reshape(x.shape[0], grid[0] * grid[1], -1))))
        patches = torch.cat((self.cls_token.expand(x.shape[0], -1, -1).to(patches.dtype), patches), 1) + self.patch_pos
        for block in self.blocks:
            pixels, patches = block(pixels, patches, grid)
        return self.norm(patches)

    def forward_head(self, x: Tensor) -> Tensor:
        """Tokens (B, 1 + H*W, C) to logits (B, num_classes)."""
        return self.head(x[:, 0])

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

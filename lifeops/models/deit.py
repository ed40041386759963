"""A small, readable DeiT whose state dict is timm's, and whose attention module can be chosen.

Source: Touvron et al., "Training data-efficient image transformers & distillation through attention" (2021).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lifeops.arguments import check_callable
from lifeops.models.inputs import check_images, check_rates, check_sizes, grid_of, to_pair
from lifeops.nn.attend import fused_attention
from lifeops.told import ToldInMetadata

AttentionFactory = Callable[[int, int, int], nn.Module]
BlockFactory = Callable[[int, int, int, nn.Module], nn.Module]


class PatchEmbed(nn.Module):
    """Images (B, in_chans, H, W) to patch tokens (B, H/p * W/p, C), row-major. ``grid_size`` is (H/p, W/p)."""

    def __init__(
        self, img_size: tuple[int, int], patch_size: tuple[int, int], in_chans: int, embed_dim: int, model: str = "VisionTransformer"
    ):
        super().__init__()
        self.model, self.grid_size = model, grid_of(model, img_size, patch_size)
        self.img_size, self.patch_size = img_size, patch_size
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        self.proj = nn.Conv2d(in_chans, embed_dim, patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        check_images(self.model, x, self.proj.in_channels, self.img_size, self.proj)
        return self.proj(x).flatten(2).transpose(1, 2)


class NormedPatchEmbed(PatchEmbed):
    """The same with a LayerNorm behind it."""

    def __init__(self, img_size: tuple[int, int], patch_size: tuple[int, int], in_chans: int, embed_dim: int, model: str):
        super().__init__(img_size, patch_size, in_chans, embed_dim, model)
        self.norm = nn.LayerNorm(embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(super().forward(x))


class Attention(ToldInMetadata):
    """Multi-head self-attention over all tokens: softmax(q k^T / sqrt(C / h)) v, then ``proj``. (B, N, C) -> (B, N, C)."""

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool = True):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        B, N, C = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, self.num_heads, C // self.num_heads).permute(2, 0, 3, 1, 4)
        x = fused_attention(q, k, v)
        return self.proj(x.transpose(1, 2).reshape(B, N, C))


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden_dim: int, dim_out: int | None = None):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden_dim, dim if dim_out is None else dim_out)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class DropPath(nn.Module):
    """Stochastic depth: in training, a sample loses the whole branch with probability ``drop_prob``."""

    def __init__(self, drop_prob: float):
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        if self.drop_prob == 0.0 or not self.training:
            return x
        keep = 1.0 - self.drop_prob
        return x * x.new_empty(x.shape[0], 1, 1).bernoulli_(keep).div_(keep)


class Block(nn.Module):
    """Pre-norm block: x + attn(norm1(x)), then x + mlp(norm2(x)), each given the grid too where it has ``needs_grid``.

    ``mlp``: called as ``mlp(dim, hidden_dim)``.
    """

    def __init__(self, dim: int, attn: nn.Module, mlp_ratio: float, norm_eps: float, drop_path: nn.Module, mlp=Mlp):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps)
        self.attn = attn
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps)
        self.mlp = mlp(dim, int(dim * mlp_ratio))
        self.drop_path = drop_path

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        x = x + self.drop_path(_on_grid(self.attn, self.norm1(x), grid))
        return x + self.drop_path(_on_grid(self.mlp, self.norm2(x), grid))


def _on_grid(module: nn.Module, x: Tensor, grid: tuple[int, int]) -> Tensor:
    return module(x, grid) if getattr(module, "needs_grid", False) else module(x)


class VisionTransformer(nn.Module):
    """DeiT: images (B, in_chans, H, W) to logits (B, num_classes).

    Tokens are [cls | dist | registers | patches], ``num_prefix_tokens`` of them before the ``patch_embed.grid_size`` patches.
    With ``dist_token`` the forward pass returns (cls logits, dist logits) in training and their mean in evaluation. Without
    ``class_token`` the logits come from the mean patch token (after ``norm``, timm's ``fc_norm=False``).

    ``attn``: called as ``attn(dim, num_heads, num_prefix_tokens)`` once per block, returns the attention module to use
    instead of the plain one (``qkv_bias`` is then its own affair). A module with ``needs_grid = True`` is called as
    ``module(x, grid)`` with ``grid = patch_embed.grid_size``, any other as ``module(x)``.

    ``block``: called as ``block(dim, num_heads, num_prefix_tokens, drop_path)`` once per block, returns the whole block to use
    instead, called as ``module(x, grid)``; ``attn``, ``mlp_ratio`` and ``qkv_bias`` are then its own affair.

    ``num_classes=0`` leaves the heads out: the features (B, C) come out instead of logits.
    Raises ValueError where sizes do not fit each other.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 192,
        depth: int = 12,
        num_heads: int = 3,
        mlp_ratio: float = 4.0,
        class_token: bool = True,
        dist_token: bool = False,
        num_reg_tokens: int = 0,
        attn: AttentionFactory | None = None,
        qkv_bias: bool = True,
        norm_eps: float = 1e-6,
        drop_path_rate: float = 0.0,
        block: BlockFactory | None = None,
    ):
        super().__init__()
        name = "VisionTransformer"
        sizes = {"in_chans": in_chans, "num_classes": num_classes, "embed_dim": embed_dim, "depth": depth, "num_heads": num_heads}
        check_sizes(name, **sizes, num_reg_tokens=num_reg_tokens)
        flags = {"class_token": class_token, "dist_token": dist_token, "qkv_bias": qkv_bias}
        check_rates(name, mlp_ratio=mlp_ratio, drop=("drop_path_rate", drop_path_rate), eps=norm_eps, **flags)
        check_callable(name, "attn", attn), check_callable(name, "block", block)
        _check_tokens(embed_dim, num_heads, class_token, dist_token)
        self.num_classes, self.embed_dim = num_classes, embed_dim
        self.num_prefix_tokens = P = int(class_token) + int(dist_token) + num_reg_tokens
        sizes = ("img_size", img_size), ("patch_size", patch_size)
        self.patch_embed = PatchEmbed(*(to_pair("VisionTransformer", *size) for size in sizes), in_chans, embed_dim)
        self.cls_token = _token(1, embed_dim) if class_token else None
        self.dist_token = _token(1, embed_dim) if dist_token else None
        self.reg_token = _token(num_reg_tokens, embed_dim) if num_reg_tokens else None
        self.pos_embed = _token(P + self.patch_embed.num_patches, embed_dim)
        if attn is None:

            def attn(dim: int, num_heads: int, num_prefix_tokens: int) -> nn.Module:
                return Attention(dim, num_heads, qkv_bias)

        rates = [drop_path_rate * i / max(1, depth - 1) for i in range(depth)]  # deeper blocks are dropped more often
        if block is None:

            def block(dim: int, num_heads: int, num_prefix_tokens: int, drop_path: DropPath) -> nn.Module:
                return Block(dim, attn(dim, num_heads, num_prefix_tokens), mlp_ratio, norm_eps, drop_path)

        self.blocks = nn.ModuleList(block(embed_dim, num_heads, P, DropPath(r)) for r in rates)
        self.norm = nn.LayerNorm(embed_dim, eps=norm_eps)
        self.head = nn.Linear(embed_dim, num_classes) if num_classes else nn.Identity()
        if dist_token:
            self.head_dist = nn.Linear(embed_dim, num_classes) if num_classes else nn.Identity()
        self.apply(_init_linear)
        for token in (self.cls_token, self.dist_token, self.reg_token, self.pos_embed):
            if token is not None:
                nn.init.trunc_normal_(token, std=0.02)

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) to normalised tokens (B, P + H*W, C)."""
        x = self.patch_embed(x)
        prefix = [t.expand(x.shape[0], -1, -1) for t in (self.cls_token, self.dist_token, self.reg_token) if t is not None]
        x = torch.cat([*prefix, x], dim=1) + self.pos_embed
        for block in self.blocks:
            x = block(x, self.patch_embed.grid_size)
        return self.norm(x)

    def forward_head(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Tokens (B, P + H*W, C) to logits (B, num_classes), or in training with a dist token to a pair of them."""
        if self.cls_token is None:
            return self.head(x[:, self.num_prefix_tokens :].mean(dim=1))
        cls = self.head(x[:, 0])
        if self.dist_token is None:
            return cls
        dist = self.head_dist(x[:, 1])
        return (cls, dist) if self.training else (cls + dist) / 2

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        return self.forward_head(self.forward_features(x))


def _check_tokens(embed_dim: int, num_heads: int, class_token: bool, dist_token: bool) -> None:
    if embed_dim % num_heads:
        raise ValueError(f"VisionTransformer: embed_dim must be a multiple of num_heads {num_heads}, got {embed_dim}")
    if dist_token and not class_token:
        raise ValueError("VisionTransformer: dist_token needs class_token (the two logits are averaged)")


def _token(count: int, dim: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(1, count, dim))


def _init_linear(module: nn.Module) -> None:
    """DeiT's initialisation: convolutions (also those of a custom attention) keep PyTorch's default, as the LIFE authors do."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)

"""The ViT and CaiT hosts of the DW shortcut (arXiv 2407.19394) in its authors' key layout, which is vit-pytorch's.

    ViT     [cls | patches] + pos_embedding, ``transformer`` (blocks and shortcuts), ``mlp_head`` of the class token
    CaiT    patches + pos_embedding, ``patch_transformer`` (talking heads, layer scale, shortcuts), ``cls_transformer``: the class
            token attends to itself, normalised, and to the patches, which are not, ``mlp_head``

Sources: Dosovitskiy et al., arXiv 2010.11929; Touvron et al., "Going deeper with Image Transformers", arXiv 2103.17239.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lifeops.arguments import check_rate, check_tensor
from lifeops.models.inputs import check_images, check_rates, check_sizes, grid_of, to_pair
from lifeops.nn.attend import fused_attention
from lifeops.nn.dw_shortcut import ShortcutModule, check_every
from lifeops.nn.inputs import check_like
from lifeops.nn.inputs import kernel_sizes as check_kernel_sizes
from lifeops.options import Pair
from lifeops.told import ToldInMetadata


class Patches(nn.Module):
    """Images (B, C, H, W) to flat patches (B, h * w, p1 * p2 * C), row-major, channels fastest."""

    def __init__(self, model: str, img_size: tuple[int, int], patch_size: tuple[int, int], in_chans: int):
        super().__init__()
        self.model, self.img_size, self.patch_size, self.in_chans = model, img_size, patch_size, in_chans
        self.grid_size = grid_of(model, img_size, patch_size)

    def forward(self, x: Tensor) -> Tensor:
        check_images(self.model, x, self.in_chans, self.img_size)
        (h, w), (p1, p2) = self.grid_size, self.patch_size
        return x.reshape(x.shape[0], self.in_chans, h, p1, w, p2).permute(0, 2, 4, 3, 5, 1).reshape(x.shape[0], h * w, -1)


class FeedForward(nn.Module):
    def __init__(self, dim: int, hidden_dim: int, drop_rate: float):
        super().__init__()
        drop = nn.Dropout(drop_rate)
        self.net = nn.Sequential(nn.Linear(dim, hidden_dim), nn.GELU(), drop, nn.Linear(hidden_dim, dim), nn.Dropout(drop_rate))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class PreNorm(nn.Module):
    """fn(LN(x), …)."""

    def __init__(self, dim: int, fn: nn.Module):
        super().__init__()
        self.norm, self.fn = nn.LayerNorm(dim), fn

    def forward(self, x: Tensor, *context: Tensor) -> Tensor:
        return self.fn(self.norm(x), *context)


class LayerScale(nn.Module):
    """scale * fn(x, …); the scale starts smaller in deeper layers."""

    def __init__(self, dim: int, fn: nn.Module, layer: int):
        super().__init__()
        start = 0.1 if layer <= 18 else 1e-5 if layer <= 24 else 1e-6
        self.scale, self.fn = nn.Parameter(torch.full((1, 1, dim), start)), fn

    def forward(self, x: Tensor, *context: Tensor) -> Tensor:
        return self.fn(x, *context) * self.scale


def _heads(t: Tensor, num_heads: int) -> Tensor:
    """(B, N, h * d) -> (B, h, N, d)."""
    return t.unflatten(2, (num_heads, -1)).transpose(1, 2)


class Attention(ToldInMetadata):
    """Self-attention without qkv bias; ``to_out`` is missing for one head of the model's width."""

    def __init__(self, dim: int, num_heads: int, head_dim: int, drop_rate: float):
        super().__init__()
        inner = num_heads * head_dim
        self.num_heads, self.drop_rate = num_heads, drop_rate
        self.to_qkv = nn.Linear(dim, 3 * inner, bias=False)
        project = num_heads > 1 or head_dim != dim
        self.to_out = nn.Sequential(nn.Linear(inner, dim), nn.Dropout(drop_rate)) if project else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (_heads(t, self.num_heads) for t in self.to_qkv(x).chunk(3, -1))
        x = fused_attention(q, k, v, dropout_p=self.drop_rate if self.training else 0.0)
        return self.to_out(x.transpose(1, 2).flatten(2))


class TalkingHeads(nn.Module):
    """Attention whose heads are mixed before and after the softmax; to x and, if given, to ``context``."""

    def __init__(self, dim: int, num_heads: int, head_dim: int, drop_rate: float):
        super().__init__()
        inner = num_heads * head_dim
        self.num_heads, self.scale, self.drop = num_heads, head_dim**-0.5, nn.Dropout(drop_rate)
        self.to_q = nn.Linear(dim, inner, bias=False)
        self.to_kv = nn.Linear(dim, 2 * inner, bias=False)
        self.mix_heads_pre_attn = nn.Parameter(torch.randn(num_heads, num_heads))
        self.mix_heads_post_attn = nn.Parameter(torch.randn(num_heads, num_heads))
        self.to_out = nn.Sequential(nn.Linear(inner, dim), nn.Dropout(drop_rate))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        seen = x if context is None else torch.cat((x, context), 1)
        q, k, v = (_heads(t, self.num_heads) for t in (self.to_q(x), *self.to_kv(seen).chunk(2, -1)))
        weights = torch.einsum("bhij,hg->bgij", q @ k.transpose(-1, -2) * self.scale, self.mix_heads_pre_attn)
        weights = torch.einsum("bhij,hg->bgij", self.drop(weights.softmax(-1)), self.mix_heads_post_attn)
        return self.to_out((weights @ v).transpose(1, 2).flatten(2))


def _run(layer: nn.ModuleList, x: Tensor, *context: Tensor) -> Tensor:
    """Attention, then feed-forward, each with its residual."""
    attn, ff = layer
    x = x + attn(x, *context)
    return x + ff(x)


class Transformer(ShortcutModule):
    """Pairs (attention, feed-forward) with a shortcut around every ``every`` of them, or without (None)."""

    def __init__(self, layers, dim: int, every: int | None, kernel_sizes: int | tuple[int, ...], num_prefix_tokens: int):
        layers = [nn.ModuleList(layer) for layer in layers]
        if every is not None:
            check_every("Transformer", every, len(layers))
        super().__init__(dim, 0 if every is None else len(layers) // every, kernel_sizes)
        self.layers, self.every, self.num_prefix_tokens = nn.ModuleList(layers), every, num_prefix_tokens

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        start = x
        for i, layer in enumerate(self.layers, 1):
            x = _run(layer, x)
            if self.every and i % self.every == 0:
                x = start = self.add_shortcut(i // self.every - 1, start, x, grid, self.num_prefix_tokens)
        return x


class ClassTransformer(nn.Module):
    """Pairs (attention, feed-forward) for the class token, which attends to itself and to the patches."""

    def __init__(self, layers):
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleList(layer) for layer in layers)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        for layer in self.layers:
            x = _run(layer, x, context)
        return x


def _check_stack(model: nn.Module, depths: dict, mlp_ratio, every, kernel_sizes) -> None:
    """What is asked of a host's layers."""
    name = type(model).__name__
    check_sizes(name, **depths)
    check_rates(name, mlp_ratio=mlp_ratio)
    check_kernel_sizes(name, "kernel_sizes", kernel_sizes)
    if every is not None:
        check_every(name, every, depths["depth"])


class _Host(nn.Module):
    """What the two hosts share: patch embedding, tokens and head."""

    def __init__(self, img_size, patch_size, in_chans, num_classes, embed_dim, num_heads, head_dim, drop_rate, num_pos_prefix):
        super().__init__()
        name = type(self).__name__
        sizes = {"in_chans": in_chans, "num_classes": num_classes, "embed_dim": embed_dim, "num_heads": num_heads}
        check_sizes(name, ("head_dim",), **sizes, head_dim=head_dim)
        if head_dim is None and embed_dim % num_heads:
            raise ValueError(f"{name}: embed_dim must be a multiple of num_heads {num_heads} without head_dim, got {embed_dim}")
        self.head_dim = embed_dim // num_heads if head_dim is None else head_dim
        img_size, patch_size = to_pair(name, "img_size", img_size), to_pair(name, "patch_size", patch_size)
        patches = Patches(name, img_size, patch_size, in_chans)
        self.grid_size = patches.grid_size
        self.to_patch_embedding = nn.Sequential(patches, nn.Linear(in_chans * patch_size[0] * patch_size[1], embed_dim))
        self.pos_embedding = nn.Parameter(torch.randn(1, num_pos_prefix + self.grid_size[0] * self.grid_size[1], embed_dim))
        self.cls_token = nn.Parameter(torch.randn(1, 1, embed_dim))
        self.dropout = nn.Dropout(check_rate(name, "drop_rate", drop_rate, one=True))
        self.mlp_head = nn.Sequential(nn.LayerNorm(embed_dim), nn.Linear(embed_dim, num_classes))

    def embed(self, x: Tensor) -> Tensor:
        """Images to patch tokens."""
        check_tensor(type(self).__name__, "x", x)
        check_like(type(self).__name__, "x", x, self.to_patch_embedding._modules.get("1"))
        return self.to_patch_embedding(x)


class ViT(_Host):
    """Images (B, in_chans, H, W) to logits (B, num_classes).

    Args:
        head_dim: d of each head, by default embed_dim / num_heads. mlp_ratio: hidden width of the feed-forward / embed_dim.
        drop_rate: dropout of embedding, attention and feed-forward.
        every, kernel_sizes: a shortcut around every so many blocks (None: no shortcuts), its kernel sizes.

    Parameters start as PyTorch's layers do, tokens and positions from N(0, 1), as the authors'. Raises ValueError where sizes do
    not fit each other.
    """

    def __init__(
        self, img_size: Pair = 224, patch_size: Pair = 16, in_chans: int = 3, num_classes: int = 1000, embed_dim: int = 192,
        depth: int = 12, num_heads: int = 3, head_dim: int | None = None, mlp_ratio: float = 4.0, drop_rate: float = 0.0,
        every: int | None = 1, kernel_sizes: int | tuple[int, ...] = 3,
    ) -> None:  # fmt: skip
        super().__init__(img_size, patch_size, in_chans, num_classes, embed_dim, num_heads, head_dim, drop_rate, 1)
        _check_stack(self, {"depth": depth}, mlp_ratio, every, kernel_sizes)
        hidden = round(embed_dim * mlp_ratio)

        def layer():
            attention = Attention(embed_dim, num_heads, self.head_dim, drop_rate)
            return PreNorm(embed_dim, attention), PreNorm(embed_dim, FeedForward(embed_dim, hidden, drop_rate))

        self.transformer = Transformer([layer() for _ in range(depth)], embed_dim, every, kernel_sizes, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), 1) + self.pos_embedding
        return self.mlp_head(self.transformer(self.dropout(x), self.grid_size)[:, 0])


class CaiT(_Host):
    """Images (B, in_chans, H, W) to logits (B, num_classes). ``depth`` patch layers with shortcuts, ``cls_depth`` class layers without.

    The other arguments and errors are :class:`ViT`'s.
    """

    def __init__(
        self, img_size: Pair = 224, patch_size: Pair = 16, in_chans: int = 3, num_classes: int = 1000, embed_dim: int = 192,
        depth: int = 12, cls_depth: int = 2, num_heads: int = 4, head_dim: int | None = None, mlp_ratio: float = 4.0,
        drop_rate: float = 0.0, every: int | None = 1, kernel_sizes: int | tuple[int, ...] = 3,
    ) -> None:  # fmt: skip
        super().__init__(img_size, patch_size, in_chans, num_classes, embed_dim, num_heads, head_dim, drop_rate, 0)
        _check_stack(self, {"depth": depth, "cls_depth": cls_depth}, mlp_ratio, every, kernel_sizes)
        hidden = round(embed_dim * mlp_ratio)

        def layers(count):
            for i in range(1, count + 1):
                attention = TalkingHeads(embed_dim, num_heads, self.head_dim, drop_rate)
                branches = attention, FeedForward(embed_dim, hidden, drop_rate)
                yield [LayerScale(embed_dim, PreNorm(embed_dim, branch), i) for branch in branches]

        self.patch_transformer = Transformer(layers(depth), embed_dim, every, kernel_sizes, 0)
        self.cls_transformer = ClassTransformer(layers(cls_depth))

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_transformer(self.dropout(self.embed(x) + self.pos_embedding), self.grid_size)
        cls = self.cls_transformer(self.cls_token.expand(x.shape[0], -1, -1), x)
        return self.mlp_head(cls[:, 0])

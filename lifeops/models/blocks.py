"""Pre-norm blocks of the hosts, with LocalViT's feed-forward in the place of the second norm and the MLP where it is asked for."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from lifeops.models.deit import Attention, Block, DropPath
from lifeops.nn.attend import attend_tokens, split_heads
from lifeops.nn.dense import linears, multiplier
from lifeops.nn.feed_forward import FeedForward
from lifeops.nn.localvit import LocalViTBlock

ConvFactory = Callable[[int, float, int], nn.Module]
"""Called as ``conv(dim, mlp_ratio, num_prefix_tokens)`` once per block; what it makes is called as ``module(x, grid)``."""


class TokenAttention(Attention):
    """The same numbers by lifeops' own products and attention."""

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool = True):
        super().__init__(dim, num_heads, qkv_bias)
        self.scale = (dim // num_heads) ** -0.5

    def fused_layers(self):
        return linears("qkv", "proj")

    def forward(self, x: Tensor) -> Tensor:
        multiply = multiplier(self)
        q, k, v = split_heads(multiply(x, self.qkv), self.num_heads)
        return multiply(attend_tokens(q, k, v, self.scale), self.proj)


def pre_norm_block(
    dim: int, attn: nn.Module, mlp_ratio: float, norm_eps: float, drop_path: DropPath, conv: ConvFactory | None, num_prefix_tokens: int
) -> nn.Module:
    """x + drop_path(attn(norm1(x))), then x + drop_path(mlp(norm2(x))) or, with ``conv``, its module; called as ``module(x, grid)``."""
    if conv is None:
        return Block(dim, attn, mlp_ratio, norm_eps, drop_path, FeedForward)
    return LocalViTBlock(nn.LayerNorm(dim, eps=norm_eps), attn, conv(dim, mlp_ratio, num_prefix_tokens), drop_path)

"""Pre-norm blocks of the hosts, with LocalViT's feed-forward in the place of the second norm and the MLP where it is asked for."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from lifeops.models.deit import Block, DropPath
from lifeops.nn.localvit import LocalViTBlock

ConvFactory = Callable[[int, float, int], nn.Module]
"""Called as ``conv(dim, mlp_ratio, num_prefix_tokens)`` once per block; what it makes is called as ``module(x, grid)``."""


def pre_norm_block(
    dim: int, attn: nn.Module, mlp_ratio: float, norm_eps: float, drop_path: DropPath, conv: ConvFactory | None, num_prefix_tokens: int
) -> nn.Module:
    """x + drop_path(attn(norm1(x))), then x + drop_path(mlp(norm2(x))) or, with ``conv``, its module; called as ``module(x, grid)``."""
    if conv is None:
        return Block(dim, attn, mlp_ratio, norm_eps, drop_path)
    return LocalViTBlock(nn.LayerNorm(dim, eps=norm_eps), attn, conv(dim, mlp_ratio, num_prefix_tokens), drop_path)

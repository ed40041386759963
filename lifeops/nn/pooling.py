"""Tokens pooled on their grid: what a strided depth-wise convolution or a max or mean window makes of them, prefix tokens untouched."""

from __future__ import annotations

import torch
from torch import nn

from lifeops.geometry import conv_grid
from lifeops.nn.maps import to_maps, written_down
from lifeops.nn.plain import pool, why_not
from lifeops.ops.token_dwconv.public import token_dwconv
from lifeops.ops.token_pool.function import token_pool


def pooled_grid(layer: nn.Module | None, grid: tuple[int, int]) -> tuple[int, int]:
    """What ``layer``, a plain one, makes of ``grid``; None leaves it."""
    if layer is None:
        return tuple(grid)
    return conv_grid(grid, layer.kernel_size, layer.stride, layer.padding, getattr(layer, "ceil_mode", False))


def pool_tokens(name: str, layer: nn.Module | None, x, grid, num_prefix_tokens: int, fused: bool):
    """(x pooled, its grid); x (B, P + H*W, C) or heads (B, h, P + H*W, d) that share the layer. ``fused``: the layer is what the ops
    compute, else it is called on maps; ValueError in the words of ``name`` where it gives something else.
    """
    if layer is None:
        return x, tuple(grid)
    if not fused:
        return _by_layer(name, layer, x, grid, num_prefix_tokens)
    place = {"grid": grid, "num_prefix_tokens": num_prefix_tokens, "stride": layer.stride, "padding": layer.padding}
    new = pooled_grid(layer, grid)
    if isinstance(layer, nn.Conv2d):
        return token_dwconv(x, layer.weight, layer.bias, **place), new
    mode, counted = ("max", True) if isinstance(layer, nn.MaxPool2d) else ("avg", layer.count_include_pad)
    options = {"mode": mode, "ceil_mode": layer.ceil_mode, "count_include_pad": counted}
    return token_pool(x, layer.kernel_size, **options, **place), new


def _by_layer(name, layer, x, grid, P):
    maps = to_maps(x[..., P:, :].reshape(-1, grid[0] * grid[1], x.shape[-1]), grid)
    out = layer(written_down(maps))
    if out.dim() != 4 or out.shape[:2] != maps.shape[:2]:
        why = "; ".join(why_not(layer, pool)) or "a layer inside it"
        raise ValueError(f"{name} makes {tuple(out.shape)} of {tuple(maps.shape)}, and every channel needs a map of its own ({why})")
    patches = out.flatten(2).transpose(1, 2).unflatten(0, x.shape[:-2])
    new = tuple(out.shape[2:])
    return (torch.cat((x[..., :P, :].to(patches.dtype), patches), -2) if P else patches), new

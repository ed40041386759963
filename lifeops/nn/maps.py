"""Tokens as the maps (B, C, H, W) that convolutions and norms of torch take, and back: views wherever memory allows."""

from __future__ import annotations

from collections.abc import Callable

import torch

from lifeops import torchlib
from lifeops.nn.plain import Rule


def to_maps(t: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """(B, H*W, C) -> (B, C, H, W), channels last in memory."""
    return t.unflatten(1, grid).permute(0, 3, 1, 2)


def to_tokens(maps: torch.Tensor) -> torch.Tensor:
    """(B, C, H, W) -> (B, H*W, C)."""
    return maps.flatten(2).transpose(1, 2)


def orderly(maps: torch.Tensor) -> torch.Tensor:
    """``maps`` with the strides of a whole tensor where a dimension of size 1 leaves them open.

    torch's CPU batch norm (2.13) takes some such tensors for channels last and others for contiguous, its backward not the same ones:
    the gradient is then read in the wrong order. A view of tokens has them for one image, whose batch stride may be any number, and for
    a grid one patch wide.
    """
    return maps.contiguous() if any(map(torchlib.may_be_one, (maps.shape[0], *maps.shape[2:]))) else maps


def written_down(maps: torch.Tensor) -> torch.Tensor:
    """``maps`` for a convolution: where a program is written down with strides that fix no batch size (channels last of one image does)."""
    return orderly(maps) if torchlib.captured() else maps


def orderly_gradient(maps: torch.Tensor) -> torch.Tensor:
    """``maps``, whose gradient has such strides, too: it is added to fresh zeros."""
    if not torchlib.may_be_one(maps.shape[0]) or not maps.requires_grad:  # asked in this order: torch.jit.trace checks without gradients
        return maps
    return maps.index_select(0, torch.arange(maps.shape[0], device=maps.device))


def apply(name: str, layer: Callable, maps: torch.Tensor) -> torch.Tensor:
    """``layer(maps)``, of any height and width; maps without a pixel give themselves, and parameters zero gradients.

    Raises ValueError unless maps (B, C, H, W) come out.
    """
    if 0 in maps.shape[2:]:
        return maps + sum(p.flatten()[:0].sum().to(maps.dtype) for p in layer.parameters())
    out = layer(orderly(maps))
    if out.dim() != 4:
        raise ValueError(f"{name} must make maps (B, C, H, W) of {tuple(maps.shape)}, got {tuple(out.shape)}")
    return orderly_gradient(out)


def call(name: str, layer: Callable, maps: torch.Tensor, rule: Rule) -> torch.Tensor:
    """:func:`apply`. Raises ValueError unless a map of the same height and width comes out; ``rule`` is what the layer was to be."""
    out = apply(name, layer, maps)
    if out.shape[2:] != maps.shape[2:]:
        why = "; ".join(rule(layer)) or "a layer inside it"
        raise ValueError(
            f"{name} makes {tuple(out.shape)} of {tuple(maps.shape)}, and every patch token needs its value: use stride 1 and padding that"
            f" keeps the size ({why})"
        )
    return out


def on_patches(
    name: str, layer: Callable, t: torch.Tensor, grid: tuple[int, int], num_prefix_tokens: int, rule: Rule | None = None
) -> torch.Tensor:
    """``t`` (B, P + H*W, C) with ``layer`` called on the map of its patches; the prefix tokens stay. With a ``rule`` the grid must, too."""
    maps = to_maps(t[:, num_prefix_tokens:], grid)
    patches = to_tokens(apply(name, layer, maps) if rule is None else call(name, layer, maps, rule))
    return torch.cat((t[:, :num_prefix_tokens].to(patches.dtype), patches), 1) if num_prefix_tokens else patches

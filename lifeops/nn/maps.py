"""Tokens as the maps (B, C, H, W) that convolutions and norms of torch take, and back: views wherever memory allows."""

from __future__ import annotations

from collections.abc import Callable

import torch


def to_maps(t: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """(B, H*W, C) -> (B, C, H, W), channels last in memory."""
    return t.unflatten(1, grid).permute(0, 3, 1, 2)


def to_tokens(maps: torch.Tensor) -> torch.Tensor:
    """(B, C, H, W) -> (B, H*W, C)."""
    return maps.flatten(2).transpose(1, 2)


def on_patches(layer: Callable, t: torch.Tensor, grid: tuple[int, int], num_prefix_tokens: int) -> torch.Tensor:
    """``t`` (B, P + H*W, C) with ``layer`` called on the map of its patches; the prefix tokens stay."""
    patches = to_tokens(layer(unambiguous(to_maps(t[:, num_prefix_tokens:], grid))))
    return torch.cat((t[:, :num_prefix_tokens].to(patches.dtype), patches), 1) if num_prefix_tokens else patches


def unambiguous(maps: torch.Tensor) -> torch.Tensor:
    """``maps``, copied where their strides fit both of torch's layouts: its CPU batch norm takes a (B, C, N, 1) view of tokens for channels
    last and then reads a contiguous gradient in the wrong order.
    """
    return maps.contiguous() if 1 in maps.shape[2:] else maps

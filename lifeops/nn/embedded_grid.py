"""Which patch grid a patch embedding has made of an image."""

from __future__ import annotations

import torch
from torch import nn

from lifeops import geometry

Grid = tuple[int, int]


def embedded_grid(embed: nn.Module, args: tuple, output: torch.Tensor | tuple) -> Grid:
    """(H, W) of what a patch embedding gave out: maps tell it, flat tokens may come with it or from one that says it."""
    beside = ()
    if isinstance(output, (tuple, list)):
        output, *beside = output
    told = [n for part in beside for n in (part if isinstance(part, (tuple, list)) else (part,))]
    whole = len(told) == 2 and all(n is not None for n in told) and output.dim() == 3
    if whole and told[0] * told[1] <= output.shape[1]:  # prefix tokens among them
        grid = told
    elif beside == [None] and args[0].dim() != 4:  # NaFlexViT
        raise ValueError(
            f"lifeops: {type(embed).__name__}, the model's patch embedding, is given packed patches {tuple(args[0].shape)}, which lie on no"
            " one grid; give images (B, channels, height, width)"
        )
    elif output.dim() == 4:  # dynamic_img_size
        grid = output.shape[2:4] if geometry.channels_first(embed, output) else output.shape[1:3]
    else:
        grid = _flat_grid(embed, args, output)
    return plain(grid)


def plain(sizes) -> Grid:
    """Sizes as ints where torch.jit.trace gives them as tensors; int() of all would fix a compiler's symbolic ones."""
    return tuple(int(n) if isinstance(n, torch.Tensor) else n for n in sizes)


def _flat_grid(embed, args, output):
    size = tuple(args[0].shape[-2:]) if args and args[0].dim() == 4 else None
    patch = getattr(embed, "patch_size", None)
    patch = (patch, patch) if isinstance(patch, int) else patch
    found = []
    if size is not None and hasattr(embed, "dynamic_feat_size"):
        found.append(embed.dynamic_feat_size(size))
    elif size is not None and patch is not None:
        found.append((size[0] // patch[0], size[1] // patch[1]))
    if getattr(embed, "grid_size", None) is not None:
        found.append(embed.grid_size)
    for grid in found:
        if grid[0] * grid[1] == output.shape[1]:
            return grid
    raise ValueError(
        f"lifeops: {type(embed).__name__}, the model's patch embedding, gives {tuple(output.shape)}, whose {output.shape[1]} tokens are no"
        f" grid that it tells ({', '.join(map(str, found)) or 'it has neither grid_size nor patch_size'}); it must give maps of four"
        " dimensions or have grid_size = (H, W)"
    )

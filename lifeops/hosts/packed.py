"""Images that come as padded sequences of patches, each with a grid of its own: NaFlexViT of timm and SigLIP 2 of transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from lifeops.arguments import got, is_dense


class Packed(NamedTuple):
    """``patches`` (B, N, …): the first H·W of an image are its patches, row by row, the rest is padding. ``grids``: (H, W) of each."""

    patches: Tensor
    grids: tuple[tuple[int, int], ...]


def _sizes(op: str, name: str, sizes, patches: Tensor) -> list[tuple[int, int]]:
    if not is_dense(sizes) or tuple(sizes.shape) != (len(patches), 2) or sizes.is_floating_point():
        raise ValueError(f"{op}: {name} must be ints of shape (B, 2) = ({len(patches)}, 2), got {got(sizes)}")
    found = [(int(h), int(w)) for h, w in sizes.tolist()]
    wrong = [size for size in found if min(size) < 1 or size[0] * size[1] > patches.shape[1]]
    if wrong:
        raise ValueError(f"{op}: {name} must be grids of at least one and at most {patches.shape[1]} patches, got {wrong[0]}")
    return found


def _check_valid(op: str, name: str, valid, grids: list[tuple[int, int]], patches: Tensor) -> None:
    """The first H·W patches of each image are said to be there, and no others."""
    if not is_dense(valid) or tuple(valid.shape) != tuple(patches.shape[:2]):
        raise ValueError(f"{op}: {name} must have shape (B, N) = {tuple(patches.shape[:2])}, got {got(valid)}")
    counts = torch.tensor([h * w for h, w in grids], device=valid.device)[:, None]
    wrong = (valid.bool() != (torch.arange(valid.shape[1], device=valid.device) < counts)).any(1).nonzero().flatten().tolist()
    if wrong:
        H, W = grids[wrong[0]]
        raise ValueError(f"{op}: {name} of image {wrong[0]} must be true of its first {H} x {W} = {H * W} patches and of no others")


def _siglip2(op: str, images: Mapping) -> Packed:
    patches, mask = images["pixel_values"], images.get("pixel_attention_mask")
    grids = _sizes(op, "spatial_shapes", images["spatial_shapes"], patches)
    if mask is not None:
        _check_valid(op, "pixel_attention_mask", mask, grids, patches)
    return Packed(patches, tuple(grids))


def _naflex(op: str, images: Mapping) -> Packed:
    patches, coord, valid = images["patches"], images.get("patch_coord"), images.get("patch_valid")
    B, N = patches.shape[:2]
    if not is_dense(coord) or tuple(coord.shape) != (B, N, 2):
        raise ValueError(f"{op}: patch_coord must have shape (B, N, 2) = {(B, N, 2)}, got {got(coord)}")
    last = coord.masked_fill(~valid.bool()[..., None], 0).amax(1) + 1 if is_dense(valid) and valid.shape == coord.shape[:2] else coord[:, 0]
    grids = _sizes(op, "the last patch_coord + 1", last, patches)
    _check_valid(op, "patch_valid", valid, grids, patches)
    for image, (H, W) in enumerate(grids):
        place = coord[image, : H * W, 0] * W + coord[image, : H * W, 1]
        if not torch.equal(place, torch.arange(H * W, device=place.device, dtype=place.dtype)):
            raise ValueError(f"{op}: patch_coord of image {image} must go row by row over its {H} x {W} grid")
    return Packed(patches, tuple(grids))


def packed_of(op: str, images) -> Packed | None:
    """None where images are no packed patches; ValueError where nothing tells which patch is where."""
    if not isinstance(images, Mapping):
        return None
    name, read = ("patches", _naflex) if "patches" in images else ("pixel_values", _siglip2)
    if "patches" not in images and "spatial_shapes" not in images:
        return None
    if not is_dense(images.get(name)) or images[name].dim() < 3:
        raise ValueError(f"{op}: {name} must be packed patches (B, N, …), got {got(images.get(name))}")
    return read(op, images)

"""Finding a model's position embedding and the grid it belongs to."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from lifeops import geometry

OP = "structured_"
_NAMES = ("pos_embed", "pos_embedding", "position_embeddings", "position_embedding")


class Positions(NamedTuple):
    """``tensor`` (1, P' + H*W, C) or (P' + H*W, C), the model's own; ``learned`` unless it is fixed; the rest as in ``Grid``."""

    tensor: Tensor
    learned: bool
    grid: tuple[int, int]

    @property
    def rows(self) -> Tensor:
        """(P' + H*W, C), a view."""
        return self.tensor.detach().reshape(-1, self.tensor.shape[-1])

    @property
    def num_prefix_rows(self) -> int:
        return self.rows.shape[0] - self.grid[0] * self.grid[1]

    @property
    def patches(self) -> Tensor:
        """(H*W, C): the rows of the patches, which come last."""
        return self.rows[self.num_prefix_rows :]


def find(model, dim: int, grid, position_embedding: Tensor | None) -> Positions | None:
    """The position embedding given, or the only one of the model; None if there is none. Raises ValueError where sizes do not fit."""
    given = position_embedding is not None
    tensor = position_embedding if given else _search(model, dim)
    if tensor is None:
        return None
    grid = _grid(model) if grid is None else tuple(grid)
    if grid is None:
        raise ValueError(f"{OP}: the grid is unknown (no patch_embed.grid_size, no image_size and patch_size): pass grid=(H, W)")
    g = geometry.to_grid(OP, grid, 0)
    if tensor.dim() not in (2, 3) or tensor.shape[-1] != dim or (tensor.dim() == 3 and tensor.shape[0] != 1):
        what = "position_embedding" if given else "the position embedding"
        raise ValueError(f"{OP}: {what} must have shape (1, N, {dim}) or (N, {dim}), got {tuple(tensor.shape)}")
    found = Positions(tensor, isinstance(tensor, nn.Parameter) and tensor.requires_grad, (g.height, g.width))
    _check_rows(found, _prefix(model))
    return found


def _check_rows(found: Positions, prefix: int | None) -> None:
    extra, (H, W) = found.num_prefix_rows, found.grid
    if extra < 0 or (prefix is not None and extra > prefix):
        most = "" if prefix is None else f" and up to {prefix} prefix tokens"
        raise ValueError(f"{OP}: the position embedding must have rows for {H}*{W} = {H * W} patches{most}, got {found.rows.shape[0]}")


def _search(model, dim: int) -> Tensor | None:
    if not isinstance(model, nn.Module):
        return None
    found = {}
    for path, module in model.named_modules():
        for name in _NAMES:
            value = getattr(module, name, None)
            value = value.weight if isinstance(value, nn.Embedding) else value
            if isinstance(value, Tensor) and value.dim() in (2, 3) and value.shape[-1] == dim:
                found.setdefault(id(value), (f"{path}.{name}".lstrip("."), value))
    if len(found) > 1:
        names = ", ".join(name for name, _ in found.values())
        raise ValueError(f"{OP}: several position embeddings found ({names}): pass position_embedding=, or a part of the model")
    return next(iter(found.values()))[1] if found else None


def _grid(model) -> tuple[int, int] | None:
    """(H, W) as the patch embedding or the model says it."""
    for module in model.modules() if isinstance(model, nn.Module) else ():
        grid = getattr(module, "grid_size", None)
        if isinstance(grid, (tuple, list)) and len(grid) == 2:
            return tuple(grid)
        image, patch = _pair(getattr(module, "image_size", None)), _pair(getattr(module, "patch_size", None))
        if image and patch:
            return image[0] // patch[0], image[1] // patch[1]
    return None


def _pair(value) -> tuple[int, int] | None:
    if isinstance(value, int):
        return value, value
    return tuple(value) if isinstance(value, (tuple, list)) and len(value) == 2 else None


def _prefix(model) -> int | None:
    prefix = getattr(model, "num_prefix_tokens", None)
    return prefix if isinstance(prefix, int) else None


def num_prefix_tokens(model, found: Positions) -> int:
    """P, as the model says it or as the position embedding's rows tell."""
    prefix = _prefix(model)
    return found.num_prefix_rows if prefix is None else prefix


@torch.no_grad()
def scale_(found: Positions, factor: float) -> None:
    """Multiply the whole embedding, prefix rows included, in place."""
    if factor != 1:
        found.tensor.mul_(factor)


@torch.no_grad()
def draw_if_zero_(found: Positions, generator: torch.Generator | None) -> None:
    """Draw an embedding that is all zeros from N(0, 0.02²)."""
    if not found.rows.any():
        found.tensor.copy_(torch.empty(found.tensor.shape).normal_(std=0.02, generator=generator))

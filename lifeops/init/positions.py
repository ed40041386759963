"""A model's position embedding and the grid it belongs to, as :mod:`lifeops.hosts.positions` finds them, checked."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lifeops import geometry
from lifeops.hosts.positions import first_to_all, grid_of, host_or_none, prefix_of, tables
from lifeops.init.projections import OP

_ZERO = 1e-8


class Positions(NamedTuple):
    """``tensor`` (1, P' + H*W, C), (P' + H*W, C) or (1, H, W, C), the model's own; ``learned`` unless it is fixed.

    ``grid``: (H, W) of the patches, whose rows come last. ``made``: gives the rows (H*W, C) that the model makes of them in every pass;
    None where it takes them as they are.
    """

    tensor: Tensor
    learned: bool
    grid: tuple[int, int]
    made: Callable[[], Tensor] | None = None

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

    @property
    def used(self) -> Tensor:
        """(H*W, C): the patches' rows as they reach the tokens."""
        return self.patches if self.made is None else self.made().detach()


def find(model, dim: int, grid, position_embedding: Tensor | None) -> Positions | None:
    """The position embedding given, or the only one of the model; None if there is none. Raises ValueError where sizes do not fit."""
    given, host = position_embedding is not None, host_or_none(OP, model)
    tensor = position_embedding if given else _search(model, dim)
    if tensor is None:
        return None
    on_grid = tensor.dim() == 4  # a table of rows and columns
    if tensor.dim() not in (2, 3, 4) or tensor.shape[-1] != dim or (tensor.dim() > 2 and tensor.shape[0] != 1):
        what = "position_embedding" if given else "the position embedding"
        raise ValueError(f"{OP}: {what} must have shape (1, N, {dim}) or (N, {dim}), got {tuple(tensor.shape)}")
    grid = (grid_of(model, host) or (tensor.shape[1:3] if on_grid else None)) if grid is None else tuple(grid)
    if grid is None:
        raise ValueError(f"{OP}: the grid is unknown (no patch_embed.grid_size, no image_size and patch_size): pass grid=(H, W)")
    g = geometry.to_grid(OP, grid, 0)
    if on_grid and tuple(tensor.shape[1:3]) != (g.height, g.width):
        raise ValueError(f"{OP}: the position embedding {tuple(tensor.shape)} must be of the grid {g.height} x {g.width}")
    found = Positions(tensor, isinstance(tensor, nn.Parameter) and tensor.requires_grad, (g.height, g.width))
    if host is not None and host.suffix and not given:
        raise ValueError(
            f"{OP}: {type(host.trunk).__name__} has {host.suffix} tokens behind its patches: the last rows of the position embedding must"
            " belong to the patches"
        )
    if first_to_all(host) and not given:
        _check_rows(found, 1)
        return found._replace(made=lambda: found.patches + found.rows[:1])
    _check_rows(found, prefix_of(model, host))
    return found


def _check_rows(found: Positions, prefix: int | None) -> None:
    extra, (H, W) = found.num_prefix_rows, found.grid
    if extra < 0 or (prefix is not None and extra > prefix):
        most = "" if prefix is None else f" and up to {prefix} prefix tokens"
        raise ValueError(f"{OP}: the position embedding must have rows for {H}*{W} = {H * W} patches{most}, got {found.rows.shape[0]}")


def _search(model, dim: int) -> Tensor | None:
    found = tables(model, dim) if isinstance(model, nn.Module) else {}
    if len(found) > 1:
        raise ValueError(f"{OP}: several position embeddings found ({', '.join(found)}): pass position_embedding=, or a part of the model")
    return next(iter(found.values()), None)


def num_prefix_tokens(model, found: Positions) -> int:
    """P, as the model says it or as the position embedding's rows tell."""
    prefix = prefix_of(model, host_or_none(OP, model))
    return found.num_prefix_rows if prefix is None else prefix


@torch.no_grad()
def scale_(found: Positions, factor: float) -> None:
    """Multiply the whole embedding, prefix rows included, in place."""
    if factor != 1:
        found.tensor.mul_(factor)


@torch.no_grad()
def draw_if_zero_(found: Positions, generator: torch.Generator | None) -> None:
    """Draw an embedding that is all zeros, or no more than that beside a layer norm's eps (BLIP's 1e-10), from N(0, 0.02²)."""
    if not found.rows.numel() or found.rows.abs().max() < _ZERO:
        found.tensor.copy_(torch.empty(found.tensor.shape).normal_(std=0.02, generator=generator))

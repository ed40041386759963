"""Finding a model's position embedding and the grid it belongs to."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lifeops import geometry
from lifeops.hosts.find import find_host
from lifeops.hosts.host import Host, told_grid

OP = "structured_"
_ZERO = 1e-8
_NAMES = ("pos_embed", "pos_embedding", "position_embeddings", "position_embedding")


class Positions(NamedTuple):
    """``tensor`` (1, P' + H*W, C) or (P' + H*W, C), the model's own; ``learned`` unless it is fixed; the rest as in ``Grid``.

    ``resized``: gives the rows (H*W, C) that the model makes of them in every pass; None where it takes them as they are.
    """

    tensor: Tensor
    learned: bool
    grid: tuple[int, int]
    resized: Callable[[], Tensor] | None = None

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
        return self.patches if self.resized is None else self.resized().detach()


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
    host = host_of(model)
    if host is not None and host.suffix and not given:
        raise ValueError(
            f"{OP}: {type(host.trunk).__name__} has {host.suffix} tokens behind its patches: the last rows of the position embedding must"
            " belong to the patches"
        )
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


def host_of(model) -> Host | None:
    """``model`` as the entries of :mod:`lifeops.hosts` describe it; None for blocks and for models that no entry knows."""
    if not isinstance(model, nn.Module):
        return None
    try:
        return find_host(OP, model)
    except ValueError:
        return None


def _grid(model) -> tuple[int, int] | None:
    """(H, W) as the host tells it, or the first module that does."""
    host = host_of(model)
    if host is not None and host.grid is not None:
        return host.grid
    return next(filter(None, map(told_grid, model.modules())), None) if isinstance(model, nn.Module) else None


def _prefix(model) -> int | None:
    """P in the blocks, which a model's own num_prefix_tokens may not be (CaiT)."""
    host = host_of(model)
    prefix = getattr(model, "num_prefix_tokens", None) if host is None else host.prefix
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
    """Draw an embedding that is all zeros, or no more than that beside a layer norm's eps (BLIP's 1e-10), from N(0, 0.02²)."""
    if not found.rows.numel() or found.rows.abs().max() < _ZERO:
        found.tensor.copy_(torch.empty(found.tensor.shape).normal_(std=0.02, generator=generator))

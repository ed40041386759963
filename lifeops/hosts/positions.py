"""Where a model keeps its position embedding, which grid that is for, and how many prefix tokens it counts: of any model, as told."""

from __future__ import annotations

from torch import Tensor, nn

from lifeops.hosts.find import find_host
from lifeops.hosts.host import Host, grid_size_of

NAMES = ("pos_embed", "pos_embedding", "position_embeddings", "position_embedding")
_FIRST_TO_ALL = ("VitPoseBackboneEmbeddings",)


def host_or_none(op: str, model) -> Host | None:
    """``model`` as an entry describes it; None for blocks and for models that no entry knows."""
    if not isinstance(model, nn.Module):
        return None
    try:
        return find_host(op, model)
    except ValueError:
        return None


def tables(model: nn.Module, dim: int) -> dict[str, Tensor]:
    """The position embeddings of width ``dim``, by their paths: (1, N, C), (N, C) or, on a grid, (1, H, W, C)."""
    found: dict[int, tuple[str, Tensor]] = {}
    for path, module in model.named_modules():
        for name in NAMES:
            value = getattr(module, name, None)
            value = value.weight if isinstance(value, nn.Embedding) else value
            if isinstance(value, Tensor) and value.dim() in (2, 3, 4) and value.shape[-1] == dim:
                found.setdefault(id(value), (f"{path}.{name}".lstrip("."), value))
    return dict(found.values())


def first_to_all(host: Host | None) -> bool:
    """Whether the table's first row, that of a class token once, is added to every patch beside its own."""
    return type(getattr(host and host.trunk, "embeddings", None)).__name__ in _FIRST_TO_ALL


def grid_of(model, host: Host | None) -> tuple[int, int] | None:
    """(H, W) as the host tells it, or the first module that does."""
    if host is not None and host.grid is not None:
        return host.grid
    return next(filter(None, map(grid_size_of, model.modules())), None) if isinstance(model, nn.Module) else None


def prefix_of(model, host: Host | None) -> int | None:
    """P in the blocks, which a model's own num_prefix_tokens may not be (CaiT); None where nothing tells it."""
    prefix = getattr(model, "num_prefix_tokens", None) if host is None else host.prefix
    return prefix if isinstance(prefix, int) else None

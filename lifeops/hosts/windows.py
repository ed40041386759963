"""Blocks that attend inside windows of a grid, and what merges patches between them: Swin of timm and transformers, SAM of both."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from lifeops.hosts.heads import Call, tokens_given
from lifeops.hosts.host import PARTS, pair


class Windows(NamedTuple):
    """A block's windows. ``padded_first``: the grid is padded to whole windows and then shifted (transformers), else the other way round.

    ``softmax``: the layer that gives the attention of every window (timm's Swin, whose ``fused_attn`` skips it); None where the attention
    is read from what ``attention``, the module that is given the windows, is called with.
    """

    block: nn.Module
    attention: nn.Module
    softmax: nn.Module | None

    @property
    def padded_first(self) -> bool:
        return self.softmax is None

    @property
    def sizes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """(window, shift), as they are now: a block makes its window smaller for a small grid."""
        return pair(self.block.window_size), pair(getattr(self.block, "shift_size", 0))

    @property
    def norm(self) -> nn.Module | None:
        """The norm whose output may be what is cut into windows."""
        found = (getattr(self.block, name, None) for name in PARTS["norm1"])
        return next((m for m in found if isinstance(m, nn.Module)), None)


def windows_of(block: nn.Module) -> Windows | None:
    """None if ``block`` has no windows, or is one of SAM's that attend to the whole grid."""
    inner = getattr(block, "attn", None)
    softmax = getattr(inner, "softmax", None)
    if all(hasattr(block, name) for name in ("window_size", "shift_size")) and isinstance(softmax, nn.Module):
        return Windows(block, inner, softmax)
    if not isinstance(getattr(block, "window_size", None), int) or not block.window_size:
        return None
    outer = inner if getattr(block, "shift_size", None) is None else getattr(block, "attention", None)  # SAM, else transformers' Swin
    inner = getattr(outer, "self", outer)
    return Windows(block, inner, None) if isinstance(inner, nn.Module) else None


def merges(module: nn.Module) -> bool:
    """Whether it joins 2 x 2 patches."""
    return type(module).__name__.endswith("PatchMerging") and hasattr(module, "reduction")


# ------------------------------------------------------------------------------------------------ what they are called with


def grid_given(args: tuple, kwargs: dict) -> tuple[int, int]:
    """Of the maps (timm) that a block or a merging is called with, or the one that comes beside its tokens (transformers)."""
    x = tokens_given(args, kwargs)
    beside = args[1] if len(args) > 1 else kwargs.get("input_dimensions")
    return tuple(int(n) for n in (x.shape[1:3] if x.dim() == 4 else beside))


def by_window(call: Call) -> Call:
    """With the mask (windows, n, n) of an image for every image."""
    mask = call.given.get("attention_mask")
    if mask is None:
        return call
    return call._replace(given={**call.given, "attention_mask": mask.repeat(len(call.x) // len(mask), 1, 1)[:, None]})

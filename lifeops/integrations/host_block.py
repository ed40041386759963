"""A host's block with something exchanged in it: the same class, the same parts under the same names, the forward of its own class.

Tools that go by the class of a block (transformers records hidden states and checkpoints activations by it) know it still.
"""

from __future__ import annotations

import functools
import os
import sys
import threading
from typing import NamedTuple

import torch
from torch import nn

from lifeops.nn.grids import GridHolder
from lifeops.nn.localvit import LocalityFeedForward
from lifeops.nn.shortcut_blocks import told_grid

_TORCH = os.path.dirname(torch.__file__) + os.sep


class _Given(threading.local):
    """By the number of the group: what went in, and the frame that called its first block."""

    def __init__(self):
        self.starts: dict[int, tuple[torch.Tensor, object]] = {}


class Starts:
    """What went into groups of blocks whose last block has not run yet: of each thread, and only while the frame that called them runs."""

    def __init__(self):
        self._given = _Given()

    def __reduce__(self):
        return Starts, ()  # copies start empty

    def begin(self, number: int, x: torch.Tensor) -> None:
        self._given.starts[number] = x, _outside()

    def end(self, number: int, block: nn.Module) -> torch.Tensor:
        x, frame = self._given.starts.pop(number, (None, None))
        if x is None or frame is not _outside():
            why = "the first block of its group has not run before it in this forward pass; the DW shortcut is around the whole group"
            raise ValueError(f"{type(block).__name__}: {why}")
        return x

    def clear(self, *args) -> None:
        """A hook of the model: what an exception or an early end has left behind."""
        self._given.starts.clear()


def _outside():
    """The frame that called a block, past wrappers of torch's; a compiler's programs have none."""
    if torch.compiler.is_compiling():
        return None
    frame = sys._getframe(3)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_TORCH):
        frame = frame.f_back
    return frame


class Group(NamedTuple):
    """That a block is the first or the last of the group ``number``, around which there is one shortcut, held by the last."""

    number: int
    last: bool
    starts: Starts


def _local(block: nn.Module) -> LocalityFeedForward:
    """LocalViT's feed-forward in the place of its MLP, by the name that it has in LocalViT's own block; the MLP's names it."""
    found = [c for child in block._modules.values() for c in (child if isinstance(child, nn.ModuleList) else [child])]
    branch = next((c for c in found if isinstance(c, LocalityFeedForward)), None)
    if branch is None:
        raise AttributeError(f"{type(block).__name__!r} object has no attribute 'conv'")
    return branch


class HostBlock:
    """Mixed in before a host's class: binds the grid inside ``forward``, which activation checkpointing of transformers runs again
    without its hooks, and adds the module ``shortcut`` (:class:`lifeops.nn.DWShortcut`) if there is one. ``told``: the block is told a
    grid, behind its tokens. ``group``: what went into its first block reaches the last one's ``forward`` as its last argument, so that
    checkpointing knows of it.
    """

    conv = property(_local)
    told, group = False, None

    def __call__(self, *args, **kwargs):
        if self.group is None:
            return super().__call__(*args, **kwargs)
        args = args or (kwargs.pop("hidden_states"),)
        number, last, starts = self.group
        if not last:
            starts.begin(number, args[0])
            return super().__call__(*args, **kwargs)
        return super().__call__(*args, starts.end(number, self), **kwargs)

    def forward(self, hidden_states: torch.Tensor, *args, **kwargs):
        start = hidden_states
        if self.group is not None and self.group.last:
            *args, start = args
        if self.told:
            y = super().forward(hidden_states, *args, **kwargs)
            grid = told_grid(args[:1] if isinstance(args[0], (tuple, list)) else tuple(args[:2]), {})
            return self._added(start, y, grid)
        holder, y = self.grid_holder, None
        holder.enter_block(self, (hidden_states,))
        try:
            y = self._added(start, super().forward(hidden_states, *args, **kwargs))
        finally:
            holder.leave_block(self, (hidden_states,), y)
        return y

    def _added(self, start: torch.Tensor, output, grid: tuple[int, int] | None = None):
        """``output``, tokens or what begins with them, with the shortcut of ``start``."""
        if "shortcut" not in self._modules:
            return output
        if isinstance(output, tuple):
            return self.shortcut(start, output[0], grid), *output[1:]
        return self.shortcut(start, output, grid)

    def __reduce_ex__(self, protocol):
        return _empty, (type(self).__mro__[2],), self.__dict__


class LocalBlock:
    """Mixed in before the class of a timm block whose MLP is LocalViT's feed-forward."""

    conv = property(_local)

    def __reduce_ex__(self, protocol):
        return _empty, (type(self).__mro__[2], LocalBlock), self.__dict__


@functools.cache
def _class(cls: type, mixin: type = HostBlock) -> type:
    return type(cls.__name__, (mixin, cls), {"__module__": cls.__module__, "__qualname__": cls.__qualname__})


def _empty(cls: type, mixin: type = HostBlock) -> nn.Module:
    """What a copy or an unpickled block starts from."""
    new = _class(cls, mixin).__new__(_class(cls, mixin))
    nn.Module.__init__(new)
    return new


def same_parts(block: nn.Module, cls: type | None = None) -> nn.Module:
    """Another module with the very parts, parameters, hooks and attributes of ``block``; exchanging some leaves ``block`` alone."""
    cls = type(block) if cls is None else cls
    new = cls.__new__(cls)
    own = {name: type(value)(value) for name, value in vars(block).items() if name in ("_modules", "_parameters", "_buffers")}
    new.__dict__ = {**vars(block), **own}
    return new


def local_block(block: nn.Module) -> nn.Module:
    """``block`` again as a :class:`LocalBlock`."""
    return same_parts(block, _class(type(block), LocalBlock))


def host_block(block: nn.Module) -> nn.Module:
    """``block`` again as a :class:`HostBlock`, its grid unknown yet."""
    new = same_parts(block, _class(type(block)))
    new.grid_holder = GridHolder()
    return new

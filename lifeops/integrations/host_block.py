"""A host's block with something exchanged in it: the same class, the same parts under the same names, the forward of its own class.

Tools that go by the class of a block (transformers records hidden states and checkpoints activations by it) know it still.
"""

from __future__ import annotations

import functools

import torch
from torch import nn

from lifeops.nn.grids import GridHolder
from lifeops.nn.localvit import LocalityFeedForward


def _local(block: nn.Module) -> LocalityFeedForward:
    """LocalViT's feed-forward in the place of its MLP, by the name that it has in LocalViT's own block; the MLP's names it."""
    found = [c for child in block._modules.values() for c in (child if isinstance(child, nn.ModuleList) else [child])]
    branch = next((c for c in found if isinstance(c, LocalityFeedForward)), None)
    if branch is None:
        raise AttributeError(f"{type(block).__name__!r} object has no attribute 'conv'")
    return branch


class HostBlock:
    """Mixed in before a host's class: binds the grid inside ``forward``, which activation checkpointing of transformers runs again
    without its hooks, and adds the module ``shortcut`` (:class:`lifeops.nn.DWShortcut`) if there is one.
    """

    conv = property(_local)

    def forward(self, hidden_states: torch.Tensor, *args, **kwargs):
        holder, y = self.grid_holder, None
        holder.enter_block(self, (hidden_states,))
        try:
            y = super().forward(hidden_states, *args, **kwargs)
            if "shortcut" in self._modules:
                y = self.shortcut(hidden_states, y)
        finally:
            holder.leave_block(self, (hidden_states,), y)
        return y

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

"""What a forward pass does between the attention layers that are known, seen operator by operator, in that very pass.

Four things, none of which a model's parts tell:

* where the patches' tokens go: the patch embedding's output is followed to the first layer by a second one, some of whose patches are
  NaN and which goes through the same operators. The rows that are NaN at the layer are those patches' tokens;
* which layer reads what which other layer gave, by marks on the tensors' storages: layers side by side are no chain;
* attention outside of the layers: fused attention, a softmax over a square, a product of two tensors that both depend on the image;
* operators that move tokens.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

_MARKS, _NONE = "_lifeops_marks", frozenset()
EMBEDDED, POOLED = -1, -2  # the marks of what the patch embedding gave, and a pooling head
_SOFTMAX = ("_softmax", "_safe_softmax")
_PRODUCTS = ("bmm", "baddbmm", "mm", "addmm")
_MOVES = ("gather", "index_select", "index", "roll", "flip", "masked_select", "scatter", "index_put", "index_put_", "sort", "topk")


def _tensors(values) -> list[Tensor]:
    """The tensors among an operator's arguments or results, lists of them included: what a pytree would give, in a tenth of the time."""
    found = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += [v for v in value if isinstance(v, Tensor)]
    return found


class Event(NamedTuple):
    """``what`` ran in the module at ``path``; what depends on it bears ``mark``. ``square``: as many queries as keys, each attending by a
    softmax. ``moves``: it moves tokens, else it attends or mixes them.
    """

    what: str
    path: str
    mark: int
    square: bool = False
    queries: int = 0
    moves: bool = False


class Watch(TorchDispatchMode):
    """``names``: the paths of the model's modules by id; ``known``: the ids of the modules that are accounted for."""

    def __init__(self, names: dict[int, str], known: set[int]):
        super().__init__()
        self.names, self.known = names, known
        self.events: list[Event] = []  # outside of the layers
        self.noted = 0
        self.shadows: dict[int, tuple[Tensor, Tensor]] = {}
        self.lost: str | None = None  # the operator at which the shadows could not be followed
        self.paused = False

    @contextlib.contextmanager
    def quiet(self) -> Iterator[None]:
        """Operators of a check itself."""
        before, self.paused = self.paused, True
        try:
            yield
        finally:
            self.paused = before

    # -------------------------------------------------------------------------------------------- marks

    def marks(self, t: Tensor) -> frozenset[int] | set[int]:
        """The layers whose outputs ``t`` depends on; not to be changed."""
        try:
            owner, marks = getattr(t.untyped_storage(), _MARKS, (None, _NONE))
        except (NotImplementedError, RuntimeError):  # sparse, wrapped: without a storage there is nothing to mark, nor was anything marked
            return _NONE
        return marks if owner is self else _NONE

    def mark(self, t: Tensor, marks: frozenset[int] | set[int]) -> None:
        self.remark(t, self.marks(t) | marks)

    def remark(self, t: Tensor, marks: frozenset[int] | set[int]) -> None:
        """``t`` depends on these and nothing else."""
        with contextlib.suppress(NotImplementedError, RuntimeError):  # see marks: what reads it finds no layer before it, which is refused
            setattr(t.untyped_storage(), _MARKS, (self, marks))

    # -------------------------------------------------------------------------------------------- operators

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self.paused:
            return func(*args, **kwargs)
        tensors = _tensors((*args, *kwargs.values()))
        marks = set().union(*map(self.marks, tensors))
        shadowed = self._shadow_arguments(func, args, kwargs) if self.shadows else None
        out = func(*args, **kwargs)
        outputs = _tensors((out,))
        if marks:
            marks |= self._notice(func, args, tensors)
            for t in outputs:
                self.mark(t, marks)
        if shadowed is not None:
            self._shadow(func, outputs, *shadowed)
        return out

    def _notice(self, func, args, tensors) -> set[int]:
        """The mark of what ran, if it is to be noted."""
        name = func._schema.name.rpartition("::")[2]
        first = tensors[0]
        if "attention" in name and first.dim() == 4 and len(tensors) > 1:
            return self._add(name, first.shape[-2] == tensors[1].shape[-2] > 1, first.shape[-2])
        if name in _SOFTMAX and first.dim() >= 3 and args[1] % first.dim() == first.dim() - 1:
            if first.shape[-1] == first.shape[-2] > 1:
                return self._add("softmax over a square", True, first.shape[-2])
        elif name in _PRODUCTS and all(self.marks(t) for t in tensors[-2:]):
            return self._add("a product of two activations", queries=tensors[-2].shape[-2])
        elif name in _MOVES and first.dim() >= 3 and self.marks(first):
            return self._add(name, moves=True)
        return set()

    def _add(self, what: str, square: bool = False, queries: int = 0, moves: bool = False) -> set[int]:
        """Note it with the innermost module that runs, unless a known one runs it."""
        frame, path = sys._getframe(2), None
        while frame is not None:
            owner = frame.f_locals.get("self") if frame.f_code.co_argcount else None
            if isinstance(owner, nn.Module):
                if id(owner) in self.known:
                    return set()
                path = self.names.get(id(owner)) if path is None else path
            frame = frame.f_back
        self.noted += 1
        self.events.append(Event(what, path or "the model itself", POOLED - self.noted, square, queries, moves))
        return {self.events[-1].mark}

    # -------------------------------------------------------------------------------------------- shadows

    def follow(self, tokens: Tensor, shadow: Tensor) -> None:
        self.shadows = {id(tokens): (tokens, shadow)}

    def shadow_of(self, tokens: Tensor) -> Tensor | None:
        """What became of the shadow in ``tokens``; nothing is followed any more."""
        found, self.shadows = self.shadows.get(id(tokens)), {}
        return None if found is None else found[1]

    def _shadow_arguments(self, func, args, kwargs):
        """The arguments with shadows in place of what has one, before the operator may overwrite them; None if none has."""
        found = False

        def instead(t):
            nonlocal found
            if id(t) in self.shadows:
                found = True
                return self.shadows[id(t)][1]
            return t

        shadowed = tree_map_only(Tensor, instead, (args, kwargs))
        if not found:
            return None
        for i, a in enumerate(func._schema.arguments):  # what is written to and has no shadow must not be spoilt
            if a.alias_info is not None and a.alias_info.is_write and i < len(args) and shadowed[0][i] is args[i]:
                shadowed = ((*shadowed[0][:i], args[i].clone(), *shadowed[0][i + 1 :]), shadowed[1])
        return shadowed

    def _shadow(self, func, outputs, args, kwargs) -> None:
        devices = [t.device for t in outputs if t.device.type == "cuda"] if torch.Tag.nondeterministic_seeded in func.tags else None
        try:
            with torch.random.fork_rng(devices or (), enabled=devices is not None):
                twins = _tensors((func(*args, **kwargs),))
        except RuntimeError:
            self.lost = func._schema.name
            return
        for t, twin in zip(outputs, twins, strict=True):
            self.shadows[id(t)] = t, twin

"""timm's block indices on a model whose blocks are in groups, each with its DW shortcut: layers of optimizers, and features by block.

What timm counts would be groups. Methods that count get a stand-in on the instance, which runs the method of the model's class on a view
of the model where ``blocks`` are the blocks again.
"""

from __future__ import annotations

import re

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lifeops.arguments import check_int, got
from lifeops.nn.shortcut_blocks import ShortcutBlocks

_INSIDE = re.compile(r"\.(\d+)(?:\.blocks(?:\.(\d+))?|\.shortcut)?(?=\.|$)")  # of a list of groups


def _grouped(model: nn.Module) -> dict[str, list[int]]:
    """The lists of groups by their path, and how many blocks each group holds."""
    lists = {path: m for path, m in model.named_modules() if isinstance(m, (nn.Sequential, nn.ModuleList)) and len(m)}
    return {path: [len(group.blocks) for group in m] for path, m in lists.items() if all(isinstance(group, ShortcutBlocks) for group in m)}


class _Step:
    """One block in timm's loop. The group runs as a whole in front of its first block; this gives what came out of block ``at``."""

    def __init__(self, group: nn.Module, at: int, outputs: list, checkpointed: bool):
        self.group, self.at, self.outputs, self.checkpointed = group, at, outputs, checkpointed

    def __call__(self, *args, **options) -> torch.Tensor | tuple[torch.Tensor, ...]:
        if self.at == 0:
            self.outputs[:] = self._run(args, options)
        y = self.outputs[self.at]
        if self.at == len(self.outputs) - 1:
            self.outputs.clear()
        return y

    def _run(self, args, options):
        def run(*args):
            inner = []
            y = self.group(*args, outputs=inner, **options)
            return *inner, y

        return checkpoint(run, *args, use_reentrant=False) if self.checkpointed else run(*args)


def _view(model: nn.Module) -> nn.Module:
    """The model with ``blocks`` one by one, everything else its own."""
    checkpointed, steps = getattr(model, "grad_checkpointing", False) and torch.is_grad_enabled(), []
    for group in model.blocks:
        outputs: list = []
        steps += [_Step(group, at, outputs, checkpointed) for at in range(len(group.blocks))]
    view = object.__new__(type(model))
    view.__dict__.update(model.__dict__, _modules={**model._modules, "blocks": steps}, grad_checkpointing=False)
    return view


class BlockMethod:
    """``name`` of the class of ``model``, counting blocks. An object, not a closure: copied and pickled with the model."""

    def __init__(self, model: nn.Module, name: str):
        self.model, self.name = model, name

    def _method(self):
        return getattr(type(self.model), self.name)


class ForwardIntermediates(BlockMethod):
    """Intermediates by block. Inside a group they are what its blocks give; behind its last block the shortcut is added."""

    def __call__(self, *args, **kwargs):
        return self._method()(_view(self.model), *args, **kwargs)


class GroupMatcher(BlockMethod):
    """Layers by block; a shortcut belongs to the last block that it is around. Returns what timm's own callable matchers return."""

    def __call__(self, coarse: bool = False):
        grouped = _grouped(self.model)
        spec = self._method()(_view(self.model) if "blocks" in grouped else self.model, coarse)
        return lambda name: _ordinal(spec, ungrouped(name, grouped))


class PruneIntermediateLayers(BlockMethod):
    """Cuts behind the last block asked for, which has to be the last of its group: the shortcut is around all of them."""

    def __call__(self, indices=1, *args, **kwargs):
        sizes = _grouped(self.model)["blocks"]
        taken = _taken(indices, sum(sizes))
        ends = [sum(sizes[: g + 1]) for g in range(len(sizes))]
        if max(taken) + 1 not in ends:
            expected, found = f"one of the blocks {[end - 1 for end in ends]}", f"block {max(taken)} inside of a group of {max(sizes)}"
            raise ValueError(f"prune_intermediate_layers: must cut behind a DW shortcut, {expected}, got {found}")
        self._method()(self.model, [ends.index(max(taken) + 1)], *args, **kwargs)
        return taken


METHODS = {
    "forward_intermediates": ForwardIntermediates,
    "group_matcher": GroupMatcher,
    "prune_intermediate_layers": PruneIntermediateLayers,
}


def _taken(indices, count: int) -> list[int]:
    """Absolute indices out of ``count``: all of them, the last so many, or a list, counted from the end where negative."""
    op = "prune_intermediate_layers"
    indices = count if indices is None else indices
    if isinstance(indices, (list, tuple)):
        taken = [i + count if i < 0 else i for i in (check_int(op, "indices", i) for i in indices)]
    else:
        taken = [*range(count - check_int(op, "indices", indices, 1), count)]
    if not taken or min(taken) < 0 or max(taken) >= count:
        raise ValueError(f"{op}: indices must name some of the {count} blocks, got {got(indices)}")
    return taken


def ungrouped(name: str, grouped: dict[str, list[int]]) -> str:
    """``name`` of a parameter or module of the converted model as it would be without groups."""
    for path, sizes in grouped.items():
        found = name.startswith(path) and _INSIDE.match(name, len(path))
        if found:
            group, inside = int(found[1]), found[2]
            at = sizes[group] - 1 if inside is None else int(inside)
            return f"{path}.{sum(sizes[:group]) + at}{name[found.end() :]}"
    return name


def _ordinal(spec, name: str) -> tuple[float, ...]:
    """Where timm sorts ``name`` into: by its callable, or by the first pattern that matches, its groups and its suffix."""
    if callable(spec):
        found = spec(name)
        return tuple(found) if isinstance(found, (list, tuple)) else (found,)
    for place, entry in enumerate(spec.values()):
        for pattern, suffix in entry if isinstance(entry, (list, tuple)) else [(entry, None)]:
            found = pattern is not None and re.match(pattern, name)
            if found:
                return tuple(float(n) for n in (place, *found.groups(), *(suffix or ())) if n is not None)
    return (float("inf"),)


def count_blocks(model: nn.Module) -> None:
    """Give the instance the methods that count blocks, those that its class has and nobody replaced."""
    grouped = _grouped(model)
    for name, method in METHODS.items() if "blocks" in grouped else [("group_matcher", GroupMatcher)] if grouped else []:
        if hasattr(type(model), name) and name not in model.__dict__:
            setattr(model, name, method(model, name))


def count_modules(model: nn.Module) -> None:
    """Take them off again."""
    for name in METHODS:
        if isinstance(model.__dict__.get(name), BlockMethod):
            delattr(model, name)

"""Whether shortcuts around blocks do what they say, on that very model: it runs with and without them.

The run with them gives each its tokens and grid, and passes its blocks' output on without the shortcut: what has one must then put out
what its blocks put out before. No hook runs, and modes, random numbers and buffers are as before.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lifeops.hosts.host import Block, Host
from lifeops.integrations.attention_check import off
from lifeops.integrations.convert_probe import image_of, run_on_image
from lifeops.integrations.token_place import chosen, rows_at
from lifeops.integrations.undisturbed import forward_of, undisturbed
from lifeops.nn.dw_shortcut import DWShortcut
from lifeops.nn.embedded_grid import Grid, embedded_grid
from lifeops.nn.maps import to_maps
from lifeops.nn.shortcut_blocks import FLOWS


class Unit(NamedTuple):
    """``new``, at ``path``, stands for blocks whose last is ``last``; ``shortcuts`` are what it adds."""

    path: str
    last: nn.Module
    new: nn.Module
    shortcuts: list[DWShortcut]


def try_stages(host: Host, swaps: list[tuple[nn.Module, nn.Module]], units: list[Unit], prefix: int) -> None:
    """Raise ValueError unless every one of ``units`` is its blocks, and its shortcuts are given tokens on a grid that they are told.

    ``swaps``: (module, the one that takes its place), which hold the units.
    """
    name, shortcuts = type(host.trunk).__name__, [s for unit in units for s in unit.shortcuts]
    with undisturbed(host.trunk, *(new for _, new in swaps)):
        if host.grid_from == "model":
            _check_pixels(host, prefix)
        expected, _, told = _outputs(host, [unit.last for unit in units], f"{name} cannot be tried on one image")
        with _instead(host.trunk, swaps), _neutral(host, shortcuts) as seen:
            news = [unit.new for unit in units]
            got, stages, told_now = _outputs(host, news, f"a shortcut cannot be put around the blocks of {name}, tried on one image")
    for block in host.blocks:
        before, after = (_beside(calls.get(id(block.module)), block) for calls in (told, told_now))
        if after is not None and not _same(before, after):
            raise ValueError(
                f"convert: {block.path} is told something else in a group than alone: the model tells its blocks one by one, as one with a"
                " rotation for each does (every=1 leaves them single)"
            )
    for unit, before, after in zip(units, expected, got, strict=True):
        _check_unit(unit, before, after, seen)
    for path, stage in stages.items():
        (last,) = [unit.shortcuts[0] for unit in units if unit.path.startswith(f"{path}.")][-1:]
        _check_stage(path, stage, prefix, *seen[id(last)])


def _tensors(output) -> list[Tensor]:
    return [output] if isinstance(output, Tensor) else [t for t in output if isinstance(t, Tensor)]


def _beside(given: tuple[tuple, dict] | None, block: Block) -> list | None:
    """What a block was told beside the tokens that it gives back."""
    return None if given is None else tree_leaves((given[0][FLOWS[block.flow].carried :], given[1]))


def _same(before: list | None, after: list) -> bool:
    if before is None or len(before) != len(after):
        return False
    pairs = [(a, b) for a, b in zip(before, after, strict=True) if a is not b]
    return all(type(a) is type(b) and (torch.equal(a, b) if isinstance(a, Tensor) else a == b) for a, b in pairs)


def _outputs(host: Host, modules: list[nn.Module], failed: str) -> tuple[list[list[Tensor]], dict[str, Tensor], dict[int, tuple]]:
    """What each of ``modules`` puts out on one image; where the grid is not told in the call, what each stage does; and, by their ids,
    what the blocks that ran were given first.
    """
    found: dict[int, list[Tensor]] = {}
    calls: dict[int, tuple] = {}
    parents = {path.rpartition(".")[0] for path in host.blocks_path} if host.staged else set()
    stages = {path: host.trunk.get_submodule(path) for path in parents} if _derived(host) else {}

    def noting(module):
        own = module.forward

        def forward(*args, **options):
            calls.setdefault(id(module), (args, options))
            output = own(*args, **options)
            found.setdefault(id(module), []).extend(_tensors(output))
            return output

        return forward

    with contextlib.ExitStack() as stack:
        for module in {id(m): m for m in (*modules, *stages.values(), *(b.module for b in host.blocks))}.values():
            stack.enter_context(forward_of(module, noting(module)))
        try:
            run_on_image(host)
        except Exception as error:
            raise ValueError(f"convert: {failed}: {type(error).__name__}: {error}") from error
    outputs, maps = [found.get(id(m), []) for m in modules], {path: found[id(m)][0] for path, m in stages.items() if id(m) in found}
    return outputs, maps, calls


def _derived(host: Host) -> bool:
    """Whether the grid is our reading of what the model does: no call and no map tells it."""
    return host.grid_from == "pools" or any(block.flow == "squares" for block in host.blocks)


def put_in_place(model: nn.Module, instead: dict[int, nn.Module]) -> None:
    """Put modules in place of others, given by their ids, wherever the model holds them."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if id(child) in instead:
                parent._modules[name] = instead[id(child)]


@contextlib.contextmanager
def _instead(model: nn.Module, swaps: list[tuple[nn.Module, nn.Module]]) -> Iterator[None]:
    """The new modules in place of the old ones."""
    put_in_place(model, {id(old): new for old, new in swaps})
    try:
        yield
    finally:
        put_in_place(model, {id(new): old for old, new in swaps})


def pooled(host: Host) -> tuple[list[nn.Module], list[nn.Module]]:
    """The stages whose blocks see the grid that the stage is given, and the pools that make the others' of it."""
    stages = [host.trunk.get_submodule(path.rpartition(".")[0]) for path in host.blocks_path] if host.grid_from == "pools" else []
    return [s for s in stages if s.pool is None], [s.pool for s in stages if s.pool is not None]


@contextlib.contextmanager
def _neutral(host: Host, shortcuts: list[DWShortcut]) -> Iterator[dict[int, tuple[Tensor, Grid]]]:
    """The shortcuts add nothing; what each was given, its blocks' output and its grid, by its id."""
    seen: dict[int, tuple[Tensor, Grid]] = {}
    grids: list[Grid] = []

    def embedded(module):
        own = module.forward

        def forward(*args, **options):
            output = own(*args, **options)
            grids.append(embedded_grid(module, args, output))
            return output

        return forward

    def neutral(shortcut):
        own = shortcut.forward

        def forward(x, y, grid=None):
            grid = shortcut.grid_holder.fixed or grid or (grids[-1] if grids else None)
            own(x, y, grid)  # its own checks: tokens of that width behind that prefix on that grid
            seen[id(shortcut)] = y, grid
            return y

        return forward

    with contextlib.ExitStack() as stack:
        for module in (host.teller, *pooled(host)[1]) if host.grid_from in ("embedding", "pools") else ():
            stack.enter_context(forward_of(module, embedded(module)))
        for shortcut in shortcuts:
            stack.enter_context(forward_of(shortcut, neutral(shortcut)))
        yield seen


def _check_unit(unit: Unit, expected: list[Tensor], got: list[Tensor], seen: dict) -> None:
    if not expected or not all(id(shortcut) in seen for shortcut in unit.shortcuts):
        raise ValueError(f"convert: the shortcut of {unit.path} did not run on one image (probe=False converts it untried)")
    pairs = zip(got, expected, strict=True) if len(got) == len(expected) else ()
    if len(got) != len(expected) or any(off(a, b) > 4 * torch.finfo(b.dtype).eps for a, b in pairs):  # the same operators: equal
        raise ValueError(
            f"convert: {unit.path} gives something else with a shortcut that adds nothing: the model does something between the blocks that"
            " are to be in one group, or to them one by one (every=1 leaves them single)"
        )


def _check_stage(path: str, stage: Tensor, prefix: int, y: Tensor, grid: Grid) -> None:
    """Raise unless the patches' map is the one that the stage itself makes of its blocks' tokens."""
    if not torch.equal(to_maps(y[:, prefix:], grid), stage):
        raise ValueError(f"convert: the tokens of {path} do not lie on a {grid[0]} x {grid[1]} grid behind {prefix} prefix tokens")


class _Seen(Exception):
    """The first block's tokens."""


def _check_pixels(host: Host, prefix: int) -> None:
    """Raise unless a change of the pixel in the middle of a patch changes that patch's token, behind ``prefix``, and no other.

    For embeddings whose output is not tokens, one each.
    """
    block, image, (H, W) = host.blocks[0].module, image_of(host), host.grid
    h, w, mask = image.shape[2] // H, image.shape[3] // W, chosen(H * W).to(image.device)

    def first(*args, **options):
        raise _Seen(args[1])

    def tokens(image):
        with forward_of(block, first):
            try:
                host.trunk.forward(image)
            except _Seen as seen:
                return seen.args[0]

    other = image.clone()
    other[:, :, h // 2 :: h, w // 2 :: w] += mask.view(H, W)
    a, b = tokens(image), tokens(other)
    rows = (a != b).any(-1)[0]
    if len(rows) != prefix + H * W or rows_at(rows, mask) != [prefix]:
        found = f"{len(rows)} tokens, of which {rows_at(rows, mask) or 'none'} begin the patches"
        raise ValueError(f"convert: {host.blocks[0].path} is given {found}, looked for {prefix} prefix tokens and a {H} x {W} grid")

"""Whether shortcuts around the blocks of several stages do what they say, on that very model: it runs with and without them.

The run with them gives each its tokens and grid, and passes its blocks' output on without the shortcut: every group must then put out
what its blocks put out before. No hook runs, and modes, random numbers and buffers are as before.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from lifeops.hosts.host import Host
from lifeops.integrations.attention_check import off
from lifeops.integrations.convert_probe import image_of
from lifeops.integrations.token_place import chosen, rows_at
from lifeops.integrations.undisturbed import forward_of, undisturbed
from lifeops.nn.embedded_grid import Grid, embedded_grid
from lifeops.nn.maps import to_maps
from lifeops.nn.shortcut_blocks import ShortcutBlocks

Swaps = list[tuple[nn.Module, nn.Module]]


def try_stages(host: Host, swaps: Swaps, prefix: int) -> None:
    """Raise ValueError unless every group of ``swaps`` (of old and new lists of blocks) is its blocks and shortcuts of tokens on a grid."""
    name, groups = type(host.trunk).__name__, [group for _, new in swaps for group in new]
    with undisturbed(host.trunk, *(new for _, new in swaps)):
        if host.grid_from == "model":
            _check_pixels(host, prefix)
        ends = [group.blocks[-1] for group in groups]
        expected, _ = _outputs(host, ends, f"{name} cannot be tried on one image")
        with _instead(host, swaps), _neutral(host, groups, prefix) as seen:
            got, stages = _outputs(host, groups, f"a shortcut cannot be put around the blocks of {name}, tried on one image")
    for path, (_, new) in zip(host.blocks_path, swaps, strict=True):
        for i, group in enumerate(new):
            at = groups.index(group)
            _check_group(f"{path}.{i * len(group.blocks)}", group, expected[at], got[at], seen)
        if stages and seen:
            _check_stage(path, stages[path.rpartition(".")[0]], prefix, *seen[id(new[-1].shortcut)])


def _tensors(output) -> list[Tensor]:
    return [output] if isinstance(output, Tensor) else [t for t in output if isinstance(t, Tensor)]


def _outputs(host: Host, modules: list[nn.Module], failed: str) -> tuple[list[list[Tensor]], dict[str, Tensor]]:
    """What each of ``modules`` puts out on one image, and, where the grid is not told in the call, what each stage does."""
    found: dict[int, list[Tensor]] = {}
    parents = {path.rpartition(".")[0] for path in host.blocks_path} if host.staged else set()
    stages = {path: host.trunk.get_submodule(path) for path in parents} if _derived(host) else {}

    def noting(own):
        def forward(*args, **options):
            output = own(*args, **options)
            found.setdefault(id(own.__self__), []).extend(_tensors(output))
            return output

        return forward

    with contextlib.ExitStack() as stack:
        for module in {id(m): m for m in (*modules, *stages.values())}.values():
            stack.enter_context(forward_of(module, noting(module.forward)))
        try:
            host.trunk.forward(image_of(host))
        except Exception as error:
            if str(error).startswith("convert:"):
                raise
            raise ValueError(f"convert: {failed}: {type(error).__name__}: {error}") from error
    return [found.get(id(m), []) for m in modules], {path: found[id(m)][0] for path, m in stages.items() if id(m) in found}


def _derived(host: Host) -> bool:
    """Whether the grid is our reading of what the model does: no call and no map tells it."""
    return host.grid_from == "pools" or any(block.flow == "squares" for block in host.blocks)


@contextlib.contextmanager
def _instead(host: Host, swaps: Swaps) -> Iterator[None]:
    """The new lists in place of the old ones."""
    with contextlib.ExitStack() as stack:
        for path, (old, new) in zip(host.blocks_path, swaps, strict=True):
            parent, _, last = path.rpartition(".")
            children = host.trunk.get_submodule(parent)._modules
            children[last] = new
            stack.callback(children.__setitem__, last, old)
        yield


def pools(host: Host) -> list[nn.Module]:
    """The modules that make each stage's grid of the one before."""
    stages = [host.trunk.get_submodule(path.rpartition(".")[0]) for path in host.blocks_path] if host.grid_from == "pools" else []
    return [stage.pool for stage in stages if stage.pool is not None]


@contextlib.contextmanager
def _neutral(host: Host, groups: list[ShortcutBlocks], prefix: int) -> Iterator[dict[int, tuple[Tensor, Grid]]]:
    """The shortcuts of ``groups`` add nothing; what each was given, its blocks' output and its grid, by its id."""
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
        for module in (host.embed, *pools(host)) if host.grid_from in ("embedding", "pools") else ():
            stack.enter_context(forward_of(module, embedded(module)))
        for shortcut in (s for group in groups for s in group.shortcuts()):
            stack.enter_context(forward_of(shortcut, neutral(shortcut)))
        yield seen


def _check_group(path: str, group: ShortcutBlocks, expected: list[Tensor], got: list[Tensor], seen: dict) -> None:
    if not expected or not all(id(shortcut) in seen for shortcut in group.shortcuts()):
        raise ValueError(f"convert: the shortcut of {path} did not run on one image (probe=False converts it untried)")
    pairs = zip(got, expected, strict=True) if len(got) == len(expected) else ()
    if len(got) != len(expected) or any(off(a, b) > 4 * torch.finfo(b.dtype).eps for a, b in pairs):  # the same operators: equal
        raise ValueError(
            f"convert: the {len(group.blocks)} blocks from {path} on give something else as a group: the model does something between them,"
            " or to them one by one (every=1 leaves them single)"
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

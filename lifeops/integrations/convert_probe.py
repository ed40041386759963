"""Whether a conversion does what it says on that very model: each block is called once as the model calls it, before anything is changed.

The model runs on one image with every block passing its tokens on: that shows what each is given. Then the new block is compared with
the old one: :mod:`lifeops.integrations.convert_check`. No hook runs, and modes, random numbers and buffers are as before.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lifeops.hosts.host import Host
from lifeops.hosts.images import first_conv, image_size
from lifeops.integrations.pass_watch import Watch
from lifeops.integrations.token_place import Place
from lifeops.integrations.undisturbed import can_run, forward_of, of_several_precisions, undisturbed
from lifeops.nn.embedded_grid import embedded_grid


class Call(NamedTuple):
    args: tuple
    kwargs: dict

    @property
    def x(self) -> Tensor:
        return self.args[0]


class Probed(NamedTuple):
    """What the model gave each block (by id, at its first call), and the patch grid it had; None for blocks on several."""

    calls: dict[int, Call]
    grid: tuple[int, int] | None


def image_of(host: Host) -> Tensor:
    """One random image of the size the model was built for."""
    embed = host.teller
    conv = first_conv(embed)
    channels = getattr(embed, "in_chans", None) if conv is None else conv.in_channels
    if channels is None:
        raise ValueError(f"{type(embed).__name__}, the patch embedding, has neither a Conv2d nor in_chans")
    image = torch.randn(1, channels, *image_size(host), generator=torch.Generator().manual_seed(0))
    return image.to(next(embed.parameters()))


def can_try(host: Host) -> bool:
    """Whether the model has numbers and, if it has several precisions, which autocast may be there for, runs as it is."""
    if not can_run(host.trunk):
        return False
    if not of_several_precisions(host.trunk):
        return True
    try:
        with undisturbed(host.trunk):
            host.trunk.forward(image_of(host))
    except Exception:
        return False
    return True


def probe(host: Host, prefix: int) -> Probed:
    """Run the model on an image, its blocks passing on what they are given; inside :func:`undisturbed`.

    Raises ValueError if it does not run or if a block does not read ``prefix`` tokens and then the grid's patches in their order.
    """
    model, blocks = host.trunk, paths(host)
    calls: dict[int, Call] = {}
    watch, grids, embed, own = Watch({}, set()), [], host.teller, host.teller.forward
    beside: dict[type, tuple | None] = {}  # what a block of the class gives behind its tokens
    place = Place("convert", watch, embed)

    def embedded(*args, **kwargs):
        output = own(*args, **kwargs)
        with watch.quiet():
            grids.append(embedded_grid(embed, args, output))
        place.embedded(embed, args, output)
        return output

    def passing(path, block):
        run = block.forward

        def forward(x, *args, **kwargs):
            if not calls and grids:
                _check_place(host, place, path, x, prefix, grids[-1])
            calls.setdefault(id(block), Call((x, *args), kwargs))
            if host.library == "transformers" and type(block) not in beside:  # whose blocks may give more than tokens
                with watch.quiet():
                    output = run(x, *args, **kwargs)
                beside[type(block)] = output[1:] if isinstance(output, tuple) else None
            rest = beside.get(type(block))
            return x if rest is None else (x, *rest)

        return forward

    with contextlib.ExitStack() as stack:
        stack.enter_context(forward_of(embed, embedded))
        for path, block in blocks.items():
            stack.enter_context(forward_of(block, passing(path, block)))
        try:
            image = image_of(host)
            with watch:
                model.forward(image)
        except Exception as error:
            if str(error).startswith("convert:"):
                raise
            raise _failed(model, error) from error
    if not grids or not calls:
        raise ValueError(f"convert: {type(model).__name__} ran without {'its patch_embed' if not grids else 'its blocks'} (probe=False)")
    found = Probed(calls, grids[0])
    for path, _, given in ran(host, found):
        _check_tokens(path, given.x, prefix, found.grid)
    return found


def run_through(host: Host) -> Probed:
    """Run a model of several stages on an image: what it gives each block; inside :func:`undisturbed`."""
    calls: dict[int, Call] = {}

    def noting(block, run):
        def forward(*args, **kwargs):
            calls.setdefault(id(block), Call(args, kwargs))
            return run(*args, **kwargs)

        return forward

    with contextlib.ExitStack() as stack:
        for block in paths(host).values():
            stack.enter_context(forward_of(block, noting(block, block.forward)))
        try:
            host.trunk.forward(image_of(host))
        except Exception as error:
            raise _failed(host.trunk, error) from error
    if not calls:
        raise ValueError(f"convert: {type(host.trunk).__name__} ran without its blocks (probe=False)")
    return Probed(calls, None)


def _check_place(host: Host, place: Place, path: str, x: Tensor, prefix: int, grid: tuple[int, int]) -> None:
    try:
        place.check(path, x, prefix, grid)
    except ValueError as error:
        if not hasattr(getattr(host.trunk, "embeddings", None), "random_masking"):
            raise
        hint = "patches are hidden in a random order: give noise=torch.arange(H * W).expand(B, -1) and mask_ratio=0 always, and probe=False"
        raise ValueError(f"{error}; {hint}") from error


def paths(host: Host) -> dict[str, nn.Module]:
    """The blocks, each once, by where they are first."""
    found = {id(block.module): (block.path, block.module) for block in reversed(host.blocks)}
    return dict(reversed(found.values()))


def ran(host: Host, probed: Probed) -> Iterator[tuple[str, nn.Module, Call]]:
    """The blocks that ran, each once: where it is first, itself, and what the model gave it."""
    return ((path, block, probed.calls[id(block)]) for path, block in paths(host).items() if id(block) in probed.calls)


def _failed(model: nn.Module, error: Exception) -> ValueError:
    if str(error).startswith("lifeops:"):
        return ValueError(str(error).replace("lifeops:", "convert:", 1))
    why = f"it does not run on one with its blocks passing their tokens on ({type(error).__name__}: {error})"
    return ValueError(f"convert: {type(model).__name__} cannot be tried on one image: {why}; probe=False converts it untried")


def _check_tokens(path: str, x: Tensor, prefix: int, grid: tuple[int, int]) -> None:
    H, W = grid
    maps = not prefix and tuple(x.shape[1:3]) == grid
    if (x.dim() == 3 and x.shape[1] == prefix + H * W) or (x.dim() == 4 and maps):
        return
    has = f"{x.shape[1]} tokens" if x.dim() == 3 else f"{tuple(x.shape)}"
    raise ValueError(f"convert: {path} is given {has}, looked for {prefix} prefix tokens and a {H} x {W} grid, {prefix + H * W} tokens")


def sequence(path: str, x: Tensor) -> None:
    if x.dim() != 3:
        raise ValueError(f"convert: {path} is given maps {tuple(x.shape)}, looked for tokens (B, P + H*W, C)")


def call(path: str, block: nn.Module, given: Call) -> Tensor:
    """What the new block gives; whatever it raises is a reason to refuse."""
    try:
        return block(*given.args, **given.kwargs)
    except Exception as error:
        if str(error).startswith("convert:"):
            raise
        raise ValueError(f"convert: {path} cannot be called as the model calls it: {type(error).__name__}: {error}") from error

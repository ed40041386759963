"""Whether a conversion does what it says on that very model: each block is called once as the model calls it, before anything is changed.

The model runs on one image with every block passing its tokens on: that shows what each is given. Then the new block is compared with
the old one: :mod:`lifeops.integrations.convert_check`. No hook runs, and modes, random numbers and buffers are as before.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lifeops.hosts.host import Host
from lifeops.hosts.images import first_conv, image_size
from lifeops.hosts.patch_order import all_patches
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


def run_on_image(host: Host, mode: contextlib.AbstractContextManager | None = None) -> None:
    """One forward pass of the model, all patches in the blocks; ``mode``: what it runs under."""
    image = image_of(host)
    with mode or contextlib.nullcontext(), all_patches(host):
        host.trunk.forward(image)


def can_try(host: Host) -> bool:
    """Whether the model has numbers and, if it has several precisions, which autocast may be there for, runs as it is."""
    if not can_run(host.trunk):
        return False
    if not of_several_precisions(host.trunk):
        return True
    try:
        with undisturbed(host.trunk):
            run_on_image(host)
    except Exception:
        return False
    return True


def probe(host: Host, prefix: int) -> Probed:
    """Run the model on an image, its blocks passing on what they are given; inside :func:`undisturbed`.

    Raises ValueError if it does not run or if a block does not read ``prefix`` tokens and then the grid's patches in their order.
    """
    run = _Run(host, prefix)
    with contextlib.ExitStack() as stack:
        stack.enter_context(forward_of(host.teller, run.embedding))
        for path, block in paths(host).items():
            stack.enter_context(forward_of(block, run.passing(path, block)))
        _on_image(host, run.watch)
    name = type(host.trunk).__name__
    if run.grid is None or not run.calls:
        raise ValueError(f"convert: {name} ran without {'its patch_embed' if run.grid is None else 'its blocks'} (probe=False)")
    found = Probed(run.calls, run.grid)
    for path, _, given in ran(host, found):
        _check_tokens(path, given.x, prefix, found.grid)
    return found


class _Run:
    """What stands in for the forwards of the patch embedding and of the blocks, and what it saw."""

    def __init__(self, host: Host, prefix: int):
        self.prefix, self.transformers = prefix, host.library == "transformers"
        self.embed, self.embed_forward = host.teller, host.teller.forward
        self.watch = Watch({}, set())
        self.place = Place("convert", self.watch, self.embed)
        self.calls: dict[int, Call] = {}
        self.grid: tuple[int, int] | None = None
        self._beside: dict[type, tuple | None] = {}  # what a block of the class gives behind its tokens

    def embedding(self, *args, **kwargs):
        output = self.embed_forward(*args, **kwargs)
        with self.watch.quiet():
            self.grid = embedded_grid(self.embed, args, output)
        self.place.embedded(self.embed, args, output)  # which refuses a second run
        return output

    def passing(self, path: str, block: nn.Module) -> Callable:
        own = block.forward

        def forward(x, *args, **kwargs):
            if not self.calls and self.grid is not None:
                self.place.check(path, x, self.prefix, self.grid)
            self.calls.setdefault(id(block), Call((x, *args), kwargs))
            rest = self._rest(type(block), own, (x, *args), kwargs) if self.transformers else None
            return x if rest is None else (x, *rest)

        return forward

    def _rest(self, cls: type, own: Callable, args: tuple, kwargs: dict) -> tuple | None:
        """What blocks of transformers may give behind their tokens; None of those that give tokens alone."""
        if cls not in self._beside:
            with self.watch.quiet():
                output = own(*args, **kwargs)
            self._beside[cls] = output[1:] if isinstance(output, tuple) else None
        return self._beside[cls]


def _on_image(host: Host, mode: contextlib.AbstractContextManager | None = None) -> None:
    """Run the model on one image under ``mode``; ValueError in the words of convert where it does not run."""
    try:
        run_on_image(host, mode)
    except Exception as error:
        if str(error).startswith("convert:"):
            raise
        raise _failed(host.trunk, error) from error


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
        _on_image(host)
    if not calls:
        raise ValueError(f"convert: {type(host.trunk).__name__} ran without its blocks (probe=False)")
    return Probed(calls, None)


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

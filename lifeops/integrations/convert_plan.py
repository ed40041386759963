"""What a conversion is going to do, and what all of them ask of a host before."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import nn

from lifeops.arguments import check_int
from lifeops.hosts.find import find_host
from lifeops.hosts.host import Host
from lifeops.hosts.transformers import SUFFIX
from lifeops.integrations.convert_probe import Probed
from lifeops.integrations.convert_stages import Unit
from lifeops.integrations.host_block import Starts
from lifeops.integrations.undisturbed import HOOKS
from lifeops.nn.plain import exactly, why_not


class Plan(NamedTuple):
    """Nothing is changed before all of it is known.

    ``swaps``: (module, the one that takes its place). ``asks``: the new modules that ask for a grid. ``blocks``: the modules called with
    the tokens whose hooks bind one grid during each call. ``prefix``: P. ``bound``: whether the grid comes from the patch embedding; else
    the modules see it themselves. ``check``: compares the new with the old, given what the model gives its blocks; raises ValueError.
    ``whole``: what is compared when the model is run with and without what is new: :mod:`lifeops.integrations.convert_stages`; None
    where it is not. ``starts``: what groups of blocks remember during a forward pass.
    """

    host: Host
    swaps: list[tuple[nn.Module, nn.Module]]
    asks: list[nn.Module]
    blocks: list[nn.Module]
    prefix: int
    bound: bool
    check: Callable[[Probed], None] | None
    whole: list[Unit] | None = None
    starts: Starts | None = None


def readable(path: str, layer: nn.Module) -> None:
    """Raise unless the parameters that a conversion copies or measures are what the layer computes with."""
    wrong = why_not(layer, exactly(nn.Linear))
    if wrong:
        raise ValueError(f"convert: {path} cannot be read: {'; '.join(wrong)} (convert first, then adapt, quantise, prune or shard)")


def beyond(module: nn.Module, known: tuple[str, ...]) -> list[str]:
    """The parts with parameters that are none of ``known``."""
    parts = {name.partition(".")[0]: None for name, _ in module.named_parameters(remove_duplicate=False)}
    return [name for name in parts if name not in known]


def check_options(options: dict, known: tuple[str, ...]) -> None:
    unknown = options.keys() - set(known)
    if unknown:
        raise TypeError(f"convert: unknown options {', '.join(sorted(unknown))}; known: {', '.join(known)}, num_prefix_tokens, start")


def host_of(model: nn.Module, num_prefix_tokens: int | None) -> tuple[Host, int]:
    """The host and P."""
    host = find_host("convert", model)
    layers = {type(m) for m in host.teller.modules()}
    if host.teller_path is None and nn.Conv2d not in layers and layers & {nn.Conv3d, nn.Linear}:
        what = "patches of several frames (Conv3d)" if nn.Conv3d in layers else "patches that were cut before (Linear)"
        raise ValueError(
            f"convert: {type(host.teller).__name__}, the patch embedding of {type(host.trunk).__name__}, reads {what}; looked for one that"
            " reads images, whose patches lie on one grid"
        )
    if host.suffix:
        found = f"{type(host.trunk).__name__} puts {host.suffix} tokens behind its patches ({', '.join(SUFFIX)})"
        raise ValueError(f"convert: {found}; all systems need the patches last, behind their prefix tokens")
    prefix = host.prefix if num_prefix_tokens is None else num_prefix_tokens
    if prefix is None:
        what = "how many tokens (class token, registers) come before the patches; pass it, 0 for none"
        raise ValueError(f"convert: {type(host.trunk).__name__} does not say num_prefix_tokens, {what}")
    return host, check_int("convert", "num_prefix_tokens", prefix, 0)


def one_list(host: Host, system: str) -> None:
    """Raise unless all blocks see one grid."""
    if host.staged:
        name = type(host.trunk).__name__
        found = f"its blocks in {len(host.blocks_path)} stages ({', '.join(host.blocks_path)}), each on a grid of its own"
        raise ValueError(f"convert: {name} has {found}; {system!r} needs a ViT, whose blocks see one grid ('dw_shortcut' does not)")


def share_hooks(old: nn.Module, new: nn.Module) -> None:
    """Who registers or removes a hook on one means both."""
    new.__dict__.update({name: old.__dict__[name] for name in HOOKS})
    new._is_full_backward_hook = old._is_full_backward_hook

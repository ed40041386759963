"""``convert(model, "dw_shortcut")``: a depth-wise convolution shortcut around the blocks, which stay what they are."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from lifeops.arguments import check_int
from lifeops.hosts.host import Host
from lifeops.integrations.convert_check import check_shortcut, check_wrapped
from lifeops.integrations.convert_plan import Plan, check_options, host_of
from lifeops.integrations.convert_probe import Probed, paths, ran
from lifeops.integrations.convert_stages import Unit
from lifeops.integrations.host_block import Group, Starts, host_block
from lifeops.nn.dw_shortcut import DWShortcut, ShortcutModule, check_every
from lifeops.nn.inputs import kernel_sizes as check_kernel_sizes
from lifeops.nn.shortcut_blocks import FLOWS, grouped, shortcut_for


@torch.no_grad()
def _zeroed(shortcuts: list[DWShortcut]) -> None:
    """The convolutions give 0, whatever their norms give; their weights' gradients are not 0."""
    for p in (p for shortcut in shortcuts for p in shortcut.convs.parameters()):
        p.zero_()


def convert_dw_shortcut(
    model: nn.Module, *, num_prefix_tokens: int | None = None, every: int = 1, kernel_sizes: int | tuple[int, ...] = 3,
    start: str | None = None, **options,
) -> Plan:  # fmt: skip
    """Put a shortcut around every ``every`` blocks."""
    check_options(options, ("every", "kernel_sizes"))
    kernel_sizes = check_kernel_sizes("convert", "kernel_sizes", kernel_sizes)
    check_int("convert", "every", every, 1)
    check_int("convert", "num_prefix_tokens", num_prefix_tokens, 0, optional=True)
    if any(isinstance(m, ShortcutModule) for m in model.modules()):
        raise ValueError(f"convert: {type(model).__name__} has DW shortcuts of its own")
    host, prefix = host_of(model, num_prefix_tokens)
    clones = host.library == "transformers" or (host.apart and every > 1)
    plan, shortcuts = (_clones if clones else _groups)(host, prefix, every, kernel_sizes)
    if start == "identity":
        _zeroed(shortcuts)
    return plan


def _around(flow: str, kernel_sizes: tuple[int, ...], prefix: int, grid: tuple[int, int] | None) -> Callable[[nn.Module], nn.Module]:
    """Makes the shortcut, or shortcuts, of a group that begins with a block."""

    def shortcut(block: nn.Module) -> nn.Module:
        if flow == "scales":
            widths = [norm.normalized_shape[0] for norm in (block.norm12, block.norm13, block.norm14)]
            return nn.ModuleList(shortcut_for("convert", block, kernel_sizes, prefix, dim) for dim in widths).train(block.training)
        dim = block.norm_out.normalized_shape[0] if flow == "pixels" else None
        return shortcut_for("convert", block, kernel_sizes, prefix, dim, grid)

    return shortcut


def _groups(host: Host, prefix: int, every: int, kernel_sizes: tuple[int, ...]) -> tuple[Plan, list[DWShortcut]]:
    """Every list of blocks and one of groups of them."""
    swaps, units, grid = [], [], host.grid if host.grid_from == "model" else None
    flows = {id(block.module): block.flow for block in host.blocks}
    for path in host.blocks_path:
        blocks = host.trunk.get_submodule(path)
        check_every("convert", every, len(blocks))
        flow = flows[id(blocks[0])]
        wrapped = grouped(blocks, every, _around(flow, kernel_sizes, prefix, grid), FLOWS[flow])
        new = nn.Sequential(*wrapped) if isinstance(blocks, nn.Sequential) else wrapped
        new.training = blocks.training
        swaps.append((blocks, new))
        units += [Unit(f"{path}.{i * every}", group.blocks[-1], group, group.shortcuts()) for i, group in enumerate(wrapped)]

    def check(probed: Probed) -> None:
        for path, _, group, _ in units:
            if id(group.blocks[0]) in probed.calls:
                check_shortcut(path, group, probed.calls[id(group.blocks[0])], probed.grid)

    shortcuts, bound = [s for unit in units for s in unit.shortcuts], host.grid_from in ("embedding", "pools")
    asks, groups = [] if host.grid_from == "model" else shortcuts, [unit.new for unit in units] if bound else []
    single = host.grid_from == "embedding"
    whole = units if not single or every > 1 else None
    return Plan(host, swaps, asks, groups, prefix, bound, check if single else None, whole), shortcuts


def _clones(host: Host, prefix: int, every: int, kernel_sizes: tuple[int, ...]) -> tuple[Plan, list[DWShortcut]]:
    """Every block again, with a shortcut in the last of each group: transformers records and checkpoints by layer."""
    news = {id(block): host_block(block) for block in paths(host).values()}
    swaps, units, starts = [(block, news[id(block)]) for block in paths(host).values()], [], Starts()
    if every > 1 and len(swaps) < len(host.blocks):
        raise ValueError(f"convert: every must be 1 for {type(host.trunk).__name__}, which calls blocks several times, got {every}")
    prefixes = host.prefixes if host.prefixes and not prefix else [prefix] * len(host.blocks_path)
    for path, own in zip(host.blocks_path, prefixes, strict=True):
        blocks = host.trunk.get_submodule(path)
        check_every("convert", every, len(blocks))
        for i, block in enumerate(blocks):
            new = news[id(block)]
            new.told = host.grid_from == "call"
            if i % every == every - 1:
                new.shortcut = shortcut_for("convert", block, kernel_sizes, own)
            if every > 1 and i % every in (0, every - 1):
                new.group = Group(len(units) // every, i % every > 0, starts)
            units.append(Unit(f"{path}.{i}", block, new, [new.shortcut] if "shortcut" in new._modules else []))

    def check(probed: Probed) -> None:
        for path, block, given in ran(host, probed):
            if every == 1:
                check_wrapped(path, block, news[id(block)], given, probed.grid)

    told = host.grid_from == "call"
    shortcuts = [s for unit in units for s in unit.shortcuts]
    asks = [] if told else [*shortcuts, *news.values()]
    whole, starts = units if told or every > 1 else None, starts if every > 1 else None
    return Plan(host, swaps, asks, [], prefix, not told, None if told else check, whole, starts), shortcuts

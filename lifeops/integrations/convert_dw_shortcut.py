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
from lifeops.integrations.host_block import host_block
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
    plan, shortcuts = (_clones if host.library == "transformers" else _groups)(host, prefix, every, kernel_sizes)
    if start == "identity":
        _zeroed(shortcuts)
    return plan


def _around(flow: str, kernel_sizes: tuple[int, ...], prefix: int, grid: tuple[int, int] | None) -> Callable[[nn.Module], nn.Module]:
    """Makes the shortcut, or shortcuts, of a group that begins with a block."""

    def shortcut(block: nn.Module) -> nn.Module:
        if flow == "scales":
            widths = [norm.normalized_shape[0] for norm in (block.norm12, block.norm13, block.norm14)]
            return nn.ModuleList(shortcut_for(block, kernel_sizes, prefix, dim) for dim in widths).train(block.training)
        dim = block.norm_out.normalized_shape[0] if flow == "pixels" else None
        return shortcut_for(block, kernel_sizes, prefix, dim, grid)

    return shortcut


def _groups(host: Host, prefix: int, every: int, kernel_sizes: tuple[int, ...]) -> tuple[Plan, list[DWShortcut]]:
    """Every list of blocks and one of groups of them."""
    swaps, groups, grid = [], [], host.grid if host.grid_from == "model" else None
    flows = {id(block.module): block.flow for block in host.blocks}
    for path in host.blocks_path:
        blocks = host.trunk.get_submodule(path)
        check_every("convert", every, len(blocks))
        flow = flows[id(blocks[0])]
        wrapped = grouped(blocks, every, _around(flow, kernel_sizes, prefix, grid), FLOWS[flow])
        new = nn.Sequential(*wrapped) if isinstance(blocks, nn.Sequential) else wrapped
        new.training = blocks.training
        swaps.append((blocks, new))
        groups += wrapped

    def check(probed: Probed) -> None:
        for i, group in enumerate(groups):
            if id(group.blocks[0]) in probed.calls:
                check_shortcut(f"blocks.{i * every}", group, probed.calls[id(group.blocks[0])], probed.grid)

    shortcuts, bound = [s for group in groups for s in group.shortcuts()], host.grid_from in ("embedding", "pools")
    asks = [] if host.grid_from == "model" else shortcuts
    single = host.grid_from == "embedding"
    plan = Plan(host, swaps, asks, groups if bound else [], prefix, bound, check if single else None, whole=not single or every > 1)
    return plan, shortcuts


def _clones(host: Host, prefix: int, every: int, kernel_sizes: tuple[int, ...]) -> tuple[Plan, list[DWShortcut]]:
    """Every layer of transformers and one with a shortcut of its own: the library records hidden states and checkpoints by layer."""
    if every != 1:
        found = f"{type(host.trunk).__name__} of transformers, which records hidden states layer by layer"
        raise ValueError(f"convert: every must be 1 for {found}, got {every}")
    swaps = [(block, host_block(block)) for block in paths(host).values()]
    news = {id(block): new for block, new in swaps}
    for block, new in swaps:
        new.shortcut = shortcut_for(block, kernel_sizes, prefix)

    def check(probed: Probed) -> None:
        for path, block, given in ran(host, probed):
            check_wrapped(path, block, news[id(block)], given, probed.grid)

    shortcuts = [new.shortcut for _, new in swaps]
    return Plan(host, swaps, [*shortcuts, *(new for _, new in swaps)], [], prefix, True, check), shortcuts

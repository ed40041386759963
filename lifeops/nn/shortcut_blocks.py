"""Blocks with a depth-wise convolution shortcut around them, whatever tokens they take; see :mod:`lifeops.nn.dw_shortcut`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from lifeops import geometry
from lifeops.arguments import check_int, got
from lifeops.nn.dw_shortcut import DWShortcut, check_every
from lifeops.nn.embedded_grid import Grid, plain
from lifeops.nn.inputs import kernel_sizes


def told_grid(told: tuple, options: dict) -> Grid | None:
    """The grid that a block is told behind its tokens: as (H, W), as H and W, or by name; None if it is told none."""
    if len(told) == 2:
        return plain(told)
    grid = told[0] if told else options.get("grid", options.get("size"))
    return plain(grid) if isinstance(grid, (tuple, list)) else grid


class ShortcutBlocks(nn.Module):
    """``blocks``, one after another, and ``shortcut`` around them.

    Takes tokens (B, N, C) or, without prefix tokens, maps (B, H, W, C). Other arguments of ``forward`` go to every block; a grid among
    them (the second positional argument, the second and third, ``grid`` or ``size``) is the shortcut's too. ``outputs``, a list, is given
    what each block but the last puts out.
    """

    carried = 1
    """How many of the first arguments a block gives back."""

    def __init__(self, blocks, shortcut: nn.Module):
        super().__init__()
        self.blocks, self.shortcut = nn.ModuleList(blocks), shortcut

    def forward(self, *args, outputs: list | None = None, **options):
        start, told = args[: self.carried], args[self.carried :]
        y = start
        for i, block in enumerate(self.blocks):
            if i and outputs is not None:
                outputs.append(y if self.carried > 1 else y[0])
            y = block(*y, *told, **options)
            y = y if self.carried > 1 else (y,)
        return self.around(start, y, told, options)

    def around(self, start: tuple[Tensor, ...], end: tuple[Tensor, ...], told: tuple, options: dict) -> Tensor | tuple[Tensor, ...]:
        """``end``, which the blocks made of ``start``, with the shortcut of ``start``."""
        (x,), (y,) = start, end
        if x.dim() == 4:
            return self.shortcut(x.flatten(1, 2), y.flatten(1, 2), plain(x.shape[1:3])).unflatten(1, x.shape[1:3])
        return self.shortcut(x, y, told_grid(told, options))

    def shortcuts(self) -> list[DWShortcut]:
        return [self.shortcut]

    def set_input_size(self, *args, **options) -> None:
        """What timm's Swin stages call on their blocks."""
        for block in self.blocks:
            block.set_input_size(*args, **options)


class PixelShortcutBlocks(ShortcutBlocks):
    """Blocks of pixels inside the patches and tokens (B, P + H*W, C), which give both back (TNT); the shortcut is that of the tokens."""

    carried = 2

    def around(self, start, end, told, options):
        return end[0], self.shortcut(start[1], end[1])


class SquareShortcutBlocks(ShortcutBlocks):
    """Blocks of tokens (B, T, N, C) of T = t² squares, N = n² patches each, of a grid of t n by t n patches (NesT)."""

    def around(self, start, end, told, options):
        (x,), (y,) = start, end
        squares = plain(x.shape[1:3])
        sides = tuple(map(math.isqrt, squares))
        if tuple(n * n for n in sides) != squares:
            raise ValueError(f"{type(self).__name__}: x must be (B, t * t, n * n, C), got {tuple(x.shape)}")
        t, n = sides
        out = self.shortcut(_whole(x, t, n), _whole(y, t, n), (t * n, t * n))
        return out.unflatten(1, (t, n, t, n)).transpose(2, 3).reshape(x.shape)


def _whole(x: Tensor, t: int, n: int) -> Tensor:
    """(B, t * t, n * n, C), square after square, as the tokens of the whole grid, row after row."""
    return x.unflatten(2, (n, n)).unflatten(1, (t, t)).transpose(2, 3).flatten(1, 4)


class ScaleShortcutBlocks(ShortcutBlocks):
    """Blocks of tokens of four scales and their ``sizes``, which change and give back all but the first's (CoaT); ``shortcut`` is a list,
    one for each of these.
    """

    carried = 4

    def shortcuts(self):
        return [*self.shortcut]

    def around(self, start, end, told, options):
        grids = told[0] if told else options["sizes"]
        changed = zip(self.shortcut, start[1:], end[1:], grids[1:], strict=True)
        return end[0], *(shortcut(x, y, plain(grid)) for shortcut, x, y, grid in changed)


FLOWS = {"tokens": ShortcutBlocks, "pixels": PixelShortcutBlocks, "squares": SquareShortcutBlocks, "scales": ScaleShortcutBlocks}
"""By what the blocks take: see :data:`lifeops.hosts.host.FLOWS`."""


def _of_tokens(m: nn.Module) -> bool:
    """Whether ``m``, of whatever class, normalises each token by itself and scales it: it has an epsilon and no running statistics."""
    return any(hasattr(m, name) for name in ("eps", "variance_epsilon")) and not hasattr(m, "running_mean")


def _width(op: str, block: nn.Module) -> int:
    """C of a block: of ``norm1``, or else of the first normalisation with a shape, or with weights."""
    norms = [getattr(block, "norm1", None), *block.modules()]
    found = [m.normalized_shape for m in norms if hasattr(m, "normalized_shape")]
    found += [m.weight.shape for m in norms if _of_tokens(m) and getattr(m, "weight", None) is not None]
    if not found:
        hint = "; pass dim=…" if op == "wrap" else ""
        raise ValueError(f"{op}: cannot tell the width of {type(block).__name__}, which has no norm with a shape or with weights{hint}")
    return found[0][-1]


def shortcut_for(op: str, block: nn.Module, kernel_size, num_prefix_tokens: int, dim: int | None = None, grid=None) -> DWShortcut:
    """A shortcut with the block's device, dtype and mode, and its width unless ``dim`` is given."""
    like = next(block.parameters(), torch.empty(0))
    place = {"grid": grid, "device": like.device, "dtype": like.dtype}
    return DWShortcut(_width(op, block) if dim is None else dim, kernel_size, num_prefix_tokens, **place).train(block.training)


def _checked_blocks(blocks) -> list[nn.Module]:
    found = list(blocks) if isinstance(blocks, Iterable) else [blocks]
    if not found or not isinstance(blocks, Iterable) or not all(isinstance(block, nn.Module) for block in found):
        raise TypeError(f"wrap: blocks must be modules, at least one, got {got(blocks)}")
    return found


def wrap(
    blocks: Iterable[nn.Module], every: int = 1, *, kernel_size: int | tuple[int, ...] = 3, num_prefix_tokens: int = 1,
    dim: int | None = None, grid: tuple[int, int] | None = None,
) -> nn.ModuleList:  # fmt: skip
    """One :class:`DWShortcut` around every ``every`` consecutive ``blocks``: a list of len(blocks) / every :class:`ShortcutBlocks`.

    The blocks are the same objects as before; the shortcuts take device, dtype and mode from them.

    Args:
        blocks: modules (B, N, C) -> (B, N, C) or (B, H, W, C) -> (B, H, W, C).
        every: 1 is the paper's main method; 2, 3, 4 its variant 1.
        kernel_size: an odd int, or several for variant 2.
        num_prefix_tokens: P. dim: C, by default the width of the block's first normalisation.
        grid: (H, W) for every call, or None: then ``with lifeops.use_grid(wrapped, (H, W))`` says it, or the second argument of ``forward``
            where the blocks themselves take one (:class:`lifeops.nn.LocalViTBlock`); blocks that take maps need none.

    Raises ValueError where ``every`` does not divide the number of blocks or the width cannot be told.
    """
    blocks = _checked_blocks(blocks)
    check_every("wrap", every, len(blocks))
    kernel_size, dim = kernel_sizes("wrap", "kernel_size", kernel_size), check_int("wrap", "dim", dim, 1, optional=True)
    num_prefix_tokens = check_int("wrap", "num_prefix_tokens", num_prefix_tokens, 0)
    grid = geometry.fixed_grid("wrap", grid, num_prefix_tokens)
    return grouped(blocks, every, lambda block: shortcut_for("wrap", block, kernel_size, num_prefix_tokens, dim, grid))


def grouped(blocks, every: int, shortcut: Callable[[nn.Module], nn.Module], cls: type[ShortcutBlocks] = ShortcutBlocks) -> nn.ModuleList:
    """``blocks`` in groups of ``every``, each with what ``shortcut`` makes for its first block; modes as they were."""
    groups = [blocks[i : i + every] for i in range(0, len(blocks), every)]
    wrapped = nn.ModuleList(cls(group, shortcut(group[0])) for group in groups)
    for group in wrapped:
        group.training = group.blocks.training = group.blocks[0].training
    return wrapped

"""Token arithmetic: the only place that knows how a grid, prefix tokens and a sequence length belong together."""

from __future__ import annotations

from typing import NamedTuple

import torch

from lifeops.arguments import LARGEST, check_flags, check_int, got
from lifeops.options import Pair


class Grid(NamedTuple):
    """An ``height`` x ``width`` patch grid behind ``prefix`` prefix tokens, patches row-major."""

    height: int
    width: int
    prefix: int = 0

    @property
    def num_patches(self) -> int:
        return self.height * self.width

    def __str__(self) -> str:
        return f"{self.prefix} + {self.height}*{self.width}"


def to_grid(op: str, grid, num_prefix_tokens) -> tuple[int, int]:
    """``grid=(H, W)`` and ``num_prefix_tokens=P`` as users write them, checked."""
    if not isinstance(grid, (tuple, list)) or len(grid) != 2:
        raise TypeError(f"{op}: grid must be two ints (H, W), got {got(grid)}")
    height, width = grid
    P = num_prefix_tokens
    if not (type(height) is type(width) is type(P) is int and 0 <= height < LARGEST and 0 <= width < LARGEST and 0 <= P < LARGEST):
        height, width, P = _ints(op, grid, P)
    return Grid(height, width, P)


def _ints(op: str, grid, num_prefix_tokens) -> list:
    """What is not plainly fine: NumPy's and symbolic ints are, bools are not."""
    try:
        height, width = (check_int(op, "grid", n) for n in grid)
    except TypeError:
        raise TypeError(f"{op}: grid must be two ints (H, W), got {got(grid)}") from None
    P = check_int(op, "num_prefix_tokens", num_prefix_tokens)
    if height < 0 or width < 0:
        raise ValueError(f"{op}: grid must not be negative, got {(height, width)}")
    return [height, width, check_int(op, "num_prefix_tokens", P, 0)]


def fixed_grid(op: str, grid, num_prefix_tokens) -> tuple[int, int] | None:
    """The grid a module is built with, or None, checked together with its P."""
    g = to_grid(op, (0, 0) if grid is None else grid, num_prefix_tokens)
    return None if grid is None else (g.height, g.width)


def check_tokens(op: str, name: str, count, height, width, prefix, dim: int = 1) -> None:
    """Raise unless a sequence of ``count`` tokens is ``prefix`` prefix tokens and an ``height`` x ``width`` grid."""
    if count != prefix + height * width:
        expected = f"{prefix} + {height}*{width} = {prefix + height * width}"
        raise ValueError(
            f"{op}: {name}.shape[{dim}] must be P + H*W = {expected}, got {count}"
            " (dropped or packed patch tokens have no grid: turn patch dropout off)"
        )


def pair(op: str, name: str, value, least: int) -> tuple:
    """``value`` as two ints of at least ``least``, of the rows and of the columns; an int stands for both."""
    if type(value) is int and least <= value < LARGEST:  # most calls
        return value, value
    given = value
    if not isinstance(value, (tuple, list)):
        value = (value, value)
    if len(value) != 2:
        raise ValueError(f"{op}: {name} must be an int or two, got {got(given)}")
    return tuple(check_int(op, name, n, least) for n in value)


def conv_size(size, kernel, stride, padding, ceil_mode: bool = False):
    """Places of a filter along one axis: floor((size + 2 padding - kernel) / stride) + 1; with ``ceil_mode`` one more where some of its
    window is left over, unless that window would begin behind the map and its leading padding.
    """
    room = size + 2 * padding - kernel
    if not ceil_mode:
        return room // stride + 1
    count = -(-room // stride) + 1
    return count - 1 if (count - 1) * stride >= size + padding else count


def conv_grid(
    grid: tuple[int, int], kernel_size: Pair, stride: Pair = 1, padding: Pair | None = None, ceil_mode: bool = False
) -> tuple[int, int]:
    """The grid that a convolution or a pooling makes of ``grid``: ``floor((H + 2 p - K) / s) + 1``, per axis.

    Args:
        grid: (H, W).
        kernel_size, stride, padding: ints, or (rows, columns); padding None is ``K // 2``.
        ceil_mode: of poolings: rounded up where a window would be left over, as torch.nn.MaxPool2d has it.

    An empty grid stays empty, whatever the padding. Raises ValueError where the kernel does not fit.

    >>> lifeops.conv_grid((14, 14), 3, stride=2)
    (7, 7)
    """
    op = "conv_grid"
    g, kernel, stride = to_grid(op, grid, 0), pair(op, "kernel_size", kernel_size, 1), pair(op, "stride", stride, 1)
    padding = tuple(k // 2 for k in kernel) if padding is None else pair(op, "padding", padding, 0)
    check_flags(op, ceil_mode=ceil_mode)
    return filtered_grid(op, g.height, g.width, kernel, stride, padding, ceil_mode)


def filtered_grid(op: str, height, width, kernel, stride, padding, ceil_mode: bool = False) -> tuple:
    """:func:`conv_grid` of what is known to be ints, in the name of ``op``."""
    if height * width == 0:
        return 0, 0
    out = tuple(conv_size(*axis, ceil_mode) for axis in zip((height, width), kernel, stride, padding, strict=True))
    if out[0] < 1 or out[1] < 1:
        raise ValueError(f"{op}: the kernel {tuple(kernel)} must fit the grid {(height, width)} padded by {tuple(padding)}")
    return out


def transposed_grid(grid, kernel, stride, padding, output_padding) -> tuple:
    """The grid that a transposed convolution makes of ``grid``, pairs of ints all: (H - 1) s - 2 p + K + output padding, per axis."""
    axes = zip(grid, kernel, stride, padding, output_padding, strict=True)
    return tuple((size - 1) * s - 2 * p + k + more for size, k, s, p, more in axes)


def channels_first(embed: torch.nn.Module, output: torch.Tensor) -> bool:
    """Whether the maps of a patch embedding are (B, C, H, W): as it says, or as the width of its last convolution shows; else NHWC."""
    told = getattr(embed, "output_fmt", None)
    if told is not None:
        return str(told).endswith("NCHW")
    if isinstance(embed, torch.nn.Conv2d):
        return True
    widths = [m.out_channels for m in embed.modules() if isinstance(m, torch.nn.Conv2d)]
    return bool(widths) and output.shape[1] == widths[-1] != output.shape[-1]

"""Token arithmetic: the only place that knows how a grid, prefix tokens and a sequence length belong together."""

from __future__ import annotations

from dataclasses import dataclass

import torch

INT = (int, torch.SymInt)


@dataclass(frozen=True)
class Grid:
    """An ``height`` x ``width`` patch grid behind ``prefix`` prefix tokens, patches row-major."""

    height: int
    width: int
    prefix: int = 0

    @property
    def num_patches(self) -> int:
        return self.height * self.width

    @property
    def num_tokens(self) -> int:
        return self.prefix + self.height * self.width

    def __str__(self) -> str:
        return f"{self.prefix} + {self.height}*{self.width}"


def to_grid(op: str, grid, num_prefix_tokens: int) -> Grid:
    """``grid=(H, W)`` and ``num_prefix_tokens=P`` as users write them, checked."""
    if not isinstance(grid, (tuple, list)) or len(grid) != 2 or not all(isinstance(n, INT) for n in grid):
        raise TypeError(f"{op}: grid must be two ints (H, W), got {grid!r}")
    if not isinstance(num_prefix_tokens, INT):
        raise TypeError(f"{op}: num_prefix_tokens must be an int, got {num_prefix_tokens!r}")
    height, width = grid
    if height < 0 or width < 0:
        raise ValueError(f"{op}: grid must not be negative, got {(height, width)}")
    if num_prefix_tokens < 0:
        raise ValueError(f"{op}: num_prefix_tokens must not be negative, got {num_prefix_tokens}")
    return Grid(height, width, num_prefix_tokens)


def check_tokens(op: str, name: str, got, height, width, prefix, dim: int = 1) -> None:
    """Raise unless a sequence of ``got`` tokens is ``prefix`` prefix tokens and an ``height`` x ``width`` grid."""
    if got != prefix + height * width:
        expected = f"{prefix} + {height}*{width} = {prefix + height * width}"
        raise ValueError(
            f"{op}: {name}.shape[{dim}] must be P + H*W = {expected}, got {got}"
            " (dropped or packed patch tokens have no grid: turn patch dropout off)"
        )


def channels_first(embed: torch.nn.Module, output: torch.Tensor) -> bool:
    """Whether the maps of a patch embedding are (B, C, H, W): as it says, or as the width of its last convolution shows; else NHWC."""
    told = getattr(embed, "output_fmt", None)
    if told is not None:
        return str(told).endswith("NCHW")
    if isinstance(embed, torch.nn.Conv2d):
        return True
    widths = [m.out_channels for m in embed.modules() if isinstance(m, torch.nn.Conv2d)]
    return bool(widths) and output.shape[1] == widths[-1] != output.shape[-1]

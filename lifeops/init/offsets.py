"""Which shift each attention head starts as, and the one-hot attention matrix of a shift on a grid.

An offset (dy, dx) sends patch (r, q) to (r + dy, q + dx): the head attends there and only there. Rows whose target lies outside
the grid have none.
"""

from __future__ import annotations

import numbers

import torch
from torch import Tensor

from lifeops.arguments import check_int, got

KERNEL_SIZES = (3, 5)

_RING_1 = ((0, 0), (-1, 0), (0, 1), (0, -1), (1, 0), (-1, -1), (-1, 1), (1, -1), (1, 1))
_RING_2 = (
    (-2, 0), (0, 2), (0, -2), (2, 0),
    (-2, -1), (-2, 1), (-1, -2), (-1, 2), (1, -2), (1, 2), (2, -1), (2, 1),
    (-2, -2), (-2, 2), (2, -2), (2, 2),
)  # fmt: skip
_ORDER = {3: _RING_1, 5: _RING_1 + _RING_2}


def check_kernel_size(op: str, kernel_size: int) -> None:
    if not isinstance(kernel_size, numbers.Integral) or isinstance(kernel_size, bool) or kernel_size not in KERNEL_SIZES:
        raise ValueError(f"{op}: kernel_size must be 3 or 5, got {got(kernel_size)}")


def head_offsets(num_heads: int, kernel_size: int = 3) -> list[tuple[int, int]]:
    """The offset (dy, dx) of every head: centre, up, right, left, down, corners, then by distance (5 x 5); cycled.

    Source: arXiv 2505.19985, the authors' order of the 3 x 3 offsets; the 16 further ones of 5 x 5 are this library's.
    """
    check_kernel_size("head_offsets", kernel_size)
    order = _ORDER[kernel_size]
    return [order[i % len(order)] for i in range(check_int("head_offsets", "num_heads", num_heads, 0))]


def random_offsets(num_heads: int, kernel_size: int = 3, generator: torch.Generator | None = None) -> list[tuple[int, int]]:
    """Independent uniform offsets, as arXiv 2404.01139 draws them."""
    check_kernel_size("random_offsets", kernel_size)
    taps = torch.randint(kernel_size**2, (num_heads,), generator=generator).tolist()
    return [(tap // kernel_size - kernel_size // 2, tap % kernel_size - kernel_size // 2) for tap in taps]


def shift_targets(grid: tuple[int, int], offset: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """(rows, targets): the patches whose target lies inside the grid, and their targets, both int64 (n,), row-major indices."""
    (height, width), (dy, dx) = grid, offset
    y, x = torch.arange(height)[:, None] + dy, torch.arange(width)[None, :] + dx
    inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
    return inside.flatten().nonzero().flatten(), (y * width + x)[inside]


def shift_matrix(grid: tuple[int, int], offset: tuple[int, int], dtype: torch.dtype = torch.float32) -> Tensor:
    """S (N, N): S[p, q] = 1 iff q is p's target; rows without a target are zero."""
    S = torch.zeros(grid[0] * grid[1], grid[0] * grid[1], dtype=dtype)
    S[shift_targets(grid, offset)] = 1
    return S

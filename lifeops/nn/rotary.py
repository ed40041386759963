"""Rotary positions: queries and keys of the patches, turned by angles that depend on where they lie."""

from __future__ import annotations

import torch
from torch import Tensor

from lifeops.arguments import check_floating, check_tensor


def check_rope(op: str, rope: Tensor | None, batch: int, num_heads: int, grid: tuple[int, int], head_dim: int, prefix: int = 0) -> None:
    """Raise unless ``rope`` is (…, H*W, 2 d) or (…, P + H*W, 2 d), shared by the heads or (…, h, …, 2 d); None is no rope."""
    if rope is None:
        return
    check_tensor(op, "rope", rope), check_floating(op, "rope", rope)
    wanted = batch, num_heads, grid[0] * grid[1], 2 * head_dim
    leading = all(n in (1, most) for n, most in zip(reversed(rope.shape[:-2]), reversed(wanted[:-2]), strict=False))
    rows = {wanted[2:], (prefix + wanted[2], wanted[3])}
    if not 2 <= rope.dim() <= 4 or tuple(rope.shape[-2:]) not in rows or not leading:
        every = f", or with a row for each of {prefix} prefix tokens too" if prefix else ""
        raise ValueError(f"{op}: rope must broadcast to (B, h, H*W, 2 d) = {wanted}{every}, got {tuple(rope.shape)}")


def rotate(x: Tensor, rope: Tensor, half: bool) -> Tensor:
    """x (B, h, N, d) with its last tokens, those of ``rope`` (…, N', 2 d) = [sin | cos], turned; the first N - N' pass.

    x cos + x' sin, where x' has each pair (a, b) of channels as (-b, a): the pairs (0, 1), (2, 3), …, or, if ``half``, (0, d/2),
    (1, d/2 + 1), …. In the wider of both dtypes, given back in x's.
    """
    sin, cos = rope.chunk(2, -1)
    P = x.shape[-2] - rope.shape[-2]
    patches = x[..., P:, :]
    if half:
        a, b = patches.chunk(2, -1)
        turned = torch.cat((-b, a), -1)
    else:
        turned = torch.stack((-patches[..., 1::2], patches[..., ::2]), -1).flatten(-2)
    patches = (patches * cos + turned * sin).to(x.dtype)
    return torch.cat((x[..., :P, :], patches), -2) if P else patches

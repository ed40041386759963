"""Decomposed relative positions (MViTv2, arXiv 2112.01526): a query's product with a vector per row distance and one per column distance.

    bias[q, k] = q·R_h[row(y_q, y_k)] + q·R_w[row(x_q, x_k)]
    row(a, b) = floor(a max(K/Q, 1) - b max(Q/K, 1) + (K - 1) max(Q/K, 1))      Q queries, K keys along the axis

The tables R have 2 max(Q, K) - 1 rows. Those of another map's size are resized: see :func:`resized`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lifeops.ops.channel.act import accumulate_dtype

RESIZES = ("interpolate", "middle")


def table_rows(queries: int, keys: int) -> int:
    """How many distances there are along an axis."""
    return 2 * max(queries, keys) - 1


def distances(queries: int, keys: int, device=None) -> Tensor:
    """(queries, keys): the row of a table for each pair along an axis; the coarser side is stretched to the finer one. In integers: in
    floating point a quotient that is whole may come out below.
    """
    at, other = torch.arange(queries, device=device)[:, None], torch.arange(keys, device=device)
    return (at * keys - other * queries + (keys - 1) * queries) // min(queries, keys)


def resized(table: Tensor, rows: int, resize: str) -> Tensor:
    """``table`` (n, d) for a map with ``rows`` distances along the axis.

    "interpolate": linearly over its length, as the authors' video code and timm's loader do it: the distances scale with the map.
    "middle": a smaller map reads the rows of the same distances, which lie in the middle; a larger one has none and is interpolated.
    """
    spare = table.shape[0] - rows
    if spare == 0:
        return table
    if resize == "middle" and spare > 0:
        return table[spare // 2 : spare // 2 + rows]
    wide = table.to(accumulate_dtype(table.dtype)).T[None]
    return F.interpolate(wide, size=rows, mode="linear", align_corners=False)[0].T.to(table.dtype)


def relative_bias(q: Tensor, tables, q_grid: tuple[int, int], k_grid: tuple[int, int], resize: str = "interpolate") -> Tensor:
    """(B, h, n, m), added to the scores of q (B, h, n, d), n tokens of ``q_grid``, and m keys of ``k_grid``; ``tables``: R_h and R_w."""
    found = []
    for table, queries, keys in zip(tables, q_grid, k_grid, strict=True):
        table = resized(table, table_rows(queries, keys), resize)
        found.append(table[distances(queries, keys, q.device)].to(q.dtype))
    q = q.unflatten(2, q_grid)
    down = torch.einsum("bhyxd,yid->bhyxi", q, found[0])
    across = torch.einsum("bhyxd,xjd->bhyxj", q, found[1])
    return (down[..., :, None] + across[..., None, :]).flatten(4).flatten(2, 3)

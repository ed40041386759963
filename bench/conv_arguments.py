"""Launches of the general token convolution and of pooling on meta tensors, as bench.budgets compiles them: bfloat16, one prefix token."""

from __future__ import annotations

import torch

from lifeops.kernels import token_conv, token_conv_grad, token_pool

COARSE = 14  # rows and columns of the coarse grid; the fine one has ``stride`` times as many


def _tokens(side: int, C: int, B: int) -> torch.Tensor:
    return torch.empty((B, 1 + side * side, C), dtype=torch.bfloat16, device="meta")


def problem(K: int, stride: int, m: int, C: int, B: int, side: int = COARSE):
    """(x on the fine grid, y on the coarse one, weight, H, W, rows, columns, steps); a kernel as wide as its stride is not padded."""
    fine, pad = side * stride, K // 2 if stride < K else 0
    weight = torch.empty((C * m, 1, K, K), dtype=torch.bfloat16, device="meta")
    return _tokens(fine, C, B), _tokens(side, C * m, B), weight, (fine, fine, side, side), ((stride, stride), (pad, pad))


def strided(K: int, stride: int, m: int, C: int, B: int, side: int = COARSE):
    """(kernel, arguments, elements that a job writes, trips of its loop)."""
    x, y, weight, grids, steps = problem(K, stride, m, C, B, side)
    arguments = token_conv.strided_launch(x, weight, None, y, *grids, 1, 1, m == 1, *steps)[1]
    trips = 1 if token_conv.HELD.value >= K * K else K
    return token_conv.token_dwconv_strided_kernel, arguments, arguments["ROWS"] * arguments["SEGMENT"], trips


def transpose(K: int, stride: int, m: int, C: int, B: int, side: int = COARSE):
    x, y, weight, grids, steps = problem(K, stride, m, C, B, side)
    arguments = token_conv.transpose_launch(y, weight, None, x, *grids, 1, 1, m == 1, *steps)[1]
    taps = -(-K // stride) * m
    trips = 1 if taps <= token_conv.UNROLLED.value else taps
    return token_conv.token_dwconv_transpose_kernel, arguments, stride * arguments["SEGMENT"], trips


def grad(K: int, stride: int, m: int, C: int, B: int, side: int = COARSE):
    """Elements and trips of a whole program; of large kernels there is a program for every row of taps."""
    x, y, _, grids, steps = problem(K, stride, m, C, B, side)
    arguments = token_conv_grad.grad_launch(y, x, K, K, *grids, 1, 1, *steps, True)[1]
    trips = arguments["iterations"]
    share = arguments["TAP_ROWS"] / K
    return token_conv_grad.token_dwconv_strided_bwd_dw_kernel, arguments, arguments["SEGMENT"] * trips * share, trips


def pool(mode: str, K: int, stride: int, C: int, B: int, side: int = COARSE):
    x, y, _, grids, steps = problem(K, stride, 1, C, B, side)
    arguments = token_pool.pool_launch(x, y, mode, *grids, 1, 1, True, (K, K), *steps, True)[1]
    return token_pool.token_pool_kernel, arguments, 1, K


def pool_bwd(mode: str, K: int, stride: int, C: int, B: int, side: int = COARSE):
    x, y, _, grids, steps = problem(K, stride, 1, C, B, side)
    won = torch.empty((B, side * side, C), dtype=torch.uint8, device="meta") if mode == "max" else None
    arguments = token_pool.bwd_launch(y, won, x, *grids, 1, 1, True, (K, K), *steps, True)[1]
    return token_pool.token_pool_bwd_kernel, arguments, 1, -(-K // stride)


LAUNCHES = {
    **{f"strided-3-{s}": (strided, 3, s, 1) for s in (1, 2, 4)},
    "strided-3-2-m2": (strided, 3, 2, 2),
    "strided-2-2": (strided, 2, 2, 1),
    "strided-7-4": (strided, 7, 4, 1),
    **{f"transpose-3-{s}": (transpose, 3, s, 1) for s in (1, 2, 4)},
    "transpose-3-2-m2": (transpose, 3, 2, 2),
    "transpose-2-2": (transpose, 2, 2, 1),
    "transpose-7-4": (transpose, 7, 4, 1),
    **{f"dws-3-{s}": (grad, 3, s, 1) for s in (1, 2, 4)},
    "dws-3-2-m2": (grad, 3, 2, 2),
    "dws-2-2": (grad, 2, 2, 1),
    "dws-7-4": (grad, 7, 4, 1),
    **{f"pool-{mode}-3-2": (pool, mode, 3, 2) for mode in ("max", "avg", "place")},
    **{f"poolbwd-{mode}-3-2": (pool_bwd, mode, 3, 2) for mode in ("max", "avg")},
}
"""Name: (which launch, kernel size, stride, channel multiplier); of pooling (which, mode, kernel size, stride)."""

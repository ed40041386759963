"""The arithmetic of the DW shortcut (arXiv 2407.19394) over the patch tokens of a sequence (B, P + H*W, C).

    y = block_output + [0 for the prefix | sum_k DW_k(scale_k * g + shift_k) + bias_k]        g = GELU(x), patch rows

with zero padding after the affine: constants here (evaluation), batch norm on the statistics of g there (training).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from lifeops.ops.channel_act import accumulate_dtype, affine, stats_of
from lifeops.ops.token_dwconv_function import token_dwconv


class _SumOverProcesses(torch.autograd.Function):
    """The sum over the processes of a group; so is its gradient."""

    @staticmethod
    def forward(ctx, t, group):
        ctx.group = group
        total = t.clone()
        torch.distributed.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx, g):
        return _SumOverProcesses.apply(g, ctx.group), None


def _statistics(g, group):
    """mean, m2 and the number of values behind them, of (B, n, C) over B and n and, with a group, its processes."""
    if group is None:
        return *stats_of(g), g.shape[0] * g.shape[1]
    sums = torch.cat((g.sum((0, 1)), g.new_tensor([g.shape[0] * g.shape[1]])))
    *total, n = _SumOverProcesses.apply(sums, group).split((g.shape[2], 1))
    mean = total[0] / n
    return mean, _SumOverProcesses.apply((g - mean).square().sum((0, 1)), group), n


def dw_shortcut_eval(x, block_output, weight, bias, scale, shift, grid, num_prefix_tokens, backend):
    """block_output + [0 | DW(scale * GELU(x_patch) + shift) + bias], with x's dtype; (C,) values, None is 1 and 0. Differentiable."""
    wide = accumulate_dtype(x.dtype)
    u = affine(F.gelu(x.to(wide)), scale, shift)
    place = {"grid": grid, "num_prefix_tokens": num_prefix_tokens, "prefix": "zero", "backend": backend}
    return token_dwconv(u, weight, bias, residual=block_output.to(wide), **place).to(x.dtype)


def dw_shortcut_train(x, block_output, weights, biases, gammas, betas, eps, grid, num_prefix_tokens, reduce, backend):
    """The same with batch statistics, for parallel kernels at once: they see the same g, so one mean and one variance serve all.

    Args:
        x, block_output: (B, P + H*W, C), one dtype.
        weights: one (C, 1, K, K) per kernel. biases: (C,) or None. gammas, betas: (C,) or None (1, 0). eps: numbers. All in a list each.
        grid, num_prefix_tokens: (H, W), P.
        reduce: the process group whose statistics are shared (SyncBatchNorm), or None.
        backend: as in :func:`lifeops.token_dwconv`.

    Returns:
        (y, mean, m2): y like x; mean and sum of squared deviations of g, (C,) float32 (float64 for float64), without gradient.
        Differentiable in x, block_output, weights, biases, gammas and betas.
    """
    g = F.gelu(x[:, num_prefix_tokens:].to(accumulate_dtype(x.dtype)))
    mean, m2, n = _statistics(g, reduce)
    y = block_output
    for weight, bias, gamma, beta, e in zip(weights, biases, gammas, betas, eps, strict=True):
        rstd = (m2 / n + e).rsqrt()
        scale = rstd if gamma is None else gamma.to(rstd.dtype) * rstd
        shift = -mean * scale if beta is None else beta.to(rstd.dtype) - mean * scale
        y = dw_shortcut_eval(x, y, weight, bias, scale, shift, grid, num_prefix_tokens, backend)
    return y, mean.detach(), m2.detach()

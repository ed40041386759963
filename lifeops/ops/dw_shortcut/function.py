"""The DW shortcut (arXiv 2407.19394) over the patch tokens of a sequence (B, P + H*W, C), with constants and with batch statistics.

    y = block_output + [0 for the prefix | sum_k DW_k(scale_k * g + shift_k) + bias_k]        g = GELU(x), patch rows

with zero padding after the affine. Parallel kernels see the same g, so all of them cost as much as the largest: with w_k centred in
the largest window, the sum is DW(g) with the filter sum_k scale_k w_k, and what the shifts give depends on the position alone,

    sum_k shift_k sum_{t inside the grid} w_k[t] + bias_k        (C, H, W), constant but for the border.

Backward, with G_t = sum dy[p] g[p + t] over the p for which p + t is inside (the filter's gradient for the prologue GELU) and
S_t = sum dy[p] over the same p, both for the largest window:

    dw_k = scale_k G + shift_k S      dscale_k = sum_t w_k[t] G_t      dshift_k = sum_t w_k[t] S_t      dbias_k = S_centre
    dx = GELU'(x) (DWᵀ(dy; sum_k scale_k w_k) + a + b g)               a, b: batch_norm.py, summed over k

so that dy and x are read twice, and no tensor but dx is written.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from lifeops import config, torchlib
from lifeops.ops.channel import act as rows
from lifeops.ops.channel.activations import GELU_FIRST
from lifeops.ops.channel.batch_norm import Affine, affine_of, merge, norm_backward
from lifeops.ops.dw_shortcut import spec as step
from lifeops.ops.token_dwconv import act_spec as dwconv
from lifeops.ops.token_dwconv import spec as token_dwconv_ops
from lifeops.ops.token_dwconv.act_function import ChannelAct
from lifeops.ops.token_dwconv.public import token_dwconv

_stats = torchlib.caller(rows.stats_op)
_step, _step_bwd, _eval = map(torchlib.caller, (step.fwd_op, step.bwd_op, step.eval_op))
_fwd, _bwd_dx, _bwd_dw = map(torchlib.caller, (dwconv.fwd_op, dwconv.bwd_dx_op, dwconv.bwd_dw_op))
_plain_bwd_dw = torchlib.caller(token_dwconv_ops.bwd_dw_op)


_once = torchlib.once_differentiable(step.NAME, "for one, use torch.func, under which the shortcut's layers are called one by one")


class Config(NamedTuple):
    """What is not a tensor. ``eps``: one for each kernel. ``group``: the processes whose statistics are shared, or None."""

    eps: tuple[float, ...]
    H: int
    W: int
    P: int
    group: object
    backend: str


def _one_op(x, group, backend) -> bool:
    """Whether the operators made for one kernel serve. A program has the others, gradients or not."""
    return not torchlib.captured() and group is None


def dw_shortcut_eval(x, block_output, weight, bias, norm, grid, num_prefix_tokens, backend):
    """block_output + [0 | DW(scale * GELU(x_patch) + shift) + bias], with x's dtype. Differentiable.

    ``norm`` is (mean, var, gamma, beta, eps) with (C,) values, of which gamma and beta may be None (1, 0); without mean and var,
    gamma is the scale and beta the shift.
    """
    if _one_op(x, None, backend) and not torchlib.builds_graph(x, block_output, weight, bias, *norm[:4]):
        return torchlib.below_autograd(_eval, x, block_output, weight, bias, *norm, *grid, num_prefix_tokens, backend)
    scale, shift = step.eval_affine(rows.accumulate_dtype(x.dtype), *norm)
    place = {"grid": grid, "num_prefix_tokens": num_prefix_tokens, "prefix": "zero", "backend": backend or None}
    return token_dwconv(x, weight, bias, residual=block_output, prologue=ChannelAct(scale, shift, GELU_FIRST), **place)


def centred(weight, K):
    """(C, 1, k, k) in the middle of a window of K x K."""
    return F.pad(weight, [(K - weight.shape[-1]) // 2] * 4)


def _centre(sums, k):
    """The k x k in the middle of (C, 1, K, K)."""
    h = (sums.shape[-1] - k) // 2
    return sums[:, :, h : h + k, h : h + k]


def merged_filter(weights, scales):
    """sum_k scale_k w_k in the largest window, in the dtype of the scales."""
    K = max(w.shape[-1] for w in weights)
    return sum(centred(w.to(s.dtype) * s[:, None, None, None], K) for w, s in zip(weights, scales, strict=True))


def border_bias(weights, shifts, biases, grid):
    """What the shifts and biases give at every position, (H*W, C): taps outside the grid see zero, not the shift."""
    H, W = grid
    total = 0
    for weight, shift, bias in zip(weights, shifts, biases, strict=True):
        ones = shift[None, :, None, None].expand(1, -1, H, W)
        total = total + F.conv2d(ones, weight.to(shift.dtype), None if bias is None else bias.to(shift.dtype),
                                 padding=weight.shape[-1] // 2, groups=len(shift))  # fmt: skip
    return total.flatten(2)[0].T


def _window_sums(dy, cfg: Config, K):
    """S (C, 1, K, K): for every tap the sum of dy over the positions whose neighbour there exists: the gradient where x is 1."""
    total = dy[:, cfg.P :].sum(0, keepdim=True, dtype=rows.accumulate_dtype(dy.dtype))
    return _plain_bwd_dw(total, torch.ones_like(total), K, cfg.H, cfg.W, 0, "keep", total.dtype, None, cfg.backend)[0]


def _forward(x, block_output, weights, biases, affines, cfg: Config):
    place, plain = (cfg.H, cfg.W, cfg.P, "zero"), (None, None, "none")
    if len(weights) == 1:
        prologue = affines[0].scale, affines[0].shift, GELU_FIRST
        return _fwd(x, weights[0], biases[0], *prologue, *plain, block_output, *place, False, False, cfg.backend)[0]
    weight = merged_filter(weights, [a.scale for a in affines])
    y = _fwd(x, weight, None, None, None, "gelu", *plain, block_output, *place, False, False, cfg.backend)[0]
    y[:, cfg.P :] += border_bias(weights, [a.shift for a in affines], biases, (cfg.H, cfg.W)).to(y.dtype)
    return y


class DWShortcut(torch.autograd.Function):
    """(y, mean, unbiased variance) of a training step; ``parameters`` are weight, bias, gamma, beta of each kernel. Differentiable once."""

    @staticmethod
    def forward(ctx, cfg: Config, x, block_output, *parameters):
        weights, biases, gammas, betas = (parameters[i::4] for i in range(4))
        mean, m2 = _stats(x, "gelu", cfg.H * cfg.W, cfg.backend)
        n = x.shape[0] * cfg.H * cfg.W
        if cfg.group is not None:
            mean, m2, n = merge(mean, m2, n, cfg.group)
        affines = [affine_of(mean, m2 / n, *norm) for norm in zip(gammas, betas, cfg.eps, strict=True)]
        ctx.cfg, ctx.n, ctx.dtypes = cfg, n, [None if p is None else p.dtype for p in parameters]
        ctx.save_for_backward(x, mean, *weights, *(value for a in affines for value in (a.scale, a.shift, a.rstd)), *gammas, *betas)
        var = m2 / max(1, n - 1)
        ctx.mark_non_differentiable(mean, var)
        return _forward(x, block_output, weights, biases, affines, cfg), mean, var

    @staticmethod
    @_once
    def backward(ctx, dy, *_):
        x, mean, *rest = ctx.saved_tensors
        cfg, count = ctx.cfg, len(ctx.cfg.eps)
        weights = rest[:count]
        values = zip(*(rest[count + i : 4 * count : 3] for i in range(3)), strict=True)
        affines = [Affine(scale, shift, mean, rstd) for scale, shift, rstd in values]
        wide, K, place = mean.dtype, max(w.shape[-1] for w in weights), (cfg.H, cfg.W, cfg.P, "zero")
        sums_g, _ = _bwd_dw(dy, x, K, None, None, "gelu", *place, wide, None, cfg.backend)
        sums_1 = _window_sums(dy, cfg, K)
        grads, a, b = [], 0, 0
        for j, (weight, affine) in enumerate(zip(weights, affines, strict=True)):
            g, one = (_centre(t, weight.shape[-1]) for t in (sums_g, sums_1))
            dscale, dshift = ((weight.to(wide) * t).sum((1, 2, 3)) for t in (g, one))
            dgamma, dbeta, a_j, b_j = norm_backward(affine, dscale, dshift, True, ctx.n, cfg.group)
            a, b = a + a_j, b + b_j
            dw = affine.scale[:, None, None, None] * g + affine.shift[:, None, None, None] * one
            dw = torchlib.like_parameter(dw.to(weight.dtype), weight.shape, weight.stride())
            some = dw, _centre(sums_1, 1).flatten(), dgamma, dbeta
            dtypes = ctx.dtypes[4 * j : 4 * j + 4]
            grads += [None if dtype is None else grad.to(dtype) for grad, dtype in zip(some, dtypes, strict=True)]
        dx = None
        if ctx.needs_input_grad[1]:
            weight = merged_filter(weights, [affine.scale for affine in affines])
            dx = _bwd_dx(dy, x, weight, None, None, GELU_FIRST, a, b, *place, cfg.backend)[0]
        return tuple(g if need else None for g, need in zip((None, dx, dy, *grads), ctx.needs_input_grad, strict=True))


def _step_alone(cfg: Config, x, block_output, weight, bias, gamma, beta):
    """What :class:`DWShortcutStep` gives, where nothing is recorded."""
    return _step(x, block_output, weight, bias, gamma, beta, cfg.eps[0], cfg.H, cfg.W, cfg.P, cfg.backend)[:3]


class DWShortcutStep(torch.autograd.Function):
    """The same for one kernel and the statistics of one process, as two operators. Differentiable once."""

    @staticmethod
    def forward(ctx, cfg: Config, x, block_output, weight, bias, gamma, beta):
        place = cfg.H, cfg.W, cfg.P
        y, mean, var, affine = _step(x, block_output, weight, bias, gamma, beta, cfg.eps[0], *place, cfg.backend)
        ctx.cfg, ctx.dtypes = cfg, [None if p is None else p.dtype for p in (weight, bias, gamma, beta)]
        ctx.save_for_backward(x, weight, mean, affine, gamma, beta)
        ctx.mark_non_differentiable(mean, var)
        ctx.set_materialize_grads(False)  # of mean and var, which have none
        return y, mean, var

    @staticmethod
    @_once
    def backward(ctx, dy, *_):
        x, weight, *values = ctx.saved_tensors[:4]
        cfg, need = ctx.cfg, ctx.needs_input_grad
        dx, *some = _step_bwd(dy, x, weight, *values, cfg.H, cfg.W, cfg.P, need[1], cfg.backend)
        some = [g if dtype in (None, g.dtype) else g.to(dtype) for g, dtype in zip(some, ctx.dtypes, strict=True)]
        some[0] = torchlib.like_parameter(some[0], weight.shape, weight.stride())
        return tuple(g if wanted else None for g, wanted in zip((None, dx, dy, *some), need, strict=True))


def dw_shortcut_train(x, block_output, kernels, eps, grid, num_prefix_tokens, reduce, backend):
    """The same with batch statistics, for parallel kernels at once: they see the same g, so one mean and one variance serve all.

    Args:
        x, block_output: (B, P + H*W, C), one dtype.
        kernels: for each its weight (C, 1, K, K), bias (C,) or None, gamma and beta (C,) or None (1, 0). eps: a number for each.
        grid, num_prefix_tokens: (H, W), P.
        reduce: the process group whose statistics are shared (SyncBatchNorm), or None.
        backend: as in :func:`lifeops.token_dwconv`.

    Returns:
        (y, mean, var): y like x; mean and unbiased variance of g, (C,) float32 (float64 for float64), without gradient.
        Differentiable, once, in x, block_output and the kernels' tensors.
    """
    cfg = Config(tuple(eps), *grid, num_prefix_tokens, reduce, config.requested_backend(step.NAME, backend))
    if len(kernels) == 1 and _one_op(x, reduce, cfg.backend):
        return torchlib.apply(DWShortcutStep, _step_alone, cfg, x, block_output, *kernels[0])
    return DWShortcut.apply(cfg, x, block_output, *(p for kernel in kernels for p in kernel))

"""``lifeops.token_pool`` and its autograd Functions."""

from __future__ import annotations

import torch
from torch import Tensor

from lifeops import config, geometry, registry, torchlib
from lifeops.arguments import check_choice
from lifeops.ops.token_conv.public import cast, formed_as, rows_of
from lifeops.ops.token_dwconv import spec as plain
from lifeops.ops.token_dwconv.function import _fold, _unfold
from lifeops.ops.token_pool import spec
from lifeops.options import Backend, Pair, PoolMode, Prefix

_fwd, _bwd = map(torchlib.caller, (spec.fwd_op, spec.bwd_op))


class TokenPool(torch.autograd.Function):
    """y = token_pool(x)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, mode, Kh, Kw, H, W, P, sh, sw, ph, pw, prefix, ceil_mode, count_include_pad, backend):
        return _fwd(x, mode, Kh, Kw, H, W, P, sh, sw, ph, pw, prefix, ceil_mode, count_include_pad, backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, *ctx.window = inputs
        ctx.save_for_backward(x if ctx.window[0] == "max" else None)

    @staticmethod
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        return torchlib.apply(TokenPoolGrad, _bwd, dy, x, *ctx.window), *[None] * 14


class TokenPoolGrad(torch.autograd.Function):
    """dx of token_pool, linear in dy; of a maximum constant in x wherever it has a derivative."""

    generate_vmap_rule = True

    @staticmethod
    def forward(dy, x, mode, Kh, Kw, H, W, P, sh, sw, ph, pw, prefix, ceil_mode, count_include_pad, backend):
        return _bwd(dy, x, mode, Kh, Kw, H, W, P, sh, sw, ph, pw, prefix, ceil_mode, count_include_pad, backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _dy, x, *ctx.window = inputs
        ctx.save_for_backward(x)

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        gdy = torchlib.apply(TokenPool, _fwd, g, *ctx.window) if x is None else _at_the_largest(g, x, *ctx.window)
        return gdy, *[None] * 15


def _at_the_largest(g, x, mode, Kh, Kw, H, W, P, sh, sw, ph, pw, prefix, ceil_mode, count_include_pad, backend):
    """``g`` at the places whose values a maximum of ``x`` took, by torch's own, differentiable operators."""
    if x.shape[0] * x.shape[2] * H * W == 0:
        h, w = geometry.filtered_grid(spec.NAME, H, W, (Kh, Kw), (sh, sw), (ph, pw), ceil_mode)
        patches = g.new_empty((x.shape[0], h * w, x.shape[2]))
    else:
        places = spec.largest(x, Kh, Kw, H, W, P, sh, sw, ph, pw, ceil_mode)[1].flatten(2)
        patches = g[:, P:].transpose(1, 2).gather(2, places).transpose(1, 2)
    return plain._with_prefix(patches, g, P, prefix)


def _vmap_fwd(info, in_dims, x, *window):
    return _unfold(_fwd(_fold(x, in_dims[0], info.batch_size), *window), info.batch_size), 2


def _vmap_bwd(info, in_dims, dy, x, *window):
    size = info.batch_size
    return _unfold(_bwd(_fold(dy, in_dims[0], size), None if x is None else _fold(x, in_dims[1], size), *window), size), 2


torchlib.set_autograd(spec.fwd_op, TokenPool.apply)
torchlib.set_autograd(spec.bwd_op, TokenPoolGrad.apply)
torchlib.set_vmap(spec.fwd_op, _vmap_fwd)
torchlib.set_vmap(spec.bwd_op, _vmap_bwd)


@torchlib.sizes_are_numbers
def _arguments(x, kernel_size, mode, grid, num_prefix_tokens, prefix, stride, padding, ceil_mode, count_include_pad, backend):
    """The schema's arguments, checked."""
    op = spec.NAME
    rows = cast(rows_of(op, x))
    check_choice(op, "mode", mode, (*spec.MODES, "subsample"))
    kernel = geometry.pair(op, "kernel_size", kernel_size, 1)
    stride = kernel if stride is None else geometry.pair(op, "stride", stride, 1)
    padding = geometry.pair(op, "padding", padding, 0)
    if mode == "subsample":
        if kernel != (1, 1) or padding != (0, 0):
            raise ValueError(f"{op}: mode 'subsample' must have kernel_size 1 and padding 0, got {kernel} and {padding}")
        mode = "avg"
    g = geometry.to_grid(op, grid, num_prefix_tokens)
    place = *kernel, *g, *stride, *padding, prefix
    args = rows, mode, *place, ceil_mode, count_include_pad, config.requested_backend(op, backend)
    spec.check(*args)
    return *args[:-3], bool(ceil_mode), bool(count_include_pad), args[-1]


def token_pool(
    x: Tensor, kernel_size: Pair, *, mode: PoolMode = "max", grid: tuple[int, int], num_prefix_tokens: int = 0, prefix: Prefix = "keep",
    stride: Pair | None = None, padding: Pair = 0, ceil_mode: bool = False, count_include_pad: bool = True, backend: Backend | None = None,
) -> Tensor:  # fmt: skip
    """Pooling over the patch tokens of ``x``; the prefix tokens bypass it.

    ``y[b, P + r*W' + q, c]`` is the maximum or the mean of ``x[b, P + u*W + v, c]`` over ``u in [r*sh - ph, r*sh - ph + Kh)`` and v alike,
    as ``torch.nn.functional.max_pool2d`` and ``avg_pool2d`` on the (B, C, H, W) map of the patches.

    Args:
        x: (B, P + H*W, C) tokens, or (B, h, P + H*W, d) heads; float64, float32, float16 or bfloat16, means summed in fp32 (fp64).
        kernel_size, stride, padding: ints, or (rows, columns); stride None is the kernel size, padding at most half of it.
        mode: "max" (NaN is the largest; the first of equals has the gradient), "avg", or "subsample", which takes every stride-th token
            (kernel_size 1).
        grid, num_prefix_tokens, prefix, backend: as of :func:`lifeops.token_dwconv`.
        ceil_mode: windows that leave the grid at its end count, too; :func:`lifeops.conv_grid` tells the new grid.
        count_include_pad: padding counts in the divisor of a mean; what ``ceil_mode`` adds behind it does not.

    Returns (B, P + H'*W', C), or (B, h, P + H'*W', d), in x's dtype. Differentiable any number of times.
    Raises ValueError, TypeError: shapes, dtypes or the grid do not fit; NotSupported: the requested backend cannot run this.
    Sources: MViT (arXiv 2104.11227, section 3.1), CvT (2103.15808), EdgeViT (2205.03436).
    """
    args = _arguments(x, kernel_size, mode, grid, num_prefix_tokens, prefix, stride, padding, ceil_mode, count_include_pad, backend)
    return formed_as(x, torchlib.apply(TokenPool, _fwd, *args))


def explain(
    x, kernel_size, *, mode="max", grid, num_prefix_tokens=0, prefix="keep", stride=None, padding=0, ceil_mode=False,
    count_include_pad=True, backend=None,
):  # fmt: skip
    """Which backend each op of this call takes, and why not the others."""
    args = _arguments(x, kernel_size, mode, grid, num_prefix_tokens, prefix, stride, padding, ceil_mode, count_include_pad, backend)
    problem, copies = spec.fwd_op.problem(*args), () if torchlib.channels_contiguous(args[0]) else ("x",)
    return [registry.explain_op(spec.fwd_op, args[-1], problem, copies), registry.explain_op(spec.bwd_op, args[-1], problem, ())]

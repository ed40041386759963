"""``lifeops.token_dwconv``: what users call, over the Functions with and without a prologue and an epilogue."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from lifeops import config, geometry, registry, torchlib
from lifeops.arguments import check_flags, check_tensors, is_dense
from lifeops.ops.token_conv import public as token_conv
from lifeops.ops.token_dwconv import act_function, function, spec
from lifeops.options import Backend, Pair, Prefix


def _refuse(x, weight, bias, residual):
    if not (isinstance(x, torch.Tensor) and isinstance(weight, torch.Tensor)):
        raise TypeError(f"{spec.NAME}: x and weight must be tensors, got {type(x).__name__} and {type(weight).__name__}")
    check_tensors(spec.NAME, ("bias", "residual"), x=x, weight=weight, bias=bias, residual=residual)


def _arguments(x, weight, bias, grid, num_prefix_tokens, prefix, residual, backend):
    """The schema's arguments: autocast followed as conv2d's class does, geometry checked, backend resolved."""
    if not (is_dense(x) and is_dense(weight) and (bias is None or is_dense(bias)) and (residual is None or is_dense(residual))):
        _refuse(x, weight, bias, residual)
    if type(prefix) is not str:  # the rest is found out once per signature
        spec._check_prefix(spec.NAME, prefix)
    g = geometry.to_grid(spec.NAME, grid, num_prefix_tokens)
    dtype = torchlib.autocast_dtype(x)
    if dtype is not None and (x.dtype != dtype or (residual is not None and residual.dtype != dtype)):
        x, residual = x.to(dtype), residual.to(dtype) if residual is not None and residual.is_floating_point() else residual
    if residual is x and torch.compiler.is_compiling():
        residual = x.view_as(x)  # dynamo (torch 2.13) does not trace a Function that takes one tensor twice
    return x, weight, bias, residual, g.height, g.width, g.prefix, prefix, config.requested_backend(spec.NAME, backend)


def _is_square_and_odd(x, weight, stride, padding) -> bool:
    """Most calls: one odd square filter for each channel at stride 1 around every token. Asked at every call, of whatever it was given."""
    try:
        (_, _, C), (channels, one, Kh, Kw) = x.shape, weight.shape
    except (AttributeError, TypeError, ValueError, RuntimeError):
        return False
    return type(stride) is int and stride == 1 and padding is None and channels == C and one == 1 and Kh == Kw and Kh % 2 == 1


@torchlib.sizes_are_numbers
def _general(x, weight, stride, padding) -> bool:
    """Whether this is more than that; what is refused is not."""
    if not (is_dense(x) and is_dense(weight)) or weight.dim() != 4 or x.dim() not in (3, 4) or weight.shape[1] != 1:
        return False
    return x.dim() == 4 or not token_conv.is_plain(x, weight, token_conv.steps(spec.NAME, weight.shape[2:], stride, padding))


@overload
def token_dwconv(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, grid: tuple[int, int], num_prefix_tokens: int = 0,
    prefix: Prefix = "keep", residual: Tensor | None = None, backend: Backend | None = None,
    prologue: act_function.ChannelAct | None = None, epilogue: act_function.ChannelAct | None = None,
    stride: Pair = 1, padding: Pair | None = None,
) -> Tensor: ...  # fmt: skip
@overload
def token_dwconv(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, grid: tuple[int, int], num_prefix_tokens: int = 0,
    prefix: Prefix = "keep", residual: Tensor | None = None, backend: Backend | None = None,
    prologue: act_function.ChannelAct | None = None, epilogue: act_function.ChannelAct | None = None,
    pool: Literal[True], stats: bool = False, stride: Pair = 1, padding: Pair | None = None,
) -> act_function.Convolved: ...  # fmt: skip
@overload
def token_dwconv(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, grid: tuple[int, int], num_prefix_tokens: int = 0,
    prefix: Prefix = "keep", residual: Tensor | None = None, backend: Backend | None = None,
    prologue: act_function.ChannelAct | None = None, epilogue: act_function.ChannelAct | None = None,
    pool: bool = False, stats: Literal[True], stride: Pair = 1, padding: Pair | None = None,
) -> act_function.Convolved: ...  # fmt: skip
def token_dwconv(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, grid: tuple[int, int], num_prefix_tokens: int = 0,
    prefix: Prefix = "keep", residual: Tensor | None = None, backend: Backend | None = None,
    prologue: act_function.ChannelAct | None = None, epilogue: act_function.ChannelAct | None = None,
    pool: bool = False, stats: bool = False, stride: Pair = 1, padding: Pair | None = None,
) -> Tensor | act_function.Convolved:  # fmt: skip
    """Depth-wise convolution over the patch tokens of ``x``; the prefix tokens bypass it.

    ``y[b, P + r*W + q, c] = bias[c] + sum_{i,j} weight[c, 0, i, j] * x[b, P + (r+i-K//2)*W + (q+j-K//2), c] (+ residual)``
    with zero padding, as ``nn.Conv2d(C, C, K, padding=K//2, groups=C)`` on the (B, C, H, W) map of the patches. With strides and paddings
    ``r*sh + i - ph`` and ``q*sw + j - pw`` stand in the place of ``r+i-K//2`` and ``q+j-K//2``, on the grid of :func:`lifeops.conv_grid`.

    Args:
        x: (B, P + H*W, C) tokens, prefix tokens first, patches row-major; float64, float32, float16 or bfloat16. Any (B, N)
            strides are read in place; a channel stride other than 1 costs one copy. Or (B, h, N, d) heads, as a view of qkv.
        weight: (C, 1, Kh, Kw) as in ``nn.Conv2d``, any kernel; its dtype may differ from x's (sums are fp32, or fp64 for fp64).
            (m*C, 1, Kh, Kw): a channel multiplier, output channel c*m + j is filtered from input channel c. (d, 1, Kh, Kw), d a
            divisor of C: channel c has filter c mod d, as heads that share their filters; d = 1 is one filter for all.
        bias: a value for each filter, or None; added to patch rows only.
        grid: (H, W) of x. Never guessed from N.
        num_prefix_tokens: P >= 0 (cls, dist, registers).
        prefix: "keep" copies the prefix rows, "zero" sets them to zero, "drop" leaves them out: y is (B, H*W, C). With a channel
            multiplier there are too few channels to copy: "zero" or "drop".
        residual: added to y, prefix rows included; y's shape and x's dtype. The very tensor x costs nothing on CPU: there the filter's
            centre is one larger, so that an infinite x times -1 < weight < 0 is infinite, not the NaN of a difference.
        backend: "reference", "cpu", "cuda", "triton", or None for the enclosing ``use_backend`` or the best one.
        prologue: :class:`lifeops.ChannelAct` ``f(scale * x + shift)`` on the patch rows before the zero padding: the padding is 0
            whatever f(shift) is. Backward computes it again.
        epilogue: :class:`lifeops.ChannelAct` on the patch rows after the bias, before the residual.
        pool, stats: also return sums of the patch rows (before the residual) over the patches, mean and sum of squared deviations
            over batch and patches, float32 (float64 for float64).
        stride, padding: ints, or (rows, columns); padding None is K // 2. Beyond stride 1, padding K // 2, one odd square filter for
            each channel, what surrounds the convolution (residual, prologue, epilogue, sums) are passes of their own.

    Returns:
        y with x's dtype (under autocast: the autocast dtype, as conv2d), or with ``pool`` or ``stats`` the named tuple
        (y, pool, mean, m2). Weight and bias gradients have the parameters' dtype. Differentiable any number of times without
        prologue and epilogue, once with them. The same bits every run and, on CPU, at any number of threads, gradients included;
        y and the gradient of x have for an image alone the bits they have in its batch. Not so K > 15, which is torch's convolution.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or the grid do not fit (the message says what was expected and got).
        lifeops.NotSupported: the requested backend cannot run this problem.
    """
    if (torchlib.tracing() or not _is_square_and_odd(x, weight, stride, padding)) and _general(x, weight, stride, padding):
        check_flags(spec.NAME, pool=pool, stats=stats)
        options = num_prefix_tokens, prefix, residual, backend, prologue, epilogue, bool(pool), bool(stats), stride, padding
        return token_conv.convolve(x, weight, bias, grid, *options)
    args = _arguments(x, weight, bias, grid, num_prefix_tokens, prefix, residual, backend)
    if torch._C._are_functorch_transforms_active():  # a vmap folds the tensors before the operator sees them
        spec.check(*args)
    if not (pool is False and stats is False):
        check_flags(spec.NAME, pool=pool, stats=stats)
    if prologue is None and epilogue is None and not pool and not stats:
        return function.convolve(*args)
    return act_function.convolve(args, prologue, epilogue, bool(pool), bool(stats))


def explain(
    x, weight, bias=None, *, grid, num_prefix_tokens=0, prefix="keep", residual=None, backend=None, prologue=None, epilogue=None,
    pool=False, stats=False, stride=1, padding=None,
):  # fmt: skip
    """Which backend each op of this call takes, and why not the others."""
    if _general(x, weight, stride, padding):
        options = num_prefix_tokens, prefix, residual, backend, prologue, epilogue, pool, stats, stride, padding
        return token_conv.explain(x, weight, bias, grid, *options)
    args = _arguments(x, weight, bias, grid, num_prefix_tokens, prefix, residual, backend)
    check_flags(spec.NAME, pool=pool, stats=stats)
    spec.check(*args)
    x, request = args[0], args[-1]
    if prologue is not None or epilogue is not None or pool or stats:
        ops = act_function.explain_ops(x, weight, prologue, epilogue, pool or stats, request)
        return [registry.explain_op(op, request, p, ()) for op, p in ops]
    named = {"x": x} if residual is None else {"x": x, "residual": residual}
    copies = tuple(name for name, t in named.items() if not torchlib.channels_contiguous(t))
    problem = spec.Problem(x.device, x.dtype, weight.dtype, x.shape[2], weight.shape[2])
    ops = [(spec.fwd_op, problem), (spec.bwd_dx_op, problem), (spec.bwd_dw_op, problem)]
    if bias is not None:
        ops.append((spec.bwd_db_op, problem._replace(weight_dtype=None, K=0)))
    return [registry.explain_op(op, request, p, copies if op is spec.fwd_op else ()) for op, p in ops]

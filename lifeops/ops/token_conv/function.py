"""The autograd Functions over the general convolution's three ops.

S (strided), T (its transpose) and D (the weight gradient) are bilinear: <dy, S(x; w)> = <T(dy; w), x> = <D(dy, x), w>. So their own
gradients are these three again, with prefix rows that no filter touches zero where "keep" would copy them.
"""

from __future__ import annotations

import torch

from lifeops import geometry, torchlib
from lifeops.ops.token_conv import spec
from lifeops.ops.token_dwconv import function as plain
from lifeops.ops.token_dwconv.function import _filter_only, _fold, _stack, _unfold

_strided, _transpose, _bwd_dw = map(torchlib.caller, (spec.strided_op, spec.transpose_op, spec.bwd_dw_op))


def _coarse(H, W, P, sh, sw, ph, pw, kernel):
    """The coarse grid behind its P prefix rows, as the plain bias gradient takes them."""
    return *geometry.filtered_grid(spec.STRIDED, H, W, kernel, (sh, sw), (ph, pw)), P


class TokenDWConvStrided(torch.autograd.Function):
    """y = S(x; weight) + bias."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, weight, bias, H, W, P, sh, sw, ph, pw, prefix, backend):
        return _strided(x, weight, bias, H, W, P, sh, sw, ph, pw, prefix, backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, bias, *ctx.geometry = inputs
        need = ctx.needs_input_grad
        ctx.save_for_backward(x if need[1] else None, weight if need[0] else None)
        ctx.kernel, ctx.like, ctx.weight_dtype = weight.shape[2:], (weight.shape, weight.stride()), weight.dtype
        ctx.m = spec._multiplier(weight.shape[0], x.shape[2])
        ctx.bias_dtype = bias.dtype if bias is not None and need[2] else None

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        need, dx, dw, db = ctx.needs_input_grad, None, None, None
        *geo, backend = ctx.geometry
        if need[0]:
            dx = torchlib.apply(TokenDWConvTranspose, _transpose, dy, weight, None, ctx.m, *geo, backend)
        if need[1]:
            args = (dy, x, *ctx.kernel, *geo, ctx.weight_dtype, ctx.bias_dtype, backend)
            dw, db = torchlib.apply(TokenDWConvStridedWeightGrad, _bwd_dw, *args)
            dw = torchlib.like_parameter(dw, *ctx.like)
        elif need[2]:
            args = (dy, *_coarse(*geo[:-1], ctx.kernel), geo[-1], ctx.bias_dtype, backend)
            db = torchlib.apply(plain.TokenDWConvBiasGrad, plain._bwd_db, *args)
        return dx, dw, db if need[2] else None, *[None] * 9


class TokenDWConvTranspose(torch.autograd.Function):
    """x = T(y; weight) + bias; H and W are the result's."""

    generate_vmap_rule = True

    @staticmethod
    def forward(y, weight, bias, m, H, W, P, sh, sw, ph, pw, prefix, backend):
        return _transpose(y, weight, bias, m, H, W, P, sh, sw, ph, pw, prefix, backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        y, weight, bias, ctx.m, *ctx.geometry = inputs
        need = ctx.needs_input_grad
        ctx.save_for_backward(y if need[1] else None, weight if need[0] else None)
        ctx.kernel, ctx.like, ctx.weight_dtype = weight.shape[2:], (weight.shape, weight.stride()), weight.dtype
        ctx.bias_dtype = bias.dtype if bias is not None and need[2] else None

    @staticmethod
    def backward(ctx, g):
        y, weight = ctx.saved_tensors
        need, gy, gw, gb = ctx.needs_input_grad, None, None, None
        H, W, P, *steps, prefix, backend = ctx.geometry
        if need[0]:
            gy = torchlib.apply(TokenDWConvStrided, _strided, g, weight, None, *ctx.geometry)
        if need[1]:
            args = (y, g, *ctx.kernel, H, W, P, *steps, prefix, ctx.weight_dtype, None, backend)
            gw = torchlib.apply(TokenDWConvStridedWeightGrad, _bwd_dw, *args)[0]
            gw = torchlib.like_parameter(gw, *ctx.like)
        if need[2]:  # g has its prefix rows whatever the mode
            gb = torchlib.apply(plain.TokenDWConvBiasGrad, plain._bwd_db, g, H, W, P, "zero", ctx.bias_dtype, backend)
        return gy, gw, gb, *[None] * 10


class TokenDWConvStridedWeightGrad(torch.autograd.Function):
    """(dw, db) = D(dy, x)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(dy, x, Kh, Kw, H, W, P, sh, sw, ph, pw, prefix, weight_dtype, bias_dtype, backend):
        return _bwd_dw(dy, x, Kh, Kw, H, W, P, sh, sw, ph, pw, prefix, weight_dtype, bias_dtype, backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        dy, x, _, _, *geo, prefix, _, bias_dtype, backend = inputs
        need = ctx.needs_input_grad
        ctx.save_for_backward(dy if need[1] else None, x if need[0] else None)
        ctx.geometry = *geo, _filter_only(prefix), backend
        ctx.has_bias, ctx.m = bias_dtype is not None, spec._multiplier(dy.shape[2], x.shape[2])

    @staticmethod
    def backward(ctx, gw, gb):
        dy, x = ctx.saved_tensors
        need, gdy, gx = ctx.needs_input_grad, None, None
        if need[0]:
            gdy = torchlib.apply(TokenDWConvStrided, _strided, x, gw, gb if ctx.has_bias else None, *ctx.geometry)
        if need[1]:
            gx = torchlib.apply(TokenDWConvTranspose, _transpose, dy, gw, None, ctx.m, *ctx.geometry)
        return gdy, gx, *[None] * 13


# ------------------------------------------------------------------------------------------------ vmap, as of the plain ones


def _vmap_strided(info, in_dims, x, weight, bias, *geo):
    size = info.batch_size
    bias = None if bias is None else _stack(bias, in_dims[2], size)
    return _unfold(_strided(_fold(x, in_dims[0], size), _stack(weight, in_dims[1], size), bias, *geo), size), 2


def _vmap_transpose(info, in_dims, y, weight, bias, *geo):
    size = info.batch_size
    bias = None if bias is None else _stack(bias, in_dims[2], size)
    return _unfold(_transpose(_fold(y, in_dims[0], size), _stack(weight, in_dims[1], size), bias, *geo), size), 2


def _vmap_bwd_dw(info, in_dims, dy, x, *rest):
    size = info.batch_size
    dw, db = _bwd_dw(_fold(dy, in_dims[0], size), _fold(x, in_dims[1], size), *rest)
    return (dw.unflatten(0, (size, -1)), db.unflatten(0, (size, -1)) if db.numel() else db.new_empty((size, 0))), (0, 0)


for _op, _function, _vmap in (
    (spec.strided_op, TokenDWConvStrided, _vmap_strided),
    (spec.transpose_op, TokenDWConvTranspose, _vmap_transpose),
    (spec.bwd_dw_op, TokenDWConvStridedWeightGrad, _vmap_bwd_dw),
):
    torchlib.set_autograd(_op, _function.apply)
    torchlib.set_vmap(_op, _vmap)


def strided(*args):
    """The schema's arguments of the strided convolution, with gradients of any order."""
    return torchlib.apply(TokenDWConvStrided, _strided, *args)


def transpose(*args):
    return torchlib.apply(TokenDWConvTranspose, _transpose, *args)

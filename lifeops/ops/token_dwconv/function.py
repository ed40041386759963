"""The autograd Functions over token_dwconv's four ops.

With <a, b> the sum of products, <dy, op(x; w)> = <bwd_dx(dy; w), x> = <bwd_dw(dy, x), w>. So the gradients of bwd_dx and
bwd_dw are the same ops again, with prefix rows that the filter never touches set to zero where "keep" would copy them.
"""

from __future__ import annotations

import torch

from lifeops import torchlib
from lifeops.ops.token_dwconv import spec

_fwd = torchlib.caller(spec.fwd_op)
_bwd_dx = torchlib.caller(spec.bwd_dx_op)
_bwd_dw = torchlib.caller(spec.bwd_dw_op)
_bwd_db = torchlib.caller(spec.bwd_db_op)


def _filter_only(prefix):
    """The prefix mode of the part of the map that depends on the weight."""
    return "zero" if prefix == "keep" else prefix


class TokenDWConv(torch.autograd.Function):
    """y = token_dwconv(x, weight, bias, residual): see :func:`lifeops.token_dwconv`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, weight, bias, residual, H, W, P, prefix, backend):
        return _fwd(x, weight, bias, residual, H, W, P, prefix, backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, bias, residual, *ctx.geometry = inputs
        need, ctx.twice = ctx.needs_input_grad, residual is x
        ctx.save_for_backward(x if need[1] else None, weight if need[0] else None)
        ctx.K, ctx.like, ctx.weight_dtype = weight.shape[-1], (weight.shape, weight.stride()), weight.dtype
        ctx.bias_dtype = bias.dtype if bias is not None and need[2] else None

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        need, dx, dw, db = ctx.needs_input_grad, None, None, None
        if need[0] and ctx.twice:  # both gradients at once: the mirrored convolution of dy, with dy as its residual
            dx = torchlib.apply(TokenDWConv, _fwd, dy, weight.flip(-1, -2), None, dy, *ctx.geometry)
        elif need[0]:
            dx = torchlib.apply(TokenDWConvInputGrad, _bwd_dx, dy, weight, *ctx.geometry)
        if need[1]:
            *geo, backend = ctx.geometry
            args = (dy, x, ctx.K, *geo, ctx.weight_dtype, ctx.bias_dtype, backend)
            dw, db = torchlib.apply(TokenDWConvWeightGrad, _bwd_dw, *args)
            dw = torchlib.like_parameter(dw, *ctx.like)
        elif need[2]:
            *geo, backend = ctx.geometry
            db = torchlib.apply(TokenDWConvBiasGrad, _bwd_db, dy, *geo, ctx.bias_dtype, backend)
        return dx, dw, db if need[2] else None, dy if need[3] and not ctx.twice else None, None, None, None, None, None


class TokenDWConvInputGrad(torch.autograd.Function):
    """dx of token_dwconv as a map of its own, bilinear in dy and weight."""

    generate_vmap_rule = True

    @staticmethod
    def forward(dy, weight, H, W, P, prefix, backend):
        return _bwd_dx(dy, weight, H, W, P, prefix, backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        dy, weight, *ctx.geometry = inputs
        need = ctx.needs_input_grad
        ctx.save_for_backward(dy if need[1] else None, weight if need[0] else None)
        ctx.K, ctx.weight_dtype = weight.shape[-1], weight.dtype

    @staticmethod
    def backward(ctx, g):
        dy, weight = ctx.saved_tensors
        need, gdy, gw = ctx.needs_input_grad, None, None
        if need[0]:
            gdy = torchlib.apply(TokenDWConv, _fwd, g, weight, None, None, *ctx.geometry)
        if need[1]:
            *geo, backend = ctx.geometry
            gw = torchlib.apply(TokenDWConvWeightGrad, _bwd_dw, dy, g, ctx.K, *geo, ctx.weight_dtype, None, backend)[0]
        return gdy, gw, None, None, None, None, None


class TokenDWConvWeightGrad(torch.autograd.Function):
    """(dw, db) of token_dwconv as a map of its own, bilinear in dy and x."""

    generate_vmap_rule = True

    @staticmethod
    def forward(dy, x, K, H, W, P, prefix, weight_dtype, bias_dtype, backend):
        return _bwd_dw(dy, x, K, H, W, P, prefix, weight_dtype, bias_dtype, backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        dy, x, _, H, W, P, prefix, _, bias_dtype, backend = inputs
        need = ctx.needs_input_grad
        ctx.save_for_backward(dy if need[1] else None, x if need[0] else None)
        ctx.geometry = H, W, P, _filter_only(prefix), backend
        ctx.has_bias = bias_dtype is not None

    @staticmethod
    def backward(ctx, gw, gb):
        dy, x = ctx.saved_tensors
        need, gdy, gx = ctx.needs_input_grad, None, None
        if need[0]:
            gdy = torchlib.apply(TokenDWConv, _fwd, x, gw, gb if ctx.has_bias else None, None, *ctx.geometry)
        if need[1]:
            gx = torchlib.apply(TokenDWConvInputGrad, _bwd_dx, dy, gw, *ctx.geometry)
        return gdy, gx, None, None, None, None, None, None, None, None


class TokenDWConvBiasGrad(torch.autograd.Function):
    """db of token_dwconv alone (frozen weight), linear in dy."""

    generate_vmap_rule = True

    @staticmethod
    def forward(dy, H, W, P, prefix, bias_dtype, backend):
        return _bwd_db(dy, H, W, P, prefix, bias_dtype, backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.shape, ctx.dtype = inputs[0].shape, inputs[0].dtype
        ctx.rows = inputs[3] if inputs[4] != "drop" else 0

    @staticmethod
    def backward(ctx, gb):
        batch, tokens, channels = ctx.shape
        patches = gb.to(ctx.dtype).expand(batch, tokens - ctx.rows, channels)
        return torch.nn.functional.pad(patches, (0, 0, ctx.rows, 0)), None, None, None, None, None, None


# ------------------------------------------------------------------------------------------------ vmap


def _front(t, dim, size):
    """``t`` with its mapped dimension first; an unmapped tensor is expanded."""
    return t.unsqueeze(0).expand(size, *t.shape) if dim is None else t.movedim(dim, 0)


def _fold(t, dim, size):
    """(V, B, N, C) into (B, N, V*C): one convolution with V times the channels."""
    return _front(t, dim, size).permute(1, 2, 0, 3).flatten(2)


def _unfold(t, size):
    return t.unflatten(2, (size, -1))  # the mapped dimension is now dim 2


def _stack(t, dim, size):
    """Weights (V, C, …) into (V*C, …)."""
    return _front(t, dim, size).flatten(0, 1)


def _vmap_fwd(info, in_dims, x, weight, bias, residual, *geo):
    size = info.batch_size
    folded_bias = None if bias is None else _stack(bias, in_dims[2], size)
    folded_residual = None if residual is None else _fold(residual, in_dims[3], size)
    y = _fwd(_fold(x, in_dims[0], size), _stack(weight, in_dims[1], size), folded_bias, folded_residual, *geo)
    return _unfold(y, size), 2


def _vmap_bwd_dx(info, in_dims, dy, weight, *geo):
    size = info.batch_size
    return _unfold(_bwd_dx(_fold(dy, in_dims[0], size), _stack(weight, in_dims[1], size), *geo), size), 2


def _vmap_bwd_dw(info, in_dims, dy, x, *rest):
    size = info.batch_size
    dw, db = _bwd_dw(_fold(dy, in_dims[0], size), _fold(x, in_dims[1], size), *rest)
    return (dw.unflatten(0, (size, -1)), db.unflatten(0, (size, -1)) if db.numel() else db.new_empty((size, 0))), (0, 0)


def _vmap_bwd_db(info, in_dims, dy, *rest):
    return _bwd_db(_fold(dy, in_dims[0], info.batch_size), *rest).unflatten(0, (info.batch_size, -1)), 0


_FUNCTIONS = (TokenDWConv, TokenDWConvInputGrad, TokenDWConvWeightGrad, TokenDWConvBiasGrad)
for _spec, _function in zip((spec.fwd_op, spec.bwd_dx_op, spec.bwd_dw_op, spec.bwd_db_op), _FUNCTIONS, strict=True):
    torchlib.set_autograd(_spec, _function.apply)
torchlib.set_vmap(spec.fwd_op, _vmap_fwd)
torchlib.set_vmap(spec.bwd_dx_op, _vmap_bwd_dx)
torchlib.set_vmap(spec.bwd_dw_op, _vmap_bwd_dw)
torchlib.set_vmap(spec.bwd_db_op, _vmap_bwd_db)


def convolve(x, weight, bias, residual, H, W, P, prefix, backend):
    """The plain convolution of the schema's arguments, with gradients of any order."""
    return torchlib.apply(TokenDWConv, _fwd, x, weight, bias, residual, H, W, P, prefix, backend)

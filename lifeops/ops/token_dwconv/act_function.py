"""token_dwconv with ``prologue`` and ``epilogue``: the autograd Functions and the way they are put together.

Without gradients everything is one operator. With them an activation alone behind the convolution is one operator and, on CPU, its
backward another, which keeps x. Everything else is two Functions, the convolution (prologue, bias) and what follows it (affine,
activation), of which each keeps its own input, the pre-activation, and nothing else.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from lifeops import config, torchlib
from lifeops.arguments import check_floating, check_tensor
from lifeops.ops.channel import act as channel_act
from lifeops.ops.channel import activations
from lifeops.ops.token_dwconv import act_bwd_spec
from lifeops.ops.token_dwconv import act_spec as spec
from lifeops.ops.token_dwconv import function as plain
from lifeops.ops.token_dwconv import spec as dwconv
from lifeops.ops.token_dwconv.function import _bwd_db
from lifeops.options import Act

_fwd, _bwd_dx, _bwd_dw = map(torchlib.caller, (spec.fwd_op, spec.bwd_dx_op, spec.bwd_dw_op))
_bwd = torchlib.caller(act_bwd_spec.op)
_once = torchlib.once_differentiable(
    "token_dwconv with a prologue or an epilogue", "for one, apply torch's own operators around lifeops.token_dwconv"
)
_act, _sums, _grad = map(torchlib.caller, (channel_act.act_op, channel_act.sums_op, channel_act.grad_op))


class ChannelAct(NamedTuple):
    """f(scale[c] * x + shift[c]): ``scale`` and ``shift`` (C,) or None, ``act`` "none", "relu", "relu6", "hardswish" or "gelu"
    (exact); of a prologue also "gelu_first", which is scale[c] * gelu(x) + shift[c].
    """

    scale: torch.Tensor | None = None
    shift: torch.Tensor | None = None
    act: Act = "none"


class Convolved(NamedTuple):
    """Result of token_dwconv with sums: ``pool`` (B, C) sums over the patches, ``mean`` and ``m2`` (C,) over batch and patches."""

    y: torch.Tensor
    pool: torch.Tensor | None
    mean: torch.Tensor | None
    m2: torch.Tensor | None


class TokenDWConvAct(torch.autograd.Function):
    """y = DW(f(scale * x + shift)) + bias + residual; differentiable once."""

    @staticmethod
    def forward(ctx, x, weight, bias, scale, shift, residual, act, H, W, P, prefix, backend):
        need = ctx.needs_input_grad
        ctx.save_for_backward(x, weight if need[0] or need[3] or need[4] else None, scale, shift)
        ctx.act, ctx.geometry, ctx.backend = act, (H, W, P, prefix), backend
        ctx.K, ctx.like, ctx.weight_dtype = weight.shape[-1], (weight.shape, weight.stride()), weight.dtype
        ctx.bias_dtype = bias.dtype if bias is not None and need[2] else None
        return _fwd(x, weight, bias, scale, shift, act, None, None, "none", residual, H, W, P, prefix, False, False, backend)[0]

    @staticmethod
    @_once
    def backward(ctx, dy):
        x, weight, scale, shift = ctx.saved_tensors
        need, prologue, dx, dw, db, dscale, dshift = ctx.needs_input_grad, (scale, shift, ctx.act), *[None] * 5
        if need[0] or need[3] or need[4]:
            dx, dscale, dshift = _bwd_dx(dy, x, weight, *prologue, None, None, *ctx.geometry, ctx.backend)
        if need[1]:
            dw, db = _bwd_dw(dy, x, ctx.K, *prologue, *ctx.geometry, ctx.weight_dtype, ctx.bias_dtype, ctx.backend)
            dw = torchlib.like_parameter(dw, *ctx.like)
        elif need[2]:
            db = _bwd_db(dy, *ctx.geometry, ctx.bias_dtype, ctx.backend)
        grads = dx, dw, db, dscale, dshift, dy
        return *(g if n else None for g, n in zip(grads, need, strict=False)), *[None] * 6


class ChannelActivation(torch.autograd.Function):
    """y = f(scale * x + shift) over sequences without prefix; differentiable once."""

    @staticmethod
    def forward(ctx, x, scale, shift, act, backend):
        ctx.save_for_backward(x, scale, shift)
        ctx.act, ctx.backend = act, backend
        return _act(x, scale, shift, None, None, act, x.shape[1], backend)

    @staticmethod
    @_once
    def backward(ctx, dy):
        x, scale, shift = ctx.saved_tensors
        place, dx, dscale, dshift = (x.shape[1], ctx.backend), None, None, None
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            _, dshift, dscale, _, _ = _sums(dy, x, scale, shift, ctx.act, *place).sum(1)
        if ctx.needs_input_grad[0]:
            dx = _grad(dy, x, scale, shift, None, None, None, None, ctx.act, *place)
        return *(g if n else None for g, n in zip((dx, dscale, dshift), ctx.needs_input_grad, strict=False)), None, None


class TokenDWConvOutAct(torch.autograd.Function):
    """y = g(DW(x) + bias) + residual; z = DW(x) + bias is computed again for backward. Differentiable once."""

    @staticmethod
    def forward(ctx, x, weight, bias, residual, out_act, H, W, P, prefix, backend):
        ctx.save_for_backward(x, weight, bias)
        ctx.out_act, ctx.geometry = out_act, (H, W, P, prefix, backend)
        before = None, None, "none"
        return _fwd(x, weight, bias, *before, None, None, out_act, residual, H, W, P, prefix, False, False, backend)[0]

    @staticmethod
    @_once
    def backward(ctx, dy):
        x, weight, bias = ctx.saved_tensors
        dx, dw, db = _bwd(dy, x, weight, bias, ctx.out_act, *ctx.geometry)
        grads = dx, torchlib.like_parameter(dw, weight.shape, weight.stride()), db, dy
        return *(g if n else None for g, n in zip(grads, ctx.needs_input_grad, strict=False)), *[None] * 6


def _in_one_pass(x, before: ChannelAct, after: ChannelAct, sums: bool, backend: str) -> bool:
    """Whether an operator has the gradients of the whole in one pass: of an activation alone behind the convolution, on CPU."""
    alone = before == ChannelAct() and after[:2] == (None, None) and after != ChannelAct() and not sums
    return alone and x.device.type == "cpu" and (backend or config.settings.backend) in ("", "cpu", "reference")


def _values(name, x, steps):
    """scale, shift and act of a step, checked beside ``x``, in the dtype the kernels sum in."""
    if steps is None:
        return ChannelAct()
    if not isinstance(steps, tuple) or len(steps) != 3:
        raise TypeError(f"token_dwconv: {name} must be a lifeops.ChannelAct(scale, shift, act), got {type(steps).__name__}")
    scale, shift, act = steps
    activations.check("token_dwconv", f"{name}.act", act, activations.PROLOGUES if name == "prologue" else activations.ACTS)
    if scale is None and shift is None:
        return ChannelAct(act=act)
    values = {f"{name}.scale": scale, f"{name}.shift": shift}
    for part, t in values.items():
        check_tensor("token_dwconv", part, t, optional=True)
        if t is not None:
            check_floating("token_dwconv", part, t)
    dtype = channel_act.accumulate_dtype(x.dtype)
    values = {part: None if t is None else t.to(dtype) for part, t in values.items()}
    channel_act.check_values("token_dwconv", x, **values)
    return ChannelAct(*values.values(), act)


def _transformed(args, before: ChannelAct, after: ChannelAct):
    """The patch rows that come out, by torch's own operators around token_dwconv: what torch.func transforms see."""
    x, weight, bias, _, H, W, P, _, backend = args
    u = activations.prologue(x[:, P:], *before).to(x.dtype)
    z = plain.convolve(u, weight, bias, None, H, W, 0, "keep", backend)
    return activations.prologue(z, *after).to(x.dtype)


def _assembled(y, x, residual, P, prefix):
    if P:
        y = dwconv._with_prefix(y, x, P, prefix)
    return y if residual is None else y + residual


def _summed(y, pool, stats):
    """pool, mean and m2 of the patch rows ``y`` by torch's own, differentiable operators."""
    wide = y.to(channel_act.accumulate_dtype(y.dtype))
    return wide.sum(1) if pool else None, *(channel_act.stats_of(wide) if stats else (None, None))


def activated(x, steps: ChannelAct, P: int, backend: str):
    """``steps`` on the patch rows behind P prefix rows, as operators of their own; differentiable once, under transforms any number."""
    if steps.act == activations.GELU_FIRST:
        return activated(activated(x, ChannelAct(act="gelu"), P, backend), steps._replace(act="none"), P, backend)
    patches = x[:, P:]
    if torch._C._are_functorch_transforms_active():
        y = activations.prologue(patches, *steps).to(x.dtype)
    elif torchlib.captured() or not torchlib.wants_grad((x, *steps[:2])):
        y = torchlib.below_autograd(_act, patches, *steps[:2], None, None, steps.act, patches.shape[1], backend)
    else:
        y = ChannelActivation.apply(patches, *steps, backend)
    return torch.cat((x[:, :P], y), 1) if P else y


def _graph(x, weight, bias, scale, shift, act, out_scale, out_shift, out_act, residual, H, W, P, prefix, pool, stats, backend):
    """The operator's outputs with gradients, None where a sum was not asked for."""
    after = ChannelAct(out_scale, out_shift, out_act)
    if after == ChannelAct() and not (pool or stats):
        y = TokenDWConvAct.apply(x, weight, bias, scale, shift, residual, act, H, W, P, prefix, backend)
        return y, None, None, None
    before = ChannelAct(scale, shift, act)
    if x.requires_grad and weight.requires_grad and _in_one_pass(x, before, after, pool or stats, backend):
        return TokenDWConvOutAct.apply(x, weight, bias, residual, out_act, H, W, P, prefix, backend), None, None, None
    if before == ChannelAct():  # the plain convolution's gradients need no pass over x for a scale's
        y = plain.convolve(x, weight, bias, None, H, W, P, "drop", backend)
    else:
        y = TokenDWConvAct.apply(x, weight, bias, scale, shift, None, act, H, W, P, "drop", backend)
    if after != ChannelAct():
        y = ChannelActivation.apply(y, *after, backend)
    return _assembled(y, x, residual, P, prefix), *_summed(y, pool, stats)


def _operator(*args):
    """The same with empty tensors for the sums that were not asked for, as the schema has it."""
    y, *sums = _graph(*args)
    return y, *(args[0].new_empty(0, dtype=channel_act.accumulate_dtype(args[0].dtype)) if t is None else t for t in sums)


torchlib.set_autograd(spec.fwd_op, _operator)


def convolve(args, prologue, epilogue, pool, stats):
    """token_dwconv with the rest: ``args`` are the schema arguments of the plain operator."""
    x, weight, bias, residual, H, W, P, prefix, backend = args
    dwconv.check(*args)
    before, after = _values("prologue", x, prologue), _values("epilogue", x, epilogue)
    full = (x, weight, bias, *before, *after, residual, H, W, P, prefix, pool, stats, backend)
    asked = pool, stats, stats
    if torch._C._are_functorch_transforms_active():
        y = _transformed(args, before, after)
        y, *sums = _assembled(y, x, residual, P, prefix), *_summed(y, pool, stats)
    elif torchlib.captured() or not torchlib.wants_grad((x, weight, bias, residual, *before[:2], *after[:2])):
        y, *sums = torchlib.below_autograd(_fwd, *full)
    else:
        y, *sums = _graph(*full)
    return Convolved(y, *(t if a else None for t, a in zip(sums, asked, strict=True))) if pool or stats else y


def explain_ops(x, weight, prologue, epilogue, sums: bool, backend: str):
    """The operators of a call with a prologue or an epilogue, and the problem each of them sees."""
    before, after = _values("prologue", x, prologue), _values("epilogue", x, epilogue)
    problem = spec.Problem(x.device, x.dtype, weight.dtype, x.shape[2], weight.shape[2], before.act, after.act)
    if _in_one_pass(x, before, after, sums, backend):
        return [(spec.fwd_op, problem), (act_bwd_spec.op, problem)]
    ops = [(spec.fwd_op, problem), *((op, problem._replace(out_act="none")) for op in (spec.bwd_dx_op, spec.bwd_dw_op))]
    if after != ChannelAct():
        rows = channel_act.Problem(x.device, x.dtype, x.shape[2], after.act)
        ops += [(op, rows) for op in (channel_act.act_op, channel_act.sums_op, channel_act.grad_op)]
    return ops

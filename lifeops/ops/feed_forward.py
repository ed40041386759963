"""Two dense layers with an activation between them, y = f(x W1ᵀ + b1) W2ᵀ + b2, whose backward computes f again: kept are x and the
hidden tokens h, not f(h), which are as large.

    a = f(h)      dW2 = dyᵀ a      dh = (dy W2) f'(h)      dW1 = dhᵀ x      dx = dh W1
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lifeops import torchlib
from lifeops.arguments import check_choice
from lifeops.ops.channel import act as rows
from lifeops.pointwise import multiply, pointwise, pointwise_bwd_dw, pointwise_bwd_dx

ACTS = "gelu", "silu"
_act, _grad = torchlib.caller(rows.act_op), torchlib.caller(rows.grad_op)
_once = torchlib.once_differentiable("feed forward", "for one, use torch.func, under which the layers are called one by one")


def _value(h: Tensor, act: str, backend: str) -> Tensor:
    """f(h). On the CPU the exact GELU of ``channel_act`` takes half of torch's time."""
    if act == "silu":
        return F.silu(h)
    return _act(h, None, None, None, None, act, h.shape[1], backend) if h.device.type == "cpu" else F.gelu(h)


def _derivative(da: Tensor, h: Tensor, act: str, backend: str) -> Tensor:
    """da f'(h)"""
    if act == "silu":
        return torch.ops.aten.silu_backward(da, h)
    if h.device.type != "cpu":
        return torch.ops.aten.gelu_backward(da, h)
    return _grad(da, h, None, None, None, None, None, None, act, h.shape[1], backend)


class FeedForward(torch.autograd.Function):
    """Differentiable once."""

    @staticmethod
    def forward(ctx, x, w1, b1, w2, b2, act, backend):
        h = pointwise(x, w1, b1)
        ctx.save_for_backward(x, w1, w2, h)
        ctx.act, ctx.backend = act, backend
        return pointwise(_value(h, act, backend), w2, b2)

    @staticmethod
    @_once
    def backward(ctx, dy):
        x, w1, w2, h = ctx.saved_tensors
        need, dy = ctx.needs_input_grad, dy.contiguous()
        dx = dw1 = db1 = dw2 = db2 = None
        if need[3]:
            dw2 = pointwise_bwd_dw(dy, _value(h, ctx.act, ctx.backend))
        if need[4]:
            db2 = dy.sum((0, 1))
        if need[0] or need[1] or need[2]:
            dh = _derivative(pointwise_bwd_dx(dy, w2), h, ctx.act, ctx.backend)
            dx = pointwise_bwd_dx(dh, w1) if need[0] else None
            dw1 = pointwise_bwd_dw(dh, x) if need[1] else None
            db1 = dh.sum((0, 1)) if need[2] else None
        return dx, dw1, db1, dw2, db2, None, None


def feed_forward(x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, act: str, backend: str) -> Tensor:
    """x (B, N, C), w1 (H, C), b1 (H,), w2 (C', H), b2 (C',), biases or None -> (B, N, C'). ``act``: "gelu" (exact) or "silu".

    Under autocast and compilers the layers one by one.
    """
    check_choice("feed_forward", "act", act, ACTS)
    if torch.compiler.is_compiling() or torchlib.autocast_dtype(x) is not None:
        return F.linear((F.gelu if act == "gelu" else F.silu)(F.linear(x, w1, b1)), w2, b2)
    if torchlib.wants_grad((x, w1, b1, w2, b2)):
        return FeedForward.apply(x, w1, b1, w2, b2, act, backend)
    h = multiply(x, w1, b1)
    return multiply(F.silu(h, inplace=True) if act == "silu" else _value(h, act, backend), w2, b2)

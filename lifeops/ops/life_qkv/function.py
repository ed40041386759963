"""life_qkv for users: the public function and its autograd Function.

Backward per scale s = 3, 2 (G the gradient that reaches z_s):
    dP_s = Gᵀ d_s      g = G P_s      dDW_s = bwd_dw(g, z_{s-1})      G of z_{s-1} = its own gradient + bwd_dx(g, DW_s)
and for scale 1 dW1 = Gᵀ x, dx = G W1. The last sum is one token_dwconv with a mirrored filter and a residual.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lifeops import config, geometry, registry, torchlib
from lifeops.arguments import check_choice, check_flags, check_floating, check_tensors
from lifeops.ops.life_qkv import spec
from lifeops.ops.token_dwconv import spec as dwconv
from lifeops.ops.token_dwconv.function import TokenDWConv, TokenDWConvWeightGrad
from lifeops.ops.token_dwconv.public import token_dwconv
from lifeops.options import AuxKey, Backend
from lifeops.pointwise import pointwise_bwd_dw, pointwise_bwd_dx

_op = torchlib.caller(spec.op)
_dwconv = torchlib.caller(dwconv.fwd_op)
_dwconv_bwd_dw = torchlib.caller(dwconv.bwd_dw_op)


class _Raw:
    """First-order backward: the ops themselves, on the faster of the CPU's two product paths."""

    dx, dw = staticmethod(pointwise_bwd_dx), staticmethod(pointwise_bwd_dw)

    @staticmethod
    def convolve(z, weight, residual, geo):
        return _dwconv(z, weight, None, residual, *geo)

    @staticmethod
    def filter_grad(g, z, weight, geo):
        *place, backend = geo
        return _dwconv_bwd_dw(g, z, weight.shape[-1], *place, weight.dtype, None, backend)[0]


class _Differentiable:
    """The same steps as differentiable calls, for double backward and for compilers, which choose products themselves."""

    dx = staticmethod(torch.matmul)

    @staticmethod
    def dw(dy, x):
        return dy.flatten(0, 1).t() @ x.flatten(0, 1)

    @staticmethod
    def convolve(z, weight, residual, geo):
        return torchlib.apply(TokenDWConv, _dwconv, z, weight, None, residual, *geo)

    @staticmethod
    def filter_grad(g, z, weight, geo):
        *place, backend = geo
        args = g, z, weight.shape[-1], *place, weight.dtype, None, backend
        return torchlib.apply(TokenDWConvWeightGrad, _dwconv_bwd_dw, *args)[0]


def _add(a, b):
    return b if a is None else a if b is None else a + b


def _scale_backward(maths, need, grad, pw, dw_weight, d, d_grad, z_before, z_before_grad, geo):
    """One cascade step: gradients of (point-wise weight, depth-wise weight, z before it)."""
    if grad is None and d_grad is None:
        return None, None, z_before_grad
    g_pw = maths.dw(grad, d) if need[1] and grad is not None else None
    g = _add(d_grad, None if grad is None else maths.dx(grad, pw))
    g_dw = maths.filter_grad(g, z_before, dw_weight, geo) if need[0] else None
    if not need[2]:
        return g_pw, g_dw, None
    return g_pw, g_dw, maths.convolve(g, dw_weight.flip(-1, -2), z_before_grad, geo)


def _scale1_key_grads(grads, P):
    """Gradients with respect to the scales before scale 1's prefix keys were copied into scales 2 and 3."""
    g1, *others = grads
    if all(g is None for g in others):
        return grads
    key = slice(*(n * next(g for g in others if g is not None).shape[2] // 3 for n in (1, 2)))
    moved = None
    cleared = []
    for g in others:
        if g is not None:
            moved = _add(moved, g[:, :P, key])
            mask = torch.ones_like(g[:1])
            mask[:, :P, key] = 0
            g = g * mask
        cleared.append(g)
    spread = F.pad(moved, (key.start, moved.shape[2], 0, cleared_tokens(others) - P))
    return [_add(g1, spread), *cleared]


def cleared_tokens(grads):
    return next(g for g in grads if g is not None).shape[1]


class LifeQKV(torch.autograd.Function):
    """(z1, z2, z3, d2, d3) = life_qkv(x, …): see :func:`lifeops.life_qkv`. Without ``keep`` backward computes d2 and d3 again."""

    @staticmethod
    def forward(x, w1, b1, dw2, pw2, dw3, pw3, H, W, P, scale1_key, keep, backend):
        return _op(x, w1, b1, dw2, pw2.flatten(1), dw3, pw3.flatten(1), H, W, P, scale1_key, keep, backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, w1, _, dw2, pw2, dw3, pw3, H, W, P, scale1_key, keep, backend = inputs
        z1, z2, _, d2, d3 = output
        ctx.set_materialize_grads(False)
        ctx.recompute = not keep
        if ctx.recompute:
            ctx.mark_non_differentiable(d2, d3)
            d2 = d3 = None
        ctx.save_for_backward(x, w1, dw2, pw2, dw3, pw3, z1, z2, d2, d3)
        ctx.geometry, ctx.scale1_key = (H, W, P, "keep", backend), scale1_key
        ctx.like = [(w.shape, w.stride()) for w in (dw2, pw2, dw3, pw3)]

    @staticmethod
    def backward(ctx, *grads):
        x, w1, dw2, pw2, dw3, pw3, z1, z2, d2, d3 = ctx.saved_tensors
        pw2, pw3 = pw2.flatten(1), pw3.flatten(1)
        need, geo = ctx.needs_input_grad, ctx.geometry
        maths = _Differentiable if torch.is_grad_enabled() or torch.compiler.is_compiling() else _Raw
        *z_grads, g_d2, g_d3 = grads
        P = geo[2]
        if ctx.scale1_key and P:
            z_grads = _scale1_key_grads(z_grads, P)
        g1, g2, g3 = z_grads
        if ctx.recompute:
            d2, d3 = _recompute(maths, z1, z2, dw2, pw2, dw3, geo, ctx.scale1_key)
        below = need[0] or need[1] or need[2]  # does anything under z1 need a gradient?
        g_pw3, g_dw3, g2 = _scale_backward(maths, (need[5], need[6], any(need[:5])), g3, pw3, dw3, d3, g_d3, z2, g2, geo)
        g_pw2, g_dw2, g1 = _scale_backward(maths, (need[3], need[4], below), g2, pw2, dw2, d2, g_d2, z1, g1, geo)
        gx = gw1 = gb1 = None
        if g1 is not None:
            gx = maths.dx(g1, w1) if need[0] else None
            gw1 = maths.dw(g1, x) if need[1] else None
            gb1 = g1.sum((0, 1)) if need[2] else None
        deeper = (torchlib.like_parameter(g, *like) for g, like in zip((g_dw2, g_pw2, g_dw3, g_pw3), ctx.like, strict=True))
        return gx, gw1, gb1, *deeper, None, None, None, None, None, None


torchlib.set_autograd(spec.op, LifeQKV.apply)


def _recompute(maths, z1, z2, dw2, pw2, dw3, geo, scale1_key):
    d2, P = maths.convolve(z1, dw2, None, geo), geo[2]
    if scale1_key and P:  # z2's own prefix rows, before scale 1's keys were copied in
        z2 = torch.cat((F.linear(z1[:, :P], pw2), z2[:, P:]), 1)
    return d2, maths.convolve(z2, dw3, None, geo)


def _differentiable_scales(x, w1, b1, dw2, pw2, dw3, pw3, H, W, P, scale1_key, keep, backend):
    """The chain as separate differentiable calls: what torch.func transforms see."""

    def convolve(z, weight):
        return token_dwconv(z, weight, grid=(H, W), num_prefix_tokens=P, backend=backend or None)

    z1 = F.linear(x, w1, b1)
    z2 = F.linear(convolve(z1, dw2), pw2.flatten(1))
    z3 = F.linear(convolve(z2, dw3), pw3.flatten(1))
    return spec.scale1_keys(z1, z2, z3, P) if scale1_key and P else (z1, z2, z3)


def _check_weights(x, w1, b1, dw2, pw2, dw3, pw3):
    check_tensors(spec.NAME, ("b1",), x=x, w1=w1, b1=b1, dw2=dw2, pw2=pw2, dw3=dw3, pw3=pw3)
    for name, w in (("pw2", pw2), ("pw3", pw3)):
        if w.dim() not in (2, 4) or w.shape[2:].numel() != 1:
            raise ValueError(f"{spec.NAME}: {name} must have shape (C_out, C_in) or (C_out, C_in, 1, 1), got {tuple(w.shape)}")


def life_qkv(
    x: Tensor, w1: Tensor, b1: Tensor | None, dw2: Tensor, pw2: Tensor, dw3: Tensor, pw3: Tensor, *, grid: tuple[int, int],
    num_prefix_tokens: int = 1, aux_key: AuxKey = "multiscale", layout: Literal["qkv", "scales"] = "qkv", recompute: bool = False,
    backend: Backend | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """LIFE's multi-scale query, key and value: local structure put into attention's inputs, prefix tokens included.

    ``z1 = x w1ᵀ + b1; z2 = DW3(z1) pw2ᵀ; z3 = DW5(z2) pw3ᵀ``; scale s holds q|k|v thirds of d_s = C//3 + (s < C%3) channels
    each. DW_K convolves the patch tokens depth-wise with zero padding; prefix tokens skip it but take every point-wise step.

    Args:
        x: (B, P + H*W, C), C >= 3. Under autocast everything runs in the autocast dtype.
        w1, b1: (3·d_1, C) and (3·d_1,) or None. dw2, dw3: (3·d_1, 1, K, K), (3·d_2, 1, K, K), odd K (the paper: 3 and 5).
        pw2, pw3: (3·d_2, 3·d_1), (3·d_3, 3·d_2), also with trailing 1x1 dimensions as in nn.Conv2d.
        grid, num_prefix_tokens: (H, W) and P >= 0.
        aux_key: "multiscale" takes the prefix tokens' keys from their own scales (the paper's figure); "scale1" takes scale 1's
            three times (the authors' code and checkpoints; C % 3 == 0).
        layout: "qkv" returns q, k, v, each (B, N, C), channels ordered by scale. "scales" returns z1, z2, z3, (B, N, 3·d_s)
            each holding q|k|v of its scale: nothing is joined, and heads inside one scale read them as strided views.
        recompute: keep two sequences less for backward and run the depth-wise steps again there.

    On CPU the last bits may depend on the number of threads: the three products are torch's.

    Raises:
        ValueError, TypeError: shapes, dtypes or the grid do not fit (the message says what was expected and got).
        lifeops.NotSupported: the requested backend cannot run this problem.

    Source: the module of LIFE (arXiv 2305.08551), checked against the authors' code.
    """
    args = _arguments(x, w1, b1, dw2, pw2, dw3, pw3, grid, num_prefix_tokens, aux_key, layout, recompute, backend)
    if torch._C._are_functorch_transforms_active():
        spec.check(*_flat(args))
        scales = _differentiable_scales(*args)
    elif torchlib.builds_graph(*args[:7]) and not torchlib.captured():
        scales = torchlib.apply(LifeQKV, _op, *args)[:3]
    else:
        scales = torchlib.below_autograd(_op, *_flat(args))[:3]
    return scales if layout == "scales" else join_scales(scales)


def explain(x, w1, b1, dw2, pw2, dw3, pw3, *, grid, num_prefix_tokens=1, aux_key="multiscale", layout="qkv", recompute=False, backend=None):
    """Which backend the chain and its depth-wise gradients take, and why not the others."""
    *args, request = _flat(_arguments(x, w1, b1, dw2, pw2, dw3, pw3, grid, num_prefix_tokens, aux_key, layout, recompute, backend))
    spec.check(*args, request)
    problem = spec.op.problem(*args)
    steps = problem.steps()
    parts = [registry.explain_op(spec.op, request, problem)]
    return parts + [registry.explain_op(dwconv.bwd_dw_op, request, step) for step in steps]


def _arguments(x, w1, b1, dw2, pw2, dw3, pw3, grid, num_prefix_tokens, aux_key, layout, recompute, backend):
    """The schema's arguments: autocast followed, geometry and names checked, backend resolved."""
    g = geometry.to_grid(spec.NAME, grid, num_prefix_tokens)
    check_choice(spec.NAME, "aux_key", aux_key, spec.AUX_KEYS)
    check_choice(spec.NAME, "layout", layout, ("qkv", "scales"))
    check_flags(spec.NAME, recompute=recompute)
    _check_weights(x, w1, b1, dw2, pw2, dw3, pw3)
    dtype = torchlib.autocast_dtype(x)
    if dtype is not None:
        for name, t in (("w1", w1), ("b1", w1 if b1 is None else b1), ("pw2", pw2), ("pw3", pw3)):
            check_floating(spec.NAME, name, t)
        x, w1, pw2, pw3 = (t.to(dtype) for t in (x, w1, pw2, pw3))
        b1 = None if b1 is None else b1.to(dtype)
    place = g.height, g.width, g.prefix, aux_key == "scale1"
    keep = torch.is_grad_enabled() and not recompute and not torchlib.captured()  # a program is the same with and without gradients
    return x, w1, b1, dw2, pw2, dw3, pw3, *place, keep, config.requested_backend(spec.NAME, backend)


def _flat(args):
    """The arguments with the point-wise weights in two dimensions, as the operator takes them; the Function takes parameters."""
    x, w1, b1, dw2, pw2, dw3, pw3, *rest = args
    return x, w1, b1, dw2, pw2.flatten(1), dw3, pw3.flatten(1), *rest


def join_scales(scales):
    """(z1, z2, z3) to (q, k, v), each (B, N, C) with its channels ordered by scale. One copy."""
    return tuple(torch.cat(parts, -1) for parts in zip(*(z.chunk(3, -1) for z in scales), strict=True))

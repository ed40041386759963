"""LocalViT's feed-forward (arXiv 2104.05707) over the patch tokens of a sequence, as one autograd Function over lifeops' ops.

    z1 = t W1ᵀ (+ b1)        u1 = f(N1(z1))        t the patch rows of x, N the batch norms as v = scale * z + shift
    z2 = DW(u1) (+ bd)       u2 = f(N2(z2))        s = gate(mean of u2 over the patches), or 1
    z3 = (s * u2) W2ᵀ (+ b2)                       y = x + [0 for the prefix | N3(z3)]

Kept for backward: t, z1, z2, z3 and per-channel values; u1, u2 and every normalised tensor are computed again where they are read.
Backward of a norm with batch statistics: batch_norm.py.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from lifeops import torchlib
from lifeops.ops.channel import act as rows
from lifeops.ops.channel import norm as norm_ops
from lifeops.ops.channel.batch_norm import Affine, merge, norm_backward
from lifeops.ops.channel.gate import gate, gate_backward
from lifeops.ops.token_dwconv import act_spec as dwconv
from lifeops.pointwise import pointwise, pointwise_bwd_dw, pointwise_bwd_dx

_stats, _act, _pool, _sums, _grad = map(torchlib.caller, (rows.stats_op, rows.act_op, rows.pool_op, rows.sums_op, rows.grad_op))
_norm_affine, _norm_gradients = map(torchlib.caller, (norm_ops.affine_op, norm_ops.gradients_op))
_dwconv, _dwconv_bwd_dx, _dwconv_bwd_dw = map(torchlib.caller, (dwconv.fwd_op, dwconv.bwd_dx_op, dwconv.bwd_dw_op))


class Config(NamedTuple):
    """What is not a tensor. ``dtype``: of the products. ``groups``: per norm the process group its statistics are shared in, or None."""

    dtype: torch.dtype
    act: str
    gate: str
    H: int
    W: int
    P: int
    eps: tuple[float, float, float]
    groups: tuple[Any, Any, Any]
    backend: str


def patches(cfg: Config) -> int:  # functions, not properties: torch 2.10's Dynamo traces none on named tuples
    return cfg.H * cfg.W


class Norm(NamedTuple):
    """A batch norm: none at all (gamma None), on constants (mean and var given) or on the batch."""

    gamma: torch.Tensor | None
    beta: torch.Tensor | None
    mean: torch.Tensor | None
    var: torch.Tensor | None


def on_batch(norm: Norm) -> bool:
    return norm.gamma is not None and norm.mean is None


def _affine(norm: Norm, stats, n: int, eps: float, group, backend: str = ""):
    """(Affine, batch mean, unbiased batch variance, n): ``stats()`` gives this process's mean and m2."""
    if norm.gamma is None:
        return Affine(), None, None, n
    if on_batch(norm):
        mean, m2 = stats()
        if group is not None:
            mean, m2, n = merge(mean, m2, n, group)
        scale, shift, rstd, var = _norm_affine(mean, m2, norm.gamma, norm.beta, eps, n, backend).unbind(0)
        return Affine(scale, shift, mean, rstd), mean, var, n
    rstd = (norm.var + eps).rsqrt()
    scale = norm.gamma * rstd
    return Affine(scale, norm.beta - norm.mean * scale, norm.mean, rstd), norm.mean, norm.var, n


def _gradients(norm: Affine, dv, dvx, gated, batch: bool, n: int, group, backend: str):
    """(dgamma, dbeta, a, b) of one norm from the sums (B, C) of dv and dv x; ``gated``: slope, slope_x, gate and pool_grad, or None."""
    if batch and group is None:
        return _norm_gradients(dv, dvx, *(gated or [None] * 4), norm.mean, norm.scale, norm.rstd, n, backend).unbind(0)
    if gated is not None:
        slope, slope_x, gates, pool_grad = gated
        dv, dvx = gates * dv + pool_grad * slope, gates * dvx + pool_grad * slope_x
    return norm_backward(norm, dvx.sum(0), dv.sum(0), batch, n, group)


def _add_rows(x, z, affine: Affine, cfg: Config):
    """x with affine(z) added to its patch rows; under autocast x may be wider than z."""
    if x.dtype == z.dtype:
        return _act(z, affine.scale, affine.shift, None, x, "none", patches(cfg), cfg.backend)
    added = _act(z, affine.scale, affine.shift, None, None, "none", patches(cfg), cfg.backend)
    return torch.cat((x[:, : cfg.P], x[:, cfg.P :] + added), 1)


def _with_bias(affine: Affine, bias):
    """scale * (z + bias) + shift."""
    if bias is None:
        return affine
    bias = bias.to(rows.accumulate_dtype(bias.dtype))
    if affine.scale is None:
        return Affine(shift=bias)
    return affine._replace(shift=affine.shift + affine.scale * bias)


def _patches(x, cfg: Config, dtype):
    return x[:, cfg.P :].to(dtype).contiguous()


def _gated(z2, n2: Affine, s, cfg: Config):
    return _act(z2, n2.scale, n2.shift, s, None, cfg.act, patches(cfg), cfg.backend)


def _product(weight, bias, cfg: Config):
    """A 1x1 convolution's parameters as a product takes them."""
    return weight.flatten(1).to(cfg.dtype), None if bias is None else bias.to(cfg.dtype)


def infer(x, w1, b1, norm1: Norm, dw, bd, norm2: Norm, gate_params, w2, b2, norm3: Norm, cfg: Config):
    """The chain without gradients, all norms on constants: the second activation is an epilogue of the convolution."""
    geo = cfg.H, cfg.W, 0, "keep"
    n1, n2, n3 = (_affine(norm, None, 0, eps, None)[0] for norm, eps in zip((norm1, norm2, norm3), cfg.eps, strict=True))
    (w1, b1), (w2, b2) = _product(w1, b1, cfg), _product(w2, b2, cfg)
    n1, n3 = _with_bias(n1, b1), _with_bias(n3, b2)  # the consumer adds it on the way; a product would read its output again
    z1 = pointwise(_patches(x, cfg, cfg.dtype), w1)
    u, pool, _, _ = _dwconv(
        z1, dw, bd, n1.scale, n1.shift, cfg.act, n2.scale, n2.shift, cfg.act, None, *geo, bool(cfg.gate), False, cfg.backend
    )
    if cfg.gate:
        s = gate(cfg.gate, pool / max(1, patches(cfg)), gate_params)
        u = _act(u, None, None, s, None, "none", patches(cfg), cfg.backend)
    return _add_rows(x, pointwise(u, w2), n3, cfg)


def _like(grad, like):
    shape, stride, dtype = like
    return torchlib.like_parameter(grad.to(dtype), shape, stride)


def _to(grad, dtype):
    return None if grad is None or dtype is None else grad.to(dtype)


class LocalityFFN(torch.autograd.Function):
    """(y, mean1, var1, mean2, var2, mean3, var3): the batch's statistics, unbiased, are None where a norm does not use them. ``anchor``:
    an empty part of x, by which a second derivative with respect to x gets here.
    """

    @staticmethod
    def forward(ctx, cfg: Config, x, w1, b1, g1, be1, m1, v1, dw, bd, g2, be2, m2, v2, q0, q1, q2, q3, w2, b2, g3, be3, m3, v3, anchor):
        norms = Norm(g1, be1, m1, v1), Norm(g2, be2, m2, v2), Norm(g3, be3, m3, v3)
        n = x.shape[0] * patches(cfg)

        def norm(i, stats):
            return _affine(norms[i], stats, n, cfg.eps[i], cfg.groups[i], cfg.backend)

        inputs = anchor, w1, g1, be1, dw, g2, be2, w2, g3, be3
        ctx.like = [(w.shape, w.stride(), w.dtype) for w in (w1, dw, w2)]
        ctx.bias_dtypes = [None if b is None else b.dtype for b in (b1, bd, b2)]
        (w1, b1), (w2, b2) = _product(w1, b1, cfg), _product(w2, b2, cfg)
        t = _patches(x, cfg, cfg.dtype)
        z1 = pointwise(t, w1, b1)
        n1, *batch1, count1 = norm(0, lambda: _stats(z1, "none", patches(cfg), cfg.backend))
        geo = cfg.H, cfg.W, 0, "keep"
        prologue, no_epilogue = (n1.scale, n1.shift, cfg.act), (None, None, "none")
        z2, _, *found = _dwconv(z1, dw, bd, *prologue, *no_epilogue, None, *geo, False, on_batch(norms[1]), cfg.backend)
        n2, *batch2, count2 = norm(1, lambda: found)
        m = s = None
        gate_params = tuple(q for q in (q0, q1, q2, q3) if q is not None)
        if cfg.gate:
            m = _pool(z2, n2.scale, n2.shift, cfg.act, patches(cfg), cfg.backend) / max(1, patches(cfg))
            s = gate(cfg.gate, m, gate_params)
        z3 = pointwise(_gated(z2, n2, s, cfg), w2, b2)
        n3, *batch3, count3 = norm(2, lambda: _stats(z3, "none", patches(cfg), cfg.backend))
        y = _add_rows(x, z3, n3, cfg)
        ctx.cfg, ctx.counts, ctx.on_batch = cfg, (count1, count2, count3), tuple(on_batch(norm) for norm in norms)
        ctx.save_for_backward(t, z1, z2, z3, m, w1, dw, w2, *n1, *n2, *n3, q0, q1, q2, q3, *inputs)
        batch = [value if on_batch(norm) else None for norm, pair in zip(norms, (batch1, batch2, batch3), strict=True) for value in pair]
        ctx.mark_non_differentiable(*(value for value in batch if value is not None))
        ctx.set_materialize_grads(False)  # of the statistics, which have none
        return y, *batch

    @staticmethod
    @torchlib.once_differentiable(
        "LocalityFeedForward", "for one, use torch.func, under which the module's layers are called one by one"
    )
    def backward(ctx, dy, *_):
        t, z1, z2, z3, m, w1, dw, w2, *rest = ctx.saved_tensors
        n1, n2, n3 = Affine(*rest[0:4]), Affine(*rest[4:8]), Affine(*rest[8:12])
        gate_params = tuple(q for q in rest[12:16] if q is not None)
        cfg = ctx.cfg
        sums1, sums2, sums3 = zip(ctx.on_batch, ctx.counts, cfg.groups, strict=True)
        place = patches(cfg), cfg.backend
        g = dy.to(z3.dtype)
        dg1 = dbe1 = dg2 = dbe2 = dg3 = dbe3 = a = b = None
        # N3 and the second product
        if n3.scale is not None:
            _, dv, dvx, _, _ = _sums(g, z3, None, None, "none", *place)
            dg3, dbe3, a, b = _gradients(n3, dv, dvx, None, *sums3, cfg.backend)
        dz3 = _grad(g, z3, n3.scale, None, None, None, a, b, "none", *place)
        db2 = rows.patch_rows(dz3, patches(cfg)).sum((0, 1)) if ctx.needs_input_grad[19] else None
        s = gate(cfg.gate, m, gate_params) if cfg.gate else None
        dw2 = pointwise_bwd_dw(dz3, _gated(z2, n2, s, cfg))
        da = pointwise_bwd_dx(dz3, w2)
        # the gate and N2, from one reading of da and z2
        pool_grad, dgate, gated, a, b = None, (), None, None, None
        if cfg.gate or n2.scale is not None:
            df, dv, dvx, f1, f1x = _sums(da, z2, n2.scale, n2.shift, cfg.act, *place)
            if cfg.gate:
                dm, dgate = gate_backward(cfg.gate, df, m, gate_params)
                pool_grad = dm / max(1, patches(cfg))
                gated = f1, f1x, s, pool_grad
            if n2.scale is not None:
                dg2, dbe2, a, b = _gradients(n2, dv, dvx, gated, *sums2, cfg.backend)
        dz2 = _grad(da, z2, n2.scale, n2.shift, s, pool_grad, a, b, cfg.act, *place)
        del da
        # the depth-wise convolution and N1
        geo = cfg.H, cfg.W, 0, "keep"
        prologue = n1.scale, n1.shift, cfg.act
        ddw, dbd = _dwconv_bwd_dw(dz2, z1, dw.shape[-1], *prologue, *geo, dw.dtype, ctx.bias_dtypes[1], cfg.backend)
        dz1, dscale, dshift = _dwconv_bwd_dx(dz2, z1, dw, *prologue, None, None, *geo, cfg.backend)
        if n1.scale is not None:
            dg1, dbe1, a, b = _gradients(n1, dshift[None], dscale[None], None, *sums1, cfg.backend)
            if a is not None:
                dz1 = _grad(dz1, z1, None, None, None, None, a, b, "none", *place)
        db1 = rows.patch_rows(dz1, patches(cfg)).sum((0, 1)) if ctx.needs_input_grad[3] else None
        dw1 = pointwise_bwd_dw(dz1, t)
        dx = _add_rows(dy, pointwise_bwd_dx(dz1, w1), Affine(), cfg) if ctx.needs_input_grad[1] else None
        dq = (*dgate, None, None, None, None)[:4]
        dw1, ddw, dw2 = (_like(g, like) for g, like in zip((dw1, ddw, dw2), ctx.like, strict=True))
        db1, dbd, db2 = (_to(g, dtype) for g, dtype in zip((db1, dbd, db2), ctx.bias_dtypes, strict=True))
        grads = [
            None, dx, dw1, db1, dg1, dbe1, None, None, ddw, dbd, dg2, dbe2, None, None, *dq, dw2, db2, dg3, dbe3, None, None, None,
        ]  # fmt: skip
        return tuple(grad if need else None for grad, need in zip(grads, ctx.needs_input_grad, strict=True))
